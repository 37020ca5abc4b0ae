// Scoring tokens, row by row: log-probabilities with the bits of log_softmax, and the likeliest tokens.
//
// A row comes from memory once; the sum has one tree, whatever is asked and whoever asks. Threads share out rows.
#pragma once
#include "choices.h"
#include "rows.h"

namespace STAFFETTA_ISA {

// The logarithm of the sum of e^(x - largest), by the tree of log_softmax. That is bound by arithmetic, so the memory
// fetches what this thread may score next meanwhile.
inline float log_of_sum(const Row& row, const float* next, int threads) {
  const int64_t tile = kTreeByThreads ? ceil_div(row.num_groups(), threads) : kVocabularyTile / kGroupTokens;
  float sum = 0;
  for (int64_t begin = 0; begin < row.num_groups(); begin += tile) {
    Vec lanes[kLaneVecs];
    for (auto& lane : lanes) lane = zero();
    for (int64_t group = begin; group < least(begin + tile, row.num_groups()); ++group) {
      for (int i = 0; i < kGroupTokens; i += 16) __builtin_prefetch(next + group * kGroupTokens + i, 0, 2);
      for (int v = 0; v < kLaneVecs; ++v)
        lanes[v] = add(lanes[v], exp(sub(load(row.groups[group] + v * kWidth), splat(row.largest))));
    }
    sum += fold_sum(lanes);
  }
  return log(sum);
}

// One row's log-probabilities: (x - maximum) - log of the sum. NaN for a row that is not finite.
inline void score_row(const ScoreArguments& call, int64_t item, int threads) {
  const auto* z = reinterpret_cast<const float*>(row_of(call.logits, call.rows[item]));
  const int64_t n = call.logits.columns, k = call.num_top;
  const SampleScratch scratch(n);
  if (!find_groups(z, n, scratch)) {
    call.logprobs[item] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const Row row{scratch.groups, scratch.maxima, n, largest_of(scratch.maxima, ceil_div(n, kGroupTokens)), 1.0f};
  const int64_t ahead = least(item + threads, call.num_rows - 1);
  const auto* next = reinterpret_cast<const float*>(row_of(call.logits, call.rows[ahead]));
  const float logarithm = log_of_sum(row, next, threads);
  const auto logprob = [&](float x) { return x - row.largest - logarithm; };
  call.logprobs[item] = logprob(z[call.targets[item]]);
  if (k == 0) return;
  // Different logits may have equal log-probabilities; then the lower id comes first, so the border is one of those.
  const float border = k <= row.num_groups() ? logprob(kth_maximum(row, k, scratch.ranked)) : kMinusInfinity;
  int64_t count = 0;
  for (int64_t group = 0; group < row.num_groups(); ++group) {
    if (logprob(row.maxima[group]) < border) continue;
    for (int64_t i = group * kGroupTokens; i < least((group + 1) * kGroupTokens, n); ++i)
      if (logprob(z[i]) >= border) scratch.candidates[count++] = {logprob(z[i]), static_cast<int32_t>(i)};
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
