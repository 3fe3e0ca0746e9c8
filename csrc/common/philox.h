// Philox4x32-10 (Salmon et al., SC'11): constants, key schedule and the scalar block function.
// Everything here has internal linkage, so that files compiled for different instruction sets never share it.
#pragma once

#include <cstdint>

namespace leanops {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u;
constexpr uint32_t kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u;
constexpr uint32_t kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

// Replaces a counter x[0..3] by its four random words. (k0, k1) is the key.
static inline void philox_block(uint32_t x[4], uint32_t k0, uint32_t k1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x[0];
    const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * x[2];
    x[0] = static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ k0;
    x[1] = static_cast<uint32_t>(p1);
    x[2] = static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ k1;
    x[3] = static_cast<uint32_t>(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

// The round constants of a run of blocks with counters (lo, hi, tensor_id, stream). Only lo varies. Some
// products of the first rounds do not depend on lo, and these constants include them: in round 1 the product with
// tensor_id, so that x0 and x1 are constants after it; in round 2 the product with x0.
//   round 1:  x2 = mulhi(M0, lo) ^ r1,  x3 = mullo(M0, lo)
//   round 2:  q = M1*x2;  x0 = hi(q) ^ r2a,  x1 = lo(q),  x2 = x3 ^ r2b
//   round 3:  p = M0*x0, q = M1*x2;  x0 = hi(q) ^ x1 ^ k0[2],  x1 = lo(q),  x2 = hi(p) ^ r3,  x3 = lo(p)
//   rounds 4 to 10 as published, with the keys k0[3..9], k1[3..9].
struct PhiloxPlan {
  uint32_t r1, r2a, r2b, r3;
  uint32_t k0[kPhiloxRounds], k1[kPhiloxRounds];
};

static inline PhiloxPlan philox_plan(uint64_t seed, uint32_t tensor_id, uint32_t stream, uint32_t block_hi) {
  PhiloxPlan plan;
  for (int round = 0; round < kPhiloxRounds; ++round) {
    plan.k0[round] = static_cast<uint32_t>(seed) + static_cast<uint32_t>(round) * kPhiloxW0;
    plan.k1[round] = static_cast<uint32_t>(seed >> 32) + static_cast<uint32_t>(round) * kPhiloxW1;
  }
  const uint64_t p1 = static_cast<uint64_t>(kPhiloxM1) * tensor_id;
  const uint32_t x0 = static_cast<uint32_t>(p1 >> 32) ^ block_hi ^ plan.k0[0];
  const uint64_t p0 = static_cast<uint64_t>(kPhiloxM0) * x0;
  plan.r1 = stream ^ plan.k1[0];
  plan.r2a = static_cast<uint32_t>(p1) ^ plan.k0[1];
  plan.r2b = static_cast<uint32_t>(p0 >> 32) ^ plan.k1[1];
  plan.r3 = static_cast<uint32_t>(p0) ^ plan.k1[2];
  return plan;
}

}  // namespace leanops
