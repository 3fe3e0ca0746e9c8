#include "zo_linear_cpu.h"

#include <algorithm>
#include <array>
#include <vector>

namespace leanops {
namespace zo {

using torch::stable::Tensor;

namespace {

constexpr int64_t kPanelBytes = int64_t{1} << 20;  // of scratch a panel, about a second-level cache
constexpr int64_t kLeastRows = 64, kRowStep = 64;

template <size_t N>
Tensor call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  using torch::stable::detail::from;
  return call<3>("aten::linear", "", {from(x), from(weight), from(bias)});
}

void matmul_into(Tensor& out, const Tensor& x, const Tensor& rows) {  // out = x rows^T
  using torch::stable::detail::from;
  Tensor transposed = torch::stable::transpose(rows, 0, 1);
  call<3>("aten::mm", "out", {from(x), from(transposed), from(out)});
}

template <class Run>
void for_rows(int64_t rows, int64_t columns, const Run& run) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(columns, 1));
  torch::stable::parallel_for(0, rows, grain, run);
}

struct Noise {
  const Kernels& cpu;
  DType dtype;
  Distribution distribution;
  uint64_t seed;
  uint32_t tensor_id;
  uint64_t offset;
};

// x (W + c z)^T + b = A + c B and A - c B, with A = x W^T + b and B = x z^T.
std::tuple<Tensor, Tensor> shared(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const Noise& noise, double scale, int64_t panel) {
  const int64_t tokens = x.size(0), m = weight.size(1), n = weight.size(0), size = element_size(noise.dtype);
  Tensor plus = linear(x, weight, bias);
  if (!plus.is_contiguous()) plus = torch::stable::contiguous(plus);
  Tensor minus = torch::stable::new_empty(x, {tokens, n});
  Tensor z = torch::stable::new_empty(x, {panel, m});
  Tensor product = torch::stable::new_empty(x, {tokens * panel});
  char* p = static_cast<char*>(plus.mutable_data_ptr());
  char* q = static_cast<char*>(minus.mutable_data_ptr());
  char* zs = static_cast<char*>(z.mutable_data_ptr());
  const char* b = static_cast<const char*>(product.const_data_ptr());
  for (int64_t row = 0; row < n; row += panel) {
    const int64_t rows = std::min(panel, n - row);
    for_rows(rows, m, [&](int64_t from, int64_t to) {
      noise.cpu.noise(zs + from * m * size, noise.dtype, (to - from) * m, noise.seed, noise.tensor_id,
                      noise.offset + static_cast<uint64_t>((row + from) * m), noise.distribution);
    });
    Tensor flat = torch::stable::narrow(product, 0, 0, tokens * rows);
    Tensor out = torch::stable::view(flat, {tokens, rows});
    matmul_into(out, x, torch::stable::narrow(z, 0, 0, rows));
    for_rows(tokens, rows, [&](int64_t from, int64_t to) {
      for (int64_t t = from; t < to; ++t) {
        const int64_t at = (t * n + row) * size;
        noise.cpu.spread(p + at, q + at, b + t * rows * size, noise.dtype, rows, scale);
      }
    });
  }
  return {plus, minus};
}

// Two tiles round(W +- c z) and two products a panel.
std::tuple<Tensor, Tensor> perturbed(const Tensor& x, const Tensor& x_minus, const Tensor& weight,
                                     const std::optional<Tensor>& bias, const Noise& noise, double scale,
                                     int64_t panel) {
  const int64_t tokens = x.size(0), m = weight.size(1), n = weight.size(0), size = element_size(noise.dtype);
  Tensor result[2] = {torch::stable::new_empty(x, {tokens, n}), torch::stable::new_empty(x, {tokens, n})};
  Tensor tile[2] = {torch::stable::new_empty(x, {panel, m}), torch::stable::new_empty(x, {panel, m})};
  const char* w = static_cast<const char*>(weight.const_data_ptr());
  char* up = static_cast<char*>(tile[0].mutable_data_ptr());
  char* down = static_cast<char*>(tile[1].mutable_data_ptr());
  for (int64_t row = 0; row < n; row += panel) {
    const int64_t rows = std::min(panel, n - row);
    for_rows(rows, m, [&](int64_t from, int64_t to) {
      const int64_t at = from * m * size, first = (row + from) * m;
      noise.cpu.both(up + at, down + at, w + first * size, noise.dtype, (to - from) * m, noise.seed, scale,
                     noise.tensor_id, noise.offset + static_cast<uint64_t>(first), noise.distribution);
    });
    std::optional<Tensor> part;
    if (bias) {
      Tensor whole = *bias;
      part = torch::stable::narrow(whole, 0, row, rows);
    }
    for (int side = 0; side < 2; ++side) {
      const Tensor y = linear(side == 0 ? x : x_minus, torch::stable::narrow(tile[side], 0, 0, rows), part);
      Tensor slot = torch::stable::narrow(result[side], 1, row, rows);
      torch::stable::copy_(slot, y);
    }
  }
  return {result[0], result[1]};
}

}  // namespace

std::tuple<Tensor, Tensor> zo_linear(Tensor x, std::optional<Tensor> x_minus, Tensor weight,
                                     std::optional<Tensor> bias, Tensor seed, double scale, int64_t tensor_id,
                                     int64_t offset, std::string distribution) {
  const Kernels& cpu = active_kernels();
  const DType dtype = dtype_of(weight, "zo_linear");
  const Distribution kind = distribution_of(distribution, "zo_linear");
  const int64_t n = weight.size(0), m = weight.size(1);
  std::vector<int64_t> shape;
  int64_t tokens = 1;
  for (int64_t j = 0; j + 1 < x.dim(); ++j) {
    shape.push_back(x.size(j));
    tokens *= x.size(j);
  }
  shape.push_back(n);
  const auto finish = [&](const Tensor& y) { return torch::stable::view(y, shape); };
  const Tensor flat = torch::stable::contiguous(torch::stable::reshape(x, {tokens, m}));
  if (tokens == 0 || n == 0 || m == 0) {
    return {finish(linear(flat, weight, bias)), finish(linear(flat, weight, bias))};
  }
  const Tensor dense = torch::stable::contiguous(weight);
  const int64_t fit = kPanelBytes / (m * element_size(dtype)) / kRowStep * kRowStep;
  const int64_t panel = std::min(n, std::max(kLeastRows, fit));
  const Noise noise = {
      cpu, dtype, kind, seed_of(seed), static_cast<uint32_t>(tensor_id), static_cast<uint64_t>(offset)};
  // z must be exact in the dtype for B to be exact: signs always are, a Gaussian is not in 16 bits.
  const bool exact =
      kind == Distribution::kRademacher || dtype == DType::kFloat32 || dtype == DType::kFloat64;
  Tensor plus, minus;
  if (!x_minus && exact) {
    std::tie(plus, minus) = shared(flat, dense, bias, noise, scale, panel);
  } else {
    const Tensor other =
        x_minus ? torch::stable::contiguous(torch::stable::reshape(*x_minus, {tokens, m})) : flat;
    std::tie(plus, minus) = perturbed(flat, other, dense, bias, noise, scale, panel);
  }
  return {finish(plus), finish(minus)};
}

}  // namespace zo
}  // namespace leanops
