// out[m, n] = epilogue(sum over k of x[m, k] w[n, k]).
//
// Order: each element is one chain of fused multiply-adds over k ascending in float32, whatever M, N, threads or cache
// blocks are: a block of K loads the sums that the block before it stored. With int8 the sums are exact integers.
// Epilogue, in this order: int8 scales (row, then output), bias, silu(gate) up, residual; then one rounding.
//
// Weights lie in panels of 32 outputs x K (see pack.cpp), read once per block of rows; rows are packed in strips of
// [K][rows], so that the inner loop reads both ends to end. FLOPs: 2 M N K. Bytes: N K per weight byte, which bound it
// while M is below the machine's FLOPs per byte; beyond, the sums in registers do: kLinearRows x 32.
// Blocking after Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 4.
#pragma once
#include <cstddef>

#include "weights.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int64_t kBlockStrips = 192 / kLinearRows;   // rows of a block: their part of K stays in the second cache
constexpr int64_t kGroupPanels = 16;                  // panels that one thread takes at once, at most
constexpr int64_t kSerialWork = int64_t{1} << 18;     // multiply-adds that are not worth waking a thread for

// One call: what is the same for every panel and strip.
struct LinearCall {
  const PackedWeight& w;
  const Matrix &x, &residual, &out;
  char* strips;        // strip after strip, [steps][rows] each
  float* row_scales;   // [rows], int8 alone
  int64_t steps, num_strips, num_panels;

  int64_t strip_begin(int64_t strip) const { return strip * x.rows / num_strips; }
  int64_t panel_columns() const { return w.gated ? kPanel / 2 : kPanel; }
};

// Floats of scratch that packing a row takes: for int8 the bytes, then the row.
inline int64_t scratch_row(int64_t inputs) { return 2 * ceil_div(inputs + 1, kWidth) * kWidth + kWidth; }

// max |x|, or NaN where there is one or an infinity: it must reach the result. n is a multiple of the width.
inline float largest_magnitude(const float* x, int64_t n) {
  Vec largest = zero(), spoilt = zero();
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec values = load(x + i);
    largest = max(absolute(values), largest);
    spoilt = fma(values, zero(), spoilt);  // NaN or infinity times 0 is NaN
  }
  float lanes[kWidth], sum[kWidth], result = 0;
  store(lanes, largest);
  store(sum, spoilt);
  for (int i = 0; i < kWidth; ++i) {
    if (sum[i] != sum[i]) return sum[i];
    result = lanes[i] > result ? lanes[i] : result;
  }
  return result;
}

// Row m of x, padded with zeros, in the steps of a strip of one row; `to` has room for whole vectors.
template <class Weights>
inline void pack_row(const LinearCall& call, int64_t m, float* to) {
  widen(call.x.dtype, row_of(call.x, m), call.x.columns, to);
  if (Weights::kStepInputs == 2) to[call.x.columns] = 0;
}

#ifdef STAFFETTA_BF16_DOT
template <>
inline void pack_row<Bfloat16Pairs>(const LinearCall& call, int64_t m, float* to) {
  const int64_t inputs = call.x.columns;
  const char* from = row_of(call.x, m);
  char* pairs = reinterpret_cast<char*>(to);
  for (int64_t step = 0; step < inputs / 2; ++step) {
    uint32_t pair;
    std::memcpy(&pair, from + step * 4, 4);
    pair = pair << 16 | pair >> 16;  // the earlier input belongs in the high half
    std::memcpy(pairs + step * 4, &pair, 4);
  }
  if (inputs % 2) {
    std::memset(pairs + inputs * 2 - 2, 0, 2);
    std::memcpy(pairs + inputs * 2, from + inputs * 2 - 2, 2);
  }
}
#endif

// Symmetric, per row: scale = max |x| / 127, q = round(x 127 / max |x|), stored as q + 128; a row of zeros has scale 0.
template <>
inline void pack_row<Int8Weights>(const LinearCall& call, int64_t m, float* to) {
  const int64_t inputs = call.x.columns, padded = ceil_div(inputs, kWidth) * kWidth;
  float* row = to + padded;  // the bytes go before the floats that they are made of
  const auto load_row = [&](int64_t index) {
    for (int64_t k = padded - kWidth; k < padded; ++k) row[k] = 0;
    widen(call.x.dtype, row_of(call.x, index), inputs, row);
    return largest_magnitude(row, padded);
  };
  float largest = 0;
  for (int64_t other = 0; kScalePerBatch && other < call.x.rows; ++other) {
    const float here = load_row(other);
    largest = here > largest ? here : largest;
  }
  const float own = load_row(m);
  largest = kScalePerBatch ? largest : own;
  call.row_scales[m] = largest / 127.0f;
  const Vec factor = splat(largest > 0 ? 127.0f / largest : 0.0f);
  for (int64_t k = 0; k < padded; k += kWidth)
    store_bytes(reinterpret_cast<char*>(to) + k, isub(to_int(mul(load(row + k), factor)), isplat(-128)));
}

// Packs a strip: every row into `scratch`, then step by step.
template <class Weights>
void pack_strip(const LinearCall& call, int64_t strip, float* scratch) {
  constexpr int64_t kUnits = Weights::kStripBytes / 4;
  const int64_t begin = call.strip_begin(strip), units = call.steps * kUnits, stride = scratch_row(call.x.columns);
  for (int64_t row = begin; row < call.strip_begin(strip + 1); ++row)
    pack_row<Weights>(call, row, scratch + (row - begin) * stride);
  with_rows<kLinearRows>(call.strip_begin(strip + 1) - begin, [&](auto count) {
    constexpr int kRows = decltype(count)::value;
    char* to = call.strips + begin * units * 4;
    for (int64_t unit = 0; unit < units; ++unit, to += kRows * 4)
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) std::memcpy(to + r * 4, scratch + r * stride + unit, 4);
  });
}

inline Vec scaled(const LinearCall&, int64_t, int64_t, Vec sum) { return sum; }
inline Vec scaled(const LinearCall& call, int64_t row, int64_t output, IVec sum) {
  const IVec offset = imul(isplat(128), iload(call.w.sums + output));
  return mul(mul(to_float(isub(sum, offset)), splat(call.row_scales[row])), load(call.w.scales + output));
}

// The epilogue of a strip's rows for one panel, from their sums in memory. Type is that of the residual and the result.
template <class Type, class Sum>
void finish(const LinearCall& call, int64_t first_row, int64_t rows, int64_t panel, const char* sums) {
  using Element = typename Type::Element;
  const int64_t begin = panel * call.panel_columns();
  const int64_t columns = least(call.panel_columns(), call.out.columns - begin);
  const int vecs = static_cast<int>(call.panel_columns() / kWidth);
  for (int64_t row = first_row; row < first_row + rows; ++row, sums += kPanel * 4) {
    Vec values[kPanelVecs];
    for (int v = 0; v < kPanelVecs; ++v) {
      const int64_t output = panel * kPanel + v * kWidth;
      values[v] = scaled(call, row, output, sum_load(sums + v * kWidth * 4, Sum{}));
      if (call.w.bias) values[v] = add(values[v], load(call.w.bias + output));
    }
    if (call.w.gated)
      for (int v = 0; v < kPanelVecs / 2; ++v) values[v] = mul(silu(values[v]), values[v + kPanelVecs / 2]);
    Element* to = reinterpret_cast<Element*>(row_of(call.out, row)) + begin;
    const Element* added = call.residual.data ? reinterpret_cast<Element*>(row_of(call.residual, row)) + begin : nullptr;
    Element result[kPanel] = {};
    if (added && columns < call.panel_columns()) added = static_cast<Element*>(std::memcpy(result, added, columns * sizeof *to));
    Element* whole = columns < call.panel_columns() ? result : to;
    for (int v = 0; v < vecs; ++v) {
      if (added) values[v] = add(values[v], Type::load(added + v * kWidth));
      Type::store(whole + v * kWidth, values[v]);
    }
    if (whole != to) std::memcpy(to, result, columns * sizeof *to);
  }
}

// All rows for panels [first, last). `memory` carries sums from block to block of K: [panels][rows of a block][32].
template <class Weights>
void compute_panels(const LinearCall& call, int64_t first, int64_t last, char* memory) {
  const int64_t block_steps = call.num_strips == 1 ? call.steps : kBlockSteps;
  for (int64_t block = 0; block < call.num_strips; block += kBlockStrips) {
    const int64_t block_end = least(block + kBlockStrips, call.num_strips);
    const int64_t block_begin_row = call.strip_begin(block), block_rows = call.strip_begin(block_end) - block_begin_row;
    for (int64_t k = 0; k < call.steps; k += block_steps) {
      const int64_t steps = least(block_steps, call.steps - k);
      for (int64_t panel = first; panel < last; ++panel) {
        const char* weights = static_cast<const char*>(call.w.panels) + (panel * call.steps + k) * kStepBytes;
        for (int64_t strip = block; strip < block_end; ++strip) {
          const int64_t row = call.strip_begin(strip), rows = call.strip_begin(strip + 1) - row;
          const char* values = call.strips + (row * call.steps + k * rows) * Weights::kStripBytes;
          // The last strip overlaps its work with the arrival of the next panel.
          const int64_t ahead = strip + 1 == block_end ? call.steps * kStepBytes : 0;
          char* sums = memory + ((panel - first) * block_rows + row - block_begin_row) * kPanel * 4;
          with_rows<kLinearRows>(rows, [&](auto count) {
            advance<Weights, decltype(count)::value>(values, weights, ahead, steps, k == 0, sums);
          });
          if (k + steps == call.steps)
            with_type(call.out.dtype, [&](auto type) {
              finish<decltype(type), typename Weights::Sum>(call, row, rows, panel, sums);
            });
        }
      }
    }
  }
}

template <class Weights>
void run_linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  LinearCall call{w, x, residual, out, nullptr, nullptr, 0, 0, 0};
  call.steps = ceil_div(w.inputs, Weights::kStepInputs);
  call.num_strips = ceil_div(x.rows, kLinearRows);
  call.num_panels = ceil_div(out.columns, call.panel_columns());
  const size_t strip_bytes = static_cast<size_t>(x.rows) * call.steps * Weights::kStripBytes;
  call.strips = static_cast<char*>(workspace(Scratch::kShared, strip_bytes + x.rows * sizeof(float)));
  call.row_scales = reinterpret_cast<float*>(call.strips + strip_bytes);
  // Every group reads all strips: few groups where strips are many, more where threads may come late.
  const int64_t groups_per_thread = call.num_strips > kBlockStrips ? 1 : 4;
  const int64_t group = most(1, least(kGroupPanels, call.num_panels / (threads * groups_per_thread)));
  const int64_t block_rows = least(x.rows, kBlockStrips * kLinearRows);
  const size_t carry_bytes = static_cast<size_t>(group * block_rows * kPanel) * 4;
  const size_t row_bytes = kLinearRows * scratch_row(w.inputs) * sizeof(float);
  const bool is_small = x.rows * w.inputs * out.columns < kSerialWork;
  const size_t scratch_bytes = row_bytes > carry_bytes ? row_bytes : carry_bytes;
  const bool is_short = call.num_strips <= 2;  // packed before threads wake: it is not worth a barrier
  for (int64_t strip = 0; is_short && strip < call.num_strips; ++strip)
    pack_strip<Weights>(call, strip, static_cast<float*>(workspace(Scratch::kPrivate, scratch_bytes)));
#pragma omp parallel num_threads(threads) if (threads > 1 && !is_small)
  {
    char* scratch = static_cast<char*>(workspace(Scratch::kPrivate, scratch_bytes));
    if (!is_short) {
#pragma omp for schedule(static)
      for (int64_t strip = 0; strip < call.num_strips; ++strip)
        pack_strip<Weights>(call, strip, reinterpret_cast<float*>(scratch));
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < call.num_panels; first += group)
      compute_panels<Weights>(call, first, least(first + group, call.num_panels), scratch);
  }
}

inline void linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  switch (w.kind) {
    case kWeightInt8: return run_linear<Int8Weights>(w, x, residual, out, threads);
#ifdef STAFFETTA_BF16_DOT
    case kWeightBfloat16:
      if (x.dtype == kBfloat16) return run_linear<Bfloat16Pairs>(w, x, residual, out, threads);
      return run_linear<Bfloat16Weights>(w, x, residual, out, threads);
#else
    case kWeightBfloat16: return run_linear<Bfloat16Weights>(w, x, residual, out, threads);
#endif
    default: return run_linear<Float32Weights>(w, x, residual, out, threads);
  }
}

}  // namespace STAFFETTA_ISA
