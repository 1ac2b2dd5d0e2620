"""Training of a policy: plain torch, one process or torchrun, continued after a crash as if nothing had happened.

Nothing random has a hidden state: batches, noise and augmentation of a step follow from the seed and the step number.
So weights, optimiser moments and averages in the checkpoint are enough to continue bit by bit (on a CPU with the same
number of threads).
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.config import read_yaml
from simtoreal.envs.errors import CheckpointError, ConfigError, SimtorealError
from simtoreal.envs.provenance import provenance
from simtoreal.policies import checkpoint as checkpoints
from simtoreal.policies.averaging import WeightAverage
from simtoreal.policies.base import Policy
from simtoreal.policies.config import PolicyConfig, TrainerConfig
from simtoreal.policies.distributed import Processes, joined_processes
from simtoreal.policies.encoder_transfer import compare_encoders, describe_encoders, transfer_encoders
from simtoreal.policies.registry import policy_class
from simtoreal.policies.training_data import TrainingData, to_tensors, training_batches
from simtoreal.policies.training_log import TrainingLog

FORMAT_VERSION = 1
# The cosine ends at this part of the highest learning rate.
FINAL_RATE = 0.01
# Part of the steps that warm up at least, however few they are.
SHORT_WARMUP = 0.1
# What AdamW keeps per parameter; it has nothing for one that never got a gradient.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")

# Settings that may change when a training is continued: they do not touch the weights.
HARMLESS = ("validate_every", "validation_windows", "checkpoint_every", "log_every")


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """Outcome of a training.

    Attributes:
        run: run folder, which :func:`load_policy` accepts.
        steps: optimiser steps taken in all.
        seconds: wall time of training, over all its sessions.
        parameters: number of trained values.
        validation_error: mean absolute action error on held-out windows at the end, None without such windows.
    """

    run: Path
    steps: int
    seconds: float
    parameters: int
    validation_error: float | None


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to 1 % of the highest rate."""
    # Few steps shorten the warm-up: it would leave fewer than it takes to the cosine, or none.
    shortened = max(config.steps - config.warmup_steps, math.ceil(config.steps * SHORT_WARMUP))
    warmup = min(config.warmup_steps, shortened)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return config.learning_rate * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Set every global generator as a function of the seed, the step and the process."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(4)
    random.seed(int(state[0]))
    np.random.seed(int(state[1]))
    torch.manual_seed(int(state[2]) << 32 | int(state[3]))


def choose_precision(precision: str, device: torch.device) -> str:
    """Return ``bf16`` or ``fp32``: ``auto`` is bf16 on GPUs and on processors with bfloat16 instructions."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Older releases of torch cannot tell; there fp32 is the safe answer.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def make_optimizer(policy: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """Return fused AdamW; biases and normalisation gains do not decay."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


def train(
    policy_config: PolicyConfig,
    config: TrainerConfig,
    data: TrainingData,
    output: str | Path,
    *,
    kind: type[Policy] | None = None,
    encoder: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    progress: bool = False,
) -> TrainingResult:
    """Train a policy and leave checkpoints in ``output/checkpoints``.

    Args:
        policy_config: which policy.
        config: how to train it.
        data: what to train it on.
        output: run folder.
        kind: class to train, for what is trained as policies are but has no registered type.
        encoder: run whose image encoders the policy begins with; see :mod:`simtoreal.policies.encoder_transfer`. A
            training that is continued has them already: then it only has to be the same, and may be gone.
        resume: continue from the newest checkpoint in ``output`` (from the beginning if there is none).
        device: torch device; None picks a GPU if there is one.
        progress: draw a progress bar.

    Raises:
        ConfigError: ``output`` holds a run already, the run to be continued was made with other settings or data, or
            the encoders do not fit.
        CheckpointError: a checkpoint cannot be read or written.
        SimtorealError: the loss stopped being finite.
    """
    with joined_processes(device) as processes:
        return Training(
            policy_config, config, data, Path(output), processes, resume, progress, kind=kind, encoder=encoder
        ).run()


class Training:
    """One training, from the first step or the newest checkpoint; :func:`train` is the way to run it.

    Attributes:
        policy: with the current, not the averaged, weights.
        step: optimiser steps taken.
    """

    def __init__(
        self,
        policy_config: PolicyConfig,
        config: TrainerConfig,
        data: TrainingData,
        output: Path,
        processes: Processes,
        resume: bool,
        progress: bool,
        *,
        kind: type[Policy] | None = None,
        encoder: str | Path | None = None,
    ) -> None:
        if config.batch_size < processes.world:
            raise ConfigError(f"trainer.batch_size is {config.batch_size}, less than {processes.world} processes")
        self.config, self.data, self.output, self.processes = config, data, output, processes
        self.progress = progress and processes.first
        self.fingerprint = data.fingerprint()
        self.step, self.seconds, self.validation_error = 0, 0.0, None
        found = checkpoints.checkpoints_to_continue(output, resume)
        device = processes.device
        self.precision = choose_precision(config.precision, device)
        seed_everything(config.seed, 0)
        policy = (kind or policy_class(policy_config.type))(policy_config, data.embodiment, data.statistics)
        self.encoder: dict[str, Any] = {"encoder": None}
        if encoder is not None and not found:
            self.encoder = describe_encoders(transfer_encoders(policy, encoder))
        self.policy: Policy = policy.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.policy, config)
        self.names = [name for name, parameter in self.policy.named_parameters() if parameter.requires_grad]
        self.parameters = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.average = WeightAverage(self.parameters)
        if found:
            self._restore(found[-1], encoder)
        self.module: nn.Module = self.policy
        if processes.world > 1:
            self.module = nn.parallel.DistributedDataParallel(self.policy, gradient_as_bucket_view=True)
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")

    def run(self) -> TrainingResult:
        """Take the steps that are left."""
        config = self.config
        if self.processes.first:
            self.output.mkdir(parents=True, exist_ok=True)
            checkpoints.clear_leftovers(self.output)
        self.processes.barrier()
        if self.step < config.steps:
            if self.processes.first:
                limits = {"first_step": self.step, "last_step": config.steps}
                with TrainingLog(self.output, **limits, progress=self.progress) as log:
                    self._loop(log)
            else:
                self._loop(None)
        return TrainingResult(
            run=self.output,
            steps=self.step,
            seconds=self.seconds,
            parameters=sum(parameter.numel() for parameter in self.parameters),
            validation_error=self.validation_error,
        )

    def _loop(self, log: TrainingLog | None) -> None:
        config, processes = self.config, self.processes
        batches = training_batches(
            self.data.train, batch_size=config.batch_size, seed=config.seed, first_step=self.step,
            last_step=config.steps, device=processes.device, rank=processes.rank, world=processes.world,
            probabilities=self.data.probabilities,
        )  # fmt: skip
        began, earlier = time.monotonic(), self.seconds
        mark, marked_step = began, self.step
        for batch in batches:
            losses, norm = self.take_step(batch)
            self.step += 1
            last = self.step == config.steps
            saving = last or self.step % config.checkpoint_every == 0
            logging = last or self.step % config.log_every == 0
            self.seconds = earlier + time.monotonic() - began
            metrics: dict[str, Any] = {}
            if logging or saving:
                metrics = self._finite_metrics(losses, norm)
                now = time.monotonic()
                metrics["samples_per_s"] = (self.step - marked_step) * config.batch_size / max(now - mark, 1e-9)
                metrics["seconds"] = self.seconds
                mark, marked_step = now, self.step
            if log is not None:
                if last or self.step % config.validate_every == 0:
                    metrics |= self._validate()
                    mark = time.monotonic()
                if metrics:
                    log.write(self.step, metrics)
                log.advance(self.step)
                if saving:
                    self._save()
            if saving:
                processes.barrier()

    def take_step(self, batch: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """Change the weights by one batch; return the losses and the norm of the gradient before clipping."""
        seed_everything(self.config.seed, self.step + 1, self.processes.rank)
        rate = learning_rate(self.config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.module.train()
        with torch.autocast(self.processes.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self.module(batch)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient_norm, foreach=True)
        self.optimizer.step()
        self.average.update()
        return {name: value.detach() for name, value in losses.items()}, norm

    def _finite_metrics(self, losses: Mapping[str, Tensor], norm: Tensor) -> dict[str, Any]:
        metrics = {name: float(value) for name, value in losses.items()}
        metrics["gradient_norm"] = float(norm)
        metrics["learning_rate"] = learning_rate(self.config, self.step - 1)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
            raise SimtorealError(
                f"training diverged at step {self.step}: loss {metrics['loss']}, gradient norm "
                f"{metrics['gradient_norm']}. Earlier checkpoints are intact. Lower trainer.learning_rate, "
                "or set trainer.precision to fp32."
            )
        return metrics

    def _validate(self) -> dict[str, Any]:
        """Return the absolute action error of the averaged weights on held-out windows, overall and per step."""
        windows, device = self.data.valid, self.processes.device
        if windows is None:
            return {}
        count = min(len(windows), self.config.validation_windows)
        indices = np.linspace(0, len(windows) - 1, count).round().astype(np.int64)
        generator = torch.Generator().manual_seed(self.config.seed)
        errors, weights = [], []
        self.policy.eval()
        with self.average.applied(), torch.inference_mode():
            for part in np.array_split(indices, math.ceil(count / 256)):
                batch = to_tensors(windows.batch(part), device)
                predicted = self.policy.predict(batch["observation"], batch["instruction"], generator)
                mask = batch["action_mask"].float()
                errors.append(((predicted - batch["actions"]).abs().mean(-1) * mask).sum(0).cpu())
                weights.append(mask.sum(0).cpu())
        error, weight = torch.stack(errors).sum(0), torch.stack(weights).sum(0)
        self.validation_error = float(error.sum() / weight.sum())
        per_step = (error / weight.clamp_min(1)).tolist()
        return {"validation_error": self.validation_error, "validation_error_per_step": per_step}

    def _training(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "trainer": checkpoints.plain_config(self.config),
            "precision": self.precision,
            "seconds": self.seconds,
            "parameters": sum(parameter.numel() for parameter in self.parameters),
            "validation_error": self.validation_error,
            "average_updates": self.average.updates,
            "processes": self.processes.world,
            **self.encoder,
            "data": {
                "source": self.data.source,
                "seeds": sorted({*self.data.seeds, *self.encoder.get("encoder_seeds", ())}),
                "fingerprint": self.fingerprint,
                "windows": len(self.data.train),
                "held_out_windows": len(self.data.valid) if self.data.valid is not None else 0,
            },
            "task": self.data.task,
            "provenance": provenance([self.config.seed]),
        }

    def _save(self) -> None:
        weights = dict(self.policy.state_dict())
        averages = dict(zip(self.parameters, self.average.averages, strict=True))
        # A shared tensor has several names in the state dictionary, and the last of them decides what is loaded.
        for name, parameter in self.policy.named_parameters(remove_duplicate=False):
            weights[name] = averages.get(parameter, weights[name])
        state: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            state[f"parameter/{name}"] = parameter
            kept = self.optimizer.state.get(parameter, {})
            state |= {f"{moment}/{name}": kept[moment] for moment in MOMENTS if moment in kept}
        checkpoints.save_checkpoint(
            self.output, self.step, self.policy, weights=weights, state=state, training=self._training()
        )

    def _restore(self, folder: Path, encoder: str | Path | None) -> None:
        training = checkpoints.read_json(folder / checkpoints.TRAINING)
        self._require_same_training(folder, training, encoder)
        self.encoder = {key: value for key, value in training.items() if key.startswith("encoder")}
        weights = checkpoints.load_tensors(folder / checkpoints.MODEL)
        checkpoints.load_weights(self.policy, weights, folder)
        state = checkpoints.load_tensors(folder / checkpoints.STATE)
        try:
            self.step, self.seconds = int(training["step"]), float(training["seconds"])
            self.average.updates = int(training["average_updates"])
            self.precision, self.validation_error = training["precision"], training["validation_error"]
            for index, (name, parameter) in enumerate(zip(self.names, self.parameters, strict=True)):
                # Not what the parameter was loaded with: under a shared tensor's other names, checkpoints of earlier
                # versions hold its current value.
                self.average.averages[index].copy_(weights[name])
                with torch.no_grad():
                    parameter.copy_(state[f"parameter/{name}"])
                if f"{MOMENTS[0]}/{name}" in state:
                    # The moments must lie in memory as the parameter does (channels last).
                    moments = [torch.empty_like(parameter).copy_(state[f"{moment}/{name}"]) for moment in MOMENTS[1:]]
                    count = state[f"{MOMENTS[0]}/{name}"].to(parameter.device)
                    self.optimizer.state[parameter] = dict(zip(MOMENTS, [count, *moments], strict=True))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder} cannot continue a training: {error}; use another checkpoint") from error

    def _require_same_training(self, folder: Path, training: dict[str, Any], encoder: str | Path | None) -> None:
        def decisive(trainer: dict[str, Any] | None) -> dict[str, Any]:
            return {key: value for key, value in (trainer or {}).items() if key not in HARMLESS}

        data, own = training.get("data") or {}, self.policy.config
        policy = read_yaml(folder / checkpoints.CONFIG)
        if policy.get("type") == own.type:
            policy = checkpoints.plain_config(checkpoints.stored_config(type(own), policy, folder))
        stored_encoder, encoder_now = compare_encoders(training, encoder)
        stored = {
            "policy": policy,
            "trainer": decisive(training.get("trainer")),
            "data": {key: data.get(key) for key in ("windows", "fingerprint")},
            "processes": training.get("processes"),
            "encoder": stored_encoder,
        }
        now = {
            "policy": checkpoints.plain_config(own),
            "trainer": decisive(checkpoints.plain_config(self.config)),
            "data": {"windows": len(self.data.train), "fingerprint": self.fingerprint},
            "processes": self.processes.world,
            "encoder": encoder_now,
        }
        lines = _differences("", stored, now)
        if lines:
            listed = "\n  ".join(lines)
            raise ConfigError(
                f"cannot continue {folder}: it was made with other settings or data:\n  {listed}\n"
                "Resume with the same ones, or train into another folder."
            )


def _differences(prefix: str, stored: Any, now: Any) -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = [*stored, *(key for key in now if key not in stored)]
        return [
            line
            for key in keys
            for line in _differences(f"{prefix}.{key}" if prefix else key, stored.get(key), now.get(key))
        ]
    return [] if stored == now else [f"{prefix}: {stored} (checkpoint) != {now} (now)"]
