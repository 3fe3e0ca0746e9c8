// The argument of a launch of sm3.cuh: tensors and numbers. Plain data, with the same bytes for nvcc, NVRTC and NumPy
// (pyops/sm3/nvrtc.py).
#ifndef LEANOPS_SM3_CALL_CUH
#define LEANOPS_SM3_CALL_CUH

#include "../common/device.cuh"

namespace leanops {
namespace sm3 {

enum Momentum { NO_MOMENTUM = 0, FLOAT32 = 1, BFLOAT16 = 2, INT8 = 3 };

const int THREADS = 256;
const int LANE = 8;     // elements of a row that a thread has at a time
const int STEPS = 8;    // rows of a tile that a thread takes, one after another
const int BLOCK = 256;  // elements that share a scale of an int8 momentum: LANE for each of 32 threads

// One tensor as a matrix: the axes before `split` are its rows, the others its columns. A tile is 16,384 elements: with
// l threads along a row it has 8 l columns and 2,048 / l rows. A flat tensor has rank 0 or 1, and every element has its
// own accumulator. It is a matrix of 256 columns; its last row may be incomplete.
struct Slot {
  u64 param, grad, cover, momentum, scale;  // addresses
  u64 maxima;  // address of zeroed words: a counter of finished tiles, then a maximum for each accumulator of
               // the cover; 0: the tensor is flat, or of rank 2 with a single tile
  i64 rows, cols, numel;
  i64 offset;        // logical index of the first element
  i64 first, tiles;  // tiles of the tensors before this one, tiles of this one
  i64 shape;         // index of its sizes in the table's words
  u32 tensor_id;
  u8 rank, split, threads_log2, flags;  // threads_log2: log2 of the threads along a row of a tile
  u64 lr_factor;  // index in Call::lr_factors; if the call has none, the bits of the float32 itself
};
enum Flag : u8 { FLAT = 1, ALIGNED = 2 };  // ALIGNED: whole chunks are aligned to the width of their accesses

const int INLINE_WORDS = 480;  // words of slots and shapes that travel as kernel parameters

struct Call {
  u64 table;       // device address of the slots and then the shapes; 0: they are in `words`
  u64 lr, seed;    // device addresses; 0: lr_value, seed_value
  u64 grad_scale;  // device address; 0: grad_scale_value
  u64 found_inf;   // device address; 0: not given
  u64 lr_factors;  // device address of a float32 for each parameter of the call; 0: the slots have them
  double lr_value;
  i64 seed_value;
  double weight_decay;  // decoupled
  i64 tiles;
  float grad_scale_value, coupled_decay, eps;
  float beta, one_minus_beta, momentum, one_minus_momentum;
  int tensors;
  u8 lr_is_float;
  u8 averages;  // beta < 1
  u8 couples;   // coupled_decay is part of the gradient
  u8 maximizes;
  u8 averages_gradient;  // the momentum is of the gradient instead of u
  u8 unused[3];
  u64 words[INLINE_WORDS];
};

}  // namespace sm3
}  // namespace leanops

#endif
