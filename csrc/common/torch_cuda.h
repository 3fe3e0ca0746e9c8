// Shared by the files that register CUDA kernels: the current stream and torch's dtypes, over the stable ABI.
#ifndef LEANOPS_COMMON_TORCH_CUDA_H
#define LEANOPS_COMMON_TORCH_CUDA_H

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include "number.cuh"

// Declared by torch's headers only where torch itself was built with CUDA.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace leanops {

// Makes a tensor's device current while it lives. It has the device's current stream and number of multiprocessors.
struct Device {
  explicit Device(const torch::stable::Tensor& t) : index(t.get_device_index()), guard(index) {
    void* current = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index, &current) == 0, "leanops: no CUDA stream");
    stream = (cudaStream_t)current;
    STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
  }
  int32_t index;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int processors = 0;
};

inline u64 address(const torch::stable::Tensor& t) { return (u64)t.data_ptr(); }

// Calls f with a value of the element type of a dtype.
template <class F>
void for_dtype(torch::headeronly::ScalarType dtype, F&& f) {
  switch (dtype) {
    case torch::headeronly::ScalarType::Float:
      return f(float());
    case torch::headeronly::ScalarType::Double:
      return f(double());
    case torch::headeronly::ScalarType::BFloat16:
      return f(bf16());
    default:
      return f(fp16());
  }
}

}  // namespace leanops

#endif
