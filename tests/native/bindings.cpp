// leanops_native.avx512: each intrinsic of AVX-512 on NumPy arrays, by the processor or by the emulation.
#include <cstring>

#include "testing/bindings.h"
#include "testing/intrinsics.h"

using namespace leanops;
using namespace leanops::testing;

namespace {

std::vector<std::string> intrinsics() {
  std::vector<std::string> names;
  const Intrinsics& all = kIntrinsics_avx512_emulated;
  for (int j = 0; j < all.count; ++j) names.push_back(all.first[j].name);
  return names;
}

const Intrinsic& intrinsic_of(const std::string& set, const std::string& name) {
  const Intrinsics* all = set == kEmulated ? &kIntrinsics_avx512_emulated : nullptr;
#if defined(__x86_64__)
  if (set == "avx512" && isa_supported(Isa::kAvx512)) all = &kIntrinsics_avx512;
#endif
  if (!all) throw std::invalid_argument("this machine has no " + set);
  for (int j = 0; j < all->count; ++j) {
    if (name == all->first[j].name) return all->first[j];
  }
  throw std::invalid_argument("no intrinsic is called " + name);
}

// One call for each row of 64 bytes of a, b and c.                                             -> [rows, 64]
Array<uint8_t> intrinsic(const std::string& set, const std::string& name, const Array<uint8_t>& a,
                         const Array<uint8_t>& b, const Array<uint8_t>& c, const Array<uint32_t>& masks) {
  const Intrinsic& call = intrinsic_of(set, name);
  const py::ssize_t rows = masks.size();
  if (a.size() != 64 * rows || b.size() != 64 * rows || c.size() != 64 * rows)
    throw std::invalid_argument("a, b and c need 64 bytes for each mask");
  Array<uint8_t> out({rows, py::ssize_t{64}});
  std::memset(out.mutable_data(), 0, static_cast<size_t>(64 * rows));
  for (py::ssize_t row = 0; row < rows; ++row) {
    Operands operands;
    std::memcpy(operands.a, a.data() + 64 * row, 64);
    std::memcpy(operands.b, b.data() + 64 * row, 64);
    std::memcpy(operands.c, c.data() + 64 * row, 64);
    operands.mask = masks.data()[row];
    call.run(operands, out.mutable_data() + 64 * row);
  }
  return out;
}

void add(py::module_& m) {
  m.def("intrinsics", intrinsics);
  m.def("intrinsic", intrinsic, py::arg("set"), py::arg("name"), py::arg("a"), py::arg("b"), py::arg("c"),
        py::arg("masks"));
}

const Bindings added("avx512", add);

}  // namespace
