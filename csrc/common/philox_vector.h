// Runs of Philox blocks, and the bits of stochastic rounding, by the vector operations of simd.h.
#pragma once

#include "philox.h"
#include "simd.h"
#include "types.h"

namespace leanops {
namespace LEANOPS_ISA {

constexpr int kBatch = W / 2;  // Philox blocks in a batch

// U batches of consecutive blocks; they are computed together to hide latency. a has words 0 and 2 of each block in
// turn, b has words 1 and 3.                                                                a, b: [U][W]
template <int U>
LEANOPS_INLINE void philox_batches(const PhiloxPlan& plan, uint64_t block, I* a, I* b) {
  const P m0 = set_p(kPhiloxM0), m1 = set_p(kPhiloxM1);
  P x0[U], x1[U], x2[U], x3[U];
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const P p = mul_p(iota_p(block + static_cast<uint64_t>(u * kBatch)), m0);
    x2[u] = xor_p(high_p(p), word_p(plan.r1));
    const P q = mul_p(x2[u], m1);
    x0[u] = xor_p(high_p(q), word_p(plan.r2a));
    x1[u] = q;
    x2[u] = xor_p(p, word_p(plan.r2b));
  }
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {
    const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
    x0[u] = xor_p(high_p(q), x1[u], word_p(plan.k0[2]));
    x1[u] = q;
    x2[u] = xor_p(high_p(p), word_p(plan.r3));
    x3[u] = p;
  }
#pragma GCC unroll 6
  for (int round = 3; round < kPhiloxRounds - 1; ++round) {
    const P k0 = word_p(plan.k0[round]), k1 = word_p(plan.k1[round]);
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) {
      const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
      x0[u] = xor_p(high_p(q), x1[u], k0);
      x1[u] = q;
      x2[u] = xor_p(high_p(p), x3[u], k1);
      x3[u] = p;
    }
  }
  const I last = alternate(plan.k0[kPhiloxRounds - 1], plan.k1[kPhiloxRounds - 1]);
#pragma GCC unroll 8
  for (int u = 0; u < U; ++u) {  // the last round, with its results merged into a and b
    const P p = mul_p(x0[u], m0), q = mul_p(x2[u], m1);
    a[u] = xor_i(merge_high(q, p), merge_low(x1[u], x3[u]), last);
    b[u] = merge_low(q, p);
  }
}

// The words of the blocks from `block` to `block + count - 1` in memory order. It writes whole batches, so up to
// kBatch - 1 blocks more.
static inline void philox_words(const PhiloxPlan& plan, uint64_t block, int64_t count, uint32_t* words) {
  constexpr int U = 4;
  int64_t done = 0;
  for (; done + U * kBatch <= count; done += U * kBatch) {
    I a[U], b[U];
    philox_batches<U>(plan, block + static_cast<uint64_t>(done), a, b);
    for (int u = 0; u < U; ++u) store_words(words + 4 * done + 2 * W * u, a[u], b[u]);
  }
  for (; done < count; done += kBatch) {
    I a[1], b[1];
    philox_batches<1>(plan, block + static_cast<uint64_t>(done), a, b);
    store_words(words + 4 * done, a[0], b[0]);
  }
}

// The high half of a block's number. It is the same for all blocks of a PhiloxPlan.
static inline uint32_t high32(uint64_t block) { return static_cast<uint32_t>(block >> 32); }

// The 16 bits that stochastic rounding adds to each of at most N consecutive elements. The element with index i in its
// whole tensor uses half-word i % 8 of block i / 8.
template <int64_t N>
struct RoundingBits {
  static constexpr int64_t kSlack =
      8 * kBatch;  // half-words of one batch, because the last one is written whole
  alignas(64) uint16_t bits[N + 8 + kSlack];

  // Computes the bits of n <= N elements from index `index` on. Element j's bits are at (returned pointer) + j.
  const uint16_t* fill(uint64_t seed, uint32_t tensor_id, uint64_t index, int64_t n) {
    const uint64_t first = index / 8, end = (index + static_cast<uint64_t>(n) + 7) / 8;
    uint32_t words[(N + 8 + kSlack) / 2];
    int64_t written = 0;
    for (uint64_t block = first; block < end;) {
      const uint64_t carry = (block | 0xffffffffu) + 1;  // the next block with another high half
      const uint64_t stop = carry - 1 < end - 1 ? carry : end;
      const int64_t count = static_cast<int64_t>(stop - block);
      philox_words(philox_plan(seed, tensor_id, kStreamRounding, high32(block)), block, count,
                   words + 4 * written);
      written += count;
      block = stop;
    }
    __builtin_memcpy(bits, words, static_cast<size_t>(16 * written));
    return bits + index % 8;
  }
};

}  // namespace LEANOPS_ISA
}  // namespace leanops
