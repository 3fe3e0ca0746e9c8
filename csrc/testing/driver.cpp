// Runs the checks of every family with the instruction set that LEANOPS_CPU_ISA names, for the sanitizers.
#include <cstdio>

#include "testing/driver.h"

using namespace leanops;

int main() {
  const IsaChoice& choice = isa_choice();
  if (choice.error) {
    std::fprintf(stderr, "%s\n", choice.error);
    return 2;
  }
  testing::Runs total;
  for (testing::RunCheck run : testing::all_checks()) {
    const testing::Runs result = run(choice.isa);
    total.runs += result.runs;
    total.bad += result.bad;
  }
  std::printf("%s: %d runs, %d with different bits\n", isa_name(choice.isa), total.runs, total.bad);
  return total.bad != 0;
}
