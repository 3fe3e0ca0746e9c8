// An operator's arguments as torch's dispatcher passes them, and the checks that refuse them with the messages of the
// check in Python.
//
// An operator has one struct of its arguments. Its members take them from a Stack in the order of the schema, so that
// each is named once:
//
//   struct ScaleCall {
//     explicit ScaleCall(Stack& s) : stack(s) {}
//     Stack& stack;
//     const TensorList tensors = stack.tensors();
//     const double factor = stack.take<double>();
//   };
//   m.impl("scale_", &boxed<ScaleCall, scale>);
//
// OpSpec.launch skips the check in Python, so a kernel refuses the same arguments itself.
#ifndef LEANOPS_COMMON_TORCH_ARGUMENTS_H
#define LEANOPS_COMMON_TORCH_ARGUMENTS_H

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

// A macro, so that the message is made only if the condition is false. (STD_TORCH_CHECK would put a function, a file
// and a line before it.)
#define LEANOPS_REQUIRE(condition, op, ...)               \
  do {                                                    \
    if (!(condition)) ::leanops::refuse(op, __VA_ARGS__); \
  } while (false)

namespace leanops {

using OwnedTensor = torch::stable::Tensor;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;

constexpr int64_t kIds = int64_t{1} << 32;  // tensor ids are in [0, kIds)

template <class... Parts>
[[noreturn]] void refuse(const char* op, const Parts&... parts) {
  std::ostringstream out;
  out << op << ": ";
  ((out << parts), ...);
  throw std::runtime_error(out.str());
}

// torch's numbers of devices, layouts and dtypes, kept because a call for one costs as much as a whole check.
struct Codes {
  int32_t cpu = aoti_torch_device_type_cpu(), cuda = aoti_torch_device_type_cuda();
  int32_t strided = aoti_torch_layout_strided();
  int32_t float32 = aoti_torch_dtype_float32(), bfloat16 = aoti_torch_dtype_bfloat16();
  int32_t float16 = aoti_torch_dtype_float16(), float64 = aoti_torch_dtype_float64();
  int32_t int8 = aoti_torch_dtype_int8(), int64 = aoti_torch_dtype_int64();
};
inline const Codes kCodes;

// A tensor that somebody else owns, with the questions of torch::stable::Tensor. It spares the allocation that
// torch::stable::Tensor makes for shared ownership: a call may have thousands of tensors.
class View {
 public:
  explicit View(AtenTensorHandle handle) : handle_(handle) {}
  View(const OwnedTensor& tensor) : handle_(tensor.get()) {}

  int64_t dim() const { return property<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return property<int64_t>(aoti_torch_get_numel); }
  int32_t dtype() const { return property<int32_t>(aoti_torch_get_dtype); }
  int32_t layout() const { return property<int32_t>(aoti_torch_get_layout); }
  int32_t device_type() const { return property<int32_t>(aoti_torch_get_device_type); }
  int32_t device_index() const { return property<int32_t>(aoti_torch_get_device_index); }
  bool is_contiguous() const { return property<bool>(aoti_torch_is_contiguous); }
  Sizes sizes() const { return Sizes(property<int64_t*>(aoti_torch_get_sizes), static_cast<size_t>(dim())); }
  Sizes strides() const {
    return Sizes(property<int64_t*>(aoti_torch_get_strides), static_cast<size_t>(dim()));
  }
  const void* const_data_ptr() const { return property<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return property<void*>(torch_get_mutable_data_ptr); }
  OwnedTensor keep() const {
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &handle));
    return OwnedTensor(handle);
  }

 private:
  template <class T>
  T property(AOTITorchError (*getter)(AtenTensorHandle, T*)) const {
    T value;
    TORCH_ERROR_CODE_CHECK(getter(handle_, &value));
    return value;
  }

  AtenTensorHandle handle_;
};

// An argument that is a list of tensors. It owns the list and the handles of the tensors.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) : list_(list) {
    TORCH_ERROR_CODE_CHECK(torch_list_size(list_, &size_));
  }
  ~TensorList() {
    for (size_t i = 0; i < size_; ++i) aoti_torch_delete_tensor_object(handle(i));
    torch_delete_list(list_);
  }
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;

  size_t size() const { return size_; }
  View operator[](size_t i) const { return View(handle(i)); }

 private:
  AtenTensorHandle handle(size_t i) const {
    StableIValue item;
    TORCH_ERROR_CODE_CHECK(torch_list_get_item(list_, i, &item));
    return torch::stable::detail::to<AtenTensorHandle>(item);
  }

  StableListHandle list_;
  size_t size_;
};

// The arguments of a call, to be taken once each, in the order of the schema. The caller owns what it takes.
class Stack {
 public:
  Stack(StableIValue* first, uint64_t count) : next_(first), end_(first + count) {}

  template <class T>
  T take() {
    STD_TORCH_CHECK(next_ != end_, "leanops: the schema has fewer arguments than the kernel");
    return torch::stable::detail::to<T>(*next_++);
  }
  TensorList tensors() { return TensorList(take<StableListHandle>()); }
  std::string text() {  // torch's own conversion never frees what it allocates
    const StringHandle handle = take<StringHandle>();
    size_t length;
    const char* data;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    std::string copy(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return copy;
  }
  void finish() const {
    STD_TORCH_CHECK(next_ == end_, "leanops: the schema has more arguments than the kernel");
  }

 private:
  StableIValue *next_, *end_;
};

// The function that the dispatcher calls for a kernel that returns nothing. `extra`: further arguments of the
// constructor of Call.
template <class Call, auto function, auto... extra>
void boxed(StableIValue* arguments, uint64_t count, uint64_t) {
  Stack stack(arguments, count);
  const Call call(stack, extra...);
  stack.finish();
  function(call);
}

// --- parts of messages -----------------------------------------------------------------------------------------------

// The name of an argument, or of one tensor in a list: `grads` or `grads[2]`.
struct Name {
  const char* argument;
  int64_t index = -1;

  Name(const char* argument) : argument(argument) {}
  Name(const char* argument, size_t index) : argument(argument), index(static_cast<int64_t>(index)) {}
  friend std::ostream& operator<<(std::ostream& out, const Name& name) {
    out << name.argument;
    return name.index < 0 ? out : out << '[' << name.index << ']';
  }
};

inline std::string named(int32_t code, std::initializer_list<std::pair<int32_t, const char*>> names) {
  for (const auto& [known, name] : names) {
    if (known == code) return name;
  }
  return "another (" + std::to_string(code) + ")";
}

inline std::string dtype_name(int32_t code) {
  return named(code, {{kCodes.float32, "float32"},
                      {kCodes.bfloat16, "bfloat16"},
                      {kCodes.float16, "float16"},
                      {kCodes.float64, "float64"},
                      {kCodes.int8, "int8"},
                      {aoti_torch_dtype_int16(), "int16"},
                      {aoti_torch_dtype_int32(), "int32"},
                      {kCodes.int64, "int64"},
                      {aoti_torch_dtype_uint8(), "uint8"},
                      {aoti_torch_dtype_bool(), "bool"},
                      {aoti_torch_dtype_complex64(), "complex64"},
                      {aoti_torch_dtype_complex128(), "complex128"}});
}

inline std::string dtype_names(std::initializer_list<int32_t> codes) {
  std::string out;
  size_t left = codes.size();
  for (int32_t code : codes) {
    out += (out.empty() ? "" : left == 1 ? " or " : ", ") + dtype_name(code);
    --left;
  }
  return out;
}

inline std::string layout_name(int32_t code) {
  return "torch." + named(code, {{aoti_torch_layout_sparse_coo(), "sparse_coo"},
                                 {aoti_torch_layout_sparse_csr(), "sparse_csr"},
                                 {aoti_torch_layout_sparse_csc(), "sparse_csc"},
                                 {aoti_torch_layout_sparse_bsr(), "sparse_bsr"},
                                 {aoti_torch_layout_sparse_bsc(), "sparse_bsc"},
                                 {aoti_torch_layout__mkldnn(), "_mkldnn"},
                                 {aoti_torch_layout_jagged(), "jagged"}});
}

inline std::string text(Sizes sizes) {
  std::ostringstream out;
  out << '[';
  for (size_t k = 0; k < sizes.size(); ++k) out << (k ? ", " : "") << sizes[k];
  out << ']';
  return out.str();
}

// A number as Python prints it: 1.0 rather than 1.
inline std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str().find_first_not_of("-0123456789") == std::string::npos ? out.str() + ".0" : out.str();
}

// --- checks ----------------------------------------------------------------------------------------------------------

// A device.
struct Location {
  int32_t type, index;

  bool holds(View t) const {
    return t.device_type() == type && (type == kCodes.cpu || t.device_index() == index);
  }
  std::string name() const {
    const std::string kind = named(type, {{kCodes.cpu, "cpu"},
                                          {kCodes.cuda, "cuda"},
                                          {aoti_torch_device_type_meta(), "meta"},
                                          {aoti_torch_device_type_xpu(), "xpu"},
                                          {aoti_torch_device_type_mps(), "mps"}});
    return type == kCodes.cuda ? kind + ":" + std::to_string(index) : kind;
  }
};

inline Location location_of(View t) { return {t.device_type(), t.device_index()}; }

inline bool same(Sizes a, Sizes b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin());
}

inline void require_dense(const char* op, const Name& name, View t) {
  LEANOPS_REQUIRE(t.layout() == kCodes.strided, op, name, " must be a dense tensor, got layout ",
                  layout_name(t.layout()));
}

// Returns the tensor's dtype, which must be one of `dtypes`.
inline int32_t require_dtype(const char* op, const Name& name, View t,
                             std::initializer_list<int32_t> dtypes) {
  const int32_t dtype = t.dtype();
  LEANOPS_REQUIRE(std::find(dtypes.begin(), dtypes.end(), dtype) != dtypes.end(), op, name, " must be ",
                  dtype_names(dtypes), ", got ", dtype_name(dtype));
  return dtype;
}

inline int32_t require_float(const char* op, const Name& name, View t) {
  return require_dtype(op, name, t, {kCodes.float32, kCodes.bfloat16, kCodes.float16, kCodes.float64});
}

inline void require_on(const char* op, const Name& name, View t, const Location& location, const char* like) {
  LEANOPS_REQUIRE(location.holds(t), op, name, " must be on ", location.name(), " as ", like, "[0], got ",
                  location_of(t).name());
}

inline void require_same_dtype(const char* op, const Name& name, View t, int32_t dtype, const Name& like) {
  LEANOPS_REQUIRE(t.dtype() == dtype, op, name, " must have the dtype of ", like, ", ", dtype_name(dtype),
                  ", got ", dtype_name(t.dtype()));
}

inline void require_same_shape(const char* op, const Name& name, View t, Sizes sizes, const Name& like) {
  LEANOPS_REQUIRE(same(t.sizes(), sizes), op, name, " must have the shape of ", like, ", ", text(sizes),
                  ", got ", text(t.sizes()));
}

inline void require_contiguous(const char* op, const Name& name, View t) {
  LEANOPS_REQUIRE(t.is_contiguous(), op, name, " must be contiguous, got shape ", text(t.sizes()),
                  " with strides ", text(t.strides()));
}

// A tensor of numbers for a kernel: on the CPU, or on the device of the other tensors.
inline void require_numbers(const char* op, const Name& name, View t, std::initializer_list<int32_t> dtypes,
                            const Location& location) {
  require_dense(op, name, t);
  require_dtype(op, name, t, dtypes);
  if (t.device_type() == kCodes.cpu || location.holds(t)) return;
  refuse(op, name, " must be on the CPU", location.type == kCodes.cpu ? "" : " or on " + location.name(),
         ", got ", location_of(t).name());
}

// An offset of `size` elements must be in [0, 2^63 / unit - size). `unit`: noise indices that an element takes.
inline void require_offset(const char* op, const Name& name, int64_t value, int64_t size, int64_t unit = 1) {
  const uint64_t end = (uint64_t{1} << 63) / static_cast<uint64_t>(unit) - static_cast<uint64_t>(size);
  LEANOPS_REQUIRE(value >= 0 && static_cast<uint64_t>(value) < end, op, name, " must be in [0, ", end,
                  "), got ", value);
}

inline void require_id(const char* op, const Name& name, int64_t value) {
  LEANOPS_REQUIRE(0 <= value && value < kIds, op, name, " must be in [0, ", kIds, "), got ", value);
}

}  // namespace leanops

#endif  // LEANOPS_COMMON_TORCH_ARGUMENTS_H
