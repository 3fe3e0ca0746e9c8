// The optimizer SM3 on raw pointers, definition sm3/1: no torch, no Python.
//
// A tensor is seen as a matrix, rows and columns being products of its first and of its last axes. With R and
// C the least accumulators of a row and of a column, every element takes
//   nu = min(R, C) + g^2,  or (1 - beta) g^2 + beta min(R, C)   new R, C: largest nu of the row, of the column
//   u = g / sqrt(nu + eps), 0 where nu = 0
//   m = (1 - momentum) u + momentum m
//   w = (1 - lr decay) w - lr m
// in fp32, every operation rounded once; the order of operations and fmas is in rows.h. Maxima are taken of
// the bits of nu >= 0 as unsigned integers, among which a NaN is above every number.
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

// The numbers of one step, alike for all its tensors, and as they enter the arithmetic.
struct Numbers {
  float gain;         // 1 / grad_scale, its sign turned to maximize
  float decay;        // weight decay that is added to the gradient,
  bool coupled;       // where it is
  bool sums;          // beta = 1
  float beta, fresh;  // beta, 1 - beta
  float eps;
  float kept, share;    // momentum, 1 - momentum
  float rate, shrink;   // -lr, 1 - lr decay, which is 1 without decoupled decay
  double lr, shrink64;  // of fp64
  uint64_t seed;        // of stochastic rounding
  Rounding rounding;
};

struct Options {
  double lr, momentum, beta, eps, weight_decay;
  bool decoupled, maximize, stochastic_rounding;
  float grad_scale;  // 1 where there is none
  uint64_t seed;
};

static inline Numbers numbers_of(const Options& o) {
  Numbers n;
  const float inverse = 1.0f / o.grad_scale;
  n.gain = o.maximize ? -inverse : inverse;
  n.coupled = !o.decoupled && o.weight_decay != 0;
  n.decay = static_cast<float>(o.weight_decay);
  n.sums = o.beta == 1;
  n.beta = static_cast<float>(o.beta);
  n.fresh = static_cast<float>(1.0 - o.beta);
  n.eps = static_cast<float>(o.eps);
  n.kept = static_cast<float>(o.momentum);
  n.share = static_cast<float>(1.0 - o.momentum);
  n.rate = -static_cast<float>(o.lr);
  n.lr = o.lr;
  n.shrink64 = o.decoupled && o.weight_decay != 0 ? 1.0 - o.lr * o.weight_decay : 1.0;
  n.shrink = static_cast<float>(n.shrink64);
  n.seed = o.seed;
  n.rounding = o.stochastic_rounding ? Rounding::kStochastic : Rounding::kNearest;
  return n;
}

// What a thread reads after a tile, so that it can be fetched in time; null where memory just goes on.
struct Next {
  const void *param = nullptr, *grad = nullptr, *momentum = nullptr;
};

// A rectangle of a tensor's matrix: what a thread takes at a time. If it leaves out columns, or rows of a row
// of axis 0, then only so that its runs of elements begin and end at a block's edge.
struct Tile {
  char* param;  // of the whole tensor, as the four below
  const char* grad;
  char* momentum;
  float* scales;  // of int8: [rows of axis 0, blocks of one]
  DType dtype;
  Momentum kind;
  uint32_t tensor_id;
  uint64_t offset;
  bool single;     // the matrix has one row
  int64_t width;   // columns of the whole matrix
  int64_t length;  // elements of a row of axis 0
  int64_t row, rows, column, columns;
  const float* row_least;     // R                [rows]
  const float* column_least;  // C                [columns]
  uint32_t* row_most;         // raised to the tile's largest nu                [rows]
  uint32_t* column_most;      // raised likewise; of a single row it is set, and may be C     [columns]
  Next next;
};

struct Kernels {
  void (*tile)(const Numbers& numbers, const Tile& tile);
};

LEANOPS_KERNEL_TABLES()

}  // namespace sm3
}  // namespace leanops
