// The loop over the steps of a piece of a panel, for one strip of rows: sums are carried on from memory and back.
#pragma once
#include "rules.h"
#include "weight_only.h"

namespace STAFFETTA_ISA {

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

// The same for weights in groups of inputs, each with a scale: a group's sum is a chain of its own from zero, and joins
// what memory holds by one fused multiply-add with the scale; groups ascend. A piece holds whole groups, but for the last.
// scales: [groups of the piece][32].
template <class Weights, int kRows>
__attribute__((noinline)) void advance_groups(const char* strip, const char* panel, const float* scales, Ahead ahead,
                                              int64_t steps, bool is_first, char* memory) {
  float* totals = reinterpret_cast<float*>(memory);
  for (int64_t left = steps; left > 0; left -= kGroupSteps<Weights>, scales += kPanel, is_first = false) {
    Vec sums[kRows][kPanelVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = zero();
    for (int64_t step = least(left, kGroupSteps<Weights>); step > 0; --step) {
      __builtin_prefetch(ahead.from, 0, 3);
      __builtin_prefetch(ahead.from + kStepBytes / 2, 0, 3);
      Weights::template step<kRows>(sums, strip, panel);
      strip += kRows * Weights::kStripBytes, panel += kStepBytes, ahead.from += ahead.pace;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) {
        float* total = totals + r * kPanel + v * kWidth;
        store(total, fma(sums[r][v], load(scales + v * kWidth), is_first ? zero() : load(total)));
      }
  }
}

}  // namespace STAFFETTA_ISA
