// Registers SM3 for CUDA, over torch's stable ABI. Nothing here waits for the device: numbers that lie there
// are read there.
// An optimizer may call below the checks in Python, so what could read or write outside a tensor is checked
// here too, before anything is written.
#include <map>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "../common/torch_cuda.h"
#include "launch_cuda.h"
#include "require.h"

namespace {

using namespace leanops;
using namespace leanops::sm3;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim() == b.dim() && std::equal(a.sizes().begin(), a.sizes().end(), b.sizes().begin());
}

void one_each(const char* name, size_t length, size_t wanted) {
  LEANOPS_SM3_REQUIRE(length == wanted, name, " must have ", wanted, " entries, got ", length);
}

void check_state(const char* name, size_t i, const Tensor& t, const Tensor& param, i64 numel, bool of_type) {
  LEANOPS_SM3_REQUIRE(t.is_cuda() && t.get_device_index() == param.get_device_index(), name, "[", i,
                      "] must be on the device of params[", i, "]");
  LEANOPS_SM3_REQUIRE(of_type, name, "[", i, "] has a dtype that the operator does not take");
  LEANOPS_SM3_REQUIRE(t.numel() == numel, name, "[", i, "] must have ", numel, " elements, got ", t.numel());
  LEANOPS_SM3_REQUIRE(t.is_contiguous(), name, "[", i, "] must be contiguous");
}

Momentum kind_of(ScalarType dtype) {
  return dtype == ScalarType::Char ? INT8 : dtype == ScalarType::BFloat16 ? BFLOAT16 : FLOAT32;
}

void check_tensor(size_t i, const Tensor& p, const Tensor& g, const Tensor& cover, const Tensor& first) {
  const ScalarType dtype = p.scalar_type();
  LEANOPS_SM3_REQUIRE(p.is_cuda() && p.get_device_index() == first.get_device_index(), "params[", i,
                      "] must be on the CUDA device of params[0]");
  LEANOPS_SM3_REQUIRE(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 ||
                          dtype == ScalarType::Half || dtype == ScalarType::Double,
                      "params[", i, "] must be float32, bfloat16, float16 or float64");
  LEANOPS_SM3_REQUIRE(same_sizes(p, g) && g.scalar_type() == dtype && g.is_cuda() &&
                          g.get_device_index() == p.get_device_index(),
                      "grads[", i, "] must have the shape, dtype and device of params[", i, "]");
  i64 length = p.dim() == 0;
  for (i64 size : p.sizes()) length += size;
  LEANOPS_SM3_REQUIRE(cover.dim() == 1, "covers[", i, "] must have one axis, got ", cover.dim());
  check_state("covers", i, cover, p, length, cover.scalar_type() == ScalarType::Float);
}

// `scale` is null where none is given.
void check_momentum(size_t i, const Tensor& p, const Tensor& m, const Tensor* scale) {
  const ScalarType dtype = m.scalar_type();
  const bool known = dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Char;
  check_state("momenta", i, m, p, p.numel(), known);
  const i64 rows = p.dim() > 1 ? p.size(0) : 1;
  i64 cols = 1;
  for (i64 axis = p.dim() > 1; axis < p.dim(); ++axis) cols *= p.size(axis);
  const i64 scales = dtype == ScalarType::Char ? rows * ((cols + BLOCK - 1) / BLOCK) : 0;
  LEANOPS_SM3_REQUIRE(scale || dtype != ScalarType::Char,
                      "scales must have one entry a momentum where one is int8, got none");
  if (scale) check_state("scales", i, *scale, p, scales, scale->scalar_type() == ScalarType::Float);
}

// A number's address on the device; 0 where it is on the CPU, and then its value.
template <class N>
u64 place(const char* name, const Tensor& t, ScalarType dtype, const Device& device, N& value) {
  LEANOPS_SM3_REQUIRE(t.scalar_type() == dtype, name, " has a dtype that the operator does not take");
  LEANOPS_SM3_REQUIRE(t.numel() == 1, name, " must be one number, got ", t.numel());
  if (t.is_cpu()) {
    value = *(const N*)t.const_data_ptr();
    return 0;
  }
  LEANOPS_SM3_REQUIRE(t.is_cuda() && t.get_device_index() == device.index, name,
                      " must be on the device of params[0], or on the CPU");
  return address(t);
}

// Lifts, for a scope, what a graph's capture forbids its thread: torch pins memory by such calls, and older
// versions of it fail there (pytorch/pytorch#167507).
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

// The table to the device, from pinned memory, which torch keeps until the copy is done. A CUDA graph copies
// again at every replay, so what it captures is kept for good.
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

void sm3_step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> covers,
               std::vector<Tensor> momenta, std::vector<Tensor> scales, Tensor lr, Tensor seed,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
               std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets, double momentum, double beta,
               double eps, double weight_decay, bool decoupled, bool maximize, bool stochastic_rounding) {
  const size_t n = params.size();
  one_each("grads", grads.size(), n);
  one_each("covers", covers.size(), n);
  one_each("tensor_ids", tensor_ids.size(), n);
  one_each("offsets", offsets.size(), n);
  one_each("momenta", momenta.size(), momentum != 0 ? n : 0);
  if (!scales.empty()) one_each("scales", scales.size(), momenta.size());
  if (n == 0) return;
  for (size_t i = 0; i < n; ++i) {
    check_tensor(i, params[i], grads[i], covers[i], params[0]);
    if (momentum != 0) check_momentum(i, params[i], momenta[i], scales.empty() ? nullptr : &scales[i]);
    LEANOPS_SM3_REQUIRE(0 <= tensor_ids[i] && tensor_ids[i] < (i64)1 << 32, "tensor_ids[", i,
                        "] must be in [0, 4294967296), got ", tensor_ids[i]);
    LEANOPS_SM3_REQUIRE(offsets[i] >= 0, "offsets[", i, "] must be at least 0, got ", offsets[i]);
  }
  const Device device(params[0]);

  Call numbers = {};
  numbers.lr_is_float = lr.scalar_type() == ScalarType::Float;
  if (numbers.lr_is_float) {
    float value = 0;
    numbers.lr = place("lr", lr, ScalarType::Float, device, value);
    numbers.lr_value = value;
  } else {
    numbers.lr = place("lr", lr, ScalarType::Double, device, numbers.lr_value);
  }
  numbers.seed = place("seed", seed, ScalarType::Long, device, numbers.seed_value);
  numbers.grad_scale_value = 1.0f;
  if (grad_scale) {
    numbers.grad_scale =
        place("grad_scale", *grad_scale, ScalarType::Float, device, numbers.grad_scale_value);
  }
  float found = 0;
  if (found_inf) numbers.found_inf = place("found_inf", *found_inf, ScalarType::Float, device, found);
  if (found != 0) return;
  numbers.weight_decay = decoupled ? weight_decay : 0.0;
  numbers.coupled_decay = (float)weight_decay;
  numbers.couples = !decoupled && weight_decay != 0;
  numbers.maximizes = maximize;
  numbers.averages = beta != 1;
  numbers.beta = (float)beta;
  numbers.one_minus_beta = (float)(1.0 - beta);
  numbers.momentum = (float)momentum;
  numbers.one_minus_momentum = (float)(1.0 - momentum);
  numbers.eps = (float)eps;

  std::vector<Tensor> alive;
  std::vector<std::pair<size_t, Tensor>> strided;  // results to copy back
  std::map<std::pair<ScalarType, Momentum>, std::vector<Item>> groups;
  for (size_t i = 0; i < n; ++i) {
    if (params[i].numel() == 0) continue;
    const Tensor grad = torch::stable::contiguous(grads[i]), param = torch::stable::contiguous(params[i]);
    if (!params[i].is_contiguous()) strided.emplace_back(i, param);
    alive.push_back(grad);
    alive.push_back(param);
    const Momentum kind = momentum == 0 ? NO_MOMENTUM : kind_of(momenta[i].scalar_type());
    groups[{params[i].scalar_type(), kind}].push_back(
        {address(param), address(grad), address(covers[i]), kind == NO_MOMENTUM ? 0 : address(momenta[i]),
         kind == INT8 ? address(scales[i]) : 0, (const i64*)params[i].sizes().data(), (int)params[i].dim(),
         offsets[i], (u32)tensor_ids[i]});
  }
  for (const auto& [types, items] : groups) {
    const auto dtype = types.first;
    const auto kind = types.second;
    const int size = dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
    Table table = table_of(items, kind, size);
    if (table.scratch) {
      const Tensor scratch = torch::stable::new_empty(params[0], {table.scratch}, ScalarType::Int);
      STD_CUDA_CHECK(cudaMemsetAsync(scratch.data_ptr(), 0, (size_t)table.scratch * 4, device.stream));
      table.place(address(scratch));
      alive.push_back(scratch);
    }
    Call call = numbers;
    call.tiles = table.tiles;
    call.tensors = table.tensors;
    if (table.words.size() <= INLINE_WORDS) {
      std::copy(table.words.begin(), table.words.end(), call.words);
    } else {
      alive.push_back(upload(table.words, params[0], device));
      call.table = address(alive.back());
    }
    for_dtype(dtype, [&](auto type) {
      STD_CUDA_CHECK(
          launch<decltype(type)>(call, kind, stochastic_rounding, device.processors, device.stream));
    });
  }
  for (auto& [i, result] : strided) torch::stable::copy_(params[i], result);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(leanops, CUDA, m) { m.impl("sm3_step_", TORCH_BOX(&sm3_step_)); }
