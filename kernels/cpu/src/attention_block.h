// A block of query rows, of one sequence and KV head, against its context: tile after tile, split after split.
// The order, which makes a row's bits its own, is in attention.h.
#pragma once
#include <cstddef>

#include "attention_tile.h"
#include "rules.h"

namespace STAFFETTA_ISA {

constexpr int64_t kSplitTiles = 16;
constexpr int64_t kFewSequences = 4;
constexpr int64_t kBlockRows = 2 * kMaxGroup;  // query rows (tokens x heads of one KV head) that share a turned tile

// Running softmax of a block of rows: maximum and sum per row, weighted values [rows][padded head_dim].
struct Running {
  float *maximum, *sum, *values;
  static Running at(float* memory) { return {memory, memory + kBlockRows, memory + 2 * kBlockRows}; }
};

// A block of query rows of one sequence and KV head. Row r is token r / group of [first_token, ...), head r % group.
struct RowBlock {
  const AttentionArguments& call;
  const Pages& pages;
  const int64_t *table, *table_before;  // of the sequence, and of the one before it, if there is one
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
  // Where a tile is taken to be. Near if the sequence before has the page where it begins, too, and so had it read; and
  // for many sequences, to which asking more often is worth little where it helps and costs more where they share pages.
  Memory memory_of(int64_t tile) const {
    const int64_t page = tile * kTile / pages.block_size;
    const bool is_shared = table_before && table_before[page] == table[page];
    return is_shared || call.num_sequences > kFewSequences ? Memory::kNear : Memory::kFar;
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
  float *query, *keys, *raw_keys, *raw_values, *weights;
  Running split, total;

  static size_t floats(int64_t dim) { return 3 * kTile * dim + kBlockRows * (3 * dim + 4) + kAttentionRows * kTile; }
  Tiles(float* memory, int64_t dim) {
    const auto take = [&](int64_t count) { return (memory += count) - count; };
    query = take(kBlockRows * dim);
    keys = take(kTile * dim);
    raw_keys = take(kTile * dim);
    raw_values = take(kTile * dim);
    weights = take(kAttentionRows * kTile);
    split = Running::at(take(kBlockRows * (dim + 2)));
    total = Running::at(take(kBlockRows * (dim + 2)));
  }
};

inline void reset(const Running& state, int64_t rows, int64_t dim) {
  for (int64_t r = 0; r < rows; ++r) state.maximum[r] = kMinusInfinity, state.sum[r] = 0;
  std::memset(state.values, 0, rows * dim * sizeof(float));
}

// What is turned: float16 has no pairs.
template <class Type>
using Staged = std::conditional_t<std::is_same_v<Type, F16>, F32, Type>;

// Queries as the keys are multiplied with them, padded with zeros.
template <class Type>
void load_queries(const RowBlock& block, Tiles& tiles) {
  using Element = typename Type::Element;
  const int64_t dim = block.pages.head_dim;
  for (int64_t r = 0; r < block.rows; ++r) {
    const int64_t head = block.kv_head * block.group + r % block.group, token = block.first_token + r / block.group;
    const auto* from = static_cast<const Element*>(block.call.query) + token * block.call.query_token_stride +
                       head * block.call.query_head_stride;
    float* row = tiles.query + r * block.padded_dim;
    std::memset(row, 0, block.padded_dim * sizeof(float));
    if constexpr (std::is_same_v<Type, BF16> && PairKeys::kQueryPairs)
      std::memcpy(row, from, dim * sizeof(Element));
    else
      widen<Type>(from, dim, row);
  }
}

// Copies the rows `offset` bytes after a tile's keys into scratch [64][padded head_dim], padded with zeros, and has
// `stripes`, row_bytes apart, point there. Scratch beyond the context is left as it was.
template <class Type>
void stage_stripes(const RowBlock& block, int64_t tile, int64_t offset, float* scratch,
                   const char* (&stripes)[kStripes], int64_t& row_bytes) {
  constexpr int64_t kBytes = sizeof(typename Staged<Type>::Element);
  const int64_t begin = tile * kTile, count = least(kTile, block.context - begin), dim = block.pages.head_dim;
  row_bytes = most(block.padded_dim * kBytes, kLine);
  char* row = reinterpret_cast<char*>(scratch);
  for (int64_t stripe = 0; stripe < kStripes; ++stripe) stripes[stripe] = row + stripe * kStripe * row_bytes;
  for (int64_t j = 0; j < count; ++j, row += row_bytes) {
    const char* from = block.key_at(begin + j) + offset;
    if constexpr (std::is_same_v<Type, F16>)
      widen<F16>(from, dim, reinterpret_cast<float*>(row));
    else
      std::memcpy(row, from, dim * kBytes);
    std::memset(row + dim * kBytes, 0, row_bytes - dim * kBytes);
  }
}

// A strip of a block against a tile whose keys are turned. Type is that of the tile's rows.
template <class Type, int kRows>
void attend_strip(const RowBlock& block, int64_t begin, int64_t tile, const TileRows& rows, Fetcher& fetcher,
                  Tiles& tiles) {
  constexpr int64_t kKeys = ValuesOf<Type>::kKeys;
  const int64_t dim = block.padded_dim;
  int64_t lo[kRows], hi[kRows];
  for (int r = 0; r < kRows; ++r) {
    lo[r] = most(0, block.first_key(begin + r) - tile * kTile);
    hi[r] = least(kTile, block.position(begin + r) + 1 - tile * kTile);
  }
  if (hi[kRows - 1] <= 0 || lo[0] >= kTile) return;
  const Running& state = tiles.split;
  float *weights = tiles.weights, *values = state.values + begin * dim;
  score<KeysOf<Type>, kRows>(tiles.query + begin * dim, dim, tiles.keys, block.pages.head_dim, weights, fetcher);
  float largest[kRows];
  SumStep steps[kRows];
  const auto each_seeing_row = [&](auto f) {
    for (int r = 0; r < kRows; ++r)
      if (lo[r] < hi[r]) f(r, weights + r * kTile);
  };
  each_seeing_row([&](int r, float* row) {
    fetcher.lines<32 / kRows>();
    largest[r] = finish_scores(row, lo[r], hi[r], block.call.scale, block.call.soft_cap);
  });
  each_seeing_row([&](int r, float* row) {
    fetcher.lines<32 / kRows>();
    steps[r] = soften<ValuesOf<Type>>(row, largest[r], state.maximum[begin + r], values + r * dim, dim);
  });
  each_seeing_row([&](int r, float*) { state.sum[begin + r] = steps[r].after(state.sum[begin + r]); });
  // Rows go together over the steps whose keys all of them see, each by itself before and after.
  const auto weigh_alone = [&](int r, int64_t from, int64_t to) {
    if (from < to) weigh<Type, 1>(weights + r * kTile, rows, fetcher, from, to, values + r * dim, dim);
  };
  const int64_t all_lo = ceil_div(lo[kRows - 1], kKeys) * kKeys, all_hi = most(hi[0] / kKeys * kKeys, all_lo);
  for (int r = 0; r < kRows; ++r) weigh_alone(r, lo[r], least(all_lo, hi[r]));
  if (all_lo < all_hi) weigh<Type, kRows>(weights, rows, fetcher, all_lo, all_hi, values, dim);
  for (int r = 0; r < kRows; ++r) weigh_alone(r, all_hi, hi[r]);
}

// A block against a tile. `next` is what the thread turns to afterwards.
template <class Type>
void attend_tile(const RowBlock& block, int64_t tile, const TileRows& rows, const TileRows& next, Tiles& tiles) {
  const int64_t bytes = most(block.padded_dim * KeysOf<Type>::kBytes, kLine);
  touch(next);
  Fetcher fetcher(rows, next, bytes, block.memory_of(tile));
  turn_keys<KeysOf<Type>>(rows, bytes, tiles.keys, fetcher);
  for (int64_t strip = 0; strip < block.num_strips(); ++strip) {
    const int64_t begin = block.strip_begin(strip);
    with_rows<kAttentionRows>(block.strip_begin(strip + 1) - begin, [&](auto count) {
      attend_strip<Type, decltype(count)::value>(block, begin, tile, rows, fetcher, tiles);
    });
  }
}

// Whether tiles can be used where they lie: whole stripes in a block, whole vectors in a row.
template <class Type>
bool fits_in_place(const Pages& pages) {
  constexpr int64_t kBytes = sizeof(typename Type::Element);
  return pages.block_size % kStripe == 0 && pages.head_dim % kStripe == 0 && pages.head_dim * kBytes >= kLine &&
         pages.token_stride * kBytes % 4 == 0;
}

// One split of one block of rows, into tiles.split. `after` is what the thread turns to afterwards.
template <class Type>
void compute_split(const RowBlock& block, int64_t split, const TileRows& after, Tiles& tiles) {
  reset(tiles.split, block.rows, block.padded_dim);
  const int64_t value_bytes = block.pages.value_stride * sizeof(typename Type::Element), end = block.end_tile(split);
  const bool fits = fits_in_place<Type>(block.pages);
  for (int64_t tile = block.first_tile(split); tile < end; ++tile) {
    TileRows rows = block.find_tile(tile);
    const TileRows next = tile + 1 < end ? block.find_tile(tile + 1) : after;
    if (!fits || !std::is_same_v<Type, Staged<Type>>)
      stage_stripes<Type>(block, tile, 0, tiles.raw_keys, rows.keys, rows.key_bytes);
    if (fits) {
      attend_tile<Type>(block, tile, rows, next, tiles);
    } else {
      stage_stripes<Type>(block, tile, value_bytes, tiles.raw_values, rows.values, rows.value_bytes);
      attend_tile<Staged<Type>>(block, tile, rows, next, tiles);
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

}  // namespace STAFFETTA_ISA
