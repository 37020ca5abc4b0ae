"""Counter-based random numbers: Philox4x32-10, vectorised, and the Gumbel noise that sampling adds.

A number depends on its key and counter alone; nothing is drawn from a stream, so there is no state to lose, to share or
to put out of order. Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3 and
table 2.
"""

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10
GROUP_TOKENS = 64
"""Neighbouring tokens, aligned to 0, whose largest noise is drawn before that of each."""

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_WORD_BITS = np.uint64(32)


def philox4x32(counter: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Encrypts counters: four 32-bit words in, four out, under a key of two 32-bit words.

    counter: [4, n], each element below 2^32 (64-bit elements so that products fit). Returns the same shape.
    """
    c0, c1, c2, c3 = counter
    for turn in range(NUM_ROUNDS):
        k0, k1 = (np.uint64((word + turn * step) & 0xFFFFFFFF) for word, step in zip(key, _KEY_INCREMENTS, strict=True))
        low, high = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (high >> _WORD_BITS) ^ c1 ^ k0, high & _LOW, (low >> _WORD_BITS) ^ c3 ^ k1, low & _LOW
    return np.stack((c0, c1, c2, c3))


def random_bits(
    indices: NDArray[np.int64], *, seed: int, choice: int, output_index: int, stream: int = 0
) -> NDArray[np.uint64]:
    """64 random bits per index: those of stream 0 are for groups of tokens, those of stream 1 for tokens.

    indices: [n]. Returns [n]. `seed` is the whole 64-bit key; the counter is (index / 4, output position, choice,
    part), so bits of different ones are unrelated, and word index mod 4 of the block is the index's: that of part
    2 x stream for the upper 32 bits, that of the next part for the others. Each is taken modulo its width: 64 bits for
    the seed, 32 for the others.
    """
    columns = np.arange(len(indices))
    words = []
    for part in (2 * stream, 2 * stream + 1):
        counter = np.zeros((4, len(indices)), dtype=np.uint64)
        counter[0] = indices // 4
        counter[1] = output_index & 0xFFFFFFFF
        counter[2] = choice & 0xFFFFFFFF
        counter[3] = part
        words.append(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[indices % 4, columns])
    return words[0] << _WORD_BITS | words[1]


def uniform(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Numbers in the open interval (0, 1), multiples of 2^-53 made of the upper 52 of 64 random bits. [n] to [n]."""
    numbers: NDArray[np.float64] = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return numbers


def gumbel(token_ids: NDArray[np.int64], *, seed: int, choice: int, output_index: int) -> NDArray[np.float64]:
    """Standard Gumbel noise, independent for all tokens: the argmax of score + noise is a draw from softmax(score).

    Noise is -ln of an exponential variate. The least of a group's 64 is drawn first, X / 64 with X exponential, then
    which of them has it, evenly; what the others have more than that is exponential again, because such variates have
    no memory. So one number bounds the noise of 64 tokens from above, and whoever looks for the argmax makes the others
    of the few groups alone that it can lie in.

    token_ids: [n]. Returns [n]. Gumbel 1954; Maddison, Tarlow, Minka 2014, arXiv 1411.0030, sections 2 and 3.
    """
    groups = random_bits(token_ids // GROUP_TOKENS, seed=seed, choice=choice, output_index=output_index, stream=0)
    tokens = random_bits(token_ids, seed=seed, choice=choice, output_index=output_index, stream=1)
    least = -np.log(uniform(groups)) / GROUP_TOKENS
    has_least = groups % np.uint64(GROUP_TOKENS) == (token_ids % GROUP_TOKENS).astype(np.uint64)
    return -np.log(least + np.where(has_least, 0.0, -np.log(uniform(tokens))))
