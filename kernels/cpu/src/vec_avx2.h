// Eight lanes: AVX2, FMA and F16C. The contract of each function is in vec_avx512.h.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace STAFFETTA_ISA {

constexpr int kWidth = 8;
constexpr int kLinearRows = 3;  // x 4 vectors of outputs = 12 of 16 registers hold sums
constexpr int kAttentionRows = 6;
using Vec = __m256;
using IVec = __m256i;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec zero_below(Vec x, Vec gate, Vec limit) { return _mm256_andnot_ps(_mm256_cmp_ps(gate, limit, _CMP_LT_OQ), x); }
inline Vec absolute(Vec x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline Vec copy_sign(Vec a, Vec b) { return _mm256_blendv_ps(absolute(a), _mm256_or_ps(a, splat(-0.0f)), b); }
inline Vec power_of_two(Vec t) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_castps_si256(t), _mm256_set1_epi32(127)), 23));
}
inline float first(Vec x) { return _mm256_cvtss_f32(x); }
template <int kDistance>
inline Vec exchange(Vec x) {
  if constexpr (kDistance == 4) return _mm256_permute2f128_ps(x, x, 0x01);
  if constexpr (kDistance == 2) return _mm256_permute_ps(x, 0x4e);
  if constexpr (kDistance == 1) return _mm256_permute_ps(x, 0xb1);
}

inline IVec izero() { return _mm256_setzero_si256(); }
inline IVec isplat(int32_t x) { return _mm256_set1_epi32(x); }
inline IVec iload(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void istore(void* p, IVec x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline IVec isub(IVec a, IVec b) { return _mm256_sub_epi32(a, b); }
inline IVec imul(IVec a, IVec b) { return _mm256_mullo_epi32(a, b); }
inline IVec imax(IVec a, IVec b) { return _mm256_max_epi32(a, b); }
inline IVec to_bits(Vec x) { return _mm256_castps_si256(x); }
inline Vec to_float(IVec x) { return _mm256_cvtepi32_ps(x); }
inline IVec to_int(Vec x) { return _mm256_cvtps_epi32(x); }
inline void store_bytes(void* p, IVec x) {
  const IVec lowest = _mm256_shuffle_epi8(
      x, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1, -1, -1,
                          -1, -1, -1, -1, -1, -1, -1));
  const IVec together = _mm256_permutevar8x32_epi32(lowest, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm256_castsi256_si128(together));
}
// The byte product that would be one instruction saturates at 16 bits, so even and odd bytes are widened first.
inline IVec dot4(IVec sum, IVec a, IVec b) {
  const IVec byte = _mm256_set1_epi16(0xff);
  const IVec even =
      _mm256_madd_epi16(_mm256_and_si256(a, byte), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  const IVec odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}

inline Vec load_int8(const char* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline Vec low_nibble(IVec x) { return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(x, 28), 28)); }

inline IVec iadd(IVec a, IVec b) { return _mm256_add_epi32(a, b); }
inline IVec xor3(IVec a, IVec b, IVec c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
template <int kBits>
inline IVec shift_right(IVec x) {
  return _mm256_srli_epi32(x, kBits);
}
inline IVec bits_of(Vec x) { return _mm256_castps_si256(x); }
inline Vec from_bits(IVec x) { return _mm256_castsi256_ps(x); }
inline IVec multiply_even(IVec a, IVec b) { return _mm256_mul_epu32(a, b); }
inline IVec odd_to_even(IVec x) { return _mm256_srli_epi64(x, 32); }
inline IVec interleave_even(IVec even, IVec odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa); }
inline IVec first_pairs(IVec a, IVec b) { return _mm256_unpacklo_epi64(a, b); }
inline IVec second_pairs(IVec a, IVec b) { return _mm256_unpackhi_epi64(a, b); }
inline uint32_t lanes_not_below(Vec a, Vec b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)));
}

inline Vec low_half(IVec x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline Vec high_half(IVec x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(-65536))); }
inline Vec load_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16));
}
inline void store_bf16(uint16_t* p, Vec x) {
  const IVec bits = _mm256_castps_si256(x);
  const IVec odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const IVec even = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const IVec quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const IVec is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const IVec halves = _mm256_srli_epi32(_mm256_blendv_epi8(even, quiet, is_nan), 16);
  const IVec packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves, halves), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline Vec load_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline void store_f16(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  Vec a[8], b[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) a[i] = load(src + i * src_stride);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    store(dst + c * dst_stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x20));
    store(dst + (c + 4) * dst_stride, _mm256_permute2f128_ps(a[c], a[c + 4], 0x31));
  }
}

}  // namespace STAFFETTA_ISA
