// A row of logits to choose from, in groups of 64, and which of its tokens a filter by count keeps.
//
// A row comes from memory once. The first pass finds the largest of every group; later ones find the row in the cache
// and skip groups by it. Nothing here depends on an order: only comparisons decide.
#pragma once
#include <algorithm>
#include <utility>

#include "noise.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargestFloat = std::numeric_limits<float>::max();

// The smallest float that is larger than x, which is not NaN; of infinity, NaN.
inline float above(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  bits = x == 0 ? 1 : bits < 0 ? bits - 1 : bits + 1;
  std::memcpy(&x, &bits, 4);
  return x;
}

// A row, after penalties and bans: its groups are the caller's memory or, where something had to change, scratch. The
// last one is padded with -inf.
struct Row {
  const float* const* groups;
  const float* maxima;  // of each group; beyond the last, -inf up to a multiple of 64
  int64_t n;
  float largest, rate;  // rate: 1 / temperature

  int64_t num_groups() const { return ceil_div(n, kGroupTokens); }
  float at(int64_t token) const { return groups[token / kGroupTokens][token % kGroupTokens]; }
  float score(float x) const { return (x - largest) * rate; }
  Vec score(Vec x) const { return mul(sub(x, splat(largest)), splat(rate)); }
  // A logit so low that every one below it has a lower score than `bound`.
  float lowest_with(double bound) const {
    const double x = largest + bound / rate;
    return static_cast<float>(x - (__builtin_fabs(largest) + __builtin_fabs(x)) * 1e-6);
  }
};

// The last token that is kept, in the order of falling logits and, of equals, rising ids.
struct Cut {
  float z;
  int64_t id;
  bool keeps(float x, int64_t token) const { return x > z || (x == z && token <= id); }
};

struct Candidate {
  float value;
  int32_t id;
};
struct Before {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  }
};
inline void put_in_order(Candidate* begin, Candidate* end) {
  if (!std::is_sorted(begin, end, Before{})) std::sort(begin, end, Before{});  // many equals come in order
}

// One thread's scratch for a row of n entries. Floats that stand for groups are padded to a multiple of 64.
struct SampleScratch {
  const float** groups;
  float *maxima, *bounds, *ranked;
  float* changed;         // groups that are not the caller's, in the order of `owners`
  int32_t* owners;        // which group each of them is
  Candidate* candidates;  // n of them, or
  int32_t* counts;        // one for each entry of `changed`

  explicit SampleScratch(int64_t n) {
    const int64_t num_groups = ceil_div(n, kGroupTokens), padded = ceil_div(num_groups, kLanes) * kLanes;
    const int64_t entries = num_groups * kGroupTokens, bytes = padded * sizeof(float);
    char* place = static_cast<char*>(
        workspace(Scratch::kPrivate, 6 * bytes + entries * (sizeof(float) + sizeof(Candidate))));
    const auto take = [&](int64_t size) { return std::exchange(place, place + size); };
    groups = reinterpret_cast<const float**>(take(2 * bytes));
    maxima = reinterpret_cast<float*>(take(bytes));
    bounds = reinterpret_cast<float*>(take(bytes));
    ranked = reinterpret_cast<float*>(take(bytes));
    owners = reinterpret_cast<int32_t*>(take(bytes));
    changed = reinterpret_cast<float*>(take(entries * sizeof(float)));
    candidates = reinterpret_cast<Candidate*>(place);
    counts = reinterpret_cast<int32_t*>(place);
  }
};

// Calls f(begin, x) for every group that has an entry not below `lowest`.
template <class F>
inline void each_group_from(const Row& row, float lowest, F f) {
  for (int64_t group = 0; group < row.num_groups(); ++group)
    if (!(row.maxima[group] < lowest)) f(group * kGroupTokens, row.groups[group]);
}

// A bit for each of 64 entries that is not below `bound`.
inline uint64_t entries_from(float bound, const float* x) {
  uint64_t entries = 0;
  for (int v = 0; v < kLaneVecs; ++v)
    entries |= static_cast<uint64_t>(lanes_not_below(load(x + v * kWidth), splat(bound))) << v * kWidth;
  return entries;
}

inline float largest_of_group(const float* x) {
  Vec lanes[kLaneVecs];
  for (int v = 0; v < kLaneVecs; ++v) lanes[v] = load(x + v * kWidth);
  return fold_max(lanes);
}

// Finds the groups of a row and the largest of each. Returns whether all entries are finite. Bytes: 4 n, from memory.
inline bool find_groups(const float* z, int64_t n, const SampleScratch& scratch) {
  Vec trouble[kLaneVecs];  // becomes NaN by an entry that is not finite
  for (auto& lane : trouble) lane = zero();
  const auto look = [&](int64_t group, const float* x) {
    for (int v = 0; v < kLaneVecs; ++v) trouble[v] = fma(load(x + v * kWidth), zero(), trouble[v]);
    scratch.groups[group] = x;
    scratch.maxima[group] = largest_of_group(x);
  };
  const int64_t whole = n / kGroupTokens, rest = n % kGroupTokens;
  for (int64_t group = 0; group < whole; ++group) look(group, z + group * kGroupTokens);
  if (rest) {
    scratch.owners[0] = static_cast<int32_t>(whole);
    for (int64_t i = 0; i < kGroupTokens; ++i) scratch.changed[i] = z[whole * kGroupTokens + least(i, rest - 1)];
    look(whole, scratch.changed);
    for (int64_t i = rest; i < kGroupTokens; ++i) scratch.changed[i] = kMinusInfinity;
  }
  for (int64_t group = ceil_div(n, kGroupTokens); group % kLanes; ++group) scratch.maxima[group] = kMinusInfinity;
  return fold_sum(trouble) == 0.0f;
}

inline float largest_of(const float* maxima, int64_t num_groups) {
  Vec lanes[kLaneVecs];
  for (auto& lane : lanes) lane = splat(kMinusInfinity);
  for (int64_t i = 0; i < num_groups; i += kLanes)
    for (int v = 0; v < kLaneVecs; ++v) lanes[v] = max(load(maxima + i + v * kWidth), lanes[v]);
  return fold_max(lanes);
}

// The id of the row's largest entry, the lowest of equals.
inline int64_t likeliest(const Row& row) {
  int64_t token = 0;
  while (row.maxima[token / kGroupTokens] != row.largest) token += kGroupTokens;
  while (row.at(token) != row.largest) ++token;
  return token;
}

// The k-th largest of the groups' maxima, 1 <= k <= groups: k entries at least are not below it. A quarter as many
// maxima, of four groups each, serve a small k as well.
inline float kth_maximum(const Row& row, int64_t k, float* ranked) {
  const int64_t quarter = ceil_div(row.num_groups(), 4), count = k <= quarter ? quarter : row.num_groups();
  std::memcpy(ranked, row.maxima, count * sizeof(float));
  for (int64_t i = count; i < row.num_groups(); ++i)
    ranked[i % count] = row.maxima[i] > ranked[i % count] ? row.maxima[i] : ranked[i % count];
  std::nth_element(ranked, ranked + k - 1, ranked + count, [](float a, float b) { return a > b; });
  return ranked[k - 1];
}

inline int64_t count_from(const Row& row, float lowest) {
  int64_t count = 0;
  each_group_from(row, lowest,
                  [&](int64_t, const float* x) { count += __builtin_popcountll(entries_from(lowest, x)); });
  return count;
}

// A logit that k entries at least are not below, and, unless there are many equals, not many more. k < n; without so
// many finite entries, the lowest float.
inline float bound_of_count(const Row& row, int64_t k, float* ranked) {
  if (k <= row.num_groups()) return kth_maximum(row, k, ranked);
  float high = row.largest, low = kth_maximum(row, row.num_groups(), ranked);
  for (float step = high - low; count_from(row, low) < k; step *= 2) {
    if (!(low - step > -kLargestFloat && step > 0)) return -kLargestFloat;
    high = low;
    low -= step;
  }
  if (low < -kLargestFloat) return -kLargestFloat;
  for (int turn = 0; turn < 24; ++turn) {
    const float middle = low / 2 + high / 2;
    if (!(low < middle && middle < high)) break;
    const int64_t count = count_from(row, middle);
    (count < k ? high : low) = middle;
    if (count >= k && count <= k + k / 4) break;
  }
  return low;
}

// Keeps the k largest. 1 <= k < n.
inline Cut cut_by_count(const Row& row, int64_t k, const SampleScratch& scratch) {
  const float lowest = bound_of_count(row, k, scratch.ranked);
  int64_t count = 0;
  each_group_from(row, lowest, [&](int64_t begin, const float* x) {
    for (uint64_t entries = entries_from(lowest, x); entries; entries &= entries - 1) {
      const int i = __builtin_ctzll(entries);
      scratch.candidates[count++] = {x[i], static_cast<int32_t>(begin + i)};
    }
  });
  if (count < k) return {kMinusInfinity, row.n - 1};  // what else is kept is banned
  Candidate* last = scratch.candidates + k - 1;
  std::nth_element(scratch.candidates, last, scratch.candidates + count, Before{});
  return {last->value, last->id};
}

}  // namespace STAFFETTA_ISA
