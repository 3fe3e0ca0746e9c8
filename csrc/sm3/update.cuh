// The arithmetic of sm3/1 on the LANE elements of a row that a thread has.
#ifndef LEANOPS_SM3_UPDATE_CUH
#define LEANOPS_SM3_UPDATE_CUH

#include "../common/block.cuh"
#include "lane.cuh"

namespace leanops {
namespace sm3 {

// The numbers of a call that a block computes once.
struct Numbers {
  float grad_factor;  // 1 / grad_scale, or -1 / grad_scale to maximize
  float minus_lr;     // of the tensor, as lr
  double lr;
  double decay_factor;  // 1 - lr weight_decay
  float decay_factor_float;
  u64 seed;
  bool eps_in_range;  // nu + eps is in the range of sqrt_in_range for all nu < 2^40

  LEANOPS_DEVICE void set_lr(double value) {
    lr = value;
    minus_lr = -(float)value;
  }
};

LEANOPS_DEVICE float lr_factor(const Call& call, const Slot& slot) {
  return call.lr_factors ? global<const float>(call.lr_factors)[slot.lr_factor]
                         : as_float((u32)slot.lr_factor);
}

LEANOPS_DEVICE Numbers numbers_of(const Call& call) {
  Numbers k;
  const float scale = call.grad_scale ? *global<const float>(call.grad_scale) : call.grad_scale_value;
  const float inverse = div(1.0f, scale);
  k.grad_factor = call.maximizes ? -inverse : inverse;
  k.lr = !call.lr           ? call.lr_value
         : call.lr_is_float ? (double)*global<const float>(call.lr)
                            : *global<const double>(call.lr);
  k.decay_factor = call.weight_decay == 0.0 ? 1.0 : add(1.0, -mul(k.lr, call.weight_decay));
  k.decay_factor_float = (float)k.decay_factor;
  k.seed = (u64)(call.seed ? *global<const i64>(call.seed) : call.seed_value);
  k.eps_in_range = call.eps >= 0x1p-100f && call.eps < 0x1p40f;
  return k;
}

// g <- u = g / sqrt(nu + eps), and 0 where nu is 0. g and nu are [LANE]. `top`: bits of the largest nu; those of a NaN
// are larger than all others. `is_momentum`: g is a momentum, which may be larger than sqrt(nu / (1 - beta)).
LEANOPS_DEVICE void quotients(float* g, const float* nu, u32 top, float eps, bool eps_in_range,
                              bool is_momentum) {
  u32 least = 0xffffffffu;  // the least 2 bits(|g|) - 1; for g = 0 that is the largest number
#pragma unroll
  for (int e = 0; e < LANE; ++e) least = min(least, 2 * as_bits(g[e]) - 1);
  bool in_range = top < 0x53800000u && least >= 2 * 0x0d800000u - 1;  // nu < 2^40, |g| >= 2^-100 or 0
  if (!eps_in_range) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) in_range = in_range && nu[e] >= 0x1p-100f && eps < 0x1p40f;
  }
  if (is_momentum) {
#pragma unroll
    for (int e = 0; e < LANE; ++e)
      in_range = in_range && (as_bits(g[e]) & 0x7fffffffu) < 0x65800000u;  // |g| < 2^76
  }
  if (in_range) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) {
      const float u = div_in_range(g[e], sqrt_in_range(add(nu[e], eps)));
      g[e] = as_float((as_bits(u) & 0x7fffffffu) | (as_bits(g[e]) & 0x80000000u));  // [LANE]
    }
  } else {
    // rare: an array in local memory and a loop that is not unrolled, for short code and no more registers
    float rare[2][LANE];  // [2, LANE]
#pragma unroll
    for (int e = 0; e < LANE; ++e) {
      rare[0][e] = g[e];  // [2, LANE]
      rare[1][e] = add(nu[e], eps);
    }
#pragma unroll 1
    for (int e = 0; e < LANE; ++e) rare[0][e] = div(rare[0][e], sqrt(rare[1][e]));  // [2, LANE]
#pragma unroll
    for (int e = 0; e < LANE; ++e) g[e] = rare[0][e];  // [LANE]
  }
#pragma unroll
  for (int e = 0; e < LANE; ++e) g[e] = nu[e] == 0.0f ? 0.0f : g[e];  // [LANE]
}

// The largest x of the `along` threads of a warp that are along the same row; `along` is a power of two.
LEANOPS_DEVICE u32 max_along(u32 x, int along) {
  if (along == 32) return warp_max(x);
#pragma unroll 1
  for (int mask = along / 2; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// An int8 block's scale, and its inverse by which the codes are computed. `largest`: bits of the largest |m|.
struct Scale {
  float scale, inverse;
  bool not_finite;  // a NaN or an infinity is in the block: its scale is NaN, so all of it reads NaN
};
LEANOPS_DEVICE Scale scale_of(u32 largest) {
  const float a = as_float(largest);
  const bool not_finite = largest >= 0x7f800000u, zero = largest < 0x03800000u;  // below 2^-120
  return Scale{not_finite ? as_float(0x7fc00000u)
               : zero     ? 0.0f
                          : div(a, 127.0f),
               zero ? 0.0f : div(127.0f, a), not_finite};
}

// decay_factor w - lr m.
LEANOPS_DEVICE float moved(float w, float m, const Numbers& k) {
  return fma(k.minus_lr, m, mul(w, k.decay_factor_float));
}
LEANOPS_DEVICE double moved(double w, float m, const Numbers& k) {
  return add(mul(w, k.decay_factor), -mul(k.lr, (double)m));
}

// The numbers that all rows of a tensor share.
struct Tensor {
  u64 param, grad, momentum, scale;  // addresses
  i64 offset;
  u32 id;
  LEANOPS_DEVICE Tensor(const Slot& slot)
      : param(slot.param),
        grad(slot.grad),
        momentum(slot.momentum),
        scale(slot.scale),
        offset(slot.offset),
        id(slot.tensor_id) {}
};

// A thread's elements of a row, as they are in memory before the step.
template <class T, int M>
struct Row {
  Lane<T> lane;
  i64 block;                               // int8 momentum: index of the scale
  Raw<T> param, grad;                      // [LANE]
  Raw<typename Stored<M>::Type> momentum;  // [LANE]
  float scale;

  template <bool WHOLE>
  LEANOPS_DEVICE void load(const Tensor& tensor) {
    lane.template load<WHOLE>(tensor.param, param);                              // [LANE]
    lane.template load<WHOLE>(tensor.grad, grad);                                // [LANE]
    if (M != NO_MOMENTUM) lane.template load<WHOLE>(tensor.momentum, momentum);  // [LANE]
    if (M == INT8) scale = WHOLE || lane.left > 0 ? global<const float>(tensor.scale)[block] : 0.0f;
  }
};

// x <- m = (1 - momentum) x + momentum m, [LANE], and stores it. With INT8 all threads of a warp must call it; `along` of
// them share the row.
template <class T, int M, bool WHOLE>
LEANOPS_DEVICE void average(float* x, const Row<T, M>& row, const Call& call, const Tensor& tensor,
                            int along) {
  typedef typename Stored<M>::Type S;
  float old[LANE];  // [LANE]
  if constexpr (M == INT8) {
    from_codes(row.momentum, row.scale, old);  // [LANE]
  } else {
#pragma unroll
    for (int e = 0; e < LANE; ++e) old[e] = widen(get(row.momentum.w, e, (const S*)0));  // [LANE]
  }
#pragma unroll
  for (int e = 0; e < LANE; ++e)
    x[e] = fma(call.one_minus_momentum, x[e], mul(call.momentum, old[e]));  // [LANE]
  Raw<S> stored;                                                            // [LANE]
  if constexpr (M == INT8) {
    u32 largest = 0;
#pragma unroll
    for (int e = 0; e < LANE; ++e) largest = max(largest, as_bits(x[e]) & 0x7fffffffu);
    const Scale s = scale_of(max_along(largest, along));
    if (s.not_finite) {
      stored.w[0] = stored.w[1] = 0x01010101u;  // [LANE], codes 1
    } else {
      to_codes(x, s.inverse, stored);  // [LANE]
    }
    if (((int)threadIdx.x & (along - 1)) == 0 && (WHOLE || row.lane.left > 0))
      global<float>(tensor.scale)[row.block] = s.scale;
  } else if constexpr (M == BFLOAT16) {
#pragma unroll
    for (int e = 0; e < LANE; e += 2) stored.w[e / 2] = pack_bf16(x[e], x[e + 1]);  // [LANE]
  } else {
#pragma unroll
    for (int e = 0; e < LANE; ++e) stored.w[e] = as_bits(x[e]);  // [LANE]
  }
  row.lane.template store<WHOLE>(tensor.momentum, stored);  // [LANE]
}

// Updates the parameter and the momentum of a thread's elements of a row. c [LANE] has the smallest accumulator of each
// element. Sets nu [LANE], and returns the bits of the largest nu. With INT8 all threads of a warp must call it;
// `along` of them share the row.
template <class T, int M, bool STOCHASTIC, bool WHOLE>
LEANOPS_DEVICE u32 update(const Row<T, M>& row, const float* c, float* nu, const Call& call,
                          const Tensor& tensor, const Numbers& k, int along) {
  typedef typename Element<T>::Work Work;
  Work w[LANE];      // [LANE]
  float step[LANE];  // [LANE]: g, then u, then m; if the momentum is of the gradient, g, then m, then u
#pragma unroll
  for (int e = 0; e < LANE; ++e) {
    w[e] = widen(get(row.param.w, e, (const T*)0));                               // [LANE]
    step[e] = mul((float)widen(get(row.grad.w, e, (const T*)0)), k.grad_factor);  // [LANE]
  }
  if (call.couples) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) step[e] = fma(call.coupled_decay, (float)w[e], step[e]);  // [LANE]
  }
  if (call.averages) {
#pragma unroll
    for (int e = 0; e < LANE; ++e)
      nu[e] = fma(call.one_minus_beta, mul(step[e], step[e]), mul(call.beta, c[e]));  // [LANE]
  } else {
#pragma unroll
    for (int e = 0; e < LANE; ++e) nu[e] = fma(step[e], step[e], c[e]);  // [LANE]
  }
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < LANE; ++e) top = max(top, as_bits(nu[e]));
  if constexpr (M == NO_MOMENTUM) {
    quotients(step, nu, top, call.eps, k.eps_in_range, false);
  } else {
    // u, then m of u; or m of the gradient, then u. A loop, so that the code of each is there once: two copies of it take
    // more registers (sm_100: 40 bytes spilled by fp64 with int8)
#pragma unroll 1
    for (int stage = 0; stage < 2; ++stage) {
      if (stage == (int)call.averages_gradient) {
        quotients(step, nu, top, call.eps, k.eps_in_range, call.averages_gradient);  // [LANE]
      } else {
        average<T, M, WHOLE>(step, row, call, tensor, along);  // [LANE]
      }
    }
  }

#pragma unroll
  for (int e = 0; e < LANE; ++e) w[e] = moved(w[e], step[e], k);  // [LANE]
  Raw<T> rounded;                                                 // [LANE]
  round_lane<T, STOCHASTIC>(w, k.seed, (u64)(tensor.offset + row.lane.start), tensor.id, rounded);
  row.lane.template store<WHOLE>(tensor.param, rounded);  // [LANE]
  return top;
}

}  // namespace sm3
}  // namespace leanops

#endif
