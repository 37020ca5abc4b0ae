// One tile of attention: 64 keys and values against a strip of query rows. Order and sources are in attention.h.
//
// Keys are turned, so that scores vectorise over keys; values are used as they lie and widened in registers. While keys
// are turned, the tile's values are fetched; while values are added up, the next tile's keys.
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

// Where the keys and values of a tile lie; rows of a stripe are key_bytes and value_bytes apart. The first `stripes`
// hold keys of the context.
struct TileRows {
  const char *keys[kStripes], *values[kStripes];
  int64_t key_bytes, value_bytes, stripes;
};

// Turned keys, [head_dim / kInputs][64]: floats, or pairs of bfloat16, the earlier in the lower half. An element has
// kBytes.
struct FloatKeys {
  static constexpr int kInputs = 1, kBytes = 4;
  template <int kInput>
  static Vec load(const float* p) { return STAFFETTA_ISA::load(p); }
};
struct PairKeys {
  static constexpr int kInputs = 2, kBytes = 2;
  template <int kInput>
  static Vec load(const float* p) { return kInput ? high_half(iload(p)) : low_half(iload(p)); }
};
template <class Type>
using KeysOf = std::conditional_t<std::is_same_v<Type, BF16>, PairKeys, FloatKeys>;

// Turns the keys of a tile, rows of at least kLine bytes, a multiple of 4. Meanwhile fetches its values.
inline void turn_keys(const TileRows& tile, int64_t row_bytes, float* keys) {
  constexpr int64_t kSquare = kWidth * sizeof(float);
  for (int64_t stripe = 0; stripe < tile.stripes; ++stripe)
    for (int64_t j = 0; j < kStripe; j += kWidth)
      for (int64_t begin = 0; begin < row_bytes; begin += kSquare) {
        const int64_t at = least(begin, row_bytes - kSquare);  // the last square may overlap the one before it
        const char* from = tile.keys[stripe] + j * tile.key_bytes + at;
        const char* fetched = tile.values[stripe] + j * tile.value_bytes + at;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) __builtin_prefetch(fetched + i * tile.value_bytes);
        float* to = keys + at / 4 * kTile + stripe * kStripe + j;
        transpose(reinterpret_cast<const float*>(from), tile.key_bytes / 4, to, kTile);
      }
}

// sums[r] += a[r a_step] right.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void add_products(Vec (&sums)[kRows][kVecs], const float* a, int64_t a_step,
                                                        const Vec (&right)[kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec left = splat(a[r * a_step]);
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
  }
}

// Scores of kRows rows, query_step apart, against turned keys, into weights [rows][64].
template <class Keys, int kRows>
__attribute__((noinline)) void score(const float* query, int64_t query_step, const float* keys, int64_t dim,
                                     float* weights) {
  constexpr int kVecs = 4;
  for (int j = 0; j < kTile; j += kVecs * kWidth) {
    Vec sums[kRows][kVecs], right[kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    const float* turned = keys + j;
    for (int64_t d = 0; d < dim; d += Keys::kInputs, turned += kTile) {
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) right[v] = Keys::template load<0>(turned + v * kWidth);
      add_products(sums, query + d, query_step, right);
      if constexpr (Keys::kInputs == 2) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) right[v] = Keys::template load<1>(turned + v * kWidth);
        add_products(sums, query + d + 1, query_step, right);
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
  // A NaN must reach the logits, where it is found.
  const float maximum = here > before || here != here ? here : before;
  for (int v = 0; v < kLaneVecs; ++v) {
    lanes[v] = exp(sub(lanes[v], splat(maximum)));
    store(weights + v * kWidth, lanes[v]);
  }
  float shrink = 1;
  if (maximum != before) {
    shrink = exp(before - maximum);
    row.maximum = maximum;
    for (int64_t d = 0; d < padded_dim; d += kWidth) store(row.values + d, mul(load(row.values + d), splat(shrink)));
  }
  row.sum = first(fma(splat(row.sum), splat(shrink), splat(fold_sum(lanes))));
}

// Carries kRows rows' weighted values, columns from d on, kVecs vectors at a time, on over keys [lo, hi) of the tile.
// Returns the first column left. Meanwhile fetches the same part of the keys of `next`.
template <class Type, int kRows, int kVecs>
int64_t weigh_columns(const float* weights, const TileRows& tile, const TileRows& next, int64_t lo, int64_t hi,
                      int64_t d, float* values, int64_t dim) {
  using Element = typename Type::Element;
  constexpr int64_t kBytes = sizeof(Element);
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    Vec sums[kRows][kVecs], right[kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = load(values + r * dim + d + v * kWidth);
    for (int64_t j = lo; j < hi;) {
      const int64_t stripe = j / kStripe, end = least(hi, (stripe + 1) * kStripe), skipped = j - stripe * kStripe;
      const char* from = tile.values[stripe] + skipped * tile.value_bytes + d * kBytes;
      const char* fetched = next.keys[stripe] + skipped * next.key_bytes + d * kBytes;
      for (; j < end; ++j, from += tile.value_bytes, fetched += next.key_bytes) {
#pragma GCC unroll 4
        for (int64_t line = 0; line < kVecs * kWidth * kBytes; line += kLine) __builtin_prefetch(fetched + line);
#pragma GCC unroll 8
        for (int v = 0; v < kVecs; ++v) right[v] = Type::load(reinterpret_cast<const Element*>(from) + v * kWidth);
        add_products(sums, weights + j, kTile, right);
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
__attribute__((noinline)) void weigh(const float* weights, const TileRows& tile, const TileRows& next, int64_t lo,
                                     int64_t hi, float* values, int64_t dim) {
  int64_t d = weigh_columns<Type, kRows, 4>(weights, tile, next, lo, hi, 0, values, dim);
  d = weigh_columns<Type, kRows, 2>(weights, tile, next, lo, hi, d, values, dim);
  weigh_columns<Type, kRows, 1>(weights, tile, next, lo, hi, d, values, dim);
}

}  // namespace STAFFETTA_ISA
