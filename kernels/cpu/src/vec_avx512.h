// Sixteen lanes: AVX-512 F, BW, VL, DQ and VNNI. What every vec_*.h defines, with the same bits for the same lanes.
#pragma once
#include <immintrin.h>

#include <cstdint>

namespace STAFFETTA_ISA {

constexpr int kWidth = 16;
constexpr int kLinearRows = 12;    // x 2 vectors of outputs = 24 of 32 registers hold sums
constexpr int kAttentionRows = 12;  // x 2 vectors, or half of them x 4
using Vec = __m512;
using IVec = __m512i;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// a where a > b, else b: a NaN in b stays, a NaN in a does not.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
// x, or 0 where gate < limit.
inline Vec zero_below(Vec x, Vec gate, Vec limit) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(gate, limit, _CMP_LT_OQ), _mm512_setzero_ps());
}
inline Vec absolute(Vec x) { return _mm512_abs_ps(x); }
// Magnitude of a, sign of b.
inline Vec copy_sign(Vec a, Vec b) {
  const IVec sign = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(b), _mm512_castps_si512(a), 0xca));
}
// 2^n of t = n + 1.5 x 2^23: the low bits of t hold n, the shift drops the rest.
inline Vec power_of_two(Vec t) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_castps_si512(t), _mm512_set1_epi32(127)), 23));
}
inline float first(Vec x) { return _mm512_cvtss_f32(x); }
// Lane i of the result is lane i ^ kDistance; a power of two.
template <int kDistance>
inline Vec exchange(Vec x) {
  if constexpr (kDistance == 8) return _mm512_shuffle_f32x4(x, x, 0x4e);
  if constexpr (kDistance == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  if constexpr (kDistance == 2) return _mm512_permute_ps(x, 0x4e);
  if constexpr (kDistance == 1) return _mm512_permute_ps(x, 0xb1);
}

inline IVec izero() { return _mm512_setzero_si512(); }
inline IVec isplat(int32_t x) { return _mm512_set1_epi32(x); }
inline IVec iload(const void* p) { return _mm512_loadu_si512(p); }
inline void istore(void* p, IVec x) { _mm512_storeu_si512(p, x); }
inline IVec isub(IVec a, IVec b) { return _mm512_sub_epi32(a, b); }
inline IVec imul(IVec a, IVec b) { return _mm512_mullo_epi32(a, b); }
inline IVec imax(IVec a, IVec b) { return _mm512_max_epi32(a, b); }
inline IVec to_bits(Vec x) { return _mm512_castps_si512(x); }
inline Vec to_float(IVec x) { return _mm512_cvtepi32_ps(x); }
inline IVec to_int(Vec x) { return _mm512_cvtps_epi32(x); }  // to nearest, ties to even
inline void store_bytes(void* p, IVec x) {  // the lowest byte of each lane
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
// sum + four products of unsigned bytes of a with signed bytes of b, exact.
inline IVec dot4(IVec sum, IVec a, IVec b) { return _mm512_dpbusd_epi32(sum, a, b); }

// Signed bytes.
inline Vec load_int8(const char* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// The lowest four bits of each lane as a signed number. The permutation looks at no others.
inline Vec low_nibble(IVec x) {
  const Vec numbers = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1);
  return _mm512_permutexvar_ps(x, numbers);
}

inline IVec iadd(IVec a, IVec b) { return _mm512_add_epi32(a, b); }
inline IVec xor3(IVec a, IVec b, IVec c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }
template <int kBits>
inline IVec shift_right(IVec x) {  // unsigned
  return _mm512_srli_epi32(x, kBits);
}
inline IVec bits_of(Vec x) { return _mm512_castps_si512(x); }
inline Vec from_bits(IVec x) { return _mm512_castsi512_ps(x); }
// Products of the even lanes of a and b, unsigned and 64 bits wide: low half in the even lane, high half in the odd one.
inline IVec multiply_even(IVec a, IVec b) { return _mm512_mul_epu32(a, b); }
inline IVec odd_to_even(IVec x) { return _mm512_srli_epi64(x, 32); }
// The even lanes of both: those of the second in the odd lanes.
inline IVec interleave_even(IVec even, IVec odd) {
  return _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}
// In every run of four lanes: the first two of a and of b, or the last two of both.
inline IVec first_pairs(IVec a, IVec b) { return _mm512_unpacklo_epi64(a, b); }
inline IVec second_pairs(IVec a, IVec b) { return _mm512_unpackhi_epi64(a, b); }
// A bit for each lane in which a is not below b.
inline uint32_t lanes_not_below(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }

#ifdef STAFFETTA_BF16_DOT
// Floats that are bfloat16 already, as pairs: early in the high halves, late in the low ones.
inline IVec join_halves(Vec early, Vec late) {
  return _mm512_or_si512(_mm512_castps_si512(early), _mm512_srli_epi32(_mm512_castps_si512(late), 16));
}
// The lowest four bits of each half of a lane as a signed bfloat16. The permutation looks at five: each stands twice.
inline IVec low_nibbles_bf16(IVec x) {
  const IVec numbers = _mm512_broadcast_i64x4(_mm256_setr_epi16(
      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,  // 0 to 7
      static_cast<int16_t>(0xc100), static_cast<int16_t>(0xc0e0), static_cast<int16_t>(0xc0c0),
      static_cast<int16_t>(0xc0a0), static_cast<int16_t>(0xc080), static_cast<int16_t>(0xc040),
      static_cast<int16_t>(0xc000), static_cast<int16_t>(0xbf80)));  // -8 to -1
  return _mm512_permutexvar_epi16(x, numbers);
}
// Sixteen bfloat16 of each, as pairs: the earlier in the low halves.
inline IVec interleave(const char* early, const char* late) {
  const IVec halves = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                        0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
  return _mm512_permutex2var_epi16(
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(early))), halves,
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(late))));
}
// Stores x as store_bf16 does and returns what it became; subnormals are 0.
inline Vec store_rounded(uint16_t* p, Vec x) {
  const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), rounded);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16));
}
// sum + high x high, rounded, + low x low, rounded; bfloat16 pairs, subnormals are 0.
inline Vec dot2(Vec sum, IVec a, IVec b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// Two bfloat16 of a 32-bit lane, widened.
inline Vec low_half(IVec x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline Vec high_half(IVec x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(-65536))); }
inline Vec load_bf16(const uint16_t* p) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
inline void store_bf16(uint16_t* p, Vec x) {  // to nearest, ties to even; NaN stays quiet NaN
  const IVec bits = _mm512_castps_si512(x);
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const IVec even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const IVec nearest = _mm512_mask_add_epi32(even, is_odd, bits, _mm512_set1_epi32(0x8000));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const IVec rounded = _mm512_mask_or_epi32(nearest, is_nan, bits, _mm512_set1_epi32(0x400000));
  const IVec odd_words = _mm512_setr_epi32(0x30001, 0x70005, 0xb0009, 0xf000d, 0x130011, 0x170015, 0x1b0019, 0x1f001d,
                                           0, 0, 0, 0, 0, 0, 0, 0);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words, rounded)));
}
inline Vec load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

// dst[j][i] = src[i][j] for a square of kWidth.
inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  Vec a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = load(src + i * src_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {  // pairs of rows
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // four rows: a[i + c] holds columns c, 4 + c, 8 + c, 12 + c
    a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i]), _mm512_castps_pd(b[i + 2])));
    a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
    a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(b[i + 1]), _mm512_castps_pd(b[i + 3])));
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // quarters of the registers change places
    const Vec low_even = _mm512_shuffle_f32x4(a[c], a[c + 4], 0x88), low_odd = _mm512_shuffle_f32x4(a[c], a[c + 4], 0xdd);
    const Vec high_even = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0x88);
    const Vec high_odd = _mm512_shuffle_f32x4(a[c + 8], a[c + 12], 0xdd);
    store(dst + c * dst_stride, _mm512_shuffle_f32x4(low_even, high_even, 0x88));
    store(dst + (c + 8) * dst_stride, _mm512_shuffle_f32x4(low_even, high_even, 0xdd));
    store(dst + (c + 4) * dst_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0x88));
    store(dst + (c + 12) * dst_stride, _mm512_shuffle_f32x4(low_odd, high_odd, 0xdd));
  }
}

}  // namespace STAFFETTA_ISA
