// Drawing tokens, row by row: `kernels/sampling.py` says what comes out.
//
// What could depend on an order is exact: comparisons, random words, sums of integer weights. So what is skipped,
// because it provably cannot win, is never missed. Threads share out rows.
#pragma once
#include "choices.h"
#include "rows.h"

namespace STAFFETTA_ISA {

constexpr float kWeightOf1 = 1 << 30;
constexpr double kWeightless = -22.0;  // 2^30 e^-22 is less than half a unit

// Changes what was seen or is banned, in copies of the groups where that is; ids outside the row are passed over.
// Float32, in the order repetition, frequency, presence, ban.
class Adjustment {
 public:
  Adjustment(const float* logits, int64_t n, const SampleScratch& scratch)
      : logits_(logits), n_(n), scratch_(scratch), num_changed_(n % kGroupTokens ? 1 : 0) {
    std::memset(scratch.counts, 0, num_changed_ * kGroupTokens * sizeof(int32_t));
  }

  void apply(const Draw& draw, const int64_t* token_ids) {
    const int64_t* prompt = token_ids + draw.first_id;
    const int64_t *output = prompt + draw.num_prompt, *banned = output + draw.num_output;
    each(prompt, banned, [&](int64_t id, int64_t place) {
      const float z = logits_[id];
      scratch_.changed[place] = z > 0 ? z / draw.repetition : z * draw.repetition;
    });
    each(output, banned, [&](int64_t, int64_t place) { ++scratch_.counts[place]; });
    each(output, banned, [&](int64_t, int64_t place) {
      const int32_t count = std::exchange(scratch_.counts[place], 0);
      float& z = scratch_.changed[place];
      if (count) z = (z - draw.frequency * static_cast<float>(count)) - draw.presence;
    });
    each(banned, banned + draw.num_banned, [&](int64_t, int64_t place) { scratch_.changed[place] = kMinusInfinity; });
    for (int64_t i = 0; i < num_changed_; ++i)
      scratch_.maxima[scratch_.owners[i]] = largest_of_group(scratch_.changed + i * kGroupTokens);
  }

 private:
  // Calls f(id, place) for ids of the row; place is where the entry is in the changed groups.
  template <class F>
  void each(const int64_t* begin, const int64_t* end, F f) {
    for (const int64_t* id = begin; id < end; ++id)
      if (*id >= 0 && *id < n_) f(*id, group_of(*id / kGroupTokens) + *id % kGroupTokens);
  }
  int64_t group_of(int64_t group) {
    const float* x = scratch_.groups[group];
    if (x != logits_ + group * kGroupTokens) return x - scratch_.changed;
    const int64_t place = num_changed_ * kGroupTokens;
    scratch_.owners[num_changed_++] = static_cast<int32_t>(group);
    scratch_.groups[group] = scratch_.changed + place;
    std::memcpy(scratch_.changed + place, x, kGroupTokens * sizeof(float));
    std::memset(scratch_.counts + place, 0, kGroupTokens * sizeof(int32_t));
    return place;
  }

  const float* logits_;
  const int64_t n_;
  const SampleScratch& scratch_;
  int64_t num_changed_;
};

// A sum of integers below 2^31, lane by lane: of up to 2^16 of them the lower 32 bits, and the sum of their upper halves
// tell the whole.
struct WeightSum {
  IVec low = izero(), high = izero();

  void add(IVec weights) {
    low = iadd(low, weights);
    high = iadd(high, shift_right<16>(weights));
  }
  uint64_t total() const {
    uint32_t lows[kWidth], highs[kWidth];
    istore(lows, low);
    istore(highs, high);
    uint64_t sum = 0;
    for (int i = 0; i < kWidth; ++i) sum += (uint64_t{highs[i]} << 16) + static_cast<uint32_t>(lows[i] - (highs[i] << 16));
    return sum;
  }
};

// How much the tokens weigh that each of the cuts keeps, the first of which keeps the most. A token's weight is
// round(2^30 e^score).
template <int kCuts>
inline void weigh(const Row& row, const Cut (&cuts)[kCuts], uint64_t (&masses)[kCuts]) {
  constexpr int64_t kSpan = (1 << 16) / kLaneVecs;  // groups that a lane's sum may hold
  const auto weight_of = [&](Vec x) { return mul(exp(row.score(x)), splat(kWeightOf1)); };
  const float weighty = row.lowest_with(kWeightless), lowest = weighty > cuts[0].z ? weighty : cuts[0].z;
  for (auto& mass : masses) mass = 0;
  for (int64_t begin = 0; begin < row.num_groups(); begin += kSpan) {
    WeightSum sums[kCuts];
    for (int64_t group = begin; group < least(begin + kSpan, row.num_groups()); ++group) {
      if (row.maxima[group] < lowest) continue;
      // Of logits equal to the cut's, whole groups up to its id are kept.
      Vec limits[kCuts];
      for (int c = 0; c < kCuts; ++c)
        limits[c] = splat((group + 1) * kGroupTokens <= cuts[c].id + 1 ? cuts[c].z : above(cuts[c].z));
      for (int v = 0; v < kLaneVecs; ++v) {
        const Vec x = load(row.groups[group] + v * kWidth), weight = weight_of(x);
        for (int c = 0; c < kCuts; ++c) sums[c].add(to_int(zero_below(weight, x, limits[c])));
      }
    }
    for (int c = 0; c < kCuts; ++c) masses[c] += sums[c].total();
  }
  for (int c = 0; c < kCuts; ++c) {  // and of the group that the id is in, those before it
    const auto weight = static_cast<uint64_t>(first(to_float(to_int(weight_of(splat(cuts[c].z))))));
    for (int64_t token = (cuts[c].id + 1) / kGroupTokens * kGroupTokens; token <= cuts[c].id; ++token)
      if (row.at(token) == cuts[c].z) masses[c] += weight;
  }
}

// Looks for the token whose score and noise together are the most.
class Contest {
 public:
  // bounds: one for each group, padded to a multiple of 64.
  Contest(const Row& row, const Draw& draw, float* bounds) : row_(row), draw_(draw), noise_bound_(draw), bounds_(bounds) {
    for (int64_t group = 0; group < row.num_groups(); group += kLanes) {
      Vec noise[kLaneVecs];
      noise_bound_(group, kOfGroups, noise);
      for (int v = 0; v < kLaneVecs; ++v) {
        const int64_t i = group + v * kWidth;
        store(bounds + i, add(row.score(load(row.maxima + i)), add(noise[v], splat(kMostOfGroup))));
      }
    }
  }

  // The winner of those that are kept; of equals the lower id. The group that may have the most goes first, so that
  // few others have to be looked at.
  int64_t winner(const Cut& cut) {
    winner_ = row_.n;
    best_ = -std::numeric_limits<double>::infinity();
    to_beat_ = kMinusInfinity;
    float most = kMinusInfinity;
    int64_t promising = 0;
    each_group_reaching(cut, most, [&](int64_t group) {
      most = bounds_[group];
      promising = group;
    });
    look_into(promising, cut);
    each_group_reaching(cut, to_beat_, [&](int64_t group) {
      if (group != promising && bounds_[group] >= to_beat_) look_into(group, cut);
    });
    return winner_;
  }

 private:
  // Calls f for the groups with a bound not below `bound`, which f may raise, and an entry not below the cut.
  template <class F>
  void each_group_reaching(const Cut& cut, const float& bound, F f) const {
    for (int64_t i = 0; i < row_.num_groups(); i += kWidth) {
      uint32_t lanes = lanes_not_below(load(bounds_ + i), splat(bound));
      if (!lanes) continue;
      for (lanes &= lanes_not_below(load(row_.maxima + i), splat(cut.z)); lanes; lanes &= lanes - 1)
        if (const int64_t group = i + __builtin_ctz(lanes); !(bounds_[group] < bound)) f(group);
    }
  }

  void look_into(int64_t group, const Cut& cut) {
    const GroupNoise noise(draw_, group);
    consider(noise.holder, noise, cut);
    const Vec most = splat(static_cast<float>(noise.most()));
    Vec bounds[kLaneVecs];
    noise_bound_(group * kGroupTokens, kOfTokens, bounds);
    for (int v = 0; v < kLaneVecs; ++v) {
      const Vec x = load(row_.groups[group] + v * kWidth), score = row_.score(x), goal = splat(to_beat_);
      uint32_t lanes = lanes_not_below(add(score, bounds[v]), goal) & lanes_not_below(add(score, most), goal);
      for (lanes &= lanes_not_below(x, splat(cut.z)); lanes; lanes &= lanes - 1)
        consider(group * kGroupTokens + v * kWidth + __builtin_ctz(lanes), noise, cut);
    }
  }

  void consider(int64_t token, const GroupNoise& noise, const Cut& cut) {
    if (token >= row_.n || !cut.keeps(row_.at(token), token)) return;
    const double total = static_cast<double>(row_.score(row_.at(token))) + noise.of(draw_, token);
    if (!(total > best_ || (total == best_ && token < winner_))) return;
    best_ = total;
    winner_ = token;
    to_beat_ = static_cast<float>(best_) - 1e-3f;  // more than all roundings of the bounds together
  }

  const Row& row_;
  const Draw& draw_;
  const NoiseBound noise_bound_;
  const float* bounds_;
  double best_;
  float to_beat_;
  int64_t winner_;
};

// The winner of those that `cut` and the nucleus of the share p keep. Who wins among all that `cut` keeps has won, if
// what comes before it weighs less than the target; else the nucleus ends before it, and the others go on. Each time
// the winner is drawn by weight, so what comes before it halves on average.
inline int64_t draw_from_nucleus(const Row& row, Cut cut, double p, Contest& contest) {
  int64_t winner = contest.winner(cut);
  Cut before{row.at(winner), winner - 1};
  uint64_t masses[2];
  weigh<2>(row, {cut, before}, masses);
  const double target = p * static_cast<double>(masses[0]);
  for (uint64_t mass[1] = {masses[1]}; mass[0] > 0 && static_cast<double>(mass[0]) >= target;) {
    winner = contest.winner(before);
    before = {row.at(winner), winner - 1};
    weigh<1>(row, {before}, mass);
  }
  return winner;
}

// One token, or a DrawFailure.
inline int64_t draw_token(const float* logits, int64_t n, const Draw& draw, const int64_t* token_ids) {
  const SampleScratch scratch(n);
  if (!find_groups(logits, n, scratch)) return kNotFinite;
  if (draw.num_prompt + draw.num_output + draw.num_banned > 0) Adjustment(logits, n, scratch).apply(draw, token_ids);
  const Row row{scratch.groups, scratch.maxima, n, largest_of(scratch.maxima, ceil_div(n, kGroupTokens)),
                1.0f / draw.temperature};
  if (row.largest == kMinusInfinity) return kAllBanned;
  if (row.largest > kLargestFloat) return kNotFinite;
  if (row.rate > kLargestFloat) return likeliest(row);
  Cut cut{kMinusInfinity, n - 1};
  if (draw.top_k > 0 && draw.top_k < n) cut = cut_by_count(row, draw.top_k, scratch);
  Contest contest(row, draw, scratch.bounds);
  return draw.top_p < 1.0 ? draw_from_nucleus(row, cut, draw.top_p, contest) : contest.winner(cut);
}

// Draws tokens[d] as draws[d] says. Bytes: 4 draws vocabulary, from memory; where top-p filters, its weights' exp bounds it.
inline void sample(const Matrix& logits, const Draw* draws, int64_t num_draws, const int64_t* token_ids,
                   int64_t* tokens, int threads) {
  share_turns(threads_for(num_draws * logits.columns, threads), num_draws, [&](Turns& turns) {
    for (int64_t d; turns.take(d);) {
      const auto* row = reinterpret_cast<const float*>(row_of(logits, draws[d].row));
      tokens[d] = draw_token(row, logits.columns, draws[d], token_ids);
    }
  });
}

}  // namespace STAFFETTA_ISA
