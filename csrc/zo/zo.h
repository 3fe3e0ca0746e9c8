// Zeroth-order operators on raw pointers, definition zo/1: no torch, no Python.
//
// z(seed, tensor_id, i) is a function of three numbers; i = offset + position in the row-major tensor.
//   axpy, plain:       p <- round((1 - d) p + sum_k c_k z_k)        accumulated in order of k, rounded once
//   axpy, sequential:  for each k: p <- round((1 - d_k) p + c_k z_k)    the bits of K calls, one pass over p
// Low-rank noise is z = U V^T. Element i of a matrix is in row i / columns and column i % columns. U comes from the
// term's seed, V from its right seed. A tensor whose `columns` is 0 is a vector, and has Gaussian z.
// fp32, bf16 and fp16 accumulate in fp32 with one fma a term. fp64 accumulates in double, with product and sum rounded
// separately.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace leanops {
namespace zo {

enum class Distribution : int { kGaussian = 0, kRademacher = 1, kLowRank = 2 };

// Philox streams, the fourth counter word. Rounding has one of its own in types.h.
constexpr uint32_t kStreamGaussian = 0, kStreamRademacher = 1, kStreamLeft = 3, kStreamRight = 4;
constexpr int64_t kMaxRank = 64;

// The terms of an axpy.
struct Terms {
  const uint64_t* seeds;  // [count]
  const double* coeffs;   // [count]
  const double* decays;   // [decay_count]: 1, or count if sequential
  int64_t count;
  int64_t decay_count;
  Distribution distribution;
  Rounding rounding;
  bool sequential;
  const uint64_t* right_seeds;  // [count], of low-rank noise
  int64_t rank;                 // in [1, kMaxRank]
};

// The kernels of an instruction set. `words` computes `count` Philox blocks from `block` on, four words each. The
// others work on n >= 0 consecutive elements from index `index` on, at any alignment.
struct Kernels {
  void (*words)(uint32_t* out, int64_t count, uint64_t block, uint32_t tensor_id, uint32_t stream,
                uint64_t seed);
  void (*noise)(void* out, DType dtype, int64_t n, uint64_t seed, uint32_t tensor_id, uint64_t index,
                Distribution distribution);
  // out is in, or does not overlap it. columns: of low-rank noise.
  void (*axpy)(void* out, const void* in, DType dtype, int64_t n, const Terms& terms, uint32_t tensor_id,
               uint64_t index, uint64_t columns);
  // plus = round(in + coeff z), minus = round(in - coeff z): the bits of two calls of axpy. z is computed once.
  void (*both)(void* plus, void* minus, const void* in, DType dtype, int64_t n, uint64_t seed, double coeff,
               uint32_t tensor_id, uint64_t index, Distribution distribution);
  // a is the old content of plus. plus = a + scale * b, minus = a - scale * b, each rounded once to the dtype.
  void (*spread)(void* plus, void* minus, const void* b, DType dtype, int64_t n, double scale);
};

LEANOPS_KERNEL_TABLES()

}  // namespace zo
}  // namespace leanops
