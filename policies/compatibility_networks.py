"""Ensembles of small perceptrons that are trained and evaluated together, as batched matrix products."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from simtoreal.policies.compatibility_config import ScorerConfig

# Noise levels at which the diffusion scorer measures how far denoising moves an action. Above them the network answers
# with the mean over all modes (at 0.5 an action between two modes already looks as likely as the modes).
NOISE_LEVELS = (0.1, 0.2, 0.3)
NOISE_DRAWS = 4
TIME_FEATURES = 8


class Perceptrons(nn.Module):
    """M perceptrons of one shape: two hidden layers with LayerNorm, ReLU and dropout.

    Args:
        members: M.
        inputs, hidden, outputs: sizes.
        dropout: in training mode.
    """

    def __init__(self, members: int, inputs: int, hidden: int, outputs: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        self.gains, self.offsets = nn.ParameterList(), nn.ParameterList()
        for rows, columns in ((inputs, hidden), (hidden, hidden), (hidden, outputs)):
            # As nn.Linear initialises.
            bound = 1 / math.sqrt(rows)
            self.weights.append(nn.Parameter(torch.empty(members, rows, columns).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, columns).uniform_(-bound, bound)))
        for _ in range(2):
            self.gains.append(nn.Parameter(torch.ones(members, 1, hidden)))
            self.offsets.append(nn.Parameter(torch.zeros(members, 1, hidden)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return ``(M, B, outputs)`` for ``(M, B, inputs)``."""
        value = inputs
        for layer in range(2):
            value = torch.baddbmm(self.biases[layer], value, self.weights[layer])
            value = functional.layer_norm(value, value.shape[-1:]) * self.gains[layer] + self.offsets[layer]
            value = functional.relu(value)
            if self.training and self.dropout:
                value = value * _dropout_mask(value, self.dropout)
        return torch.baddbmm(self.biases[2], value, self.weights[2])


def _dropout_mask(value: Tensor, share: float) -> Tensor:
    """Zero or 1 / (1 - share) per element. One random byte decides (``share`` is rounded to 1/256): on a CPU drawing
    a number per element, as nn.Dropout does, takes longer than the matrix products."""
    dropped = round(256 * share)
    words = torch.empty((value.numel() + 7) // 8, dtype=torch.int64, device=value.device).random_(-(2**63), None)
    kept = words.view(torch.uint8)[: value.numel()].view(value.shape) >= dropped
    return kept.to(value.dtype) * (256 / (256 - dropped))


class Ensemble(nn.Module, ABC):
    """Networks that say how likely an action and how unfamiliar a state is.

    Args:
        config: see :class:`ScorerConfig`.
        members: number of networks (a fit trains several ensembles in one).
        state_dim, action_dim: sizes of the scaled states and actions.
    """

    network: Perceptrons

    def __init__(self, config: ScorerConfig, members: int, state_dim: int, action_dim: int) -> None:
        super().__init__()
        self.action_dim = action_dim

    @abstractmethod
    def loss(self, states: Tensor, actions: Tensor) -> Tensor:
        """Return the training loss ``(M,)`` for ``(M, B, S)`` and ``(M, B, A)``."""

    @abstractmethod
    def scores(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Return squared errors ``(B, A)`` and novelty ``(B,)``, for ``(B, S)`` and ``(B, A)`` in [-1, 1]."""

    def members(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        """State dictionary of an ensemble of some of the networks."""
        index = torch.as_tensor(list(chosen))
        return {name: value[index] for name, value in self.state_dict().items()}


class RegressionEnsemble(Ensemble):
    """Deterministic actions by mean squared error, bounded by tanh (the paper's)."""

    def __init__(self, config: ScorerConfig, members: int, state_dim: int, action_dim: int) -> None:
        super().__init__(config, members, state_dim, action_dim)
        self.network = Perceptrons(members, state_dim, config.hidden, action_dim, config.dropout)

    def _act(self, states: Tensor) -> Tensor:
        return torch.tanh(self.network(states))

    def loss(self, states: Tensor, actions: Tensor) -> Tensor:
        return (self._act(states) - actions).square().mean((-2, -1))

    def scores(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error averaged over members; standard deviation over members, averaged over dimensions."""
        members = self.network.weights[0].shape[0]
        predicted = self._act(states.expand(members, -1, -1))
        return (predicted - actions).square().mean(0), predicted.std(0, correction=0).mean(-1)


class DenoisingEnsemble(Ensemble):
    """Clean actions from noisy ones at any noise level (rectified flow), for base data with several modes.

    An action near any mode is hardly moved by denoising, one between modes or beside them is. From pure noise the
    network answers with the mean action of the state, whose spread over the members is the novelty.
    """

    def __init__(self, config: ScorerConfig, members: int, state_dim: int, action_dim: int) -> None:
        super().__init__(config, members, state_dim, action_dim)
        inputs = state_dim + action_dim + TIME_FEATURES
        self.network = Perceptrons(members, inputs, config.hidden, action_dim, 0.0)

    def _denoise(self, states: Tensor, noisy: Tensor, time: Tensor) -> Tensor:
        frequencies = math.pi * 2.0 ** torch.arange(TIME_FEATURES // 2, device=time.device)
        angles = time * frequencies
        return self.network(torch.cat([states, noisy, angles.sin(), angles.cos()], dim=-1))

    def loss(self, states: Tensor, actions: Tensor) -> Tensor:
        time = torch.rand(*actions.shape[:2], 1, device=actions.device)
        noisy = torch.lerp(actions, torch.randn_like(actions), time)
        return (self._denoise(states, noisy, time) - actions).square().mean((-2, -1))

    def scores(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Denoising error over members, noise levels and fixed draws; spread of the denoised pure noise."""
        members, rows = self.network.weights[0].shape[0], len(states)
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(NOISE_DRAWS // 2, 1, self.action_dim, generator=generator).to(states)
        noise = torch.cat([half, -half])  # Antithetic: the mean of the noise is exactly zero.
        error, spread = torch.zeros_like(actions), torch.zeros(rows, device=states.device)
        many = states.expand(members, -1, -1)
        for level in (*NOISE_LEVELS, 1.0):
            for draw in noise:
                noisy = torch.lerp(actions, draw.expand_as(actions), level).expand(members, -1, -1)
                clean = self._denoise(many, noisy, states.new_full((members, rows, 1), level))
                if level < 1:
                    error += (clean - actions).square().mean(0)
                else:
                    spread += clean.std(0, correction=0).mean(-1)
        return error / (len(noise) * len(NOISE_LEVELS)), spread / len(noise)


ENSEMBLES: dict[str, type[Ensemble]] = {"mlp": RegressionEnsemble, "diffusion": DenoisingEnsemble}


def train_ensembles(
    config: ScorerConfig, states: Tensor, actions: Tensor, rows: Sequence[np.ndarray], device: torch.device
) -> Ensemble:
    """Train ``len(rows)`` ensembles of ``config.members`` networks at once, each on some of the samples.

    Every member draws batches of its own from its rows. The result holds all networks, those of one ensemble in a row.

    Args:
        config: see :class:`ScorerConfig`.
        states, actions: scaled float32 ``(N, S)`` and ``(N, A)``.
        rows: per ensemble the indices to learn from.
        device: where to train.
    """
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        ensemble = ENSEMBLES[config.kind](config, config.members * len(rows), states.shape[1], actions.shape[1]).to(
            device
        )
        states, actions = states.to(device), actions.to(device)
        optimizer = torch.optim.Adam(ensemble.parameters(), lr=config.learning_rate, fused=True)
        largest = max(len(chosen) for chosen in rows)
        steps = max(config.minimum_steps, config.epochs * math.ceil(largest / config.batch_size))
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        tables = [torch.as_tensor(chosen) for chosen in rows for _ in range(config.members)]
        for _ in range(steps):
            batch = torch.stack(
                [table[torch.randint(len(table), (config.batch_size,), generator=generator)] for table in tables]
            ).to(device)
            # The sum keeps the members independent: none sees another one's gradient.
            loss = ensemble.loss(states[batch], actions[batch]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
    return ensemble.eval().requires_grad_(False)
