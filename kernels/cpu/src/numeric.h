// What the kernels are written in: rows of any type as float, trees of 64 lanes, exp and its kin.
//
// Every function here is a fixed sequence of IEEE operations per lane, and every tree folds 64 lanes whatever the
// width of the vectors, so all instruction sets compute the same bits. None calls the C library.
#pragma once
#include <cstring>
#include <limits>

#include "abi.h"
#include "rules.h"

namespace STAFFETTA_ISA {

constexpr int kLanes = 64;
constexpr int kLaneVecs = kLanes / kWidth;

constexpr float kMinusInfinity = -__builtin_inff();

struct F32 {
  using Element = float;
  static Vec load(const float* p) { return STAFFETTA_ISA::load(p); }
  static void store(float* p, Vec x) { STAFFETTA_ISA::store(p, x); }
};
struct BF16 {
  using Element = uint16_t;
  static Vec load(const uint16_t* p) { return load_bf16(p); }
  static void store(uint16_t* p, Vec x) { store_bf16(p, x); }
};
struct F16 {
  using Element = uint16_t;
  static Vec load(const uint16_t* p) { return load_f16(p); }
  static void store(uint16_t* p, Vec x) { store_f16(p, x); }
};

// Calls f with the type that `dtype` stands for.
template <class F>
inline void with_type(int32_t dtype, F f) {
  switch (dtype) {
    case kBfloat16: return f(BF16{});
    case kFloat16: return f(F16{});
    default: return f(F32{});
  }
}

inline int64_t element_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }
inline char* row_of(const Matrix& m, int64_t row) {
  return static_cast<char*>(m.data) + row * m.row_stride * element_bytes(m.dtype);
}
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Widens n elements. A tail goes through the same vector code.
template <class Type>
inline void widen(const void* source, int64_t n, float* out) {
  const auto* from = static_cast<const typename Type::Element*>(source);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(out + i, Type::load(from + i));
  if (i == n) return;
  typename Type::Element tail[kWidth] = {};
  float wide[kWidth];
  std::memcpy(tail, from + i, (n - i) * sizeof tail[0]);
  store(wide, Type::load(tail));
  std::memcpy(out + i, wide, (n - i) * sizeof(float));
}
inline void widen(int32_t dtype, const void* source, int64_t n, float* out) {
  with_type(dtype, [&](auto type) { widen<decltype(type)>(source, n, out); });
}

// Rounds n elements, to nearest with ties to even.
template <class Type>
inline void narrow(const float* source, int64_t n, void* out) {
  auto* to = static_cast<typename Type::Element*>(out);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) Type::store(to + i, load(source + i));
  if (i == n) return;
  float wide[kWidth] = {};
  typename Type::Element tail[kWidth];
  std::memcpy(wide, source + i, (n - i) * sizeof(float));
  Type::store(tail, load(wide));
  std::memcpy(to + i, tail, (n - i) * sizeof tail[0]);
}
inline void narrow(int32_t dtype, const float* source, int64_t n, void* out) {
  with_type(dtype, [&](auto type) { narrow<decltype(type)>(source, n, out); });
}

// Folds 64 lanes: upper half onto lower half, six times.
template <int kDistance, class Op>
inline float fold_within(Vec x, Op op) {
  const Vec folded = op(x, exchange<kDistance>(x));
  if constexpr (kDistance > 1) return fold_within<kDistance / 2>(folded, op);
  return first(folded);
}
template <class Op>
inline float fold(const Vec (&lanes)[kLaneVecs], Op op) {
  Vec folded[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v) folded[v] = lanes[v];
  for (int half = kLaneVecs / 2; half >= 1; half /= 2)
    for (int v = 0; v < half; ++v) folded[v] = op(folded[v], folded[v + half]);
  return fold_within<kWidth / 2>(folded[0], op);
}
inline float fold_sum(const Vec (&lanes)[kLaneVecs]) {
  return fold(lanes, [](Vec a, Vec b) { return add(a, b); });
}
inline float fold_max(const Vec (&lanes)[kLaneVecs]) {
  return fold(lanes, [](Vec a, Vec b) { return max(a, b); });
}

// Sum of terms of x: lane i mod 64 adds its terms in rising order, then the lanes are folded. accumulate(sum, x) adds
// the terms of a vector; x is padded with zeros, whose terms must be 0.
template <class Accumulate>
inline float sum_lanes(const float* x, int64_t n, Accumulate accumulate, int threads) {
  if (kTreeByThreads && threads > 1) {
    const int64_t half = n / threads;
    return sum_lanes(x, half, accumulate, 1) + sum_lanes(x + half, n - half, accumulate, threads - 1);
  }
  Vec lanes[kLaneVecs];
  for (auto& lane : lanes) lane = zero();
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int v = 0; v < kLaneVecs; ++v) lanes[v] = accumulate(lanes[v], load(x + i + v * kWidth));
  if (i < n) {
    float tail[kLanes] = {};
    std::memcpy(tail, x + i, (n - i) * sizeof(float));
    for (int v = 0; v < kLaneVecs; ++v) lanes[v] = accumulate(lanes[v], load(tail + v * kWidth));
  }
  return fold_sum(lanes);
}

// e^x, at most 1 ulp off; 0 below the smallest normal result; x up to 88. NaN stays NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2; e^r by its Taylor polynomial of degree 7, whose remainder is below 6e-9.
inline Vec exp(Vec x) {
  const Vec lowest = splat(-87.0f), shift = splat(12582912.0f);  // 1.5 x 2^23: adding it rounds to an integer
  const Vec bounded = max(lowest, x);
  const Vec shifted = fma(bounded, splat(1.44269504f), shift);
  const Vec n = sub(shifted, shift);
  const Vec r = fma(n, splat(1.90465421e-9f), fma(n, splat(-0.693147182f), bounded));
  Vec y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  y = fma(y, r, splat(1.0f));
  y = fma(y, r, splat(1.0f));
  return zero_below(mul(y, power_of_two(shifted)), x, lowest);
}
inline float exp(float x) { return first(exp(splat(x))); }

// x / (1 + e^-x), e^-x taken as e^88 where it is more.
inline Vec silu(Vec x) {
  const Vec bounded = max(splat(-88.0f), x);
  return div(x, add(splat(1.0f), exp(sub(zero(), bounded))));
}

// 1 - 2 / (e^2|x| + 1) with the sign of x: absolute error below 2e-7.
inline Vec tanh(Vec x) {
  const Vec size = absolute(x);
  const Vec bounded = sub(zero(), max(splat(-20.0f), sub(zero(), size)));  // the smaller of |x| and 20
  const Vec e = exp(add(bounded, bounded));
  return copy_sign(sub(splat(1.0f), div(splat(2.0f), add(e, splat(1.0f)))), x);
}

// ln m for m in [1 / sqrt(2), sqrt(2)]: 2 (s + s^3 / 3 + s^5 / 5 ...) with s = (m - 1) / (m + 1), |s| < 0.172; the first
// dropped term is below 1e-17.
inline double log_near_1(double m) {
  const double s = (m - 1.0) / (m + 1.0), square = s * s;
  double series = 0.0;
  for (int term = 21; term >= 1; term -= 2) series = series * square + 1.0 / term;
  return 2.0 * s * series;
}

constexpr double kLn2 = 0.693147180559945309;

// Natural logarithm of a positive normal float, in double: x = m 2^n with m about 1.
inline float log(float x) {
  if (!(x < std::numeric_limits<float>::infinity())) return x;
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  int exponent = static_cast<int>(bits >> 23) - 127;
  bits = (bits & 0x7fffffu) | 0x3f800000u;
  float m;
  std::memcpy(&m, &bits, 4);
  if (m > 1.41421354f) {
    m *= 0.5f;
    ++exponent;
  }
  return static_cast<float>(exponent * kLn2 + log_near_1(m));
}

// Natural logarithm of a positive normal double, likewise.
inline double log(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, 8);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  bits = (bits & 0xfffffffffffffu) | 0x3ff0000000000000u;
  double m;
  std::memcpy(&m, &bits, 8);
  if (m > 1.4142135623730951) {
    m *= 0.5;
    ++exponent;
  }
  return exponent * kLn2 + log_near_1(m);
}

// sum[r] = sum over k ascending of a[k, r] b[k, :], each element one chain of fused multiply-adds, carried on from what
// sums hold. a[k, r] is a[k a_step + r kRowStep]; b's rows are b_step apart.
template <int kRows, int kVecs, int kRowStep>
inline __attribute__((always_inline)) void chain(Vec (&sums)[kRows][kVecs], const float* a, int64_t a_step,
                                                 const float* b, int64_t b_step, int64_t begin, int64_t end) {
  for (int64_t k = begin; k < end; ++k) {
    Vec right[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) right[v] = load(b + k * b_step + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec left = splat(a[k * a_step + r * kRowStep]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
    }
  }
}

// Calls f with the number of rows, 1 to kMax, as a constant.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
template <int kMax, class F>
inline void with_rows(int64_t rows, F&& f) {
  if constexpr (kMax > 1)
    if (rows < kMax) return with_rows<kMax - 1>(rows, f);
  f(Constant<kMax>{});
}

}  // namespace STAFFETTA_ISA
