// Where the keys and values of a tile lie, and how they are brought near before they are needed.
#pragma once
#include <cstddef>

#include "numeric.h"

namespace STAFFETTA_ISA {

constexpr int kTile = kLanes;
constexpr int kStripe = 16;  // keys that lie evenly spaced
constexpr int kStripes = kTile / kStripe;
constexpr int kLine = 64;    // bytes that are fetched together

// Where the keys and values of a tile lie; rows of a stripe are key_bytes and value_bytes apart. The first `stripes`
// hold keys of the context.
struct TileRows {
  const char *keys[kStripes], *values[kStripes];
  int64_t key_bytes, value_bytes, stripes;
};

// Asks for the first keys and values of each stripe, a tile before they are needed: blocks lie scattered, so each begins
// with a walk through the page tables, and lines that are asked for meanwhile wait behind it.
inline void touch(const TileRows& tile) {
  for (int stripe = 0; stripe < kStripes; ++stripe) {
    __builtin_prefetch(tile.keys[stripe]);
    __builtin_prefetch(tile.values[stripe]);
  }
}

enum class Memory { kNear, kFar };

// Fetches a tile's values and then the next tile's keys, a few lines at a time, while others are computed with: few
// query rows need bytes sooner than memory gives them, and memory gives most when it is asked at an even pace. A
// processor that waits for as much as it can forgets what else it is asked for, and to ask costs less than to wait
// where a line is needed: so each is asked for kTimes, again whenever a later run is. For the last runs of keys the
// next tile's fetcher does that. What is near, in a cache, is asked for kTimesNear: there, asking is what takes time.
class Fetcher {
 public:
  // Rows are row_bytes long; where they touch, kRunRows are a run.
  Fetcher(const TileRows& tile, const TileRows& next, int64_t row_bytes, Memory memory)
      : tile_(tile), next_(next), row_bytes_(row_bytes), memory_(memory) {
    const int64_t rows = run_rows(tile.key_bytes);
    for (int i = 0; i + 1 < kTimes; ++i) runs_[i] = row_at(tile.keys, tile.key_bytes, kTile - (i + 1) * rows);
  }
  // The next kLines lines, or none when all are fetched. A run's last may go beyond it.
  template <int kLines>
  inline __attribute__((always_inline)) void lines() {
    if (at_ >= run_bytes_) {
      if (row_ == 2 * kTile) return;
      begin_run();
    }
    fetch<kLines, 0, kTimesNear>();
    if (memory_ == Memory::kFar) fetch<kLines, kTimesNear, kTimes>();
    at_ += kLines * kLine;
  }

 private:
  static constexpr int kTimes = 5, kTimesNear = 2, kRunRows = kStripe / 2;

  // The same lines of runs [kFirst, kEnd).
  template <int kLines, int kFirst, int kEnd>
  inline __attribute__((always_inline)) void fetch() const {
#pragma GCC unroll 32
    for (int i = 0; i < kLines; ++i)
#pragma GCC unroll 8
      for (int run = kFirst; run < kEnd; ++run) __builtin_prefetch(runs_[run] + at_ + i * kLine);
  }

  static const char* row_at(const char* const (&stripes)[kStripes], int64_t step, int64_t row) {
    return stripes[row / kStripe] + row % kStripe * step;
  }
  int64_t run_rows(int64_t step) const { return step == row_bytes_ ? kRunRows : 1; }
  // Not inline: the loops that fetch need their registers.
  __attribute__((noinline)) void begin_run() {
    const bool is_value = row_ < kTile;
    const int64_t step = is_value ? tile_.value_bytes : next_.key_bytes, rows = run_rows(step);
    for (int i = kTimes - 1; i > 0; --i) runs_[i] = runs_[i - 1];
    runs_[0] = row_at(is_value ? tile_.values : next_.keys, step, row_ % kTile);
    run_bytes_ = rows * row_bytes_;
    at_ = 0;
    row_ += rows;
  }

  const TileRows &tile_, &next_;
  const int64_t row_bytes_;
  const Memory memory_;
  const char* runs_[kTimes];        // the one that is asked for, and those before it
  int64_t at_ = 0, run_bytes_ = 0;  // how much of it is
  int64_t row_ = 0;                 // the first after it: of the tile's values, then of the next one's keys
};

}  // namespace STAFFETTA_ISA
