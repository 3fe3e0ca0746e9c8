// What a launch of zo.cuh is told: which tensors, which terms. Plain data, the same bytes for nvcc, NVRTC and
// NumPy.
#ifndef LEANOPS_ZO_CALL_CUH
#define LEANOPS_ZO_CALL_CUH

#include "../common/device.cuh"

namespace leanops {
namespace zo {

enum Distribution { GAUSSIAN = 0, RADEMACHER = 1 };
enum Mode {
  NOISE = 0,   // out <- z
  SINGLE = 1,  // out <- round(keep in + c z)
  MANY = 2,    // the same over any number of terms, or the terms in sequence
  PAIR = 3,    // out <- round(in + c z), out2 <- round(in - c z)
};

const int WARPS = 4;          // warps of a thread block; each takes a unit at a time
const int UNIT_LONG = 4096;   // elements: 32 Rademacher blocks, one a lane
const int UNIT_SHORT = 1024;  // MANY: 8 blocks of 4 terms, one a lane
const int UNIT_ROWS = 32;     // of a unit of low-rank noise; its columns are Call::wide
const int HELD_ROWS = 4;      // of them, those that a lane holds at a time
const int MAX_RANK = 64;
const int PANEL_FLOATS = 1024;  // of V that a warp keeps: wide * rank is no more
const int INLINE_SLOTS = 16;    // tensors that travel as kernel parameters; more go through device memory
const int INLINE_TERMS = 8;     // terms, likewise

struct Slot {         // one tensor, contiguous
  u64 out, in, out2;  // addresses; what a mode lacks equals `out`
  i64 offset, numel;  // logical index of the first element, elements
  i64 first;          // units of the tensors before this one
  u64 tensor_id;
  i64 columns;  // of the whole matrix, for low-rank noise
};

struct Call {
  u64 slots, seeds, right_seeds, coeffs, decays;  // device addresses; 0: inline below
  i64 units;
  i64 rank, wide;  // of low-rank noise
  int tensors, terms, decay_count, sequential;
  i64 inline_seeds[INLINE_TERMS];
  i64 inline_right_seeds[INLINE_TERMS];
  double inline_coeffs[INLINE_TERMS];
  double inline_decays[INLINE_TERMS];
  Slot inline_slots[INLINE_SLOTS];
};

// Words that travel as kernel parameters to device memory: there is no host buffer to keep alive, so a graph
// can capture it.
const int UPLOAD_WORDS = 448;
struct Upload {
  u64 target;
  i64 count;
  u64 words[UPLOAD_WORDS];
};

}  // namespace zo
}  // namespace leanops

#endif
