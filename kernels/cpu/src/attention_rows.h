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

// Fetches a tile's keys or values, a few lines at a time, while others are computed with: few query rows need bytes
// sooner than memory gives them, and memory gives most when it is asked at an even pace. Rows that touch are one run.
// A processor that waits for as much as it can forgets what else it is asked for, so each line is asked for once more,
// a run later; those of the last run by the fetcher that comes next, which is told where that run lies.
class Fetcher {
 public:
  Fetcher(const char* const (&stripes)[kStripes], int64_t row_step, int64_t row_bytes, const char* before)
      : stripes_(stripes),
        row_step_(row_step),
        runs_(row_step == row_bytes ? 1 : kStripe),
        run_bytes_(row_bytes * kStripe / runs_),
        begin_(before) {}
  // The next kLines lines, or none when all are fetched. A run's last may go beyond it.
  template <int kLines>
  inline __attribute__((always_inline)) void lines() {
    if (at_ >= end_ && !begin_run()) return;
#pragma GCC unroll 8
    for (int i = 0; i < kLines; ++i) {
      __builtin_prefetch(at_ + i * kLine);
      __builtin_prefetch(at_ + to_last_run_ + i * kLine);
    }
    at_ += kLines * kLine;
  }

 private:
  bool begin_run() {
    if (run_ == kStripes * runs_) return false;
    at_ = stripes_[run_ / runs_] + run_ % runs_ * row_step_;
    end_ = at_ + run_bytes_;
    to_last_run_ = begin_ - at_;
    begin_ = at_;
    ++run_;
    return true;
  }

  const char* const (&stripes_)[kStripes];
  int64_t row_step_, runs_, run_bytes_;        // runs of a stripe
  int64_t run_ = 0;                            // the next of the tile's
  const char* begin_;                          // of the one before it,
  const char *at_ = nullptr, *end_ = nullptr;  // what is left of that,
  int64_t to_last_run_ = 0;                    // and how far from it the one before that lies
};

}  // namespace STAFFETTA_ISA
