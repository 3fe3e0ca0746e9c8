// The argument of a launch of zo.cuh and lowrank.cuh: tensors and terms. Plain data, with the same bytes for nvcc,
// NVRTC and NumPy (pyops/zo/nvrtc.py).
#ifndef LEANOPS_ZO_CALL_CUH
#define LEANOPS_ZO_CALL_CUH

#include "../common/device.cuh"

namespace leanops {
namespace zo {

enum Distribution { GAUSSIAN = 0, RADEMACHER = 1 };
enum Mode {
  NOISE = 0,   // out <- z
  SINGLE = 1,  // out <- round(keep in + c z)
  MANY = 2,    // out <- round(keep in + sum of c z), or one rounding after each term
  PAIR = 3,    // out <- round(in + c z), out2 <- round(in - c z)
};

const int WARPS = 4;          // warps of a thread block; a warp takes one unit at a time
const int UNIT_LONG = 4096;   // elements of a unit: each of 32 lanes computes one Rademacher block of 128
const int UNIT_SHORT = 1024;  // MANY: 8 Rademacher blocks; 32 lanes compute them for 4 terms
const int UNIT_ROWS = 32;     // rows of a unit of low-rank noise; it has Call::wide columns
const int HELD_ROWS = 4;      // rows of the unit that a lane holds at a time
const int MAX_RANK = 64;
const int PANEL_FLOATS = 1024;  // room of a warp for V: wide * rank floats
const int INLINE_SLOTS = 16;    // tensors that travel as kernel parameters; more go through device memory
const int INLINE_TERMS = 8;     // terms that travel as kernel parameters; more go through device memory

struct Slot {         // one contiguous tensor
  u64 out, in, out2;  // addresses; those that the mode does not use equal `out`
  i64 offset, numel;  // logical index of the first element, elements
  i64 first;          // units of the tensors before this one
  u64 tensor_id;
  i64 columns;  // low-rank noise: columns of the whole matrix
};

struct Call {
  u64 slots, seeds, right_seeds, coeffs, decays;  // device addresses; 0: the inline values below
  i64 units;
  i64 rank, wide;  // low-rank noise: columns of U and V, columns of a unit
  int tensors, terms, decay_count, sequential;
  i64 inline_seeds[INLINE_TERMS];
  i64 inline_right_seeds[INLINE_TERMS];
  double inline_coeffs[INLINE_TERMS];
  double inline_decays[INLINE_TERMS];
  Slot inline_slots[INLINE_SLOTS];
};

// The argument of a launch that copies words to device memory. The words travel as kernel parameters: no host buffer
// has to stay alive, so a CUDA graph can capture the launch.
const int UPLOAD_WORDS = 448;
struct Upload {
  u64 target;
  i64 count;
  u64 words[UPLOAD_WORDS];
};

}  // namespace zo
}  // namespace leanops

#endif
