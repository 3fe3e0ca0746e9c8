// leanops_native.twice: the torch-free core of twice on NumPy arrays.
#include "testing/bindings.h"
#include "twice/twice.h"

LEANOPS_KERNELS_OF(twice)

using namespace leanops;
using namespace leanops::testing;

namespace {

Array<float> run(const std::string& isa, const Array<float>& x) {
  Array<float> y(x.size());
  twice::kernels_of(isa).run(y.mutable_data(), x.data(), x.size());
  return y;
}

const Bindings added("twice", [](py::module_& m) { m.def("run", run, py::arg("isa"), py::arg("x")); });

}  // namespace
