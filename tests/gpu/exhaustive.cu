// Checks sqrt_bounded against sqrt.rn.f32 on every value that Box-Muller can give it: all 2^24 u1, and its
// claim's edges.
#include <cstdio>

#include "zo/noise.cuh"

using namespace leanops;

__global__ void compare(unsigned long long* wrong) {
  const u32 k = blockIdx.x * blockDim.x + threadIdx.x;  // 24 bits
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
    if (as_bits(sqrt_bounded(value)) != as_bits(__fsqrt_rn(value))) atomicAdd(wrong, 1ull);
}

int main() {
  unsigned long long* wrong = nullptr;
  if (cudaMalloc(&wrong, sizeof *wrong) != cudaSuccess) return 2;
  unsigned long long count = 0;
  if (cudaMemset(wrong, 0, sizeof *wrong) != cudaSuccess) return 2;
  compare<<<1 << 16, 256>>>(wrong);
  if (cudaMemcpy(&count, wrong, sizeof count, cudaMemcpyDeviceToHost) != cudaSuccess) return 2;
  std::printf("sqrt_bounded: %llu of %llu results differ from sqrt.rn.f32\n", count, 6ull << 24);
  return count != 0;
}
