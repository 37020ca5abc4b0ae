"""Counter-based random numbers: Philox4x32-10, vectorised, and the Gumbel noise that sampling adds.

A number depends on its key and counter alone; nothing is drawn from a stream, so there is no state to lose, to share or
to put out of order. Salmon, Moraes, Dror, Shaw 2011, "Parallel Random Numbers: As Easy as 1, 2, 3", section 3.3 and
table 2.
"""

import numpy as np
from numpy.typing import NDArray

NUM_ROUNDS = 10

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


def uniform(token_ids: NDArray[np.int64], *, seed: int, choice: int, output_index: int) -> NDArray[np.float64]:
    """One number per token, in the open interval (0, 1), all multiples of 2^-53 with 52 random bits.

    token_ids: [n]. Returns [n]. `seed` is the whole 64-bit key; the counter is (token / 4, output position, choice,
    part), so numbers of different ones are unrelated, and word token mod 4 of the block is the token's: that of part 0
    for the upper 32 bits, that of part 1 for the others. Each is taken modulo its width: 64 bits for the seed, 32 for
    the others.
    """
    columns = np.arange(len(token_ids))
    words = []
    for part in range(2):
        counter = np.zeros((4, len(token_ids)), dtype=np.uint64)
        counter[0] = token_ids // 4
        counter[1] = output_index & 0xFFFFFFFF
        counter[2] = choice & 0xFFFFFFFF
        counter[3] = part
        words.append(philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF))[token_ids % 4, columns])
    bits = (words[0] << np.uint64(20)) | (words[1] >> np.uint64(12))
    numbers: NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-52
    return numbers


def gumbel(token_ids: NDArray[np.int64], *, seed: int, choice: int, output_index: int) -> NDArray[np.float64]:
    """Standard Gumbel noise: the argmax of score + noise is a draw from softmax(score).

    token_ids: [n]. Returns [n]. Gumbel 1954; Maddison, Tarlow, Minka 2014, arXiv 1411.0030, section 2.
    """
    return -np.log(-np.log(uniform(token_ids, seed=seed, choice=choice, output_index=output_index)))
