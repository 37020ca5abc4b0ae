// A linear layer, out[m, n] = sum over k of x[m, k] w[n, k], of which only the largest output of each row counts: those
// that may be it, and for the others a number that cannot be.
//
// A copy of the weights in int8 takes half the bytes or less, and bounds every output: what it gives differs from the
// output by at most the output's `errors` times the norm of x, see kernels/cpu/screening.py. An output whose upper bound
// is below the greatest lower bound is not the largest. The panels that are left, a few of a thousand as a rule, are
// computed as in any other call, so their bits are the same. Where that rules out too little, all are computed, and some
// of the next calls do not ask the copy. FLOPs: 2 M N K, and as many as linear.h's for each panel that is left. Bytes: N K,
// and 32 K b for each panel, instead of N K b.
#pragma once
#include <algorithm>
#include <atomic>

#include "linear.h"
#include "rows.h"

namespace STAFFETTA_ISA {

constexpr int64_t kMostScreenedRows = 4;  // more would need many panels between them, and read few weights for each
constexpr int64_t kSkippedPerLeft = 3;    // panels that must be ruled out for each that is left, or all are computed
constexpr int32_t kCallsUnasked = 64;     // after one in which the copy ruled out too little
constexpr float kShortest = 0x1p-40f, kLongest = 0x1p50f;  // norms of rows for which errors are bounds
constexpr float kRuledOut = -std::numeric_limits<float>::max();

// NaN or infinity where the row has one.
inline float norm_of_row(const Matrix& x, int64_t row, int threads) {
  const int64_t n = x.columns;
  float* values = static_cast<float*>(workspace(Scratch::kPrivate, ceil_div(n, kLanes) * kLanes * sizeof(float)));
  widen(x.dtype, row_of(x, row), n, values);
  return square_root(sum_lanes(values, n, [](Vec total, Vec v) { return fma(v, v, total); }, threads));
}

// Calls f(panel, values, margins) for each vector of a row of coarse outputs; beyond the last one values are -inf.
template <class F>
void each_bounded(const Matrix& coarse, int64_t row, const float* errors, float norm, F f) {
  const float* outputs = reinterpret_cast<const float*>(row_of(coarse, row));
  for (int64_t begin = 0; begin < coarse.columns; begin += kPanel) {
    const int64_t columns = least(kPanel, coarse.columns - begin);
    float part[kPanel];
    if (columns < kPanel) {
      std::fill(part + columns, part + kPanel, kMinusInfinity);
      std::memcpy(part, outputs + begin, columns * sizeof(float));
    }
    for (int v = 0; v < kPanel; v += kWidth)
      f(begin / kPanel, load((columns < kPanel ? part : outputs + begin) + v),
        mul(load(errors + begin + v), splat(norm)));
  }
}

// Marks the panels in which a row's largest output may be. Returns whether the bounds hold for it.
inline bool mark_panels(const Matrix& x, const Matrix& coarse, int64_t row, const float* errors, char* marks,
                        int threads) {
  const float norm = norm_of_row(x, row, threads);
  if (!(norm >= kShortest && norm <= kLongest)) return false;
  Vec lower = splat(kMinusInfinity);
  each_bounded(coarse, row, errors, norm,
               [&](int64_t, Vec values, Vec margins) { lower = max(sub(values, margins), lower); });
  float lanes[kWidth];
  store(lanes, lower);
  const Vec greatest = splat(*std::max_element(lanes, lanes + kWidth));
  each_bounded(coarse, row, errors, norm, [&](int64_t panel, Vec values, Vec margins) {
    if (lanes_not_below(add(values, margins), greatest)) marks[panel] = 1;
  });
  return true;
}

// Puts a number that cannot be the largest into the columns of panels that are not marked.
inline void rule_out(const Matrix& out, const char* marks) {
  for (int64_t row = 0; row < out.rows; ++row) {
    float* outputs = reinterpret_cast<float*>(row_of(out, row));
    for (int64_t begin = 0; begin < out.columns; begin += kPanel)
      if (!marks[begin / kPanel])
        std::fill(outputs + begin, outputs + least(begin + kPanel, out.columns), kRuledOut);
  }
}

// Whether it is done; otherwise out is as good as uninitialized. Rows are few enough to be one block.
inline bool compute_largest(const PackedWeight& w, const Screen& screen, const Matrix& x, const Matrix& out,
                            int threads) {
  linear(screen.coarse, x, Matrix{}, out, threads);
  const int64_t num_panels = ceil_div(out.columns, kPanel);
  char* marks = static_cast<char*>(workspace(Scratch::kMarks, num_panels * (sizeof(int64_t) + 1)));
  int64_t* left = reinterpret_cast<int64_t*>(marks), num_left = 0;
  marks += num_panels * sizeof(int64_t);
  std::memset(marks, 0, num_panels);
  for (int64_t row = 0; row < x.rows; ++row)
    if (!mark_panels(x, out, row, screen.errors, marks, threads)) return false;
  for (int64_t panel = 0; panel < num_panels; ++panel)
    if (marks[panel]) left[num_left++] = panel;
  if (num_left * (kSkippedPerLeft + 1) > num_panels) {
    screen.num_unasked->store(kCallsUnasked, std::memory_order_relaxed);
    return false;
  }
  const Matrix no_residual{};
  with_weights(w, x.dtype, [&](auto weights) {
    LinearCall call = plan<decltype(weights)>(w, x, no_residual, out);
    pack_rows<decltype(weights)>(call, threads);
    compute_tiles<decltype(weights)>(call, num_left, 1, threads, [&](int64_t turn) {
      return Tile{0, left[turn], left[turn] + 1};
    });
  });
  rule_out(out, marks);
  return true;
}

// Whether the copy is to be asked; not for a while after it was asked in vain.
inline bool is_worth_asking(const Screen& screen) {
  const int32_t num_left = screen.num_unasked->load(std::memory_order_relaxed);
  if (num_left > 0) screen.num_unasked->store(num_left - 1, std::memory_order_relaxed);
  return num_left <= 0;
}

// out: [rows, N], float32.
inline void largest(const PackedWeight& w, const Screen& screen, const Matrix& x, const Matrix& out, int threads) {
  const bool is_asked = x.rows > 0 && x.rows <= kMostScreenedRows && is_worth_asking(screen);
  if (!is_asked || !compute_largest(w, screen, x, out, threads)) linear(w, x, Matrix{}, out, threads);
}

}  // namespace STAFFETTA_ISA
