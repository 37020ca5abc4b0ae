// The rows of a linear layer, packed in strips for its inner loop; this is also where int8 rows are quantized.
//
// A strip is a few rows, step by step: [steps][rows] units of what one step takes of a row. Strips are cut along K into
// pieces, and the pieces of a block of rows lie in the order in which it is computed, [pieces][strips][steps][rows], so
// that every panel meets one stream of memory from end to end. Which rows share a strip changes no bit of any.
#pragma once
#include "advance.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

// n things in equal parts, the first of which may have one more.
struct Split {
  int64_t parts, size, extra;

  Split(int64_t n, int64_t into) : parts(into), size(n / into), extra(n % into) {}
  int64_t begin(int64_t part) const { return part * size + least(part, extra); }
  int64_t part_of(int64_t i) const {
    const int64_t larger = extra * (size + 1);
    return i < larger ? i / (size + 1) : extra + (i - larger) / size;
  }
  int64_t count(int64_t part) const { return size + (part < extra ? 1 : 0); }
};

// One call: what is the same for every panel and strip.
struct LinearCall {
  const PackedWeight& w;
  const Matrix &x, &residual, &out;
  int64_t steps;        // along K
  int64_t piece_steps;  // of a strip, computed without a pause
  int64_t chunk_steps;  // for which a block of rows stays in the second cache: whole pieces
  Split strips;         // of rows
  Split blocks;         // of strips
  char* values;         // the strips
  float* row_scales;    // [rows], int8 alone

  int64_t panel_columns() const { return w.gated ? kPanel / 2 : kPanel; }
  int64_t num_panels() const { return ceil_div(out.columns, panel_columns()); }
  bool is_carried() const { return chunk_steps < steps; }
};

// Floats of scratch from one packed row to the next: not a power of two, or the rows would share few cache sets.
template <class Weights>
int64_t scratch_row(const LinearCall& call) {
  return ceil_div(call.steps * Weights::kStripBytes / 4, kWidth) * kWidth + kWidth;
}

// Row m of x in the steps of a strip of one row; `to` has room for whole vectors.
template <class Weights>
inline void pack_row(const LinearCall& call, int64_t m, float* to) {
  widen(call.x.dtype, row_of(call.x, m), call.x.columns, to);
  for (int64_t k = call.x.columns; k < call.steps * Weights::kStepInputs; ++k) to[k] = 0;
}

#ifdef STAFFETTA_BF16_DOT
// Likewise for pairs, [padded_inputs / 2].
inline void pack_pairs(const LinearCall& call, int64_t m, int64_t padded_inputs, float* to) {
  const int64_t inputs = call.x.columns;
  const char* from = row_of(call.x, m);
  char* pairs = reinterpret_cast<char*>(to);
  for (int64_t step = 0; step < inputs / 2; ++step) {
    uint32_t pair;
    std::memcpy(&pair, from + step * 4, 4);
    pair = pair << 16 | pair >> 16;  // the earlier input belongs in the high half
    std::memcpy(pairs + step * 4, &pair, 4);
  }
  std::memset(pairs + inputs / 2 * 4, 0, padded_inputs * 2 - inputs / 2 * 4);
  if (inputs % 2) std::memcpy(pairs + inputs * 2, from + inputs * 2 - 2, 2);
}

template <>
inline void pack_row<Bfloat16Pairs>(const LinearCall& call, int64_t m, float* to) {
  pack_pairs(call, m, call.steps * Bfloat16Pairs::kStepInputs, to);
}
template <>
inline void pack_row<Int8OnlyPairs>(const LinearCall& call, int64_t m, float* to) {
  pack_pairs(call, m, call.steps * Int8OnlyPairs::kStepInputs, to);
}
template <>
inline void pack_row<Int4Pairs>(const LinearCall& call, int64_t m, float* to) {
  pack_pairs(call, m, call.steps * Int4Pairs::kStepInputs, to);
}
#endif

constexpr int64_t kRowsAheadBytes = 4096;  // how far ahead rows are fetched: one follows another as a rule

// Calls f(k, values) for each vector of a row from its beginning, the last one padded with zeros.
template <class Type, class F>
inline void each_vector(const void* row, int64_t columns, F f) {
  const auto* from = static_cast<const typename Type::Element*>(row);
  int64_t k = 0;
  for (; k + kWidth <= columns; k += kWidth) {
    __builtin_prefetch(reinterpret_cast<const char*>(from + k) + kRowsAheadBytes);
    f(k, Type::load(from + k));
  }
  if (k == columns) return;
  typename Type::Element tail[kWidth] = {};
  std::memcpy(tail, from + k, (columns - k) * sizeof tail[0]);
  f(k, Type::load(tail));
}

// max |x| of a row, or NaN where it has one or an infinity: it must reach the result. Magnitudes are compared as their
// bits, which rise with them; those of infinity and NaN lie above all.
template <class Type>
inline float largest_magnitude(const void* row, int64_t columns) {
  IVec largest = izero();
  each_vector<Type>(row, columns, [&](int64_t, Vec values) { largest = imax(largest, to_bits(absolute(values))); });
  float lanes[kWidth], result = 0;
  istore(lanes, largest);
  for (int i = 0; i < kWidth; ++i) {
    if (!(lanes[i] <= std::numeric_limits<float>::max())) return std::numeric_limits<float>::quiet_NaN();
    result = lanes[i] > result ? lanes[i] : result;
  }
  return result;
}

// Symmetric, per row: scale = max |x| / 127, q = round(x 127 / max |x|), stored as q + 128; a row of zeros has scale 0.
template <>
inline void pack_row<Int8Weights>(const LinearCall& call, int64_t m, float* to) {
  char* bytes = reinterpret_cast<char*>(to);
  with_type(call.x.dtype, [&](auto type) {
    using Type = decltype(type);
    const int64_t first = kScalePerBatch ? 0 : m, last = kScalePerBatch ? call.x.rows : m + 1;
    float largest = 0;
    for (int64_t row = first; row < last; ++row) {
      const float here = largest_magnitude<Type>(row_of(call.x, row), call.x.columns);
      largest = here <= largest ? largest : here;
    }
    call.row_scales[m] = largest / 127.0f;
    const Vec factor = splat(largest > 0 ? 127.0f / largest : 0.0f);
    each_vector<Type>(row_of(call.x, m), call.x.columns, [&](int64_t k, Vec values) {
      store_bytes(bytes + k, isub(to_int(mul(values, factor)), isplat(-128)));
    });
  });
}

// Rows of units, a stride apart, as [units][rows]. Reads kWidth rows, whatever is in those that do not count.
template <int kRows>
void interleave(const float* rows, int64_t stride, int64_t units, char* to) {
  if constexpr (kRows == 1) {
    std::memcpy(to, rows, units * 4);
    return;
  }
  float turned[kWidth * kWidth];
  for (int64_t unit = 0; unit < units; unit += kWidth) {
    transpose(rows + unit, stride, turned, kWidth);
    const int64_t count = least(kWidth, units - unit);
    for (int64_t u = 0; u < count; ++u, to += kRows * 4) std::memcpy(to, turned + u * kWidth, kRows * 4);
  }
}

// Where the part of a block of rows from step k begins.
template <class Weights>
inline char* block_values(const LinearCall& call, int64_t block, int64_t k) {
  const int64_t first = call.strips.begin(call.blocks.begin(block));
  const int64_t rows = call.strips.begin(call.blocks.begin(block + 1)) - first;
  return call.values + (first * call.steps + rows * k) * Weights::kStripBytes;
}

// Packs one strip of a block: every row into `scratch` [kWidth rows], then piece by piece.
template <class Weights>
void pack_strip(const LinearCall& call, int64_t block, int64_t strip, float* scratch) {
  constexpr int64_t kUnits = Weights::kStripBytes / 4;
  const int64_t stride = scratch_row<Weights>(call), begin = call.strips.begin(strip), rows = call.strips.count(strip);
  const int64_t rows_before = begin - call.strips.begin(call.blocks.begin(block));
  for (int64_t row = 0; row < rows; ++row) pack_row<Weights>(call, begin + row, scratch + row * stride);
  with_rows<kLinearRows>(rows, [&](auto count) {
    for (int64_t k = 0; k < call.steps; k += call.piece_steps) {
      const int64_t steps = least(call.piece_steps, call.steps - k);
      char* to = block_values<Weights>(call, block, k) + rows_before * steps * Weights::kStripBytes;
      interleave<decltype(count)::value>(scratch + k * kUnits, stride, steps * kUnits, to);
    }
  });
}

}  // namespace STAFFETTA_ISA
