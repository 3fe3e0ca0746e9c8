// Registers the zeroth-order operators for CUDA, over torch's stable ABI. Nothing here waits for the device.
// Arguments come validated: shapes, dtypes, devices, lengths and overlap were checked before dispatch.

#include <cstring>
#include <optional>
#include <string>
#include <tuple>

#include "../common/torch_cuda.h"
#include "launch_cuda.h"

namespace {

using namespace leanops;
using namespace leanops::zo;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Distribution distribution_of(const std::string& name) { return name == "rademacher" ? RADEMACHER : GAUSSIAN; }

// Numbers for a kernel: read in place on the device; from the CPU inline if they fit, else uploaded. Keeps
// what it points to alive.
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

void noise_(Tensor out, Tensor seed, int64_t tensor_id, int64_t offset, std::string distribution) {
  if (out.numel() == 0) return;
  const Device device(out);
  std::vector<Tensor> alive;
  Call call = {};
  call.terms = 1;
  call.seeds = place(seed, call.inline_seeds, out, device, alive);
  const Tensor dense = out.is_contiguous() ? out : torch::stable::new_empty(out, out.sizes());
  std::vector<Slot> slots = {
      {address(dense), address(dense), address(dense), offset, out.numel(), 0, (u64)tensor_id, 0}};
  const i64 units = plan(slots, NOISE);
  set_slots(call, slots, units, out, device, alive);
  for_dtype(out.scalar_type(), [&](auto type) {
    STD_CUDA_CHECK(launch<decltype(type)>(call, distribution_of(distribution), NOISE, false,
                                          device.processors, device.stream));
  });
  if (!out.is_contiguous()) torch::stable::copy_(out, dense);
}

void axpy_into_(std::vector<Tensor> out, std::vector<Tensor> tensors, Tensor seeds, Tensor coeffs,
                Tensor decays, std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets,
                std::string distribution, std::string rounding, bool sequential,
                std::optional<Tensor> right_seeds, std::optional<std::vector<int64_t>> columns,
                int64_t rank) {
  if (out.empty()) return;
  const Device device(out[0]);
  std::vector<Tensor> alive;
  Call terms = {};
  terms.terms = (int)seeds.numel();
  terms.decay_count = (int)decays.numel();
  terms.sequential = sequential;
  terms.seeds = place(seeds, terms.inline_seeds, out[0], device, alive);
  terms.coeffs = place(coeffs, terms.inline_coeffs, out[0], device, alive);
  terms.decays = place(decays, terms.inline_decays, out[0], device, alive);
  if (right_seeds) terms.right_seeds = place(*right_seeds, terms.inline_right_seeds, out[0], device, alive);
  terms.rank = rank;
  const Mode mode = terms.terms == 1 ? SINGLE : MANY;

  std::vector<std::pair<size_t, Tensor>> strided;  // results to copy back
  for (const ScalarType dtype :
       {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half}) {
    std::vector<Slot> slots, matrices;  // of low-rank noise, whose vectors have the Gaussian
    for (size_t i = 0; i < out.size(); ++i) {
      if (out[i].numel() == 0 || out[i].scalar_type() != dtype) continue;
      const Tensor source = torch::stable::contiguous(tensors[i]);
      Tensor target = out[i];
      if (!target.is_contiguous()) {
        target = tensors[i].is_contiguous() ? torch::stable::new_empty(source, source.sizes()) : source;
        strided.emplace_back(i, target);
      }
      alive.push_back(source);
      const i64 width = columns ? (*columns)[i] : 0;
      (width ? matrices : slots)
          .push_back({address(target), address(source), address(target), offsets[i], target.numel(), 0,
                      (u64)tensor_ids[i], width});
    }
    for_dtype(dtype, [&](auto type) {
      using T = decltype(type);
      const bool stochastic = rounding == "stochastic";
      if (!slots.empty()) {
        Call call = terms;
        const i64 units = plan(slots, mode);
        set_slots(call, slots, units, out[0], device, alive);
        STD_CUDA_CHECK(launch<T>(call, distribution_of(distribution), mode, stochastic, device.processors,
                                 device.stream));
      }
      if (!matrices.empty()) {
        Call call = terms;
        const i64 units = plan_low_rank(matrices, call, Element<T>::CHUNK);
        set_slots(call, matrices, units, out[0], device, alive);
        STD_CUDA_CHECK(launch_low_rank<T>(call, stochastic, device.processors, device.stream));
      }
    });
  }
  for (auto& [i, result] : strided) torch::stable::copy_(out[i], result);
}

void axpy_(std::vector<Tensor> tensors, Tensor seeds, Tensor coeffs, Tensor decays,
           std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets, std::string distribution,
           std::string rounding, bool sequential, std::optional<Tensor> right_seeds,
           std::optional<std::vector<int64_t>> columns, int64_t rank) {
  axpy_into_(tensors, tensors, seeds, coeffs, decays, tensor_ids, offsets, distribution, rounding, sequential,
             right_seeds, columns, rank);
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
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of what was returned
}

// A panel of 8 Mi elements is written and read again within the L2 cache.
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
  const u64 bias_at = dense_bias ? address(*dense_bias) : 0;
  const i64 panel_rows = std::max<i64>(1, std::min(n, PANEL / std::max<i64>(m, 1)));

  std::vector<Tensor> alive;
  Call call = {};
  call.terms = 1;
  call.seeds = place(seed, call.inline_seeds, x, device, alive);
  call.inline_coeffs[0] = scale;

  // With one x: A = x W^T, B = x z^T, y = A + bias ± c B. With two: each with its own panel of W ± c z; so with
  // fp16, which B, not small as c B is, may overflow.
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
      Tensor at_plus = y_plus, at_minus = y_minus;
      mm_out(flat, transposed(plus), torch::stable::narrow(at_plus, 1, first, width));
      mm_out(flat_minus, transposed(minus), torch::stable::narrow(at_minus, 1, first, width));
    } else if (rows) {
      const Tensor b = mm(flat, transposed(plus));
      for_dtype(x.scalar_type(), [&](auto type) {
        combine_kernel<decltype(type)>
            <<<(int)blocks, 256, 0, device.stream>>>(address(y_plus), address(y_minus), address(y_plus),
                                                     address(b), bias_at, scale, rows, n, first, width);
        STD_CUDA_CHECK(cudaGetLastError());
      });
    }
  }
  if (pair && bias && rows * n) {
    for (const Tensor& y : {y_plus, y_minus})
      for_dtype(x.scalar_type(), [&](auto type) {
        add_bias_kernel<decltype(type)><<<(int)blocks, 256, 0, device.stream>>>(address(y), bias_at, rows, n);
        STD_CUDA_CHECK(cudaGetLastError());
      });
  }
  return {torch::stable::reshape(y_plus, shape), torch::stable::reshape(y_minus, shape)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(leanops, CUDA, m) {
  m.impl("zo_noise_", TORCH_BOX(&noise_));
  m.impl("zo_axpy_", TORCH_BOX(&axpy_));
  m.impl("zo_axpy_into_", TORCH_BOX(&axpy_into_));
  m.impl("zo_linear", TORCH_BOX(&linear));
}
