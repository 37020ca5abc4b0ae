#include "pack.h"

#include "team.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace {

constexpr int64_t kPanel = 32;

int64_t padded(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

float value(const Matrix& weight, int64_t row, int64_t column) {
  const int64_t index = row * weight.row_stride + column;
  if (weight.dtype == kFloat32) return static_cast<const float*>(weight.data)[index];
  const uint16_t half = static_cast<const uint16_t*>(weight.data)[index];
  if (weight.dtype == kFloat16) {
    _Float16 x;
    std::memcpy(&x, &half, 2);
    return static_cast<float>(x);
  }
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Inputs that all outputs of a panel are packed of before the next ones: their part of a panel stays in the first cache.
constexpr int64_t kTile = 64;

void pack_float32(const Matrix& weight, int64_t output, int64_t begin, int64_t end, float* panel) {
  const bool is_real = output < weight.rows;
  for (int64_t k = begin; k < end; ++k) panel[k * kPanel + output % kPanel] = is_real ? value(weight, output, k) : 0.0f;
}

// `begin` is even.
void pack_bfloat16(const Matrix& weight, int64_t output, int64_t begin, int64_t end, uint16_t* panel) {
  const uint16_t* row = static_cast<const uint16_t*>(weight.data) + output * weight.row_stride;
  const bool is_real = output < weight.rows;
  for (int64_t k = begin; k < end; k += 2) {
    uint16_t* pair = panel + (k / 2 * kPanel + output % kPanel) * 2;
    pair[1] = is_real ? row[k] : 0;
    pair[0] = is_real && k + 1 < end ? row[k + 1] : 0;
  }
}

// Calls `pack_part(output, begin, end)` for each tile of each output of a panel.
template <class PackPart>
void for_each_tile(const Matrix& weight, int64_t panel, PackPart pack_part) {
  for (int64_t begin = 0; begin < weight.columns; begin += kTile)
    for (int64_t output = panel * kPanel; output < (panel + 1) * kPanel; ++output)
      pack_part(output, begin, std::min(begin + kTile, weight.columns));
}

int8_t& int8_place(int8_t* panel, int64_t output, int64_t k) {
  return panel[(k / 4 * kPanel + output % kPanel) * 4 + k % 4];
}

void copy_int8(const Matrix& weight, int64_t output, int8_t* panel, int32_t* sum) {
  const int8_t* row = static_cast<const int8_t*>(weight.data) + output * weight.row_stride;
  const bool is_real = output < weight.rows;
  *sum = 0;
  for (int64_t k = 0; k < padded(weight.columns, 4); ++k) {
    const int8_t q = is_real && k < weight.columns ? row[k] : 0;
    int8_place(panel, output, k) = q;
    *sum += q;
  }
}

// `begin` of this and the next is a multiple of eight.
void copy_int8_only(const Matrix& weight, int64_t output, int64_t begin, int64_t end, int8_t* panel) {
  const int8_t* row = static_cast<const int8_t*>(weight.data) + output * weight.row_stride;
  const bool is_real = output < weight.rows;
  for (int64_t k = begin; k < padded(end, 4); ++k)
    panel[k * kPanel + output % kPanel] = is_real && k < end ? row[k] : 0;
}

void copy_int4(const Matrix& weight, int64_t output, int64_t begin, int64_t end, uint32_t* panel) {
  const int8_t* row = static_cast<const int8_t*>(weight.data) + output * weight.row_stride;
  const bool is_real = output < weight.rows;
  for (int64_t k = begin; k < end; k += 8) {
    uint32_t word = 0;
    for (int64_t i = 0; is_real && i < std::min<int64_t>(8, end - k); ++i)
      word |= static_cast<uint32_t>(row[k + i] & 15) << (i % 2 ? 2 * i - 2 : 2 * i + 16);
    panel[k / 8 * kPanel + output % kPanel] = word;
  }
}

void pack_int8(const Matrix& weight, int64_t output, int8_t* panel, float* scale, int32_t* sum) {
  const bool is_real = output < weight.rows;
  float largest = 0;
  for (int64_t k = 0; is_real && k < weight.columns; ++k) largest = std::fmax(largest, std::fabs(value(weight, output, k)));
  const float factor = largest > 0 ? 127.0f / largest : 0.0f;
  *scale = largest / 127.0f;
  *sum = 0;
  for (int64_t k = 0; k < padded(weight.columns, 4); ++k) {
    const bool is_weight = is_real && k < weight.columns;
    const int q = is_weight ? static_cast<int>(std::nearbyint(value(weight, output, k) * factor)) : 0;
    int8_place(panel, output, k) = static_cast<int8_t>(q);
    *sum += q;
  }
}

}  // namespace

int64_t packed_bytes(int32_t kind, int64_t outputs, int64_t inputs) {
  const int64_t rows = padded(outputs, kPanel);
  if (kind == kWeightInt8 || kind == kWeightInt8Only) return rows * padded(inputs, 4);
  if (kind == kWeightInt4) return rows * padded(inputs, 8) / 2;
  return kind == kWeightBfloat16 ? rows * padded(inputs, 2) * 2 : rows * inputs * 4;
}

void pack(int32_t kind, const Matrix& weight, void* panels, float* scales, int32_t* sums, int threads) {
  const int64_t panel_bytes = packed_bytes(kind, kPanel, weight.columns);
  share_loop(threads, padded(weight.rows, kPanel) / kPanel, [&](int64_t panel) {
    char* to = static_cast<char*>(panels) + panel * panel_bytes;
    if (kind == kWeightFloat32) {
      for_each_tile(weight, panel, [&](int64_t output, int64_t begin, int64_t end) {
        pack_float32(weight, output, begin, end, reinterpret_cast<float*>(to));
      });
    } else if (kind == kWeightBfloat16) {
      for_each_tile(weight, panel, [&](int64_t output, int64_t begin, int64_t end) {
        pack_bfloat16(weight, output, begin, end, reinterpret_cast<uint16_t*>(to));
      });
    } else if (kind == kWeightInt8Only) {
      for_each_tile(weight, panel, [&](int64_t output, int64_t begin, int64_t end) {
        copy_int8_only(weight, output, begin, end, reinterpret_cast<int8_t*>(to));
      });
    } else if (kind == kWeightInt4) {
      for_each_tile(weight, panel, [&](int64_t output, int64_t begin, int64_t end) {
        copy_int4(weight, output, begin, end, reinterpret_cast<uint32_t*>(to));
      });
    } else {
      for (int64_t output = panel * kPanel; output < (panel + 1) * kPanel; ++output) {
        if (weight.dtype == kInt8)
          copy_int8(weight, output, reinterpret_cast<int8_t*>(to), sums + output);
        else
          pack_int8(weight, output, reinterpret_cast<int8_t*>(to), scales + output, sums + output);
      }
    }
  });
}
