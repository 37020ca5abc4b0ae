// How each kind of weight is multiplied: a step of a panel against a step of a strip of rows, and the loop over steps.
// Each output's sum is one chain over k ascending; linear.h says what surrounds it.
#pragma once
#include "numeric.h"
#include "rules.h"

namespace STAFFETTA_ISA {

constexpr int kPanel = 32;
constexpr int kPanelVecs = kPanel / kWidth;

// A strip is [steps][rows], a panel [steps][32]; what a step is, and how it is multiplied, depends on the weights.
constexpr int64_t kStepBytes = kPanel * 4;  // of a panel

// A step is one input, float against float.
struct Float32Weights {
  using Sum = Vec;
  static constexpr int kStepInputs = 1;
  static constexpr int64_t kStripBytes = 4;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    Vec right[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) right[v] = load(reinterpret_cast<const float*>(panel) + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec left = splat(reinterpret_cast<const float*>(strip)[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
    }
  }
};

// A step is two inputs: of an output's pair of weights, the high half is the earlier. Rows are pairs of floats.
struct Bfloat16Weights {
  using Sum = Vec;
  static constexpr int kStepInputs = 2;
  static constexpr int64_t kStripBytes = 8;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    Vec early[kPanelVecs], late[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) {
      const IVec pair = iload(panel + v * kWidth * 4);
      early[v] = high_half(pair);
      late[v] = low_half(pair);
    }
    const float* left = reinterpret_cast<const float*>(strip);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec first = splat(left[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = fma(first, early[v], sums[r][v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const Vec second = splat(left[kRows + r]);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = fma(second, late[v], sums[r][v]);
    }
  }
};

inline __attribute__((always_inline)) IVec four_bytes(const char* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return isplat(four);
}

#ifdef STAFFETTA_BF16_DOT
// The same pairs on both sides. The instruction adds the product of the high halves, rounds, adds that of the low ones,
// rounds: the chain over k ascending, but for results and operands below the smallest normal, which it takes as 0.
struct Bfloat16Pairs {
  using Sum = Vec;
  static constexpr int kStepInputs = 2;
  static constexpr int64_t kStripBytes = 4;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    IVec right[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) right[v] = iload(panel + v * kWidth * 4);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const IVec left = four_bytes(strip + r * 4);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = dot2(sums[r][v], left, right[v]);
    }
  }
};
#endif

// A step is four inputs: x + 128 as unsigned bytes against weights as signed ones.
struct Int8Weights {
  using Sum = IVec;
  static constexpr int kStepInputs = 4;
  static constexpr int64_t kStripBytes = 4;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    IVec right[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) right[v] = iload(panel + v * kWidth * 4);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const IVec left = four_bytes(strip + r * 4);
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = dot4(sums[r][v], left, right[v]);
    }
  }
};

inline Vec sum_zero(Vec) { return zero(); }
inline IVec sum_zero(IVec) { return izero(); }
inline Vec sum_load(const char* p, Vec) { return load(reinterpret_cast<const float*>(p)); }
inline IVec sum_load(const char* p, IVec) { return iload(p); }
inline void sum_store(char* p, Vec x) { store(reinterpret_cast<float*>(p), x); }
inline void sum_store(char* p, IVec x) { istore(p, x); }
inline Vec sum_add(Vec a, Vec b) { return add(a, b); }
inline IVec sum_add(IVec a, IVec) { return a; }

// What to fetch while a strip is computed: at each step the two lines from `from`, which then moves by `pace` bytes.
struct Ahead {
  const char* from;
  int64_t pace;
};

// Carries the sums [kRows][32] in memory on over `steps` steps; the first piece starts them at zero.
template <class Weights, int kRows>
__attribute__((noinline)) void advance(const char* strip, const char* panel, Ahead ahead, int64_t steps, bool is_first,
                                       char* memory) {
  using Sum = typename Weights::Sum;
  Sum sums[kRows][kPanelVecs];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v)
      sums[r][v] = is_first || kSplitKByRows ? sum_zero(Sum{}) : sum_load(memory + (r * kPanel + v * kWidth) * 4, Sum{});
  for (; steps > 0; --steps, strip += kRows * Weights::kStripBytes, panel += kStepBytes, ahead.from += ahead.pace) {
    __builtin_prefetch(ahead.from, 0, 3);
    __builtin_prefetch(ahead.from + kStepBytes / 2, 0, 3);
    Weights::template step<kRows>(sums, strip, panel);
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) {
      char* to = memory + (r * kPanel + v * kWidth) * 4;
      sum_store(to, kSplitKByRows && !is_first ? sum_add(sums[r][v], sum_load(to, Sum{})) : sums[r][v]);
    }
}

}  // namespace STAFFETTA_ISA
