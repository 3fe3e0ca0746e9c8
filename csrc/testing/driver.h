// What the families' checks under the sanitizers share. tests/<family>/driver.cpp defines a family's own: a
// static `Check` adds it to the driver.
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
  int runs = 0, bad = 0;  // bad: with other bits than they should have
};

using RunCheck = Runs (*)(const std::string& set);

inline std::vector<RunCheck>& all_checks() {
  static std::vector<RunCheck> checks;
  return checks;
}

struct Check {
  explicit Check(RunCheck run) { all_checks().push_back(run); }
};

// run(first, count) over n elements, cut among threads.
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
