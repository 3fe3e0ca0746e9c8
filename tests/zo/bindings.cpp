// leanops_native.zo: the torch-free core of zo on NumPy arrays.
#include "zo/zo.h"

#include "testing/bindings.h"

LEANOPS_KERNELS_OF(zo)

using namespace leanops;
using namespace leanops::testing;
using namespace leanops::zo;

namespace {

Distribution distribution_of(const std::string& name) {
  if (name != "gaussian" && name != "rademacher") throw std::invalid_argument("unknown distribution " + name);
  return name == "gaussian" ? Distribution::kGaussian : Distribution::kRademacher;
}

Array<uint32_t> words(const std::string& isa, int64_t count, uint64_t block, uint32_t tensor_id,
                      uint32_t stream, uint64_t seed) {
  Array<uint32_t> out(4 * count);
  kernels_of(isa).words(out.mutable_data(), count, block, tensor_id, stream, seed);
  return out;
}

void noise(const std::string& isa, py::array out, const std::string& dtype, uint64_t seed, uint32_t tensor_id,
           uint64_t index, const std::string& distribution) {
  const DType type = dtype_of(dtype, out);
  kernels_of(isa).noise(out.mutable_data(), type, out.size(), seed, tensor_id, index,
                        distribution_of(distribution));
}

void axpy(const std::string& isa, py::array out, const py::array& in, const std::string& dtype,
          const std::vector<uint64_t>& seeds, const std::vector<double>& coeffs,
          const std::vector<double>& decays, uint32_t tensor_id, uint64_t index,
          const std::string& distribution, bool stochastic, bool sequential,
          const std::vector<uint64_t>& right_seeds, uint64_t columns, int64_t rank) {
  const DType type = dtype_of(dtype, out);
  dtype_of(dtype, in);
  const bool low_rank = distribution == "lowrank";
  if (in.size() != out.size() || seeds.size() != coeffs.size()) throw std::invalid_argument("lengths differ");
  if (low_rank && (right_seeds.size() != seeds.size() || rank < 1 || rank > kMaxRank))
    throw std::invalid_argument("right_seeds or rank");
  if (decays.size() != 1 && !(sequential && decays.size() == seeds.size()))
    throw std::invalid_argument("decays");
  const Terms terms = {seeds.data(),
                       coeffs.data(),
                       decays.data(),
                       static_cast<int64_t>(seeds.size()),
                       static_cast<int64_t>(decays.size()),
                       low_rank ? Distribution::kLowRank : distribution_of(distribution),
                       stochastic ? Rounding::kStochastic : Rounding::kNearest,
                       sequential,
                       right_seeds.data(),
                       rank};
  const py::gil_scoped_release release;
  kernels_of(isa).axpy(out.mutable_data(), in.data(), type, out.size(), terms, tensor_id, index, columns);
}

void both(const std::string& isa, py::array plus, py::array minus, const py::array& in,
          const std::string& dtype, uint64_t seed, double coeff, uint32_t tensor_id, uint64_t index,
          const std::string& distribution) {
  const DType type = dtype_of(dtype, plus);
  dtype_of(dtype, minus);
  dtype_of(dtype, in);
  if (in.size() != plus.size() || in.size() != minus.size()) throw std::invalid_argument("lengths differ");
  kernels_of(isa).both(plus.mutable_data(), minus.mutable_data(), in.data(), type, in.size(), seed, coeff,
                       tensor_id, index, distribution_of(distribution));
}

void spread(const std::string& isa, py::array plus, py::array minus, const py::array& b,
            const std::string& dtype, double scale) {
  const DType type = dtype_of(dtype, plus);
  dtype_of(dtype, minus);
  dtype_of(dtype, b);
  if (b.size() != plus.size() || b.size() != minus.size()) throw std::invalid_argument("lengths differ");
  kernels_of(isa).spread(plus.mutable_data(), minus.mutable_data(), b.data(), type, b.size(), scale);
}

void add(py::module_& m) {
  m.def("words", words, py::arg("isa"), py::arg("count"), py::arg("block"), py::arg("tensor_id"),
        py::arg("stream"), py::arg("seed"));
  m.def("noise", noise, py::arg("isa"), py::arg("out").noconvert(), py::arg("dtype"), py::arg("seed"),
        py::arg("tensor_id"), py::arg("index"), py::arg("distribution"));
  m.def("axpy", axpy, py::arg("isa"), py::arg("out").noconvert(), py::arg("in_").noconvert(),
        py::arg("dtype"), py::arg("seeds"), py::arg("coeffs"), py::arg("decays"), py::arg("tensor_id"),
        py::arg("index"), py::arg("distribution"), py::arg("stochastic"), py::arg("sequential"),
        py::arg("right_seeds") = std::vector<uint64_t>(), py::arg("columns") = 0, py::arg("rank") = 2);
  m.def("both", both, py::arg("isa"), py::arg("plus").noconvert(), py::arg("minus").noconvert(),
        py::arg("in_").noconvert(), py::arg("dtype"), py::arg("seed"), py::arg("coeff"), py::arg("tensor_id"),
        py::arg("index"), py::arg("distribution"));
  m.def("spread", spread, py::arg("isa"), py::arg("plus").noconvert(), py::arg("minus").noconvert(),
        py::arg("b").noconvert(), py::arg("dtype"), py::arg("scale"));
}

const Bindings added("zo", add);

}  // namespace
