// Philox4x32-10 and the Gumbel noise made of it: a token's noise is a function of seed, token, position and choice.
// Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3 and table 2.
//
// Noise is -ln of an exponential variate. One number says what the least is of the variates of a group of 64 tokens,
// and thereby bounds their noise from above; where that bound could win, a number of each token says what it has more.
// Both are looked at in two steps: words of 64 at a time bound them, only where the bound could win they are computed,
// from a word more and in double precision. `kernels/philox.py` says why that is Gumbel noise.
#pragma once
#include "numeric.h"

namespace STAFFETTA_ISA {

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u}, kKeyIncrements[2] = {0x9E3779B9u, 0xBB67AE85u};
constexpr int64_t kIndicesPerBlock = 4, kGroupTokens = kLanes;
constexpr float kMostOfGroup = 4.15889f;  // ln 64, rounded up: what a group's noise has more than its number's

enum Stream : uint32_t { kOfGroups = 0, kOfTokens = 1 };

// Word `index` mod 4 of the block with counter (index / 4, position, choice, part).
inline uint32_t random_word(const Draw& draw, uint32_t index, uint32_t part) {
  uint32_t c[4] = {index / 4, draw.output_index, draw.choice, part};
  uint32_t key[2] = {static_cast<uint32_t>(draw.seed), static_cast<uint32_t>(draw.seed >> 32)};
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t low = uint64_t{c[0]} * kMultipliers[0], high = uint64_t{c[2]} * kMultipliers[1];
    const uint32_t first = static_cast<uint32_t>(high >> 32) ^ c[1] ^ key[0];
    const uint32_t third = static_cast<uint32_t>(low >> 32) ^ c[3] ^ key[1];
    c[0] = first, c[1] = static_cast<uint32_t>(high), c[2] = third, c[3] = static_cast<uint32_t>(low);
    for (int i = 0; i < 2; ++i) key[i] += kKeyIncrements[i];
  }
  return c[index % kIndicesPerBlock];
}
inline uint64_t random_bits(const Draw& draw, uint32_t index, Stream stream) {
  return uint64_t{random_word(draw, index, 2 * stream)} << 32 | random_word(draw, index, 2 * stream + 1);
}

// An exponential variate: -ln u with u = (b + 1/2) / 2^52 and b the upper 52 bits.
inline double exponential(uint64_t bits) { return -log((static_cast<double>(bits >> 12) + 0.5) * 0x1p-52); }

// What is drawn for all tokens of a group: the least of their exponential variates, and who has it.
struct GroupNoise {
  int64_t holder;
  double least;

  GroupNoise(const Draw& draw, int64_t group) {
    const uint64_t bits = random_bits(draw, static_cast<uint32_t>(group), kOfGroups);
    holder = group * kGroupTokens + static_cast<int64_t>(bits % kGroupTokens);
    least = exponential(bits) / kGroupTokens;
  }
  double most() const { return -log(least); }
  // Gumbel 1954; Maddison, Tarlow, Minka 2014, arXiv 1411.0030, section 2.
  double of(const Draw& draw, int64_t token) const {
    if (token == holder) return most();
    return -log(least + exponential(random_bits(draw, static_cast<uint32_t>(token), kOfTokens)));
  }
};

// The upper words of 64 indices at a time, and what they say about the exponential variates.
class NoiseBound {
 public:
  explicit NoiseBound(const Draw& draw)
      : position_(isplat(static_cast<int32_t>(draw.output_index))), choice_(isplat(static_cast<int32_t>(draw.choice))) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      const uint32_t low = static_cast<uint32_t>(draw.seed), high = static_cast<uint32_t>(draw.seed >> 32);
      keys_[round][0] = isplat(static_cast<int32_t>(low + round * kKeyIncrements[0]));
      keys_[round][1] = isplat(static_cast<int32_t>(high + round * kKeyIncrements[1]));
    }
    // 64-bit lanes are taken by twos, first all even ones and then all odd ones (first_pairs, second_pairs).
    for (int32_t lane = 0; lane < kWidth; ++lane) blocks_[lane] = lane / 4 + (lane & 2 ? kWidth / 4 : 0);
  }

  // bounds[i] is not below -ln of the variate of index first + i, and seldom above it by more than 0.07. first: a
  // multiple of 4.
  void operator()(int64_t first, Stream stream, Vec (&bounds)[kLaneVecs]) const {
    constexpr int kPairs = kLaneVecs / 2;
    IVec c[kPairs][4];
    for (int32_t pair = 0; pair < kPairs; ++pair) {
      const int32_t block = static_cast<int32_t>(first / kIndicesPerBlock) + pair * (kWidth / 2);
      c[pair][0] = iadd(iload(blocks_), isplat(block));
      c[pair][1] = position_, c[pair][2] = choice_, c[pair][3] = isplat(2 * stream);
    }
    encrypt(c);
    for (int pair = 0; pair < kPairs; ++pair) {
      const IVec front = interleave_even(c[pair][0], c[pair][1]), back = interleave_even(c[pair][2], c[pair][3]);
      bounds[2 * pair] = bound(first_pairs(front, back));
      bounds[2 * pair + 1] = bound(second_pairs(front, back));
    }
  }

 private:
  // Counters become words, both in the even lanes; what the odd lanes hold is never looked at.
  template <int kPairs>
  inline __attribute__((always_inline)) void encrypt(IVec (&c)[kPairs][4]) const {
    const IVec first = isplat(static_cast<int32_t>(kMultipliers[0]));
    const IVec second = isplat(static_cast<int32_t>(kMultipliers[1]));
#pragma GCC unroll 10
    for (int round = 0; round < kPhiloxRounds; ++round)
#pragma GCC unroll 4
      for (int pair = 0; pair < kPairs; ++pair) {
        const IVec low = multiply_even(c[pair][0], first), high = multiply_even(c[pair][2], second);
        c[pair][0] = xor3(odd_to_even(high), c[pair][1], keys_[round][0]);
        c[pair][2] = xor3(odd_to_even(low), c[pair][3], keys_[round][1]);
        c[pair][1] = high;
        c[pair][3] = low;
      }
  }

  // -ln(-ln u) <= -ln(1 - u) <= -ln(k / 2^24) with k the first 24 bits of 1 - u, rounded down; and the bits of a float
  // k, read as an integer, are at most 2^23 (log2 k + 127). k = 0 bounds nothing: its bits are 0, the result is 104.
  static Vec bound(IVec word) {
    const Vec share = to_float(shift_right<8>(xor3(word, isplat(-1), izero())));
    constexpr float kUnit = 0.693148f / (1 << 23);  // a little more than ln 2
    return fma(to_float(bits_of(share)), splat(-kUnit), splat((127 + 24) * kUnit * (1 << 23)));
  }

  IVec position_, choice_, keys_[kPhiloxRounds][2];
  alignas(64) int32_t blocks_[kWidth];
};

}  // namespace STAFFETTA_ISA
