// The optimizer SM3 on raw pointers, definition sm3/1: no torch, no Python.
//
// A tensor is seen as a matrix: its first axes are the rows, its last axes the columns. R and C are the least
// accumulators of a row and of a column. For every element
//   nu = min(R, C) + g^2,  or (1 - beta) g^2 + beta min(R, C)   new R, C: largest nu of the row, of the column
//   u = g / sqrt(nu + eps), 0 where nu = 0
//   m = (1 - momentum) u + momentum m
//   w = (1 - lr decay) w - lr factor m
// or, if the momentum is of the gradient,
//   m = (1 - momentum) g + momentum m
//   u = m / sqrt(nu + eps), 0 where nu = 0
//   w = (1 - lr decay) w - lr factor u
// in fp32, with every operation rounded once; rows.h has the order of operations and fmas. A maximum is taken of
// the bits of nu >= 0 as unsigned integers; the bits of a NaN are above those of every number.
#pragma once

#include <cstdint>

#include "../common/isa.h"
#include "../common/types.h"

namespace leanops {
namespace sm3 {

enum class Momentum : int { kNone = 0, kFloat32 = 1, kBFloat16 = 2, kInt8 = 3 };

constexpr int64_t kBlock = 256;  // elements of a row of axis 0 that share a scale of an int8 momentum

static constexpr int64_t momentum_size(Momentum kind) {
  return kind == Momentum::kNone ? 0 : kind == Momentum::kFloat32 ? 4 : kind == Momentum::kBFloat16 ? 2 : 1;
}

// The numbers of a step that all its tensors share, as the arithmetic uses them.
struct Numbers {
  float grad_factor;    // 1 / grad_scale, or -1 / grad_scale to maximize
  float coupled_decay;  // weight decay that is added to the gradient, if `coupled`
  bool coupled;
  bool sums;  // beta = 1
  float beta, one_minus_beta;
  float eps;
  float momentum, one_minus_momentum;
  bool averages_gradient;  // the momentum is of the gradient
  float minus_lr;
  float decay_factor;         // 1 - lr decay; 1 without decoupled decay
  double lr, decay_factor64;  // for fp64
  uint64_t seed;              // of stochastic rounding
  Rounding rounding;
};

// The options of a step, as the operator has them.
struct Options {
  double lr, momentum, beta, eps, weight_decay;
  bool decoupled, maximize, stochastic_rounding, average_gradient;
  float grad_scale;  // 1 if the operator got none
  uint64_t seed;
};

static inline Numbers numbers_of(const Options& o) {
  Numbers n;
  const float inverse = 1.0f / o.grad_scale;
  n.grad_factor = o.maximize ? -inverse : inverse;
  n.coupled = !o.decoupled && o.weight_decay != 0;
  n.coupled_decay = static_cast<float>(o.weight_decay);
  n.sums = o.beta == 1;
  n.beta = static_cast<float>(o.beta);
  n.one_minus_beta = static_cast<float>(1.0 - o.beta);
  n.eps = static_cast<float>(o.eps);
  n.momentum = static_cast<float>(o.momentum);
  n.one_minus_momentum = static_cast<float>(1.0 - o.momentum);
  n.averages_gradient = o.average_gradient;
  n.minus_lr = -static_cast<float>(o.lr);
  n.lr = o.lr;
  n.decay_factor64 = o.decoupled && o.weight_decay != 0 ? 1.0 - o.lr * o.weight_decay : 1.0;
  n.decay_factor = static_cast<float>(n.decay_factor64);
  n.seed = o.seed;
  n.rounding = o.stochastic_rounding ? Rounding::kStochastic : Rounding::kNearest;
  return n;
}

// The memory that a thread reads after a tile, for prefetching; null if it follows the tile's own memory.
struct Next {
  const void *param = nullptr, *grad = nullptr, *momentum = nullptr;
};

// A rectangle of a tensor's matrix, which a thread takes at a time. If it has not all columns of its rows, or not all
// elements of a row of axis 0, then its runs of consecutive elements begin and end at the edges of int8 blocks.
struct Tile {
  char* param;  // these four pointers are those of the whole tensor
  const char* grad;
  char* momentum;
  float* scales;  // of int8: [rows of axis 0, blocks of a row]
  DType dtype;
  Momentum kind;
  uint32_t tensor_id;
  uint64_t offset;
  float lr_factor;
  bool single;     // the matrix has a single row
  int64_t width;   // columns of the whole matrix
  int64_t length;  // elements of a row of axis 0
  int64_t row, rows, column, columns;
  const float* row_cover;     // [rows], R
  const float* column_cover;  // [columns], C
  uint32_t* row_maxima;       // [rows], raised to the bits of the tile's largest nu
  uint32_t* column_maxima;    // [columns], raised, too; with a single row overwritten, and perhaps C itself
  Next next;
};

struct Kernels {
  void (*tile)(const Numbers& numbers, const Tile& tile);
};

LEANOPS_KERNEL_TABLES()

}  // namespace sm3
}  // namespace leanops
