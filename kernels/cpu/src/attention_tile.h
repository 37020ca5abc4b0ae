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

// sums[r] += a[r a_step] right.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void add_products(Vec (&sums)[kRows][kVecs], const float* a, int64_t a_step,
                                                        const Vec (&right)[kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const Vec left = splat(a[r * a_step]);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = fma(left, right[v], sums[r][v]);
  }
}

// Turned keys, [head_dim / kInputs][64]: floats, or pairs of bfloat16, the earlier in the lower half. An element has
// kBytes. Rows of queries are [padded head_dim] floats, or pairs too where a machine multiplies them as they are: the
// instruction adds the product of the later halves, rounds, adds that of the earlier, rounds.
struct FloatKeys {
  static constexpr int kInputs = 1, kBytes = 4;
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* query,
                                                         int64_t query_step, int64_t d, const float* turned) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = load(turned + v * kWidth);
    add_products(sums, query + d, query_step, right);
  }
};
struct PairKeys {
  static constexpr int kInputs = 2, kBytes = 2;
#ifdef STAFFETTA_BF16_DOT
  static constexpr bool kQueryPairs = true;
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* query,
                                                         int64_t query_step, int64_t d, const float* turned) {
    IVec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = iload(turned + v * kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const IVec left = bits_of(splat(query[r * query_step + d / 2]));
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = dot2(sums[r][v], left, right[v]);
    }
  }
#else
  static constexpr bool kQueryPairs = false;
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* query,
                                                         int64_t query_step, int64_t d, const float* turned) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = high_half(iload(turned + v * kWidth));
    add_products(sums, query + d + 1, query_step, right);
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = low_half(iload(turned + v * kWidth));
    add_products(sums, query + d, query_step, right);
  }
#endif
};
template <class Type>
using KeysOf = std::conditional_t<std::is_same_v<Type, BF16>, PairKeys, FloatKeys>;

// Columns that go together, in vectors: as many sums as there are registers for.
constexpr int vecs_of(int rows) { return rows <= kAttentionRows / 2 ? 4 : 2; }

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

// Products of kRows queries, query_step apart, with turned keys, into scores [rows][64].
template <class Keys, int kRows>
__attribute__((noinline)) void score(const float* query, int64_t query_step, const float* keys, int64_t dim,
                                     float* scores) {
  constexpr int kVecs = vecs_of(kRows);
  for (int j = 0; j < kTile; j += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    const float* turned = keys + j;
    for (int64_t d = 0; d < dim; d += Keys::kInputs, turned += kTile) Keys::step(sums, query, query_step, d, turned);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(scores + r * kTile + j + v * kWidth, sums[r][v]);
  }
}

// Running softmax of a row: its maximum and sum; its weighted values are kept beside.
struct RunningRow {
  float &maximum, &sum;
  float* values;  // [padded_dim]
};

// What makes a score of a product.
struct ScoreRule {
  float scale, soft_cap;  // 0: none
};

// Scores of a row's products with the tile's keys, -inf where they are not in [lo, hi). Returns the largest.
inline float mask(float* scores, int64_t lo, int64_t hi, const ScoreRule& rule) {
  Vec lanes[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v) lanes[v] = mul(load(scores + v * kWidth), splat(rule.scale));
  if (rule.soft_cap > 0) {
    const Vec cap = splat(rule.soft_cap);
    for (auto& lane : lanes) lane = mul(cap, tanh(div(lane, cap)));
  }
  for (int v = 0; v < kLaneVecs; ++v) store(scores + v * kWidth, lanes[v]);
  if (hi - lo < kTile) {
    for (int64_t j = 0; j < lo; ++j) scores[j] = kMinusInfinity;
    for (int64_t j = hi; j < kTile; ++j) scores[j] = kMinusInfinity;
    for (int v = 0; v < kLaneVecs; ++v) lanes[v] = load(scores + v * kWidth);
  }
  return fold_max(lanes);
}

// Turns a row's scores, `here` the largest, into weights and brings its running maximum, sum and values up to them.
inline void soften(float* weights, float here, const RunningRow& row, int64_t padded_dim) {
  const float before = row.maximum;
  // A NaN must reach the logits, where it is found.
  const float maximum = here > before || here != here ? here : before;
  Vec lanes[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v) {
    lanes[v] = exp(sub(load(weights + v * kWidth), splat(maximum)));
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
#pragma GCC unroll 16
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
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(values + r * dim + d + v * kWidth, sums[r][v]);
  }
  return d;
}
template <class Type, int kRows>
__attribute__((noinline)) void weigh(const float* weights, const TileRows& tile, const TileRows& next, int64_t lo,
                                     int64_t hi, float* values, int64_t dim) {
  int64_t d = 0;
  if constexpr (vecs_of(kRows) == 4) d = weigh_columns<Type, kRows, 4>(weights, tile, next, lo, hi, d, values, dim);
  d = weigh_columns<Type, kRows, 2>(weights, tile, next, lo, hi, d, values, dim);
  weigh_columns<Type, kRows, 1>(weights, tile, next, lo, hi, d, values, dim);
}

}  // namespace STAFFETTA_ISA
