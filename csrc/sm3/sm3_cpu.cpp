// Registers the CPU kernel of SM3 with torch, through the stable ABI.
#include <optional>
#include <utility>
#include <vector>

#include "../common/torch_cpu.h"
#include "schedule.h"
#include "torch_calls.h"

namespace leanops {
namespace sm3 {
namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 8;  // units of work that are worth a thread

Momentum momentum_of_code(int32_t code) {
  return code == kCodes.int8      ? Momentum::kInt8
         : code == kCodes.float32 ? Momentum::kFloat32
                                  : Momentum::kBFloat16;
}

template <class N>
N number(View t) {
  return *static_cast<const N*>(t.const_data_ptr());
}

// For a call that has been checked.
Options options_of(const StepCall& call) {
  Options options;
  options.lr = View(call.lr).dtype() == kCodes.float64 ? number<double>(call.lr) : number<float>(call.lr);
  options.momentum = call.momentum;
  options.beta = call.beta;
  options.eps = call.eps;
  options.weight_decay = call.weight_decay;
  options.decoupled = call.decoupled;
  options.maximize = call.maximize;
  options.stochastic_rounding = call.stochastic_rounding;
  options.average_gradient = call.average_gradient;
  options.grad_scale = call.grad_scale ? number<float>(*call.grad_scale) : 1.0f;
  options.seed = number<uint64_t>(call.seed);
  return options;
}

void sm3_step_(const StepCall& call) {
  const IsaChoice& choice = isa_choice();
  STD_TORCH_CHECK(choice.error == nullptr, choice.error);

  std::vector<Parameter> parameters(call.params.size());
  std::vector<size_t> strided;
  call.check({kCodes.cpu, -1}, kBlock, [&](size_t i, const Checked& t) {
    Parameter& p = parameters[i];
    p = {nullptr,
         nullptr,
         static_cast<float*>(t.cover.mutable_data_ptr()),
         t.momentum ? t.momentum->mutable_data_ptr() : nullptr,
         t.scales ? static_cast<float*>(t.scales->mutable_data_ptr()) : nullptr,
         dtype_of_code(t.dtype),
         t.momentum ? momentum_of_code(t.momentum_dtype) : Momentum::kNone,
         static_cast<uint32_t>(call.tensor_ids[i]),
         static_cast<uint64_t>(call.offsets[i]),
         t.sizes.data(),
         static_cast<int64_t>(t.sizes.size())};
    if (t.numel == 0) return;
    if (t.param.is_contiguous() && t.grad.is_contiguous()) {
      p.param = t.param.mutable_data_ptr();
      p.grad = t.grad.const_data_ptr();
    } else {
      strided.push_back(i);
    }
  });
  if (call.found_inf && number<float>(*call.found_inf) != 0) return;
  if (call.lr_factors) {
    const float* factors = static_cast<const float*>(View(*call.lr_factors).const_data_ptr());
    for (Parameter& p : parameters) p.lr_factor = *factors++;
  }

  std::vector<Tensor> kept;                           // dense copies of gradients
  std::vector<std::pair<Tensor, Tensor>> copied_out;  // parameters and their dense copies
  for (size_t i : strided) {
    const View p = call.params[i];
    kept.push_back(torch::stable::contiguous(call.grads[i].keep()));
    parameters[i].grad = kept.back().const_data_ptr();
    if (p.is_contiguous()) {
      parameters[i].param = p.mutable_data_ptr();
    } else {
      const Tensor own = p.keep();
      copied_out.emplace_back(own, torch::stable::contiguous(own));
      parameters[i].param = copied_out.back().second.mutable_data_ptr();
    }
  }
  Schedule schedule(numbers_of(options_of(call)), kernels(choice.isa));
  schedule.reserve(parameters.size());
  for (const Parameter& parameter : parameters) schedule.add(parameter);
  schedule.prepare();
  torch::stable::parallel_for(0, schedule.units(), kGrain,
                              [&](int64_t from, int64_t to) { schedule.run(from, to); });
  schedule.finish();
  for (auto& [target, result] : copied_out) torch::stable::copy_(target, result);
}

}  // namespace
}  // namespace sm3
}  // namespace leanops

STABLE_TORCH_LIBRARY_IMPL(leanops, CPU, m) {
  m.impl("sm3_step_", &leanops::boxed<leanops::sm3::StepCall, leanops::sm3::sm3_step_>);
}
