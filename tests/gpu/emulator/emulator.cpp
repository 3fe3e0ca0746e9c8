// Runs the CUDA cores on the CPU, thread by thread, so that their indexing and bits are tested without a GPU.
// It stands in for csrc/common/device.cuh with plain C++ that rounds as that file promises. A warp's 32
// threads are coroutines:
// __syncwarp() hands over to the next lane, so a value read across lanes without a barrier is seen to be
// wrong.
#define LEANOPS_COMMON_DEVICE_CUH

#include <ucontext.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#define __device__
#define __shared__ static
#define LEANOPS_DEVICE inline

struct Dim {
  unsigned x;
};
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace {

struct Lane {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool running = false;
};
Lane lanes[32];
ucontext_t scheduler;
int current;
void (*body)(void**);
void** arguments;

void lane_main() {
  body(arguments);
  lanes[current].running = false;
}

void run_warp(int warp) {
  for (int lane = 0; lane < 32; ++lane) {
    getcontext(&lanes[lane].context);
    lanes[lane].context.uc_stack.ss_sp = lanes[lane].stack.data();
    lanes[lane].context.uc_stack.ss_size = lanes[lane].stack.size();
    lanes[lane].context.uc_link = &scheduler;
    makecontext(&lanes[lane].context, lane_main, 0);
    lanes[lane].running = true;
  }
  for (bool any = true; any;) {
    any = false;
    for (int lane = 0; lane < 32; ++lane) {
      if (!lanes[lane].running) continue;
      any = true;
      current = lane;
      threadIdx.x = (unsigned)(warp * 32 + lane);
      swapcontext(&scheduler, &lanes[lane].context);
    }
  }
}

}  // namespace

inline void __syncwarp() { swapcontext(&lanes[current].context, &scheduler); }

namespace leanops {

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;
using std::max;
using std::min;

struct bf16 {
  u16 bits;
};
struct fp16 {
  u16 bits;
};
struct alignas(16) vec16 {
  u32 w[4];
};

template <class To, class From>
To bit_cast(From from) {
  To to;
  static_assert(sizeof to == sizeof from, "same size");
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline float as_float(u32 bits) { return bit_cast<float>(bits); }
inline u32 as_bits(float x) { return bit_cast<u32>(x); }
inline double as_double(u64 bits) { return bit_cast<double>(bits); }
inline u64 as_bits(double x) { return bit_cast<u64>(x); }
inline u32 high_halves(u32 lo, u32 hi) { return lo >> 16 | (hi & 0xffff0000u); }
inline u64 wide_mul(u32 a, u32 b) { return (u64)a * b; }
inline u32 high(u64 x) { return (u32)(x >> 32); }
template <class T>
T* global(u64 address) {
  return (T*)address;
}
inline void store(vec16* at, const vec16& x) {
  if ((u64)at % 16) std::abort();  // as the device would
  *at = x;
}
inline float fma(float a, float b, float c) { return std::fma(a, b, c); }
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline double mul(double a, double b) { return a * b; }
inline double add(double a, double b) { return a + b; }
inline float sqrt_bounded(float t) { return std::sqrt(t); }

inline u32 to_bf16(float x) {
  const u32 bits = as_bits(x);
  if (x != x) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 to_fp16(float x) {
  const u32 sign = as_bits(x) >> 16 & 0x8000;
  const double magnitude = std::fabs((double)x);
  if (x != x) return 0x7fff;
  if (magnitude >= 65520.0) return sign | 0x7c00;
  const int exponent = std::max(magnitude == 0 ? -14 : std::ilogb(magnitude), -14);
  const double units = std::nearbyint(std::ldexp(magnitude, 10 - exponent));  // ties to even
  return sign | (u32)(units + std::ldexp(exponent + 14, 10));  // a carry runs into the exponent
}
inline u32 pack_bf16(float lo, float hi) { return to_bf16(lo) | to_bf16(hi) << 16; }
inline u32 pack_fp16(float lo, float hi) { return to_fp16(lo) | to_fp16(hi) << 16; }
inline float fp16_to_float(u32 half) {
  const int exponent = half >> 10 & 31, mantissa = half & 1023;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  return sign * std::ldexp((float)(exponent ? mantissa + 1024 : mantissa), std::max(exponent, 1) - 25);
}

}  // namespace leanops

#include "zo/lowrank.cuh"

using namespace leanops;
using namespace leanops::zo;

namespace {

struct Entry {
  std::string name;
  void (*body)(void**);
};

template <class T, int DIST, int MODE, bool STOCHASTIC>
void call_work(void** a) {
  work<T, DIST, MODE, STOCHASTIC>(*(const Call*)a[0]);
}

template <class T, bool STOCHASTIC>
void call_low_rank(void** a) {
  low_rank<T, STOCHASTIC>(*(const Call*)a[0]);
}

template <class N>
N value(void* at) {
  return *(N*)at;
}
template <class T>
void call_combine(void** a) {
  combine<T>(value<u64>(a[0]), value<u64>(a[1]), value<u64>(a[2]), value<u64>(a[3]), value<u64>(a[4]),
             value<double>(a[5]), value<i64>(a[6]), value<i64>(a[7]), value<i64>(a[8]), value<i64>(a[9]));
}
template <class T>
void call_add_bias(void** a) {
  add_bias<T>(value<u64>(a[0]), value<u64>(a[1]), value<i64>(a[2]), value<i64>(a[3]));
}
void call_copy_words(void** a) { copy_words(*(const Upload*)a[0]); }

template <class T, int DIST, int MODE>
void add_modes(std::vector<Entry>& to, const std::string& type) {
  const std::string name = "work<" + type + ", " + std::to_string(DIST) + ", " + std::to_string(MODE) + ", ";
  to.push_back({name + "false>", call_work<T, DIST, MODE, false>});
  if (sizeof(T) == 2) to.push_back({name + "true>", call_work<T, DIST, MODE, sizeof(T) == 2>});
}
template <class T>
void add_type(std::vector<Entry>& to, const std::string& type) {
  add_modes<T, 0, NOISE>(to, type), add_modes<T, 1, NOISE>(to, type);
  add_modes<T, 0, SINGLE>(to, type), add_modes<T, 1, SINGLE>(to, type);
  add_modes<T, 0, MANY>(to, type), add_modes<T, 1, MANY>(to, type);
  add_modes<T, 0, PAIR>(to, type), add_modes<T, 1, PAIR>(to, type);
  to.push_back({"low_rank<" + type + ", false>", call_low_rank<T, false>});
  if (sizeof(T) == 2) to.push_back({"low_rank<" + type + ", true>", call_low_rank<T, sizeof(T) == 2>});
  to.push_back({"combine<" + type + ">", call_combine<T>});
  to.push_back({"add_bias<" + type + ">", call_add_bias<T>});
}

std::vector<Entry> entries() {
  std::vector<Entry> all = {{"copy_words", call_copy_words}};
  add_type<float>(all, "float");
  add_type<double>(all, "double");
  add_type<bf16>(all, "leanops::bf16");
  add_type<fp16>(all, "leanops::fp16");
  return all;
}

}  // namespace

// Launches a kernel by its name; `args` are pointers to the arguments, as in cuLaunchKernel. 0: done.
extern "C" int leanops_emulate(const char* name, unsigned grid, unsigned block, void** args) {
  static const std::vector<Entry> all = entries();
  for (const Entry& entry : all) {
    if (entry.name != name) continue;
    body = entry.body;
    arguments = args;
    gridDim.x = grid;
    blockDim.x = block;
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x)
      for (unsigned warp = 0; warp < block / 32; ++warp) run_warp((int)warp);
    return 0;
  }
  return 1;
}
