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

#include "attention_tile.h"
#include "rules.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int64_t kSplitTiles = 16;
constexpr int64_t kBlockRows = kMaxGroup;  // query rows (tokens x heads of one KV head) that share a widened tile
constexpr int64_t kInPlaceRows = 2 * kAttentionRows;  // of a block whose tiles are not worth widening beforehand

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
  int64_t num_strips() const { return ceil_div(rows, kAttentionRows); }
  int64_t strip_begin(int64_t strip) const { return strip * rows / num_strips(); }
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
  for (int64_t strip = 0; strip < block.num_strips(); ++strip) {
    const int64_t begin = block.strip_begin(strip), rows = block.strip_begin(strip + 1) - begin;
    for (int64_t r = begin; r < begin + rows; ++r) {
      const int64_t head = block.kv_head * block.group + r % block.group, token = block.first_token + r / block.group;
      const int64_t offset = token * block.call.query_token_stride + head * block.call.query_head_stride;
      for (int64_t d = dim; d < block.padded_dim; ++d) row[d] = 0;
      widen(block.call.dtype, static_cast<const char*>(block.call.query) + offset * bytes, dim, row);
      float* to = tiles.query + begin * block.padded_dim + r - begin;
      for (int64_t d = 0; d < block.padded_dim; d += kWidth) {
        float scaled[kWidth];
        store(scaled, mul(load(row + d), scale));
        for (int i = 0; i < kWidth; ++i) to[(d + i) * rows] = scaled[i];
      }
    }
  }
}

// The address of a position's key in bytes; its value lies value_stride elements on.
inline const char* key_at(const RowBlock& block, int64_t position) {
  const Pages& pages = block.pages;
  const int64_t offset = block.table[position / pages.block_size] * pages.block_stride +
                         block.kv_head * pages.head_stride + position % pages.block_size * pages.token_stride;
  return static_cast<const char*>(pages.data) + offset * element_bytes(pages.dtype);
}

// Whether tiles can be used where they lie: whole stripes in a block, whole vectors in a row.
template <class Type>
bool is_in_place(const RowBlock& block) {
  const Pages& pages = block.pages;
  constexpr int64_t kBytes = sizeof(typename Type::Element);
  return block.rows <= kInPlaceRows && !std::is_same_v<Type, F16> && pages.head_dim % 16 == 0 &&
         pages.head_dim * kBytes >= kLine && pages.block_size % kStripe == 0 && pages.token_stride * kBytes % 4 == 0;
}

// A tile in the pages. Stripes beyond the context repeat the last.
inline TileRows find_tile(const RowBlock& block, int64_t tile) {
  const Pages& pages = block.pages;
  const int64_t begin = tile * kTile, bytes = element_bytes(pages.dtype);
  TileRows rows;
  rows.token_bytes = pages.token_stride * bytes;
  rows.stripes = ceil_div(least(kTile, block.context - begin), kStripe);
  for (int64_t stripe = 0; stripe < kStripes; ++stripe) {
    rows.keys[stripe] = key_at(block, begin + least(stripe, rows.stripes - 1) * kStripe);
    rows.values[stripe] = rows.keys[stripe] + pages.value_stride * bytes;
  }
  return rows;
}

// A tile widened into scratch, rows padded with zeros. What lies beyond the context is left as it was.
template <class Type>
TileRows widen_tile(const RowBlock& block, int64_t tile, Tiles& tiles) {
  const Pages& pages = block.pages;
  const int64_t dim = pages.head_dim, padded = block.padded_dim, begin = tile * kTile;
  const int64_t count = least(kTile, block.context - begin);
  for (int64_t j = 0; j < count; ++j) {
    const char* key = key_at(block, begin + j);
    widen<Type>(key, dim, tiles.raw_keys + j * padded);
    widen<Type>(key + pages.value_stride * element_bytes(pages.dtype), dim, tiles.values + j * padded);
    for (int64_t d = dim; d < padded; ++d) tiles.raw_keys[j * padded + d] = tiles.values[j * padded + d] = 0;
  }
  TileRows rows;
  rows.token_bytes = padded * sizeof(float);
  rows.stripes = kStripes;
  for (int64_t stripe = 0; stripe < kStripes; ++stripe) {
    rows.keys[stripe] = reinterpret_cast<const char*>(tiles.raw_keys + stripe * kStripe * padded);
    rows.values[stripe] = reinterpret_cast<const char*>(tiles.values + stripe * kStripe * padded);
  }
  return rows;
}

// A strip of a block against a tile whose keys are turned. Type is that of the tile's rows.
template <class Type, int kRows>
void attend_strip(const RowBlock& block, int64_t strip, int64_t tile, const TileRows& rows, const char* const* next,
                  Tiles& tiles) {
  const int64_t begin = block.strip_begin(strip), dim = block.padded_dim;
  int64_t lo[kRows], hi[kRows];
  for (int r = 0; r < kRows; ++r) {
    lo[r] = most(0, block.first_key(begin + r) - tile * kTile);
    hi[r] = least(kTile, block.position(begin + r) + 1 - tile * kTile);
  }
  if (hi[kRows - 1] <= 0 || lo[0] >= kTile) return;
  float *weights = tiles.weights + begin * kTile, *values = tiles.split.values + begin * dim;
  score<KeysOf<Type>, kRows>(tiles.query + begin * dim, tiles.keys, block.pages.head_dim, weights);
  for (int r = 0; r < kRows; ++r)
    if (lo[r] < hi[r])
      soften(weights + r * kTile, lo[r], hi[r], block.call.soft_cap,
             {tiles.split.maximum[begin + r], tiles.split.sum[begin + r], values + r * dim}, dim);
  // Rows go together over the keys that all of them see, each by itself before and after.
  const int64_t shared_lo = lo[kRows - 1], shared_hi = hi[0];
  const bool is_shared = shared_lo < shared_hi;
  for (int r = 0; r < kRows; ++r) {
    const int64_t end = is_shared ? shared_lo : hi[r];
    if (lo[r] < end) weigh<Type, 1>(weights + r * kTile, rows, next, lo[r], end, values + r * dim, dim);
  }
  if (!is_shared) return;
  weigh<Type, kRows>(weights, rows, next, shared_lo, shared_hi, values, dim);
  for (int r = 0; r < kRows; ++r)
    if (shared_hi < hi[r]) weigh<Type, 1>(weights + r * kTile, rows, next, shared_hi, hi[r], values + r * dim, dim);
}

// One split of one block of rows, into tiles.split.
template <class Type>
void compute_split(const RowBlock& block, int64_t split, Tiles& tiles) {
  reset(tiles.split, block.rows, block.padded_dim);
  const int64_t keys = block.split_keys(), end = block.position(block.rows - 1) + 1;
  const int64_t first_tile = most(split * keys, block.first_key(0)) / kTile;
  const int64_t end_tile = ceil_div(least((split + 1) * keys, end), kTile);
  const bool in_place = is_in_place<Type>(block);
  for (int64_t tile = first_tile; tile < end_tile; ++tile) {
    const TileRows rows = in_place ? find_tile(block, tile) : widen_tile<Type>(block, tile, tiles);
    const TileRows next = in_place && tile + 1 < ceil_div(end, kTile) ? find_tile(block, tile + 1) : rows;
    const int64_t row_bytes = in_place ? block.pages.head_dim * element_bytes(block.pages.dtype) : rows.token_bytes;
    turn_keys(rows, row_bytes, tiles.keys);
    for (int64_t strip = 0; strip < block.num_strips(); ++strip) {
      const char* const* fetched = strip == 0 ? next.keys : rows.values;
      with_rows<kAttentionRows>(block.strip_begin(strip + 1) - block.strip_begin(strip), [&](auto count) {
        constexpr int kRows = decltype(count)::value;
        if (in_place) return attend_strip<Type, kRows>(block, strip, tile, rows, fetched, tiles);
        attend_strip<F32, kRows>(block, strip, tile, rows, fetched, tiles);
      });
    }
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
