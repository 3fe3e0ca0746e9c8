// Runs the CUDA cores on the CPU, thread by thread, so that their indexing, their barriers and their bits are
// tested without a GPU.
#include "engine.h"

// Launches a kernel by its name; `arguments` are pointers to the arguments, as in cuLaunchKernel. 0: done; 1:
// there is no such kernel; 2: it never ends. `order`: see engine.h.
extern "C" int leanops_emulate(const char* name, unsigned grid, unsigned block, void** arguments,
                               unsigned order) {
  const auto found = emulator::kernels().find(name);
  return found == emulator::kernels().end()
             ? 1
             : emulator::launch.run(found->second, grid, block, arguments, order);
}
