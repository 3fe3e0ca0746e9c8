// driver SET: runs the checks of every family with an instruction set, or with AVX-512 emulated, for the
// sanitizers. Exits with 2 where this machine does not have the set.
#include <cstdio>

#include "testing/driver.h"

using namespace leanops;

int main(int count, char** arguments) {
  if (count != 2) {
    std::fprintf(stderr, "usage: driver SET\n");
    return 1;
  }
  const std::string set = arguments[1];
  testing::Runs total;
  try {
    for (testing::RunCheck run : testing::all_checks()) {
      const testing::Runs result = run(set);
      total.runs += result.runs;
      total.bad += result.bad;
    }
  } catch (const std::invalid_argument& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
  std::printf("%s: %d runs, %d with different bits\n", set.c_str(), total.runs, total.bad);
  return total.bad != 0 || total.runs == 0;
}
