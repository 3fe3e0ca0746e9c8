// What a lane does with its chunks: load, add c z, round, store.
#ifndef LEANOPS_ZO_CHUNK_CUH
#define LEANOPS_ZO_CHUNK_CUH

#include "../common/number.cuh"
#include "call.cuh"
#include "noise.cuh"

namespace leanops {
namespace zo {

// acc <- acc (+) c z: fused in float; in double the product is rounded separately, as the reference does.
LEANOPS_DEVICE float accumulate(float acc, float c, float z) { return fma(c, z, acc); }
LEANOPS_DEVICE double accumulate(double acc, double c, double z) { return add(acc, mul(c, z)); }
// z = 1 or -1 by bit 31 of `sign`: c z is exact.
LEANOPS_DEVICE float accumulate_sign(float acc, float c, u32 sign) {
  return add(acc, as_float((sign & 0x80000000u) ^ as_bits(c)));
}
LEANOPS_DEVICE double accumulate_sign(double acc, double c, u32 sign) {
  return add(acc, (int)sign < 0 ? -c : c);
}

// The lane's V sign bits of chunk j within the 128 bytes of a warp's 1,024 signs; element e at bit e.
template <int V>
LEANOPS_DEVICE u32 sign_bits(const u8* signs, int j, int lane) {
  return V == 8 ? (u32)signs[j * 32 + lane] : (u32)signs[j * 16 + lane / 2] >> (lane % 2 * 4);
}

// acc[j] <- acc[j] (+) c z for the lane's chunks, which lie 32 chunks apart from number `chunk` of the
// logical tensor on.
template <class T, int DIST, int C, class A>
LEANOPS_DEVICE void add_noise(A (*acc)[Element<T>::CHUNK], A c, const u8* signs, u64 seed, u64 chunk, u32 id,
                              int lane) {
  const int V = Element<T>::CHUNK;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (DIST == RADEMACHER) {
      const u32 bits = sign_bits<V>(signs, j, lane);
#pragma unroll
      for (int e = 0; e < V; ++e) acc[j][e] = accumulate_sign(acc[j][e], c, bits << (31 - e));
    } else {
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        float z[4];
        gaussian4(seed, (chunk + j * 32) * (V / 4) + e / 4, id, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][e + i] = accumulate(acc[j][e + i], c, (A)z[i]);
      }
    }
  }
}

// acc[j] <- z
template <class T, int DIST, int C, class A>
LEANOPS_DEVICE void set_noise(A (*acc)[Element<T>::CHUNK], const u8* signs, u64 seed, u64 chunk, u32 id,
                              int lane) {
  const int V = Element<T>::CHUNK;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (DIST == RADEMACHER) {
      const u32 bits = sign_bits<V>(signs, j, lane);
#pragma unroll
      for (int e = 0; e < V; ++e) acc[j][e] = (A)as_float((bits << (31 - e) & 0x80000000u) | 0x3f800000u);
    } else {
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        float z[4];
        gaussian4(seed, (chunk + j * 32) * (V / 4) + e / 4, id, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][e + i] = (A)z[i];
      }
    }
  }
}

template <int C, int V, class A>
LEANOPS_DEVICE void scale(A (*acc)[V], A keep) {
#pragma unroll
  for (int j = 0; j < C; ++j)
#pragma unroll
    for (int e = 0; e < V; ++e) acc[j][e] = mul(acc[j][e], keep);
}

// Rounds a chunk to T. One Philox block holds the 8 random halves of a chunk of a 16-bit type.
template <class T, bool STOCHASTIC, class A>
LEANOPS_DEVICE void round_chunk(const A* acc, u64 seed, u64 chunk, u32 id, vec16* words) {
  Words random = {{0, 0, 0, 0}};
  if (STOCHASTIC) random = philox(seed, chunk, id, STREAM_ROUNDING);
  pack<STOCHASTIC>(acc, random.x, words, (const T*)0);
}

template <class T, int C, bool STOCHASTIC, class A>
LEANOPS_DEVICE void round_in_place(A (*acc)[Element<T>::CHUNK], u64 seed, u64 chunk, u32 id) {
  if constexpr (sizeof(T) == 2) {  // wider types work in their own precision
#pragma unroll
    for (int j = 0; j < C; ++j) {
      vec16 words[1];
      round_chunk<T, STOCHASTIC>(acc[j], seed, chunk + j * 32, id, words);
      unpack(words, (const T*)0, acc[j]);
    }
  }
}

// The part of a tensor that a lane handles at once: chunks lie 32 chunks apart.
template <class T>
struct Lane {
  i64 first;  // index of the lane's first element; may lie before the tensor
  i64 numel;
  bool vector;  // every chunk lies within the tensor and on a 16-byte boundary

  template <int C, class A>
  LEANOPS_DEVICE void load(u64 tensor, A (*acc)[Element<T>::CHUNK]) const {
    const int V = Element<T>::CHUNK, N = sizeof(T) * V / 16;
    const T* at = global<const T>(tensor) + first;
    if (vector) {
      vec16 words[C][N];
#pragma unroll
      for (int j = 0; j < C; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) words[j][n] = ((const vec16*)at)[j * 32 * N + n];
#pragma unroll
      for (int j = 0; j < C; ++j) unpack(words[j], (const T*)0, acc[j]);
      return;
    }
    const Range range = valid();
#pragma unroll
    for (int j = 0; j < C; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e) acc[j][e] = range.holds(j * 32 * V + e) ? widen(at[j * 32 * V + e]) : A(0);
  }

  template <int C, bool STOCHASTIC, class A>
  LEANOPS_DEVICE void store(u64 tensor, const A (*acc)[Element<T>::CHUNK], u64 seed, u64 chunk,
                            u32 id) const {
    const int V = Element<T>::CHUNK, N = sizeof(T) * V / 16;
    T* at = global<T>(tensor) + first;
    vec16 words[C][N];
#pragma unroll
    for (int j = 0; j < C; ++j) round_chunk<T, STOCHASTIC>(acc[j], seed, chunk + j * 32, id, words[j]);
    if (vector) {
#pragma unroll
      for (int j = 0; j < C; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) leanops::store((vec16*)at + j * 32 * N + n, words[j][n]);
      return;
    }
    const Range range = valid();
#pragma unroll
    for (int j = 0; j < C; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (range.holds(j * 32 * V + e)) at[j * 32 * V + e] = element(words[j], e);
  }

  LEANOPS_DEVICE static T element(const vec16* words, int e) {
    const int per = 16 / sizeof(T);
    const vec16& v = words[e / per];
    if constexpr (sizeof(T) == 2) {
      return T{(u16)(v.w[e % per / 2] >> (e % 2 * 16))};
    } else if constexpr (sizeof(T) == 4) {
      return as_float(v.w[e % per]);
    } else {
      return as_double((u64)v.w[e % per * 2 + 1] << 32 | v.w[e % per * 2]);
    }
  }

 private:
  struct Range {  // positions from `first` on that are elements of the tensor
    int low;
    u32 count;
    LEANOPS_DEVICE bool holds(int position) const { return (u32)(position - low) < count; }
  };
  LEANOPS_DEVICE Range valid() const {
    const int low = (int)(first < 0 ? min(-first, (i64)4096) : 0);
    const int high = (int)min(max(numel - first, (i64)0), (i64)4096);
    return Range{low, (u32)max(high - low, 0)};
  }
};

}  // namespace zo
}  // namespace leanops

#endif
