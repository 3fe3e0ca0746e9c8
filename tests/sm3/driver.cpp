// Steps of SM3 for the sanitizers: buffers of exactly the size used, shapes that cut groups, blocks, chunks
// and tiles at odd places, by one thread and by three, whose bits must be one thread's.
#include <cstring>

#include "sm3/schedule.h"
#include "testing/driver.h"

LEANOPS_KERNELS_OF(sm3)

using namespace leanops;
using namespace leanops::testing;

namespace {

// Parameters of every momentum kind and of some shapes, and their state, in buffers of their own.
class Tensors {
 public:
  explicit Tensors(DType dtype) {
    const std::vector<std::vector<int64_t>> shapes = {{},           {0},        {1},      {31},      {40001},
                                                      {700, 33},    {300, 3},   {64, 64}, {5, 9000}, {9, 257},
                                                      {3, 40, 300}, {50, 3, 5}, {600, 1}};
    shapes_ = shapes;
    for (size_t j = 0; j < shapes_.size(); ++j) {
      int64_t numel = 1, entries = shapes_[j].empty();
      for (int64_t size : shapes_[j]) {
        numel *= size;
        entries += size;
      }
      sm3::Parameter p = {};
      p.kind = static_cast<sm3::Momentum>(j % 4);
      p.dtype = dtype;
      p.tensor_id = static_cast<uint32_t>(j);
      p.offset = (uint64_t{1} << 35) - 700;  // bits of stochastic rounding carry into another counter word
      p.lr_factor = j % 2 ? 1.0f : 1.5f;
      p.sizes = shapes_[j].data();
      p.rank = static_cast<int64_t>(shapes_[j].size());
      const int64_t row0 = p.rank > 1 ? shapes_[j][0] : 1, length = row0 ? numel / row0 : 0;
      p.param = buffer(numel * element_size(dtype), dtype, 1);
      p.grad = buffer(numel * element_size(dtype), dtype, 7);
      p.cover = static_cast<float*>(buffer(entries * 4, DType::kFloat32, 0));
      p.momentum = buffer(numel * sm3::momentum_size(p.kind),
                          p.kind == sm3::Momentum::kFloat32 ? DType::kFloat32 : DType::kBFloat16, 3);
      p.scales = static_cast<float*>(
          buffer(p.kind == sm3::Momentum::kInt8 ? row0 * ((length + 255) / 256) * 4 : 0, DType::kFloat32, 0));
      parameters.push_back(p);
    }
  }

  bool same(const Tensors& other) const { return buffers_ == other.buffers_; }

  std::vector<sm3::Parameter> parameters;

 private:
  // Numbers of ordinary size, above 0 where `sign` is 0, else sometimes a NaN or an infinity.
  void* buffer(int64_t bytes, DType dtype, int sign) {
    buffers_.emplace_back(static_cast<size_t>(bytes));
    std::vector<unsigned char>& data = buffers_.back();
    const int64_t size = element_size(dtype);
    for (int64_t j = 0; (j + 1) * size <= bytes; ++j) {
      double value =
          sign ? 0.01 * static_cast<double>((j * sign) % 31 - 15) : 1e-6 * static_cast<double>(j % 17);
      if (sign && j % 997 == 5) value = __builtin_nan("");
      if (sign && j % 1009 == 3) value = __builtin_inf();
      const float narrow = static_cast<float>(value);
      const uint32_t bits = float_bits(narrow);
      const uint16_t half = static_cast<uint16_t>(bits >> 16);  // any bits do for fp16 and for codes
      unsigned char* at = data.data() + j * size;
      if (dtype == DType::kFloat64) std::memcpy(at, &value, 8);
      if (dtype == DType::kFloat32) std::memcpy(at, &narrow, 4);
      if (size == 2) std::memcpy(at, &half, 2);
    }
    return bytes ? data.data() : nullptr;
  }

  std::vector<std::vector<int64_t>> shapes_;
  std::vector<std::vector<unsigned char>> buffers_;
};

void step(const Tensors& tensors, const sm3::Numbers& numbers, const sm3::Kernels& kernels, int threads) {
  sm3::Schedule schedule(numbers, kernels);
  for (const sm3::Parameter& p : tensors.parameters) schedule.add(p);
  schedule.prepare();
  in_threads(schedule.units(), threads,
             [&](int64_t first, int64_t count) { schedule.run(first, first + count); });
  schedule.finish();
}

Runs run(const std::string& set) {
  const sm3::Kernels& kernels = sm3::kernels_of(set);
  Runs result;
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (int bits = 0; bits < 4; ++bits) {
      const sm3::Options options = {1e-2,
                                    0.9,
                                    bits & 1 ? 0.9 : 1.0,
                                    1e-30,
                                    0.1,
                                    (bits & 2) == 0,
                                    true,
                                    (bits & 1) != 0,
                                    bits == 1 || bits == 2,
                                    2.0f,
                                    99};
      const sm3::Numbers numbers = sm3::numbers_of(options);
      Tensors one(static_cast<DType>(dtype)), three(static_cast<DType>(dtype));
      step(one, numbers, kernels, 1);
      step(three, numbers, kernels, 3);
      result.bad += !one.same(three);
      ++result.runs;
    }
  }
  return result;
}

const Check added(run);

}  // namespace
