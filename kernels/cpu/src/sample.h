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

// How much a token weighs: round(2^30 e^score). Exact sums, whatever the order: of up to 2^16 integers below 2^31 the
// lower 32 bits, and the sum of their upper halves, tell the whole.
class ExactWeights {
 public:
  static Vec of(Vec score) { return mul(exp(score), splat(kWeightOf1)); }
  void add(Vec weights) {
    low_ = iadd(low_, to_int(weights));
    high_ = iadd(high_, shift_right<16>(to_int(weights)));
  }
  double total() const {
    uint32_t low[kWidth], high[kWidth];
    istore(low, low_);
    istore(high, high_);
    uint64_t sum = 0;
    for (int i = 0; i < kWidth; ++i)
      sum += (uint64_t{high[i]} << 16) + static_cast<uint32_t>(low[i] - (high[i] << 16));
    return static_cast<double>(sum);
  }

 private:
  IVec low_ = izero(), high_ = izero();
};

// The same in units of 2^30, within kRoughness, for a quarter of the work. The bits of a float are its logarithm,
// roughly: 2^23 (127 + t), taken as bits, is a float between 2^t and 1.0615 x 2^t. Schraudolph 1999, "A Fast, Compact
// Approximation of the Exponential Function".
class RoughWeights {
 public:
  static constexpr double kRoughness = 1.065;  // with the roundings of sums of 2^12 terms
  static Vec of(Vec score) {
    constexpr float kOne = 1 << 23;
    return from_bits(to_int(max(fma(score, splat(1.44269504f * kOne), splat(127 * kOne)), splat(kOne))));
  }
  void add(Vec weights) { sum_ = STAFFETTA_ISA::add(sum_, weights); }
  double total() const {
    float sums[kWidth];
    store(sums, sum_);
    double sum = 0;
    for (const float lane : sums) sum += lane;
    return sum;
  }

 private:
  Vec sum_ = zero();
};

// What a cut keeps, as the least logit at each place of a group.
class Limits {
 public:
  explicit Limits(const Cut& cut) : cut_group_(cut.id >= 0 ? cut.id / kGroupTokens : -1) {
    for (int64_t i = 0; i < kGroupTokens; ++i) {
      before_[i] = cut.z;
      after_[i] = above(cut.z);
      there_[i] = cut_group_ * kGroupTokens + i <= cut.id ? cut.z : above(cut.z);
    }
  }
  const float* in(int64_t group) const {
    return group < cut_group_ ? before_ : group == cut_group_ ? there_ : after_;
  }

 private:
  const int64_t cut_group_;
  float before_[kGroupTokens], there_[kGroupTokens], after_[kGroupTokens];
};

// The weights of the tokens that a cut keeps, and of those that only a wider one does.
struct Masses {
  double kept, rest;
};

template <class Weights>
inline Masses weigh(const Row& row, const Cut& wider, const Cut& cut) {
  constexpr int64_t kSpan = (1 << 12) / kLaneVecs;  // groups that are summed together
  const Limits wider_limits(wider), limits(cut);
  const float weighty = row.lowest_with(kWeightless), lowest = weighty > wider.z ? weighty : wider.z;
  Masses masses{0, 0};
  for (int64_t begin = 0; begin < row.num_groups(); begin += kSpan) {
    Weights kept, rest;
    for (int64_t group = begin; group < least(begin + kSpan, row.num_groups()); ++group) {
      if (row.maxima[group] < lowest) continue;
      const float *x = row.groups[group], *least_wider = wider_limits.in(group), *least = limits.in(group);
      for (int v = 0; v < kLanes; v += kWidth) {
        const Vec z = load(x + v), weights = zero_below(Weights::of(row.score(z)), z, load(least_wider + v));
        const Vec within = zero_below(weights, z, load(least + v));
        kept.add(within);
        rest.add(sub(weights, within));
      }
    }
    masses.kept += kept.total();
    masses.rest += rest.total();
  }
  return masses;
}

// Whether the tokens that `cut` keeps weigh the share p of all that `all` keeps, or more. kept, rest: what these and
// the others weigh roughly.
inline bool reaches(const Row& row, double p, const Cut& all, const Cut& cut, double kept, double rest) {
  const double unit = static_cast<double>(row.n) / kWeightOf1;  // more than is lost by rounding to whole weights
  constexpr double kLess = 1 / RoughWeights::kRoughness, kMore = 1.001;
  if ((1 - p) * (kLess * kept - unit) > p * (kMore * rest + unit)) return true;
  if ((1 - p) * (kMore * kept + unit) < p * (kLess * rest - unit)) return false;
  const Masses exact = weigh<ExactWeights>(row, all, cut);
  return exact.kept >= p * (exact.kept + exact.rest);
}

// Looks for the token whose score and noise together are the most.
class Contest {
 public:
  // bounds: one for each group, padded to a multiple of 64.
  Contest(const Row& row, const Draw& draw, float* bounds)
      : row_(row), draw_(draw), noise_bound_(draw), bounds_(bounds) {
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

// The winner of those that `all` and the nucleus of the share p keep. Who wins among all has won, if what comes before
// it weighs less than that share; else the nucleus ends before it, and the others go on. A winner is drawn by weight,
// so what comes before it halves each time, on average.
inline int64_t draw_from_nucleus(const Row& row, const Cut& all, double p, Contest& contest) {
  double rest = 0;
  for (Cut cut = all;;) {
    const int64_t winner = contest.winner(cut);
    if (row.at(winner) == row.largest && winner == likeliest(row)) return winner;
    const Cut before{row.at(winner), winner - 1};
    const Masses masses = weigh<RoughWeights>(row, cut, before);
    rest += masses.rest;
    if (!reaches(row, p, all, before, masses.kept, rest)) return winner;
    cut = before;
  }
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

// Draws tokens[d] as draws[d] says. Bytes: 4 draws vocabulary, from memory, which bound all but top-p.
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
