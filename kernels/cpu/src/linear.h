// out[m, n] = epilogue(sum over k of x[m, k] w[n, k]).
//
// Order: each element is one chain of fused multiply-adds over k ascending in float32, whatever M, N, threads or cache
// blocks are: a block of K loads the sums that the block before it stored. With int8 the sums are exact integers.
// Epilogue, in this order: int8 scales (row, then output), bias, silu(gate) up, residual; then one rounding.
//
// Weights lie in panels of 32 outputs x K (see pack.cpp), read once per block of rows; rows are packed in strips of
// [K][rows], so that the inner loop reads both ends to end. FLOPs: 2 M N K. Bytes: N K per weight byte, which bound it
// while M is below the machine's FLOPs per byte; beyond, the sums in registers do: kLinearRows x 32.
// Blocking after Goto and van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", section 4.
#pragma once
#include <cstddef>

#include "numeric.h"
#include "rules.h"
#include "workspace.h"

namespace STAFFETTA_ISA {

constexpr int kPanel = 32;
constexpr int kPanelVecs = kPanel / kWidth;
constexpr int64_t kBlockStrips = 384 / kLinearRows;   // rows of a block: their part of K stays in the second cache
constexpr int64_t kGroupPanels = 8;                   // panels that one thread takes at once, at most
constexpr int64_t kSerialWork = int64_t{1} << 18;     // multiply-adds that are not worth waking a thread for

// A strip is [steps][rows] of four bytes: one float, or four unsigned bytes.
struct Float32Weights {
  using Sum = Vec;
  static constexpr int kStepInputs = 1;
  static constexpr int64_t kStepBytes = kPanel * 4;
  static constexpr int64_t kBlockSteps = 256;
  template <int kRows>
  static inline __attribute__((always_inline)) void accumulate(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                               const char* panel, int64_t steps) {
    chain<kRows, kPanelVecs, 1>(sums, reinterpret_cast<const float*>(strip), kRows,
                                reinterpret_cast<const float*>(panel), kPanel, 0, steps);
  }
};

// Lane i of a step's 16 holds outputs i (low half) and 16 + i (high half): one load, one shift, one mask.
struct Bfloat16Weights {
  using Sum = Vec;
  static constexpr int kStepInputs = 1;
  static constexpr int64_t kStepBytes = kPanel * 2;
  static constexpr int64_t kBlockSteps = 384;
  template <int kRows>
  static inline __attribute__((always_inline)) void accumulate(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                               const char* panel, int64_t steps) {
    const float* left = reinterpret_cast<const float*>(strip);
    for (int64_t k = 0; k < steps; ++k, left += kRows, panel += kStepBytes) {
      Vec right[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs / 2; ++v) {
        const IVec pair = iload(panel + v * kWidth * 4);
        right[v] = low_half(pair);
        right[v + kPanelVecs / 2] = high_half(pair);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec value = splat(left[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = fma(value, right[v], sums[r][v]);
      }
    }
  }
};

// A step is four inputs: x + 128 as unsigned bytes against weights as signed ones.
struct Int8Weights {
  using Sum = IVec;
  static constexpr int kStepInputs = 4;
  static constexpr int64_t kStepBytes = kPanel * 4;
  static constexpr int64_t kBlockSteps = 256;
  template <int kRows>
  static inline __attribute__((always_inline)) void accumulate(Sum (&sums)[kRows][kPanelVecs], const char* strip,
                                                               const char* panel, int64_t steps) {
    for (int64_t k = 0; k < steps; ++k, strip += kRows * 4, panel += kStepBytes) {
      IVec right[kPanelVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVecs; ++v) right[v] = iload(panel + v * kWidth * 4);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        std::memcpy(&four, strip + r * 4, 4);
        const IVec value = isplat(four);
#pragma GCC unroll 4
        for (int v = 0; v < kPanelVecs; ++v) sums[r][v] = dot4(sums[r][v], value, right[v]);
      }
    }
  }
};

inline Vec sum_zero(Vec) { return zero(); }
inline IVec sum_zero(IVec) { return izero(); }
inline Vec sum_load(const char* p, Vec) { return load(reinterpret_cast<const float*>(p)); }
inline IVec sum_load(const char* p, IVec) { return iload(p); }
inline void sum_store(char* p, Vec x) { store(reinterpret_cast<float*>(p), x); }
inline void sum_store(char* p, IVec x) { istore(p, x); }
inline Vec plus(Vec a, Vec b) { return add(a, b); }
inline IVec plus(IVec a, IVec) { return a; }

// One call: what is the same for every panel and strip.
struct LinearCall {
  const PackedWeight& w;
  const Matrix &x, &residual, &out;
  char* strips;        // [rows][steps] of four bytes, strip after strip
  float* row_scales;   // [rows], int8 alone
  int64_t steps, num_strips, num_panels;

  int64_t strip_begin(int64_t strip) const { return strip * x.rows / num_strips; }
  int64_t panel_columns() const { return w.gated ? kPanel / 2 : kPanel; }
};

// Writes [begin, end) of x as a strip, in the type of the weights' other factor.
template <class Weights>
void pack_strip(const LinearCall& call, int64_t strip, float* row) {
  const int64_t begin = call.strip_begin(strip), rows = call.strip_begin(strip + 1) - begin;
  char* to = call.strips + begin * call.steps * 4;
  for (int64_t r = 0; r < rows; ++r) {
    widen(call.x.dtype, row_of(call.x, begin + r), call.x.columns, row);
    float* values = reinterpret_cast<float*>(to) + r;
    for (int64_t k = 0; k < call.x.columns; ++k) values[k * rows] = row[k];
  }
}

// max |x|, or NaN where there is one: it must reach the result. n is padded to whole vectors with zeros.
inline float largest_magnitude(const float* x, int64_t n) {
  Vec largest = zero(), spoilt = zero();
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec values = load(x + i);
    largest = max(absolute(values), largest);
    spoilt = fma(values, zero(), spoilt);  // NaN or infinity times 0 is NaN
  }
  float lanes[kWidth], sum[kWidth], result = 0;
  store(lanes, largest);
  store(sum, spoilt);
  for (int i = 0; i < kWidth; ++i) {
    if (sum[i] != sum[i]) return sum[i];
    result = lanes[i] > result ? lanes[i] : result;
  }
  return result;
}

// Symmetric, per row: scale = max |x| / 127, q = round(x 127 / max |x|), stored as q + 128; a row of zeros has scale 0.
template <>
inline void pack_strip<Int8Weights>(const LinearCall& call, int64_t strip, float* row) {
  const int64_t begin = call.strip_begin(strip), rows = call.strip_begin(strip + 1) - begin, inputs = call.x.columns;
  const int64_t padded = ceil_div(call.steps * 4, kWidth) * kWidth;
  const auto load_row = [&](int64_t m) {
    widen(call.x.dtype, row_of(call.x, m), inputs, row);
    for (int64_t k = inputs; k < padded; ++k) row[k] = 0;
    return largest_magnitude(row, padded);
  };
  float batch_largest = 0;
  for (int64_t m = 0; kScalePerBatch && m < call.x.rows; ++m) {
    const float largest = load_row(m);
    batch_largest = largest > batch_largest ? largest : batch_largest;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float row_largest = load_row(begin + r), largest = kScalePerBatch ? batch_largest : row_largest;
    call.row_scales[begin + r] = largest / 127.0f;
    const Vec factor = splat(largest > 0 ? 127.0f / largest : 0.0f);
    char* to = call.strips + (begin * call.steps + r) * 4;
    for (int64_t k = 0; k < padded; k += kWidth) {
      int32_t rounded[kWidth];
      istore(rounded, to_int(mul(load(row + k), factor)));
      for (int64_t step = k / 4; step < least(k / 4 + kWidth / 4, call.steps); ++step)
        for (int i = 0; i < 4; ++i) to[step * rows * 4 + i] = static_cast<char>(rounded[step * 4 - k + i] + 128);
    }
  }
}

inline void scaled(const LinearCall&, int64_t, int64_t, Vec sum, float* to) { store(to, sum); }
inline void scaled(const LinearCall& call, int64_t row, int64_t output, IVec sum, float* to) {
  const IVec offset = imul(isplat(128), iload(call.w.sums + output));
  store(to, mul(mul(to_float(isub(sum, offset)), splat(call.row_scales[row])), load(call.w.scales + output)));
}

// The epilogue of one row of a panel's sums.
template <class Sum>
inline void finish(const LinearCall& call, int64_t row, int64_t panel, const Sum (&sums)[kPanelVecs]) {
  alignas(64) float values[kPanel], added[kPanel] = {};
  const int64_t begin = panel * call.panel_columns();
  const int64_t columns = least(call.panel_columns(), call.out.columns - begin);
  for (int v = 0; v < kPanelVecs; ++v) {
    scaled(call, row, panel * kPanel + v * kWidth, sums[v], values + v * kWidth);
    if (call.w.bias)
      store(values + v * kWidth, add(load(values + v * kWidth), load(call.w.bias + panel * kPanel + v * kWidth)));
  }
  if (call.w.gated)
    for (int i = 0; i < kPanel / 2; i += kWidth)
      store(values + i, mul(silu(load(values + i)), load(values + kPanel / 2 + i)));
  if (call.residual.data) {
    widen(call.residual.dtype, row_of(call.residual, row) + begin * element_bytes(call.residual.dtype), columns, added);
    for (int v = 0; v < kPanelVecs; ++v)
      store(values + v * kWidth, add(load(values + v * kWidth), load(added + v * kWidth)));
  }
  narrow(call.out.dtype, values, columns, row_of(call.out, row) + begin * element_bytes(call.out.dtype));
}

// Sums of all rows for panels [first, last). carry holds them between blocks of K: [panels][rows of a block][32].
template <class Weights>
void compute_panels(const LinearCall& call, int64_t first, int64_t last, char* carry) {
  using Sum = typename Weights::Sum;
  const int64_t block_steps = call.num_strips == 1 ? call.steps : Weights::kBlockSteps;
  for (int64_t block = 0; block < call.num_strips; block += kBlockStrips) {
    const int64_t block_end = least(block + kBlockStrips, call.num_strips);
    const int64_t block_begin_row = call.strip_begin(block), block_rows = call.strip_begin(block_end) - block_begin_row;
    for (int64_t k = 0; k < call.steps; k += block_steps) {
      const int64_t steps = least(block_steps, call.steps - k);
      const bool is_first = k == 0, is_last = k + steps == call.steps;
      for (int64_t panel = first; panel < last; ++panel) {
        const char* weights = static_cast<const char*>(call.w.panels) + (panel * call.steps + k) * Weights::kStepBytes;
        for (int64_t strip = block; strip < block_end; ++strip) {
          const int64_t row = call.strip_begin(strip), rows = call.strip_begin(strip + 1) - row;
          const char* values = call.strips + (row * call.steps + k * rows) * 4;
          char* carried = carry + ((panel - first) * block_rows + row - block_begin_row) * kPanel * 4;
          with_rows<kLinearRows>(rows, [&](auto count) {
            constexpr int kRows = decltype(count)::value;
            Sum sums[kRows][kPanelVecs];
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
              for (int v = 0; v < kPanelVecs; ++v)
                sums[r][v] = is_first || kSplitKByRows ? sum_zero(Sum{})
                                                       : sum_load(carried + (r * kPanel + v * kWidth) * 4, Sum{});
            Weights::template accumulate<kRows>(sums, values, weights, steps);
            if (kSplitKByRows && !is_first)
              for (int r = 0; r < kRows; ++r)
                for (int v = 0; v < kPanelVecs; ++v)
                  sums[r][v] = plus(sums[r][v], sum_load(carried + (r * kPanel + v * kWidth) * 4, Sum{}));
            if (is_last) {
              for (int r = 0; r < kRows; ++r) finish(call, row + r, panel, sums[r]);
              return;
            }
#pragma GCC unroll 16
            for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
              for (int v = 0; v < kPanelVecs; ++v) sum_store(carried + (r * kPanel + v * kWidth) * 4, sums[r][v]);
          });
        }
      }
    }
  }
}

template <class Weights>
void run_linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  LinearCall call{w, x, residual, out, nullptr, nullptr, 0, 0, 0};
  call.steps = ceil_div(w.inputs, Weights::kStepInputs);
  call.num_strips = ceil_div(x.rows, kLinearRows);
  call.num_panels = ceil_div(out.columns, call.panel_columns());
  const size_t strip_bytes = static_cast<size_t>(x.rows) * call.steps * 4;
  call.strips = static_cast<char*>(workspace(Scratch::kShared, strip_bytes + x.rows * sizeof(float)));
  call.row_scales = reinterpret_cast<float*>(call.strips + strip_bytes);
  const int64_t group = most(1, least(kGroupPanels, call.num_panels / (threads * 4)));
  const int64_t block_rows = least(x.rows, kBlockStrips * kLinearRows);
  const size_t carry_bytes = static_cast<size_t>(group * block_rows * kPanel) * 4;
  const size_t row_bytes = (static_cast<size_t>(call.steps) * 4 + 2 * kWidth) * sizeof(float);
  const bool is_small = x.rows * w.inputs * out.columns < kSerialWork;
#pragma omp parallel num_threads(threads) if (threads > 1 && !is_small)
  {
    char* scratch = static_cast<char*>(workspace(Scratch::kPrivate, row_bytes > carry_bytes ? row_bytes : carry_bytes));
#pragma omp for schedule(static)
    for (int64_t strip = 0; strip < call.num_strips; ++strip)
      pack_strip<Weights>(call, strip, reinterpret_cast<float*>(scratch));
#pragma omp for schedule(dynamic, 1)
    for (int64_t first = 0; first < call.num_panels; first += group)
      compute_panels<Weights>(call, first, least(first + group, call.num_panels), scratch);
  }
}

inline void linear(const PackedWeight& w, const Matrix& x, const Matrix& residual, const Matrix& out, int threads) {
  switch (w.kind) {
    case kWeightInt8: return run_linear<Int8Weights>(w, x, residual, out, threads);
    case kWeightBfloat16: return run_linear<Bfloat16Weights>(w, x, residual, out, threads);
    default: return run_linear<Float32Weights>(w, x, residual, out, threads);
  }
}

}  // namespace STAFFETTA_ISA
