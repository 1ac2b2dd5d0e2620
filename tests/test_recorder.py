"""The recorder on a real vector environment: what is stored, in memory and streaming, kept and discarded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from point_world import HORIZON, PointExpert, PointVectorEnv, fails

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.recorder import NewTake, Recorder, memory_takes, stream_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.rollout import EpisodeResult, Listener, Step, rollout

SEEDS = tuple(range(11))


class Witness(Listener):
    """Keeps what the rollout says, independently of the recorder."""

    def __init__(self) -> None:
        self.running: dict[int, list[tuple[np.ndarray, ...]]] = {}
        self.states: dict[int, np.ndarray] = {}
        self.finished: dict[int, list[tuple[np.ndarray, ...]]] = {}

    def on_reset(self, slot, episode, seed, observation, info) -> None:
        self.running[slot] = []
        self.states[slot] = info["sim_state"].copy()

    def on_step(self, step: Step) -> None:
        for row, slot in enumerate(step.slots):
            image, proprio = step.observation["front_image"][row], step.observation["proprio"][row]
            target = step.info["target"][row]
            self.running[slot].append((image, proprio, step.action[row], self.states[slot], target))
            self.states[slot] = step.info["sim_state"][row].copy()

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        self.finished[result.seed] = self.running.pop(slot)


def make_recorder(new_take: NewTake, env: PointVectorEnv, **options: object) -> Recorder:
    return Recorder(new_take, task="point", embodiment=env.embodiment, source="expert", operator="walker", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("takes", [memory_takes, stream_takes])
@pytest.mark.parametrize("num_envs", [1, 4])
def test_every_successful_episode_is_stored_exactly(tmp_path: Path, takes, num_envs: int) -> None:
    env, witness = PointVectorEnv(num_envs), Witness()
    with DatasetWriter(tmp_path, env.embodiment, {"point": {"name": "point"}}) as writer:
        recorder = make_recorder(takes(writer), env, extra={"wind": 0.5})
        results = rollout(env, PointExpert(), SEEDS, listeners=[recorder, witness])
    dataset = Dataset.open(tmp_path)
    assert {episode.seed for episode in dataset.episodes} == {seed for seed in SEEDS if not fails(seed)}
    by_seed = {result.seed: result for result in results}
    for episode in dataset.episodes:
        result = by_seed[episode.seed]
        assert (episode.steps, episode.success, episode.failure) == (result.steps, True, "")
        assert (episode.operator, episode.source, episode.extra) == ("walker", "expert", {"wind": 0.5})
        assert episode.instruction == "go to the origin"
        assert episode.milestones == {"near": True}
        assert episode.duration_s == pytest.approx(result.steps * 0.05)
        arrays = dataset.read(episode)
        for column, name in enumerate(("obs/front_image", "obs/proprio", "actions", "states", "step/target")):
            expected = np.stack([row[column] for row in witness.finished[episode.seed]])
            np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
        assert arrays["dones"].tolist() == [0] * (episode.steps - 1) + [1]
        np.testing.assert_array_equal(np.diff(arrays["step/timestamp_ns"]), 50_000_000)
        assert episode.columns == {"contacts": ("wall",), "milestones": ("near",)}
        assert arrays["step/milestones"].shape == (episode.steps, 1)
    assert not list(tmp_path.rglob("*.part"))


def test_long_episodes_outgrow_the_first_buffer(tmp_path: Path) -> None:
    from simtoreal.data_collection.takes import MemoryTake

    kept: list[dict[str, np.ndarray]] = []
    take = MemoryTake(lambda arrays, info: kept.append(arrays), capacity=2)
    for step in range(9):
        take.append({"actions": np.full(3, step)})
    take.keep(None)  # type: ignore[arg-type]
    np.testing.assert_array_equal(kept[0]["actions"][:, 0], np.arange(9))


@pytest.mark.parametrize("takes", [memory_takes, stream_takes])
def test_discarded_takes_leave_nothing(tmp_path: Path, takes) -> None:
    env = PointVectorEnv(2)
    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        recorder = make_recorder(takes(writer), env, keep=lambda result: False)
        rollout(env, PointExpert(), [0, 1, 2], listeners=[recorder])
        steps = iter(range(100))
        rollout(env, PointExpert(), [3, 8], listeners=[recorder], stop=lambda: next(steps) == 3)
        recorder.discard()
        assert list((tmp_path / "episodes").iterdir()) == []
    assert Dataset.open(tmp_path).episodes == []


def test_kept_failure_says_why(tmp_path: Path) -> None:
    env = PointVectorEnv(2)
    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        recorder = make_recorder(memory_takes(writer), env, keep=lambda result: True)
        rollout(env, PointExpert(), [2, 3], listeners=[recorder])
    failed = Dataset.open(tmp_path).filter("failure")
    assert [(episode.seed, episode.failure, episode.steps) for episode in failed] == [(3, "timeout", HORIZON)]


def test_changing_instruction_is_recorded_per_step(tmp_path: Path) -> None:
    class Changing(PointVectorEnv):
        def _info(self, success):
            info = super()._info(success)
            info["instruction"][:] = "first" if self.steps[0] < 3 else "second"
            return info

    env = Changing(1)
    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        rollout(env, PointExpert(), [0], listeners=[make_recorder(memory_takes(writer), env)])
    dataset = Dataset.open(tmp_path)
    episode = dataset.episodes[0]
    assert (episode.instructions, episode.instruction) == (("first", "second"), "second")
    index = dataset.read(episode, ["step/instruction"])["step/instruction"]
    # The third action was chosen under the first instruction; its result announced the second.
    assert index.tolist() == [0, 0, 0, *[1] * (episode.steps - 3)]


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    class Broken(PointVectorEnv):
        def _info(self, success):
            info = super()._info(success)
            info["target"][:, 0] = np.nan
            return info

    env = Broken(1)
    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        recorder = make_recorder(memory_takes(writer), env)
        with pytest.raises(DatasetError, match="'step/target' is not finite at step 0"):
            rollout(env, PointExpert(), [0], listeners=[recorder])
    assert Dataset.open(tmp_path).episodes == []
