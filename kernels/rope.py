"""Rotary position embedding as values: what a model's configuration says about its angles. No torch.

Only forms that are computed exactly as models were trained are listed; `reference.rope_tables` makes numbers of them.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Every angle divided by `factor` (position interpolation: Chen et al. 2023, arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Slow angles divided by `factor`, fast ones kept, those between blended (as Llama 3.1 was trained).

    Slow: wavelength above `original_max_position_embeddings / low_freq_factor` positions. Fast: below that length over
    `high_freq_factor`.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary embedding of one model. `scaling` None means the plain angles (Su et al. 2021, arXiv 2104.09864)."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | None = None
