// From the sums of a linear layer to its result, in this order: scales of int8 weights (the row's, if rows are quantized
// too, then the output's), bias, silu(gate) up, residual; then one rounding.
#pragma once
#include "strips.h"

namespace STAFFETTA_ISA {

// What turns a panel's sums into floats: nothing; or scales of outputs; or those of rows too, and the 128 by which rows
// were raised. Scales of int4 weights are in the sums.
template <class Weights>
struct PanelScales {
  PanelScales(const LinearCall&, int64_t) {}
  Vec apply(const LinearCall&, int64_t, int, Vec sum) const { return sum; }
};

template <>
struct PanelScales<Int8Weights> {
  IVec offsets[kPanelVecs];
  Vec scales[kPanelVecs];

  PanelScales(const LinearCall& call, int64_t output) {
    for (int v = 0; v < kPanelVecs; ++v) {
      offsets[v] = imul(isplat(128), iload(call.w.sums + output + v * kWidth));
      scales[v] = load(call.w.scales + output + v * kWidth);
    }
  }
  Vec apply(const LinearCall& call, int64_t row, int v, IVec sum) const {
    return mul(mul(to_float(isub(sum, offsets[v])), splat(call.row_scales[row])), scales[v]);
  }
};

template <>
struct PanelScales<Int8OnlyWeights> {
  Vec scales[kPanelVecs];

  PanelScales(const LinearCall& call, int64_t output) {
    for (int v = 0; v < kPanelVecs; ++v) scales[v] = load(call.w.scales + output + v * kWidth);
  }
  Vec apply(const LinearCall&, int64_t, int v, Vec sum) const { return mul(sum, scales[v]); }
};

#ifdef STAFFETTA_BF16_DOT
template <>
struct PanelScales<Int8OnlyPairs> : PanelScales<Int8OnlyWeights> {
  using PanelScales<Int8OnlyWeights>::PanelScales;
};
#endif

// Fetches the lines that a strip's results will be written to, while its sums are being made.
inline void fetch_results(const LinearCall& call, int64_t first_row, int64_t rows, int64_t panel) {
  const int64_t bytes = call.panel_columns() * element_bytes(call.out.dtype);
  for (int64_t row = first_row; row < first_row + rows; ++row)
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row_of(call.out, row) + panel * bytes + byte, 1);
}

// A strip's rows of one panel, from their sums in memory. Type is that of the residual and the result; kVecs vectors of
// results are all of a panel's or, where the layer is gated, half of them.
template <class Type, class Weights, int kVecs>
void finish(const LinearCall& call, int64_t first_row, int64_t rows, int64_t panel, const char* sums) {
  using Element = typename Type::Element;
  constexpr int64_t kColumns = kVecs * kWidth;
  const int64_t begin = panel * kColumns, columns = least(kColumns, call.out.columns - begin);
  const PanelScales<Weights> scales(call, panel * kPanel);
  const float* bias = call.w.bias ? call.w.bias + panel * kPanel : nullptr;
  Element* to = reinterpret_cast<Element*>(row_of(call.out, first_row)) + begin;
  const Element* added = nullptr;
  if (call.residual.data) added = reinterpret_cast<const Element*>(row_of(call.residual, first_row)) + begin;
  for (int64_t row = first_row; row < first_row + rows; ++row, sums += kPanel * 4, to += call.out.row_stride) {
    Vec values[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      values[v] = scales.apply(call, row, v, sum_load(sums + v * kWidth * 4, typename Weights::Sum{}));
      if (bias) values[v] = add(values[v], load(bias + v * kWidth));
    }
    if constexpr (kVecs < kPanelVecs)
      for (int v = 0; v < kVecs; ++v) values[v] = mul(silu(values[v]), values[v + kVecs]);
    Element part[kColumns];  // of a panel that reaches beyond the last output
    if (added) {
      if (columns < kColumns) std::memcpy(part, added, columns * sizeof *to);
      const Element* whole = columns < kColumns ? part : added;
      for (int v = 0; v < kVecs; ++v) values[v] = add(values[v], Type::load(whole + v * kWidth));
      added += call.residual.row_stride;
    }
    Element* whole = columns == kColumns ? to : part;
    for (int v = 0; v < kVecs; ++v) Type::store(whole + v * kWidth, values[v]);
    if (whole == part) std::memcpy(to, part, columns * sizeof *to);
  }
}

}  // namespace STAFFETTA_ISA
