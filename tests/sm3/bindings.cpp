// leanops_native.sm3: the torch-free core of SM3 on NumPy arrays.
#include <thread>

#include "sm3/schedule.h"
#include "testing/bindings.h"

LEANOPS_KERNELS_OF(sm3)

using namespace leanops;
using namespace leanops::testing;

namespace {

// Units of work among threads, in parts of unlike length, as torch would share them.
void run_in_threads(sm3::Schedule& schedule, int64_t threads) {
  std::vector<std::thread> pool;
  const int64_t parts = threads * threads;
  for (int64_t t = 0; t < threads; ++t) {  // t^2 / threads^2 of the work lies before thread t
    const int64_t from = schedule.units() * (t * t) / parts;
    const int64_t to = schedule.units() * ((t + 1) * (t + 1)) / parts;
    pool.emplace_back([&schedule, from, to] { schedule.run(from, to); });
  }
  for (std::thread& thread : pool) thread.join();
}

void* data_of(py::array& array, int64_t size, int64_t elements) {
  if (array.itemsize() != size || array.size() != elements || !(array.flags() & py::array::c_style)) {
    throw std::invalid_argument("an array of the wrong item size or length, or with gaps");
  }
  return array.mutable_data();
}

// One dict a parameter: shape, dtype, param, grad, cover, kind, momentum, scales, tensor_id, offset, lr_factor.
void step(const std::string& isa, const std::vector<py::dict>& tensors, const py::dict& o, int64_t threads) {
  const sm3::Options options = {o["lr"].cast<double>(),
                                o["momentum"].cast<double>(),
                                o["beta"].cast<double>(),
                                o["eps"].cast<double>(),
                                o["weight_decay"].cast<double>(),
                                o["decoupled"].cast<bool>(),
                                o["maximize"].cast<bool>(),
                                o["stochastic_rounding"].cast<bool>(),
                                o["average_gradient"].cast<bool>(),
                                o["grad_scale"].cast<float>(),
                                o["seed"].cast<uint64_t>()};
  sm3::Schedule schedule(sm3::numbers_of(options), sm3::kernels_of(isa));
  for (const py::dict& t : tensors) {
    const std::vector<int64_t> shape = t["shape"].cast<std::vector<int64_t>>();
    const std::string kind = t["kind"].cast<std::string>();
    int64_t numel = 1, entries = shape.empty();
    for (int64_t size : shape) {
      numel *= size;
      entries += size;
    }
    sm3::Parameter p = {};
    p.dtype = dtype_of(t["dtype"].cast<std::string>());
    p.kind = kind == "none"       ? sm3::Momentum::kNone
             : kind == "float32"  ? sm3::Momentum::kFloat32
             : kind == "bfloat16" ? sm3::Momentum::kBFloat16
                                  : sm3::Momentum::kInt8;
    py::array param = t["param"], grad = t["grad"], cover = t["cover"], momentum = t["momentum"],
              scales = t["scales"];
    p.param = data_of(param, element_size(p.dtype), numel);
    p.grad = data_of(grad, element_size(p.dtype), numel);
    p.cover = static_cast<float*>(data_of(cover, 4, entries));
    if (p.kind != sm3::Momentum::kNone) p.momentum = data_of(momentum, sm3::momentum_size(p.kind), numel);
    if (p.kind == sm3::Momentum::kInt8) p.scales = static_cast<float*>(data_of(scales, 4, scales.size()));
    p.tensor_id = t["tensor_id"].cast<uint32_t>();
    p.offset = t["offset"].cast<uint64_t>();
    p.lr_factor = t["lr_factor"].cast<float>();
    p.sizes = shape.data();
    p.rank = static_cast<int64_t>(shape.size());
    schedule.add(p);
  }
  const py::gil_scoped_release release;
  schedule.prepare();
  run_in_threads(schedule, threads);
  schedule.finish();
}

void add(py::module_& m) {
  m.def("step", step, py::arg("isa"), py::arg("tensors"), py::arg("options"), py::arg("threads") = 1);
}

const Bindings added("sm3", add);

}  // namespace
