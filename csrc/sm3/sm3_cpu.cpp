// Registers the CPU kernel of SM3 with torch, through the stable ABI.
// An optimizer may call below the checks in Python, so everything is checked here that could read or write
// outside a tensor or take numbers of one type for another; all of it before anything is written.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "require.h"
#include "schedule.h"

namespace leanops {
namespace sm3 {
namespace {

using torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

// torch's numbers for these, asked once: a call costs as much as a check.
struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu();
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  int32_t int8 = aoti_torch_dtype_int8(), int64 = aoti_torch_dtype_int64();
};
const Codes kCodes;
const int64_t kNothing = 0;    // the shape [0]
constexpr int64_t kGrain = 8;  // units of work, the least worth a thread

// A tensor that somebody else keeps: what torch::stable::Tensor asks of one, without the allocation that its shared
// ownership takes for each of thousands.
class View {
 public:
  explicit View(AtenTensorHandle handle) : handle_(handle) {}
  View(const Tensor& tensor) : handle_(tensor.get()) {}

  AtenTensorHandle get() const { return handle_; }
  int64_t dim() const { return asked(aoti_torch_get_dim); }
  int64_t numel() const { return asked(aoti_torch_get_numel); }
  bool is_contiguous() const {
    bool answer;
    TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(handle_, &answer));
    return answer;
  }
  Sizes sizes() const { return line(aoti_torch_get_sizes); }
  Sizes strides() const { return line(aoti_torch_get_strides); }
  const void* const_data_ptr() const {
    const void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(handle_, &data));
    return data;
  }
  void* mutable_data_ptr() const {
    void* data;
    TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(handle_, &data));
    return data;
  }
  Tensor keep() const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return Tensor(handle);
  }

 private:
  int64_t asked(AOTITorchError (*question)(AtenTensorHandle, int64_t*)) const {
    int64_t answer;
    TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }
  Sizes line(AOTITorchError (*question)(AtenTensorHandle, int64_t**)) const {
    int64_t* first;
    TORCH_ERROR_CODE_CHECK(question(handle_, &first));
    return Sizes(first, static_cast<size_t>(dim()));
  }

  AtenTensorHandle handle_;
};

// A list argument, which owns the handles of its tensors.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) : list_(list) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size_));
  }
  ~TensorList() {
    for (size_t i = 0; i < size_; ++i) aoti_torch_delete_tensor_object((*this)[i].get());
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return size_; }
  View operator[](size_t i) const {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &item));
    return View(torch::stable::detail::to<AtenTensorHandle>(item));
  }

 private:
  StableListHandle list_;
  size_t size_;
};

// Which argument is being checked, in the words of a message.
struct Name {
  const char* argument;
  int64_t index = -1;

  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    out << name.argument;
    return name.index < 0 ? out : out << '[' << name.index << ']';
  }
};

std::string text(int32_t dtype) {
  const std::pair<int32_t, const char*> names[] = {{kCodes.float32, "float32"}, {kCodes.bfloat16, "bfloat16"},
                                                   {kCodes.float16, "float16"}, {kCodes.float64, "float64"},
                                                   {kCodes.int8, "int8"},       {kCodes.int64, "int64"}};
  for (const auto& [code, name] : names) {
    if (code == dtype) return name;
  }
  return "another dtype (" + std::to_string(dtype) + ")";
}

std::string text(Sizes sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t k = 0; k < sizes.size(); ++k) out << (k ? ", " : "") << sizes[k];
  out << ']';
  return out.str();
}

bool same(Sizes a, Sizes b) { return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin()); }

int32_t dtype_of(View t) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// A tensor on the CPU, of one of the dtypes; which. (Of one that is not dense, torch itself refuses to say whether it
// is contiguous.)
int32_t on_cpu(Name name, View t, std::initializer_list<int32_t> dtypes) {
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &device));
  LEANOPS_SM3_REQUIRE(device == kCodes.cpu, name, " must be on the CPU, got device type ", device);
  const int32_t dtype = dtype_of(t);
  for (int32_t wanted : dtypes) {
    if (dtype == wanted) return dtype;
  }
  std::string wanted;
  for (int32_t code : dtypes) wanted += (wanted.empty() ? "" : " or ") + text(code);
  refuse(name, " must be ", wanted, ", got ", text(dtype));
}

void contiguous(Name name, View t) {
  LEANOPS_SM3_REQUIRE(t.is_contiguous(), name, " must be contiguous, got shape ", text(t.sizes()),
                      " with strides ", text(t.strides()));
}

const void* number(Name name, View t, std::initializer_list<int32_t> dtypes) {
  on_cpu(name, t, dtypes);
  LEANOPS_SM3_REQUIRE(t.numel() == 1, name, " must be one number, got shape ", text(t.sizes()));
  return t.const_data_ptr();
}

void one_each(const char* name, size_t length, size_t params) {
  LEANOPS_SM3_REQUIRE(length == params, name, " must have one entry a parameter (", params, "), got ",
                      length);
}

DType dtype_of_code(int32_t code) {
  return code == kCodes.float32    ? DType::kFloat32
         : code == kCodes.bfloat16 ? DType::kBFloat16
         : code == kCodes.float16  ? DType::kFloat16
                                   : DType::kFloat64;
}

// Rows of axis 0 and int8 blocks of one.
std::pair<int64_t, int64_t> scale_shape(Sizes sizes) {
  int64_t columns = 1;
  for (size_t k = sizes.size() > 1 ? 1 : 0; k < sizes.size(); ++k) columns *= sizes[k];
  return {sizes.size() > 1 ? sizes[0] : 1, (columns + kBlock - 1) / kBlock};
}

void sm3_step_(StableListHandle param_list, StableListHandle grad_list, StableListHandle cover_list,
               StableListHandle momentum_list, StableListHandle scale_list, Tensor lr, Tensor seed,
               std::optional<Tensor> grad_scale, std::optional<Tensor> found_inf,
               std::vector<int64_t> tensor_ids, std::vector<int64_t> offsets, double momentum, double beta,
               double eps, double weight_decay, bool decoupled, bool maximize, bool stochastic_rounding) {
  const TensorList params(param_list), grads(grad_list), covers(cover_list), momenta(momentum_list),
      scales(scale_list);
  const IsaChoice& choice = isa_choice();
  STD_TORCH_CHECK(choice.error == nullptr, choice.error);

  const size_t n = params.size();
  one_each("grads", grads.size(), n);
  one_each("covers", covers.size(), n);
  one_each("tensor_ids", tensor_ids.size(), n);
  one_each("offsets", offsets.size(), n);
  const bool moves = momentum != 0;
  if (moves) {
    one_each("momenta", momenta.size(), n);
  } else {
    LEANOPS_SM3_REQUIRE(momenta.size() == 0, "momenta must have no entry with momentum 0, got ",
                        momenta.size());
  }
  LEANOPS_SM3_REQUIRE(scales.size() == 0 || scales.size() == momenta.size(),
                      "scales must have one entry a momentum (", momenta.size(), "), got ", scales.size());

  Options options = {0, momentum, beta, eps, weight_decay, decoupled, maximize, stochastic_rounding, 1.0f, 0};
  const void* rate = number({"lr"}, lr, {kCodes.float32, kCodes.float64});
  options.lr =
      dtype_of(lr) == kCodes.float64 ? *static_cast<const double*>(rate) : *static_cast<const float*>(rate);
  options.seed = *static_cast<const uint64_t*>(number({"seed"}, seed, {kCodes.int64}));
  if (grad_scale) {
    options.grad_scale = *static_cast<const float*>(number({"grad_scale"}, *grad_scale, {kCodes.float32}));
  }
  const bool skipped =
      found_inf && *static_cast<const float*>(number({"found_inf"}, *found_inf, {kCodes.float32})) != 0;

  std::vector<Parameter> parameters(n);
  std::vector<size_t> strided;
  for (size_t j = 0; j < n; ++j) {
    const int64_t i = static_cast<int64_t>(j);
    const View p = params[j], g = grads[j], cover = covers[j];
    const int32_t dtype =
        on_cpu({"params", i}, p, {kCodes.float32, kCodes.bfloat16, kCodes.float16, kCodes.float64});
    on_cpu({"grads", i}, g, {dtype});
    on_cpu({"covers", i}, cover, {kCodes.float32});
    const Sizes sizes = p.sizes();
    LEANOPS_SM3_REQUIRE(same(sizes, g.sizes()), "grads[", i, "] must have the shape of params[", i, "], ",
                        text(sizes), ", got ", text(g.sizes()));
    int64_t entries = sizes.empty(), numel = 1;
    for (int64_t size : sizes) {
      entries += size;
      numel *= size;
    }
    LEANOPS_SM3_REQUIRE(cover.dim() == 1 && cover.numel() == entries, "covers[", i, "] must have shape [",
                        entries, "] for params[", i, "] (", text(sizes), "), got ", text(cover.sizes()));
    contiguous({"covers", i}, cover);
    LEANOPS_SM3_REQUIRE(0 <= tensor_ids[j] && tensor_ids[j] < int64_t{1} << 32, "tensor_ids[", i,
                        "] must be in [0, 4294967296), got ", tensor_ids[j]);
    LEANOPS_SM3_REQUIRE(offsets[j] >= 0, "offsets[", i, "] must be at least 0, got ", offsets[j]);

    Parameter& t = parameters[j];
    t = {nullptr,
         nullptr,
         static_cast<float*>(cover.mutable_data_ptr()),
         nullptr,
         nullptr,
         dtype_of_code(dtype),
         Momentum::kNone,
         static_cast<uint32_t>(tensor_ids[j]),
         static_cast<uint64_t>(offsets[j]),
         sizes.data(),
         static_cast<int64_t>(sizes.size())};
    if (moves) {
      const View m = momenta[j];
      const int32_t kind = on_cpu({"momenta", i}, m, {kCodes.float32, kCodes.bfloat16, kCodes.int8});
      LEANOPS_SM3_REQUIRE(same(sizes, m.sizes()), "momenta[", i, "] must have the shape of params[", i, "], ",
                          text(sizes), ", got ", text(m.sizes()));
      contiguous({"momenta", i}, m);
      t.kind = kind == kCodes.int8      ? Momentum::kInt8
               : kind == kCodes.float32 ? Momentum::kFloat32
                                        : Momentum::kBFloat16;
      t.momentum = m.mutable_data_ptr();
      if (scales.size()) {
        const View s = scales[j];
        on_cpu({"scales", i}, s, {kCodes.float32});
        contiguous({"scales", i}, s);
        const auto [rows, blocks] = scale_shape(sizes);
        const int64_t shape[] = {rows, blocks};
        const Sizes wanted = t.kind == Momentum::kInt8 ? Sizes(shape, 2) : Sizes(&kNothing, 1);
        LEANOPS_SM3_REQUIRE(same(wanted, s.sizes()), "scales[", i, "] must have shape ", text(wanted),
                            " for params[", i, "] (", text(sizes), ") and a momentum in ", text(kind),
                            ", got ", text(s.sizes()));
        t.scales = static_cast<float*>(s.mutable_data_ptr());
      } else {
        LEANOPS_SM3_REQUIRE(t.kind != Momentum::kInt8,
                            "scales must have one entry a momentum where one is int8");
      }
    }
    if (numel == 0) continue;
    if (p.is_contiguous() && g.is_contiguous()) {
      t.param = p.mutable_data_ptr();
      t.grad = g.const_data_ptr();
    } else {
      strided.push_back(j);
    }
  }
  if (skipped) return;

  std::vector<Tensor> kept;                           // dense copies of gradients
  std::vector<std::pair<Tensor, Tensor>> copied_out;  // parameters and their dense copies
  for (size_t j : strided) {
    const View p = params[j];
    kept.push_back(torch::stable::contiguous(grads[j].keep()));
    parameters[j].grad = kept.back().const_data_ptr();
    if (p.is_contiguous()) {
      parameters[j].param = p.mutable_data_ptr();
    } else {
      const Tensor own = p.keep();
      copied_out.emplace_back(own, torch::stable::contiguous(own));
      parameters[j].param = copied_out.back().second.mutable_data_ptr();
    }
  }
  Schedule schedule(numbers_of(options), kernels(choice.isa));
  schedule.reserve(n);
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

STABLE_TORCH_LIBRARY_IMPL(leanops, CPU, m) { m.impl("sm3_step_", TORCH_BOX(&leanops::sm3::sm3_step_)); }
