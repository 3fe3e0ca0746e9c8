// Registers the CPU kernels of the zeroth-order family with torch, through the stable ABI.
#include <algorithm>
#include <utility>
#include <vector>

#include "../common/torch_cpu.h"
#include "torch_calls.h"
#include "zo_linear_cpu.h"

namespace leanops {
namespace zo {

using torch::stable::Tensor;

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

// One tensor of a call.
struct Job {
  char* out;
  const char* in;
  DType dtype;
  uint32_t tensor_id;
  uint64_t index;
  uint64_t columns;   // of low-rank noise
  int64_t begin;      // number of its first element, counted over all jobs
  size_t tensor = 0;  // index in the call
};

constexpr int64_t kUnit = 4096;        // elements; threads take whole units
constexpr int64_t kGrain = 8 * kUnit;  // elements of one term that are worth a thread

// run(job, first, n) over all elements of all jobs, shared among torch's threads.
template <class Run>
void for_all(const std::vector<Job>& jobs, int64_t total, int64_t terms, const Run& run) {
  const int64_t units = (total + kUnit - 1) / kUnit;
  const int64_t grain = std::max<int64_t>(1, kGrain / kUnit / std::max<int64_t>(terms, 1));
  torch::stable::parallel_for(0, units, grain, [&](int64_t from, int64_t to) {
    int64_t begin = from * kUnit;
    const int64_t end = std::min(to * kUnit, total);
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t number, const Job& j) { return number < j.begin; }) -
               1;
    for (; begin < end; ++job) {
      const int64_t stop = std::min(end, job + 1 == jobs.end() ? total : (job + 1)->begin);
      run(*job, begin - job->begin, stop - begin);
      begin = stop;
    }
  });
}

void zo_noise_(const NoiseCall& call) {
  const Kernels& cpu = active_kernels();
  call.check(kCodes.cpu);
  const Tensor dense = call.out.is_contiguous() ? call.out : torch::stable::contiguous(call.out);
  const int64_t n = dense.numel();
  if (n == 0) return;
  const uint64_t key = seed_of(call.seed);
  const Distribution kind = distribution_of(call.distribution, "zo_noise_");
  const std::vector<Job> jobs = {{static_cast<char*>(dense.mutable_data_ptr()), nullptr,
                                  dtype_of_code(View(dense).dtype()), static_cast<uint32_t>(call.tensor_id),
                                  static_cast<uint64_t>(call.offset), 0, 0}};
  for_all(jobs, n, 1, [&](const Job& job, int64_t first, int64_t count) {
    cpu.noise(job.out + first * element_size(job.dtype), job.dtype, count, key, job.tensor_id,
              job.index + static_cast<uint64_t>(first), kind);
  });
  if (Tensor target = call.out; dense.get() != target.get()) torch::stable::copy_(target, dense);
}

// The terms of a call. Tensors with strides are copied, and the copies live as long as this.
struct DenseTerms {
  explicit DenseTerms(const AxpyCall& call)
      : seeds(torch::stable::contiguous(call.seeds)),
        coeffs(torch::stable::contiguous(call.coeffs)),
        decays(torch::stable::contiguous(call.decays)),
        right_seeds(call.low_rank() ? torch::stable::contiguous(*call.right_seeds) : seeds) {
    terms.seeds = reinterpret_cast<const uint64_t*>(seeds.const_data_ptr<int64_t>());
    terms.coeffs = coeffs.const_data_ptr<double>();
    terms.decays = decays.const_data_ptr<double>();
    terms.count = seeds.numel();
    terms.decay_count = decays.numel();
    terms.distribution =
        call.low_rank() ? Distribution::kLowRank : distribution_of(call.distribution, call.op());
    terms.rounding = call.rounding == "nearest" ? Rounding::kNearest : Rounding::kStochastic;
    terms.sequential = call.sequential;
    terms.right_seeds = reinterpret_cast<const uint64_t*>(right_seeds.const_data_ptr<int64_t>());
    terms.rank = call.rank;
  }

  Tensor seeds, coeffs, decays, right_seeds;
  Terms terms;
};

void axpy(const AxpyCall& call) {
  const Kernels& cpu = active_kernels();
  std::vector<Job> jobs;
  std::vector<size_t> strided;  // jobs whose tensors need dense copies
  jobs.reserve(call.out.size());
  int64_t total = 0;
  call.check({kCodes.cpu, -1}, kMaxRank, [&](size_t i, int32_t dtype, int64_t numel) {
    const View target = call.out[i], source = call.source(i);
    const bool dense = target.is_contiguous() && source.is_contiguous();
    if (!dense) strided.push_back(jobs.size());
    jobs.push_back({dense ? static_cast<char*>(target.mutable_data_ptr()) : nullptr,
                    dense ? static_cast<const char*>(source.const_data_ptr()) : nullptr, dtype_of_code(dtype),
                    static_cast<uint32_t>(call.tensor_ids[i]), static_cast<uint64_t>(call.offsets[i]),
                    static_cast<uint64_t>(call.width(i)), total, i});
    total += numel;
  });
  if (total == 0) return;

  std::vector<Tensor> kept;                           // dense copies, alive while the kernels run
  std::vector<std::pair<Tensor, Tensor>> copied_out;  // (target, dense result)
  for (size_t j : strided) {
    Job& job = jobs[j];
    const View target = call.out[job.tensor];
    if (target.is_contiguous()) {
      job.out = static_cast<char*>(target.mutable_data_ptr());
    } else {
      const Tensor own = target.keep();
      copied_out.emplace_back(own, torch::stable::contiguous(own));
      job.out = static_cast<char*>(copied_out.back().second.mutable_data_ptr());
    }
    if (call.in_place) {
      job.in = job.out;
    } else {
      kept.push_back(torch::stable::contiguous(call.source(job.tensor).keep()));
      job.in = static_cast<const char*>(kept.back().const_data_ptr());
    }
  }
  const DenseTerms dense(call);
  const Terms& terms = dense.terms;
  for_all(jobs, total, terms.count, [&](const Job& job, int64_t first, int64_t count) {
    const int64_t bytes = first * element_size(job.dtype);
    cpu.axpy(job.out + bytes, job.in + bytes, job.dtype, count, terms, job.tensor_id,
             job.index + static_cast<uint64_t>(first), job.columns);
  });
  for (auto& [target, result] : copied_out) torch::stable::copy_(target, result);
}

}  // namespace
}  // namespace zo
}  // namespace leanops

STABLE_TORCH_LIBRARY_IMPL(leanops, CPU, m) {
  using namespace leanops;
  m.impl("zo_noise_", &boxed<zo::NoiseCall, zo::zo_noise_>);
  m.impl("zo_axpy_", &boxed<zo::AxpyCall, zo::axpy, true>);
  m.impl("zo_axpy_into_", &boxed<zo::AxpyCall, zo::axpy, false>);
  m.impl("zo_linear", TORCH_BOX(&leanops::zo::zo_linear));
}
