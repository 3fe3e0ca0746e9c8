// The LANE elements of a row that a thread has: their addresses, loads, stores and formats.
#ifndef LEANOPS_SM3_LANE_CUH
#define LEANOPS_SM3_LANE_CUH

#include "../common/number.cuh"
#include "../common/philox.cuh"
#include "call.cuh"

namespace leanops {
namespace sm3 {

// The type of a momentum's elements in memory, by its kind M.
template <int M>
struct Stored {
  typedef float Type;
};
template <>
struct Stored<BFLOAT16> {
  typedef bf16 Type;
};
template <>
struct Stored<INT8> {
  typedef u8 Type;
};

// LANE elements of type S, as words of their memory.
template <class S>
struct Raw {
  u32 w[LANE * sizeof(S) / 4];  // [LANE]
};

// Writes element e of words `w` that were zero. `get` reads it; its last parameter only selects the overload.
template <class S>
LEANOPS_DEVICE void put(u32* w, int e, S x) {
  if constexpr (sizeof(S) == 8) {
    w[2 * e] = (u32)as_bits(x);
    w[2 * e + 1] = (u32)(as_bits(x) >> 32);
  } else if constexpr (sizeof(S) == 4) {
    w[e] = as_bits(x);
  } else if constexpr (sizeof(S) == 2) {
    w[e / 2] |= (u32)x.bits << e % 2 * 16;
  } else {
    w[e / 4] |= (u32)x << e % 4 * 8;
  }
}
LEANOPS_DEVICE float get(const u32* w, int e, const float*) { return as_float(w[e]); }
LEANOPS_DEVICE double get(const u32* w, int e, const double*) {
  return as_double((u64)w[2 * e + 1] << 32 | w[2 * e]);
}
LEANOPS_DEVICE bf16 get(const u32* w, int e, const bf16*) { return bf16{(u16)(w[e / 2] >> e % 2 * 16)}; }
LEANOPS_DEVICE fp16 get(const u32* w, int e, const fp16*) { return fp16{(u16)(w[e / 2] >> e % 2 * 16)}; }
LEANOPS_DEVICE u8 get(const u32* w, int e, const u8*) { return (u8)(w[e / 4] >> e % 4 * 8); }

// Load and store V elements by the widest accesses that they fill.
template <class S, int V>
LEANOPS_DEVICE void load_chunk(const S* source, u32* w) {
  const int bytes = V * (int)sizeof(S);
  if constexpr (bytes >= 16) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i) {
      const vec16 x = ((const vec16*)source)[i];
#pragma unroll
      for (int k = 0; k < 4; ++k) w[4 * i + k] = x.w[k];  // [V]
    }
  } else if constexpr (bytes == 8) {
    const vec8 x = *(const vec8*)source;
    w[0] = x.w[0];  // [V]
    w[1] = x.w[1];
  } else {
    w[0] = *(const u32*)source;  // [V]
  }
}
template <class S, int V>
LEANOPS_DEVICE void store_chunk(S* target, const u32* w) {
  const int bytes = V * (int)sizeof(S);
  if constexpr (bytes >= 16) {
#pragma unroll
    for (int i = 0; i < bytes / 16; ++i)
      store((vec16*)target + i, vec16{{w[4 * i], w[4 * i + 1], w[4 * i + 2], w[4 * i + 3]}});  // [V]
  } else if constexpr (bytes == 8) {
    store((vec8*)target, vec8{{w[0], w[1]}});  // [V]
  } else {
    store((u32*)target, w[0]);  // [V]
  }
}

// The LANE elements of a thread are J chunks of V elements, [J, V]. A chunk is 16 bytes of the parameter, 32 of fp64.
// Neighbouring threads have neighbouring chunks: chunk 1 of a thread comes after chunk 0 of all threads of its warp
// along the same row.
template <class T>
struct Lane {
  static const int V = Element<T>::CHUNK, J = LANE / V;
  i64 start;    // index of the first element of chunk 0
  int stride;   // elements from the start of chunk 0 to that of chunk 1
  int left;     // elements from `start` to the end of the row or the tensor; none if it is not positive
  bool vector;  // whole chunks are aligned

  // WHOLE: all elements exist, and `vector` is true.
  template <bool WHOLE, class S>
  LEANOPS_DEVICE void load(u64 address, Raw<S>& x) const {
    const S* source = global<const S>(address) + start;
    const int words = V * (int)sizeof(S) / 4;  // of a chunk
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (WHOLE || (vector && left - j * stride >= V)) {
        load_chunk<S, V>(source + j * stride, x.w + j * words);  // [J, V]
      } else {
#pragma unroll
        for (int k = 0; k < words; ++k) x.w[j * words + k] = 0;  // [J, V]
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (j * stride + e < left) put(x.w, j * V + e, source[j * stride + e]);  // [J, V]
      }
    }
  }
  template <bool WHOLE, class S>
  LEANOPS_DEVICE void store(u64 address, const Raw<S>& x) const {
    S* target = global<S>(address) + start;
    const int words = V * (int)sizeof(S) / 4;  // of a chunk
#pragma unroll
    for (int j = 0; j < J; ++j) {
      if (WHOLE || (vector && left - j * stride >= V)) {
        store_chunk<S, V>(target + j * stride, x.w + j * words);  // [J, V]
      } else {
#pragma unroll
        for (int e = 0; e < V; ++e)
          if (j * stride + e < left) target[j * stride + e] = get(x.w, j * V + e, (const S*)0);  // [J, V]
      }
    }
  }
};

// Rounds the new parameters w [LANE] to T. `index`: logical index of the first one.
template <class T, bool STOCHASTIC>
LEANOPS_DEVICE void round_lane(const typename Element<T>::Work* w, u64 seed, u64 index, u32 id, Raw<T>& x) {
  const int V = Element<T>::CHUNK, N = V * (int)sizeof(T) / 16;
  Words random = {{0, 0, 0, 0}};  // [LANE], 16 bits each
  if (STOCHASTIC) random = rounding_halves(seed, index, id);
#pragma unroll
  for (int j = 0; j < LANE / V; ++j) {
    vec16 words[N];  // [V]
    pack<STOCHASTIC>(w + j * V, random.x, words, (const T*)0);
#pragma unroll
    for (int i = 0; i < 4 * N; ++i) x.w[j * 4 * N + i] = words[i / 4].w[i % 4];  // [J, V]
  }
}

// m [LANE] = code * scale, for codes in [-127, 127]. b = code ^ 0x80 is code + 128, and 0x4b000000 | b is the float
// 2^23 + b.
LEANOPS_DEVICE void from_codes(const Raw<u8>& codes, float scale, float* m) {
#pragma unroll
  for (int e = 0; e < LANE; ++e) {
    const u32 biased = select_bytes(codes.w[e / 4] ^ 0x80808080u, 0x4b000000u, 0x7650u + e % 4);
    m[e] = mul(add(as_float(biased), -8388736.0f), scale);  // [LANE]
  }
}
// codes [LANE] = rint(m inverse). Adding 1.5 2^23 rounds to an integer, ties to even, and leaves it in the low byte.
LEANOPS_DEVICE void to_codes(const float* m, float inverse, Raw<u8>& codes) {
#pragma unroll
  for (int i = 0; i < LANE / 4; ++i) {
    u32 x[4];  // [4]
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = as_bits(add(mul(m[4 * i + e], inverse), 12582912.0f));  // [4]
    codes.w[i] = select_bytes(select_bytes(x[0], x[1], 0x0040), select_bytes(x[2], x[3], 0x0040), 0x5410);
  }
}

}  // namespace sm3
}  // namespace leanops

#endif
