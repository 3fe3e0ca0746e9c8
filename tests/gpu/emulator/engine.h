// A CUDA launch on one CPU thread. The threads of a block are coroutines. They hand over at barriers, at
// exchanges within a warp, and at atomics, so a value that is read across threads without a barrier is wrong
// here, too. A barrier that some thread never reaches is reported. Blocks run one after another, backwards,
// or mixed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

struct Dim {
  unsigned x;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

struct Kernel {
  std::function<void(void**)> body;
  size_t shared_bytes = 0;  // 0: shared memory is static, so blocks cannot be mixed
};
inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> all;
  return all;
}

struct Meeting {  // a point where the threads of a warp or of a block wait for one another
  int arrived = 0;
  unsigned generation = 0;
  const char* what = nullptr;
  unsigned words[2][32];
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  bool running = false;
  static const size_t kStack = 64 << 10;
};

struct Block {
  unsigned index = 0;
  bool running = false;
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::unique_ptr<std::max_align_t[]> shared;
};

enum Order { FORWARD = 0, BACKWARD = 1 };  // any other number is the seed of a mixed order

class Launch {
 public:
  // 0: every thread has returned. 2: a thread waits for ever.
  int run(const Kernel& kernel, unsigned grid, unsigned block, void** arguments, unsigned order) {
    kernel_ = &kernel;
    arguments_ = arguments;
    order_ = order;
    random_.seed(order);
    failed_ = false;
    gridDim.x = grid;
    blockDim.x = block;
    blocks_.resize(order > BACKWARD && kernel.shared_bytes ? 5 : 1);
    unsigned begun = 0;
    for (;;) {
      for (Block& b : blocks_)
        if (!b.running && begun < grid) begin(b, order == BACKWARD ? grid - 1 - begun++ : begun++, block);
      std::vector<Block*> live;
      for (Block& b : blocks_)
        if (b.running) live.push_back(&b);
      if (live.empty()) return 0;
      const size_t moved_before = moves_;
      if (order > BACKWARD) std::shuffle(live.begin(), live.end(), random_);
      for (Block* b : live) {
        sweep(*b);
        if (failed_) return 2;
        if (order > BACKWARD && moves_ != moved_before && random_() % 2) break;  // some run ahead of others
      }
      if (moves_ == moved_before) return fail("every thread waits");
    }
  }

  void meet(Meeting& meeting, int size, const char* what) {
    if (meeting.arrived == 0) meeting.what = what;
    if (meeting.what != what) fail("threads wait for different things");
    const unsigned generation = meeting.generation;
    ++moves_;
    if (++meeting.arrived == size) {
      meeting.arrived = 0;
      ++meeting.generation;
      return;
    }
    while (meeting.generation == generation) hand_over();
  }
  void barrier() { meet(block_->all, (int)block_->threads.size(), "barrier"); }
  // The words of all 32 lanes, once every lane has arrived.                                           -> [32]
  const unsigned* exchange(unsigned word, const char* what) {
    Meeting& warp = block_->warps[threadIdx.x / 32];
    unsigned* words = warp.words[warp.generation % 2];
    words[threadIdx.x % 32] = word;
    meet(warp, 32, what);
    return words;
  }
  void maybe_hand_over() {
    if (order_ > BACKWARD && random_() % 4 == 0) {
      ++moves_;
      hand_over();
    }
  }
  void* shared_memory() { return block_->shared.get(); }

 private:
  static void enter();

  int fail(const char* why) {
    if (!failed_) std::fprintf(stderr, "emulator: block %u: %s\n", block_->index, why);
    failed_ = true;
    return 2;
  }

  void begin(Block& b, unsigned index, unsigned threads) {
    b.index = index;
    b.running = true;
    b.threads.resize(threads);
    b.warps.assign((threads + 31) / 32, Meeting());
    b.all = Meeting();
    b.shared.reset(new std::max_align_t[kernel_->shared_bytes / sizeof(std::max_align_t) + 1]);
    std::memset(b.shared.get(), 0xa5, kernel_->shared_bytes);
    for (Thread& t : b.threads) {
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.get();
      t.context.uc_stack.ss_size = Thread::kStack;
      t.context.uc_link = &scheduler_;
      makecontext(&t.context, enter, 0);
      t.running = true;
    }
  }

  // Run every thread of the block until it waits or returns.
  void sweep(Block& b) {
    std::vector<unsigned> order(b.threads.size());
    for (unsigned i = 0; i < order.size(); ++i) order[i] = i;
    if (order_ == BACKWARD) std::reverse(order.begin(), order.end());
    if (order_ > BACKWARD) std::shuffle(order.begin(), order.end(), random_);
    block_ = &b;
    blockIdx.x = b.index;
    b.running = false;
    for (unsigned i : order) {
      thread_ = &b.threads[i];
      if (!thread_->running) continue;
      threadIdx.x = i;
      swapcontext(&scheduler_, &thread_->context);
      b.running |= thread_->running;
      if (failed_) return;
    }
  }

  void hand_over() {
    swapcontext(&thread_->context, &scheduler_);
    if (failed_) setcontext(&scheduler_);
  }

  const Kernel* kernel_ = nullptr;
  void** arguments_ = nullptr;
  unsigned order_ = FORWARD;
  std::mt19937 random_;
  bool failed_ = false;
  size_t moves_ = 0;  // arrivals and returns; a round without one is a deadlock
  std::vector<Block> blocks_;
  Block* block_ = nullptr;
  Thread* thread_ = nullptr;
  ucontext_t scheduler_;
};

inline Launch launch;

inline void Launch::enter() {
  launch.kernel_->body(launch.arguments_);
  launch.thread_->running = false;
  ++launch.moves_;
}

}  // namespace emulator
