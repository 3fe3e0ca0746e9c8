// The kernels of csrc/zo, by the names that pyops/zo/nvrtc.py gives them.
#include "emulator/device.h"  // first: it stands in for csrc/common/device.cuh

#include "zo/lowrank.cuh"

using namespace leanops;
using namespace leanops::zo;

namespace {

template <class N>
N value(void* at) {
  return *(N*)at;
}

void add(const std::string& name, void (*body)(void**)) { emulator::kernels()[name] = {body, 0}; }

template <class T, int DIST, int MODE>
void add_modes(const std::string& type) {
  const std::string name = "work<" + type + ", " + std::to_string(DIST) + ", " + std::to_string(MODE) + ", ";
  add(name + "false>", [](void** a) { work<T, DIST, MODE, false>(*(const Call*)a[0]); });
  if (sizeof(T) == 2)
    add(name + "true>", [](void** a) { work<T, DIST, MODE, sizeof(T) == 2>(*(const Call*)a[0]); });
}

template <class T>
void add_type(const std::string& type) {
  add_modes<T, 0, NOISE>(type), add_modes<T, 1, NOISE>(type);
  add_modes<T, 0, SINGLE>(type), add_modes<T, 1, SINGLE>(type);
  add_modes<T, 0, MANY>(type), add_modes<T, 1, MANY>(type);
  add_modes<T, 0, PAIR>(type), add_modes<T, 1, PAIR>(type);
  add("low_rank<" + type + ", false>", [](void** a) { low_rank<T, false>(*(const Call*)a[0]); });
  if (sizeof(T) == 2)
    add("low_rank<" + type + ", true>", [](void** a) { low_rank<T, sizeof(T) == 2>(*(const Call*)a[0]); });
  add("combine<" + type + ">", [](void** a) {
    combine<T>(value<u64>(a[0]), value<u64>(a[1]), value<u64>(a[2]), value<u64>(a[3]), value<u64>(a[4]),
               value<double>(a[5]), value<i64>(a[6]), value<i64>(a[7]), value<i64>(a[8]), value<i64>(a[9]));
  });
  add("add_bias<" + type + ">",
      [](void** a) { add_bias<T>(value<u64>(a[0]), value<u64>(a[1]), value<i64>(a[2]), value<i64>(a[3])); });
}

const bool added = [] {
  add("copy_words", [](void** a) { copy_words(*(const Upload*)a[0]); });
  add_type<float>("float");
  add_type<double>("double");
  add_type<bf16>("leanops::bf16");
  add_type<fp16>("leanops::fp16");
  return true;
}();

}  // namespace
