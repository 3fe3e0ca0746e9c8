// Registers the CPU kernels of the zeroth-order family with torch, through the stable ABI.
// Arguments arrive validated; what is checked here again is only what would read or write outside a tensor.
#include <algorithm>
#include <optional>
#include <vector>

#include "zo_linear_cpu.h"

namespace leanops {
namespace zo {

using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor, const char* op) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16, float16 or float64");
  }
  return DType::kFloat32;
}

Distribution distribution_of(const std::string& name, const char* op) {
  if (name == "gaussian") return Distribution::kGaussian;
  STD_TORCH_CHECK(name == "rademacher", op, ": distribution must be 'gaussian' or 'rademacher', got '", name,
                  "'");
  return Distribution::kRademacher;
}

uint64_t seed_of(const Tensor& seed) { return static_cast<uint64_t>(*seed.const_data_ptr<int64_t>()); }

const Kernels& active_kernels() {
  const IsaChoice& choice = isa_choice();
  STD_TORCH_CHECK(choice.error == nullptr, choice.error);
  return kernels(choice.isa);
}

namespace {

Rounding rounding_of(const std::string& name, const char* op) {
  if (name == "nearest") return Rounding::kNearest;
  STD_TORCH_CHECK(name == "stochastic", op, ": rounding must be 'nearest' or 'stochastic', got '", name, "'");
  return Rounding::kStochastic;
}

struct Job {
  char* out;
  const char* in;
  DType dtype;
  uint32_t tensor_id;
  uint64_t index;
  uint64_t columns;  // of low-rank noise
  int64_t begin;     // of its elements in the numbering of all jobs together
};

constexpr int64_t kUnit = 4096;        // elements; threads share the work in these
constexpr int64_t kGrain = 8 * kUnit;  // the least work of one term worth a thread

// run(job, first, n) over all elements of all jobs, shared among torch's threads.
template <class Run>
void for_all(const std::vector<Job>& jobs, int64_t total, int64_t terms, const Run& run) {
  const int64_t units = (total + kUnit - 1) / kUnit;
  const int64_t grain = std::max<int64_t>(1, kGrain / kUnit / std::max<int64_t>(terms, 1));
  torch::stable::parallel_for(0, units, grain, [&](int64_t from, int64_t to) {
    int64_t at = from * kUnit;
    const int64_t end = std::min(to * kUnit, total);
    auto job =
        std::upper_bound(jobs.begin(), jobs.end(), at, [](int64_t a, const Job& j) { return a < j.begin; }) -
        1;
    for (; at < end; ++job) {
      const int64_t stop = std::min(end, job + 1 == jobs.end() ? total : (job + 1)->begin);
      run(*job, at - job->begin, stop - at);
      at = stop;
    }
  });
}

void zo_noise_(Tensor out, Tensor seed, int64_t tensor_id, int64_t offset, std::string distribution) {
  const Kernels& cpu = active_kernels();
  const Distribution kind = distribution_of(distribution, "zo_noise_");
  const Tensor dense = out.is_contiguous() ? out : torch::stable::contiguous(out);
  const int64_t n = dense.numel();
  if (n == 0) return;
  const uint64_t key = seed_of(seed);
  const std::vector<Job> jobs = {{static_cast<char*>(dense.mutable_data_ptr()), nullptr,
                                  dtype_of(out, "zo_noise_"), static_cast<uint32_t>(tensor_id),
                                  static_cast<uint64_t>(offset), 0, 0}};
  for_all(jobs, n, 1, [&](const Job& job, int64_t first, int64_t count) {
    cpu.noise(job.out + first * element_size(job.dtype), job.dtype, count, key, job.tensor_id,
              job.index + static_cast<uint64_t>(first), kind);
  });
  if (dense.get() != out.get()) torch::stable::copy_(out, dense);
}

// out == nullptr: in place.
void axpy(const char* op, std::vector<Tensor>* out, std::vector<Tensor>& tensors, const Tensor& seeds,
          const Tensor& coeffs, const Tensor& decays, const std::vector<int64_t>& tensor_ids,
          const std::vector<int64_t>& offsets, const std::string& distribution, const std::string& rounding,
          bool sequential, const std::optional<Tensor>& right_seeds,
          const std::optional<std::vector<int64_t>>& columns, int64_t rank) {
  const Kernels& cpu = active_kernels();
  const bool low_rank = distribution == "lowrank";
  STD_TORCH_CHECK(low_rank == right_seeds.has_value() && low_rank == columns.has_value(), op,
                  ": right_seeds and columns must be given for distribution lowrank, and for it alone");
  const Tensor s = torch::stable::contiguous(seeds), c = torch::stable::contiguous(coeffs),
               d = torch::stable::contiguous(decays),
               r = low_rank ? torch::stable::contiguous(*right_seeds) : s;
  Terms terms;
  terms.seeds = reinterpret_cast<const uint64_t*>(s.const_data_ptr<int64_t>());
  terms.coeffs = c.const_data_ptr<double>();
  terms.decays = d.const_data_ptr<double>();
  terms.count = s.numel();
  terms.decay_count = d.numel();
  terms.distribution = low_rank ? Distribution::kLowRank : distribution_of(distribution, op);
  terms.right_seeds = reinterpret_cast<const uint64_t*>(r.const_data_ptr<int64_t>());
  terms.rank = rank;
  terms.rounding = rounding_of(rounding, op);
  terms.sequential = sequential;
  STD_TORCH_CHECK(c.numel() == terms.count, op, ": seeds and coeffs must have the same length, got ",
                  terms.count, " and ", c.numel());
  STD_TORCH_CHECK(terms.decay_count == 1 || (sequential && terms.decay_count == terms.count), op,
                  ": decays must have length 1", sequential ? " or that of seeds" : "", ", got ",
                  terms.decay_count);
  STD_TORCH_CHECK(r.numel() == terms.count, op, ": seeds and right_seeds must have the same length, got ",
                  terms.count, " and ", r.numel());
  STD_TORCH_CHECK(rank >= 1 && rank <= kMaxRank, op, ": rank must be in [1, ", kMaxRank, "], got ", rank);
  STD_TORCH_CHECK(!low_rank || columns->size() == tensors.size(), op,
                  ": columns must have one entry a tensor");
  STD_TORCH_CHECK(tensor_ids.size() == tensors.size() && offsets.size() == tensors.size(), op,
                  ": tensor_ids and offsets must have one entry a tensor");

  std::vector<Job> jobs;
  std::vector<Tensor> kept;                           // dense copies, alive while the kernels run
  std::vector<std::pair<Tensor, Tensor>> copied_out;  // (target, dense result)
  jobs.reserve(tensors.size());
  int64_t total = 0;
  for (size_t j = 0; j < tensors.size(); ++j) {
    const Tensor& target = out ? (*out)[j] : tensors[j];
    const int64_t n = tensors[j].numel();
    if (n == 0) continue;
    STD_TORCH_CHECK(target.numel() == n, op, ": out and tensors must have the same shapes");
    Tensor dense = target;
    if (!target.is_contiguous()) {
      dense = torch::stable::contiguous(target);
      copied_out.emplace_back(target, dense);
    }
    const void* from = dense.const_data_ptr();
    if (out) {
      if (!tensors[j].is_contiguous()) kept.push_back(torch::stable::contiguous(tensors[j]));
      from = tensors[j].is_contiguous() ? tensors[j].const_data_ptr() : kept.back().const_data_ptr();
    }
    jobs.push_back({static_cast<char*>(dense.mutable_data_ptr()), static_cast<const char*>(from),
                    dtype_of(target, op), static_cast<uint32_t>(tensor_ids[j]),
                    static_cast<uint64_t>(offsets[j]), low_rank ? static_cast<uint64_t>((*columns)[j]) : 0,
                    total});
    total += n;
  }
  if (total == 0) return;
  for_all(jobs, total, terms.count, [&](const Job& job, int64_t first, int64_t count) {
    const int64_t bytes = first * element_size(job.dtype);
    cpu.axpy(job.out + bytes, job.in + bytes, job.dtype, count, terms, job.tensor_id,
             job.index + static_cast<uint64_t>(first), job.columns);
  });
  for (auto& [target, dense] : copied_out) torch::stable::copy_(target, dense);
}

void zo_axpy_(std::vector<Tensor> tensors, Tensor seeds, Tensor coeffs, Tensor decays,
              std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets, std::string distribution,
              std::string rounding, bool sequential, std::optional<Tensor> right_seeds,
              std::optional<std::vector<int64_t>> columns, int64_t rank) {
  axpy("zo_axpy_", nullptr, tensors, seeds, coeffs, decays, tensor_ids, offsets, distribution, rounding,
       sequential, right_seeds, columns, rank);
}

void zo_axpy_into_(std::vector<Tensor> out, std::vector<Tensor> tensors, Tensor seeds, Tensor coeffs,
                   Tensor decays, std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets,
                   std::string distribution, std::string rounding, bool sequential,
                   std::optional<Tensor> right_seeds, std::optional<std::vector<int64_t>> columns,
                   int64_t rank) {
  STD_TORCH_CHECK(out.size() == tensors.size(),
                  "zo_axpy_into_: out and tensors must have the same length, got ", out.size(), " and ",
                  tensors.size());
  axpy("zo_axpy_into_", &out, tensors, seeds, coeffs, decays, tensor_ids, offsets, distribution, rounding,
       sequential, right_seeds, columns, rank);
}

}  // namespace
}  // namespace zo
}  // namespace leanops

STABLE_TORCH_LIBRARY_IMPL(leanops, CPU, m) {
  m.impl("zo_noise_", TORCH_BOX(&leanops::zo::zo_noise_));
  m.impl("zo_axpy_", TORCH_BOX(&leanops::zo::zo_axpy_));
  m.impl("zo_axpy_into_", TORCH_BOX(&leanops::zo::zo_axpy_into_));
  m.impl("zo_linear", TORCH_BOX(&leanops::zo::zo_linear));
}
