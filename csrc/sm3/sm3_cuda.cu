// Registers SM3 for CUDA, over torch's stable ABI. Nothing here waits for the device: kernels read the numbers on it.
#include <map>
#include <mutex>
#include <utility>
#include <vector>

#include "../common/torch_cuda.h"
#include "launch_cuda.h"
#include "torch_calls.h"

namespace {

using namespace leanops;
using namespace leanops::sm3;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Momentum kind_of(int32_t code) {
  return code == 0 ? NO_MOMENTUM : code == kCodes.int8 ? INT8 : code == kCodes.bfloat16 ? BFLOAT16 : FLOAT32;
}

ScalarType type_of(int32_t code) {
  return code == kCodes.float32    ? ScalarType::Float
         : code == kCodes.bfloat16 ? ScalarType::BFloat16
         : code == kCodes.float16  ? ScalarType::Half
                                   : ScalarType::Double;
}

// A number's address on the device. For a number on the CPU it returns 0 and sets `value`.
template <class N>
u64 place(View t, N& value) {
  if (t.device_type() != kCodes.cpu) return (u64)t.const_data_ptr();
  value = *(const N*)t.const_data_ptr();
  return 0;
}

// Allows, while it lives, calls that a graph's capture forbids to its thread. torch pins memory by such calls, and its
// older versions fail during capture (pytorch/pytorch#167507).
struct Relaxed {
  Relaxed() { STD_CUDA_CHECK(cudaThreadExchangeStreamCaptureMode(&mode)); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
};

Tensor pinned_words(i64 count) {
  const Relaxed relaxed;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::empty({count}, ScalarType::Long, std::nullopt, cpu, true, std::nullopt);
}

// Copies the table to the device from pinned memory, which torch keeps until the copy is done. A CUDA graph copies
// again at every replay, so memory that it captured is never freed.
Tensor upload(const std::vector<u64>& words, const Tensor& like, const Device& device) {
  static std::mutex mutex;
  static std::vector<Tensor>* captured = new std::vector<Tensor>;  // outlives the graphs
  const i64 count = (i64)words.size();
  const Tensor pinned = pinned_words(count);
  std::copy(words.begin(), words.end(), (u64*)pinned.mutable_data_ptr());
  Tensor target = torch::stable::new_empty(like, {count}, ScalarType::Long);
  torch::stable::copy_(target, pinned, true);
  cudaStreamCaptureStatus status;
  STD_CUDA_CHECK(cudaStreamIsCapturing(device.stream, &status));
  if (status != cudaStreamCaptureStatusNone) {
    const std::lock_guard<std::mutex> lock(mutex);
    captured->push_back(pinned);
  }
  return target;
}

// For a call that has been checked. Sets `found` to found_inf if that is on the CPU.
Call numbers_of(const StepCall& call, float& found) {
  Call numbers = {};
  numbers.lr_is_float = View(call.lr).dtype() == kCodes.float32;
  if (numbers.lr_is_float) {
    float value = 0;
    numbers.lr = place(call.lr, value);
    numbers.lr_value = value;
  } else {
    numbers.lr = place(call.lr, numbers.lr_value);
  }
  numbers.seed = place(call.seed, numbers.seed_value);
  numbers.grad_scale_value = 1.0f;
  if (call.grad_scale) numbers.grad_scale = place(*call.grad_scale, numbers.grad_scale_value);
  if (call.found_inf) numbers.found_inf = place(*call.found_inf, found);
  numbers.weight_decay = call.decoupled ? call.weight_decay : 0.0;
  numbers.coupled_decay = (float)call.weight_decay;
  numbers.couples = !call.decoupled && call.weight_decay != 0;
  numbers.maximizes = call.maximize;
  numbers.averages = call.beta != 1;
  numbers.beta = (float)call.beta;
  numbers.one_minus_beta = (float)(1.0 - call.beta);
  numbers.momentum = (float)call.momentum;
  numbers.one_minus_momentum = (float)(1.0 - call.momentum);
  numbers.eps = (float)call.eps;
  numbers.averages_gradient = call.average_gradient;
  if (call.lr_factors) {
    const View factors = *call.lr_factors;
    if (factors.device_type() != kCodes.cpu) numbers.lr_factors = (u64)factors.const_data_ptr();
  }
  return numbers;
}

void sm3_step_(const StepCall& call) {
  const size_t n = call.params.size();
  const Location device_location{kCodes.cuda, n ? call.params[0].device_index() : 0};
  std::vector<Checked> checked;
  checked.reserve(n);
  call.check(device_location, BLOCK, [&](size_t, const Checked& t) { checked.push_back(t); });
  if (n == 0) return;
  const Tensor like = call.params[0].keep();
  const Device device(like);
  float found = 0;
  const Call numbers = numbers_of(call, found);
  if (found != 0) return;
  const u32* factors = nullptr;  // bits of those on the CPU
  if (call.lr_factors && !numbers.lr_factors) {
    factors = (const u32*)View(*call.lr_factors).const_data_ptr();
  }

  std::vector<Tensor> alive;
  std::vector<std::pair<Tensor, Tensor>> strided;  // parameters, and results to copy back
  std::map<std::pair<int32_t, Momentum>, std::vector<Item>> groups;
  for (size_t i = 0; i < n; ++i) {
    const Checked& t = checked[i];
    if (t.numel == 0) continue;
    u64 param = 0, grad = 0;
    if (t.param.is_contiguous()) {
      param = (u64)t.param.mutable_data_ptr();
    } else {
      const Tensor own = t.param.keep();
      strided.emplace_back(own, torch::stable::contiguous(own));
      param = address(strided.back().second);
    }
    if (t.grad.is_contiguous()) {
      grad = (u64)t.grad.const_data_ptr();
    } else {
      alive.push_back(torch::stable::contiguous(t.grad.keep()));
      grad = address(alive.back());
    }
    groups[{t.dtype, kind_of(t.momentum_dtype)}].push_back(
        {param, grad, (u64)t.cover.mutable_data_ptr(), t.momentum ? (u64)t.momentum->mutable_data_ptr() : 0,
         t.scales ? (u64)t.scales->mutable_data_ptr() : 0, (const i64*)t.sizes.data(), (int)t.sizes.size(),
         call.offsets[i], (u32)call.tensor_ids[i],
         numbers.lr_factors ? i
         : factors          ? factors[i]
                            : 0x3f800000u /* 1 */});
  }
  for (const auto& [types, items] : groups) {
    const ScalarType dtype = type_of(types.first);
    const Momentum kind = types.second;
    const int size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    Table table = table_of(items, kind, size);
    if (table.scratch) {
      const Tensor scratch = torch::stable::new_empty(like, {table.scratch}, ScalarType::Int);
      STD_CUDA_CHECK(cudaMemsetAsync(scratch.data_ptr(), 0, (size_t)table.scratch * 4, device.stream));
      table.place(address(scratch));
      alive.push_back(scratch);
    }
    Call launched = numbers;
    launched.tiles = table.tiles;
    launched.tensors = table.tensors;
    if (table.words.size() <= INLINE_WORDS) {
      std::copy(table.words.begin(), table.words.end(), launched.words);
    } else {
      alive.push_back(upload(table.words, like, device));
      launched.table = address(alive.back());
    }
    for_dtype(dtype, [&](auto type) {
      STD_CUDA_CHECK(
          launch<decltype(type)>(launched, kind, call.stochastic_rounding, device.processors, device.stream));
    });
  }
  for (auto& [target, result] : strided) torch::stable::copy_(target, result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(leanops, CUDA, m) { m.impl("sm3_step_", &boxed<StepCall, sm3_step_>); }
