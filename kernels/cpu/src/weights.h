// How each kind of weight is multiplied: a step of a panel against a step of a strip of rows. Each output's sum is one
// chain over k ascending; advance.h has the loop over steps.
#pragma once
#include "numeric.h"

namespace STAFFETTA_ISA {

constexpr int kPanel = 32;
constexpr int kPanelVecs = kPanel / kWidth;

// A strip is [steps][rows], a panel [steps][32]; what a step is, and how it is multiplied, depends on the weights.
constexpr int64_t kStepBytes = kPanel * 4;  // of a panel

// sums[r] += left[r] right: one input of every row against a panel's weights for it.
template <int kRows>
inline __attribute__((always_inline)) void multiply_add(Vec (&sums)[kRows][kPanelVecs], const float* left,
                                                        const Vec (&right)[kPanelVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec row = splat(left[r]);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = fma(row, right[v], sums[r][v]);
  }
}

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
    multiply_add<kRows>(sums, reinterpret_cast<const float*>(strip), right);
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
    multiply_add<kRows>(sums, left, early);
    multiply_add<kRows>(sums, left + kRows, late);
  }
};

inline __attribute__((always_inline)) IVec four_bytes(const char* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return isplat(four);
}

#ifdef STAFFETTA_BF16_DOT
// sums[r] += pair r of the strip times the pairs of right: two inputs.
template <int kRows>
inline __attribute__((always_inline)) void multiply_add_pairs(Vec (&sums)[kRows][kPanelVecs], const char* strip,
                                                              const IVec (&right)[kPanelVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const IVec left = four_bytes(strip + r * 4);
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = dot2(sums[r][v], left, right[v]);
  }
}

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
    multiply_add_pairs<kRows>(sums, strip, right);
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

}  // namespace STAFFETTA_ISA
