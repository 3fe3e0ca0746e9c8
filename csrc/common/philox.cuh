// Philox4x32-10 (Salmon et al., SC'11): 4 random words of a (key, counter) pair.
#ifndef LEANOPS_COMMON_PHILOX_CUH
#define LEANOPS_COMMON_PHILOX_CUH

#include "device.cuh"

namespace leanops {

// The last word of a counter. pyops/common/streams.py lists all of them.
enum Stream : u32 {
  STREAM_GAUSSIAN = 0,
  STREAM_RADEMACHER = 1,
  STREAM_ROUNDING = 2,
  STREAM_LEFT = 3,
  STREAM_RIGHT = 4
};

struct Words {
  u32 x[4];
};

// Counter = (block low, block high, tensor_id, stream); key = (seed low, seed high).
LEANOPS_DEVICE Words philox(u64 seed, u64 block, u32 tensor_id, u32 stream) {
  u32 c0 = (u32)block, c1 = (u32)(block >> 32), c2 = tensor_id, c3 = stream;
  u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 p0 = wide_mul(0xD2511F53u, c0);
    const u64 p1 = wide_mul(0xCD9E8D57u, c2);
    c0 = high(p1) ^ c1 ^ k0;
    c1 = (u32)p1;
    c2 = high(p0) ^ c3 ^ k1;
    c3 = (u32)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};  // [4]
}

// 16 random bits for each of the 8 logical elements from `index` on: [4] words. They come from two Philox blocks
// unless `index` is a multiple of 8.
LEANOPS_DEVICE Words rounding_halves(u64 seed, u64 index, u32 id) {
  Words x = philox(seed, index / 8, id, STREAM_ROUNDING);
  const int skipped = (int)(index % 8);
  if (skipped != 0) {
    const Words next = philox(seed, index / 8 + 1, id, STREAM_ROUNDING);
    u32 w[8] = {x.x[0], x.x[1], x.x[2], x.x[3], next.x[0], next.x[1], next.x[2], next.x[3]};  // [8]
#pragma unroll 1
    for (int shifts = skipped; shifts; --shifts)  // by 16 bits each
#pragma unroll
      for (int i = 0; i < 7; ++i) w[i] = w[i] >> 16 | w[i + 1] << 16;  // [8]
    x = Words{{w[0], w[1], w[2], w[3]}};                               // [4]
  }
  return x;
}

}  // namespace leanops

#endif
