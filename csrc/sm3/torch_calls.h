// The arguments of sm3_step_, and their checks, for the kernels of every device.
#ifndef LEANOPS_SM3_TORCH_CALLS_H
#define LEANOPS_SM3_TORCH_CALLS_H

#include <limits>
#include <optional>

#include "../common/torch_arguments.h"

namespace leanops {
namespace sm3 {

// One parameter of a step that has been checked.
struct Checked {
  View param, grad, cover;
  std::optional<View> momentum, scales;  // scales: of an int8 momentum
  Sizes sizes;
  int64_t numel;
  int32_t dtype, momentum_dtype;  // momentum_dtype: 0 without momentum
};

struct StepCall {
  explicit StepCall(Stack& s) : stack(s) {}
  Stack& stack;
  const TensorList params = stack.tensors();
  const TensorList grads = stack.tensors();
  const TensorList covers = stack.tensors();
  const TensorList momenta = stack.tensors();
  const TensorList scales = stack.tensors();
  const OwnedTensor lr = stack.take<OwnedTensor>();
  const OwnedTensor seed = stack.take<OwnedTensor>();
  const std::optional<OwnedTensor> grad_scale = stack.take<std::optional<OwnedTensor>>();
  const std::optional<OwnedTensor> found_inf = stack.take<std::optional<OwnedTensor>>();
  const std::vector<int64_t> tensor_ids = stack.take<std::vector<int64_t>>();
  const std::vector<int64_t> offsets = stack.take<std::vector<int64_t>>();
  const double momentum = stack.take<double>();
  const double beta = stack.take<double>();
  const double eps = stack.take<double>();
  const double weight_decay = stack.take<double>();
  const bool decoupled = stack.take<bool>();
  const bool maximize = stack.take<bool>();
  const bool stochastic_rounding = stack.take<bool>();
  const bool average_gradient = stack.take<bool>();
  const std::optional<OwnedTensor> lr_factors = stack.take<std::optional<OwnedTensor>>();

  // For kernels on `location`, with `block` elements for a scale of an int8 momentum. Calls take(i, checked) for each
  // parameter, after its checks.
  template <class Take>
  void check(const Location& location, int64_t block, Take&& take) const {
    check_numbers(location);
    check_lengths();
    for (size_t i = 0; i < params.size(); ++i) take(i, checked(i, location, block));
  }

 private:
  static constexpr const char* kOp = "sm3_step_";

  void check_numbers(const Location& location) const {
    LEANOPS_REQUIRE(0 <= momentum && momentum < 1, kOp, "momentum must be in [0, 1), got ", text(momentum));
    LEANOPS_REQUIRE(0 < beta && beta <= 1, kOp, "beta must be in (0, 1], got ", text(beta));
    for (const auto& [name, value] : {std::pair("eps", eps), std::pair("weight_decay", weight_decay)}) {
      LEANOPS_REQUIRE(0 <= value && value <= std::numeric_limits<float>::max(), kOp, name,
                      " must be a finite float32 number >= 0, got ", text(value));
    }
    one_number("lr", lr, {kCodes.float32, kCodes.float64}, location);
    one_number("seed", seed, {kCodes.int64}, location);
    if (grad_scale) one_number("grad_scale", *grad_scale, {kCodes.float32}, location);
    if (found_inf) one_number("found_inf", *found_inf, {kCodes.float32}, location);
    if (lr_factors) check_lr_factors(*lr_factors, location);
  }

  void check_lr_factors(View t, const Location& location) const {
    require_numbers(kOp, "lr_factors", t, {kCodes.float32}, location);
    const int64_t n = static_cast<int64_t>(params.size());
    LEANOPS_REQUIRE(t.dim() == 1 && t.numel() == n, kOp, "lr_factors must have shape [", n,
                    "], one number a parameter, got ", text(t.sizes()));
    require_contiguous(kOp, "lr_factors", t);
  }

  static void one_number(const char* name, View t, std::initializer_list<int32_t> dtypes,
                         const Location& location) {
    require_numbers(kOp, name, t, dtypes, location);
    LEANOPS_REQUIRE(t.numel() == 1, kOp, name, " must be one number, got shape ", text(t.sizes()));
  }

  void check_lengths() const {
    one_each("grads", grads.size());
    one_each("covers", covers.size());
    one_each("tensor_ids", tensor_ids.size());
    one_each("offsets", offsets.size());
    const size_t n = params.size();
    LEANOPS_REQUIRE(momentum == 0 || momenta.size() == n, kOp, "momenta must have one entry a parameter (", n,
                    ") with momentum ", text(momentum), ", got ", momenta.size());
    LEANOPS_REQUIRE(momentum != 0 || momenta.size() == 0, kOp,
                    "momenta must have no entry with momentum 0.0, got ", momenta.size());
    LEANOPS_REQUIRE(scales.size() == 0 || scales.size() == momenta.size(), kOp, scales_wanted(),
                    scales.size());
  }

  void one_each(const char* name, size_t length) const {
    LEANOPS_REQUIRE(length == params.size(), kOp, name, " must have one entry a parameter (", params.size(),
                    "), got ", length);
  }

  std::string scales_wanted() const {
    return "scales must have one entry a momentum (" + std::to_string(momenta.size()) +
           "), or none where no momentum is int8, got ";
  }

  Checked checked(size_t i, const Location& location, int64_t block) const {
    Checked t{params[i], grads[i], covers[i], std::nullopt, std::nullopt, {}, 1, 0, 0};
    require_dense(kOp, {"params", i}, t.param);
    t.dtype = require_float(kOp, {"params", i}, t.param);
    require_on(kOp, {"params", i}, t.param, location, "params");
    t.sizes = t.param.sizes();
    require_dense(kOp, {"grads", i}, t.grad);
    require_same_shape(kOp, {"grads", i}, t.grad, t.sizes, {"params", i});
    require_same_dtype(kOp, {"grads", i}, t.grad, t.dtype, {"params", i});
    require_on(kOp, {"grads", i}, t.grad, location, "params");
    int64_t entries = t.sizes.empty();
    for (int64_t size : t.sizes) {
      entries += size;
      t.numel *= size;
    }
    require_state({"covers", i}, t.cover, {kCodes.float32}, location);
    LEANOPS_REQUIRE(t.cover.dim() == 1 && t.cover.sizes()[0] == entries, kOp, Name("covers", i),
                    " must have shape [", entries, "] for ", Name("params", i), " of shape ", text(t.sizes),
                    ", got ", text(t.cover.sizes()));
    require_contiguous(kOp, {"covers", i}, t.cover);
    if (momentum != 0) check_momentum(i, t, location, block);
    require_id(kOp, {"tensor_ids", i}, tensor_ids[i]);
    require_offset(kOp, {"offsets", i}, offsets[i], t.numel);
    return t;
  }

  void check_momentum(size_t i, Checked& t, const Location& location, int64_t block) const {
    t.momentum = momenta[i];
    t.momentum_dtype =
        require_state({"momenta", i}, *t.momentum, {kCodes.float32, kCodes.bfloat16, kCodes.int8}, location);
    require_same_shape(kOp, {"momenta", i}, *t.momentum, t.sizes, {"params", i});
    require_contiguous(kOp, {"momenta", i}, *t.momentum);
    const bool int8 = t.momentum_dtype == kCodes.int8;
    LEANOPS_REQUIRE(!int8 || scales.size(), kOp, scales_wanted(), 0);
    if (scales.size() == 0) return;
    const View s = scales[i];
    require_state({"scales", i}, s, {kCodes.float32}, location);
    const int64_t rows = t.sizes.size() > 1 ? t.sizes[0] : 1;
    int64_t columns = 1;
    for (size_t k = t.sizes.size() > 1; k < t.sizes.size(); ++k) columns *= t.sizes[k];
    const int64_t shape[] = {int8 ? rows : 0, (columns + block - 1) / block};
    LEANOPS_REQUIRE(same(s.sizes(), Sizes(shape, int8 ? 2 : 1)), kOp, Name("scales", i), " must have shape ",
                    text(Sizes(shape, int8 ? 2 : 1)), " for ", Name("momenta", i), " of shape ",
                    text(t.sizes), " and dtype ", dtype_name(t.momentum_dtype), ", got ", text(s.sizes()));
    require_contiguous(kOp, {"scales", i}, s);
    if (int8) t.scales = s;
  }

  // Checks a tensor of the optimizer's state, and returns its dtype.
  static int32_t require_state(const Name& name, View t, std::initializer_list<int32_t> dtypes,
                               const Location& location) {
    require_dense(kOp, name, t);
    const int32_t dtype = require_dtype(kOp, name, t, dtypes);
    require_on(kOp, name, t, location, "params");
    return dtype;
  }
};

}  // namespace sm3
}  // namespace leanops

#endif  // LEANOPS_SM3_TORCH_CALLS_H
