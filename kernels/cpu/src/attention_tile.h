// One tile of attention: 64 keys and values against a strip of query rows. Order and sources are in attention.h.
//
// Keys are turned, so that scores vectorise over keys; values are used as they lie. Meanwhile the tile's values are
// fetched, then the next tile's keys.
#pragma once
#include <cstddef>
#include <type_traits>

#include "attention_rows.h"

namespace STAFFETTA_ISA {

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

#ifdef STAFFETTA_BF16_DOT
// The same of pairs of bfloat16: both products, that of the later halves first.
template <int kRows, int kVecs>
inline __attribute__((always_inline)) void add_pairs(Vec (&sums)[kRows][kVecs], const float* a, int64_t a_step,
                                                     const IVec (&right)[kVecs]) {
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
    const IVec left = bits_of(splat(a[r * a_step]));
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) sums[r][v] = dot2(sums[r][v], left, right[v]);
  }
}
#endif

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
    add_pairs(sums, query + d / 2, query_step, right);
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

// Turns the keys of a tile, rows of at least kLine bytes, a multiple of 4. Meanwhile fetches half of its values where
// keys are pairs, for such a tile is multiplied too soon to wait with nothing on its way; all where it is floats.
template <class Keys>
void turn_keys(const TileRows& tile, int64_t row_bytes, float* keys, Fetcher& fetcher) {
  constexpr int64_t kSquare = kWidth * sizeof(float);
  for (int64_t stripe = 0; stripe < tile.stripes; ++stripe)
    for (int64_t j = 0; j < kStripe; j += kWidth)
      for (int64_t begin = 0; begin < row_bytes; begin += kSquare) {
        const int64_t at = least(begin, row_bytes - kSquare);  // the last square may overlap the one before it
        const char* from = tile.keys[stripe] + j * tile.key_bytes + at;
        float* to = keys + at / 4 * kTile + stripe * kStripe + j;
        fetcher.lines<kWidth / Keys::kInputs>();
        transpose(reinterpret_cast<const float*>(from), tile.key_bytes / 4, to, kTile);
      }
}

// Products of kRows queries, query_step apart, with turned keys, into scores [rows][64]. Meanwhile fetches the
// other half of the values.
template <class Keys, int kRows>
__attribute__((noinline)) void score(const float* query, int64_t query_step, const float* keys, int64_t dim,
                                     float* scores, Fetcher& fetcher) {
  constexpr int kVecs = vecs_of(kRows);
  for (int j = 0; j < kTile; j += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    const float* turned = keys + j;
    for (int64_t d = 0; d < dim; d += Keys::kInputs, turned += kTile) {
      fetcher.lines<most(1, kVecs * kWidth / 32)>();
      Keys::step(sums, query, query_step, d, turned);
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(scores + r * kTile + j + v * kWidth, sums[r][v]);
  }
}

// Makes scores of a row's products with the tile's keys, -inf where they are not in [lo, hi), which is not empty.
// Returns the largest.
inline float finish_scores(float* scores, int64_t lo, int64_t hi, float scale, float soft_cap) {
  Vec lanes[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v) lanes[v] = mul(load(scores + v * kWidth), splat(scale));
  if (soft_cap > 0) {
    const Vec cap = splat(soft_cap);
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

// Values that are weighted one key at a time, `early`.
template <class Type>
struct SingleValues {
  static constexpr int kKeys = 1;
  // Stores a row's weights from `lane` on; returns what they became.
  static Vec keep(float* weights, int lane, Vec x) {
    store(weights + lane, x);
    return x;
  }
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* weights, int64_t j,
                                                         const char* early, const char*) {
    Vec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v)
      right[v] = Type::load(reinterpret_cast<const typename Type::Element*>(early) + v * kWidth);
    add_products(sums, weights + j, kTile, right);
  }
};
// Values of bfloat16, weighted by two keys at a time, the later first. Weights are rounded to bfloat16, and lie in the
// first half of their row where pairs are multiplied as they are.
struct PairValues {
  static constexpr int kKeys = 2;
#ifdef STAFFETTA_BF16_DOT
  static Vec keep(float* weights, int lane, Vec x) {
    return store_rounded(reinterpret_cast<uint16_t*>(weights) + lane, x);
  }
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* weights, int64_t j,
                                                         const char* early, const char* late) {
    IVec right[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) right[v] = interleave(early + v * kWidth * 2, late + v * kWidth * 2);
    add_pairs(sums, weights + j / 2, kTile, right);
  }
#else
  static Vec keep(float* weights, int lane, Vec x) {
    uint16_t rounded[kWidth];
    store_bf16(rounded, x);
    x = load_bf16(rounded);
    store(weights + lane, x);
    return x;
  }
  template <int kRows, int kVecs>
  static inline __attribute__((always_inline)) void step(Vec (&sums)[kRows][kVecs], const float* weights, int64_t j,
                                                         const char* early, const char* late) {
    SingleValues<BF16>::step(sums, weights, j + 1, late, nullptr);
    SingleValues<BF16>::step(sums, weights, j, early, nullptr);
  }
#endif
};
template <class Type>
using ValuesOf = std::conditional_t<std::is_same_v<Type, BF16>, PairValues, SingleValues<Type>>;

// What a row's running sum becomes: shrunk, then joined by the fold of these lanes.
struct SumStep {
  float shrink;
  Vec added;
  float after(float sum) const {
    const float total = fold_within<kWidth / 2>(added, [](Vec a, Vec b) { return add(a, b); });
    return first(fma(splat(sum), splat(shrink), splat(total)));
  }
};

// Turns a row's scores, `here` the largest, into weights and brings its running maximum and its values, [padded_dim],
// up to them. The sum's step is left to the caller: it waits long, and rows need not wait for one another.
template <class Values>
inline SumStep soften(float* weights, float here, float& running, float* values, int64_t padded_dim) {
  const float before = running;
  // A NaN must reach the logits, where it is found.
  const float maximum = here > before || here != here ? here : before;
  Vec lanes[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v)
    lanes[v] = Values::keep(weights, v * kWidth, exp(sub(load(weights + v * kWidth), splat(maximum))));
  for (int half = kLaneVecs / 2; half >= 1; half /= 2)
    for (int v = 0; v < half; ++v) lanes[v] = add(lanes[v], lanes[v + half]);
  if (maximum == before) return {1, lanes[0]};
  running = maximum;
  const float shrink = exp(before - maximum);
  for (int64_t d = 0; d < padded_dim; d += kWidth) store(values + d, mul(load(values + d), splat(shrink)));
  return {shrink, lanes[0]};
}

// Carries kRows rows' weighted values, columns from d on, kVecs vectors at a time, on over keys [lo, hi) of the tile.
// Returns the first column left. Meanwhile fetches as much as is read.
template <class Type, int kRows, int kVecs>
int64_t weigh_columns(const float* weights, const TileRows& tile, Fetcher& fetcher, int64_t lo, int64_t hi, int64_t d,
                      float* values, int64_t dim) {
  using Values = ValuesOf<Type>;
  constexpr int64_t kBytes = sizeof(typename Type::Element);
  constexpr int kFetched = most(1, Values::kKeys * kVecs * kWidth * kBytes / kLine);
  static constexpr char kNothing[kVecs * kWidth * kBytes] = {};  // in the place of an unseen key of a pair
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = load(values + r * dim + d + v * kWidth);
    for (int64_t j = lo / Values::kKeys * Values::kKeys; j < hi;) {
      const int64_t stripe = j / kStripe, end = least(hi, (stripe + 1) * kStripe), skipped = j - stripe * kStripe;
      const char* from = tile.values[stripe] + skipped * tile.value_bytes + d * kBytes;
      for (; j < end; j += Values::kKeys, from += Values::kKeys * tile.value_bytes) {
        fetcher.lines<kFetched>();
        Values::step(sums, weights, j, j >= lo ? from : kNothing, j + 1 < hi ? from + tile.value_bytes : kNothing);
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
__attribute__((noinline)) void weigh(const float* weights, const TileRows& tile, Fetcher& fetcher, int64_t lo,
                                     int64_t hi, float* values, int64_t dim) {
  int64_t d = 0;
  if constexpr (vecs_of(kRows) == 4) d = weigh_columns<Type, kRows, 4>(weights, tile, fetcher, lo, hi, d, values, dim);
  d = weigh_columns<Type, kRows, 2>(weights, tile, fetcher, lo, hi, d, values, dim);
  weigh_columns<Type, kRows, 1>(weights, tile, fetcher, lo, hi, d, values, dim);
}

}  // namespace STAFFETTA_ISA
