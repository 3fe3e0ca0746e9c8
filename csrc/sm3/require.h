// What the operator refuses below the checks in Python, in their words: torch's STD_TORCH_CHECK would put a function
// and a line of a file before them.
#ifndef LEANOPS_SM3_REQUIRE_H
#define LEANOPS_SM3_REQUIRE_H

#include <sstream>
#include <stdexcept>

// A macro, so that a message is made only where it is needed.
#define LEANOPS_SM3_REQUIRE(condition, ...)                \
  do {                                                     \
    if (!(condition)) ::leanops::sm3::refuse(__VA_ARGS__); \
  } while (false)

namespace leanops {
namespace sm3 {

template <class... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::ostringstream out;
  out << "sm3_step_: ";
  ((out << parts), ...);
  throw std::runtime_error(out.str());
}

}  // namespace sm3
}  // namespace leanops

#endif  // LEANOPS_SM3_REQUIRE_H
