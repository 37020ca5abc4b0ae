// Operations on rows: norms, rotation with the write of keys and values, log-softmax. All are bound by bytes.
//
// Sums over a row are trees of 64 lanes; log-softmax sums over tiles of 4,096 entries, joined left to right. Threads
// share out rows or tiles and never part of a tree.
#pragma once
#include <cstddef>

#include "numeric.h"
#include "team.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int64_t kVocabularyTile = 4096;

inline float square_root(float x) { return __builtin_sqrtf(x); }

// Loads row r of x into `row`; with a residual, adds it, rounds to sum's type, stores that and goes on with it.
inline void load_sum(const Matrix& x, const Matrix& residual, const Matrix& sum, int64_t r, float* row, float* other) {
  const int64_t n = x.columns;
  widen(x.dtype, row_of(x, r), n, row);
  if (!residual.data) return;
  widen(residual.dtype, row_of(residual, r), n, other);
  for (int64_t i = 0; i < n; i += kWidth) store(row + i, add(load(row + i), load(other + i)));
  narrow(sum.dtype, row, n, row_of(sum, r));
  widen(sum.dtype, row_of(sum, r), n, row);
}

// Calls f(r, row, other) for every row, two float buffers of whole vectors each; the columns beyond x's are not zeroed.
template <class F>
void each_row(const Matrix& x, int threads, F f) {
  const int64_t padded = ceil_div(x.columns, kLanes) * kLanes;
  share_loop(threads_for(x.rows * x.columns, threads), x.rows, [&](int64_t r) {
    float* row = static_cast<float*>(workspace(Scratch::kPrivate, 2 * padded * sizeof(float)));
    f(r, row, row + padded);
  });
}

// out = round(s / sqrt(mean(s^2) + eps)) weight with s = x + residual, rounded; the first rounding is to x's type.
// Bytes: (2 or 4) rows columns b. Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
inline void rms_norm(const Matrix& x, const Matrix& residual, const Matrix& weight, float eps, const Matrix& sum,
                     const Matrix& out, int threads) {
  const int64_t n = x.columns;
  each_row(x, threads, [&](int64_t r, float* row, float* other) {
    load_sum(x, residual, sum, r, row, other);
    const float squares = sum_lanes(row, n, [](Vec total, Vec v) { return fma(v, v, total); }, threads);
    const Vec factor = splat(1.0f / square_root(squares / static_cast<float>(n) + eps));
    for (int64_t i = 0; i < n; i += kWidth) store(row + i, mul(load(row + i), factor));
    if (x.dtype != kFloat32) {
      narrow(x.dtype, row, n, row_of(out, r));
      widen(x.dtype, row_of(out, r), n, row);
    }
    widen(weight.dtype, weight.data, n, other);
    for (int64_t i = 0; i < n; i += kWidth) store(row + i, mul(load(row + i), load(other + i)));
    narrow(out.dtype, row, n, row_of(out, r));
  });
}

// out = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + eps) weight + bias with s = x + residual, rounded.
// Bytes: (2 or 4) rows columns b. Ba, Kiros, Hinton 2016, arXiv 1607.06450, equation 4.
inline void layer_norm(const Matrix& x, const Matrix& residual, const Matrix& weight, const Matrix& bias, float eps,
                       const Matrix& sum, const Matrix& out, int threads) {
  const int64_t n = x.columns;
  each_row(x, threads, [&](int64_t r, float* row, float* other) {
    load_sum(x, residual, sum, r, row, other);
    const float mean = sum_lanes(row, n, [](Vec total, Vec v) { return add(total, v); }, threads) / static_cast<float>(n);
    for (int64_t i = 0; i < n; i += kWidth) store(row + i, sub(load(row + i), splat(mean)));
    const float squares = sum_lanes(row, n, [](Vec total, Vec v) { return fma(v, v, total); }, threads);
    const Vec factor = splat(1.0f / square_root(squares / static_cast<float>(n) + eps));
    widen(weight.dtype, weight.data, n, other);
    for (int64_t i = 0; i < n; i += kWidth) store(row + i, mul(mul(load(row + i), factor), load(other + i)));
    if (bias.data) {
      widen(bias.dtype, bias.data, n, other);
      for (int64_t i = 0; i < n; i += kWidth) store(row + i, add(load(row + i), load(other + i)));
    }
    narrow(out.dtype, row, n, row_of(out, r));
  });
}

// Turns the pairs (a, b) = (x[i], x[i + D / 2]) of a head by their angles: (a cos - b sin, b cos + a sin), each as
// fma(a, cos, -(b sin)) and fma(b, cos, a sin).
template <class Type>
inline void rotate_head(const void* x, const float* cosines, const float* sines, int64_t dim, void* out) {
  using Element = typename Type::Element;
  const int64_t half = dim / 2;
  const auto* from = static_cast<const Element*>(x);
  auto* to = static_cast<Element*>(out);
  const auto turn = [](const Element* a, const Element* b, const float* cosines, const float* sines, Element* to_a,
                       Element* to_b) {
    const Vec left = Type::load(a), right = Type::load(b), cosine = load(cosines), sine = load(sines);
    Type::store(to_a, fma(left, cosine, sub(zero(), mul(right, sine))));
    Type::store(to_b, fma(right, cosine, mul(left, sine)));
  };
  int64_t i = 0;
  for (; i + kWidth <= half; i += kWidth)
    turn(from + i, from + half + i, cosines + i, sines + i, to + i, to + half + i);
  if (i == half) return;
  const int64_t left = half - i;
  Element pairs[2][kWidth] = {};
  float angles[2][kWidth] = {};
  std::memcpy(pairs[0], from + i, left * sizeof(Element));
  std::memcpy(pairs[1], from + half + i, left * sizeof(Element));
  std::memcpy(angles[0], cosines + i, left * sizeof(float));
  std::memcpy(angles[1], sines + i, left * sizeof(float));
  turn(pairs[0], pairs[1], angles[0], angles[1], pairs[0], pairs[1]);
  std::memcpy(to + i, pairs[0], left * sizeof(Element));
  std::memcpy(to + half + i, pairs[1], left * sizeof(Element));
}

// Rotary embedding of queries into `out`, of keys into their slots; values are copied into theirs. Slot = block x
// block_size + offset. Bytes: 2 rows (H + 2 KVH) D b. Su et al. 2021, arXiv 2104.09864, equation 34, half-split pairs.
inline void rotate_and_write(const RotateArguments& call, const Pages& pages, int threads) {
  const int64_t dim = pages.head_dim, bytes = element_bytes(pages.dtype), rows = call.query.rows;
  const int64_t heads = call.query.columns / dim, size = dim * bytes;
  share_loop(threads_for(rows * call.query.columns, threads), rows, [&](int64_t t) {
    const float* cosines = call.cosines + call.positions[t] * (dim / 2);
    const float* sines = call.sines + call.positions[t] * (dim / 2);
    const int64_t slot = call.slots[t], block = slot / pages.block_size, token = slot % pages.block_size;
    const int64_t first = block * pages.block_stride + token * pages.token_stride;
    with_type(pages.dtype, [&](auto type) {
      using Type = decltype(type);
      for (int64_t h = 0; h < heads; ++h)
        rotate_head<Type>(row_of(call.query, t) + h * size, cosines, sines, dim, row_of(call.out, t) + h * size);
      for (int64_t h = 0; h < pages.num_kv_heads; ++h) {
        char* key = static_cast<char*>(pages.data) + (first + h * pages.head_stride) * bytes;
        rotate_head<Type>(row_of(call.keys, t) + h * size, cosines, sines, dim, key);
        std::memcpy(key + pages.value_stride * bytes, row_of(call.values, t) + h * size, size);
      }
    });
  });
}

// out = (x - max) - log(sum(exp(x - max))), float32. Bytes: rows columns (3 b + 4).
inline void log_softmax(const Matrix& logits, const Matrix& out, int threads) {
  const int64_t n = logits.columns, bytes = element_bytes(logits.dtype);
  const int64_t tile = kTreeByThreads ? ceil_div(n, threads) : kVocabularyTile;
  const int64_t tiles = ceil_div(n, tile), items = logits.rows * tiles;
  const int64_t padded = ceil_div(tile, kLanes) * kLanes;
  float* maxima = static_cast<float*>(workspace(Scratch::kShared, (2 * items + 1) * sizeof(float)));
  float* sums = maxima + items;
  const int team = threads_for(logits.rows * n, threads);
  const auto load_tile = [&](int64_t item, float* row) {  // padded with -inf; returns its length
    const int64_t begin = item % tiles * tile, count = least(tile, n - begin);
    widen(logits.dtype, row_of(logits, item / tiles) + begin * bytes, count, row);
    for (int64_t i = count; i < padded; ++i) row[i] = kMinusInfinity;
    return count;
  };
  const auto private_row = [&] { return static_cast<float*>(workspace(Scratch::kPrivate, padded * sizeof(float))); };
  const auto row_maximum = [&](int64_t r) {
    float maximum = kMinusInfinity;
    for (int64_t t = 0; t < tiles; ++t) maximum = maxima[r * tiles + t] > maximum ? maxima[r * tiles + t] : maximum;
    return maximum;
  };
  share_loop(team, items, [&](int64_t item) {
    float* row = private_row();
    load_tile(item, row);
    Vec lanes[kLaneVecs];
    for (auto& lane : lanes) lane = splat(kMinusInfinity);
    for (int64_t i = 0; i < padded; i += kLanes)
      for (int v = 0; v < kLaneVecs; ++v) lanes[v] = max(load(row + i + v * kWidth), lanes[v]);
    maxima[item] = fold_max(lanes);
  });
  share_loop(team, items, [&](int64_t item) {
    float* row = private_row();
    load_tile(item, row);
    const Vec maximum = splat(row_maximum(item / tiles));
    sums[item] = sum_lanes(row, padded, [=](Vec total, Vec v) { return add(total, exp(sub(v, maximum))); }, 1);
  });
  share_loop(team, items, [&](int64_t item) {
    float* row = private_row();
    const int64_t count = load_tile(item, row), r = item / tiles;
    float sum = 0;
    for (int64_t t = 0; t < tiles; ++t) sum += sums[r * tiles + t];
    const Vec maximum = splat(row_maximum(r)), logarithm = splat(log(sum));
    for (int64_t i = 0; i < padded; i += kWidth) store(row + i, sub(sub(load(row + i), maximum), logarithm));
    narrow<F32>(row, count, row_of(out, r) + item % tiles * tile * sizeof(float));
  });
}

}  // namespace STAFFETTA_ISA
