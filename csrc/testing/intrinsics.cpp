// Compiled twice, as the kernels are: with the processor's AVX-512 and with its emulation.
#include "testing/intrinsics.h"

#include <cstring>

#include "common/simd.h"  // includes <immintrin.h>, the compiler's or the emulation's

namespace leanops {
namespace LEANOPS_ISA {
namespace {

using testing::Intrinsic;

// The operands as every type that an intrinsic takes.
struct In {
  explicit In(const testing::Operands& o) : memory(o.a), mask(o.mask) {
    std::memcpy(&a, o.a, 64);
    std::memcpy(&b, o.b, 64);
    std::memcpy(&c, o.c, 64);
    std::memcpy(&fa, o.a, 64);
    std::memcpy(&fb, o.b, 64);
    std::memcpy(&fc, o.c, 64);
    std::memcpy(&half, o.a, 32);
    std::memcpy(&quarter, o.a, 16);
    std::memcpy(&scalar, o.a, 8);
    std::memcpy(&number, o.a, 4);
  }
  const unsigned char* memory;
  __m512i a, b, c;
  __m512 fa, fb, fc;
  __m256i half;
  __m128i quarter;
  long long scalar;
  float number;
  uint32_t mask;
};

template <class T>
void put(unsigned char* result, const T& x) {
  std::memcpy(result, &x, sizeof x);
}

// The name of an entry is the text of its call.
#define RETURNS(...)                                                \
  {#__VA_ARGS__, [](const testing::Operands& o, unsigned char* r) { \
     const In x(o);                                                 \
     put(r, __VA_ARGS__);                                           \
   }}
#define STORES(...)                                                 \
  {#__VA_ARGS__, [](const testing::Operands& o, unsigned char* r) { \
     const In x(o);                                                 \
     __VA_ARGS__;                                                   \
   }}
#define MASK static_cast<__mmask16>(x.mask)
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
#define ORDER(n) static_cast<_MM_PERM_ENUM>(n)

const Intrinsic kAll[] = {
    RETURNS(_mm512_loadu_ps(x.memory)),
    RETURNS(_mm512_loadu_si512(x.memory)),
    RETURNS(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x.memory))),
    RETURNS(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x.memory))),
    STORES(_mm512_storeu_ps(r, x.fa)),
    STORES(_mm512_storeu_si512(r, x.a)),
    STORES(_mm256_storeu_si256(reinterpret_cast<__m256i*>(r), x.half)),
    STORES(_mm_storeu_si128(reinterpret_cast<__m128i*>(r), x.quarter)),

    RETURNS(_mm512_setzero_ps()),
    RETURNS(_mm512_set1_ps(x.number)),
    RETURNS(_mm512_set1_epi32(static_cast<int>(x.scalar))),
    RETURNS(_mm512_set1_epi64(x.scalar)),
    RETURNS(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)),
    RETURNS(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, x.scalar)),

    RETURNS(_mm512_add_ps(x.fa, x.fb)),
    RETURNS(_mm512_sub_ps(x.fa, x.fb)),
    RETURNS(_mm512_mul_ps(x.fa, x.fb)),
    RETURNS(_mm512_div_ps(x.fa, x.fb)),
    RETURNS(_mm512_fmadd_ps(x.fa, x.fb, x.fc)),
    RETURNS(_mm512_sqrt_ps(x.fa)),
    RETURNS(_mm512_min_ps(x.fa, x.fb)),

    RETURNS(_mm512_add_epi32(x.a, x.b)),
    RETURNS(_mm512_sub_epi32(x.a, x.b)),
    RETURNS(_mm512_and_si512(x.a, x.b)),
    RETURNS(_mm512_or_si512(x.a, x.b)),
    RETURNS(_mm512_xor_si512(x.a, x.b)),
    RETURNS(_mm512_max_epu32(x.a, x.b)),
    RETURNS(_mm512_reduce_max_epu32(x.a)),
    RETURNS(_mm512_add_epi64(x.a, x.b)),
    RETURNS(_mm512_mul_epu32(x.a, x.b)),
    RETURNS(_mm512_ternarylogic_epi32(x.a, x.b, x.c, 0xEA)),
    RETURNS(_mm512_ternarylogic_epi32(x.a, x.b, x.c, 0x78)),
    RETURNS(_mm512_ternarylogic_epi32(x.a, x.b, x.c, 0x96)),
    RETURNS(_mm512_ternarylogic_epi32(x.a, x.b, x.c, 0x2D)),
    RETURNS(_mm512_ternarylogic_epi64(x.a, x.b, x.c, 0x96)),

    RETURNS(_mm512_slli_epi32(x.a, 13)),
    RETURNS(_mm512_slli_epi32(x.a, 32)),
    RETURNS(_mm512_srli_epi32(x.a, 9)),
    RETURNS(_mm512_srli_epi32(x.a, 32)),
    RETURNS(_mm512_srai_epi32(x.a, 23)),
    RETURNS(_mm512_srai_epi32(x.a, 32)),
    RETURNS(_mm512_srli_epi64(x.a, 32)),
    RETURNS(_mm512_srli_epi64(x.a, 64)),
    RETURNS(_mm512_sllv_epi32(x.a, x.b)),

    RETURNS(_mm512_cmplt_epi32_mask(x.a, x.b)),
    RETURNS(_mm512_test_epi32_mask(x.a, x.b)),
    RETURNS(_mm512_cmp_ps_mask(x.fa, x.fb, _CMP_UNORD_Q)),
    RETURNS(_mm512_cmp_ps_mask(x.fa, x.fb, _CMP_NEQ_UQ)),
    RETURNS(_mm512_mask_mov_epi32(x.a, MASK, x.b)),
    RETURNS(_mm512_mask_mov_ps(x.fa, MASK, x.fb)),
    RETURNS(_mm512_maskz_mov_ps(MASK, x.fa)),
    RETURNS(_mm512_mask_add_epi32(x.a, MASK, x.b, x.c)),
    RETURNS(_mm512_mask_blend_epi16(x.mask, x.a, x.b)),

    RETURNS(_mm512_permutex2var_epi32(x.a, x.b, x.c)),
    RETURNS(_mm512_permutex2var_ps(x.fa, x.b, x.fc)),
    RETURNS(_mm512_mask_shuffle_epi32(x.a, MASK, x.b, ORDER(0xA0))),
    RETURNS(_mm512_mask_shuffle_epi32(x.a, MASK, x.b, ORDER(0xF5))),
    RETURNS(_mm512_mask_shuffle_epi32(x.a, MASK, x.b, ORDER(0x1B))),

    RETURNS(_mm512_castps_si512(x.fa)),
    RETURNS(_mm512_castsi512_ps(x.a)),
    RETURNS(_mm512_cvtepi32_ps(x.a)),
    RETURNS(_mm512_cvttps_epi32(x.fa)),
    RETURNS(_mm512_cvtps_epi32(x.fa)),
    RETURNS(_mm512_cvtepu16_epi32(x.half)),
    RETURNS(_mm512_cvtepi8_epi32(x.quarter)),
    RETURNS(_mm512_cvtepi32_epi16(x.a)),
    RETURNS(_mm512_cvtepi32_epi8(x.a)),
    RETURNS(_mm512_cvtph_ps(x.half)),
    RETURNS(_mm512_cvtps_ph(x.fa, NEAREST)),
};

}  // namespace
}  // namespace LEANOPS_ISA

namespace testing {
const Intrinsics LEANOPS_CAT(kIntrinsics_, LEANOPS_ISA) = {LEANOPS_ISA::kAll,
                                                           sizeof LEANOPS_ISA::kAll / sizeof(Intrinsic)};
}  // namespace testing
}  // namespace leanops
