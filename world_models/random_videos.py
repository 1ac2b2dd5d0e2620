"""Generating videos at random with known densities, so that reinforcement learning can improve the generator.

A video is a walk of Gaussian transitions. Of a ``residual`` model, which is deterministic, each pass is one
transition: the next frames are its prediction plus noise, N(f(state, commands), sigma^2), and the following prediction
builds on them. Of a ``flow`` model each Euler step of a chunk is one: with the clean chunk x^ and the noise e^ that the
velocity implies, the step from time t to t' < 1 is

    x' ~ N(t' x^ + sqrt((1 - t')^2 - s^2) e^, s^2),    s = min(sigma, 1 - t'),

which keeps chunks as noisy as in training (coefficients-preserving sampling, Wang & Yu 2025; as for policies, see
:mod:`simtoreal.policies.denoising_chain`). The last Euler step, t' = 1, is deterministic: noise there would only be
noise in the picture. Densities are averaged over the values of a frame or chunk instead of summed, as Flow-GRPO (Liu et
al. 2025) does: thousands of values would otherwise make every ratio 0 or infinite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.world_models.flow import FlowDynamics
from simtoreal.world_models.residual import ResidualDynamics
from simtoreal.world_models.state import Imagination


@dataclass(frozen=True, kw_only=True)
class RandomVideos:
    """N videos of K frames that came from T Gaussian transitions.

    Attributes:
        latents: ``(N, K, C, h, w)``.
        video: ``(T,)`` which video each transition belongs to.
        outcome: ``(T, D)`` where each transition led.
        deviation: ``(T,)`` its standard deviation.
        state: memory before each transition (``residual``: T rows; ``flow``: N rows).
        commands: ``(T, k, C')`` (``residual``, k frames per pass) or ``(N, K, C')`` (``flow``).
        before: ``(T, D)`` partly noise, time: ``(T, 2)`` from and to (``flow``; empty for ``residual``).
    """

    latents: Tensor
    video: Tensor
    outcome: Tensor
    deviation: Tensor
    state: Imagination
    commands: Tensor
    before: Tensor
    time: Tensor

    def log_density(self, means: Tensor, rows: Tensor) -> Tensor:
        """Return the mean log-density ``(R,)`` of the transitions ``rows``, up to a constant, given their means."""
        return -0.5 * self.divergence(self.outcome[rows], means, rows)

    def divergence(self, first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
        """Return the mean squared difference ``(R,)`` of ``(R, D)`` values in units of the transitions' deviation."""
        return ((first - second) / self.deviation[rows, None]).square().mean(-1)


class VideoWalk(ABC):
    """Samples videos, and computes the means of transitions again under changed weights.

    Args:
        noise_scale: sigma.
    """

    def __init__(self, noise_scale: float) -> None:
        self.noise_scale = noise_scale

    @abstractmethod
    def sample(self, state: Imagination, commands: Tensor, generator: torch.Generator | None) -> RandomVideos:
        """Return one video per row of ``state`` (N) under commands ``(N, K, C')``."""

    @abstractmethod
    def means(self, videos: RandomVideos, rows: Tensor) -> Tensor:
        """Return means ``(R, D)`` of the transitions ``rows`` ``(R,)`` under the current weights, with gradients."""

    @abstractmethod
    def passes(self, steps: int) -> int:
        """Frames that go through the network to generate a video of ``steps``."""


class ResidualWalk(VideoWalk):
    """See the module. Proprio is not random: no reward looks at it."""

    def __init__(self, dynamics: ResidualDynamics, noise_scale: float) -> None:
        super().__init__(noise_scale)
        self.dynamics = dynamics

    def passes(self, steps: int) -> int:
        """One per frame, as a frame costs the same in every method that is compared."""
        return steps

    @torch.no_grad()
    def sample(self, state: Imagination, commands: Tensor, generator: torch.Generator | None) -> RandomVideos:
        """See :meth:`VideoWalk.sample`."""
        count, steps = commands.shape[:2]
        # Passes of equal length, as long as possible, so that transitions are of equal size.
        size = max(k for k in range(1, self.dynamics.config.chunk + 1) if steps % k == 0)
        states, parts = [], []
        for told in commands.split(size, 1):
            mean, vectors = self.dynamics(state, told)
            noise = torch.randn(mean.shape, generator=generator, device=mean.device)
            states.append(state)
            parts.append(mean + self.noise_scale * noise)
            state = state.extend(parts[-1], vectors, told)
        latents = torch.cat(parts, 1)
        # Pass by pass, all videos of a pass together.
        outcome = torch.cat(parts).flatten(1)
        device = outcome.device
        return RandomVideos(
            latents=latents, video=torch.arange(count, device=device).repeat(steps // size), outcome=outcome,
            deviation=torch.full((len(outcome),), self.noise_scale, device=device), state=Imagination.join(states),
            commands=torch.cat(commands.split(size, 1)), before=outcome[:, :0],
            time=torch.zeros(len(outcome), 0, device=device),
        )  # fmt: skip

    def means(self, videos: RandomVideos, rows: Tensor) -> Tensor:
        """See :meth:`VideoWalk.means`."""
        state = videos.state.rows(rows)
        mean, _ = self.dynamics(state, videos.commands[rows])
        return mean.flatten(1)


class FlowWalk(VideoWalk):
    """See the module. A video is one chunk.

    Raises:
        ConfigError: the model generates in a single Euler step, which leaves no transition to randomise.
    """

    def __init__(self, dynamics: FlowDynamics, noise_scale: float) -> None:
        super().__init__(noise_scale)
        self.dynamics, self.euler = dynamics, dynamics.config.sampling_steps
        if self.euler < 2:
            raise ConfigError("a flow model with one sampling step has no random step; it needs at least two")

    def passes(self, steps: int) -> int:
        """One per frame and Euler step."""
        return steps * self.euler

    @torch.no_grad()
    def sample(self, state: Imagination, commands: Tensor, generator: torch.Generator | None) -> RandomVideos:
        """See :meth:`VideoWalk.sample`.

        Raises:
            ConfigError: more steps than the model generates at once.
        """
        count, steps = commands.shape[:2]
        if steps > self.dynamics.config.chunk:
            raise ConfigError(f"steps is {steps}, more than the chunk of the model ({self.dynamics.config.chunk})")
        expected, device = self.dynamics.expected(state, commands), commands.device
        size = steps * (self.dynamics.channels * self.dynamics.grid[0] * self.dynamics.grid[1] + expected.shape[-1])
        now = torch.randn(count, size, generator=generator, device=device)
        before, outcome, times = [], [], []
        everyone = torch.arange(count, device=device)
        for index in range(self.euler):
            time = torch.tensor([index / self.euler, (index + 1) / self.euler], device=device).repeat(count, 1)
            mean = self._mean(state, commands, now, time, everyone)
            deviation = self._deviation(time)[:, None]
            after = mean + deviation * torch.randn(mean.shape, generator=generator, device=device)
            if index + 1 < self.euler:
                before.append(now)
                outcome.append(after)
                times.append(time)
            now = after
        frames, _ = self._parts(now, steps)
        time = torch.cat(times)
        return RandomVideos(
            latents=frames, video=everyone.repeat(self.euler - 1), outcome=torch.cat(outcome),
            deviation=self._deviation(time), state=state, commands=commands, before=torch.cat(before), time=time,
        )  # fmt: skip

    def means(self, videos: RandomVideos, rows: Tensor) -> Tensor:
        """See :meth:`VideoWalk.means`."""
        return self._mean(videos.state, videos.commands, videos.before[rows], videos.time[rows], videos.video[rows])

    def _deviation(self, time: Tensor) -> Tensor:
        return (1 - time[:, 1]).clamp(0, self.noise_scale)

    def _parts(self, values: Tensor, steps: int) -> tuple[Tensor, Tensor]:
        """Frames ``(R, K, C, h, w)`` and vectors ``(R, K, P)`` of ``(R, D)``."""
        channels, grid = self.dynamics.channels, self.dynamics.grid
        size = steps * channels * grid[0] * grid[1]
        return values[:, :size].view(-1, steps, channels, *grid), values[:, size:].view(len(values), steps, -1)

    def _mean(self, state: Imagination, commands: Tensor, values: Tensor, time: Tensor, video: Tensor) -> Tensor:
        """Means ``(R, D)`` of the steps from ``values`` ``(R, D)``, of the videos ``video`` ``(R,)``."""
        chosen, moves = state.rows(video), commands[video]
        frames, vectors = self._parts(values, moves.shape[1])
        expected = self.dynamics.expected(chosen, moves)
        velocity = self.dynamics(chosen, moves, expected, frames, vectors, time[:, 0])
        flat = torch.cat([velocity[0].flatten(1), velocity[1].flatten(1)], 1)
        now, after = time[:, :1], time[:, 1:]
        clean, noise = values + (1 - now) * flat, values - now * flat
        kept = ((1 - after).square() - self._deviation(time)[:, None].square()).clamp_min(0).sqrt()
        return after * clean + kept * noise


def video_walk(dynamics: ResidualDynamics | FlowDynamics, noise_scale: float) -> VideoWalk:
    """Return the walk of a model's dynamics.

    Raises:
        ConfigError: see :class:`FlowWalk`.
    """
    if isinstance(dynamics, FlowDynamics):
        return FlowWalk(dynamics, noise_scale)
    return ResidualWalk(dynamics, noise_scale)
