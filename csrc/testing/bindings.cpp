// leanops_native: the torch-free cores on NumPy arrays, for tests. 16-bit floats are passed as their bits, in uint16.
// The families' bindings are submodules; see bindings.h.
#include <cstdint>

#include "common/numbers.h"
#include "common/philox.h"
#include "testing/bindings.h"

using namespace leanops;
using namespace leanops::testing;

namespace {

std::vector<uint32_t> philox(std::vector<uint32_t> counter, const std::vector<uint32_t>& key) {
  if (counter.size() != 4 || key.size() != 2)
    throw std::invalid_argument("four counter words and two key words");
  philox_block(counter.data(), key[0], key[1]);
  return counter;
}

template <class Out, class In, Out (*Convert)(In)>
Array<Out> convert(const Array<In>& in) {
  Array<Out> out(in.size());
  for (py::ssize_t j = 0; j < in.size(); ++j) out.mutable_data()[j] = Convert(in.data()[j]);
  return out;
}

}  // namespace

PYBIND11_MODULE(leanops_native, m) {
  m.def("isas", isas);
  m.def("kernel_sets", kernel_sets);
  m.def("cpu_isa", leanops_cpu_isa);
  m.def("cpu_isa_error", leanops_cpu_isa_error);
  m.def("philox", philox, py::arg("counter"), py::arg("key"));
  m.def("float_to_bf16", convert<uint16_t, float, float_to_bf16>);
  m.def("bf16_to_float", convert<float, uint16_t, bf16_to_float>);
  m.def("float_to_fp16", convert<uint16_t, float, float_to_fp16>);
  m.def("fp16_to_float", convert<float, uint16_t, fp16_to_float>);
  for (const auto& [family, add] : all_bindings()) {
    py::module_ submodule = m.def_submodule(family.c_str());
    add(submodule);
  }
}
