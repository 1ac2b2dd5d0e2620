"""What each of the three trainings learns from, and how its result is measured on held-out episodes."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import numpy as np
import torch
from torch import Tensor, nn

from simtoreal.envs.errors import DatasetError
from simtoreal.policies.config import TrainerConfig
from simtoreal.world_models.classifier import calibrate_threshold, shows_success
from simtoreal.world_models.config import STRIDE
from simtoreal.world_models.imagined_frames import ImaginedFrames, imagine_episodes
from simtoreal.world_models.latent_video import LatentVideo, join_float16, weighted_error
from simtoreal.world_models.pixel_weights import PixelWeights
from simtoreal.world_models.tokenizer import cell_weights
from simtoreal.world_models.training_windows import TrainingWindows
from simtoreal.world_models.video_data import VideoData
from simtoreal.world_models.world_model import WorldModel

# Frames encoded at once, and held-out frames and windows that a measurement uses.
ENCODE_BATCH, HELD_OUT_FRAMES, HELD_OUT_WINDOWS = 256, 512, 128
HELD_OUT_STEPS = 10


class EncodedData:
    """The data as the model sees them; computed when they are first asked for, and shared by the stages.

    Args:
        model: its tokenizer must be trained when :attr:`video` is first asked for.
        data: to be encoded.
        device: where the model is.
    """

    def __init__(self, model: WorldModel, data: VideoData, device: torch.device) -> None:
        self.model, self.data, self.device = model, data, device

    @functools.cached_property
    def weights(self) -> PixelWeights:
        """Which pixels matter."""
        return PixelWeights(self.data, self.model.config.tokenizer)

    @functools.cached_property
    def video(self) -> LatentVideo:
        """Every frame encoded, with the weight of every cell."""
        data, model, latents, cells = self.data, self.model, [], []
        for frames in np.array_split(np.arange(len(data)), max(1, len(data) // ENCODE_BATCH)):
            latents.append(model.encode(self.images(frames)).half())
            views = [cell_weights(self.weights(frames, view), STRIDE) for view in range(model.views)]
            cells.append(torch.stack(views, 1).half().to(self.device))
        proprio = model.scale_proprio(torch.from_numpy(data.proprio).to(self.device))
        moves = torch.from_numpy(data.actions).to(self.device), torch.from_numpy(data.targets).to(self.device)
        commands = model.scale_commands(*moves)
        return LatentVideo(data, join_float16(latents), proprio, commands, join_float16(cells), model.memory)

    def images(self, frames: np.ndarray) -> Tensor:
        """``(len(frames), V, H, W, 3)`` uint8 on the device."""
        return torch.from_numpy(self.data.images[frames]).to(self.device)


class Stage(ABC):
    """One training.

    Attributes:
        name: of the part of the model that is trained.
        module: that part.
        schedule: steps, batch size and learning rate.

    Args:
        encoded: data to learn from, and the whole model; parts of earlier stages are used as they are.
        schedule: see above.
        fresh: False when an existing model is trained on, whose scales must stay.
    """

    name: str

    def __init__(self, encoded: EncodedData, schedule: TrainerConfig, *, fresh: bool) -> None:
        self.encoded, self.model, self.data, self.device = encoded, encoded.model, encoded.data, encoded.device
        self.schedule, self.fresh = schedule, fresh
        self.module: nn.Module = getattr(self.model, self.name)
        self.train_frames = self.data.frames_of(~self.data.held_out)
        self.held_out_frames = self.data.frames_of(self.data.held_out)

    @abstractmethod
    def prepare(self) -> None:
        """Compute what the whole training needs; called before its first step, also when it is continued."""

    @abstractmethod
    def loss(self, step: int) -> dict[str, Tensor]:
        """Return ``{"loss": scalar, ...}`` of a step; drawn from the global generators, which are seeded before."""

    @abstractmethod
    def finish(self) -> dict[str, float]:
        """Set what follows from the trained weights, and return what was measured on held-out episodes."""

    def draw(self, frames: np.ndarray) -> np.ndarray:
        """A batch of ``frames``."""
        return np.random.choice(frames, self.schedule.batch_size)


class TokenizerStage(Stage):
    """Learns to compress the images of all cameras."""

    name = "tokenizer"

    def prepare(self) -> None:
        """Count colours and medians."""
        self.weights = self.encoded.weights

    def loss(self, step: int) -> dict[str, Tensor]:
        """Weighted reconstruction error of images of one camera after the other."""
        views = self.model.views
        frames = [part for part in np.array_split(self.draw(self.train_frames), views) if len(part)]
        return self.model.tokenizer.loss(*self._batch(frames))

    def _batch(self, frames: list[np.ndarray]) -> tuple[Tensor, Tensor]:
        images = [torch.from_numpy(self.data.images[part, view]) for view, part in enumerate(frames)]
        weights = [self.weights(part, view) for view, part in enumerate(frames)]
        return torch.cat(images).to(self.device), torch.cat(weights).to(self.device)

    def finish(self) -> dict[str, float]:
        """Scale the latents; report the error of held-out images."""
        spread = self.train_frames[:: max(1, len(self.train_frames) // 2000)]
        parts = np.array_split(spread, max(1, len(spread) // ENCODE_BATCH))
        latents = torch.cat([self.model.encode(self.encoded.images(part)) for part in parts])
        self.model.tokenizer.set_scale(latents.unflatten(1, (self.model.views, -1)).flatten(0, 1))
        held_out = self.held_out_frames[:: max(1, len(self.held_out_frames) // HELD_OUT_FRAMES)]
        squared, weighted, count = 0.0, 0.0, 0
        for part in np.array_split(held_out, max(1, len(held_out) // ENCODE_BATCH)):
            images, weight = self._batch([part] * self.model.views)
            decoded = self.model.decode(self.model.encode(self.encoded.images(part))).transpose(0, 1).flatten(0, 1)
            error = ((decoded.float() - images.float()) / 255).square().mean(-1)
            squared += float(error.sum())
            weighted += float((error * weight).sum())
            count += error.numel()
        return {
            "psnr_db": float(-10 * np.log10(max(squared / count, 1e-10))),
            "weighted_psnr_db": float(-10 * np.log10(max(weighted / count, 1e-10))),
        }


class DynamicsStage(Stage):
    """Learns what comes next."""

    name = "dynamics"

    def prepare(self) -> None:
        """Encode the data once, and fit the linear model of proprio."""
        self.video = self.encoded.video
        followed = self.video.usable(self.train_frames, 1)
        if self.fresh:
            video = self.video
            self.model.dynamics.linear.fit(video.proprio, video.commands, video.first, followed)
        self.windows = TrainingWindows(self.model, self.data, self.video, followed, ~self.data.held_out)

    def loss(self, step: int) -> dict[str, Tensor]:
        """Error over a window; its length depends on the progress of the training."""
        # Somebody who trains on has a model that can live on its own predictions already.
        done = step / self.schedule.steps if self.fresh else 1.0
        steps = self.model.dynamics.window_steps(done)
        return self.model.dynamics.loss(self.windows.draw(self.schedule.batch_size, steps))

    def finish(self) -> dict[str, float]:
        """Open-loop error on held-out episodes, weighted as in training, beside that of a still picture."""
        model, config = self.model, self.model.config.dynamics
        steps = min(HELD_OUT_STEPS, int((self.data.ends - self.data.starts)[self.data.held_out].max()) - 1)
        usable = self.video.usable(self.held_out_frames, steps)
        window = self.video.window(usable[:: max(1, len(usable) // HELD_OUT_WINDOWS)], steps)
        _, latents, proprio = model.imagine(window.state, window.commands, torch.Generator().manual_seed(0))
        now = window.state.memory[:, -1]
        weight = window.importance(config.changed_weight)
        still = now[:, None].expand_as(window.latents)
        return {
            "error": float(weighted_error(latents, window.latents, weight).mean()),
            "still_error": float(weighted_error(still, window.latents, weight).mean()),
            "proprio_error": float((proprio - window.proprio).square().mean().sqrt()),
            "steps": float(steps),
        }


def evenly_chosen(episodes: np.ndarray, count: int) -> np.ndarray:
    """Return at most ``count`` of ``episodes``, from the first to the last: folders that came later count as much."""
    positions = np.linspace(0, len(episodes) - 1, min(count, len(episodes))).round().astype(int)
    return np.asarray(episodes[positions])


class ClassifierStage(Stage):
    """Learns what success looks like, on real and on generated frames."""

    name = "classifier"

    @staticmethod
    def require_both_classes(data: VideoData) -> None:
        """Refuse data from which success cannot be told from failure.

        Raises:
            DatasetError: the training episodes are all successes or all failures.
        """
        success = data.success[~data.held_out]
        if success.all() or not success.any():
            found, missing = ("successful", "failures") if success.all() else ("failures", "successes")
            raise DatasetError(
                f"all {len(success)} training episodes are {found}: a success classifier trained on one class only "
                f"rewards everything or nothing. Add {missing}, e.g. 'simtoreal collect --keep-failures --noise 0.5' "
                "or rollouts of a policy."
            )

    def prepare(self) -> None:
        """Encode the data, imagine episodes, and sort the frames into what the batches are made of."""
        video, data, config = self.encoded.video, self.data, self.model.config.classifier
        labels = torch.from_numpy(data.labels).to(self.device)
        chosen = evenly_chosen(np.flatnonzero(~data.held_out), config.generated_episodes)
        generated = imagine_episodes(self.model, data, video, chosen)
        use = _usable_generated(generated, data, config.close_error)
        self.latents = join_float16([video.latents, generated.latents[torch.from_numpy(use)]])
        self.proprio = torch.cat([video.proprio, generated.proprio[torch.from_numpy(use)]])
        real_frames = generated.frames[use]
        self.labels = torch.cat([labels, labels[torch.from_numpy(real_frames)]])
        self.video = video
        near = np.zeros(len(data), bool)
        for start, end in zip(data.starts, data.ends, strict=True):
            positive = np.flatnonzero(data.labels[start:end])
            last = start + positive[0] if len(positive) else end
            near[max(start, last - config.near_steps) : last] = True
        mine = np.zeros(len(data), bool)
        mine[self.train_frames] = True
        imagined = len(data) + np.arange(len(real_frames))
        positive = data.labels[real_frames]
        # Half of every batch shows success, and half of either class is generated, as far as there is any.
        self.pools = [
            (0.25, np.flatnonzero(mine & data.labels), None),
            (0.25, imagined[positive], 0),
            (0.15, np.flatnonzero(mine & ~data.labels & near), None),
            (0.10, np.flatnonzero(mine & ~data.labels), None),
            (0.25, imagined[~positive & near[real_frames]], 2),
        ]

    def loss(self, step: int) -> dict[str, Tensor]:
        """Cross-entropy of a batch of real and generated frames, with hard negatives."""
        drawn = []
        for share, pool, instead in self.pools:
            source = pool if len(pool) or instead is None else self.pools[instead][1]
            if len(source):
                drawn.append(np.random.choice(source, max(1, round(share * self.schedule.batch_size))))
        frames = torch.from_numpy(np.concatenate(drawn))
        return self.model.classifier.loss(self.latents[frames].float(), self.proprio[frames], self.labels[frames])

    def finish(self) -> dict[str, float]:
        """Calibrate the threshold on held-out episodes, and report how often it is right."""
        data, model = self.data, self.model
        held_out = np.flatnonzero(data.held_out)
        both = data.success[held_out].any() and not data.success[held_out].all()
        judged = held_out if both else np.arange(len(data.ends))
        real = [
            self._probabilities(self.video.latents[a:b], self.video.proprio[a:b])
            for a, b in zip(data.starts[judged], data.ends[judged], strict=True)
        ]
        generated = imagine_episodes(model, data, self.video, judged)
        imagined = [
            self._probabilities(generated.latents[a:b], generated.proprio[a:b])
            for a, b in zip(generated.starts, generated.ends, strict=True)
        ]
        success, consecutive = data.success[judged], model.config.classifier.consecutive
        # An imagined episode may really end otherwise, so the threshold is that of the real ones.
        threshold, accuracy = calibrate_threshold(real, success, consecutive)
        model.classifier.threshold.fill_(threshold)

        def says(episodes: list[np.ndarray]) -> np.ndarray:
            # Of an episode of one frame nothing is imagined.
            return np.array([len(one) > 0 and shows_success(one, threshold, consecutive)[-1] for one in episodes])

        told, dreamt = says(real), says(imagined)
        return {
            "threshold": threshold,
            "balanced_accuracy": accuracy,
            "false_positives": float((told & ~success).sum()),
            "false_negatives": float((~told & success).sum()),
            "imagined_false_positives": float((dreamt & ~success).sum()),
            "imagined_false_negatives": float((~dreamt & success).sum()),
            "successes": float(success.sum()),
            "failures": float((~success).sum()),
            # Where only one outcome could be held out.
            "judged_on_training": float(not both),
        }

    def _probabilities(self, latents: Tensor, proprio: Tensor) -> np.ndarray:
        return self.model.success_probability(latents.float(), proprio).float().cpu().numpy()


def _usable_generated(generated: ImaginedFrames, data: VideoData, close_error: float) -> np.ndarray:
    """Rows of the generated frames whose label is known.

    As long as a frame shows what really happened it has the real label. Episodes that failed stay failures however
    far their imagination went: a model that dreams of success where there was none must not be rewarded for it.
    """
    episode = np.repeat(np.arange(len(data.ends)), data.ends - data.starts)[generated.frames]
    return np.flatnonzero((generated.error < close_error) | ~data.success[episode])
