// What a launch of sm3.cuh is told: which tensors, which numbers. Plain data, the same bytes for nvcc, NVRTC
// and NumPy.
#ifndef LEANOPS_SM3_CALL_CUH
#define LEANOPS_SM3_CALL_CUH

#include "../common/device.cuh"

namespace leanops {
namespace sm3 {

enum Momentum { NO_MOMENTUM = 0, FLOAT32 = 1, BFLOAT16 = 2, INT8 = 3 };

const int THREADS = 256;
const int LANE = 8;     // elements of a row that a thread takes at once
const int STEPS = 8;    // rows that a thread takes in a tile
const int BLOCK = 256;  // elements that share a scale of an int8 momentum: 32 lanes

// One tensor as a matrix: the axes before `split` are its rows, the others its columns. A tile is 16,384
// elements: with l threads along a row it has 8 l columns and 2,048 / l rows. A flat tensor (rank 0 or 1,
// whose accumulators no two elements share) is a matrix of 256 columns, of which the last row may be
// incomplete.
struct Slot {
  u64 param, grad, cover, momentum, scale;  // addresses
  u64 maxima;  // address of zeroed words: arrivals, then one for each of the cover's; 0: flat, or one tile
               // alone
  i64 rows, cols, numel;
  i64 offset;        // logical index of the first element
  i64 first, tiles;  // tiles of the tensors before this one, and its own
  i64 shape;         // where in the table its sizes are, in words
  u32 tensor_id;
  u8 rank, split, threads_log2, flags;  // threads along a row of a tile
};
enum Flag : u8 { FLAT = 1, ALIGNED = 2 };  // ALIGNED: whole chunks lie on the boundaries of their accesses

const int INLINE_WORDS = 480;  // of slots and shapes that travel as kernel parameters

struct Call {
  u64 table;                            // device address of the slots and then the shapes; 0: inline below
  u64 lr, seed, grad_scale, found_inf;  // device addresses of these numbers; 0: the values below
  double lr_value;
  i64 seed_value;
  double weight_decay;  // decoupled; 0: none
  i64 tiles;
  float grad_scale_value, coupled_decay, eps;
  float beta, one_minus_beta, momentum, one_minus_momentum;
  int tensors;
  u8 lr_is_float, averages, couples, maximizes;  // averages: beta < 1; couples: decay is part of the gradient
  u8 unused[4];
  u64 words[INLINE_WORDS];
};

}  // namespace sm3
}  // namespace leanops

#endif
