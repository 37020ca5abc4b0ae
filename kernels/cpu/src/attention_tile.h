// One tile of attention: 64 keys and values against a strip of query rows. Order and sources are in attention.h.
//
// Keys are turned, so that scores vectorise over keys; values are read as they lie. Where a block of rows is one or two
// strips, as in decode, both come straight from the pages and are widened in registers; else they are widened once, into
// scratch, for all strips. Either way the operands and their order are the same, and so are the bits. While keys are
// turned, the tile's values are fetched; while values are added up, the next tile's keys.
#pragma once
#include <cstddef>
#include <type_traits>

#include "numeric.h"

namespace STAFFETTA_ISA {

constexpr int kTile = kLanes;
constexpr int kStripe = 16;  // keys that lie evenly spaced
constexpr int kStripes = kTile / kStripe;
constexpr int kLine = 64;    // bytes that are fetched together
constexpr float kMinusInfinity = -__builtin_inff();

// Where the keys and values of a tile lie. The first `stripes` hold keys of the context.
struct TileRows {
  const char *keys[kStripes], *values[kStripes];
  int64_t token_bytes, stripes;
};

// Turned keys, [head_dim / kInputs][64]: floats, or pairs of bfloat16, the earlier in the lower half.
struct FloatKeys {
  static constexpr int kInputs = 1;
  template <int kInput>
  static Vec load(const float* p) { return STAFFETTA_ISA::load(p); }
};
struct PairKeys {
  static constexpr int kInputs = 2;
  template <int kInput>
  static Vec load(const float* p) { return kInput ? high_half(iload(p)) : low_half(iload(p)); }
};
template <class Type>
using KeysOf = std::conditional_t<std::is_same_v<Type, BF16>, PairKeys, FloatKeys>;

// Turns the keys of a tile. Meanwhile fetches its values. Rows have at least kStripe times 4 bytes, a multiple of 4.
inline void turn_keys(const TileRows& tile, int64_t row_bytes, float* keys) {
  constexpr int64_t kSquare = kWidth * sizeof(float);
  for (int64_t stripe = 0; stripe < tile.stripes; ++stripe)
    for (int64_t j = 0; j < kStripe; j += kWidth)
      for (int64_t begin = 0; begin < row_bytes; begin += kSquare) {
        const int64_t at = least(begin, row_bytes - kSquare);  // the last square may overlap the one before it
        const char* from = tile.keys[stripe] + j * tile.token_bytes + at;
        const char* fetched = tile.values[stripe] + j * tile.token_bytes + at;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) __builtin_prefetch(fetched + i * tile.token_bytes);
        transpose(reinterpret_cast<const float*>(from), tile.token_bytes / 4, keys + at / 4 * kTile + stripe * kStripe + j,
                  kTile);
      }
}

// sums[r] += a[r kRowStep] right.
template <int kRows, int kVecs, int kRowStep>
inline __attribute__((always_inline)) void add_products(Vec (&sums)[kRows][kVecs], const float* a,
                                                        const Vec (&right)[kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec left = splat(a[r * kRowStep]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
  }
}

// Scores of a strip of rows, query [head_dim][rows], against turned keys, into weights [rows][64].
template <class Keys, int kRows>
__attribute__((noinline)) void score(const float* query, const float* keys, int64_t dim, float* weights) {
  constexpr int kVecs = 4;
  for (int j = 0; j < kTile; j += kVecs * kWidth) {
    Vec sums[kRows][kVecs], right[kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    const float* a = query;
    for (const float* b = keys + j; b < keys + dim / Keys::kInputs * kTile; b += kTile) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) right[v] = Keys::template load<0>(b + v * kWidth);
      add_products<kRows, kVecs, 1>(sums, a, right);
      a += kRows;
      if constexpr (Keys::kInputs == 2) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) right[v] = Keys::template load<1>(b + v * kWidth);
        add_products<kRows, kVecs, 1>(sums, a, right);
        a += kRows;
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(weights + r * kTile + j + v * kWidth, sums[r][v]);
  }
}

// Running softmax of a row: its maximum and sum; its weighted values are kept beside.
struct RunningRow {
  float &maximum, &sum;
  float* values;  // [padded_dim]
};

// Turns a row's scores into weights and brings its running maximum, sum and values up to them.
// Keys [lo, hi) of the tile are visible; hi > lo.
inline void soften(float* weights, int64_t lo, int64_t hi, float soft_cap, const RunningRow& row, int64_t padded_dim) {
  Vec lanes[kLaneVecs];
  if (soft_cap > 0) {
    const Vec cap = splat(soft_cap);
    for (int v = 0; v < kLaneVecs; ++v)
      store(weights + v * kWidth, mul(cap, tanh(div(load(weights + v * kWidth), cap))));
  }
  for (int64_t j = 0; j < lo; ++j) weights[j] = kMinusInfinity;
  for (int64_t j = hi; j < kTile; ++j) weights[j] = kMinusInfinity;
  for (int v = 0; v < kLaneVecs; ++v) lanes[v] = load(weights + v * kWidth);
  const float before = row.maximum, here = fold_max(lanes);
  const float maximum = here > before || here != here ? here : before;  // a NaN must reach the logits, where it is found
  for (int v = 0; v < kLaneVecs; ++v) {
    lanes[v] = exp(sub(lanes[v], splat(maximum)));
    store(weights + v * kWidth, lanes[v]);
  }
  const float shrink = exp(before - maximum);
  row.maximum = maximum;
  row.sum = first(fma(splat(row.sum), splat(shrink), splat(fold_sum(lanes))));
  if (shrink != 1.0f)
    for (int64_t d = 0; d < padded_dim; d += kWidth) store(row.values + d, mul(load(row.values + d), splat(shrink)));
}

// Carries columns [d, end) of kRows rows' weighted values on over keys [lo, hi) of the tile, in steps of kVecs vectors.
// Returns where it stopped. Meanwhile fetches the same columns of the same rows of `next`.
template <class Type, int kRows, int kVecs>
int64_t weigh_columns(const float* weights, const TileRows& tile, const char* const* next, int64_t lo, int64_t hi,
                      int64_t d, float* values, int64_t dim) {
  constexpr int64_t kBytes = sizeof(typename Type::Element);
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    Vec sums[kRows][kVecs], right[kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = load(values + r * dim + d + v * kWidth);
    for (int64_t j = lo; j < hi;) {
      const int64_t stripe = j / kStripe, end = least(hi, (stripe + 1) * kStripe);
      const char* from = tile.values[stripe] + (j - stripe * kStripe) * tile.token_bytes + d * kBytes;
      const char* fetched = next[stripe] + (j - stripe * kStripe) * tile.token_bytes + d * kBytes;
      for (; j < end; ++j, from += tile.token_bytes, fetched += tile.token_bytes) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < kVecs * kWidth * kBytes; line += kLine) __builtin_prefetch(fetched + line);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v)
          right[v] = Type::load(reinterpret_cast<const typename Type::Element*>(from) + v * kWidth);
        add_products<kRows, kVecs, kTile>(sums, weights + j, right);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(values + r * dim + d + v * kWidth, sums[r][v]);
  }
  return d;
}
template <class Type, int kRows>
__attribute__((noinline)) void weigh(const float* weights, const TileRows& tile, const char* const* next, int64_t lo,
                                     int64_t hi, float* values, int64_t dim) {
  const int64_t wide = weigh_columns<Type, kRows, 4>(weights, tile, next, lo, hi, 0, values, dim);
  weigh_columns<Type, kRows, 1>(weights, tile, next, lo, hi, wide, values, dim);
}

}  // namespace STAFFETTA_ISA
