// out[m, n] = epilogue(sum over k of x[m, k] w[n, k]).
//
// Order: each element is one chain of fused multiply-adds over k ascending in float32, whatever M, N, threads or cache
// blocks are: a piece of K loads the sums that the piece before it stored. With int8 rows the sums are exact integers.
// With int4 weights each group of inputs has such a chain, and the element is the chain of the groups' sums times scales.
// strips.h packs the rows, weights.h multiplies, epilogue.h scales, adds and rounds.
//
// Weights lie in panels of 32 outputs x K (see pack.cpp). A tile is a block of rows, small enough for the second cache,
// against some panels, which pass by once, in the order in which they lie; the next piece of a panel is fetched while
// all strips of the block use this one, at an even pace. FLOPs: 2 M N K. Bytes: N K per weight byte and block of rows,
// which bound it while M is below the machine's FLOPs per byte; beyond, the sums in registers do: kLinearRows x 32.
// Blocking after Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 4.
#pragma once
#include <cstddef>

#include "epilogue.h"
#include "team.h"

namespace STAFFETTA_ISA {

constexpr int64_t kPieceSteps = 512;          // of a strip and of a panel
constexpr int64_t kFewStrips = 4;             // that wait for memory as long as they compute
constexpr int64_t kFewStripsPieceSteps = 128;  // so that the first cache keeps a piece for all strips
static_assert(kFewStripsPieceSteps % kGroupSteps<Int4Weights> == 0, "a group lies in one piece");
static_assert(kPieceSteps % kFewStripsPieceSteps == 0, "a chunk holds whole pieces of either size");
constexpr int64_t kMostChunkSteps = 2048;
constexpr int64_t kMostChunkBytes = int64_t{16} << 10;  // of one row
constexpr int64_t kBlockBytes = int64_t{768} << 10;  // of rows for one chunk of K: most of a second cache of 1 MiB
constexpr int64_t kMostBlockStrips = 128 / kLinearRows;
constexpr int64_t kCarriedPanels = 16;  // panels of a tile whose sums wait in memory for the next chunk
constexpr int64_t kSerialWork = int64_t{1} << 16;  // multiply-adds that are not worth sharing
constexpr int64_t kNearBytes = 8192;  // how far ahead weights are fetched that are used once

// A block of rows for panels [first_panel, last_panel).
struct Tile {
  int64_t block, first_panel, last_panel;
};

// Scales [groups][32] of an int4 panel from step k on.
template <class Weights>
const float* group_scales(const LinearCall& call, int64_t panel, int64_t k) {
  const int64_t num_groups = ceil_div(call.w.inputs, kGroupInputs);
  return call.w.scales + (panel * num_groups + k / kGroupSteps<Weights>) * kPanel;
}

// All strips of a tile's block for one panel and the piece of K from step k. `ahead` is the piece to fetch meanwhile.
template <class Weights>
void compute_piece(const LinearCall& call, int64_t block, int64_t panel, int64_t k, int64_t steps, const char* ahead,
                   char* sums) {
  const int64_t first = call.blocks.begin(block), num_strips = call.blocks.count(block);
  const char* weights = static_cast<const char*>(call.w.panels) + (panel * call.steps + k) * kStepBytes;
  const char* values = block_values<Weights>(call, block, k);
  const int64_t pace = kStepBytes / num_strips;
  for (int64_t strip = first; strip < first + num_strips; ++strip) {
    const int64_t row = call.strips.begin(strip), rows = call.strips.count(strip);
    const Ahead next{ahead, pace};
    const bool is_last = k + steps == call.steps;
    if (is_last) fetch_results(call, row, rows, panel);
    with_rows<kLinearRows>(rows, [&](auto count) {
      constexpr int kRows = decltype(count)::value;
      if constexpr (kGroupSteps<Weights> > 0)
        advance_groups<Weights, kRows>(values, weights, group_scales<Weights>(call, panel, k), next, steps, k == 0, sums);
      else
        advance<Weights, kRows>(values, weights, next, steps, k == 0, sums);
    });
    if (is_last)
      with_type(call.out.dtype, [&](auto type) {
        if (call.w.gated) return finish<decltype(type), Weights, kPanelVecs / 2>(call, row, rows, panel, sums);
        finish<decltype(type), Weights, kPanelVecs>(call, row, rows, panel, sums);
      });
    ahead += steps * pace;
    values += steps * rows * Weights::kStripBytes;
    sums += rows * kPanel * 4;
  }
}

// `memory` holds the sums of a block of rows for one panel, or, where they are carried, for each of the tile's.
template <class Weights>
void compute_tile(const LinearCall& call, const Tile& tile, char* memory) {
  const int64_t panel_bytes = call.steps * kStepBytes;
  const int64_t sums_bytes = call.is_carried() ? (call.blocks.size + 1) * kLinearRows * kPanel * 4 : 0;
  for (int64_t chunk = 0; chunk < call.steps; chunk += call.chunk_steps) {
    const int64_t chunk_end = least(chunk + call.chunk_steps, call.steps);
    for (int64_t panel = tile.first_panel; panel < tile.last_panel; ++panel) {
      const char* weights = static_cast<const char*>(call.w.panels) + panel * panel_bytes;
      char* sums = memory + (panel - tile.first_panel) * sums_bytes;
      for (int64_t k = chunk; k < chunk_end; k += call.piece_steps) {
        const int64_t steps = least(call.piece_steps, chunk_end - k);
        const char* ahead = weights + (k + steps) * kStepBytes;
        if (call.strips.parts == 1) ahead = weights + k * kStepBytes + kNearBytes;
        if (call.is_carried() && k + steps == chunk_end) ahead = weights + panel_bytes + chunk * kStepBytes;
        compute_piece<Weights>(call, tile.block, panel, k, steps, ahead, sums);
      }
    }
  }
}

// How M and K are cut. The memory for strips and scales is the caller's to add.
template <class Weights>
LinearCall plan(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out) {
  const int64_t steps = ceil_div(w.inputs, Weights::kStepInputs), num_strips = ceil_div(x.rows, kLinearRows);
  int64_t piece_steps = steps, chunk_steps = steps;
  if (num_strips > 1) {  // else no piece of the weights is used twice
    piece_steps = num_strips <= kFewStrips ? kFewStripsPieceSteps : kPieceSteps;
    const int64_t num_chunks = ceil_div(steps, least(kMostChunkSteps, kMostChunkBytes / Weights::kStripBytes));
    if (num_chunks > 1) chunk_steps = ceil_div(steps, num_chunks * piece_steps) * piece_steps;
  }
  const int64_t strip_bytes = chunk_steps * kLinearRows * Weights::kStripBytes;
  const int64_t block_strips = most(1, least(kBlockBytes / strip_bytes, kMostBlockStrips));
  const Split blocks(num_strips, ceil_div(num_strips, block_strips));
  return {w, x, residual, out, steps, piece_steps, chunk_steps, Split(x.rows, num_strips), blocks, nullptr, nullptr};
}

// Takes memory for the rows of a call, and packs them there.
template <class Weights>
void pack_rows(LinearCall& call, int threads) {
  const size_t strip_bytes = static_cast<size_t>(call.x.rows) * call.steps * Weights::kStripBytes;
  call.values = static_cast<char*>(workspace(Scratch::kShared, strip_bytes + call.x.rows * sizeof(float)));
  call.row_scales = reinterpret_cast<float*>(call.values + strip_bytes);
  const size_t scratch_bytes = kWidth * scratch_row<Weights>(call) * sizeof(float);
  share_loop(threads_for(call.x.rows * call.x.columns, threads), call.strips.parts, [&](int64_t strip) {
    float* scratch = static_cast<float*>(workspace(Scratch::kPrivate, scratch_bytes));
    pack_strip<Weights>(call, call.blocks.part_of(strip), strip, scratch);
  });
}

// Computes `count` tiles of at most `size` panels each; tile_at(i) is the i-th.
template <class Weights, class TileAt>
void compute_tiles(const LinearCall& call, int64_t count, int64_t size, int threads, TileAt tile_at) {
  const size_t sums_bytes = (call.is_carried() ? size : 1) * (call.blocks.size + 1) * kLinearRows * kPanel * 4;
  const bool is_small = call.x.rows * call.w.inputs * least(call.out.columns, count * size * kPanel) < kSerialWork;
  share_turns(is_small ? 1 : threads, count, [&](Turns& turns) {
    char* sums = static_cast<char*>(workspace(Scratch::kPrivate, sums_bytes));
    for (int64_t turn; turns.take(turn);) compute_tile<Weights>(call, tile_at(turn), sums);
  });
}

template <class Weights>
void run_linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  if (!x.rows) return;
  LinearCall call = plan<Weights>(w, x, residual, out);
  pack_rows<Weights>(call, threads);
  const int64_t num_blocks = call.blocks.parts, num_panels = call.num_panels();
  // Several tiles per thread, because threads may come late or be taken away.
  const int64_t tiles_per_block = ceil_div(4 * threads, num_blocks);
  const int64_t group = least(ceil_div(num_panels, tiles_per_block), call.is_carried() ? kCarriedPanels : num_panels);
  const int64_t num_groups = ceil_div(num_panels, group);
  compute_tiles<Weights>(call, num_blocks * num_groups, group, threads, [&](int64_t turn) {
    const int64_t first = turn % num_groups * group;
    return Tile{turn / num_groups, first, least(first + group, num_panels)};
  });
}

// Calls f with the kind of weights that w is, for rows of a type.
template <class F>
void with_weights(const PackedWeight& w, [[maybe_unused]] int32_t dtype, F f) {
#ifdef STAFFETTA_BF16_DOT
  if (dtype == kBfloat16) switch (w.kind) {
      case kWeightBfloat16: return f(Bfloat16Pairs{});
      case kWeightInt8Only: return f(Int8OnlyPairs{});
      case kWeightInt4: return f(Int4Pairs{});
    }
#endif
  switch (w.kind) {
    case kWeightInt8: return f(Int8Weights{});
    case kWeightInt8Only: return f(Int8OnlyWeights{});
    case kWeightInt4: return f(Int4Weights{});
    case kWeightBfloat16: return f(Bfloat16Weights{});
    default: return f(Float32Weights{});
  }
}

inline void linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  with_weights(w, x.dtype, [&](auto weights) { run_linear<decltype(weights)>(w, x, residual, out, threads); });
}

}  // namespace STAFFETTA_ISA
