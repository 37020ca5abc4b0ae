// Causal attention of queries over their own paged context: whole prefill, chunks, decode, sliding windows alike.
//
// out[t, h] = sum over visible j of softmax_j(s[t, h, j]) value[j, h KVH / H] with
// s[t, h, j] = scale (query[t, h] . key[j, h KVH / H]), soft-capped to c tanh(s / c) where c is set. The query at
// position p sees j in (p - window, p].
//
// Order, per query row and nothing else's business: keys in tiles of 64 aligned to position 0. A product of query and
// key is one chain over head_dim ascending; of bfloat16, over its pairs ascending, the later of a pair first. A tile's
// maximum and sum are trees of 64 lanes, with -inf and 0 at what is not visible; its weighted values are one chain
// over visible keys ascending, carried on from tile to tile (online softmax: Milakov and Gimelshein 2018, arXiv
// 1805.02867, algorithm 3; tiled as in Dao 2023, arXiv 2307.08691, algorithm 1). Weights of bfloat16 values are rounded
// to that type before they are summed and used, and go in pairs of positions (2 i, 2 i + 1), the later first. Every
// 1,024 keys a split begins anew; splits are joined left to right, and a split without a visible key does not take
// part. So a row has the same bits as decode, in any chunk, and whoever computes it with it.
//
// Bytes: 2 b KVH D per context token and block of query rows, which bound decode. FLOPs: 4 H D per query and visible
// key, which bound prefill. Beyond a sequence's context only the rest of its last 16 keys is read, and not used.
// Pages as in Kwon et al. 2023, arXiv 2309.06180, section 4.1.
#pragma once
#include <cstddef>

#include "attention_block.h"
#include "team.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

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

// Finds a plan's blocks for one thread, which must ask for them in rising order.
class Finder {
 public:
  explicit Finder(const Plan& plan) : plan_(plan) {}
  RowBlock block(int64_t index) {
    while (index - begin_ >= plan_.blocks_of(sequence_)) begin_ += plan_.blocks_of(sequence_++);
    const AttentionArguments& call = plan_.call;
    const int64_t tokens = plan_.tokens(sequence_), size = plan_.block_tokens, heads = plan_.pages.num_kv_heads;
    const int64_t first = (ceil_div(tokens, size) - 1 - (index - begin_) / heads) * size;
    const int64_t context = call.context_lens[sequence_];
    const int64_t* table = call.block_tables + sequence_ * call.table_stride;
    return {call,
            plan_.pages,
            table,
            sequence_ > 0 ? table - call.table_stride : nullptr,
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
  load_queries<Type>(block, tiles);
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
  share_turns(threads, plan.num_blocks, [&](Turns& turns) {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    Finder finder(plan), ahead(plan);
    for (int64_t index; turns.take(index);) {
      const RowBlock block = finder.block(index);
      const RowBlock after = ahead.block(least(index + threads, plan.num_blocks - 1));  // if all take turns
      compute_block<Type>(block, after.find_tile(after.first_tile(after.first_split())), tiles);
    }
  });
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
  share_turns(threads, units, [&](Turns& turns) {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    Finder blocks(plan);
    for (int64_t unit; turns.take(unit);) {
      const RowBlock block = blocks.block(unit / most_splits);
      const int64_t split = block.first_split() + unit % most_splits;
      if (split > block.last_split()) continue;
      load_queries<Type>(block, tiles);
      tiles.split = Running::at(partials + unit * unit_floats);
      const int64_t after = least(split + threads, block.last_split());
      compute_split<Type>(block, split, block.find_tile(block.first_tile(after)), tiles);
    }
  });
  share_turns(threads, plan.num_blocks, [&](Turns& turns) {
    Tiles tiles(static_cast<float*>(workspace(Scratch::kPrivate, tile_bytes)), plan.padded_dim);
    Finder blocks(plan);
    for (int64_t index; turns.take(index);) {
      const RowBlock block = blocks.block(index);
      reset(tiles.total, block.rows, block.padded_dim);
      for (int64_t n = 0; n <= block.last_split() - block.first_split(); ++n) {
        const Running split = Running::at(partials + (index * most_splits + n) * unit_floats);
        for (int64_t r = 0; r < block.rows; ++r) join(tiles.total, split, r, block.padded_dim);
      }
      write_rows(block, tiles.total);
    }
  });
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
