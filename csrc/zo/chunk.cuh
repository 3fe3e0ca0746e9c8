// What a lane does with its chunks: load, add c z, round, store.
//
// A lane has C chunks of V = CHUNK elements, acc [C, V]. The 32 chunks of a warp's lanes are consecutive in memory, so
// the next chunk of the same lane lies 32 chunks further on: a warp has [C, 32, V] consecutive elements. A chunk is N
// vec16, 2 of fp64 and 1 of the other types. `chunk` is the number of a lane's first chunk in the whole tensor.
#ifndef LEANOPS_ZO_CHUNK_CUH
#define LEANOPS_ZO_CHUNK_CUH

#include "../common/number.cuh"
#include "call.cuh"
#include "noise.cuh"

namespace leanops {
namespace zo {

// acc + c z: fused in float; in double the product is rounded first, as in the reference.
LEANOPS_DEVICE float accumulate(float acc, float c, float z) { return fma(c, z, acc); }
LEANOPS_DEVICE double accumulate(double acc, double c, double z) { return add(acc, mul(c, z)); }
// acc + c z for z = 1, or -1 where bit 31 of `sign` is set. The product c z is exact.
LEANOPS_DEVICE float accumulate_sign(float acc, float c, u32 sign) {
  return add(acc, as_float((sign & 0x80000000u) ^ as_bits(c)));
}
LEANOPS_DEVICE double accumulate_sign(double acc, double c, u32 sign) {
  return add(acc, (int)sign < 0 ? -c : c);
}

// The V sign bits of the lane's chunk j: element e is bit e. `signs` has the signs of the warp's elements in their
// order, one bit each.
template <int V>
LEANOPS_DEVICE u32 sign_bits(const u8* signs, int j, int lane) {
  return V == 8 ? (u32)signs[j * 32 + lane] : (u32)signs[j * 16 + lane / 2] >> (lane % 2 * 4);
}

// acc <- acc + c z.
template <class T, int DIST, int C, class A>
LEANOPS_DEVICE void add_noise(A (*acc)[Element<T>::CHUNK], A c, const u8* signs, u64 seed, u64 chunk, u32 id,
                              int lane) {
  const int V = Element<T>::CHUNK;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (DIST == RADEMACHER) {
      const u32 bits = sign_bits<V>(signs, j, lane);
#pragma unroll
      for (int e = 0; e < V; ++e) acc[j][e] = accumulate_sign(acc[j][e], c, bits << (31 - e));  // [C, V]
    } else {
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        float z[4];  // [4]
        gaussian4(seed, (chunk + j * 32) * (V / 4) + e / 4, id, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][e + i] = accumulate(acc[j][e + i], c, (A)z[i]);  // [C, V]
      }
    }
  }
}

// acc <- z.
template <class T, int DIST, int C, class A>
LEANOPS_DEVICE void set_noise(A (*acc)[Element<T>::CHUNK], const u8* signs, u64 seed, u64 chunk, u32 id,
                              int lane) {
  const int V = Element<T>::CHUNK;
#pragma unroll
  for (int j = 0; j < C; ++j) {
    if (DIST == RADEMACHER) {
      const u32 bits = sign_bits<V>(signs, j, lane);
#pragma unroll
      for (int e = 0; e < V; ++e)
        acc[j][e] = (A)as_float((bits << (31 - e) & 0x80000000u) | 0x3f800000u);  // [C, V]
    } else {
#pragma unroll
      for (int e = 0; e < V; e += 4) {
        float z[4];  // [4]
        gaussian4(seed, (chunk + j * 32) * (V / 4) + e / 4, id, z);
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[j][e + i] = (A)z[i];  // [C, V]
      }
    }
  }
}

// acc <- keep acc.
template <int C, int V, class A>
LEANOPS_DEVICE void scale(A (*acc)[V], A keep) {
#pragma unroll
  for (int j = 0; j < C; ++j)
#pragma unroll
    for (int e = 0; e < V; ++e) acc[j][e] = mul(acc[j][e], keep);  // [C, V]
}

// Rounds a chunk acc [V] to T, in `words` [1], or [2] for fp64. One Philox block has the 16 random bits of each of the
// 8 elements of a 16-bit type.
template <class T, bool STOCHASTIC, class A>
LEANOPS_DEVICE void round_chunk(const A* acc, u64 seed, u64 chunk, u32 id, vec16* words) {
  Words random = {{0, 0, 0, 0}};
  if (STOCHASTIC) random = philox(seed, chunk, id, STREAM_ROUNDING);
  pack<STOCHASTIC>(acc, random.x, words, (const T*)0);
}

// acc <- acc rounded to T. Wider types than 16 bits are not rounded, because the kernel computes in their precision.
template <class T, int C, bool STOCHASTIC, class A>
LEANOPS_DEVICE void round_in_place(A (*acc)[Element<T>::CHUNK], u64 seed, u64 chunk, u32 id) {
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int j = 0; j < C; ++j) {
      vec16 words[1];  // [1], 8 elements
      round_chunk<T, STOCHASTIC>(acc[j], seed, chunk + j * 32, id, words);
      unpack(words, (const T*)0, acc[j]);  // [C, V]
    }
  }
}

// The C chunks of a lane in a tensor's memory.
template <class T>
struct Lane {
  i64 first;  // index of the lane's first element in the tensor; negative where the unit starts before the tensor
  i64 numel;
  bool vector;  // all chunks lie within the tensor and start on 16 bytes, so 16-byte accesses are allowed

  template <int C, class A>
  LEANOPS_DEVICE void load(u64 tensor, A (*acc)[Element<T>::CHUNK]) const {
    const int V = Element<T>::CHUNK, N = sizeof(T) * V / 16;
    const T* source = global<const T>(tensor) + first;
    if (vector) {
      vec16 words[C][N];  // [C, N]
#pragma unroll
      for (int j = 0; j < C; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) words[j][n] = ((const vec16*)source)[j * 32 * N + n];  // [C, N]
#pragma unroll
      for (int j = 0; j < C; ++j) unpack(words[j], (const T*)0, acc[j]);  // [C, V]
      return;
    }
    const Range range = valid();
#pragma unroll
    for (int j = 0; j < C; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const int position = j * 32 * V + e;
        acc[j][e] = range.contains(position) ? widen(source[position]) : A(0);  // [C, V]
      }
  }

  template <int C, bool STOCHASTIC, class A>
  LEANOPS_DEVICE void store(u64 tensor, const A (*acc)[Element<T>::CHUNK], u64 seed, u64 chunk,
                            u32 id) const {
    const int V = Element<T>::CHUNK, N = sizeof(T) * V / 16;
    T* target = global<T>(tensor) + first;
    vec16 words[C][N];  // [C, N]
#pragma unroll
    for (int j = 0; j < C; ++j) round_chunk<T, STOCHASTIC>(acc[j], seed, chunk + j * 32, id, words[j]);
    if (vector) {
#pragma unroll
      for (int j = 0; j < C; ++j)
#pragma unroll
        for (int n = 0; n < N; ++n) leanops::store((vec16*)target + j * 32 * N + n, words[j][n]);  // [C, N]
      return;
    }
    const Range range = valid();
#pragma unroll
    for (int j = 0; j < C; ++j)
#pragma unroll
      for (int e = 0; e < V; ++e)
        if (range.contains(j * 32 * V + e)) target[j * 32 * V + e] = element(words[j], e);  // [C, V]
  }

  // Element e of a chunk's words.
  LEANOPS_DEVICE static T element(const vec16* words, int e) {
    const int elements = 16 / sizeof(T);  // of a vec16
    const vec16& v = words[e / elements];
    if constexpr (sizeof(T) == 2) {
      return T{(u16)(v.w[e % elements / 2] >> (e % 2 * 16))};
    } else if constexpr (sizeof(T) == 4) {
      return as_float(v.w[e % elements]);
    } else {
      return as_double((u64)v.w[e % elements * 2 + 1] << 32 | v.w[e % elements * 2]);
    }
  }

 private:
  // Positions low .. low + count - 1, counted from `first`. 32-bit numbers suffice: a unit has at most 4,096 elements.
  struct Range {
    int low;
    u32 count;
    LEANOPS_DEVICE bool contains(int position) const { return (u32)(position - low) < count; }
  };
  // The positions of the tensor's elements.
  LEANOPS_DEVICE Range valid() const {
    const int low = (int)(first < 0 ? min(-first, (i64)4096) : 0);
    const int high = (int)min(max(numel - first, (i64)0), (i64)4096);
    return Range{low, (u32)max(high - low, 0)};
  }
};

}  // namespace zo
}  // namespace leanops

#endif
