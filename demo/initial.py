"""Draws the first weights of the embedded model, close to where looking things up in the context is learnt.

From independent random weights, finding "what was said of this name" takes most of a training run, because two layers
must come to fit one another. The first weights therefore fit: (1) all embeddings share a component, by which each head
of the first layer attends to a fixed distance back, and writes what it reads there into a subspace of its own; (2) in
the second layer half of the heads compare what a position is with what stood before earlier positions, the other half
what stood before both; (3) what they find is written back as it was read, and so becomes the prediction through the
tied embedding. Everything remains trainable, and training makes of this rough circuit an exact one.
"""

from typing import Final, cast

import torch
from torch import Tensor, nn

from demo.llama import Attention, Layer, Llama, LlamaShape, rotary_tables

_EMBEDDING_STD: Final = 0.1
_NOISE: Final = 0.2
_LOOKUP_GAIN: Final = 2.0
_RECORD_DISTANCE: Final = 3
"""Tokens from a name to the first digit of its code ("otter", "is", " ", "7")."""


@torch.no_grad()
def draw_weights(model: Llama) -> None:
    """Overwrites every matrix of the model from torch's global generator; needs at least two layers."""
    shape = model.shape
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = (2 * shape.num_layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
            nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
    embedding = model.model.embed_tokens.weight
    nn.init.normal_(embedding, mean=_EMBEDDING_STD, std=_EMBEDDING_STD)
    content = _directions(shape)
    written = [nn.init.orthogonal_(torch.empty(shape.hidden_size, shape.head_dim)) for _ in range(shape.num_heads)]
    _look_back(_attention(model, 0), shape, content, written)
    _look_up(_attention(model, 1), shape, content, written)


def _attention(model: Llama, number: int) -> Attention:
    return cast(Layer, model.model.layers[number]).self_attn


def _look_back(attention: Attention, shape: LlamaShape, content: Tensor, written: list[Tensor]) -> None:
    """Head h attends h + 1 positions back and writes ``content`` of what it finds into ``written[h]``."""
    half = shape.head_dim // 2
    cos, sin = rotary_tables(shape, shape.num_heads + 1)
    shared = _shared(shape)
    ahead = torch.cat((torch.ones(half), torch.zeros(half)))
    for head in range(shape.num_heads):
        rows = _rows(head, shape)
        # The rotary angle of this query is that of a position h + 1 earlier: there it meets the key's.
        turned = torch.cat((cos[head + 1, :half], -sin[head + 1, :half]))
        attention.q_proj.weight[rows] = _NOISE * attention.q_proj.weight[rows] + torch.outer(turned, shared)
        attention.o_proj.weight[:, rows] = written[head]
    for kv_head in range(shape.num_kv_heads):
        rows = _rows(kv_head, shape)
        attention.k_proj.weight[rows] = _NOISE * attention.k_proj.weight[rows] + torch.outer(ahead, shared)
        attention.v_proj.weight[rows] = content


def _look_up(attention: Attention, shape: LlamaShape, content: Tensor, written: list[Tensor]) -> None:
    """Even key heads match a token with what stood before others; odd ones match what stood before on both sides."""
    group = shape.num_heads // shape.num_kv_heads
    back = min(_RECORD_DISTANCE, shape.num_heads) - 1
    slow = _slow_dimensions(shape)
    for kv_head in range(shape.num_kv_heads):
        rows = _rows(kv_head, shape)
        is_even = kv_head % 2 == 0
        copied = _directions(shape)
        attention.k_proj.weight[rows] = written[0 if is_even else back].T * slow
        attention.v_proj.weight[rows] = copied
        for head in range(kv_head * group, (kv_head + 1) * group):
            source = content if is_even else written[back - head % 2].T
            attention.q_proj.weight[_rows(head, shape)] = source * slow
            attention.o_proj.weight[:, _rows(head, shape)] = copied.T


def _directions(shape: LlamaShape) -> Tensor:
    """Returns orthonormal directions free of the shared component, [head_dim, hidden]."""
    shared = _shared(shape)
    directions = nn.init.orthogonal_(torch.empty(shape.head_dim, shape.hidden_size))
    return directions - torch.outer(directions @ shared, shared)


def _shared(shape: LlamaShape) -> Tensor:
    """Returns the unit vector of the component that all embeddings share, [hidden]."""
    return torch.full((shape.hidden_size,), shape.hidden_size**-0.5)


def _slow_dimensions(shape: LlamaShape) -> Tensor:
    """Returns gains, [head_dim, 1], for dimensions that rotate little over a whole context: content, not position."""
    half = shape.head_dim // 2
    gains = torch.full((half,), _LOOKUP_GAIN)
    gains[: half * 3 // 8] *= _NOISE
    return torch.cat((gains, gains))[:, None]


def _rows(head: int, shape: LlamaShape) -> slice:
    return slice(head * shape.head_dim, (head + 1) * shape.head_dim)
