// Compares the square roots and quotients of csrc/common/device.cuh, which skip the compiler's range tests, with the
// compiler's: square roots of every value that Box-Muller can give, and of every mantissa at each end of the range;
// quotients of as many mantissas and exponents as a hash of 2^24 threads gives.
#include <cstdio>

#include "zo/noise.cuh"

using namespace leanops;

__device__ bool differ(float a, float b) { return as_bits(a) != as_bits(b); }

__global__ void roots(unsigned long long* wrong) {
  const u32 k = blockIdx.x * blockDim.x + threadIdx.x;  // [65536 blocks, 256 threads]
  const float t = -2.0f * logf((float)(k + 1) * 0x1p-24f);
  const float zero = k & 1 ? -0.0f : 0.0f;
  // the argument itself and, for its neighbourhood, every mantissa in four binades
  const float x[] = {t,
                     as_float(0x3f800000u | (k & 0x7fffffu)),
                     as_float(0x40000000u | (k & 0x7fffffu)),
                     as_float(0x34000000u | (k & 0x7fffffu)),
                     as_float(0x41800000u | (k & 0x7fffffu)),
                     zero};
  for (float value : x)
    if (differ(sqrt_bounded(value), __fsqrt_rn(value))) atomicAdd(wrong, 1ull);
  const u32 exponents[] = {127 - 101, 127 - 100, 127, 128, 127 + 125, 127 + 126};
  for (u32 e : exponents) {
    const float value = as_float(e << 23 | (k & 0x7fffffu));
    if (differ(sqrt_in_range(value), __fsqrt_rn(value))) atomicAdd(wrong, 1ull);
  }
}

__device__ u32 mix(u32 x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// Divisors b in [2^-50, 2^64), where the square roots of [2^-100, 2^127) lie, and dividends a with a normal quotient.
__global__ void divisions(unsigned long long* wrong) {
  const u32 k = blockIdx.x * blockDim.x + threadIdx.x;  // [65536 blocks, 256 threads]
  for (u32 turn = 0; turn < 16; ++turn) {
    const u32 h = mix(16 * k + turn), g = mix(h + 0x9e3779b9u);
    const float b = as_float((77 + (h >> 9) % 114) << 23 | (g & 0x7fffffu));
    const float a = as_float((h & 0x80000000u) | (27 + (g >> 23) % 128) << 23 | (mix(g) & 0x7fffffu));
    const float q = __fdiv_rn(a, b);
    if (fabsf(q) < 0x1p-125f || fabsf(q) >= 0x1p126f) continue;
    if (differ(div_in_range(a, b), q)) atomicAdd(wrong, 1ull);
  }
}

int main() {
  unsigned long long *wrong = nullptr, count[2] = {};
  if (cudaMalloc(&wrong, sizeof count) != cudaSuccess) return 2;
  if (cudaMemset(wrong, 0, sizeof count) != cudaSuccess) return 2;
  roots<<<1 << 16, 256>>>(wrong);
  divisions<<<1 << 16, 256>>>(wrong + 1);
  if (cudaGetLastError() != cudaSuccess) return 2;  // nothing ran
  if (cudaMemcpy(count, wrong, sizeof count, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
  std::printf("sqrt_bounded, sqrt_in_range: %llu of %llu differ from sqrt.rn.f32\n", count[0], 12ull << 24);
  std::printf("div_in_range: %llu of at most %llu differ from div.rn.f32\n", count[1], 16ull << 24);
  return count[0] || count[1];
}
