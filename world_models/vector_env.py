"""The learned backend: many episodes imagined together behind the vector interface of Gymnasium."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from simtoreal.envs.action import check_action, integrate_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.seeds import one_seed_each
from simtoreal.envs.task import SUCCESS_HOLD_STEPS, TaskSpec
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.policies.trainer import choose_precision
from simtoreal.world_models.announced_steps import AnnouncedSteps
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.contexts import Contexts
from simtoreal.world_models.state import Imagination
from simtoreal.world_models.video_data import VideoData

NOT_FINITE = "imagination not finite"
# Log-odds of success (one to three thousand) below which it does not matter how unlikely success is.
OUT_OF_THE_QUESTION = -8.0


def require_no_failure(task: TaskSpec) -> None:
    """Refuse tasks that end when something happens: no picture was ever labelled with it, so imagination goes on.

    Raises:
        ConfigError: the task has a ``failure``.
    """
    if task.failure:
        raise ConfigError(
            f"task '{task.name}' ends when '{task.failure}', which a world model does not notice, so a policy would be "
            "rewarded for what fails. Improve it in the simulation: 'cotrain --config rlco' (rlco.world simulation)"
        )


class WorldModelVectorEnv(VectorEnv):  # type: ignore[misc]
    """N independent imagined episodes behind the vector interface of Gymnasium.

    Observations: ``<camera>_image`` uint8 ``(N, H, W, 3)`` and ``proprio`` float32 ``(N, P)``; as on a robot there is
    no ``object_state``. Episodes begin in real frames: seed s begins in context s modulo their number, independently
    of the slot it runs in. Success, and with it reward and termination, is what the success classifier says in as many
    frames in a row as the simulation asks for. Actions and info are described in docs/interface.md;
    ``milestones`` and ``contacts`` are empty, since pictures do not tell them. Two entries are added: ``init_id``, the
    number of the context, and ``success_probability``.

    An episode whose imagination is no longer finite ends: ``truncated``, ``info["sim_fault"]``, and the last picture
    that was finite.

    Attributes:
        images_wanted: see docs/interface.md; pictures that nobody looks at are not decoded.

    Args:
        model: run folder, checkpoint folder or loaded model.
        num_envs: number of episodes imagined together.
        data: real episodes to begin in, of exactly the model's embodiment.
        places: ``(episode, step)`` of the contexts in ``data``; default: the beginning of every episode. See
            :class:`~simtoreal.world_models.contexts.Contexts`.
        task: name, path or specification; default: that of the model's data. Its horizon ends episodes, and counts from
            the beginning of the real episode, so a context at step k leaves k steps less.
        graded: reward how close to success an episode came, too, see :func:`closeness`. Every step is rewarded with how
            much closer it came than any before it, so an episode that succeeds still earns 1 in all, and one that fails
            less.
        device: torch device; None leaves a loaded model where it is, and picks a GPU, if there is one, for a path.
        precision: ``auto``, ``bf16`` or ``fp32``; auto uses bfloat16 where the processor has it.

    Raises:
        CheckpointError: the model cannot be loaded, or its training has not ended.
        ConfigError: see :class:`~simtoreal.world_models.contexts.Contexts`; or the model was trained on several tasks
            and none is named.
        EmbodimentMismatchError: model and data are of different embodiments or render profiles.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": [], "autoreset_mode": AutoresetMode.DISABLED}

    def __init__(
        self,
        model: str | Path | LoadedWorldModel,
        num_envs: int,
        data: VideoData,
        *,
        places: Sequence[tuple[int, int]] | None = None,
        task: str | TaskSpec | None = None,
        graded: bool = False,
        device: str | None = None,
        precision: str = "auto",
    ) -> None:
        if num_envs < 1:
            raise ConfigError(f"num_envs is {num_envs}; expected at least 1")
        if not isinstance(model, LoadedWorldModel):
            model = load_world_model(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        elif device is not None:
            model.model.to(device)
        self.loaded, self.model, self.embodiment = model, model.model, model.embodiment
        self.task = _task(task, model, data)
        self.num_envs, self.graded = num_envs, graded
        self._autocast = {
            "device_type": self.model.device.type, "dtype": torch.bfloat16,
            "enabled": choose_precision(precision, self.model.device) == "bf16",
        }  # fmt: skip
        with torch.autocast(**self._autocast):
            self.contexts = Contexts(self.model, data, places)
        self.consecutive = SUCCESS_HOLD_STEPS
        self.threshold = float(self.model.classifier.threshold)
        self._define_spaces()
        self.images_wanted = True
        self._started = False

    def _define_spaces(self) -> None:
        box = gym.spaces.Box
        single: dict[str, gym.Space[Any]] = {
            f"{camera.name}_image": box(0, 255, (camera.height, camera.width, 3), np.uint8)
            for camera in self.embodiment.cameras
        }
        single["proprio"] = box(-np.inf, np.inf, (self.embodiment.proprio.dim,), np.float32)
        self.single_observation_space = gym.spaces.Dict(single)
        self._bounded = self.embodiment.action.mode == "ee_delta"
        bound = 1.0 if self._bounded else np.inf
        self.single_action_space = box(-bound, bound, (self.embodiment.action.dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin new episodes in real frames.

        Args:
            seed: one per episode, or an integer s for s, s+1, ...; None draws from the generator.
            options: ``reset_mask`` (N,) bool limits the reset to some episodes.

        Returns:
            Observation and info of all episodes.

        Raises:
            ConfigError: unknown option or wrong shapes.
        """
        options = dict(options or {})
        mask = np.asarray(options.pop("reset_mask", np.ones(self.num_envs, dtype=bool)))
        if options:
            raise ConfigError(f"unknown reset options {sorted(options)}; expected 'reset_mask'")
        if mask.shape != (self.num_envs,) or mask.dtype != np.bool_:
            raise ConfigError(f"reset_mask must be bool of shape ({self.num_envs},), got {mask.dtype} {mask.shape}")
        if not self._started and not mask.all():
            raise ConfigError("the first reset must reset every episode; leave out reset_mask")
        slots, seeds = np.flatnonzero(mask), self._complete_seeds(seed)
        if not self._started:
            self._allocate()
        self._begin(slots, [seeds[slot] for slot in slots])
        return self._observation(), self._info()

    def _complete_seeds(self, seed: int | Sequence[int | None] | None) -> list[int]:
        given = one_seed_each(seed, self.num_envs)
        if isinstance(seed, int | np.integer):
            # With its seed: without one, asking for np_random_seed would put another generator in its place.
            self._np_random, self._np_random_seed = np.random.default_rng(int(seed)), int(seed)
        return [int(self.np_random.integers(2**31)) if value is None else value for value in given]

    def _allocate(self) -> None:
        count = self.num_envs
        contexts = np.zeros(count, dtype=np.int64)
        self._context, self._state = contexts, self.contexts.state.rows(torch.from_numpy(contexts))
        self._images, self._proprio = self.contexts.images[contexts], self.contexts.proprio[contexts]
        self._targets = self.contexts.targets[contexts]
        self._instructions = np.full(count, "", dtype=object)
        self._faults = np.full(count, "", dtype=object)
        self._steps, self._hold = np.zeros(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        self._probability, self._closest = np.zeros(count), np.zeros(count)
        self._recent = np.zeros((count, self.consecutive))
        self._ended = np.zeros(count, dtype=bool)
        self._generators = [torch.Generator() for _ in range(count)]
        self._ahead: AnnouncedSteps | None = None
        self._started = True

    def _begin(self, slots: np.ndarray, seeds: list[int]) -> None:
        chosen = np.array([seed % len(self.contexts) for seed in seeds], dtype=np.int64)
        state = self.contexts.state.rows(torch.from_numpy(chosen))
        self._state = self._state.put(torch.from_numpy(slots), state)
        self._context[slots], self._steps[slots] = chosen, self.contexts.steps[chosen]
        self._images[slots], self._proprio[slots] = self.contexts.images[chosen], self.contexts.proprio[chosen]
        self._targets[slots], self._instructions[slots] = (
            self.contexts.targets[chosen],
            self.contexts.instructions[chosen],
        )
        self._faults[slots], self._hold[slots], self._ended[slots], self._probability[slots] = "", 0, False, 0.0
        self._recent[slots], self._closest[slots] = 0.0, 0.0
        if self._ahead is not None:
            self._ahead.left[slots] = 0
        for slot, seed in zip(slots, seeds, strict=True):
            self._generators[slot].manual_seed(seed)

    def observation_history(self, slots: np.ndarray, steps: int) -> dict[str, np.ndarray]:
        """What was really observed up to the frame that episodes begin in.

        Args:
            slots: ``(n,)`` episodes that have just been reset.
            steps: how many observations; the beginning of an episode is repeated.

        Returns:
            Like an observation, ``(n, steps, ...)``, the oldest first.
        """
        images, proprio = self.contexts.history(self._context[slots], steps)
        return {**{key: images[:, :, view] for view, key in enumerate(self.embodiment.image_keys)}, "proprio": proprio}

    @torch.inference_mode()
    def announce(self, actions: np.ndarray, slots: np.ndarray) -> None:
        """Say what :meth:`step` will be given next; it is imagined in as few passes as the model can.

        Steps remain what they are, and may still be given other actions. But errors add up from pass to pass, and a
        pass costs the same whatever its length, so whoever acts in chunks should announce them.

        Args:
            actions: ``(len(slots), k, A)``.
            slots: ``(n,)`` the episodes that they are for.

        Raises:
            ActionError: wrong shape or dtype, not finite, or out of range.
        """
        if not self._started:
            raise ConfigError("call reset() before announce()")
        size = (len(slots), self.embodiment.action.dim)
        # As steps will see them, or they would not be recognised.
        checked = [check_action(actions[:, step], size, bounded=self._bounded) for step in range(actions.shape[1])]
        running = ~self._ended[slots]
        if not checked or not running.any():
            return
        slots, actions = slots[running], np.stack(checked, 1)[running]
        targets, ahead = self._targets[slots], []
        for step in range(actions.shape[1]):
            targets = integrate_action(targets, actions[:, step], self.embodiment) if targets.shape[1] else targets
            ahead.append(targets)
        with torch.autocast(**self._autocast):
            _, latents, proprio = self.model.imagine(
                self._state.rows(torch.from_numpy(slots)), self._commands(actions, np.stack(ahead, 1)),
                [self._generators[slot] for slot in slots],
            )  # fmt: skip
        if self._ahead is None:
            self._ahead = AnnouncedSteps.empty(self.num_envs, actions, latents, proprio)
        self._ahead.make_room(actions.shape[1])
        self._ahead.put(slots, actions, latents, proprio)

    def _commands(self, actions: np.ndarray, targets: np.ndarray) -> torch.Tensor:
        device = self.model.device
        told = torch.from_numpy(targets.astype(np.float32)).to(device)
        return self.model.scale_commands(torch.from_numpy(actions).to(device), told)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every running episode by one control step.

        Episodes that have ended keep their last picture until they are reset.

        Args:
            actions: ``(N, A)``, in [-1, 1] unless the action mode is ``env``.

        Returns:
            Observation, reward (1 once, on success; see ``graded``), terminated (success), truncated (horizon or
            fault), info.

        Raises:
            ActionError: wrong shape or dtype, not finite, or out of range.
        """
        if not self._started:
            raise ConfigError("call reset() before step()")
        actions = check_action(actions, (self.num_envs, self.embodiment.action.dim), bounded=self._bounded)
        slots = np.flatnonzero(~self._ended)
        latents = self._advance(slots, actions[slots]) if len(slots) else None
        success = (self._hold >= self.consecutive) & (self._faults == "")
        reward = self._reward(slots, success)
        fault = self._faults != ""
        terminated = success.copy()
        truncated = ((self._steps >= self.task.horizon) & ~terminated) | fault
        self._ended = terminated | truncated
        seen = slots[(self._ended[slots] | self.images_wanted) & (self._faults[slots] == "")]
        if len(seen):
            self._images[seen] = self._decode(latents[torch.from_numpy(np.isin(slots, seen))])
        return self._observation(), reward, terminated, truncated, self._info(success)

    def _reward(self, slots: np.ndarray, success: np.ndarray) -> np.ndarray:
        if not self.graded:
            paid = np.zeros(self.num_envs)
            paid[slots] = success[slots]
            return paid
        close = np.zeros(self.num_envs)
        close[slots] = closeness(self._recent[slots].min(1), self.threshold)
        closer = np.maximum(close - self._closest, 0.0)
        self._closest += closer
        return closer

    @torch.inference_mode()
    def _decode(self, latents: torch.Tensor) -> np.ndarray:
        with torch.autocast(**self._autocast):
            return self.model.decode(latents).cpu().numpy()

    @torch.inference_mode()
    def _advance(self, slots: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        """Imagine the next frame of the episodes ``slots`` and judge it; return its latents, in the order of slots."""
        index = torch.from_numpy(slots)
        if self._targets.shape[1]:
            self._targets[slots] = integrate_action(self._targets[slots], actions, self.embodiment)
        self._steps[slots] += 1
        commands = self._commands(actions, self._targets[slots])
        everyone = len(slots) == self.num_envs
        before = self._state if everyone else self._state.rows(index)
        with torch.autocast(**self._autocast):
            latents, proprio = self._next(slots, actions, before, commands)
            after = before.append(latents, proprio, commands)
            finite = after.finite().cpu().numpy()
            probability = self.model.success_probability(latents, proprio).float().cpu().numpy()
        vectors = self.model.unscale_proprio(proprio).cpu().numpy()
        if finite.all():
            self._state = after if everyone else self._state.put(index, after)
        else:
            good = torch.from_numpy(finite)
            self._state = self._state.put(index[good], after.rows(good))
            self._faults[slots[~finite]] = NOT_FINITE
        good_slots = slots[finite]
        self._proprio[good_slots] = vectors[finite]
        self._probability[good_slots] = probability[finite]
        self._recent[slots] = np.concatenate([self._recent[slots, 1:], self._probability[slots, None]], 1)
        shown = self._probability[slots] >= self.threshold
        self._hold[slots] = np.where(shown, self._hold[slots] + 1, 0)
        return latents

    def _next(
        self, slots: np.ndarray, actions: np.ndarray, before: Imagination, commands: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents and proprio of the next frame, announced or not."""
        known = np.zeros(len(slots), bool) if self._ahead is None else self._ahead.matches(slots, actions)
        if self._ahead is not None:
            self._ahead.left[slots[~known]] = 0
            if known.all():
                return self._ahead.take(slots)
        new = torch.from_numpy(~known)
        generators = [self._generators[slot] for slot in slots[~known]]
        _, frames, vectors = self.model.imagine(before.rows(new), commands[new][:, None], generators)
        if self._ahead is None or not known.any():
            return frames[:, 0], vectors[:, 0]
        latents, proprio = (torch.empty(len(slots), *one.shape[2:], device=one.device) for one in (frames, vectors))
        latents[new], proprio[new] = frames[:, 0], vectors[:, 0]
        latents[~new], proprio[~new] = self._ahead.take(slots[known])
        return latents, proprio

    def set_instruction(self, text: str, mask: np.ndarray | None = None) -> None:
        """Change the language instruction of the episodes where ``mask`` is true (default: all)."""
        self._instructions[np.ones(self.num_envs, bool) if mask is None else mask] = text

    def _observation(self) -> dict[str, np.ndarray]:
        images = {key: self._images[:, view].copy() for view, key in enumerate(self.embodiment.image_keys)}
        return {**images, "proprio": self._proprio.copy()}

    def _info(self, success: np.ndarray | None = None) -> dict[str, Any]:
        return {
            "success": np.zeros(self.num_envs, bool) if success is None else success,
            "task_failed": np.zeros(self.num_envs, bool),
            "milestones": {},
            "contacts": {},
            "instruction": self._instructions.copy(),
            "target": self._targets.copy(),
            "sim_fault": self._faults.copy(),
            "init_id": self._context.copy(),
            "success_probability": self._probability.copy(),
        }


def require_shown(keys: Sequence[str], embodiment: Embodiment, name: str) -> None:
    """Refuse a policy that reads what imagination does not show.

    Args:
        keys: that the policy reads.
        embodiment: of policy and world model.
        name: of the policy, for the message.

    Raises:
        ConfigError: lists what is missing.
    """
    shown = (*embodiment.image_keys, "proprio")
    if missing := [key for key in keys if key not in shown]:
        raise ConfigError(
            f"{name} reads {', '.join(missing)}, and a world model imagines {', '.join(shown)} only. Give one whose "
            "image_keys and state_keys are among these."
        )


def closeness(probability: np.ndarray, threshold: float) -> np.ndarray:
    """Return how close to success frames are: 1 from ``threshold`` on, 0 where success is out of the question.

    In between by log-odds. A classifier that is often wrong about which side of its threshold an episode ends on still
    orders episodes well, and the order is all that rollouts of the same start are compared by.

    Args:
        probability: of success; of several frames in a row, the smallest.
        threshold: probability from which on that is success.
    """
    low, high = OUT_OF_THE_QUESTION, np.log(threshold / (1 - threshold))
    odds = np.clip(probability, 1e-12, 1 - 1e-12)
    return np.where(probability >= threshold, 1.0, np.clip((np.log(odds / (1 - odds)) - low) / (high - low), 0.0, 1.0))


def _task(task: str | TaskSpec | None, model: LoadedWorldModel, data: VideoData) -> TaskSpec:
    if task is not None:
        return load_task(task)
    specification = model.task or data.task
    if not specification:
        raise ConfigError(f"{model.folder} was trained on several tasks; say which one to imagine")
    return parse_task(specification, source=str(model.folder))
