"""Settings of the scorer of demonstrations. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """How the ensemble that judges samples is built and trained (Gandhi et al. 2022, released code).

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["mlp", "diffusion"] = "mlp"
    """``mlp``: the error of a regressed action; ``diffusion``: the error of denoising, for base data in which several
    actions are right at the same state."""
    members: int = 5
    """Networks of the ensemble."""
    hidden: int = 128
    """Width of the two hidden layers (the paper: 1024, sixty times the work)."""
    dropout: float = 0.1
    """Share of hidden values dropped in training (the paper: 0.5, which blurs the actions of scripted operators); the
    diffusion scorer uses none."""
    learning_rate: float = 1e-3
    """Of Adam; it falls to zero along a cosine."""
    batch_size: int = 128
    """Samples per member and step."""
    epochs: int = 50
    """Passes over the base data."""
    minimum_steps: int = 1500
    """Optimiser steps on base data so small that the passes would be fewer."""
    folds: int = 4
    """Parts of the base data; every part is scored by an ensemble that was trained without it, for the thresholds."""
    seed: int = 0
    """Decides weights, batches, folds and noise."""

    def __post_init__(self) -> None:
        if self.members < 2 or self.folds < 2:
            raise ValueError("members and folds must be at least 2")
        if min(self.hidden, self.batch_size, self.epochs, self.minimum_steps) < 1:
            raise ValueError("hidden, batch_size, epochs and minimum_steps must be at least 1")
        if not 0 <= self.dropout < 1 or self.learning_rate <= 0 or self.seed < 0:
            raise ValueError("dropout must be in [0, 1), learning_rate positive and seed at least 0")
