// Sixteen lanes in plain C++, for machines without FMA: slow, exact, the same bits. Contracts are in vec_avx512.h.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace STAFFETTA_ISA {

constexpr int kWidth = 16;
constexpr int kLinearRows = 4;
constexpr int kAttentionRows = 2;
struct Vec {
  float lane[kWidth];
};
struct IVec {
  int32_t lane[kWidth];
};

template <class Out, class F>
inline Out each(F f) {
  Out out;
  for (int i = 0; i < kWidth; ++i) out.lane[i] = f(i);
  return out;
}
inline int32_t bits_of(float x) {
  int32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline Vec zero() { return each<Vec>([](int) { return 0.0f; }); }
inline Vec splat(float x) { return each<Vec>([=](int) { return x; }); }
inline Vec load(const float* p) { return each<Vec>([=](int i) { return p[i]; }); }
inline void store(float* p, Vec x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline Vec add(Vec a, Vec b) { return each<Vec>([&](int i) { return a.lane[i] + b.lane[i]; }); }
inline Vec sub(Vec a, Vec b) { return each<Vec>([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline Vec mul(Vec a, Vec b) { return each<Vec>([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline Vec div(Vec a, Vec b) { return each<Vec>([&](int i) { return a.lane[i] / b.lane[i]; }); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return each<Vec>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
inline Vec max(Vec a, Vec b) {
  return each<Vec>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline Vec zero_below(Vec x, Vec gate, Vec limit) {
  return each<Vec>([&](int i) { return gate.lane[i] < limit.lane[i] ? 0.0f : x.lane[i]; });
}
inline Vec absolute(Vec x) { return each<Vec>([&](int i) { return std::fabs(x.lane[i]); }); }
inline Vec copy_sign(Vec a, Vec b) { return each<Vec>([&](int i) { return std::copysign(a.lane[i], b.lane[i]); }); }
inline Vec power_of_two(Vec t) {
  return each<Vec>([&](int i) { return float_of((static_cast<uint32_t>(bits_of(t.lane[i])) + 127u) << 23); });
}
inline float first(Vec x) { return x.lane[0]; }
template <int kDistance>
inline Vec exchange(Vec x) {
  return each<Vec>([&](int i) { return x.lane[i ^ kDistance]; });
}

inline IVec izero() { return each<IVec>([](int) { return 0; }); }
inline IVec isplat(int32_t x) { return each<IVec>([=](int) { return x; }); }
inline IVec iload(const void* p) {
  IVec x;
  std::memcpy(x.lane, p, sizeof x.lane);
  return x;
}
inline void istore(void* p, IVec x) { std::memcpy(p, x.lane, sizeof x.lane); }
inline IVec isub(IVec a, IVec b) { return each<IVec>([&](int i) { return a.lane[i] - b.lane[i]; }); }
inline IVec imul(IVec a, IVec b) { return each<IVec>([&](int i) { return a.lane[i] * b.lane[i]; }); }
inline IVec imax(IVec a, IVec b) {
  return each<IVec>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline IVec to_bits(Vec x) { return each<IVec>([&](int i) { return bits_of(x.lane[i]); }); }
inline Vec to_float(IVec x) { return each<Vec>([&](int i) { return static_cast<float>(x.lane[i]); }); }
inline IVec to_int(Vec x) {
  return each<IVec>([&](int i) { return static_cast<int32_t>(std::nearbyint(x.lane[i])); });
}
inline void store_bytes(void* p, IVec x) {
  for (int i = 0; i < kWidth; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(x.lane[i]);
}
inline IVec dot4(IVec sum, IVec a, IVec b) {
  return each<IVec>([&](int i) {
    uint8_t left[4];
    int8_t right[4];
    std::memcpy(left, &a.lane[i], 4);
    std::memcpy(right, &b.lane[i], 4);
    int32_t total = sum.lane[i];
    for (int j = 0; j < 4; ++j) total += left[j] * right[j];
    return total;
  });
}

inline Vec load_int8(const char* p) {
  return each<Vec>([=](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); });
}
inline Vec low_nibble(IVec x) {
  return each<Vec>([&](int i) { return static_cast<float>(((x.lane[i] & 15) ^ 8) - 8); });
}

inline IVec iadd(IVec a, IVec b) {
  return each<IVec>([&](int i) {
    return static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) + static_cast<uint32_t>(b.lane[i]));
  });
}
inline IVec xor3(IVec a, IVec b, IVec c) {
  return each<IVec>([&](int i) { return a.lane[i] ^ b.lane[i] ^ c.lane[i]; });
}
template <int kBits>
inline IVec shift_right(IVec x) {
  return each<IVec>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.lane[i]) >> kBits); });
}
inline IVec bits_of(Vec x) { return iload(x.lane); }
inline Vec from_bits(IVec x) {
  return each<Vec>([&](int i) { return float_of(static_cast<uint32_t>(x.lane[i])); });
}
inline IVec multiply_even(IVec a, IVec b) {
  return each<IVec>([&](int i) {
    const int even = i & ~1;
    const uint64_t left = static_cast<uint32_t>(a.lane[even]), product = left * static_cast<uint32_t>(b.lane[even]);
    return static_cast<int32_t>(static_cast<uint32_t>(product >> (32 * (i & 1))));
  });
}
inline IVec odd_to_even(IVec x) {
  return each<IVec>([&](int i) { return i & 1 ? 0 : x.lane[i + 1]; });
}
inline IVec interleave_even(IVec even, IVec odd) {
  return each<IVec>([&](int i) { return i & 1 ? odd.lane[i - 1] : even.lane[i]; });
}
inline IVec first_pairs(IVec a, IVec b) {
  return each<IVec>([&](int i) { return i & 2 ? b.lane[i - 2] : a.lane[i]; });
}
inline IVec second_pairs(IVec a, IVec b) {
  return each<IVec>([&](int i) { return i & 2 ? b.lane[i] : a.lane[i + 2]; });
}
inline uint32_t lanes_not_below(Vec a, Vec b) {
  uint32_t lanes = 0;
  for (int i = 0; i < kWidth; ++i) lanes |= static_cast<uint32_t>(!(a.lane[i] < b.lane[i])) << i;
  return lanes;
}

inline Vec low_half(IVec x) {
  return each<Vec>([&](int i) { return float_of(static_cast<uint32_t>(x.lane[i]) << 16); });
}
inline Vec high_half(IVec x) {
  return each<Vec>([&](int i) { return float_of(static_cast<uint32_t>(x.lane[i]) & 0xffff0000u); });
}
inline Vec load_bf16(const uint16_t* p) {
  return each<Vec>([=](int i) { return float_of(static_cast<uint32_t>(p[i]) << 16); });
}
inline void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < kWidth; ++i) {
    const uint32_t bits = static_cast<uint32_t>(bits_of(x.lane[i]));
    const uint32_t rounded = std::isnan(x.lane[i]) ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u);
    p[i] = static_cast<uint16_t>(rounded >> 16);
  }
}
inline Vec load_f16(const uint16_t* p) {
  return each<Vec>([=](int i) {
    _Float16 half;
    std::memcpy(&half, p + i, 2);
    return static_cast<float>(half);
  });
}
inline void store_f16(uint16_t* p, Vec x) {
  for (int i = 0; i < kWidth; ++i) {
    const _Float16 half = static_cast<_Float16>(x.lane[i]);
    std::memcpy(p + i, &half, 2);
  }
}

inline void transpose(const float* src, int64_t src_stride, float* dst, int64_t dst_stride) {
  for (int i = 0; i < kWidth; ++i)
    for (int j = 0; j < kWidth; ++j) std::memcpy(dst + j * dst_stride + i, src + i * src_stride + j, sizeof *dst);
}

}  // namespace STAFFETTA_ISA
