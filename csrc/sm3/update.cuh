// The arithmetic of sm3/1 on the elements that a thread takes of a row.
#ifndef LEANOPS_SM3_UPDATE_CUH
#define LEANOPS_SM3_UPDATE_CUH

#include "../common/block.cuh"
#include "lane.cuh"

namespace leanops {
namespace sm3 {

// The numbers of a call that its kernel works out once.
struct Numbers {
  float grad;   // factor of the gradient: its scale's reciprocal, negative to maximize
  float lr;     // -lr
  double rate;  // lr
  double keep;  // factor of the parameter: 1 - lr decay
  float keep_float;
  u64 seed;
  bool eps_in_range;  // nu < 2^40 puts nu + eps into the range of `quotients`
};

LEANOPS_DEVICE Numbers numbers_of(const Call& call) {
  Numbers k;
  const float scale = call.grad_scale ? *global<const float>(call.grad_scale) : call.grad_scale_value;
  const float inverse = div(1.0f, scale);
  k.grad = call.maximizes ? -inverse : inverse;
  k.rate = !call.lr           ? call.lr_value
           : call.lr_is_float ? (double)*global<const float>(call.lr)
                              : *global<const double>(call.lr);
  k.lr = -(float)k.rate;
  k.keep = call.weight_decay == 0.0 ? 1.0 : add(1.0, -mul(k.rate, call.weight_decay));
  k.keep_float = (float)k.keep;
  k.seed = (u64)(call.seed ? *global<const i64>(call.seed) : call.seed_value);
  k.eps_in_range = call.eps >= 0x1p-100f && call.eps < 0x1p40f;
  return k;
}

// u = g / sqrt(nu + eps), and 0 where nu is 0, in place of g. `top`: bits of the largest nu, NaN being the
// largest of all.
LEANOPS_DEVICE void quotients(float* g, const float* nu, u32 top, float eps, bool eps_in_range) {
  u32 least = 0xffffffffu;  // of 2 |g|'s bits - 1, which is large for 0
#pragma unroll
  for (int e = 0; e < LANE; ++e) least = min(least, 2 * as_bits(g[e]) - 1);
  bool in_range = top < 0x53800000u && least >= 2 * 0x0d800000u - 1;  // nu < 2^40, |g| >= 2^-100 or 0
  if (!eps_in_range) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) in_range = in_range && nu[e] >= 0x1p-100f && eps < 0x1p40f;
  }
  if (in_range) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) {
      const float u = div_in_range(g[e], sqrt_in_range(add(nu[e], eps)));
      g[e] = as_float((as_bits(u) & 0x7fffffffu) | (as_bits(g[e]) & 0x80000000u));
    }
  } else {
    float rare[2][LANE];  // in local memory: one copy of the code, and no registers, for what hardly occurs
#pragma unroll
    for (int e = 0; e < LANE; ++e) {
      rare[0][e] = g[e];
      rare[1][e] = add(nu[e], eps);
    }
#pragma unroll 1
    for (int e = 0; e < LANE; ++e) rare[0][e] = div(rare[0][e], sqrt(rare[1][e]));
#pragma unroll
    for (int e = 0; e < LANE; ++e) g[e] = rare[0][e];
  }
#pragma unroll
  for (int e = 0; e < LANE; ++e) g[e] = nu[e] == 0.0f ? 0.0f : g[e];
}

// The largest x of the threads along a row that share a warp; `along` of them, a power of two.
LEANOPS_DEVICE u32 max_along(u32 x, int along) {
  if (along == 32) return warp_max(x);
#pragma unroll 1
  for (int mask = along / 2; mask > 0; mask /= 2) x = max(x, shuffle_xor(x, mask));
  return x;
}

// An int8 block's scale and the inverse it is coded with; `largest`: bits of the largest magnitude, at most
// 127 scale.
struct Scale {
  float scale, inverse;
  bool lost;  // a NaN or an infinity: the block shall read NaN
};
LEANOPS_DEVICE Scale scale_of(u32 largest) {
  const float a = as_float(largest);
  const bool lost = largest >= 0x7f800000u, zero = largest < 0x03800000u;  // below 2^-120
  return Scale{lost   ? as_float(0x7fc00000u)
               : zero ? 0.0f
                      : div(a, 127.0f),
               zero ? 0.0f : div(127.0f, a), lost};
}

LEANOPS_DEVICE float moved(float w, float step, const Numbers& k) {
  return fma(k.lr, step, mul(w, k.keep_float));
}
LEANOPS_DEVICE double moved(double w, float step, const Numbers& k) {
  return add(mul(w, k.keep), -mul(k.rate, (double)step));
}

// What the rows of a tensor have in common.
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

// A row's elements, as they are loaded before any is stored.
template <class T, int M>
struct Row {
  Lane<T> lane;
  i64 block;  // of an int8 momentum
  Raw<T> param, grad;
  Raw<typename Stored<M>::Type> momentum;
  float scale;

  template <bool WHOLE>
  LEANOPS_DEVICE void load(const Tensor& tensor) {
    lane.template load<WHOLE>(tensor.param, param);
    lane.template load<WHOLE>(tensor.grad, grad);
    if (M != NO_MOMENTUM) lane.template load<WHOLE>(tensor.momentum, momentum);
    if (M == INT8) scale = WHOLE || lane.left > 0 ? global<const float>(tensor.scale)[block] : 0.0f;
  }
};

// Updates parameter and momentum of a row in which c has the smallest accumulators; sets nu, and returns the
// bits of the largest. All threads of a warp take part for INT8; `along` of them share the row.
template <class T, int M, bool STOCHASTIC, bool WHOLE>
LEANOPS_DEVICE u32 update(const Row<T, M>& row, const float* c, float* nu, const Call& call,
                          const Tensor& tensor, const Numbers& k, int along) {
  typedef typename Element<T>::Work Work;
  Work w[LANE];
  float step[LANE];  // g, then u, then the step
#pragma unroll
  for (int e = 0; e < LANE; ++e) {
    w[e] = widen(get(row.param.w, e, (const T*)0));
    step[e] = mul((float)widen(get(row.grad.w, e, (const T*)0)), k.grad);
  }
  if (call.couples) {
#pragma unroll
    for (int e = 0; e < LANE; ++e) step[e] = fma(call.coupled_decay, (float)w[e], step[e]);
  }
  if (call.averages) {
#pragma unroll
    for (int e = 0; e < LANE; ++e)
      nu[e] = fma(call.one_minus_beta, mul(step[e], step[e]), mul(call.beta, c[e]));
  } else {
#pragma unroll
    for (int e = 0; e < LANE; ++e) nu[e] = fma(step[e], step[e], c[e]);
  }
  u32 top = 0;
#pragma unroll
  for (int e = 0; e < LANE; ++e) top = max(top, as_bits(nu[e]));
  quotients(step, nu, top, call.eps, k.eps_in_range);

  if constexpr (M != NO_MOMENTUM) {
    typedef typename Stored<M>::Type S;
    float m[LANE];
    if constexpr (M == INT8) {
      from_codes(row.momentum, row.scale, m);
    } else {
#pragma unroll
      for (int e = 0; e < LANE; ++e) m[e] = widen(get(row.momentum.w, e, (const S*)0));
    }
#pragma unroll
    for (int e = 0; e < LANE; ++e) step[e] = fma(call.one_minus_momentum, step[e], mul(call.momentum, m[e]));
    Raw<S> stored;
    if constexpr (M == INT8) {
      u32 largest = 0;
#pragma unroll
      for (int e = 0; e < LANE; ++e) largest = max(largest, as_bits(step[e]) & 0x7fffffffu);
      const Scale s = scale_of(max_along(largest, along));
      if (s.lost) {
        stored.w[0] = stored.w[1] = 0x01010101u;
      } else {
        to_codes(step, s.inverse, stored);
      }
      if (((int)threadIdx.x & (along - 1)) == 0 && (WHOLE || row.lane.left > 0))
        global<float>(tensor.scale)[row.block] = s.scale;
    } else if constexpr (M == BFLOAT16) {
#pragma unroll
      for (int e = 0; e < LANE; e += 2) stored.w[e / 2] = pack_bf16(step[e], step[e + 1]);
    } else {
#pragma unroll
      for (int e = 0; e < LANE; ++e) stored.w[e] = as_bits(step[e]);
    }
    row.lane.template store<WHOLE>(tensor.momentum, stored);
  }

#pragma unroll
  for (int e = 0; e < LANE; ++e) w[e] = moved(w[e], step[e], k);
  Raw<T> rounded;
  round_lane<T, STOCHASTIC>(w, k.seed, (u64)(tensor.offset + row.lane.at), tensor.id, rounded);
  row.lane.template store<WHOLE>(tensor.param, rounded);
  return top;
}

}  // namespace sm3
}  // namespace leanops

#endif
