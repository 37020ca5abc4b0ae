// Causal attention of queries over their own paged context: whole prefill, chunks, decode, sliding windows alike.
//
// out[t, h] = sum over visible j of softmax_j(s[t, h, j]) value[j, h KVH / H], s = (scale query[t, h]) . key[j, h KVH / H],
// soft-capped to c tanh(s / c) where c is set. The query at position p sees j in (p - window, p].
//
// Order, per query row and nothing else's business: keys in tiles of 64 aligned to position 0. A score is one chain
// over head_dim ascending. A tile's maximum and sum are trees of 64 lanes, with -inf and 0 at what is not visible; its
// weighted values are one chain over visible keys ascending, carried on from tile to tile (online softmax: Milakov and
// Gimelshein 2018, arXiv 1805.02867, algorithm 3; tiled as in Dao 2023, arXiv 2307.08691, algorithm 1). Every 1,024
// keys a split begins anew; splits are joined left to right, and a split without a visible key does not take part. So
// a row has the same bits as decode, in any chunk, and whoever computes it with it.
//
// Bytes: 2 b KVH D per context token and block of query rows, which bound decode. FLOPs: 4 H D per query and visible
// key, which bound prefill. A tile is widened once per block of rows, its keys turned so that scores vectorise over
// keys. Nothing beyond a sequence's context is read. Pages as in Kwon et al. 2023, arXiv 2309.06180, section 4.1.
#pragma once
#include <cstddef>

#include "numeric.h"
#include "rules.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int kTile = kLanes;
constexpr int64_t kSplitTiles = 16;
constexpr int64_t kBlockRows = kMaxGroup;  // query rows (tokens x heads of one KV head) that share a widened tile
constexpr float kMinusInfinity = -__builtin_inff();

// Running softmax of a block of rows: maximum and sum per row, weighted values [rows][padded head_dim].
struct Running {
  float *maximum, *sum, *values;
  static Running at(float* memory) { return {memory, memory + kBlockRows, memory + 2 * kBlockRows}; }
};

// A block of query rows of one sequence and KV head. Row r is token r / group of [first_token, ...), head r % group.
struct RowBlock {
  const AttentionArguments& call;
  const Pages& pages;
  const int64_t* table;
  int64_t kv_head, group, first_token, first_position, rows, context, padded_dim;

  int64_t position(int64_t row) const { return first_position + row / group; }
  int64_t first_key(int64_t row) const { return call.window ? most(0, position(row) - call.window + 1) : 0; }
  int64_t split_keys() const {
    return kSplitByCount ? ceil_div(ceil_div(context, 2), kTile) * kTile : kSplitTiles * kTile;
  }
  int64_t first_split() const { return first_key(0) / split_keys(); }
  int64_t last_split() const { return position(rows - 1) / split_keys(); }
};

// What one thread needs to compute a block.
struct Tiles {
  float *query, *keys, *values, *weights, *raw_keys;
  Running split, total;

  static size_t floats(int64_t dim) { return 3 * kTile * dim + kBlockRows * (3 * dim + kTile + 4); }
  Tiles(float* memory, int64_t dim) {
    const auto take = [&](int64_t count) { return (memory += count) - count; };
    query = take(kBlockRows * dim);
    keys = take(kTile * dim);
    values = take(kTile * dim);
    raw_keys = take(kTile * dim);
    weights = take(kBlockRows * kTile);
    split = Running::at(take(kBlockRows * (dim + 2)));
    total = Running::at(take(kBlockRows * (dim + 2)));
  }
};

inline void reset(const Running& state, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) state.maximum[r] = kMinusInfinity, state.sum[r] = 0;
  std::memset(state.values, 0, rows * dim * sizeof(float));
}

// Queries times scale, as strips [padded head_dim][rows of the strip].
inline void load_queries(const RowBlock& block, Tiles& tiles) {
  const int64_t dim = block.pages.head_dim, bytes = element_bytes(block.call.dtype);
  const Vec scale = splat(block.call.scale);
  float* row = tiles.raw_keys;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t head = block.kv_head * block.group + r % block.group, token = block.first_token + r / block.group;
    const int64_t offset = token * block.call.query_token_stride + head * block.call.query_head_stride;
    for (int64_t d = dim; d < block.padded_dim; ++d) row[d] = 0;
    widen(block.call.dtype, static_cast<const char*>(block.call.query) + offset * bytes, dim, row);
    const int64_t strip = r / kAttentionRows * kAttentionRows, rows = least(kAttentionRows, block.rows - strip);
    float* to = tiles.query + strip * block.padded_dim + r - strip;
    for (int64_t d = 0; d < block.padded_dim; d += kWidth) {
      float scaled[kWidth];
      store(scaled, mul(load(row + d), scale));
      for (int i = 0; i < kWidth; ++i) to[(d + i) * rows] = scaled[i];
    }
  }
}

// Widens a tile: keys turned to [padded head_dim][64], values as [64][padded head_dim]; zeros beyond the context.
template <class Type>
void load_tile(const RowBlock& block, int64_t tile, Tiles& tiles) {
  const Pages& pages = block.pages;
  const int64_t dim = pages.head_dim, padded = block.padded_dim, begin = tile * kTile;
  const int64_t count = least(kTile, block.context - begin);
  const auto* base = static_cast<const typename Type::Element*>(pages.data) + block.kv_head * pages.head_stride;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t position = begin + j, block_id = block.table[position / pages.block_size];
    const auto* key = base + block_id * pages.block_stride + position % pages.block_size * pages.token_stride;
    widen<Type>(key, dim, tiles.raw_keys + j * padded);
    widen<Type>(key + pages.value_stride, dim, tiles.values + j * padded);
  }
  if (padded != dim)
    for (int64_t j = 0; j < count; ++j)
      for (int64_t d = dim; d < padded; ++d) tiles.raw_keys[j * padded + d] = tiles.values[j * padded + d] = 0;
  std::memset(tiles.raw_keys + count * padded, 0, (kTile - count) * padded * sizeof(float));
  for (int64_t d = 0; d < padded; d += kWidth)
    for (int64_t j = 0; j < kTile; j += kWidth)
      transpose(tiles.raw_keys + j * padded + d, padded, tiles.keys + d * kTile + j, kTile);
}

// Scores of a strip of rows against the tile, into tiles.weights.
template <int kRows>
__attribute__((noinline)) void score(const RowBlock& block, int64_t strip, Tiles& tiles) {
  constexpr int kVecs = 4;
  const float* query = tiles.query + strip * block.padded_dim;
  for (int j = 0; j < kTile; j += kVecs * kWidth) {
    Vec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = zero();
    chain<kRows, kVecs, 1>(sums, query, kRows, tiles.keys + j, kTile, 0, block.pages.head_dim);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(tiles.weights + (strip + r) * kTile + j + v * kWidth, sums[r][v]);
  }
}

// Turns a row's scores into weights and brings its running maximum, sum and values up to them.
// Keys [lo, hi) of the tile are visible; hi > lo.
inline void soften(const RowBlock& block, int64_t row, int64_t lo, int64_t hi, Tiles& tiles) {
  float* weights = tiles.weights + row * kTile;
  Vec lanes[kLaneVecs];
  if (block.call.soft_cap > 0) {
    const Vec cap = splat(block.call.soft_cap);
    for (int v = 0; v < kLaneVecs; ++v)
      store(weights + v * kWidth, mul(cap, tanh(div(load(weights + v * kWidth), cap))));
  }
  for (int64_t j = 0; j < lo; ++j) weights[j] = kMinusInfinity;
  for (int64_t j = hi; j < kTile; ++j) weights[j] = kMinusInfinity;
  for (int v = 0; v < kLaneVecs; ++v) lanes[v] = load(weights + v * kWidth);
  const float before = tiles.split.maximum[row], here = fold_max(lanes);
  const float maximum = here > before || here != here ? here : before;  // a NaN must reach the logits, where it is found
  for (int v = 0; v < kLaneVecs; ++v) {
    lanes[v] = exp(sub(lanes[v], splat(maximum)));
    store(weights + v * kWidth, lanes[v]);
  }
  const float shrink = exp(before - maximum);
  tiles.split.maximum[row] = maximum;
  tiles.split.sum[row] = first(fma(splat(tiles.split.sum[row]), splat(shrink), splat(fold_sum(lanes))));
  float* values = tiles.split.values + row * block.padded_dim;
  if (shrink != 1.0f)
    for (int64_t d = 0; d < block.padded_dim; d += kWidth) store(values + d, mul(load(values + d), splat(shrink)));
}

// Carries the weighted values of rows [row, row + kRows) on over keys [lo, hi) of the tile.
template <int kRows, int kVecs>
int64_t weigh_columns(const RowBlock& block, int64_t row, int64_t d, int64_t lo, int64_t hi, Tiles& tiles) {
  const int64_t dim = block.padded_dim;
  for (; d + kVecs * kWidth <= dim; d += kVecs * kWidth) {
    float* to = tiles.split.values + row * dim + d;
    Vec sums[kRows][kVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) sums[r][v] = load(to + r * dim + v * kWidth);
    chain<kRows, kVecs, kTile>(sums, tiles.weights + row * kTile, 1, tiles.values + d, dim, lo, hi);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < kVecs; ++v) store(to + r * dim + v * kWidth, sums[r][v]);
  }
  return d;
}
template <int kRows>
__attribute__((noinline)) void weigh(const RowBlock& block, int64_t row, int64_t lo, int64_t hi, Tiles& tiles) {
  const int64_t wide = weigh_columns<kRows, 4>(block, row, 0, lo, hi, tiles);
  weigh_columns<kRows, 1>(block, row, wide, lo, hi, tiles);
}

// One split of one block of rows, into tiles.split.
template <class Type>
void compute_split(const RowBlock& block, int64_t split, Tiles& tiles) {
  reset(tiles.split, block.rows, block.padded_dim);
  const int64_t keys = block.split_keys(), last = block.position(block.rows - 1);
  const int64_t first_tile = most(split * keys, block.first_key(0)) / kTile;
  const int64_t end_tile = least((split + 1) * keys, last + 1 + kTile - 1) / kTile;
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    load_tile<Type>(block, tile, tiles);
    for (int64_t strip = 0; strip < block.rows; strip += kAttentionRows)
      with_rows<kAttentionRows>(block.rows - strip, [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        int64_t lo[kRows], hi[kRows];
        bool is_whole = true;
        for (int r = 0; r < kRows; ++r) {
          lo[r] = most(0, block.first_key(strip + r) - tile * kTile);
          hi[r] = least(kTile, block.position(strip + r) + 1 - tile * kTile);
          is_whole &= lo[r] == 0 && hi[r] == kTile;
        }
        if (hi[kRows - 1] <= 0 || lo[0] >= kTile) return;
        score<kRows>(block, strip, tiles);
        for (int r = 0; r < kRows; ++r)
          if (lo[r] < hi[r]) soften(block, strip + r, lo[r], hi[r], tiles);
        if (is_whole) return weigh<kRows>(block, strip, 0, kTile, tiles);
        for (int r = 0; r < kRows; ++r)
          if (lo[r] < hi[r]) weigh<1>(block, strip + r, lo[r], hi[r], tiles);
      });
  }
}

// Joins the partial result of a row's next split to the row's total.
inline void join(const Running& total, const Running& split, int64_t row, int64_t dim) {
  const float right_maximum = split.maximum[row];
  if (split.sum[row] == 0) return;  // no visible key; NaN is not 0
  float *left = total.values + row * dim, *right = split.values + row * dim;
  const float left_maximum = total.maximum[row];
  const float maximum = right_maximum > left_maximum ? right_maximum : left_maximum;
  const Vec left_factor = splat(exp(left_maximum - maximum)), right_factor = splat(exp(right_maximum - maximum));
  const auto joined = [&](Vec a, Vec b) { return fma(b, right_factor, mul(a, left_factor)); };
  total.sum[row] = first(joined(splat(total.sum[row]), splat(split.sum[row])));
  total.maximum[row] = maximum;
  for (int64_t d = 0; d < dim; d += kWidth) store(left + d, joined(load(left + d), load(right + d)));
}

// Divides by the sums and writes the rows out.
inline void write_rows(const RowBlock& block, const Running& total) {
  const int64_t dim = block.pages.head_dim, bytes = element_bytes(block.call.dtype);
  for (int64_t r = 0; r < block.rows; ++r) {
    float* values = total.values + r * block.padded_dim;
    const Vec sum = splat(total.sum[r]);
    for (int64_t d = 0; d < block.padded_dim; d += kWidth) store(values + d, div(load(values + d), sum));
    const int64_t head = block.kv_head * block.group + r % block.group, token = block.first_token + r / block.group;
    char* to = static_cast<char*>(block.call.out) + (token * block.call.num_heads + head) * dim * bytes;
    narrow(block.call.dtype, values, dim, to);
  }
}

// All row blocks of a call, numbered: sequence after sequence, the longest walks first within each, KV heads innermost.
struct Plan {
  const AttentionArguments& call;
  const Pages& pages;
  int64_t group, block_tokens, padded_dim, num_blocks;

  Plan(const AttentionArguments& call, const Pages& pages) : call(call), pages(pages), num_blocks(0) {
    group = call.num_heads / pages.num_kv_heads;
    block_tokens = most(1, kBlockRows / group);
    padded_dim = ceil_div(pages.head_dim, 16) * 16;
    for (int64_t s = 0; s < call.num_sequences; ++s) num_blocks += pages.num_kv_heads * ceil_div(tokens(s), block_tokens);
  }
  int64_t tokens(int64_t s) const { return call.query_starts[s + 1] - call.query_starts[s]; }
  RowBlock block(int64_t index) const {
    int64_t s = 0;
    for (;; ++s) {
      const int64_t here = pages.num_kv_heads * ceil_div(tokens(s), block_tokens);
      if (index < here) break;
      index -= here;
    }
    const int64_t number = ceil_div(tokens(s), block_tokens) - 1 - index / pages.num_kv_heads;
    const int64_t begin = number * block_tokens, count = least(block_tokens, tokens(s) - begin);
    const int64_t context = call.context_lens[s];
    return {call, pages, call.block_tables + s * call.table_stride, index % pages.num_kv_heads, group,
            call.query_starts[s] + begin, context - tokens(s) + begin, count * group, context, padded_dim};
  }
};

// A block's splits one after the other, each joined as it is done.
template <class Type>
void compute_block(const RowBlock& block, Tiles& tiles) {
  load_queries(block, tiles);
  reset(tiles.total, block.rows, block.padded_dim);
  for (int64_t split = block.first_split(); split <= block.last_split(); ++split) {
    compute_split<Type>(block, split, tiles);
    for (int64_t r = 0; r < block.rows; ++r) join(tiles.total, tiles.split, r, block.padded_dim);
  }
  write_rows(block, tiles.total);
}

// The same where there are fewer blocks than threads: splits are shared out, kept, and joined in the same order.
template <class Type>
void compute_by_splits(const Plan& plan, int threads, size_t tile_bytes) {
  int64_t most_splits = 0;
  for (int64_t index = 0; index < plan.num_blocks; ++index)
    most_splits = most(most_splits, plan.block(index).last_split() - plan.block(index).first_split() + 1);
  const int64_t units = plan.num_blocks * most_splits, unit_floats = kBlockRows * (plan.padded_dim + 2);
  float* partials = static_cast<float*>(workspace(Scratch::kShared, units * unit_floats * sizeof(float)));
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      const RowBlock block = plan.block(unit / most_splits);
      const int64_t split = block.first_split() + unit % most_splits;
      if (split > block.last_split()) continue;
      load_queries(block, tiles);
      tiles.split = Running::at(partials + unit * unit_floats);
      compute_split<Type>(block, split, tiles);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < plan.num_blocks; ++index) {
      const RowBlock block = plan.block(index);
      reset(tiles.total, block.rows, block.padded_dim);
      for (int64_t n = 0; n <= block.last_split() - block.first_split(); ++n) {
        const Running split = Running::at(partials + (index * most_splits + n) * unit_floats);
        for (int64_t r = 0; r < block.rows; ++r) join(tiles.total, split, r, block.padded_dim);
      }
      write_rows(block, tiles.total);
    }
  }
}

template <class Type>
void run_attention(const AttentionArguments& call, const Pages& pages, int threads) {
  const Plan plan(call, pages);
  const size_t tile_bytes = Tiles::floats(plan.padded_dim) * sizeof(float);
  if (plan.num_blocks < threads) return compute_by_splits<Type>(plan, threads, tile_bytes);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
  for (int64_t index = 0; index < plan.num_blocks; ++index) {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    compute_block<Type>(plan.block(index), tiles);
  }
}

inline void attention(const AttentionArguments& call, const Pages& pages, int threads) {
  with_type(pages.dtype, [&](auto type) { run_attention<decltype(type)>(call, pages, threads); });
}

}  // namespace STAFFETTA_ISA
