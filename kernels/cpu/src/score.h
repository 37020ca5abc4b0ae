// Scoring tokens, row by row: log-probabilities with the bits of log_softmax, and the likeliest tokens.
//
// A row comes from memory once; the sum has one tree, whatever is asked and whoever asks. Threads share out rows.
#pragma once
#include "choices.h"
#include "rows.h"

namespace STAFFETTA_ISA {

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
  const SampleScratch scratch(n);
  if (!find_groups(z, n, scratch)) {
    call.logprobs[item] = std::numeric_limits<float>::quiet_NaN();
    return;
  }
  const Row row{scratch.groups, scratch.maxima, n, largest_of(scratch.maxima, ceil_div(n, kGroupTokens)), 1.0f};
  const float logarithm = log_of_sum(z, n, row.largest, threads);
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
