// Registers the zeroth-order operators for CUDA, over torch's stable ABI. Nothing here waits for the device.

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/torch_cuda.h"
#include "launch_cuda.h"
#include "torch_calls.h"

namespace {

using namespace leanops;
using namespace leanops::zo;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Distribution distribution_of(const std::string& name) { return name == "rademacher" ? RADEMACHER : GAUSSIAN; }

// The device address of numbers for a kernel. Numbers on the CPU are copied into inline_values if they fit, with
// address 0, and otherwise uploaded. `alive` gets the tensors that the address needs.
template <class N>
u64 place(const Tensor& values, N* inline_values, const Tensor& like, const Device& device,
          std::vector<Tensor>& alive) {
  alive.push_back(torch::stable::contiguous(values));
  const Tensor& source = alive.back();
  if (source.is_cuda()) return address(source);
  const i64 count = source.numel();
  const N* data = (const N*)source.data_ptr();
  if (count <= INLINE_TERMS) {
    std::copy(data, data + count, inline_values);
    return 0;
  }
  const Tensor target = torch::stable::new_empty(like, {count}, ScalarType::Long);
  STD_CUDA_CHECK(upload_words(address(target), (const u64*)data, count, device.stream));
  alive.push_back(target);
  return address(target);
}

void set_slots(Call& call, const std::vector<Slot>& slots, i64 units, const Tensor& like,
               const Device& device, std::vector<Tensor>& alive) {
  call.units = units;
  call.tensors = (int)slots.size();
  if (slots.size() <= INLINE_SLOTS) {
    std::copy(slots.begin(), slots.end(), call.inline_slots);
    return;
  }
  const i64 words = (i64)(slots.size() * sizeof(Slot) / sizeof(u64));
  const Tensor target = torch::stable::new_empty(like, {words}, ScalarType::Long);
  STD_CUDA_CHECK(upload_words(address(target), (const u64*)slots.data(), words, device.stream));
  alive.push_back(target);
  call.slots = address(target);
}

void noise_(const NoiseCall& call) {
  call.check(kCodes.cuda);
  Tensor out = call.out;
  if (out.numel() == 0) return;
  const Device device(out);
  std::vector<Tensor> alive;
  Call numbers = {};
  numbers.terms = 1;
  numbers.seeds = place(call.seed, numbers.inline_seeds, out, device, alive);
  const Tensor dense = out.is_contiguous() ? out : torch::stable::new_empty(out, out.sizes());
  std::vector<Slot> slots = {
      {address(dense), address(dense), address(dense), call.offset, out.numel(), 0, (u64)call.tensor_id, 0}};
  const i64 units = plan(slots, NOISE);
  set_slots(numbers, slots, units, out, device, alive);
  for_dtype(out.scalar_type(), [&](auto type) {
    STD_CUDA_CHECK(launch<decltype(type)>(numbers, distribution_of(call.distribution), NOISE, false,
                                          device.processors, device.stream));
  });
  if (!out.is_contiguous()) torch::stable::copy_(out, dense);
}

// One tensor of a call.
struct Job {
  size_t tensor;  // index in the call
  int32_t dtype;
  i64 numel;
};

// The slots of all tensors of a dtype that are matrices (or vectors) of low-rank noise. Adds strided results to
// `strided`; the caller copies them back after the kernel.
std::vector<Slot> slots_of(const AxpyCall& call, const std::vector<Job>& jobs, int32_t dtype, bool matrices,
                           std::vector<Tensor>& alive, std::vector<std::pair<Tensor, Tensor>>& strided) {
  std::vector<Slot> slots;
  for (const Job& job : jobs) {
    const i64 width = call.width(job.tensor);
    if (job.dtype != dtype || (width != 0) != matrices) continue;
    const View out = call.out[job.tensor], in = call.source(job.tensor);
    u64 target = 0, source = 0;
    if (!in.is_contiguous()) alive.push_back(torch::stable::contiguous(in.keep()));
    source = in.is_contiguous() ? (u64)in.const_data_ptr() : address(alive.back());
    if (out.is_contiguous()) {
      target = (u64)out.mutable_data_ptr();
    } else {
      const Tensor own = out.keep();
      const Tensor dense = in.is_contiguous() ? torch::stable::new_empty(own, own.sizes()) : alive.back();
      target = address(dense);
      strided.emplace_back(own, dense);
    }
    slots.push_back({target, source, target, call.offsets[job.tensor], job.numel, 0,
                     (u64)call.tensor_ids[job.tensor], width});
  }
  return slots;
}

void axpy(const AxpyCall& call) {
  std::vector<Job> jobs;
  const Location device_location{kCodes.cuda, call.out.size() ? call.out[0].device_index() : 0};
  call.check(device_location, MAX_RANK,
             [&](size_t i, int32_t dtype, i64 numel) { jobs.push_back({i, dtype, numel}); });
  if (jobs.empty()) return;
  const Tensor like = call.out[0].keep();
  const Device device(like);
  std::vector<Tensor> alive;
  Call terms = {};
  terms.terms = (int)call.seeds.numel();
  terms.decay_count = (int)call.decays.numel();
  terms.sequential = call.sequential;
  terms.seeds = place(call.seeds, terms.inline_seeds, like, device, alive);
  terms.coeffs = place(call.coeffs, terms.inline_coeffs, like, device, alive);
  terms.decays = place(call.decays, terms.inline_decays, like, device, alive);
  if (call.low_rank())
    terms.right_seeds = place(*call.right_seeds, terms.inline_right_seeds, like, device, alive);
  terms.rank = call.rank;
  const Mode mode = terms.terms == 1 ? SINGLE : MANY;
  const bool stochastic = call.rounding == "stochastic";

  std::vector<std::pair<Tensor, Tensor>> strided;  // tensors, and results to copy back
  const std::pair<int32_t, ScalarType> dtypes[] = {{kCodes.float32, ScalarType::Float},
                                                   {kCodes.float64, ScalarType::Double},
                                                   {kCodes.bfloat16, ScalarType::BFloat16},
                                                   {kCodes.float16, ScalarType::Half}};
  for (const auto& [code, dtype] : dtypes) {
    std::vector<Slot> vectors = slots_of(call, jobs, code, false, alive, strided);  // with Gaussian noise
    std::vector<Slot> matrices = slots_of(call, jobs, code, true, alive, strided);  // with low-rank noise
    for_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      if (!vectors.empty()) {
        Call numbers = terms;
        const i64 units = plan(vectors, mode);
        set_slots(numbers, vectors, units, like, device, alive);
        STD_CUDA_CHECK(launch<T>(numbers, distribution_of(call.distribution), mode, stochastic,
                                 device.processors, device.stream));
      }
      if (!matrices.empty()) {
        Call numbers = terms;
        const i64 units = plan_low_rank(matrices, numbers, Element<T>::CHUNK);
        set_slots(numbers, matrices, units, like, device, alive);
        STD_CUDA_CHECK(launch_low_rank<T>(numbers, stochastic, device.processors, device.stream));
      }
    });
  }
  for (auto& [target, result] : strided) torch::stable::copy_(target, result);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor mm(const Tensor& a, const Tensor& b) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(a), torch::stable::detail::from(b)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of the returned tensor
}

// Elements of a panel of z: it stays in the L2 cache until the product reads it.
const i64 PANEL = 8 << 20;

std::tuple<Tensor, Tensor> linear(Tensor x, std::optional<Tensor> x_minus, Tensor weight,
                                  std::optional<Tensor> bias, Tensor seed, double scale, int64_t tensor_id,
                                  int64_t offset, std::string distribution) {
  const Device device(x);
  const i64 n = weight.size(0), m = weight.size(1);
  i64 rows = 1;
  for (i64 d = 0; d + 1 < x.dim(); ++d) rows *= x.size(d);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;

  const Tensor flat = torch::stable::reshape(torch::stable::contiguous(x), {rows, m});
  const Tensor dense = torch::stable::contiguous(weight);
  std::optional<Tensor> dense_bias;
  if (bias) dense_bias = torch::stable::contiguous(*bias);
  const u64 bias_address = dense_bias ? address(*dense_bias) : 0;
  const i64 panel_rows = std::max<i64>(1, std::min(n, PANEL / std::max<i64>(m, 1)));

  std::vector<Tensor> alive;
  Call call = {};
  call.terms = 1;
  call.seeds = place(seed, call.inline_seeds, x, device, alive);
  call.inline_coeffs[0] = scale;

  // With one x: A = x W^T, B = x z^T, y = A + bias ± c B. With two x, each product has its own panel of W ± c z. fp16
  // does that, too: B itself may overflow, although c B is small.
  const bool pair = x_minus || x.scalar_type() == ScalarType::Half;
  const Mode mode = pair ? PAIR : NOISE;
  Tensor y_plus = pair ? torch::stable::new_empty(x, {rows, n}) : mm(flat, transposed(dense));
  Tensor y_minus = torch::stable::new_empty(x, {rows, n});
  const Tensor flat_minus =
      x_minus ? torch::stable::reshape(torch::stable::contiguous(*x_minus), {rows, m}) : flat;

  const i64 blocks =
      std::max<i64>(1, std::min<i64>((rows * panel_rows + 255) / 256, (i64)device.processors * 32));
  for (i64 first = 0; first < n; first += panel_rows) {
    const i64 width = std::min(panel_rows, n - first);
    const Tensor plus = torch::stable::new_empty(x, {width, m});
    const Tensor minus = pair ? torch::stable::new_empty(x, {width, m}) : plus;
    const u64 in = pair ? address(dense) + (u64)(first * m) * x.element_size() : address(plus);
    std::vector<Slot> slots = {
        {address(plus), in, address(minus), offset + first * m, width * m, 0, (u64)tensor_id, 0}};
    call.units = plan(slots, mode);
    call.tensors = (int)slots.size();
    if (call.units && rows) {
      call.inline_slots[0] = slots[0];
      for_dtype(x.scalar_type(), [&](auto type) {
        STD_CUDA_CHECK(launch<decltype(type)>(call, distribution_of(distribution), mode, false,
                                              device.processors, device.stream));
      });
    }
    if (pair) {
      Tensor all_plus = y_plus, all_minus = y_minus;
      mm_out(flat, transposed(plus), torch::stable::narrow(all_plus, 1, first, width));
      mm_out(flat_minus, transposed(minus), torch::stable::narrow(all_minus, 1, first, width));
    } else if (rows) {
      const Tensor b = mm(flat, transposed(plus));
      for_dtype(x.scalar_type(), [&](auto type) {
        combine_kernel<decltype(type)>
            <<<(int)blocks, 256, 0, device.stream>>>(address(y_plus), address(y_minus), address(y_plus),
                                                     address(b), bias_address, scale, rows, n, first, width);
        STD_CUDA_CHECK(cudaGetLastError());
      });
    }
  }
  if (pair && bias && rows * n) {
    for (const Tensor& y : {y_plus, y_minus})
      for_dtype(x.scalar_type(), [&](auto type) {
        add_bias_kernel<decltype(type)>
            <<<(int)blocks, 256, 0, device.stream>>>(address(y), bias_address, rows, n);
        STD_CUDA_CHECK(cudaGetLastError());
      });
  }
  return {torch::stable::reshape(y_plus, shape), torch::stable::reshape(y_minus, shape)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(leanops, CUDA, m) {
  m.impl("zo_noise_", &boxed<NoiseCall, noise_>);
  m.impl("zo_axpy_", &boxed<AxpyCall, axpy, true>);
  m.impl("zo_axpy_into_", &boxed<AxpyCall, axpy, false>);
  m.impl("zo_linear", TORCH_BOX(&linear));
}
