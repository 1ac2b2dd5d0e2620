"""A linear model of proprio, fitted in closed form: the arm does what it is told, up to the lag of its controller."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.world_models.known_proprio import KnownProprio

# Relative to the variance of the inputs.
RIDGE = 1e-4


def _inputs(before: Tensor, now: Tensor, command: Tensor) -> Tensor:
    return torch.cat([before, now, command, torch.ones_like(now[..., :1])], -1)


def fit_linear(before: Tensor, now: Tensor, command: Tensor, after: Tensor) -> Tensor:
    """Return the ridge regression ``(2 P + C' + 1, P)`` of the change of proprio; arguments ``(N, ...)``, scaled."""
    inputs = _inputs(before, now, command).double()
    gram = inputs.T @ inputs / len(inputs)
    shrink = torch.full((len(gram),), RIDGE, dtype=gram.dtype, device=gram.device)
    # The constant is not shrunk.
    shrink[-1] = 0.0
    shrink *= gram.diagonal().mean()
    return torch.linalg.solve(gram + shrink.diag(), inputs.T @ (after - now).double() / len(inputs)).float()


class LinearProprio(nn.Module):
    """Expected proprio after a command, from the last two; networks correct it.

    Args:
        proprio_dim, command_dim: sizes of the vectors.
        known: entries that need no model.
    """

    def __init__(self, proprio_dim: int, command_dim: int, known: KnownProprio) -> None:
        super().__init__()
        self.known = known
        self.register_buffer("coefficients", torch.zeros(2 * proprio_dim + command_dim + 1, proprio_dim))

    def forward(self, before: Tensor, now: Tensor, command: Tensor) -> Tensor:
        """Return the expected proprio ``(N, P)``; all scaled."""
        return self.known(now + _inputs(before, now, command) @ self.coefficients, command)

    def roll_out(self, before: Tensor, now: Tensor, commands: Tensor) -> Tensor:
        """Return the expected proprios ``(N, k, P)`` after each of the commands ``(N, k, C')``."""
        expected = []
        for step in range(commands.shape[1]):
            before, now = now, self(before, now, commands[:, step])
            expected.append(now)
        return torch.stack(expected, 1)

    @torch.no_grad()
    def fit(self, proprio: Tensor, commands: Tensor, first: np.ndarray, frames: np.ndarray) -> None:
        """Fit the coefficients.

        Args:
            proprio: ``(N, P)`` of all frames, scaled.
            commands: ``(N, C')``, scaled.
            first: ``(N,)`` first frame of the episode of every frame.
            frames: frames with a successor, to learn from.
        """
        before = np.maximum(frames - 1, first[frames])
        self.coefficients.copy_(fit_linear(proprio[before], proprio[frames], commands[frames], proprio[frames + 1]))
