// The arguments of zo_noise_, zo_axpy_ and zo_axpy_into_, and their checks, for the kernels of every device.
#ifndef LEANOPS_ZO_TORCH_CALLS_H
#define LEANOPS_ZO_TORCH_CALLS_H

#include <optional>

#include "../common/torch_arguments.h"

namespace leanops {
namespace zo {

struct NoiseCall {
  explicit NoiseCall(Stack& s) : stack(s) {}
  Stack& stack;
  const OwnedTensor out = stack.take<OwnedTensor>();
  const OwnedTensor seed = stack.take<OwnedTensor>();
  const int64_t tensor_id = stack.take<int64_t>();
  const int64_t offset = stack.take<int64_t>();
  const std::string distribution = stack.text();

  // For kernels of a device type.
  void check(int32_t device_type) const {
    const char* op = "zo_noise_";
    const Location location{device_type, View(out).device_index()};
    require_dense(op, "out", out);
    require_float(op, "out", out);
    LEANOPS_REQUIRE(location.holds(out), op, "out must be on ", location.name(), ", got ",
                    location_of(out).name());
    require_numbers(op, "seed", seed, {kCodes.int64}, location);
    LEANOPS_REQUIRE(seed.numel() == 1, op, "seed must be one number, got ", seed.numel());
    require_id(op, "tensor_id", tensor_id);
    require_offset(op, "offset", offset, out.numel());
    LEANOPS_REQUIRE(distribution == "gaussian" || distribution == "rademacher", op,
                    "distribution must be one of gaussian, rademacher, got ", distribution);
  }
};

// zo_axpy_into_; or, if in_place, zo_axpy_, which reads and writes the same tensors.
struct AxpyCall {
  AxpyCall(Stack& s, bool in_place) : in_place(in_place), stack(s) {}
  const bool in_place;
  Stack& stack;
  const TensorList out = stack.tensors();  // the argument `tensors` if in_place
  const std::optional<TensorList> sources =
      in_place ? std::optional<TensorList>()
               : std::optional<TensorList>(std::in_place, stack.take<StableListHandle>());
  const OwnedTensor seeds = stack.take<OwnedTensor>();   // int64 [K]
  const OwnedTensor coeffs = stack.take<OwnedTensor>();  // float64 [K]
  const OwnedTensor decays = stack.take<OwnedTensor>();  // float64 [1], or [K] if sequential
  const std::vector<int64_t> tensor_ids = stack.take<std::vector<int64_t>>();
  const std::vector<int64_t> offsets = stack.take<std::vector<int64_t>>();
  const std::string distribution = stack.text();
  const std::string rounding = stack.text();
  const bool sequential = stack.take<bool>();
  const std::optional<OwnedTensor> right_seeds =
      stack.take<std::optional<OwnedTensor>>();  // of low-rank noise
  const std::optional<std::vector<int64_t>> columns = stack.take<std::optional<std::vector<int64_t>>>();
  const int64_t rank = stack.take<int64_t>();

  const char* op() const { return in_place ? "zo_axpy_" : "zo_axpy_into_"; }
  View source(size_t i) const { return sources ? (*sources)[i] : out[i]; }
  bool low_rank() const { return distribution == "lowrank"; }
  int64_t width(size_t i) const { return columns ? (*columns)[i] : 0; }

  // For kernels on `location`. Calls take(i, dtype, numel) for each tensor that has elements, after its checks.
  template <class Take>
  void check(const Location& location, int64_t max_rank, Take&& take) const {
    check_noise(location, max_rank);
    const char* written = in_place ? "tensors" : "out";
    for (size_t i = 0; i < out.size(); ++i) {
      const View o = out[i];
      require_dense(op(), {written, i}, o);
      const int32_t dtype = require_float(op(), {written, i}, o);
      require_on(op(), {written, i}, o, location, written);
      if (!in_place) check_source(i, o, dtype, location);
      const int64_t numel = o.numel();
      require_id(op(), {"tensor_ids", i}, tensor_ids[i]);
      require_offset(op(), {"offsets", i}, offsets[i], numel, width(i) ? rank : 1);
      if (numel) take(i, dtype, numel);
    }
  }

 private:
  void check_source(size_t i, View o, int32_t dtype, const Location& location) const {
    const View t = source(i);
    require_dense(op(), {"tensors", i}, t);
    require_same_shape(op(), {"out", i}, o, t.sizes(), {"tensors", i});
    LEANOPS_REQUIRE(t.dtype() == dtype, op(), Name("out", i), " must have the dtype of ", Name("tensors", i),
                    ", ", dtype_name(t.dtype()), ", got ", dtype_name(dtype));
    LEANOPS_REQUIRE(location.holds(t), op(), Name("out", i), " must have the device of ", Name("tensors", i),
                    ", ", location_of(t).name(), ", got ", location.name());
  }

  void check_noise(const Location& location, int64_t max_rank) const {
    LEANOPS_REQUIRE(!sources || sources->size() == out.size(), op(),
                    "out and tensors must have the same length, got ", out.size(), " and ", sources->size());
    require_numbers(op(), "seeds", seeds, {kCodes.int64}, location);
    require_numbers(op(), "coeffs", coeffs, {kCodes.float64}, location);
    require_numbers(op(), "decay", decays, {kCodes.float64}, location);
    const int64_t count = seeds.numel(), decay_count = decays.numel();
    LEANOPS_REQUIRE(coeffs.numel() == count, op(), "seeds and coeffs must have the same length, got ", count,
                    " and ", coeffs.numel());
    LEANOPS_REQUIRE(count > 0, op(), "seeds must not be empty");
    LEANOPS_REQUIRE(
        decay_count == 1 || (sequential && decay_count == count), op(), "decay must be one number",
        sequential ? " or as many as seeds" : " where sequential is not set", ", got ", decay_count);
    one_each("tensor_ids", tensor_ids.size());
    one_each("offsets", offsets.size());
    LEANOPS_REQUIRE(low_rank() || distribution == "gaussian" || distribution == "rademacher", op(),
                    "distribution must be one of gaussian, rademacher, lowrank, got ", distribution);
    LEANOPS_REQUIRE(rounding == "nearest" || rounding == "stochastic", op(),
                    "rounding must be one of nearest, stochastic, got ", rounding);
    if (!low_rank()) {
      LEANOPS_REQUIRE(!right_seeds && !columns, op(),
                      "right_seeds and columns are for distribution lowrank, got ", distribution);
      return;
    }
    LEANOPS_REQUIRE(right_seeds, op(), "right_seeds must be given for distribution lowrank, got None");
    LEANOPS_REQUIRE(columns, op(), "columns must be given for distribution lowrank, got None");
    require_numbers(op(), "right_seeds", *right_seeds, {kCodes.int64}, location);
    LEANOPS_REQUIRE(right_seeds->numel() == count, op(),
                    "seeds and right_seeds must have the same length, got ", count, " and ",
                    right_seeds->numel());
    LEANOPS_REQUIRE(1 <= rank && rank <= max_rank, op(), "rank must be in [1, ", max_rank + 1, "), got ",
                    rank);
    one_each("columns", columns->size());
    for (size_t i = 0; i < columns->size(); ++i) require_offset(op(), {"columns", i}, (*columns)[i], 0, rank);
  }

  void one_each(const char* name, size_t length) const {
    LEANOPS_REQUIRE(length == out.size(), op(), name, " must have one entry a tensor (", out.size(),
                    "), got ", length);
  }
};

}  // namespace zo
}  // namespace leanops

#endif  // LEANOPS_ZO_TORCH_CALLS_H
