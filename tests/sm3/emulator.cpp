// The kernels of csrc/sm3/sm3.cuh, by the names that pyops/sm3/nvrtc.py gives them, and the table of its host
// part.
#include "emulator/device.h"  // first: it stands in for csrc/common/device.cuh

#include "sm3/plan.h"
#include "sm3/sm3.cuh"

using namespace leanops;
using namespace leanops::sm3;

namespace {

template <class T, int M, bool STOCHASTIC>
void add(const std::string& type) {
  const std::string random = STOCHASTIC ? "true" : "false";
  const std::string name = "step<" + type + ", " + std::to_string(M) + ", " + random + ">";
  emulator::kernels()[name] = {[](void** a) { step<T, M, STOCHASTIC>(*(const Call*)a[0]); }, sizeof(Shared)};
}
template <class T, bool STOCHASTIC>
void add_type(const std::string& type) {
  add<T, NO_MOMENTUM, STOCHASTIC>(type), add<T, FLOAT32, STOCHASTIC>(type);
  add<T, BFLOAT16, STOCHASTIC>(type), add<T, INT8, STOCHASTIC>(type);
}

const bool added = [] {
  add_type<float, false>("float");
  add_type<double, false>("double");
  add_type<bf16, false>("leanops::bf16"), add_type<bf16, true>("leanops::bf16");
  add_type<fp16, false>("leanops::fp16"), add_type<fp16, true>("leanops::fp16");
  return true;
}();

}  // namespace

// table_of and place; `words` has room for `capacity`. Returns the words of the table; tiles and scratch in
// `counts`.
extern "C" i64 leanops_sm3_table(const Item* items, i64 count, int kind, int param_size, u64 scratch,
                                 u64* words, i64 capacity, i64* counts) {
  Table table = table_of(std::vector<Item>(items, items + count), (Momentum)kind, param_size);
  table.place(scratch);
  counts[0] = table.tiles;
  counts[1] = table.scratch;
  counts[2] = table.tensors;
  std::copy_n(table.words.begin(), std::min<i64>(capacity, (i64)table.words.size()), words);
  return (i64)table.words.size();
}
