// A linear layer of whose outputs only the largest of each row counts: those that may be it, and the least number that is
// finite for the others.
//
// A copy of the weights in int8 takes half the bytes or less, and bounds every output: what it gives differs from the
// output by at most the output's `errors` times the length of x (Cauchy and Schwarz), which covers what the copy's
// rounding left and what sums in float32 may lose on both sides. An output whose upper bound is below the greatest lower
// bound is not the largest. The panels that are left, a few of a thousand as a rule, are computed as in any other call,
// so their bits are the same. Where the bounds rule out too little, all are computed.
// Bytes: N K, and 32 K b for each panel that is left, instead of N K b.
#pragma once
#include <algorithm>

#include "linear.h"
#include "rows.h"

namespace STAFFETTA_ISA {

constexpr int64_t kMostScreenedRows = 4;  // more would need many panels between them, and read few weights for each
constexpr int64_t kSkippedPerLeft = 3;    // panels that must be ruled out for each that is left, or all are computed
// What sums may lose that take subnormal numbers as 0, beside a row whose length is within these.
constexpr float kLostBySubnormals = 1e-30f, kShortest = 0x1p-40f, kLongest = 0x1p50f;

constexpr float kRuledOut = -std::numeric_limits<float>::max();

// A bit more than the length of a row; NaN or infinity where the row has one.
inline float length_of_row(const Matrix& x, int64_t row, int threads) {
  const int64_t n = x.columns;
  float* values = static_cast<float*>(workspace(Scratch::kPrivate, ceil_div(n, kLanes) * kLanes * sizeof(float)));
  widen(x.dtype, row_of(x, row), n, values);
  const float squares = sum_lanes(values, n, [](Vec total, Vec v) { return fma(v, v, total); }, threads);
  return 1.001f * square_root(squares);
}

// Calls f(panel, values, margins) for each vector of a row of coarse outputs; beyond the last one values are -inf.
template <class F>
void each_bounded(const Matrix& coarse, int64_t row, const float* errors, float length, F f) {
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
        fma(load(errors + begin + v), splat(length), splat(kLostBySubnormals)));
  }
}

// Marks the panels in which a row's largest output may be. Returns whether the bounds hold for it.
inline bool mark_panels(const Matrix& x, const Matrix& coarse, int64_t row, const float* errors, char* marks,
                        int threads) {
  const float length = length_of_row(x, row, threads);
  if (!(length >= kShortest && length <= kLongest)) return false;
  Vec lower = splat(kMinusInfinity);
  each_bounded(coarse, row, errors, length,
               [&](int64_t, Vec values, Vec margins) { lower = max(sub(values, margins), lower); });
  float lanes[kWidth];
  store(lanes, lower);
  const Vec greatest = splat(*std::max_element(lanes, lanes + kWidth));
  each_bounded(coarse, row, errors, length, [&](int64_t panel, Vec values, Vec margins) {
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

// Whether it is done; otherwise out is as good as uninitialized.
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
  if (num_left * (kSkippedPerLeft + 1) > num_panels) return false;
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

// out: [rows, N], float32.
inline void largest(const PackedWeight& w, const Screen& screen, const Matrix& x, const Matrix& out, int threads) {
  if (x.rows == 0 || x.rows > kMostScreenedRows || !compute_largest(w, screen, x, out, threads))
    linear(w, x, Matrix{}, out, threads);
}

}  // namespace STAFFETTA_ISA
