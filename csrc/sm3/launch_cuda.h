// Host side of sm3.cuh, without torch: kernels and grids.
#ifndef LEANOPS_SM3_LAUNCH_CUDA_H
#define LEANOPS_SM3_LAUNCH_CUDA_H

#include <cuda_runtime.h>

#include "plan.h"
#include "sm3.cuh"

namespace leanops {
namespace sm3 {

template <class T, int M, bool STOCHASTIC>
__global__ void __launch_bounds__(THREADS, (RESIDENT<T, M, STOCHASTIC>))
    sm3_kernel(const __grid_constant__ Call call) {
  step<T, M, STOCHASTIC>(call);
}

template <class T, int M, bool STOCHASTIC>
cudaError_t launch(const Call& call, int processors, cudaStream_t stream) {
  // up to 32 blocks for each multiprocessor; with more tiles, a block takes several of them in turn
  const int blocks = (int)std::min<i64>(call.tiles, (i64)processors * 32);
  sm3_kernel<T, M, STOCHASTIC><<<blocks, THREADS, 0, stream>>>(call);
  return cudaGetLastError();
}

template <class T>
cudaError_t launch(const Call& call, Momentum kind, bool stochastic, int processors, cudaStream_t stream) {
  constexpr bool S = sizeof(T) == 2;  // wider types ignore stochastic rounding
  const bool random = S && stochastic;
  switch (kind) {
    case NO_MOMENTUM:
      return random ? launch<T, NO_MOMENTUM, S>(call, processors, stream)
                    : launch<T, NO_MOMENTUM, false>(call, processors, stream);
    case FLOAT32:
      return random ? launch<T, FLOAT32, S>(call, processors, stream)
                    : launch<T, FLOAT32, false>(call, processors, stream);
    case BFLOAT16:
      return random ? launch<T, BFLOAT16, S>(call, processors, stream)
                    : launch<T, BFLOAT16, false>(call, processors, stream);
    default:
      return random ? launch<T, INT8, S>(call, processors, stream)
                    : launch<T, INT8, false>(call, processors, stream);
  }
}

}  // namespace sm3
}  // namespace leanops

#endif
