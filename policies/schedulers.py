"""Noise processes: how chunks are corrupted in training and generated at run time (schedulers of diffusers).

The network always predicts the clean chunk. A prediction of the noise would be divided by nearly zero in the first of
few denoising steps, and chunks, unlike images, are so low-dimensional that the clean one is the easier target.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.base import Generators
from simtoreal.policies.config import DiffusionConfig
from simtoreal.policies.normalization import CLIP

# (noisy chunks (N, T, A), time (N,) in [0, 1]) -> predicted clean chunks (N, T, A)
Denoiser = Callable[[Tensor, Tensor], Tensor]


def spread_times(rows: int, samples: int, device: torch.device) -> Tensor:
    """Return times ``(rows, samples)`` in [0, 1), one in each of ``samples`` equal parts.

    Stratified over the samples of one observation, which lowers the variance of the gradient.
    """
    part = torch.arange(samples, device=device)
    return (part + torch.rand(rows, samples, device=device)) / samples


class Level(NamedTuple):
    """A noise level: a chunk there is ``signal`` times the clean one plus ``noise`` times standard normal noise."""

    time: float
    """Given to the network, 0 (clean) to 1 (noise)."""
    signal: float
    noise: float


CLEAN = Level(0.0, 1.0, 0.0)


class NoiseProcess(ABC):
    """Corrupts clean chunks and generates chunks from noise. Times run from 0 (clean) to 1 (noise).

    Attributes:
        steps: denoising steps at run time.
        clip: predictions of clean chunks are clipped here (normalised units) while sampling, None if they are not.
    """

    steps: int
    clip: float | None = None

    @abstractmethod
    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return noisy chunks ``(N, T, A)`` and the time given to the network ``(N,)``."""

    @abstractmethod
    def generate(self, denoiser: Denoiser, noise: Tensor, generator: Generators) -> Tensor:
        """Return chunks ``(N, T, A)`` made from ``noise`` of the same shape."""

    @abstractmethod
    def levels(self) -> list[Level]:
        """Return the ``steps + 1`` levels that deterministic sampling passes through, from pure noise to clean.

        Raises:
            ConfigError: the process has no such sampling.
        """


class Flow(NoiseProcess):
    """Rectified flow (Liu et al. 2022; Lipman et al. 2023) with Euler steps."""

    def __init__(self, steps: int) -> None:
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        self.steps = steps
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        return torch.lerp(clean, noise, time[:, None, None]), time

    def generate(self, denoiser: Denoiser, noise: Tensor, generator: Generators) -> Tensor:
        levels = [level.noise for level in self.levels()[:-1]]
        self.scheduler.set_timesteps(sigmas=levels, device=noise.device)
        sample = noise
        for timestep, level in zip(self.scheduler.timesteps, levels, strict=True):
            clean = denoiser(sample, sample.new_full((len(sample),), level)).float()
            # The path is a straight line from the clean chunk to the noise, so its velocity follows from either end.
            velocity = (sample - clean) / level
            sample = self.scheduler.step(velocity, timestep, sample, return_dict=False)[0]
        return sample

    def levels(self) -> list[Level]:
        times = [1 - index / self.steps for index in range(self.steps)]
        return [*(Level(time, 1 - time, time) for time in times), CLEAN]


class Diffusion(NoiseProcess):
    """Denoising diffusion with a cosine schedule (Nichol & Dhariwal 2021).

    Args:
        kind: ``ddpm`` (Ho et al. 2020), ``ddim`` (Song et al. 2021) or ``dpm`` (DPM-Solver++ 2M, Lu et al. 2022).
        levels: noise levels of the process.
        steps: denoising steps at run time.
    """

    def __init__(self, kind: str, levels: int, steps: int) -> None:
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        self.kind, self.train_levels, self.steps = kind, levels, steps
        self.clip = None if kind == "dpm" else CLIP
        common: dict[str, Any] = {
            "num_train_timesteps": levels,
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
            "timestep_spacing": "trailing",
        }
        if kind == "dpm":
            self.scheduler: Any = DPMSolverMultistepScheduler(**common)
        else:
            scheduler = DDPMScheduler if kind == "ddpm" else DDIMScheduler
            self.scheduler = scheduler(**common, clip_sample=True, clip_sample_range=CLIP)

    def corrupt(self, clean: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        level = (time * self.train_levels).long().clamp_max(self.train_levels - 1)
        return self.scheduler.add_noise(clean, noise, level), level / self.train_levels

    def generate(self, denoiser: Denoiser, noise: Tensor, generator: Generators) -> Tensor:
        if self.kind == "ddim":
            return self._follow_levels(denoiser, noise)
        # DPM-Solver++ is deterministic; only DDPM draws noise while sampling.
        extra = {} if generator is None else {"generator": generator}
        sample = noise
        for timestep in self._set_timesteps(noise.device):
            time = sample.new_full((len(sample),), float(timestep) / self.train_levels)
            sample = self.scheduler.step(denoiser(sample, time).float(), timestep, sample, **extra).prev_sample
        return sample

    def _set_timesteps(self, device: torch.device | None = None) -> Tensor:
        """Set and return the timesteps. Rounding gives some numbers of them (29 of 100) one more, to -1, which the
        schedulers take for pure noise."""
        self.scheduler.set_timesteps(self.steps, device=device)
        timesteps: Tensor = self.scheduler.timesteps[: self.steps]
        if len(self.scheduler.timesteps) > self.steps and self.kind != "ddim":
            self.scheduler.set_timesteps(timesteps=timesteps.tolist(), device=device)
        return timesteps

    def _follow_levels(self, denoiser: Denoiser, sample: Tensor) -> Tensor:
        """Go from each level to the next one: DDIM without noise (Song et al. 2021, eq. 12 with σ = 0).

        The scheduler's own step is one of ``train_timesteps // steps``, as long as the distance to its next timestep
        only where that is a whole number.
        """
        for now, after in itertools.pairwise(self.levels()):
            clean = denoiser(sample, sample.new_full((len(sample),), now.time)).float()
            noise = (sample - now.signal * clean) / now.noise
            sample = after.signal * clean.clamp(-CLIP, CLIP) + after.noise * noise
        return sample

    def levels(self) -> list[Level]:
        if self.kind != "ddim":
            raise ConfigError(
                f"scheduler '{self.kind}' has no deterministic one-step transitions, which reinforcement learning "
                "makes stochastic. Set scheduler to 'ddim': the same weights run with it. Or train with 'flow'."
            )
        timesteps = self._set_timesteps()
        kept = self.scheduler.alphas_cumprod[timesteps]
        return [
            *(
                # In float32, as the scheduler computes.
                Level(float(timestep) / self.train_levels, float(part**0.5), float((1 - part) ** 0.5))
                for timestep, part in zip(timesteps, kept, strict=True)
            ),
            CLEAN,
        ]


def noise_process(config: DiffusionConfig) -> NoiseProcess:
    """Return the process named by ``config.scheduler``."""
    if config.scheduler == "flow":
        return Flow(config.inference_steps)
    return Diffusion(config.scheduler, config.train_timesteps, config.inference_steps)
