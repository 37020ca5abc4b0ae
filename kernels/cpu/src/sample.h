// Drawing and scoring tokens, row by row: `kernels/sampling.py` says what comes out.
//
// A row comes from memory once. The first pass finds the largest of every tile; later ones find the row in the cache
// and skip tiles by it. What could depend on an order is exact: comparisons, random words, sums of integer weights; a
// log-sum-exp has one tree. So what is skipped, because it provably cannot win, is never missed. Threads share out
// rows.
#pragma once
#include <algorithm>

#include "noise.h"
#include "rows.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int64_t kSelectTile = 256;
constexpr int kBuckets = 2048;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargestFloat = std::numeric_limits<float>::max();
constexpr float kWeightOf1 = 1 << 30;
constexpr double kWeightless = -22.0;  // 2^30 e^-22 is less than half a unit

// A row to choose from, after penalties and bans.
struct Row {
  const float* z;
  int64_t n;
  const float* maxima;  // of each tile
  float largest, rate;  // rate: 1 / temperature

  int64_t num_tiles() const { return ceil_div(n, kSelectTile); }
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
  uint32_t weight;
};
struct Before {
  bool operator()(const Candidate& a, const Candidate& b) const {
    return a.value > b.value || (a.value == b.value && a.id < b.id);
  }
};
inline void put_in_order(Candidate* begin, Candidate* end) {
  if (!std::is_sorted(begin, end, Before{})) std::sort(begin, end, Before{});  // many equals come in order
}

// One thread's scratch for a row of n entries.
struct SampleScratch {
  float *copy, *maxima, *ranked;
  Candidate* candidates;  // at least n and `least_candidates`

  SampleScratch(int64_t n, int64_t least_candidates) {
    const int64_t tiles = ceil_div(n, kSelectTile), floats = n + 2 * tiles;
    const int64_t bytes = floats * sizeof(float) + most(n, least_candidates) * sizeof(Candidate);
    copy = static_cast<float*>(workspace(Scratch::kPrivate, bytes));
    maxima = copy + n;
    ranked = maxima + tiles;
    candidates = reinterpret_cast<Candidate*>(ranked + tiles);
  }
};

// Calls f(begin, x) for every 64 entries of [from, to); beyond the row's end they are `padding`.
template <class F>
inline void each_group(const float* z, int64_t n, int64_t from, int64_t to, float padding, F& f) {
  for (int64_t i = from; i < to; i += kLanes) {
    if (i + kLanes <= n) {
      f(i, z + i);
      continue;
    }
    float tail[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) tail[j] = i + j < n ? z[i + j] : padding;
    f(i, tail);
  }
}

// The same for the tiles that have an entry not below `lowest`, which f may raise on the way. Padded with -inf.
template <class F>
inline void each_group_from(const Row& row, const float& lowest, F f) {
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
    if (row.maxima[tile] < lowest) continue;
    each_group(row.z, row.n, tile * kSelectTile, least((tile + 1) * kSelectTile, row.n), kMinusInfinity, f);
  }
}

// A bit for each of 64 entries that is not below `bound`.
inline uint64_t entries_from(float bound, const float* x) {
  uint64_t entries = 0;
  for (int v = 0; v < kLaneVecs; ++v)
    entries |= static_cast<uint64_t>(lanes_not_below(load(x + v * kWidth), splat(bound))) << v * kWidth;
  return entries;
}

// Finds the largest of each tile. Returns whether all entries are finite. Bytes: 4 n, from memory.
inline bool find_maxima(const float* z, int64_t n, float* maxima) {
  Vec trouble[kLaneVecs];  // becomes NaN by an entry that is not finite
  for (auto& lane : trouble) lane = zero();
  for (int64_t begin = 0; begin < n; begin += kSelectTile) {
    Vec lanes[kLaneVecs];
    for (auto& lane : lanes) lane = splat(kMinusInfinity);
    auto visit = [&](int64_t, const float* x) {
      for (int v = 0; v < kLaneVecs; ++v) {
        const Vec value = load(x + v * kWidth);
        lanes[v] = max(value, lanes[v]);
        trouble[v] = fma(value, zero(), trouble[v]);
      }
    };
    each_group(z, n, begin, least(begin + kSelectTile, n), z[n - 1], visit);
    maxima[begin / kSelectTile] = fold_max(lanes);
  }
  return fold_sum(trouble) == 0.0f;
}

inline float largest_of(const float* maxima, int64_t count) {
  float largest = kMinusInfinity;
  for (int64_t i = 0; i < count; ++i) largest = maxima[i] > largest ? maxima[i] : largest;
  return largest;
}

// The id of the row's largest entry, the lowest of equals.
inline int64_t likeliest(const Row& row) {
  int64_t tile = 0;
  while (row.maxima[tile] != row.largest) ++tile;
  int64_t i = tile * kSelectTile;
  while (row.z[i] != row.largest) ++i;
  return i;
}

// The k-th largest of the tiles' maxima, which k entries at least are not below; a guess, below all maxima, where there
// are fewer tiles than that. k >= 1.
inline float kth_maximum(const Row& row, int64_t k, float* ranked) {
  const int64_t tiles = row.num_tiles();
  if (k <= tiles) {
    std::memcpy(ranked, row.maxima, tiles * sizeof(float));
    std::nth_element(ranked, ranked + k - 1, ranked + tiles, [](float a, float b) { return a > b; });
    return ranked[k - 1];
  }
  float smallest = row.largest;
  for (int64_t tile = 0; tile < tiles; ++tile) smallest = row.maxima[tile] < smallest ? row.maxima[tile] : smallest;
  return smallest - 3 * (row.largest - smallest);
}

// Copies the row and changes what was seen or is banned; ids outside the row are passed over. Float32, in the order
// repetition, frequency, presence, ban.
inline void adjust(const float* logits, int64_t n, const Draw& draw, const int64_t* token_ids, float* copy,
                   Candidate* seen) {
  const auto is_token = [n](int64_t id) { return id >= 0 && id < n; };
  std::memcpy(copy, logits, n * sizeof(float));
  const int64_t* ids = token_ids + draw.first_id;
  for (const int64_t* id = ids; id < ids + draw.num_prompt + draw.num_output; ++id)
    if (is_token(*id)) copy[*id] = logits[*id] > 0 ? logits[*id] / draw.repetition : logits[*id] * draw.repetition;
  ids += draw.num_prompt;
  int64_t count = 0;
  for (const int64_t* id = ids; id < ids + draw.num_output; ++id)
    if (is_token(*id)) seen[count++] = {0.0f, static_cast<int32_t>(*id), 1};
  std::sort(seen, seen + count, Before{});
  for (int64_t i = 0, end; i < count; i = end) {
    for (end = i + 1; end < count && seen[end].id == seen[i].id;) ++end;
    float& z = copy[seen[i].id];
    z = (z - draw.frequency * static_cast<float>(end - i)) - draw.presence;
  }
  for (const int64_t* id = ids + draw.num_output; id < ids + draw.num_output + draw.num_banned; ++id)
    if (is_token(*id)) copy[*id] = kMinusInfinity;
}

// The candidate, in order, at which the weights reach `target`, counted from `reached` on; the last when they never do.
inline Cut select(Candidate* begin, Candidate* end, uint64_t reached, double target) {
  while (end - begin > 32) {
    Candidate* middle = begin + (end - begin) / 2;
    std::nth_element(begin, middle, end, Before{});
    uint64_t mass = 0;
    for (const Candidate* c = begin; c < middle; ++c) mass += c->weight;
    if (static_cast<double>(reached + mass) >= target) {
      end = middle;
    } else {
      reached += mass;
      begin = middle;
    }
  }
  std::sort(begin, end, Before{});
  for (; begin < end - 1; ++begin) {
    reached += begin->weight;
    if (static_cast<double>(reached) >= target) break;
  }
  return {begin->value, begin->id};
}

// From which logits on a cut looks: tiles with none from `lowest` on weigh nothing, and the target is reached at a
// logit that is not below `reaching`.
struct Range {
  float lowest, reaching;
};

// Where the weights of the tokens that `within` keeps, in order, reach target(their total); all that weigh
// anything are kept when they never do. weigh(z) is not negative and below 2^31; it is rounded. Tokens fall into
// buckets by their logit, which is exact because it only orders them; the bucket that reaches the target is searched.
template <class Weigh, class Target>
inline Cut cut_where(const Row& row, const Range& range, const Cut& within, Weigh weigh, Target target_of,
                     Candidate* candidates) {
  const float wide = row.largest - range.reaching, width = wide < kLargestFloat ? wide : kLargestFloat;
  const float scale = width > kBuckets / kLargestFloat ? (kBuckets - 1) / width : kLargestFloat;
  const auto weight_of = [&](Vec z) { return to_int(zero_below(weigh(z), z, splat(within.z))); };
  const auto bucket_of = [&](Vec z) {  // rises as z falls
    const Vec place = mul(sub(splat(row.largest), z), splat(scale));
    return to_int(sub(zero(), max(sub(zero(), place), splat(-kBuckets))));
  };
  alignas(64) int32_t weights[kLanes], buckets[kLanes];
  uint64_t mass[kBuckets + 1] = {}, total = 0, reached = 0;
  each_group_from(row, range.lowest, [&](int64_t begin, const float* x) {
    for (int v = 0; v < kLaneVecs; ++v) istore(weights + v * kWidth, weight_of(load(x + v * kWidth)));
    for (int64_t i = most(0, within.id + 1 - begin); i < kLanes; ++i)
      if (x[i] == within.z) weights[i] = 0;
    for (int i = 0; i < kLanes; ++i) total += static_cast<uint32_t>(weights[i]);
    uint64_t counted = entries_from(range.reaching, x);
    if (!counted) return;
    for (int v = 0; v < kLaneVecs; ++v) istore(buckets + v * kWidth, bucket_of(load(x + v * kWidth)));
    if (__builtin_popcountll(counted) > kLanes / 2) {  // those that need not be counted do no harm
      for (int i = 0; i < kLanes; ++i) mass[buckets[i]] += static_cast<uint32_t>(weights[i]);
    } else {
      for (; counted; counted &= counted - 1) {
        const int i = __builtin_ctzll(counted);
        mass[buckets[i]] += static_cast<uint32_t>(weights[i]);
      }
    }
  });
  const double target = target_of(static_cast<double>(total));
  int bucket = 0;
  while (bucket < kBuckets && static_cast<double>(reached + mass[bucket]) < target) reached += mass[bucket++];

  // What may be in the bucket is found by two comparisons; what is, by the bucket itself.
  const double reach = (bucket + 1) / static_cast<double>(scale), slack = (__builtin_fabs(row.largest) + reach) * 1e-6;
  const float low = bucket < kBuckets ? static_cast<float>(row.largest - reach - slack) : kMinusInfinity;
  const float high =
      bucket ? static_cast<float>(row.largest - (bucket - 1) / static_cast<double>(scale) + slack) : kInfinity;
  int64_t count = 0;
  each_group_from(row, low > range.lowest ? low : range.lowest, [&](int64_t begin, const float* x) {
    for (uint64_t members = entries_from(low, x) & ~entries_from(high, x); members; members &= members - 1) {
      const int i = __builtin_ctzll(members);
      if (first(to_float(bucket_of(splat(x[i])))) != bucket || !within.keeps(x[i], begin + i)) continue;
      const float weight = first(to_float(weight_of(splat(x[i]))));  // exact: no more than 24 bits are set
      if (weight > 0) candidates[count++] = {x[i], static_cast<int32_t>(begin + i), static_cast<uint32_t>(weight)};
    }
  });
  return count ? select(candidates, candidates + count, reached, target) : Cut{kMinusInfinity, row.n};
}

// Keeps the k largest.
inline Cut cut_by_count(const Row& row, int64_t k, const SampleScratch& scratch) {
  const auto weigh = [](Vec z) { return zero_below(splat(1.0f), z, splat(-kLargestFloat)); };
  const auto target = [k](double) { return static_cast<double>(k); };
  const float lowest = kth_maximum(row, k, scratch.ranked);
  return cut_where(row, {lowest, lowest}, {kMinusInfinity, row.n}, weigh, target, scratch.candidates);
}

// Keeps the fewest, of those that `within` keeps, whose weights, 2^30 e^score, reach the share p of the total.
inline Cut cut_by_weight(const Row& row, double p, const Cut& within, const SampleScratch& scratch) {
  const auto weigh = [&](Vec z) { return mul(exp(row.score(z)), splat(kWeightOf1)); };
  // n tokens of a weight up to (1 - p) total / n are together no more than what may be cut, so the last one that is
  // kept has more. The tiles' maxima alone weigh no more than the total.
  double least_total = 0;
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile)
    if (row.maxima[tile] > within.z) least_total += first(weigh(splat(row.maxima[tile])));
  const double share = (1.0 - p) * least_total / static_cast<double>(row.n) - 1.0;
  const float weighty = row.lowest_with(kWeightless), lowest = weighty > within.z ? weighty : within.z;
  const float reaching = share > 1.0 ? row.lowest_with(log(share / kWeightOf1) - 1e-3) : lowest;
  const Range range{lowest, reaching > lowest ? reaching : lowest};
  const auto target = [p](double total) { return p * total; };
  return cut_where(row, range, within, weigh, target, scratch.candidates);
}

// The token whose score and noise together are the most, of those that are kept; of equals the lower id.
inline int64_t draw_with_noise(const Row& row, const Cut& cut, const Draw& draw) {
  int64_t winner = likeliest(row);
  double best = gumbel(draw, static_cast<uint32_t>(winner));
  const NoiseBound noise_bound(draw);
  float lowest, to_beat;
  const auto raise = [&] {
    const float reaching = row.lowest_with(best - kMostNoise);
    lowest = reaching > cut.z ? reaching : cut.z;
    to_beat = static_cast<float>(best) - 1e-3f;  // more than all roundings of the bounds together
  };
  raise();
  each_group_from(row, lowest, [&](int64_t begin, const float* x) {
    uint32_t lanes[kLaneVecs], any = 0;
    for (int v = 0; v < kLaneVecs; ++v) {
      lanes[v] = lanes_not_below(load(x + v * kWidth), splat(lowest));
      any |= lanes[v];
    }
    if (!any) return;
    Vec bounds[kLaneVecs];
    noise_bound(begin, bounds);
    for (int v = 0; v < kLaneVecs; ++v) {
      const Vec hope = add(row.score(load(x + v * kWidth)), bounds[v]);
      uint32_t could_win = lanes[v] & lanes_not_below(hope, splat(to_beat));
      for (; could_win; could_win &= could_win - 1) {
        const int64_t i = v * kWidth + __builtin_ctz(could_win), token = begin + i;
        if (token >= row.n || !cut.keeps(x[i], token)) continue;
        const double total = static_cast<double>(row.score(x[i])) + gumbel(draw, static_cast<uint32_t>(token));
        if (!(total > best || (total == best && token < winner))) continue;
        best = total;
        winner = token;
        raise();
      }
    }
  });
  return winner;
}

// One token, or a DrawFailure.
inline int64_t draw_token(const float* logits, int64_t n, const Draw& draw, const int64_t* token_ids) {
  const SampleScratch scratch(n, draw.num_output);
  if (!find_maxima(logits, n, scratch.maxima)) return kNotFinite;
  Row row{logits, n, scratch.maxima, 0.0f, 1.0f / draw.temperature};
  if (draw.num_prompt + draw.num_output + draw.num_banned > 0) {
    adjust(logits, n, draw, token_ids, scratch.copy, scratch.candidates);
    find_maxima(scratch.copy, n, scratch.maxima);
    row.z = scratch.copy;
  }
  row.largest = largest_of(row.maxima, row.num_tiles());
  if (row.largest == kMinusInfinity) return kAllBanned;
  if (row.largest > kLargestFloat) return kNotFinite;
  if (row.rate > kLargestFloat) return likeliest(row);
  Cut cut{kMinusInfinity, n};
  if (draw.top_k > 0 && draw.top_k < n) cut = cut_by_count(row, draw.top_k, scratch);
  if (draw.top_p < 1.0) cut = cut_by_weight(row, draw.top_p, cut, scratch);
  return draw_with_noise(row, cut, draw);
}

// Draws tokens[d] as draws[d] says. Bytes: 4 draws vocabulary, from memory; Philox bounds it where nothing is filtered.
inline void sample(const Matrix& logits, const Draw* draws, int64_t num_draws, const int64_t* token_ids,
                   int64_t* tokens, int threads) {
  share_turns(threads_for(num_draws * logits.columns, threads), num_draws, [&](Turns& turns) {
    for (int64_t d; turns.take(d);) {
      const auto* row = reinterpret_cast<const float*>(row_of(logits, draws[d].row));
      tokens[d] = draw_token(row, logits.columns, draws[d], token_ids);
    }
  });
}

// The logarithm of the sum of e^(x - maximum), by the tree of log_softmax.
inline float log_of_sum(const float* z, int64_t n, float maximum, int threads) {
  const int64_t tile = kTreeByThreads ? ceil_div(n, threads) : kVocabularyTile;
  const auto accumulate = [=](Vec total, Vec x) { return add(total, exp(sub(x, splat(maximum)))); };
  float sum = 0;
  for (int64_t begin = 0; begin < n; begin += tile) {
    const int64_t count = least(tile, n - begin), whole = count / kLanes * kLanes;
    if (whole == count) {
      sum += sum_lanes(z + begin, count, accumulate, 1);
      continue;
    }
    float* padded = static_cast<float*>(workspace(Scratch::kShared, (whole + kLanes) * sizeof(float)));
    std::memcpy(padded, z + begin, count * sizeof(float));
    for (int64_t i = count; i < whole + kLanes; ++i) padded[i] = kMinusInfinity;
    sum += sum_lanes(padded, whole + kLanes, accumulate, 1);
  }
  return log(sum);
}

// One row's log-probabilities: (x - maximum) - log of the sum. NaN for a row that is not finite.
inline void score_row(const ScoreArguments& call, int64_t item, int threads) {
  const auto* z = reinterpret_cast<const float*>(row_of(call.logits, call.rows[item]));
  const int64_t n = call.logits.columns, k = call.num_top;
  const SampleScratch scratch(n, 0);
  if (!find_maxima(z, n, scratch.maxima)) {
    call.logprobs[item] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const Row row{z, n, scratch.maxima, largest_of(scratch.maxima, ceil_div(n, kSelectTile)), 1.0f};
  const float logarithm = log_of_sum(z, n, row.largest, threads);
  const auto logprob = [&](float x) { return x - row.largest - logarithm; };
  call.logprobs[item] = logprob(z[call.targets[item]]);
  if (k == 0) return;
  // Different logits may have equal log-probabilities; then the lower id comes first, so the border is one of those.
  const float lowest = kth_maximum(row, k, scratch.ranked);
  const float border = k <= row.num_tiles() ? logprob(lowest) : kMinusInfinity;
  int64_t count = 0;
  for (int64_t tile = 0; tile < row.num_tiles(); ++tile) {
    if (logprob(row.maxima[tile]) < border) continue;
    for (int64_t i = tile * kSelectTile; i < least((tile + 1) * kSelectTile, n); ++i)
      if (logprob(z[i]) >= border) scratch.candidates[count++] = {logprob(z[i]), static_cast<int32_t>(i), 0};
  }
  put_in_order(scratch.candidates, scratch.candidates + count);
  for (int64_t i = 0; i < k; ++i) {
    call.top_ids[item * k + i] = scratch.candidates[i].id;
    call.top_logprobs[item * k + i] = scratch.candidates[i].value;
  }
}

// Bytes: 4 rows vocabulary, from memory.
inline void score_tokens(const ScoreArguments& call, int threads) {
  share_turns(threads_for(call.num_rows * call.logits.columns, threads), call.num_rows, [&](Turns& turns) {
    for (int64_t item; turns.take(item);) score_row(call, item, threads);
  });
}

}  // namespace STAFFETTA_ISA
