// Every kernel of zo for the sanitizers: buffers of exactly the size used, cut at odd places among threads, in
// place and into another buffer; the threads' bits must be one thread's.
#include <cstring>

#include "testing/driver.h"
#include "zo/zo.h"

LEANOPS_KERNELS_OF(zo)

using namespace leanops;
using namespace leanops::testing;
using namespace leanops::zo;

namespace {

using Bytes = std::vector<unsigned char>;

Bytes start(DType dtype, int64_t n) {  // finite numbers of ordinary size, a NaN and an infinity among them
  Bytes data(static_cast<size_t>(n * element_size(dtype)));
  for (int64_t j = 0; j < n; ++j) {
    const double value = j % 97 == 5   ? __builtin_nan("")
                         : j % 89 == 3 ? __builtin_inf()
                                       : 0.01 * (j % 31 - 15);
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, 4);
    const uint16_t half = static_cast<uint16_t>(bits >> 16);  // any bits do for fp16
    unsigned char* at = data.data() + j * element_size(dtype);
    if (dtype == DType::kFloat64) std::memcpy(at, &value, 8);
    if (dtype == DType::kFloat32) std::memcpy(at, &narrow, 4);
    if (element_size(dtype) == 2) std::memcpy(at, &half, 2);
  }
  return data;
}

int check(const Kernels& cpu, DType dtype, int64_t n, uint64_t index, const Terms& terms, uint64_t columns) {
  const int64_t size = element_size(dtype);
  const auto at = [&](Bytes& bytes, int64_t first) { return bytes.data() + first * size; };
  const auto same = [](const Bytes& a, const Bytes& b) { return a == b; };
  Bytes whole = start(dtype, n), parts = whole, into(whole.size()), source = whole;
  cpu.axpy(whole.data(), whole.data(), dtype, n, terms, 7, index, columns);
  in_threads(n, 3, [&](int64_t first, int64_t count) {
    cpu.axpy(at(parts, first), at(parts, first), dtype, count, terms, 7, index + static_cast<uint64_t>(first),
             columns);
    cpu.axpy(at(into, first), at(source, first), dtype, count, terms, 7, index + static_cast<uint64_t>(first),
             columns);
  });
  int bad = !same(whole, parts) + !same(whole, into);
  if (terms.distribution == Distribution::kLowRank) return bad;  // the other kernels have none

  Bytes noise(whole.size()), pieces(whole.size());
  cpu.noise(noise.data(), dtype, n, 11, 7, index, terms.distribution);
  Bytes plus(whole.size()), minus(whole.size()), plus2(whole.size()), minus2(whole.size());
  cpu.both(plus.data(), minus.data(), source.data(), dtype, n, 11, 1e-3, 7, index, terms.distribution);
  in_threads(n, 2, [&](int64_t first, int64_t count) {
    const uint64_t i = index + static_cast<uint64_t>(first);
    cpu.noise(at(pieces, first), dtype, count, 11, 7, i, terms.distribution);
    cpu.both(at(plus2, first), at(minus2, first), at(source, first), dtype, count, 11, 1e-3, 7, i,
             terms.distribution);
  });
  bad += !same(noise, pieces) + !same(plus, plus2) + !same(minus, minus2);
  in_threads(n, 2, [&](int64_t first, int64_t count) {
    cpu.spread(at(plus, first), at(minus, first), at(noise, first), dtype, count, 0.5);
  });
  cpu.spread(plus2.data(), minus2.data(), noise.data(), dtype, n, 0.5);
  return bad + !same(plus, plus2) + !same(minus, minus2);
}

Runs run(const std::string& set) {
  const Kernels& cpu = kernels_of(set);
  const std::vector<uint64_t> seeds = {3, ~uint64_t{0}, uint64_t{1} << 33}, right_seeds = {5, 5, 6};
  const std::vector<double> coeffs = {1e-3, -2.0, 1e-7}, decays = {0.1, 0.0, 1e-3};
  Runs result;
  for (int dtype = 0; dtype < 4; ++dtype) {
    for (int bits = 0; bits < 8; ++bits) {
      for (int64_t count : {0, 1, 3}) {
        for (int64_t n : {0, 1, 31, 1000, 9001}) {
          for (uint64_t index :
               {uint64_t{0}, uint64_t{5}, (uint64_t{1} << 34) - 77, (uint64_t{1} << 39) - 3000}) {
            const bool sequential = bits & 4;
            const Terms terms = {seeds.data(),
                                 coeffs.data(),
                                 decays.data(),
                                 count,
                                 sequential && count == 3 ? 3 : 1,
                                 static_cast<Distribution>(bits & 1),
                                 static_cast<Rounding>(bits >> 1 & 1),
                                 sequential,
                                 right_seeds.data(),
                                 2};
            result.bad += check(cpu, static_cast<DType>(dtype), n, index, terms, 0);
            ++result.runs;
            if (bits & 1) continue;  // a distribution that low-rank noise does not have
            Terms low_rank = terms;
            low_rank.distribution = Distribution::kLowRank;
            low_rank.rank = n == 1000 && index == 5 ? 64 : 3;
            for (uint64_t columns : {uint64_t{1}, uint64_t{7}, uint64_t{300}, uint64_t{6000}}) {
              result.bad += check(cpu, static_cast<DType>(dtype), n, index, low_rank, columns);
              ++result.runs;
            }
          }
        }
      }
    }
  }
  std::vector<uint32_t> words(4 * 301);
  cpu.words(words.data(), 301, (uint64_t{1} << 32) - 100, 1, 2, 3);
  return result;
}

const Check added(run);

}  // namespace
