// Shared by the families' NumPy bindings. tests/<family>/bindings.cpp defines those of a family: a static `Bindings`
// adds them to the module as the family's submodule.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/types.h"
#include "testing/kernel_sets.h"

namespace leanops {
namespace testing {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

using AddBindings = void (*)(py::module_&);

inline std::vector<std::pair<std::string, AddBindings>>& all_bindings() {
  static std::vector<std::pair<std::string, AddBindings>> bindings;
  return bindings;
}

struct Bindings {
  Bindings(const char* family, AddBindings add) { all_bindings().emplace_back(family, add); }
};

inline DType dtype_of(const std::string& name) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  for (int j = 0; j < 4; ++j) {
    if (name == names[j]) return static_cast<DType>(j);
  }
  throw std::invalid_argument("unknown dtype " + name);
}

// Also checks the array. 16-bit floats are passed as their bits, in uint16.
inline DType dtype_of(const std::string& name, const py::array& array) {
  const DType dtype = dtype_of(name);
  if (array.itemsize() != element_size(dtype)) throw std::invalid_argument("item size does not fit " + name);
  if (!(array.flags() & py::array::c_style)) throw std::invalid_argument("array must be contiguous");
  return dtype;
}

}  // namespace testing
}  // namespace leanops
