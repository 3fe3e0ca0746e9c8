// Shared by the families' checks under the sanitizers. tests/<family>/driver.cpp defines those of a family: a static
// `Check` adds them to the driver.
#pragma once

#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include "common/types.h"
#include "testing/kernel_sets.h"

namespace leanops {
namespace testing {

struct Runs {
  int runs = 0, bad = 0;  // bad: runs with wrong bits
};

using RunCheck = Runs (*)(const std::string& set);

inline std::vector<RunCheck>& all_checks() {
  static std::vector<RunCheck> checks;
  return checks;
}

struct Check {
  explicit Check(RunCheck run) { all_checks().push_back(run); }
};

// Calls run(first, count) for parts of n elements, one for each thread.
template <class Run>
void in_threads(int64_t n, int threads, const Run& run) {
  std::vector<std::thread> pool;
  for (int t = 0; t < threads; ++t) {
    const int64_t from = n * t / threads, to = n * (t + 1) / threads;
    pool.emplace_back([=, &run] { run(from, to - from); });
  }
  for (std::thread& thread : pool) thread.join();
}

}  // namespace testing
}  // namespace leanops
