#include "select.h"

#include <algorithm>
#include <cmath>

namespace {

constexpr int64_t kSerialElements = 1 << 17;

const float* row_of(const Matrix& values, int64_t row) {
  return static_cast<const float*>(values.data) + row * values.row_stride;
}

int64_t argmax_row(const float* row, int64_t columns) {
  constexpr int64_t kTile = 256;  // finds the tile with plain maxima, which vectorise; then looks inside it
  float best = 0;
  int64_t index = -1;
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t end = std::min(begin + kTile, columns);
    float largest = row[begin];
    bool has_nan = false;
    for (int64_t i = begin; i < end; ++i) {
      largest = row[i] > largest ? row[i] : largest;
      has_nan |= row[i] != row[i];
    }
    if (has_nan) return std::find_if(row + begin, row + end, [](float x) { return x != x; }) - row;
    if (index >= 0 && !(largest > best)) continue;
    best = largest;
    index = std::find(row + begin, row + end, largest) - row;
  }
  return index;
}

void largest_of_row(const float* row, int64_t columns, int64_t count, int64_t* heap) {
  const auto before = [row](int64_t a, int64_t b) { return row[a] > row[b] || (row[a] == row[b] && a < b); };
  for (int64_t i = 0; i < count; ++i) heap[i] = i;
  std::make_heap(heap, heap + count, before);
  for (int64_t i = count; i < columns; ++i) {
    if (!before(i, heap[0])) continue;
    std::pop_heap(heap, heap + count, before);
    heap[count - 1] = i;
    std::push_heap(heap, heap + count, before);
  }
  std::sort_heap(heap, heap + count, before);
}

}  // namespace

void argmax(const Matrix& values, int64_t* indices, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && values.rows * values.columns > kSerialElements)
  for (int64_t r = 0; r < values.rows; ++r) indices[r] = argmax_row(row_of(values, r), values.columns);
}

void largest(const Matrix& values, int64_t count, int64_t* indices, int threads) {
  if (count < 1) return;
#pragma omp parallel for num_threads(threads) if (threads > 1 && values.rows * values.columns > kSerialElements)
  for (int64_t r = 0; r < values.rows; ++r)
    largest_of_row(row_of(values, r), values.columns, count, indices + r * count);
}
