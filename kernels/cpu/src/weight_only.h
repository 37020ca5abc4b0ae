// Weights that are integers, against rows that are not: they become floats in registers, so that memory is read for a
// byte a weight, or for half of one and its group's share of a scale. So few bits are exact as float32 and as bfloat16:
// a product has the bits that a float weight of the same value would give it, and scales come after the sums.
#pragma once
#include "weights.h"

namespace STAFFETTA_ISA {

// A step is four inputs [4][32] of signed bytes.
struct Int8OnlyWeights {
  using Sum = Vec;
  static constexpr int kStepInputs = 4;
  static constexpr int64_t kStripBytes = 16;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    const float* left = reinterpret_cast<const float*>(strip);
#pragma GCC unroll 4
    for (int input = 0; input < kStepInputs; ++input, left += kRows, panel += kPanel) {
      Vec right[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) right[v] = load_int8(panel + v * kWidth);
      multiply_add<kRows>(sums, left, right);
    }
  }
};

// A step is eight inputs, for each output a word of eight signed numbers of four bits: the pair of inputs 2 i and
// 2 i + 1 is number i of the high half and number i of the low half.
struct Int4Weights {
  using Sum = Vec;
  static constexpr int kStepInputs = 8;
  static constexpr int64_t kStripBytes = 32;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    const float* left = reinterpret_cast<const float*>(strip);
    IVec words[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) words[v] = iload(panel + v * kWidth * 4);
#pragma GCC unroll 4
    for (int pair = 0; pair < kStepInputs / 2; ++pair, left += 2 * kRows) {
      Vec early[kPanelVecs], late[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) {
        early[v] = low_nibble(shift_right<16>(words[v]));
        late[v] = low_nibble(words[v]);
        words[v] = shift_right<4>(words[v]);
      }
      multiply_add<kRows>(sums, left, early);
      multiply_add<kRows>(sums, left + kRows, late);
    }
  }
};

#ifdef STAFFETTA_BF16_DOT
// The same panels against rows of bfloat16 pairs; see Bfloat16Pairs.
struct Int8OnlyPairs {
  using Sum = Vec;
  static constexpr int kStepInputs = 4;
  static constexpr int64_t kStripBytes = 8;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
#pragma GCC unroll 2
    for (int pair = 0; pair < kStepInputs / 2; ++pair, strip += kRows * 4, panel += 2 * kPanel) {
      IVec right[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v)
        right[v] = join_halves(load_int8(panel + v * kWidth), load_int8(panel + kPanel + v * kWidth));
      multiply_add_pairs<kRows>(sums, strip, right);
    }
  }
};

struct Int4Pairs {
  using Sum = Vec;
  static constexpr int kStepInputs = 8;
  static constexpr int64_t kStripBytes = 16;
  template <int kRows>
  static inline __attribute__((always_inline)) void step(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                         const char* panel) {
    IVec words[kPanelVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVecs; ++v) words[v] = iload(panel + v * kWidth * 4);
#pragma GCC unroll 4
    for (int pair = 0; pair < kStepInputs / 2; ++pair, strip += kRows * 4) {
      IVec right[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) {
        right[v] = low_nibbles_bf16(words[v]);
        words[v] = shift_right<4>(words[v]);
      }
      multiply_add_pairs<kRows>(sums, strip, right);
    }
  }
};
#endif

// Steps whose weights share a scale; 0 where all of an output's do.
template <class Weights>
constexpr int64_t kGroupSteps = 0;
template <>
inline constexpr int64_t kGroupSteps<Int4Weights> = kGroupInputs / Int4Weights::kStepInputs;
#ifdef STAFFETTA_BF16_DOT
template <>
inline constexpr int64_t kGroupSteps<Int4Pairs> = kGroupInputs / Int4Pairs::kStepInputs;
#endif

}  // namespace STAFFETTA_ISA
