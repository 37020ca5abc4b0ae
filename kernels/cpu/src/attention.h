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
// key, which bound prefill. Beyond a sequence's context only the rest of its last 16 keys is read, and not used.
// Pages as in Kwon et al. 2023, arXiv 2309.06180, section 4.1.
#pragma once
#include <atomic>
#include <cstddef>

#include "attention_tile.h"
#include "rules.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int64_t kSplitTiles = 16;
constexpr int64_t kBlockRows = kMaxGroup;  // query rows (tokens x heads of one KV head) that share a turned tile

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
  int64_t end_key() const { return position(rows - 1) + 1; }
  int64_t num_strips() const { return ceil_div(rows, kAttentionRows); }
  int64_t strip_begin(int64_t strip) const { return strip * rows / num_strips(); }
  int64_t split_keys() const {
    return kSplitByCount ? ceil_div(ceil_div(context, 2), kTile) * kTile : kSplitTiles * kTile;
  }
  int64_t first_split() const { return first_key(0) / split_keys(); }
  int64_t last_split() const { return (end_key() - 1) / split_keys(); }
  int64_t first_tile(int64_t split) const { return most(split * split_keys(), first_key(0)) / kTile; }
  int64_t end_tile(int64_t split) const { return ceil_div(least((split + 1) * split_keys(), end_key()), kTile); }

  // The address of a position's key; its value lies value_stride elements on.
  const char* key_at(int64_t position) const {
    const int64_t offset = table[position / pages.block_size] * pages.block_stride + kv_head * pages.head_stride +
                           position % pages.block_size * pages.token_stride;
    return static_cast<const char*>(pages.data) + offset * element_bytes(pages.dtype);
  }
  // A tile where it lies, if its stripes do not leave their blocks. Stripes beyond the context repeat the last.
  TileRows find_tile(int64_t tile) const {
    const int64_t bytes = element_bytes(pages.dtype), begin = tile * kTile;
    TileRows rows;
    rows.key_bytes = rows.value_bytes = pages.token_stride * bytes;
    rows.stripes = ceil_div(least(kTile, context - begin), kStripe);
    for (int64_t stripe = 0; stripe < kStripes; ++stripe) {
      rows.keys[stripe] = key_at(begin + least(stripe, rows.stripes - 1) * kStripe);
      rows.values[stripe] = rows.keys[stripe] + pages.value_stride * bytes;
    }
    return rows;
  }
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

// Queries times scale, [rows][padded head_dim].
inline void load_queries(const RowBlock& block, Tiles& tiles) {
  const int64_t dim = block.pages.head_dim, bytes = element_bytes(block.call.dtype);
  const Vec scale = splat(block.call.scale);
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t head = block.kv_head * block.group + r % block.group, token = block.first_token + r / block.group;
    const int64_t offset = token * block.call.query_token_stride + head * block.call.query_head_stride;
    float* row = tiles.query + r * block.padded_dim;
    widen(block.call.dtype, static_cast<const char*>(block.call.query) + offset * bytes, dim, row);
    for (int64_t d = dim; d < block.padded_dim; ++d) row[d] = 0;
    for (int64_t d = 0; d < block.padded_dim; d += kWidth) store(row + d, mul(load(row + d), scale));
  }
}

// Widens what lies `offset` bytes after the keys of a tile, to [count][padded head_dim], padded with zeros.
template <class Type>
void widen_rows(const RowBlock& block, int64_t tile, int64_t offset, float* to) {
  const int64_t begin = tile * kTile, count = least(kTile, block.context - begin), dim = block.pages.head_dim;
  for (int64_t j = 0; j < count; ++j, to += block.padded_dim) {
    widen<Type>(block.key_at(begin + j) + offset, dim, to);
    for (int64_t d = dim; d < block.padded_dim; ++d) to[d] = 0;
  }
}

// The address of scratch rows [64][padded head_dim] in stripes.
inline void set_stripes(const float* rows, int64_t padded_dim, const char* (&stripes)[kStripes]) {
  for (int64_t stripe = 0; stripe < kStripes; ++stripe)
    stripes[stripe] = reinterpret_cast<const char*>(rows + stripe * kStripe * padded_dim);
}

// A strip of a block against a tile whose keys are turned. Type is that of the tile's rows.
template <class Type, int kRows>
void attend_strip(const RowBlock& block, int64_t begin, int64_t tile, const TileRows& rows, const TileRows& next,
                  Tiles& tiles) {
  const int64_t dim = block.padded_dim;
  int64_t lo[kRows], hi[kRows];
  for (int r = 0; r < kRows; ++r) {
    lo[r] = most(0, block.first_key(begin + r) - tile * kTile);
    hi[r] = least(kTile, block.position(begin + r) + 1 - tile * kTile);
  }
  if (hi[kRows - 1] <= 0 || lo[0] >= kTile) return;
  float *weights = tiles.weights + begin * kTile, *values = tiles.split.values + begin * dim;
  score<KeysOf<Type>, kRows>(tiles.query + begin * dim, dim, tiles.keys, block.pages.head_dim, weights);
  for (int r = 0; r < kRows; ++r)
    if (lo[r] < hi[r])
      soften(weights + r * kTile, lo[r], hi[r], block.call.soft_cap,
             {tiles.split.maximum[begin + r], tiles.split.sum[begin + r], values + r * dim}, dim);
  // Rows go together over the keys that all of them see, each by itself before and after.
  const auto weigh_alone = [&](int r, int64_t from, int64_t to) {
    if (from < to) weigh<Type, 1>(weights + r * kTile, rows, next, from, to, values + r * dim, dim);
  };
  const int64_t all_lo = lo[kRows - 1], all_hi = most(hi[0], all_lo);
  for (int r = 0; r < kRows; ++r) weigh_alone(r, lo[r], least(all_lo, hi[r]));
  if (all_lo < all_hi) weigh<Type, kRows>(weights, rows, next, all_lo, all_hi, values, dim);
  for (int r = 0; r < kRows; ++r) weigh_alone(r, all_hi, hi[r]);
}

// A block against a tile. `next` is what the thread turns to afterwards.
template <class Type>
void attend_tile(const RowBlock& block, int64_t tile, const TileRows& rows, const TileRows& next, Tiles& tiles) {
  using Turned = std::conditional_t<std::is_same_v<Type, F16>, F32, Type>;
  turn_keys(rows, block.padded_dim * sizeof(typename Turned::Element), tiles.keys);
  for (int64_t strip = 0; strip < block.num_strips(); ++strip) {
    const int64_t begin = block.strip_begin(strip);
    with_rows<kAttentionRows>(block.strip_begin(strip + 1) - begin, [&](auto count) {
      attend_strip<Type, decltype(count)::value>(block, begin, tile, rows, strip == 0 ? next : rows, tiles);
    });
  }
}

// Whether tiles are used where they lie: whole stripes in a block, whole vectors in a row.
template <class Type>
bool is_in_place(const Pages& pages) {
  constexpr int64_t kBytes = sizeof(typename Type::Element);
  return pages.head_dim % kStripe == 0 && pages.head_dim * kBytes >= kLine && pages.block_size % kStripe == 0 &&
         pages.token_stride * kBytes % 4 == 0;
}

// One split of one block of rows, into tiles.split. `after` is what the thread turns to afterwards.
template <class Type>
void compute_split(const RowBlock& block, int64_t split, const TileRows& after, Tiles& tiles) {
  reset(tiles.split, block.rows, block.padded_dim);
  const int64_t value_bytes = block.pages.value_stride * sizeof(typename Type::Element), end = block.end_tile(split);
  const bool in_place = is_in_place<Type>(block.pages);
  for (int64_t tile = block.first_tile(split); tile < end; ++tile) {
    TileRows rows = block.find_tile(tile);
    if (!in_place || std::is_same_v<Type, F16>) {
      widen_rows<Type>(block, tile, 0, tiles.raw_keys);
      set_stripes(tiles.raw_keys, block.padded_dim, rows.keys);
      rows.key_bytes = block.padded_dim * sizeof(float);
    }
    if (!in_place) {
      widen_rows<Type>(block, tile, value_bytes, tiles.values);
      set_stripes(tiles.values, block.padded_dim, rows.values);
      rows.value_bytes = rows.key_bytes;
    }
    const TileRows next = tile + 1 < end ? block.find_tile(tile + 1) : after;
    if (in_place)
      attend_tile<Type>(block, tile, rows, next, tiles);
    else
      attend_tile<F32>(block, tile, rows, next, tiles);
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
    for (int64_t s = 0; s < call.num_sequences; ++s) num_blocks += blocks_of(s);
  }
  int64_t tokens(int64_t s) const { return call.query_starts[s + 1] - call.query_starts[s]; }
  int64_t blocks_of(int64_t s) const { return pages.num_kv_heads * ceil_div(tokens(s), block_tokens); }
};

// Finds a plan's blocks for one thread, which asks for them in rising order.
class Finder {
 public:
  explicit Finder(const Plan& plan) : plan_(plan) {}
  RowBlock block(int64_t index) {
    while (index - begin_ >= plan_.blocks_of(sequence_)) begin_ += plan_.blocks_of(sequence_++);
    const AttentionArguments& call = plan_.call;
    const int64_t tokens = plan_.tokens(sequence_), size = plan_.block_tokens, heads = plan_.pages.num_kv_heads;
    const int64_t first = (ceil_div(tokens, size) - 1 - (index - begin_) / heads) * size;
    const int64_t context = call.context_lens[sequence_];
    return {call,
            plan_.pages,
            call.block_tables + sequence_ * call.table_stride,
            (index - begin_) % heads,
            plan_.group,
            call.query_starts[sequence_] + first,
            context - tokens + first,
            least(size, tokens - first) * plan_.group,
            context,
            plan_.padded_dim};
  }

 private:
  const Plan& plan_;
  int64_t sequence_ = 0, begin_ = 0;  // the sequence last found, and the number of its first block
};

// A block's splits one after the other, each joined as it is done.
template <class Type>
void compute_block(const RowBlock& block, const TileRows& after, Tiles& tiles) {
  load_queries(block, tiles);
  reset(tiles.total, block.rows, block.padded_dim);
  for (int64_t split = block.first_split(); split <= block.last_split(); ++split) {
    const bool is_last = split == block.last_split();
    compute_split<Type>(block, split, is_last ? after : block.find_tile(block.first_tile(split + 1)), tiles);
    for (int64_t r = 0; r < block.rows; ++r) join(tiles.total, tiles.split, r, block.padded_dim);
  }
  write_rows(block, tiles.total);
}

// Every thread takes the next block when it is done with one.
template <class Type>
void compute_by_blocks(const Plan& plan, int threads, size_t tile_bytes) {
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    Finder finder(plan), ahead(plan);
    for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < plan.num_blocks;) {
      const RowBlock block = finder.block(index);
      const RowBlock after = ahead.block(least(index + threads, plan.num_blocks - 1));  // if all take turns
      compute_block<Type>(block, after.find_tile(after.first_tile(after.first_split())), tiles);
    }
  }
}

// The same where there are fewer blocks than threads: splits are shared out, kept, and joined in the same order.
template <class Type>
void compute_by_splits(const Plan& plan, int threads, size_t tile_bytes) {
  int64_t most_splits = 0;
  Finder finder(plan);
  for (int64_t index = 0; index < plan.num_blocks; ++index) {
    const RowBlock block = finder.block(index);
    most_splits = most(most_splits, block.last_split() - block.first_split() + 1);
  }
  const int64_t units = plan.num_blocks * most_splits, unit_floats = kBlockRows * (plan.padded_dim + 2);
  float* partials = static_cast<float*>(workspace(Scratch::kShared, units * unit_floats * sizeof(float)));
#pragma omp parallel num_threads(threads)
  {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    Finder units_finder(plan), blocks_finder(plan);
#pragma omp for schedule(dynamic, 1)
    for (int64_t unit = 0; unit < units; ++unit) {
      const RowBlock block = units_finder.block(unit / most_splits);
      const int64_t split = block.first_split() + unit % most_splits;
      if (split > block.last_split()) continue;
      load_queries(block, tiles);
      tiles.split = Running::at(partials + unit * unit_floats);
      compute_split<Type>(block, split, block.find_tile(block.first_tile(split)), tiles);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t index = 0; index < plan.num_blocks; ++index) {
      const RowBlock block = blocks_finder.block(index);
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
  compute_by_blocks<Type>(plan, threads, tile_bytes);
}

inline void attention(const AttentionArguments& call, const Pages& pages, int threads) {
  with_type(pages.dtype, [&](auto type) { run_attention<decltype(type)>(call, pages, threads); });
}

}  // namespace STAFFETTA_ISA
