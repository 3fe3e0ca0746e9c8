// leanops_native: the torch-free cores on NumPy arrays, for tests. 16-bit floats travel as uint16 bits.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/isa.h"
#include "common/numbers.h"
#include "common/philox.h"
#include "testing/sm3_bindings.h"
#include "zo/zo.h"

namespace py = pybind11;
using namespace leanops;
using namespace leanops::zo;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style>;

Isa isa_of(const std::string& name) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (name == isa_name(isa) && isa_supported(isa)) return isa;
  }
  throw std::invalid_argument("no such instruction set here: " + name);
}

DType dtype_of(const std::string& name, const py::array& array) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64"};
  for (int j = 0; j < 4; ++j) {
    const DType dtype = static_cast<DType>(j);
    if (name != names[j]) continue;
    if (array.itemsize() != element_size(dtype))
      throw std::invalid_argument("item size does not fit " + name);
    if (!(array.flags() & py::array::c_style)) throw std::invalid_argument("array must be contiguous");
    return dtype;
  }
  throw std::invalid_argument("unknown dtype " + name);
}

Distribution distribution_of(const std::string& name) {
  if (name != "gaussian" && name != "rademacher") throw std::invalid_argument("unknown distribution " + name);
  return name == "gaussian" ? Distribution::kGaussian : Distribution::kRademacher;
}

std::vector<uint32_t> philox(std::vector<uint32_t> counter, const std::vector<uint32_t>& key) {
  if (counter.size() != 4 || key.size() != 2)
    throw std::invalid_argument("four counter words and two key words");
  philox_block(counter.data(), key[0], key[1]);
  return counter;
}

Array<uint32_t> words(const std::string& isa, int64_t count, uint64_t block, uint32_t tensor_id,
                      uint32_t stream, uint64_t seed) {
  Array<uint32_t> out(4 * count);
  kernels(isa_of(isa)).words(out.mutable_data(), count, block, tensor_id, stream, seed);
  return out;
}

void noise(const std::string& isa, py::array out, const std::string& dtype, uint64_t seed, uint32_t tensor_id,
           uint64_t index, const std::string& distribution) {
  const DType type = dtype_of(dtype, out);
  kernels(isa_of(isa))
      .noise(out.mutable_data(), type, out.size(), seed, tensor_id, index, distribution_of(distribution));
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
  kernels(isa_of(isa))
      .axpy(out.mutable_data(), in.data(), type, out.size(), terms, tensor_id, index, columns);
}

void both(const std::string& isa, py::array plus, py::array minus, const py::array& in,
          const std::string& dtype, uint64_t seed, double coeff, uint32_t tensor_id, uint64_t index,
          const std::string& distribution) {
  const DType type = dtype_of(dtype, plus);
  dtype_of(dtype, minus);
  dtype_of(dtype, in);
  if (in.size() != plus.size() || in.size() != minus.size()) throw std::invalid_argument("lengths differ");
  kernels(isa_of(isa))
      .both(plus.mutable_data(), minus.mutable_data(), in.data(), type, in.size(), seed, coeff, tensor_id,
            index, distribution_of(distribution));
}

void spread(const std::string& isa, py::array plus, py::array minus, const py::array& b,
            const std::string& dtype, double scale) {
  const DType type = dtype_of(dtype, plus);
  dtype_of(dtype, minus);
  dtype_of(dtype, b);
  if (b.size() != plus.size() || b.size() != minus.size()) throw std::invalid_argument("lengths differ");
  kernels(isa_of(isa)).spread(plus.mutable_data(), minus.mutable_data(), b.data(), type, b.size(), scale);
}

void sm3_step(const std::string& isa, const std::vector<py::dict>& tensors, const py::dict& options,
              int64_t threads) {
  testing::sm3_step(isa_of(isa), tensors, options, threads);
}

template <class Out, class In, Out (*Convert)(In)>
Array<Out> convert(const Array<In>& in) {
  Array<Out> out(in.size());
  for (py::ssize_t j = 0; j < in.size(); ++j) out.mutable_data()[j] = Convert(in.data()[j]);
  return out;
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512}) {
    if (isa_supported(isa)) names.push_back(isa_name(isa));
  }
  return names;
}

}  // namespace

PYBIND11_MODULE(leanops_native, m) {
  m.def("isas", isas);
  m.def("cpu_isa", leanops_cpu_isa);
  m.def("cpu_isa_error", leanops_cpu_isa_error);
  m.def("philox", philox, py::arg("counter"), py::arg("key"));
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
  m.def("sm3_step", sm3_step, py::arg("isa"), py::arg("tensors"), py::arg("options"), py::arg("threads") = 1);
  m.def("float_to_bf16", convert<uint16_t, float, float_to_bf16>);
  m.def("bf16_to_float", convert<float, uint16_t, bf16_to_float>);
  m.def("float_to_fp16", convert<uint16_t, float, float_to_fp16>);
  m.def("fp16_to_float", convert<float, uint16_t, fp16_to_float>);
}
