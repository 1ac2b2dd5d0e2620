"""Improving a denoising policy by reinforcement: collect rollouts, update, repeat. Which world it acts in is not known.

As in the trainer, nothing random has a hidden state: starts, noise and order of an iteration follow from the seed and
its number, so weights, optimiser moments and two counters continue a run bit by bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn

from simtoreal.envs.errors import CheckpointError, ConfigError, SimtorealError
from simtoreal.policies.base import Policy
from simtoreal.policies.chunk_rollout import ChunkRollouts, Starts, collect_rollouts, executed_log_prob
from simtoreal.policies.denoising_chain import DenoisingPolicy, GaussianChain
from simtoreal.policies.grpo import GRPO
from simtoreal.policies.policy_gradient import PolicyGradient
from simtoreal.policies.ppo import PPO
from simtoreal.policies.reinforcement_config import ReinforcementConfig
from simtoreal.policies.trainer import MOMENTS, seed_everything
from simtoreal.policies.training_data import Windows, batch_indices, to_tensors

# (number of the update) -> imitation loss of the policy, with gradients
Anchor = Callable[[int], Tensor]

# Kinds of randomness that follow from the same seed.
_NOISE, _ORDER = 1, 2


def demonstration_anchor(policy: Policy, windows: Windows, batch_size: int, seed: int) -> Anchor:
    """Return the anchor of RL-Co (2026, §3): the policy's own loss on a batch of demonstrations.

    Args:
        policy: the one that is improved.
        windows: of the demonstrations, e.g. ``open_training_data(...).train``.
        batch_size: windows per update.
        seed: decides their order.
    """

    def loss(update: int) -> Tensor:
        batch = windows.batch(batch_indices(len(windows), batch_size, seed, update))
        return policy.loss(to_tensors(batch, policy.device))["loss"]

    return loss


class Reinforcement:
    """Improves ``policy`` in place, one iteration at a time.

    Args:
        policy: stays in evaluation mode except while the anchor is computed.
        config: settings.
        anchor: imitation loss that is added with weight ``config.anchor_weight`` times ``config.loss_scale``; see
            :func:`demonstration_anchor`.

    Attributes:
        iteration: iterations done.
        updates: optimiser steps taken.

    Raises:
        ConfigError: the policy has no denoising chain, or its noise process no stochastic form.
    """

    def __init__(self, policy: Policy, config: ReinforcementConfig, *, anchor: Anchor | None = None) -> None:
        if not isinstance(policy, DenoisingPolicy):
            raise ConfigError(
                f"a policy of type '{policy.config.type}' cannot be improved by reinforcement: the probability of its "
                "actions is not defined. Use type 'diffusion'."
            )
        policy.set_inference_steps(config.denoising_steps)
        GaussianChain(policy.process, config.exploration)  # Refuses what cannot be sampled before anything is run.
        self.policy, self.config, self.anchor = policy.eval(), config, anchor
        self.iteration, self.updates = 0, 0
        policy.requires_grad_(True)
        if config.freeze_encoder:
            for parameter in policy.feature_parameters():
                parameter.requires_grad_(False)
        self.algorithm = _make_algorithm(policy, config)
        self._trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        own = list(self.algorithm.parameters())
        rates = [(self._trained, config.learning_rate), *([(own, self.algorithm.learning_rate)] if own else [])]
        groups = [{"params": parameters, "lr": rate, "highest_lr": rate} for parameters, rate in rates]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)

    def starts(self) -> Starts:
        """Return the default starts of the current iteration: seeds that no other iteration has."""
        config = self.config
        times = config.grpo.group_size if config.algorithm == "grpo" else 1
        count = config.rollouts // times
        first = config.first_seed + self.iteration * count
        return Starts.repeated(range(first, first + count), times)

    def iterate(self, env: VectorEnv, starts: Starts | None = None) -> dict[str, Any]:
        """Collect rollouts in ``env`` and learn from them; return metrics.

        Args:
            env: see :func:`collect_rollouts`.
            starts: by default :meth:`starts`.

        Raises:
            ConfigError, EmbodimentMismatchError: policy and environment do not fit.
            SimtorealError: every rollout was dropped, or the loss stopped being finite.
        """
        config, began = self.config, time.monotonic()
        noise = np.random.SeedSequence([config.seed, self.iteration, _NOISE]).generate_state(1, np.uint64)[0]
        rollouts = collect_rollouts(
            env, self.policy, starts or self.starts(), exploration=config.exploration, noise_seed=int(noise),
            max_chunks=config.max_chunks, keep_observations=not config.freeze_encoder,
        )  # fmt: skip
        collected = time.monotonic()
        metrics = {**_describe(rollouts), **self.update(rollouts)}
        metrics["collect_s"], metrics["update_s"] = collected - began, time.monotonic() - collected
        self.iteration += 1
        return metrics

    def update(self, rollouts: ChunkRollouts) -> dict[str, float]:
        """Learn from rollouts of the current policy; return metrics averaged over the optimiser steps.

        Raises:
            SimtorealError: the loss stopped being finite.
        """
        samples = self.algorithm.samples(rollouts, self.policy)
        samples["old_log_prob"] = rollouts.log_prob[samples["decisions"]]
        count = len(samples["decisions"])
        steps: list[dict[str, Tensor]] = []
        rng = np.random.default_rng([self.config.seed, self.iteration, _ORDER])
        for _ in range(self.config.epochs if count else 0):
            order = torch.from_numpy(rng.permutation(count))
            for rows in order.tensor_split(math.ceil(count / self.config.minibatch)):
                steps.append(self._step(rollouts, {key: value[rows] for key, value in samples.items()}))
        names = steps[0] if steps else ()
        means = {name: float(torch.stack([step[name] for step in steps]).mean()) for name in names}
        return {**means, "learned_decisions": count, "updates": len(steps)}

    def _step(self, rollouts: ChunkRollouts, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        policy, config = self.policy, self.config
        decisions, device = batch["decisions"], policy.device
        condition = policy.condition(self._features(rollouts, decisions))
        chain = rollouts.chain[decisions].to(device)
        log_prob = policy.log_prob_from_condition(condition, chain, config.exploration)
        log_prob = executed_log_prob(log_prob, rollouts.executed[decisions].to(device))
        batch = {key: value.to(device) for key, value in batch.items()}
        loss, metrics = self.algorithm.loss(batch, log_prob, condition)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.get_total_norm([one.grad for one in self._trained if one.grad is not None])
        anchored = self._add_anchor() if self.anchor is not None else {}
        total = nn.utils.clip_grad_norm_(self._trained, config.max_gradient_norm)
        if not torch.isfinite(loss) or not torch.isfinite(total):
            raise SimtorealError(
                f"reinforcement diverged in iteration {self.iteration}: loss {loss.item()}, gradient norm "
                f"{total.item()}. Earlier checkpoints are intact. Lower learning_rate, or raise "
                "exploration.noise_scale."
            )
        warmth = min(1.0, (self.updates + 1) / config.warmup_updates)
        for group in self.optimizer.param_groups:
            group["lr"] = warmth * group["highest_lr"]
        self.optimizer.step()
        self.updates += 1
        log_ratio = (log_prob - batch["old_log_prob"]).detach()
        # Estimate of the divergence from the policy that acted, without a sign error (Schulman 2020).
        divergence = (log_ratio.exp() - 1 - log_ratio).mean()
        return {**metrics, "loss": loss.detach(), "gradient_norm": norm, "divergence": divergence, **anchored}

    def _features(self, rollouts: ChunkRollouts, decisions: Tensor) -> Tensor:
        device = self.policy.device
        if self.config.freeze_encoder:
            return rollouts.features[decisions].to(device)
        observation = {key: values[decisions].to(device) for key, values in rollouts.observation.items()}
        return self.policy.features(observation, [rollouts.instruction[row] for row in decisions.tolist()])

    def _add_anchor(self) -> dict[str, Tensor]:
        """Add the gradients of the anchor to those of the reinforcement."""
        assert self.anchor is not None
        # Noise and augmentation of the imitation loss come from torch's global generator.
        seed_everything(self.config.seed, self.updates)
        self.policy.train()
        try:
            loss = self.anchor(self.updates)
        finally:
            self.policy.eval()
        scale = self.config.loss_scale(self.policy.config.execute_steps, self.policy.action_dim)
        gradients = torch.autograd.grad(self.config.anchor_weight * scale * loss, self._trained, allow_unused=True)
        for parameter, gradient in zip(self._trained, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        norm = nn.utils.get_total_norm([gradient for gradient in gradients if gradient is not None])
        return {"anchor_loss": loss.detach(), "anchor_gradient_norm": norm}

    def _modules(self) -> dict[str, nn.Module]:
        return {"policy": self.policy, "algorithm": self.algorithm}

    def state_dict(self) -> dict[str, Tensor]:
        """Return tensors that continue this run exactly: weights, optimiser moments and counters."""
        state = {"iteration": torch.tensor(self.iteration), "updates": torch.tensor(self.updates)}
        for prefix, module in self._modules().items():
            state |= {f"{prefix}/{name}": value.detach().clone() for name, value in module.state_dict().items()}
            for name, parameter in module.named_parameters():
                kept = self.optimizer.state.get(parameter, {})
                state |= {f"{moment}/{prefix}/{name}": kept[moment].clone() for moment in MOMENTS if moment in kept}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict` of a run with the same policy and settings.

        Raises:
            CheckpointError: it is of another policy or algorithm.
        """
        try:
            for prefix, module in self._modules().items():
                start = f"{prefix}/"
                module.load_state_dict(
                    {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
                )
                for name, parameter in module.named_parameters():
                    if f"{MOMENTS[0]}/{prefix}/{name}" in state:
                        kept = {moment: state[f"{moment}/{prefix}/{name}"] for moment in MOMENTS}
                        # The count of steps, too: the fused AdamW wants it where the parameter is.
                        self.optimizer.state[parameter] = {
                            key: value.to(parameter.device, copy=True) for key, value in kept.items()
                        }
            self.iteration, self.updates = int(state["iteration"]), int(state["updates"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"the state cannot continue this reinforcement: {error}") from error


def _make_algorithm(policy: DenoisingPolicy, config: ReinforcementConfig) -> PolicyGradient:
    if config.algorithm == "grpo":
        return GRPO(config.grpo)
    seed_everything(config.seed, 0)
    return PPO(config.ppo, policy.condition_dim).to(policy.device)


def _describe(rollouts: ChunkRollouts) -> dict[str, Any]:
    faults = rollouts.faults
    return {
        "success": float(rollouts.success.float().mean()),
        "return": float(rollouts.returns().mean()),
        "rollouts": len(rollouts.success),
        "dropped_rollouts": len(faults),
        "control_steps": rollouts.control_steps,
        "decisions": len(rollouts.reward),
        "steps_per_rollout": float(rollouts.steps.float().mean()),
    }
