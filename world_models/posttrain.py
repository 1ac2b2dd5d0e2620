"""Post-training of a world model with inverse rewards (RLIR, arXiv 2509.23958), and what it has to be compared with.

Videos are generated from real frames under the actions that were really taken there. ``rlir`` generates a group of them
per frame, rewards those whose actions an inverse-dynamics model can read
(:mod:`simtoreal.world_models.inverse_reward`), and moves the generator by GRPO (Shao et al. 2024) towards the better
ones of each group. Only the dynamics are trained.

Nothing random has a hidden state: contexts and noise of a step follow from the seed and the step, so an interrupted
training continues bit by bit on a CPU.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.errors import CheckpointError, ConfigError, DatasetError, SimtorealError
from simtoreal.envs.provenance import provenance
from simtoreal.policies import checkpoint as folders
from simtoreal.policies.config import TrainerConfig
from simtoreal.policies.grpo import group_advantages
from simtoreal.policies.inverse_dynamics import mean_actions
from simtoreal.policies.policy_gradient import clipped_surrogate
from simtoreal.policies.trainer import MOMENTS, choose_precision, make_optimizer, seed_everything
from simtoreal.policies.training_log import TrainingLog
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model, save_world_model
from simtoreal.world_models.inverse_reward import InverseReward, require_whole_pairs
from simtoreal.world_models.latent_video import LatentVideo
from simtoreal.world_models.learned_episodes import describe_episodes
from simtoreal.world_models.posttrain_config import PosttrainConfig
from simtoreal.world_models.random_videos import video_walk
from simtoreal.world_models.stages import EncodedData
from simtoreal.world_models.training_windows import TrainingWindows
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

WARMUP_STEPS = 20
# A pass with gradient costs about three without.
GRADIENT_COST = 3
# Keeps the draws apart from those of the training before it.
POSTTRAIN_SEED = 5_000_011
# Settings that may change when a training is continued: they do not touch the weights.
HARMLESS = ("checkpoint_every", "log_every")
STAGE = "posttrain"


@dataclass(frozen=True, kw_only=True)
class PosttrainResult:
    """Outcome.

    Attributes:
        run: run folder, a world model like any other.
        steps: steps taken in all.
        frame_passes: see :class:`~simtoreal.world_models.posttrain_config.PosttrainConfig`.
        seconds: wall time of the steps, over all sessions.
    """

    run: Path
    steps: int
    frame_passes: int
    seconds: float


def posttrain(
    model: LoadedWorldModel,
    config: PosttrainConfig,
    data: VideoData,
    episodes: np.ndarray,
    reward: InverseReward,
    output: Path,
    *,
    resume: bool = False,
    progress: bool = False,
) -> PosttrainResult:
    """Train the dynamics of ``model`` on, and leave checkpoints in ``output/checkpoints``.

    Args:
        model: to begin with; it is changed.
        config: how.
        data: real videos.
        episodes: ``(E,)`` bool: to begin videos in.
        reward: made from the inverse-dynamics model.
        output: run folder.
        resume: continue from the newest checkpoint in ``output`` (from the beginning if there is none).
        progress: draw a progress bar.

    Raises:
        ConfigError: ``output`` holds a run already, it was made with other settings, or the steps do not fit the
            models.
        CheckpointError: a checkpoint cannot be read or written.
        DatasetError: no episode is long enough.
        SimtorealError: the loss stopped being finite.
    """
    return _Posttraining(model, config, data, episodes, reward, output, resume, progress).run()


class _Posttraining:
    def __init__(
        self,
        loaded: LoadedWorldModel,
        config: PosttrainConfig,
        data: VideoData,
        episodes: np.ndarray,
        reward: InverseReward,
        output: Path,
        resume: bool,
        progress: bool,
    ) -> None:
        loaded.embodiment.require_equal(data.embodiment, f"world model {loaded.folder}", "the data")
        require_whole_pairs(reward.model, config.steps)
        self.initial, self.config, self.data, self.reward = loaded, config, data, reward
        self.episodes = episodes
        self.output, self.progress = output, progress
        self.model: WorldModel = loaded.model
        self.device = self.model.device
        self.precision = choose_precision(config.precision, self.device)
        found = folders.checkpoints_to_continue(output, resume)
        self.dynamics = self.model.dynamics.requires_grad_(True)
        self.reference = copy.deepcopy(self.model.dynamics).requires_grad_(False)
        self.walk = video_walk(self.dynamics, config.noise_scale)
        self.reference_walk = video_walk(self.reference, config.noise_scale)
        lag, lengths = reward.model.lag, data.ends - data.starts
        # Actions from `lag` steps before a frame to `steps` after it lie in the episode, and so does the last frame.
        self.frames = np.concatenate(
            [
                np.arange(start + lag, end - config.steps)
                for start, end, chosen in zip(data.starts, data.ends, episodes, strict=True)
                if chosen
            ]
            or [np.zeros(0, np.int64)]
        )
        if not len(self.frames):
            raise DatasetError(
                f"no episode to learn from is longer than {lag + config.steps} steps (the longest has "
                f"{lengths.max()}); collect longer ones, or choose fewer --posttrain.steps"
            )
        schedule = TrainerConfig(learning_rate=config.learning_rate, weight_decay=0.0)
        self.optimizer = make_optimizer(self.dynamics, schedule)
        self.names = [name for name, _ in self.dynamics.named_parameters()]
        self.parameters = list(self.dynamics.parameters())
        self.step, self.seconds, self.finished = 0, 0.0, False
        if found:
            self._restore(found[-1])

    def run(self) -> PosttrainResult:
        """Take the steps that are left."""
        config, total = self.config, math.ceil(self.config.frame_passes / self._passes())
        if not self.finished:
            self.output.mkdir(parents=True, exist_ok=True)
            folders.clear_leftovers(self.output)
            with torch.no_grad(), self._autocast():
                self.video: LatentVideo = EncodedData(self.model, self.data, self.device).video
                followed = self.video.usable(self.frames, 1)
                self.windows = TrainingWindows(self.model, self.data, self.video, followed, self.episodes)
            self.dynamics.train()
            with TrainingLog(self.output, first_step=self.step, last_step=total, progress=self.progress) as log:
                while self.step < total:
                    begun = time.monotonic()
                    metrics = self._take_step()
                    self.step += 1
                    self.seconds += time.monotonic() - begun
                    last = self.step == total
                    if last or self.step % config.log_every == 0:
                        log.write(self.step, self._finite(metrics))
                    log.advance(self.step)
                    if last or self.step % config.checkpoint_every == 0:
                        self._finite(metrics)
                        self._save(finished=last)
        self.model.eval().requires_grad_(False)
        return PosttrainResult(
            run=self.output, steps=self.step, frame_passes=self.step * self._passes(), seconds=self.seconds
        )

    def _passes(self) -> int:
        """Frame passes of one step."""
        config, once = self.config, self.walk.passes(self.config.steps)
        videos = config.contexts * config.group_size
        supervised = GRADIENT_COST * config.batch_size * self.dynamics.window_steps(1.0)
        if config.method == "rlir":
            # Sampling, the densities before the update, those of the reference, and the updates.
            return videos * once * (3 + GRADIENT_COST * config.epochs)
        return supervised + (GRADIENT_COST * config.contexts * once if config.method == "sft_idm" else 0)

    def _take_step(self) -> dict[str, Tensor]:
        seed_everything(self.config.seed + POSTTRAIN_SEED, self.step)
        rate = self.config.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return self._reinforce() if self.config.method == "rlir" else self._supervise()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _update(self, loss: Tensor) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_gradient_norm, foreach=True)
        self.optimizer.step()
        return norm

    def _draw(self, times: int) -> tuple[np.ndarray, Tensor, Tensor]:
        """Frames ``(contexts times,)`` to begin in, commands ``(., K, C')`` and mean actions ``(., pairs, A)``."""
        config, gap = self.config, self.reward.model.gap
        frames = np.repeat(np.random.choice(self.frames, config.contexts), times)
        commands = self.video.commands[torch.from_numpy(frames[:, None] + np.arange(config.steps))]
        first = frames[:, None] + np.arange(0, config.steps, gap)
        wanted = mean_actions(self.data.actions, first.reshape(-1), gap, self.reward.model.lag)
        return frames, commands, torch.from_numpy(wanted).to(self.device).unflatten(0, (len(frames), -1))

    def _pictures(self, frames: np.ndarray, latents: Tensor) -> Tensor:
        """Videos ``(N, K + 1, V, H, W, 3)`` float 0 to 255 that begin with real frames; differentiable in latents."""
        model = self.model
        pixels = model.tokenizer.decode(latents.flatten(0, 1).unflatten(1, (model.views, -1)).flatten(0, 1))
        images = pixels.float().add(1.0).mul(127.5).clamp(0, 255).permute(0, 2, 3, 1)
        images = images.unflatten(0, (*latents.shape[:2], model.views))
        first = torch.from_numpy(self.data.images[frames]).to(self.device).float()
        return torch.cat([first[:, None], images], 1)

    def _reinforce(self) -> dict[str, Tensor]:
        config, walk = self.config, self.walk
        frames, commands, wanted = self._draw(config.group_size)
        groups = torch.arange(len(frames)) // config.group_size
        self.dynamics.eval()
        with torch.no_grad(), self._autocast():
            videos = walk.sample(self.video.state(frames), commands, None)
            rewards = torch.cat(
                [
                    self.reward(self._pictures(frames[part], videos.latents[part]).round(), wanted[part])
                    for part in torch.arange(len(frames)).split(64)
                ]
            ).float()
            # Not with the least deviation that rollouts of a policy get: videos that begin alike differ by hundredths.
            advantages, differ = group_advantages(rewards.cpu(), groups, normalize=True)
            advantages = advantages.to(self.device)
            # In the same parts as the updates, so that equal weights give ratios of exactly 1.
            parts = torch.arange(len(videos.video), device=self.device).split(math.ceil(len(videos.video) / 4))
            before = [videos.log_density(walk.means(videos, rows), rows) for rows in parts]
            anchors = [self.reference_walk.means(videos, rows) for rows in parts]
        metrics: dict[str, Tensor] = {"reward": rewards.mean(), "differing": differ.float().mean()}
        for _ in range(config.epochs):
            for rows, old, anchor in zip(parts, before, anchors, strict=True):
                with self._autocast():
                    means = walk.means(videos, rows)
                loss, stopped = clipped_surrogate(
                    videos.log_density(means, rows) - old, advantages[videos.video[rows]], config.clip
                )
                divergence = 0.5 * videos.divergence(means, anchor, rows).mean()
                total = loss.mean() + config.kl_weight * divergence
                norm = self._update(total)
                metrics |= {"loss": total.detach(), "divergence": divergence.detach(), "gradient_norm": norm}
                metrics["clip_fraction"] = stopped.float().mean()
        return metrics

    def _supervise(self) -> dict[str, Tensor]:
        config = self.config
        steps = self.dynamics.window_steps(1.0)
        self.dynamics.train()
        with self._autocast():
            losses = self.dynamics.loss(self.windows.draw(config.batch_size, steps))
            loss = losses["loss"]
            if config.method == "sft_idm":
                frames, commands, wanted = self._draw(1)
                latents, _ = self.dynamics.imagine(self.video.state(frames), commands)
                inverse = self.reward.error(self._pictures(frames, latents), wanted)
                loss = loss + config.inverse_weight * inverse
                losses["inverse_error"] = inverse.detach()
        norm = self._update(loss)
        return {**losses, "loss": loss.detach(), "gradient_norm": norm}

    def _finite(self, metrics: dict[str, Tensor]) -> dict[str, Any]:
        found = {name: float(value) for name, value in metrics.items()}
        if not (math.isfinite(found["loss"]) and math.isfinite(found["gradient_norm"])):
            raise SimtorealError(
                f"post-training diverged at step {self.step}: loss {found['loss']}, gradient norm "
                f"{found['gradient_norm']}. Earlier checkpoints are intact. Lower --posttrain.learning-rate."
            )
        return {**found, "seconds": self.seconds, "frame_passes": self.step * self._passes()}

    def _save(self, *, finished: bool) -> None:
        before = self.initial.training
        training = {
            **{key: before[key] for key in ("task", "metrics") if key in before},
            "data": {
                **(before.get("data") or {}),
                **describe_episodes(self.data.names, self.data.seeds, self.episodes, before.get("data")),
            },
            "step": self.step, "stage": STAGE, "finished": finished, "trainer": self._identity(),
            "precision": self.precision, "seconds": self.seconds, "average_updates": 0, "initial": self._initial(),
            "provenance": provenance([self.config.seed]),
        }  # fmt: skip
        state = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            kept = self.optimizer.state.get(parameter, {})
            state |= {f"{moment}/{name}": kept[moment] for moment in MOMENTS if moment in kept}
        weights = self.model.state_dict()
        save_world_model(self.output, self.step, self.model, weights=weights, state=state, training=training)
        self.finished = finished

    def _initial(self) -> str:
        return str(self.initial.folder.resolve())

    def _identity(self) -> dict[str, Any]:
        """What decides the weights."""
        settings = {key: value for key, value in folders.plain_config(self.config).items() if key not in HARMLESS}
        return {
            **settings, "data": self.data.fingerprint(), "frames": len(self.frames),
            "deviation": [round(float(value), 6) for value in self.reward.deviation],
        }  # fmt: skip

    def _restore(self, folder: Path) -> None:
        there = load_world_model(folder, unfinished=True)
        now, then = {**self._identity(), "initial": self._initial()}, dict(there.training.get("trainer") or {})
        then["initial"] = there.training.get("initial")
        differing = [
            f"{key}: {then.get(key)} (checkpoint) != {now[key]} (now)" for key in now if now[key] != then.get(key)
        ]
        if differing:
            listed = "\n  ".join(differing)
            raise ConfigError(
                f"cannot continue {folder}: it was made with other settings, models or data:\n  {listed}\n"
                "Resume with the same ones, or choose another folder."
            )
        self.step, self.seconds = int(there.training["step"]), float(there.training["seconds"])
        self.precision, self.finished = there.training["precision"], bool(there.training["finished"])
        self.dynamics.load_state_dict(there.model.dynamics.state_dict())
        state = folders.load_tensors(folder / folders.STATE)
        try:
            for name, parameter in zip(self.names, self.parameters, strict=True):
                if f"{MOMENTS[0]}/{name}" in state:
                    moments = [torch.empty_like(parameter).copy_(state[f"{moment}/{name}"]) for moment in MOMENTS[1:]]
                    count = state[f"{MOMENTS[0]}/{name}"].to(parameter.device)
                    self.optimizer.state[parameter] = dict(zip(MOMENTS, [count, *moments], strict=True))
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{folder} cannot continue a training: {error}; use another checkpoint") from error
