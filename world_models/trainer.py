"""Training of a world model: tokenizer, dynamics, success classifier, one after the other.

As in :mod:`simtoreal.policies.trainer`, nothing random has a hidden state: batches and noise of a step follow from the
seed, the stage and the step. So a training that was interrupted continues bit by bit (on a CPU with the same number of
threads), in the middle of any stage.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simtoreal.envs.errors import CheckpointError, ConfigError, SimtorealError
from simtoreal.envs.provenance import provenance
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.policies import checkpoint as folders
from simtoreal.policies.averaging import WeightAverage
from simtoreal.policies.distributed import choose_device
from simtoreal.policies.trainer import MOMENTS, choose_precision, learning_rate, make_optimizer, seed_everything
from simtoreal.policies.training_log import TrainingLog
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model, save_world_model
from simtoreal.world_models.config import WorldModelConfig, WorldModelTrainerConfig
from simtoreal.world_models.learned_episodes import describe_episodes
from simtoreal.world_models.stages import ClassifierStage, DynamicsStage, EncodedData, Stage, TokenizerStage
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel, fit_world_statistics, require_possible

# Settings that may change when a training is continued: they do not touch the weights.
HARMLESS = ("checkpoint_every", "log_every")
# Keeps the draws of the stages apart.
STAGE_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True)
class WorldModelResult:
    """Outcome of a training.

    Attributes:
        run: run folder, which :func:`~simtoreal.world_models.checkpoint.load_world_model` accepts.
        steps: optimiser steps taken in all.
        seconds: wall time of the optimiser steps, over all sessions.
        parameters: number of trained values.
        metrics: name -> what was measured at the end of the stages, on held-out episodes (the classifier's on all,
            if ``classifier_judged_on_training`` is 1).
    """

    run: Path
    steps: int
    seconds: float
    parameters: int
    metrics: dict[str, float]


def train_world_model(
    model_config: WorldModelConfig,
    config: WorldModelTrainerConfig,
    data: VideoData,
    output: str | Path,
    *,
    initial: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    progress: bool = False,
) -> WorldModelResult:
    """Train a world model and leave checkpoints in ``output/checkpoints``.

    Args:
        model_config: sizes; those of ``initial``, if given, win.
        config: how to train it.
        data: what to train it on.
        output: run folder.
        initial: world model to begin with (PACE, WoVR §3.3): its tokenizer and scales are kept, dynamics and
            classifier are trained on for ``config.fine_tune_share`` of their steps.
        resume: continue from the newest checkpoint in ``output`` (from the beginning if there is none).
        device: torch device; None picks a GPU if there is one.
        progress: draw a progress bar.

    Raises:
        ConfigError: ``output`` holds a run already, the run to be continued was made with other settings or data, or no
            world model of these sizes can be made of the data.
        CheckpointError: a checkpoint cannot be read or written.
        DatasetError: the data have successes or failures only, so that no classifier can be trained.
        EmbodimentMismatchError: ``initial`` is of another embodiment than the data.
        SimtorealError: the loss stopped being finite.
    """
    chosen = choose_device(device)
    return _Training(model_config, config, data, Path(output), initial, resume, chosen, progress).run()


class _Training:
    def __init__(
        self,
        model_config: WorldModelConfig,
        config: WorldModelTrainerConfig,
        data: VideoData,
        output: Path,
        initial: str | Path | None,
        resume: bool,
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.data, self.output, self.device, self.progress = config, data, output, device, progress
        ClassifierStage.require_both_classes(data)
        if initial is None:
            require_possible(model_config, data.embodiment, data.names[0])
        self.precision = choose_precision(config.precision, device)
        self.seconds, self.step, self.metrics = 0.0, 0, {}
        found = folders.checkpoints_to_continue(output, resume)
        self.initial = load_world_model(initial) if initial is not None else None
        if self.initial is not None:
            self.initial.embodiment.require_equal(data.embodiment, f"world model {initial}", "the data")
        self.continued = load_world_model(found[-1], unfinished=True) if found else None
        seed_everything(config.seed, 0)
        model = self._model(model_config)
        self.model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.stages = self._stages()
        if self.continued is not None:
            self._require_same(self.continued, model_config)

    def _model(self, model_config: WorldModelConfig) -> WorldModel:
        """The model to begin with: the checkpoint's, the initial one's, or a new one."""
        source = self.continued or self.initial
        if source is None:
            return WorldModel(model_config, self.data.embodiment, fit_world_statistics(self.data))
        source.model.requires_grad_(True)
        return source.model

    def _stages(self) -> list[Stage]:
        config = self.config
        if self.initial is None:
            schedules = [config.tokenizer.schedule(), config.dynamics.schedule(), config.classifier.schedule()]
        else:
            kept = [config.dynamics.schedule(), config.classifier.schedule()]
            schedules = [dataclasses.replace(one, steps=math.ceil(one.steps * config.fine_tune_share)) for one in kept]
        kinds: list[type[Stage]] = [TokenizerStage, DynamicsStage, ClassifierStage][-len(schedules) :]  # type: ignore[list-item]
        encoded = EncodedData(self.model, self.data, self.device)
        return [
            kind(encoded, schedule, fresh=self.initial is None) for kind, schedule in zip(kinds, schedules, strict=True)
        ]

    def run(self) -> WorldModelResult:
        """Take the steps that are left."""
        total = sum(stage.schedule.steps for stage in self.stages)
        done = int(self.continued.training["step"]) if self.continued else 0
        if done < total:
            self.output.mkdir(parents=True, exist_ok=True)
            folders.clear_leftovers(self.output)
            with TrainingLog(self.output, first_step=done, last_step=total, progress=self.progress) as log:
                begun = 0
                for index, stage in enumerate(self.stages):
                    if done < begun + stage.schedule.steps:
                        self._run_stage(index, stage, begun, max(0, done - begun), log)
                    begun += stage.schedule.steps
        elif self.continued is not None:
            self.step, self.seconds = done, float(self.continued.training["seconds"])
            self.metrics = dict(self.continued.training["metrics"])
        return WorldModelResult(
            run=self.output,
            steps=self.step,
            seconds=self.seconds,
            parameters=sum(parameter.numel() for parameter in self.model.parameters()),
            metrics=self.metrics,
        )

    def _run_stage(self, index: int, stage: Stage, begun: int, first: int, log: TrainingLog) -> None:
        config = self.config
        optimizer = make_optimizer(stage.module, stage.schedule)
        names = [name for name, _ in stage.module.named_parameters()]
        parameters = list(stage.module.parameters())
        average = WeightAverage(parameters)
        with torch.no_grad(), self._autocast():
            stage.prepare()
        if self.continued is not None:
            self._restore(self.continued, first, optimizer, names, parameters, average)
            self.continued = None
        mark, marked = time.monotonic(), first
        for step in range(first, stage.schedule.steps):
            started = time.monotonic()
            seed_everything(config.seed + STAGE_SEED * (index + 1), step)
            rate = learning_rate(stage.schedule, step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            stage.module.train()
            with self._autocast():
                losses = stage.loss(step)
            optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
            norm = nn.utils.clip_grad_norm_(parameters, stage.schedule.max_gradient_norm, foreach=True)
            optimizer.step()
            average.update()
            self.step = begun + step + 1
            self.seconds += time.monotonic() - started
            last = step + 1 == stage.schedule.steps
            saving = self.step % config.checkpoint_every == 0 and not last
            if last or saving or self.step % config.log_every == 0:
                metrics = self._metrics(stage, losses, norm, rate)
                now = time.monotonic()
                metrics["samples_per_s"] = (step + 1 - marked) * stage.schedule.batch_size / max(now - mark, 1e-9)
                mark, marked = now, step + 1
                log.write(self.step, metrics)
            log.advance(self.step)
            if saving:
                self._save(stage, index, optimizer, names, parameters, average)
        # What follows is built on the averaged weights.
        with torch.no_grad(), self._autocast():
            for parameter, averaged in zip(parameters, average.averages, strict=True):
                parameter.copy_(averaged)
            stage.module.eval()
            found = stage.finish()
        self.metrics |= {f"{stage.name}_{name}": value for name, value in found.items()}
        log.write(self.step, found)
        self._save(stage, index, None, names, parameters, average)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _metrics(self, stage: Stage, losses: dict[str, Tensor], norm: Tensor, rate: float) -> dict[str, Any]:
        metrics: dict[str, Any] = {name: float(value.detach()) for name, value in losses.items()}
        metrics |= {"gradient_norm": float(norm), "learning_rate": rate, "seconds": self.seconds, "stage": stage.name}
        if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
            raise SimtorealError(
                f"training of the {stage.name} diverged at step {self.step}: loss {metrics['loss']}, gradient norm "
                f"{metrics['gradient_norm']}. Earlier checkpoints are intact. Lower "
                f"trainer.{stage.name}.learning_rate, or set trainer.precision to fp32."
            )
        return metrics

    def _training(self, stage: Stage, index: int, finished: bool) -> dict[str, Any]:
        return {
            "step": self.step,
            "stage": stage.name,
            "finished": finished,
            "trainer": folders.plain_config(self.config),
            "precision": self.precision,
            "seconds": self.seconds,
            "metrics": self.metrics,
            "average_updates": 0,
            "initial": str(self.initial.folder) if self.initial else None,
            "initial_checkpoint": checkpoint_digest(self.initial.folder) if self.initial else None,
            "data": {
                **describe_episodes(
                    self.data.names,
                    self.data.seeds,
                    ~self.data.held_out,
                    self.initial.training.get("data") if self.initial else None,
                ),
                "frames": len(self.data),
                "fingerprint": self.data.fingerprint(),
            },
            "task": self.data.task,
            "provenance": provenance([self.config.seed]),
        }

    def _save(
        self,
        stage: Stage,
        index: int,
        optimizer: torch.optim.Optimizer | None,
        names: list[str],
        parameters: list[nn.Parameter],
        average: WeightAverage,
    ) -> None:
        """Write a checkpoint; without an optimiser the stage is over and there is nothing of it to continue."""
        finished = optimizer is None and index + 1 == len(self.stages)
        training = self._training(stage, index, finished)
        weights, state = dict(self.model.state_dict()), {"empty": torch.zeros(0)}
        if optimizer is not None:
            training["average_updates"] = average.updates
            prefix = stage.name
            weights |= {f"{prefix}.{name}": kept for name, kept in zip(names, average.averages, strict=True)}
            for name, parameter in zip(names, parameters, strict=True):
                state[f"parameter/{name}"] = parameter
                kept = optimizer.state.get(parameter, {})
                state |= {f"{moment}/{name}": kept[moment] for moment in MOMENTS if moment in kept}
        save_world_model(self.output, self.step, self.model, weights=weights, state=state, training=training)

    def _restore(
        self,
        loaded: LoadedWorldModel,
        first: int,
        optimizer: torch.optim.Optimizer,
        names: list[str],
        parameters: list[nn.Parameter],
        average: WeightAverage,
    ) -> None:
        training = loaded.training
        self.seconds, self.metrics = float(training["seconds"]), dict(training["metrics"])
        self.precision = training["precision"]
        if first == 0:
            return
        state = folders.load_tensors(loaded.folder / folders.STATE)
        try:
            average.updates = int(training["average_updates"])
            for index, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
                average.averages[index].copy_(parameter.detach())
                with torch.no_grad():
                    parameter.copy_(state[f"parameter/{name}"])
                if f"{MOMENTS[0]}/{name}" in state:
                    moments = [torch.empty_like(parameter).copy_(state[f"{moment}/{name}"]) for moment in MOMENTS[1:]]
                    count = state[f"{MOMENTS[0]}/{name}"].to(parameter.device)
                    optimizer.state[parameter] = dict(zip(MOMENTS, [count, *moments], strict=True))
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{loaded.folder} cannot continue a training: {error}; use another checkpoint"
            ) from error

    def _require_same(self, loaded: LoadedWorldModel, model_config: WorldModelConfig) -> None:
        def decisive(trainer: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in trainer.items() if key not in HARMLESS}

        stored, config = loaded.training, folders.plain_config(loaded.model.config)
        pairs = {
            "model": (config, config if self.initial else folders.plain_config(model_config)),
            "trainer": (decisive(stored["trainer"]), decisive(folders.plain_config(self.config))),
            "data": (stored["data"]["fingerprint"], self.data.fingerprint()),
            "initial": (
                stored.get("initial_checkpoint"),
                checkpoint_digest(self.initial.folder) if self.initial else None,
            ),
        }
        differing = [
            f"{name}: {there} (checkpoint) != {here} (now)" for name, (there, here) in pairs.items() if there != here
        ]
        if differing:
            listed = "\n  ".join(differing)
            raise ConfigError(
                f"cannot continue {loaded.folder}: it was made with other settings or data:\n  {listed}\n"
                "Resume with the same ones, or train into another folder."
            )
