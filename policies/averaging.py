"""Exponential moving average of the weights, which is what gets validated and deployed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

# Chi et al. 2023 (diffusion_policy configuration): decay 1 - (1 + n)^-0.75, at most 0.9999.
POWER = 0.75
LARGEST_DECAY = 0.9999


def average_decay(updates: int) -> float:
    """Return the decay after ``updates`` earlier updates: it grows, so that early weights are forgotten."""
    return min(LARGEST_DECAY, 1 - (1 + updates) ** -POWER)


class WeightAverage:
    """Average of ``parameters``, updated by one fused operation over all tensors.

    Attributes:
        averages: one tensor per parameter, in the same order.
        updates: how often :meth:`update` was called.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self.averages: list[Tensor] = [parameter.detach().clone() for parameter in self._parameters]
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current weights."""
        weight = 1 - average_decay(self.updates)
        torch._foreach_lerp_(self.averages, [parameter.data for parameter in self._parameters], weight)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Exchange the weights with their averages for the duration of the block; nothing is copied."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self._parameters):
            parameter.data, self.averages[index] = self.averages[index], parameter.data
