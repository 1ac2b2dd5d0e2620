"""Denoising as a random walk with exact log-probabilities, so that reinforcement learning can improve the policy.

A denoising step of rectified flow (or of DDIM) is deterministic, and the likelihood of the chunk that comes out of all
of them is not tractable. Here the steps are Gaussian, as in Flow-GRPO (Liu et al. 2025), ReinFlow (Zhang et al. 2025)
and DPPO (Ren et al. 2024). With a network that predicts the clean chunk x̂ from x at a level x = a x̂ + b ε, the step to
the next level (a', b') is

    x' ~ N(a' x̂ + sqrt(max(b'² - σ², 0)) ε̂, σ²),     ε̂ = (x - a x̂) / b,     σ = min(noise_scale, b').

This is the step of DDIM with η > 0 (Song et al. 2021, eq. 12), and for rectified flow "coefficients-preserving
sampling" (Wang & Yu 2025): of the noise b' that belongs to the next level, σ is drawn afresh, so that the network
meets chunks exactly as noisy as in training, however few and coarse the steps. The Euler-Maruyama step of Flow-GRPO
keeps that only for many steps, and its noise is unbounded at the first; the fixed noise of ReinFlow adds to what is
there. The last step ends at b' = 0 and would be deterministic; there, as in ReinFlow and DPPO, noise_scale is added,
and it is the exploration in action space. As σ goes to 0 the walk becomes the deterministic sampler.

Only the part of a chunk that is executed can be good or bad, so only its densities are counted, at every step.
(Through the network, earlier values of the rest also touch the executed part. They are treated as noise of the world,
whose density does not depend on the policy, as the released code of RL-Co does: it halves the variance.)
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simtoreal.policies.base import Generators, Policy, normal_noise
from simtoreal.policies.reinforcement_config import ExplorationConfig
from simtoreal.policies.schedulers import Denoiser, NoiseProcess


@dataclass(frozen=True, kw_only=True)
class ChainSample:
    """Chunks with the denoising that led to them.

    Attributes:
        chunk: float32 ``(B, horizon, A)`` in the environment's action units.
        chain: float32 ``(B, K + 1, horizon, A)``, from noise to the normalised chunk, in K denoising steps.
        log_prob: float32 ``(B, execute_steps)``; see :meth:`DenoisingPolicy.log_prob`.
    """

    chunk: Tensor
    chain: Tensor
    log_prob: Tensor


class GaussianChain:
    """The denoising steps of one noise process, made Gaussian.

    Args:
        process: gives levels and clipping.
        exploration: the noise.

    Attributes:
        deviations: σ of the K steps: ``noise_scale``, but at most the noise of the level that the step leads to.

    Raises:
        ConfigError: the process has no deterministic sampler.
    """

    def __init__(self, process: NoiseProcess, exploration: ExplorationConfig) -> None:
        self.levels, self.clip = process.levels(), process.clip
        scale = exploration.noise_scale
        self.deviations = [min(scale, level.noise) if level.noise > 0 else scale for level in self.levels[1:]]

    def sample(self, denoiser: Denoiser, noise: Tensor, generator: Generators) -> tuple[Tensor, Tensor]:
        """Return chains ``(N, K + 1, T, A)`` that begin at ``noise`` ``(N, T, A)``, and their :meth:`means`."""
        chain, means = [noise], []
        for index, deviation in enumerate(self.deviations):
            means.append(self.means(denoiser, chain[-1][:, None], first=index)[:, 0])
            chain.append(means[-1] + deviation * normal_noise(noise.shape, generator, noise.device))
        return torch.stack(chain, dim=1), torch.stack(means, dim=1)

    def means(self, denoiser: Denoiser, states: Tensor, first: int = 0) -> Tensor:
        """Return the means of the steps ``first``, ``first + 1``, ... from ``states`` ``(N, S, T, A)``.

        The network sees all of them as one batch.
        """
        count, steps = states.shape[:2]
        table = torch.tensor(self.levels, device=states.device)
        now, after = table[first : first + steps], table[first + 1 : first + 1 + steps]
        deviation = torch.tensor(self.deviations[first : first + steps], device=states.device)
        clean = denoiser(states.flatten(0, 1), now[:, 0].repeat(count)).float().view_as(states)

        def column(values: Tensor) -> Tensor:
            return values[:, None, None]

        noise = (states - column(now[:, 1]) * clean) / column(now[:, 2])
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        kept = (after[:, 2].square() - deviation.square()).clamp_min(0).sqrt()
        return column(after[:, 1]) * clean + column(kept) * noise

    def log_density(self, means: Tensor, chain: Tensor) -> Tensor:
        """Return the log-density ``(N, K, T, A)`` of every value of ``chain`` ``(N, K + 1, T, A)`` but the first."""
        deviation = torch.tensor(self.deviations, device=chain.device)[:, None, None]
        standard = (chain[:, 1:] - means) / deviation
        return -0.5 * standard.square() - deviation.log() - 0.5 * math.log(2 * math.pi)


class DenoisingPolicy(Policy):
    """A policy that denoises chunks, given a condition that it computes once per observation.

    Reinforcement learning needs it in evaluation mode: augmentation would make the same observation another one when
    its log-probability is computed again.

    Attributes:
        process: how chunks are noised and denoised.
        denoiser: network ``(chunks (N, T, A), time (N,), condition (N, C)) -> clean chunks (N, T, A)``.
        action_dim: A.
        condition_dim: C.
    """

    process: NoiseProcess
    denoiser: nn.Module
    action_dim: int
    condition_dim: int

    @abstractmethod
    def features(self, observation: dict[str, Tensor], instruction: Sequence[str]) -> Tensor:
        """Return what the expensive part of the network, which may stay fixed, makes of observations: ``(B, F)``."""

    @abstractmethod
    def condition(self, features: Tensor) -> Tensor:
        """Return the condition of the denoiser ``(B, C)`` for features ``(B, F)``."""

    @abstractmethod
    def feature_parameters(self) -> list[nn.Parameter]:
        """Return the weights that :meth:`features` depends on."""

    @abstractmethod
    def set_inference_steps(self, steps: int) -> None:
        """Denoise in ``steps`` steps from now on, also when restored from a checkpoint that is saved later.

        Raises:
            ConfigError: the noise process does not allow it.
        """

    def sample_with_log_prob(
        self,
        observation: dict[str, Tensor],
        instruction: Sequence[str],
        generator: Generators,
        exploration: ExplorationConfig,
    ) -> ChainSample:
        """Return random chunks and how likely they were.

        Args:
            observation, instruction, generator: see :meth:`Policy.predict`.
            exploration: the noise; near 0 the chunks are those of :meth:`Policy.predict`.

        Raises:
            ConfigError: see :class:`GaussianChain`.
        """
        condition = self.condition(self.features(observation, instruction))
        return self.sample_from_condition(condition, generator, exploration)

    def log_prob(
        self, observation: dict[str, Tensor], instruction: Sequence[str], chain: Tensor, exploration: ExplorationConfig
    ) -> Tensor:
        """Return log-probabilities ``(B, execute_steps)`` of the executed actions, with gradients.

        Each is the sum of the log-densities of one action over its dimensions and over all denoising steps, in
        normalised units; the sum over the actions is the joint log-probability of the chunk, given the noise that the
        chain begins with.

        Args:
            observation, instruction: what the chains were sampled for.
            chain: ``(B, K + 1, horizon, A)``.
            exploration: what they were sampled with.
        """
        condition = self.condition(self.features(observation, instruction))
        return self.log_prob_from_condition(condition, chain, exploration)

    def sample_from_condition(
        self, condition: Tensor, generator: Generators, exploration: ExplorationConfig
    ) -> ChainSample:
        """Same as :meth:`sample_with_log_prob` for a condition ``(B, C)``."""
        gaussian = GaussianChain(self.process, exploration)
        shape = (len(condition), self.config.horizon, self.action_dim)
        noise = normal_noise(shape, generator, condition.device)
        with torch.no_grad():
            chain, means = gaussian.sample(self.denoise_with(condition), noise, generator)
        log_prob = self._executed(gaussian.log_density(means, chain))
        return ChainSample(chunk=self.actions_from_normalized(chain[:, -1]), chain=chain, log_prob=log_prob)

    def log_prob_from_condition(self, condition: Tensor, chain: Tensor, exploration: ExplorationConfig) -> Tensor:
        """Same as :meth:`log_prob` for a condition ``(B, C)``; all denoising steps are one batch of the denoiser."""
        gaussian = GaussianChain(self.process, exploration)
        means = gaussian.means(self.denoise_with(condition), chain[:, :-1])
        return self._executed(gaussian.log_density(means, chain))

    def _executed(self, density: Tensor) -> Tensor:
        return density[:, :, : self.config.execute_steps].sum(dim=(1, 3))

    def denoise_with(self, condition: Tensor) -> Denoiser:
        """Return the denoiser for conditions ``(B, C)``; it takes any multiple of B chunks, those of a row together."""

        def denoise(noisy: Tensor, time: Tensor) -> Tensor:
            repeated = condition.repeat_interleave(len(noisy) // len(condition), dim=0)
            prediction: Tensor = self.denoiser(noisy, time, repeated)
            return prediction

        return denoise
