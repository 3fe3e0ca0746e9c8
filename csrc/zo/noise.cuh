// The noise z of zo/1: Box-Muller by fixed fp32 polynomials, so that every backend gives the same bits.
#ifndef LEANOPS_ZO_NOISE_CUH
#define LEANOPS_ZO_NOISE_CUH

#include "../common/philox.cuh"

namespace leanops {
namespace zo {

// (z_even, z_odd) = sqrt(-2 ln u1) (cos, sin)(2 pi u2); u1 = ((a >> 8) + 1) 2^-24, u2 = (b >> 8) 2^-24.
LEANOPS_DEVICE void box_muller(u32 a, u32 b, float& z_even, float& z_odd) {
  // u1 = 2^e (1 + f), with 1 + f in [0.75, 1.5)
  const int i = (int)as_bits((float)((a >> 8) + 1u)) - 0x4b400000;
  const float e = (float)(i >> 23);
  const float f = add(as_float((u32)(i & 0x7fffff) + 0x3f400000u), -1.0f);
  float p = -0x1.5ca78ap-3f;  // -2 ln(1 + f) / f
  p = fma(p, f, 0x1.5b9f46p-2f);
  p = fma(p, f, -0x1.a789b4p-2f);
  p = fma(p, f, 0x1.007cb6p-1f);
  p = fma(p, f, -0x1.5520fp-1f);
  p = fma(p, f, 0x1.fffd2cp-1f);
  p = fma(p, f, -0x1.00001p+1f);
  const float t = fma(e, -0x1.62e43p+0f, mul(f, p));  // -2 ln u1
  // bit 31 of b is the half of the circle: it becomes the sign of rho. The other bits give y = (2 u2 mod 1) - 1/2.
  const float rho = as_float(as_bits(sqrt_bounded(t)) ^ (b & 0x80000000u));
  const float y = add(as_float(((b >> 8) & 0x7fffffu) | 0x3f800000u), -1.5f);
  const float s = mul(y, y);
  float ps = -0x1.3c4d66p-4f;
  ps = fma(ps, s, 0x1.323324p-1f);
  ps = fma(ps, s, -0x1.466778p+1f);
  ps = fma(ps, s, 0x1.4abbb6p+2f);
  ps = fma(ps, s, -0x1.921fb4p+1f);
  float pc = 0x1.c1f066p-3f;
  pc = fma(pc, s, -0x1.54f61ap+0f);
  pc = fma(pc, s, 0x1.03bd06p+2f);
  pc = fma(pc, s, -0x1.3bd3a6p+2f);
  pc = fma(pc, s, 0x1.fffffep-1f);
  z_even = mul(rho, mul(ps, y));
  z_odd = mul(rho, pc);
}

// z [4] of the elements 4 block .. 4 block + 3.
LEANOPS_DEVICE void gaussian4(u64 seed, u64 block, u32 tensor_id, float* z, u32 stream = STREAM_GAUSSIAN) {
  const Words r = philox(seed, block, tensor_id, stream);
  box_muller(r.x[0], r.x[1], z[0], z[1]);  // z [4]
  box_muller(r.x[2], r.x[3], z[2], z[3]);
}

}  // namespace zo
}  // namespace leanops

#endif
