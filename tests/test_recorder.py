"""The recorder on a real vector environment: what is stored, in memory and streaming, kept and discarded."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from point_world import HORIZON, PointExpert, PointVectorEnv, fails

from simtoreal.commands import data_info
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.recorder import NewTake, Recorder, memory_takes, stream_takes
from simtoreal.data_collection.sensor_health import SensorHealth, SensorTrack
from simtoreal.data_collection.summary import summarize
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


class StampedEnv(PointVectorEnv):
    """Reports what a robot with two sensors and a moving scene reports; the camera repeats every third frame."""

    at = 0

    def _info(self, success):
        info = super()._info(success)
        observed = 10**12 + self.at * 50_000_000
        frame = self.at - self.at % 3 // 2  # 0 1 1 3 4 4 6 ...
        count = self.num_envs
        info["timestamp_ns"] = np.full(count, observed)
        info["capture_ns"] = {
            "arm": np.full(count, observed - 2_000_000),
            "camera": np.full(count, 10**12 + frame * 50_000_000 - 30_000_000),
        }
        info["receive_ns"] = {"arm": np.full(count, observed - 1_000_000), "camera": info["capture_ns"]["camera"] + 5}
        info["scene_motion"] = {"u": np.full(count, 0.25), "vx": np.arange(count) + self.at}
        self.at += 1
        return info


def record_stamped(path: Path, env: PointVectorEnv) -> Dataset:
    with DatasetWriter(path, env.embodiment, {"point": {}}) as writer:
        rollout(env, PointExpert(), [0], listeners=[make_recorder(memory_takes(writer), env)])
    return Dataset.open(path)


def test_stamps_of_every_sensor_and_the_motion_of_the_scene(tmp_path: Path) -> None:
    dataset = record_stamped(tmp_path, StampedEnv(1))
    (episode,) = dataset.episodes
    arrays, steps = dataset.read(episode), np.arange(episode.steps)
    assert episode.columns["capture_ns"] == episode.columns["receive_ns"] == ("arm", "camera")
    assert episode.columns["scene_motion"] == ("u", "vx")
    # The stamps are those of the observation before the action; the motion is that of the step.
    np.testing.assert_array_equal(arrays["step/timestamp_ns"], 10**12 + steps * 50_000_000)
    frames = steps - steps % 3 // 2
    np.testing.assert_array_equal(arrays["step/capture_ns"][:, 1], 10**12 + frames * 50_000_000 - 30_000_000)
    np.testing.assert_array_equal(arrays["step/receive_ns"][:, 0], arrays["step/timestamp_ns"] - 1_000_000)
    assert arrays["step/scene_motion"].dtype == np.float64
    np.testing.assert_array_equal(arrays["step/scene_motion"][:, 1], steps + 1)
    sensors = episode.extra["sensors"]
    assert sensors["arm"]["age_ms"] == pytest.approx({"median": 2.0, "p99": 2.0, "max": 2.0})
    assert sensors["arm"]["delay_ms"]["max"] == pytest.approx(1.0)
    assert (sensors["arm"]["repeated"], sensors["arm"]["late"], sensors["arm"]["dropped"]) == (0, 0, 0)
    camera = sensors["camera"]
    observed = np.arange(episode.steps + 1)
    repeats = int((observed % 3 == 2).sum())
    assert camera["repeated"] == camera["late"] == repeats
    assert camera["age_ms"]["max"] == pytest.approx(80.0)
    assert camera["skew_ms"]["max"] == pytest.approx(78.0), "against the newest sensor of the same observation"
    assert camera["received"] == len(observed) - repeats
    assert camera["dropped"] == int((observed[1:] - 1)[observed[1:] % 3 == 0].size)


def test_frames_that_the_environment_counts_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Counting(StampedEnv):
        def _info(self, success):
            info = super()._info(success)
            # As a robot counts: 40 and 30 frames were dropped before the episode begins.
            info["received_frames"] = {"arm": np.array([500 + 10 * self.at]), "camera": np.array([600 + self.at])}
            info["dropped_frames"] = {"arm": np.array([40 + 2 * (self.at > 3)]), "camera": np.array([30])}
            return info

    (episode,) = record_stamped(tmp_path, Counting(1)).episodes
    counted = [(sensor["received"], sensor["dropped"]) for sensor in episode.extra["sensors"].values()]
    assert counted == [(10 * episode.steps, 2), (episode.steps, 0)]
    summary = summarize(tmp_path)["sensors"]
    assert summary["arm"]["dropped"] == 2
    assert summary["camera"]["age_max_ms"] == pytest.approx(80.0)
    data_info.main(data_info.Config(dataset=tmp_path))
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "camera " in line and "80.0" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")][3:5] == [str(episode.steps), "0"]


def test_sensors_that_no_recorder_wrote_are_named(tmp_path: Path) -> None:
    env = PointVectorEnv(1)
    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        recorder = make_recorder(memory_takes(writer), env, extra={"sensors": {"arm": "fine"}})
        rollout(env, PointExpert(), [0], listeners=[recorder])
    with pytest.raises(DatasetError, match="extra 'sensors' is not what a recorder writes"):
        summarize(tmp_path)


def test_health_while_recording(tmp_path: Path) -> None:
    env, seen = StampedEnv(1), []

    class Display(Listener):
        def on_step(self, step: Step) -> None:
            seen.append(json.loads(json.dumps([recorder.health, health.snapshot])))

    with DatasetWriter(tmp_path, env.embodiment, {"point": {}}) as writer:
        recorder, health = make_recorder(stream_takes(writer), env), SensorHealth(0.05)
        assert recorder.health["recording"] is False
        rollout(env, PointExpert(), [0], listeners=[health, recorder, Display()])
    shown, sensors = seen[2]
    assert (shown["recording"], shown["steps"], shown["partial"], shown["alarm"]) == (True, 3, False, "")
    assert shown["flushed"] + shown["waiting"] == 3
    assert shown["sensors"] == sensors
    assert sensors["camera"]["age_ms"] == pytest.approx(30.0)
    assert (sensors["camera"]["late"], sensors["camera"]["late_steps"]) == (False, 1)
    assert seen[1][0]["sensors"]["camera"]["late"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info["scene_motion"].pop("vx"), "columns of step/scene_motion"),
        (lambda info: info.pop("scene_motion"), "step/scene_motion"),
        (lambda info: info.pop("capture_ns"), "step/capture_ns"),
        (lambda info: info.update(contacts={"floor": info["contacts"]["wall"]}), "columns of step/contacts"),
        (lambda info: info.pop("timestamp_ns"), "at the reset or at the steps only"),
    ],
)
def test_steps_that_report_something_else_are_refused(tmp_path: Path, change, message: str) -> None:
    class Changing(StampedEnv):
        def _info(self, success):
            info = super()._info(success)
            if self.at == 4:
                change(info)
            return info

    with pytest.raises(DatasetError, match=message):
        record_stamped(tmp_path, Changing(1))


def test_sensors_can_be_read_while_one_is_added() -> None:
    track = SensorTrack(0.05)

    class ReadMeanwhile(dict[str, int]):
        """As a display in another thread would, between the lines of ``add``."""

        def __getitem__(self, name: str) -> int:
            seen.append(track.sensors)
            return super().__getitem__(name)

    seen: list[dict[str, object]] = []
    track.add({"timestamp_ns": 30, "capture_ns": {"front": 10}, "receive_ns": ReadMeanwhile(front=20)})
    assert seen == [{}]
    assert track.sensors["front"]["age_ms"] == pytest.approx(20e-6)
