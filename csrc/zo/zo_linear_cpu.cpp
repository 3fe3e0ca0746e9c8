#include "zo_linear_cpu.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "../common/torch_cpu.h"

namespace leanops {
namespace zo {

using torch::stable::Tensor;

namespace {

constexpr int64_t kPanelBytes = int64_t{1} << 20;  // scratch of a panel: about a second-level cache
constexpr int64_t kLeastRows = 64, kRowStep = 64;
constexpr int64_t kTokens = 1024;  // of a block; each block computes z again, which costs a few percent

template <size_t N>
Tensor call(const char* name, const char* overload, std::array<StableIValue, N> stack) {
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
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

struct Noise {
  const Kernels& cpu;
  DType dtype;
  Distribution distribution;
  uint64_t seed;
  uint32_t tensor_id;
  uint64_t offset;
};

// A part of the work: `tokens` rows of x from `token` on, and `rows` rows of W from `row` on.
struct Block {
  int64_t token, tokens, row, rows;
};

// Calls make() in each thread, and the function that it returns for each block. The bits do not depend on the number of
// threads: the blocks do not, and the products of a block run on one thread. A parallel region has at least two parts,
// because for a single one torch starts no threads and the BLAS would start its own.
template <class Make>
void for_blocks(int64_t tokens, int64_t n, int64_t panel, const Make& make) {
  const int64_t columns = (n + panel - 1) / panel, count = (tokens + kTokens - 1) / kTokens * columns;
  torch::stable::parallel_for(0, std::max<int64_t>(count, 2), 1, [&](int64_t from, int64_t to) {
    if (from >= count) return;
    const auto run = make();
    for (int64_t j = from; j < std::min(to, count); ++j) {
      const int64_t token = j / columns * kTokens, row = j % columns * panel;
      run(Block{token, std::min(kTokens, tokens - token), row, std::min(panel, n - row)});
    }
  });
}

std::optional<Tensor> part_of(const std::optional<Tensor>& bias, const Block& block) {
  if (!bias) return std::nullopt;
  Tensor whole = *bias;
  return torch::stable::narrow(whole, 0, block.row, block.rows);
}

Tensor rows_of(const Tensor& t, int64_t first, int64_t count) {
  Tensor whole = t;
  return torch::stable::narrow(whole, 0, first, count);
}

const char* bytes(const Tensor& t) { return static_cast<const char*>(t.const_data_ptr()); }
char* mutable_bytes(const Tensor& t) { return static_cast<char*>(t.mutable_data_ptr()); }

// x (W + c z)^T + b = A + c B and A - c B, with A = x W^T + b and B = x z^T.
std::tuple<Tensor, Tensor> shared(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                  const Noise& noise, double scale, int64_t panel) {
  const int64_t tokens = x.size(0), m = weight.size(1), n = weight.size(0), size = element_size(noise.dtype);
  Tensor plus = torch::stable::new_empty(x, {tokens, n}), minus = torch::stable::new_empty(x, {tokens, n});
  char *p = mutable_bytes(plus), *q = mutable_bytes(minus);
  for_blocks(tokens, n, panel, [&] {
    Tensor z = torch::stable::new_empty(x, {panel, m});
    Tensor product = torch::stable::new_empty(x, {std::min(kTokens, tokens) * panel});
    return [&, z, product](const Block& block) {
      noise.cpu.noise(mutable_bytes(z), noise.dtype, block.rows * m, noise.seed, noise.tensor_id,
                      noise.offset + static_cast<uint64_t>(block.row * m), noise.distribution);
      const Tensor part = rows_of(x, block.token, block.tokens);
      Tensor b =
          torch::stable::view(rows_of(product, 0, block.tokens * block.rows), {block.tokens, block.rows});
      matmul_into(b, part, rows_of(z, 0, block.rows));
      const Tensor a = torch::stable::contiguous(
          linear(part, rows_of(weight, block.row, block.rows), part_of(bias, block)));
      const int64_t line = block.rows * size;
      for (int64_t t = 0; t < block.tokens; ++t) {
        const int64_t start = ((block.token + t) * n + block.row) * size;
        std::memcpy(p + start, bytes(a) + t * line, static_cast<size_t>(line));
        noise.cpu.spread(p + start, q + start, bytes(b) + t * line, noise.dtype, block.rows, scale);
      }
    };
  });
  return {plus, minus};
}

// Computes round(W + c z) and round(W - c z) of a panel, and the product of x with each.
std::tuple<Tensor, Tensor> perturbed(const Tensor& x, const Tensor& x_minus, const Tensor& weight,
                                     const std::optional<Tensor>& bias, const Noise& noise, double scale,
                                     int64_t panel) {
  const int64_t tokens = x.size(0), m = weight.size(1), n = weight.size(0), size = element_size(noise.dtype);
  Tensor plus = torch::stable::new_empty(x, {tokens, n}), minus = torch::stable::new_empty(x, {tokens, n});
  char* result[2] = {mutable_bytes(plus), mutable_bytes(minus)};
  for_blocks(tokens, n, panel, [&] {
    Tensor up = torch::stable::new_empty(x, {panel, m}), down = torch::stable::new_empty(x, {panel, m});
    return [&, up, down](const Block& block) {
      const int64_t first = block.row * m, line = block.rows * size;
      noise.cpu.both(mutable_bytes(up), mutable_bytes(down), bytes(weight) + first * size, noise.dtype,
                     block.rows * m, noise.seed, scale, noise.tensor_id,
                     noise.offset + static_cast<uint64_t>(first), noise.distribution);
      for (int side = 0; side < 2; ++side) {
        const Tensor part = rows_of(side == 0 ? x : x_minus, block.token, block.tokens);
        const Tensor y = torch::stable::contiguous(
            linear(part, rows_of(side == 0 ? up : down, 0, block.rows), part_of(bias, block)));
        for (int64_t t = 0; t < block.tokens; ++t) {
          const int64_t start = ((block.token + t) * n + block.row) * size;
          std::memcpy(result[side] + start, bytes(y) + t * line, static_cast<size_t>(line));
        }
      }
    };
  });
  return {plus, minus};
}

// A contiguous tensor without a gradient. Worker threads do not know that the caller runs below autograd.
Tensor plain(const Tensor& t) {
  using torch::stable::detail::from;
  return torch::stable::contiguous(call<1>("aten::detach", "", {from(t)}));
}

}  // namespace

std::tuple<Tensor, Tensor> zo_linear(Tensor x, std::optional<Tensor> x_minus, Tensor weight,
                                     std::optional<Tensor> bias, Tensor seed, double scale, int64_t tensor_id,
                                     int64_t offset, std::string distribution) {
  const Kernels& cpu = active_kernels();
  const DType dtype = dtype_of_code(require_float("zo_linear", "weight", weight));
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
  const auto rows = [&](const Tensor& t) { return plain(torch::stable::reshape(t, {tokens, m})); };
  const Tensor flat = rows(x);
  if (tokens == 0 || n == 0 || m == 0) {
    return {finish(linear(flat, weight, bias)), finish(linear(flat, weight, bias))};
  }
  const Tensor dense = plain(weight);
  if (bias) bias = plain(*bias);
  const int64_t fit = kPanelBytes / (m * element_size(dtype)) / kRowStep * kRowStep;
  const int64_t panel = std::min(n, std::max(kLeastRows, fit));
  const Noise noise = {
      cpu, dtype, kind, seed_of(seed), static_cast<uint32_t>(tensor_id), static_cast<uint64_t>(offset)};
  // B = x z^T needs a z that is exact in the dtype: signs always are, Gaussian numbers in 16 bits are not. It also
  // needs a wider range than that of fp16, because B itself is not small; only c B is.
  const bool fits = dtype == DType::kFloat32 || dtype == DType::kFloat64 ||
                    (dtype == DType::kBFloat16 && kind == Distribution::kRademacher);
  Tensor plus, minus;
  if (!x_minus && fits) {
    std::tie(plus, minus) = shared(flat, dense, bias, noise, scale, panel);
  } else {
    const Tensor other = x_minus ? rows(*x_minus) : flat;
    std::tie(plus, minus) = perturbed(flat, other, dense, bias, noise, scale, panel);
  }
  return {finish(plus), finish(minus)};
}

}  // namespace zo
}  // namespace leanops
