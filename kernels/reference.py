"""Plain torch: the specification of the values of every operation. Faster backends are judged against it.

Shapes use T for token rows of a flat batch, H and KVH for query and KV heads, D for head_dim, BS for block size, b for
bytes per element. Pages of a group of L layers are one tensor [num_blocks, KVH, L, 2, BS, D], keys at index 0, values
at 1; slot = block id x BS + offset. Inputs may be strided, any row count may be 0. Sums are carried in float32 whatever
the type of the tensors. Nothing here keeps state, looks at another sequence's pages, or promises an order of summation:
equality is within rounding, and only a backend that says so is bitwise equal to itself.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from kernels.backend import Batch, Definition, Linear, Rotation, Spans, WeightFormat, check_scales
from kernels.rope import LinearScaling, Llama3Scaling, Rope
from kernels.sampling import sample, score_tokens


def embedding(token_ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of a table: out[t] = weight[token_ids[t]].

    token_ids: [T], int64. weight: [vocab_size, hidden]. Returns [T, hidden] in weight's dtype. Raises IndexError for a
    token id outside the table. Bytes: 2 T hidden b.
    """
    return functional.embedding(token_ids, weight)


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Some rows, perhaps more than once: out[i] = x[indices[i]].

    x: [T, hidden]. indices: [rows], int64. Returns [rows, hidden] in x's dtype. Raises IndexError for an index outside
    x. Bytes: 2 rows hidden b.
    """
    return x.index_select(0, indices)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[t, n] = sum over k of x[t, k] weight[n, k], plus bias[n].

    x: [T, K], of weight's dtype or float32. weight: [N, K]. bias: [N]. Returns [T, N] in x's dtype. FLOPs: 2 T N K.
    Bytes: (T K + N K + T N) b, which bound it while T is below the machine's FLOPs per byte.
    """
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 per row: q = round(x 127 / max |x|), ties to even, scale = max |x| / 127; a row of zeros has 0.

    x: [rows, K]. Returns q [rows, K], int8, and scales [rows], float32.
    """
    largest_values = x.float().abs().amax(dim=-1)
    factors = torch.where(largest_values > 0, 127 / largest_values, 0.0)
    return (x.float() * factors[:, None]).round().to(torch.int8), largest_values / 127


GROUP_INPUTS = 64
"""Inputs of an int4 weight that share a scale. With 4 bytes a scale, a weight takes 4.5 bits."""


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits per weight, per output and group of GROUP_INPUTS inputs; the last group may be smaller.

    With m the first weight of the largest magnitude: scale = m / -8, q = round(-8 w / m), ties to even, at most 7: m
    itself becomes -8, so that all sixteen numbers are used whatever its sign. A group of zeros has scale 0.

    weight: [N, K]. Returns q [N, K], int8, from -8 to 7, and scales [N, groups], float32.
    """
    outputs, inputs = weight.shape
    groups = functional.pad(weight.float(), (0, -inputs % GROUP_INPUTS)).view(outputs, -1, GROUP_INPUTS)
    largest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    factors = torch.where(largest != 0, -8 / largest, 0.0)
    quantized = (groups * factors).round().clamp(max=7).to(torch.int8)
    return quantized.view(outputs, -1)[:, :inputs], (largest / -8)[:, :, 0]


def int8_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[t, n] = (sum over k of q[t, k] weight[n, k]) s[t] scales[n] + bias[n] with q, s = quantize_rows(x).

    x: [T, K]. weight: [N, K], int8. scales: [N], float32. bias: [N]. Returns [T, N] in x's dtype. The sum is exact;
    scales are applied in the order written, in float32. Operations: 2 T N K. Bytes: N K, while T is small. Dettmers et
    al. 2022, arXiv 2208.07339, section 2.1, with vector-wise scales and no outliers.
    """
    quantized, row_scales = quantize_rows(x)
    out = (quantized.double() @ weight.double().T).float() * row_scales[:, None] * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def int8_weight_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[t, n] = (sum over k of x[t, k] weight[n, k]) scales[n] + bias[n].

    x: [T, K]. weight: [N, K], int8. scales: [N], float32. bias: [N]. Returns [T, N] in x's dtype. Sum in float32, then
    scale, then bias, rounded once. FLOPs: 2 T N K. Bytes: N K, while T is small.
    """
    out = x.float() @ weight.float().T * scales
    return (out if bias is None else out + bias.float()).to(x.dtype)


def int4_linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """out[t, n] = sum over groups g of (sum over k in g of x[t, k] weight[n, k]) scales[n, g], + bias[n].

    x: [T, K]. weight: [N, K], int8 from -8 to 7. scales: [N, groups], float32: one for every GROUP_INPUTS inputs. bias:
    [N]. Returns [T, N] in x's dtype. Sums in float32, bias last, rounded once. FLOPs: 2 T N K. Bytes: N K (1 / 2 + 4 /
    GROUP_INPUTS), while T is small. Groups as in Frantar et al. 2022, arXiv 2210.17323, section 4.
    """
    wide = scales.repeat_interleave(GROUP_INPUTS, dim=1)[:, : weight.shape[1]] * weight.float()
    return linear(x.float(), wide, bias).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """out = x / sqrt(mean(x^2) + eps), rounded to x's dtype, times weight; all but the last product in float32.

    The mean is over the last dimension. x: [T, hidden]. weight: [hidden]. Returns x's shape and dtype. Bytes: 2 T
    hidden b. Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds, then norms: returns (rms_norm(s), s) with s = x + residual, rounded to their dtype.

    x, residual: [T, hidden]. Neither is written to. Bytes: 4 T hidden b.
    """
    total = x + residual
    return rms_norm(total, weight, eps), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) weight + bias, in float32, rounded once.

    The means are over the last dimension. x: [T, hidden]. weight, bias: [hidden]. Returns x's shape and dtype. Bytes: 2
    T hidden b. Ba, Kiros, Hinton 2016, arXiv 1607.06450, equation 4.
    """
    wide_bias = None if bias is None else bias.float()
    return functional.layer_norm(x.float(), x.shape[-1:], weight.float(), wide_bias, eps).to(x.dtype)


def rope_tables(rope: Rope, *, head_dim: int, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of angle[p, i] = p f_i with f_i = theta^(-2 i / head_dim), scaled as `rope.scaling` says.

    Returns two tensors [num_positions, head_dim / 2], float32. Frequencies and angles are float32 throughout, because
    models were trained on exactly those. Linear: f / factor. Llama 3: with wavelength w = 2 pi / f and original length
    n, f / factor where w > n / low_freq_factor, f where w < n / high_freq_factor, else (1 - s) f / factor + s f with s
    = (n / w - low_freq_factor) / (high_freq_factor - low_freq_factor). Raises ValueError for another kind of scaling,
    or an odd head_dim.
    """
    if head_dim % 2:
        raise ValueError(f"rotary embedding needs an even head_dim, not {head_dim}")
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = _scale(1.0 / rope.theta**exponents, rope)
    angles = torch.arange(num_positions, dtype=torch.int64).float()[:, None] * frequencies
    return angles.cos(), angles.sin()


def _scale(frequencies: Tensor, rope: Rope) -> Tensor:
    match rope.scaling:
        case None:
            return frequencies
        case LinearScaling(factor):
            return frequencies / factor
        case Llama3Scaling() as s:
            lengths = s.original_max_position_embeddings / (2 * math.pi / frequencies)
            share = (lengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            share = share.clamp(0.0, 1.0)
            return (1 - share) * frequencies / s.factor + share * frequencies
        case unknown:
            raise ValueError(f"unknown rope scaling {unknown!r}; supported: None, LinearScaling, Llama3Scaling")


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + D/2]) by the row's angles: (a cos - b sin, b cos + a sin).

    x: [T, heads, D]. cos, sin: [T, D / 2], float32: the rows' entries of the tables. Computed in float32; returns x's
    shape and dtype, contiguous. Bytes: 2 T heads D b. Su et al. 2021, arXiv 2104.09864, equation 34, in the half-split
    pairing in which Llama checkpoints are stored.
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """out = gate / (1 + exp(-gate)) * up, the gated half of SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 5).

    gate, up: [T, intermediate]. Returns the same shape and dtype. Bytes: 3 T intermediate b.
    """
    return functional.silu(gate) * up


def write_kv(keys: Tensor, values: Tensor, pages: Tensor, *, layer: int, slots: Tensor) -> None:
    """Writes row t's key and value of every head into slot slots[t] of `layer`. In place; touches no other byte.

    keys, values: [T, KVH, D], of the pages' dtype. pages: [num_blocks, KVH, L, 2, BS, D]. slots: [T], int64, distinct.
    Raises IndexError for a slot outside the pages. Bytes: 4 T KVH D b.
    """
    block_size = pages.shape[-2]
    blocks, offsets = slots // block_size, slots % block_size
    by_slot = pages[:, :, layer].permute(0, 3, 2, 1, 4)  # [num_blocks, BS, 2, KVH, D]
    by_slot[blocks, offsets] = torch.stack((keys, values), dim=1)


def rotate_and_write(
    query: Tensor, kv: tuple[Tensor, Tensor], rotation: Rotation, *, pages: Tensor, layer: int, slots: Tensor
) -> Tensor:
    """Returns the queries turned by their rows' angles; writes the keys, turned likewise, and the values into `pages`.

    query: [T, H, D]. kv: keys and values, [T, KVH, D]. All of the pages' dtype. See `apply_rope` and `write_kv`. Raises
    IndexError for a position outside the tables or a slot outside the pages. Bytes: 2 T (H + 2 KVH) D b.
    """
    cos, sin = rotation.cosines[rotation.positions], rotation.sines[rotation.positions]
    keys, values = kv
    write_kv(apply_rope(keys, cos, sin), values, pages, layer=layer, slots=slots)
    return apply_rope(query, cos, sin)


def paged_attention(
    query: Tensor,
    pages: Tensor,
    spans: Spans,
    *,
    layer: int,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
) -> Tensor:
    """Causal attention of each sequence's queries over its own paged context; whole, chunked prefill and decode alike.

    out[t, h] = sum over visible j of softmax_j(s[t, h, j]) value[j, h KVH / H] with s = scale query[t, h] . key[j, h
    KVH / H], or soft_cap tanh(s / soft_cap). Row t at position p of its sequence (its queries are the last rows of its
    context) sees j in (p - window, p], or all j <= p.

    query: [T, H, D], H a multiple of KVH; heads share KV heads in runs (GQA, Ainslie et al. 2023, arXiv 2305.13245).
    pages: [num_blocks, KVH, L, 2, BS, D], holding this step's keys and values already. Returns [T, H, D], query's
    dtype.

    Each sequence is computed alone, over exactly its context, so neither its neighbours nor what stale blocks hold
    beyond it (NaN included) can reach its result. Bytes: 2 b KVH D per context token, which bound decode; FLOPs: 4 H D
    per pair of query and visible key, which bound prefill. Vaswani et al. 2017, section 3.2.1; pages as in Kwon et al.
    2023, arXiv 2309.06180, section 4.1; soft cap: Gemma 2, arXiv 2408.00118, section 2.
    """
    _, num_kv_heads, _, _, block_size, head_dim = pages.shape
    starts, contexts = spans.query_starts.tolist(), spans.context_lens.tolist()
    by_head = pages[:, :, layer].permute(1, 2, 0, 3, 4)  # [KVH, 2, num_blocks, BS, D]
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for sequence, context in enumerate(contexts):
        start, end = starts[sequence], starts[sequence + 1]
        block_ids = spans.block_tables[sequence, : -(-context // block_size)]
        context_kv = by_head.index_select(2, block_ids).view(num_kv_heads, 2, -1, head_dim)[:, :, :context].float()
        grouped = query[start:end].float().reshape(end - start, num_kv_heads, -1, head_dim)  # [rows, KVH, H / KVH, D]
        scores = torch.einsum("tkgd,kjd->kgtj", grouped, context_kv[:, 0]) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores.masked_fill_(~_visible(end - start, context, window), -math.inf)
        out[start:end] = torch.einsum("kgtj,kjd->tkgd", scores.softmax(-1), context_kv[:, 1]).flatten(1, 2)
    return out


def _visible(num_queries: int, context: int, window: int | None) -> Tensor:
    """True where a query may look. [num_queries, context], bool."""
    visible = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
    return visible if window is None else visible.triu(context - num_queries - window + 1)


def log_softmax(logits: Tensor) -> Tensor:
    """out = x - log(sum(exp(x))) over the last dimension, with the maximum taken out first.

    logits: [rows, vocab_size]. Returns float32, same shape. Bytes: rows vocab_size (b + 4).
    """
    return functional.log_softmax(logits.float(), dim=-1)


class ReferenceLinear:
    """One of the linear functions above, on weights that were quantized once where it takes integers."""

    def __init__(self, weight: Tensor, bias: Tensor | None, stored: WeightFormat, scales: Tensor | None) -> None:
        check_scales(weight, scales, stored)
        self._compute = self._function(weight, bias, stored, scales)

    @staticmethod
    def _function(
        weight: Tensor, bias: Tensor | None, stored: WeightFormat, scales: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        if scales is not None:
            return partial(int8_linear, weight=weight, scales=scales, bias=bias)
        if stored is WeightFormat.AS_GIVEN:
            return partial(linear, weight=weight, bias=bias)
        multiply, quantize = _QUANTIZED[stored]
        integers, own_scales = quantize(weight)
        return partial(multiply, weight=integers, scales=own_scales, bias=bias)

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Multiplies, then adds."""
        out = self._compute(x.to(dtype or x.dtype))
        return out if residual is None else out + residual


_QUANTIZED: Mapping[WeightFormat, tuple[Callable[..., Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    WeightFormat.INT8: (int8_linear, quantize_rows),
    WeightFormat.INT8_WEIGHT: (int8_weight_linear, quantize_rows),
    WeightFormat.INT4: (int4_linear, quantize_groups),
}
"""How weights that are quantized here are multiplied, and what makes integers and scales of them."""


class ReferenceGatedLinear:
    """`silu_mul` of two linear layers over the same rows."""

    def __init__(self, gate: ReferenceLinear, up: ReferenceLinear) -> None:
        self._gate, self._up = gate, up

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Multiplies, gates, then adds."""
        out = silu_mul(self._gate(x, dtype=dtype), self._up(x, dtype=dtype))
        return out if residual is None else out + residual


class ReferenceBackend:
    """This module's functions as a `Backend`. The arithmetic is torch's: its version is part of the instruction set."""

    name = "cpu (reference)"
    abi_version = 5
    packing = None

    @property
    def instruction_set(self) -> str:
        """Torch's own choice of vector instructions on this machine, and its version: `avx512-torch2.13`."""
        version = ".".join(torch.__version__.split(".")[:2])
        return f"{torch.backends.cpu.get_cpu_capability().lower()}-torch{version}"

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: Tensor | None = None,
    ) -> ReferenceLinear:
        """Keeps the weights as they are, or quantizes their rows. weight: [N, K]. bias: [N]."""
        return ReferenceLinear(weight, bias, stored, scales)

    def prepare_head(self, weight: Tensor) -> ReferenceLinear:
        """As `prepare_linear`."""
        return self.prepare_linear(weight)

    def prepare_gated_linear(
        self,
        gate: tuple[Tensor, Tensor | None],
        up: tuple[Tensor, Tensor | None],
        *,
        stored: WeightFormat = WeightFormat.AS_GIVEN,
        scales: tuple[Tensor, Tensor] | None = None,
    ) -> ReferenceGatedLinear:
        """The layer silu(gate(x)) up(x), from weight [N, K] and bias [N] of each."""
        of_gate, of_up = scales or (None, None)
        return ReferenceGatedLinear(ReferenceLinear(*gate, stored, of_gate), ReferenceLinear(*up, stored, of_up))

    @staticmethod
    def linear(layer: Linear, x: Tensor, *, residual: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Computes rows through a layer that was prepared here."""
        return layer(x, residual=residual, dtype=dtype)

    def compile_step(self, definition: Definition) -> Callable[[Batch, Tensor], tuple[Tensor, ...]]:
        """The definition, one operation after another: there is nothing faster here."""
        return partial(definition, self)

    def background_step(self, definition: Definition) -> None:
        """None: torch computes in its caller's calls."""

    embedding = staticmethod(embedding)
    take_rows = staticmethod(take_rows)
    rms_norm = staticmethod(rms_norm)
    add_rms_norm = staticmethod(add_rms_norm)
    layer_norm = staticmethod(layer_norm)
    rope_tables = staticmethod(rope_tables)
    rotate_and_write = staticmethod(rotate_and_write)
    paged_attention = staticmethod(paged_attention)
    log_softmax = staticmethod(log_softmax)
    sample = staticmethod(sample)
    score_tokens = staticmethod(score_tokens)
