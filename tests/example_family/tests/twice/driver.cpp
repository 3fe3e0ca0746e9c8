// The kernel of twice for the sanitizers.
#include "testing/driver.h"
#include "twice/twice.h"

LEANOPS_KERNELS_OF(twice)

using namespace leanops;
using namespace leanops::testing;

namespace {

const Check added([](const std::string& set) {
  const std::vector<float> x(33, 1.5f);
  std::vector<float> y(33);
  twice::kernels_of(set).run(y.data(), x.data(), 33);
  Runs result;
  result.runs = 1;
  result.bad = y != std::vector<float>(33, 3.0f);
  return result;
});

}  // namespace
