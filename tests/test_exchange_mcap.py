"""Episodes as recordings of the robot and back: real expert episodes, real message packages, rosbags as a reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mcap")
pytest.importorskip("rclpy")

from exchange_data import make_dataset

from simtoreal import cli
from simtoreal.data_collection.collect import CollectionPlan, expert_setup
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.rollout import rollout
from simtoreal.robot.bag_export import export_recording
from simtoreal.robot.bag_import import import_recording, read_description
from simtoreal.robot.resampling import Track
from simtoreal.robot.topics import RobotConfig, load_robot_config

ROBOT = load_robot_config()
MS = 1_000_000


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Three expert episodes in simulation; the instruction of the second one changes at its sixth step."""
    folder = tmp_path_factory.mktemp("data")
    env, expert = expert_setup(
        CollectionPlan(output=folder, task="lift", episodes=3, image_size=16, workers=1, num_envs=3)
    )
    task = env.task.to_dict()
    with DatasetWriter(folder / "plain", env.embodiment, {"lift": task}) as writer:
        recorder = Recorder(
            memory_takes(writer), task="lift", embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, expert, [0, 1, 2], listeners=[recorder])
    env.close()
    plain = Dataset.open(folder / "plain")
    with DatasetWriter(folder / "changed", plain.embodiment, plain.tasks) as writer:
        for number, info in enumerate(plain.episodes):
            arrays = plain.read(info)
            if number == 1:
                info = dataclasses.replace(
                    info, instruction="now higher", instructions=(info.instruction, "now higher")
                )
                arrays["step/instruction"] = (np.arange(info.steps) >= 5).astype(np.int32)
            writer.add(arrays, info)
    return Dataset.open(folder / "changed")


def back(recording: Path, output: Path) -> Dataset:
    description = read_description(recording)
    assert description is not None
    result = import_recording(recording, output, description)
    assert (result.skipped, result.damaged) == ((), ())
    return Dataset.open(output)


def assert_same_motion(given: Dataset, expected: Dataset) -> None:
    assert given.embodiment == expected.embodiment
    for mine, theirs in zip(given.episodes, expected.episodes, strict=True):
        ours, wanted = given.read(mine), expected.read(theirs)
        np.testing.assert_allclose(ours["actions"], wanted["actions"], atol=2e-6)
        np.testing.assert_allclose(ours["step/target"], wanted["step/target"], atol=1e-12)
        # A position-controlled finger may pass its open position a little; a robot reports at most 1.
        proprio = wanted["obs/proprio"].copy()
        proprio[:, 12] = np.minimum(proprio[:, 12], 1)
        np.testing.assert_allclose(ours["obs/proprio"], proprio, atol=2e-6)
        for name in ("obs/front_image", "obs/wrist_image", "obs/object_state", "step/instruction", "rewards", "dones"):
            np.testing.assert_array_equal(ours[name], wanted[name], err_msg=name)


def test_import_of_an_export_gives_the_same_episodes(dataset: Dataset, tmp_path: Path) -> None:
    steps = export_recording(dataset, tmp_path / "run.mcap", ROBOT)
    assert steps == sum(episode.steps for episode in dataset.episodes)
    again = back(tmp_path / "run.mcap", tmp_path / "again")
    assert_same_motion(again, dataset)
    for mine, theirs in zip(again.episodes, dataset.episodes, strict=True):
        assert (mine.seed, mine.success, mine.operator, mine.source) == (theirs.seed, True, "expert", "expert")
        assert (mine.instructions, mine.started) == (theirs.instructions, theirs.started)
        assert mine.extra["recording"] == "run.mcap"


def test_scene_motion_survives(dataset: Dataset, tmp_path: Path) -> None:
    rng, columns = np.random.default_rng(0), {"scene_motion": ("speed_factor", "cube_vx_m_s")}
    with DatasetWriter(tmp_path / "moving", dataset.embodiment, dataset.tasks) as writer:
        for info in dataset.episodes[:2]:
            arrays = dataset.read(info)
            arrays["step/scene_motion"] = rng.normal(size=(info.steps, 2))
            writer.add(arrays, dataclasses.replace(info, columns=columns, extra={"motion": {}}))
    moving = Dataset.open(tmp_path / "moving")
    export_recording(moving, tmp_path / "run.mcap", ROBOT)
    again = back(tmp_path / "run.mcap", tmp_path / "again")
    assert_same_motion(again, moving)
    for mine, theirs in zip(again.episodes, moving.episodes, strict=True):
        assert mine.columns == columns
        assert "motion" in mine.extra
        name = "step/scene_motion"
        np.testing.assert_array_equal(again.read(mine, [name])[name], moving.read(theirs, [name])[name])


def compressed(robot: RobotConfig) -> RobotConfig:
    cameras = {
        name: dataclasses.replace(
            camera, image=dataclasses.replace(camera.image, type="sensor_msgs/msg/CompressedImage")
        )
        for name, camera in robot.cameras.items()
    }
    return dataclasses.replace(robot, cameras=cameras)


def test_compressed_image_topics_are_exact_too(dataset: Dataset, tmp_path: Path) -> None:
    export_recording(dataset, tmp_path / "run.mcap", compressed(ROBOT), episodes=dataset.episodes[:1])
    again = back(tmp_path / "run.mcap", tmp_path / "again")
    np.testing.assert_array_equal(
        again.read(again.episodes[0], ["obs/front_image"])["obs/front_image"],
        dataset.read(dataset.episodes[0], ["obs/front_image"])["obs/front_image"],
    )


def test_rosbags_reads_the_export(dataset: Dataset, tmp_path: Path) -> None:
    from rosbags.highlevel import AnyReader

    file = tmp_path / "run.mcap"
    export_recording(dataset, file, ROBOT)
    lengths = [episode.steps for episode in dataset.episodes]
    proprio = dataset.read(dataset.episodes[0], ["obs/proprio"])["obs/proprio"]
    with AnyReader([file]) as reader:
        counts = {connection.topic: connection.msgcount for connection in reader.connections}
        assert counts["/joint_states"] == counts["/front/image_raw"] == counts["/front/camera_info"] == sum(lengths)
        assert counts["/target_pose"] == sum(lengths) + len(lengths)
        chosen = [connection for connection in reader.connections if connection.topic == "/joint_states"]
        stamps = []
        for number, (connection, at_ns, data) in enumerate(reader.messages(connections=chosen)):
            message = reader.deserialize(data, connection.msgtype)
            stamps.append(message.header.stamp.sec * 1_000_000_000 + message.header.stamp.nanosec)
            assert stamps[-1] == at_ns
            if number < lengths[0]:
                np.testing.assert_allclose(message.position[:7], proprio[number, 13:], atol=1e-7)
    for start, length in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
        assert set(np.diff(stamps[start : start + length])) == {50 * MS}


def test_wrong_data_are_refused_and_leave_nothing(dataset: Dataset, tmp_path: Path) -> None:
    output = tmp_path / "out" / "run.mcap"
    without_wrist = dataclasses.replace(ROBOT, cameras={"front": ROBOT.cameras["front"]})
    with pytest.raises(ConfigError, match="have no camera 'wrist'"):
        export_recording(dataset, output, without_wrist)
    seven = dataclasses.replace(ROBOT, joint_names=ROBOT.joint_names[:6])
    with pytest.raises(ConfigError, match="only arms with end-effector actions and 6 joints"):
        export_recording(dataset, output, seven)
    other = make_dataset(tmp_path / "other")
    with DatasetWriter(tmp_path / "no_target", other.embodiment, other.tasks) as writer:
        arrays = other.read(other.episodes[0])
        del arrays["step/target"]
        writer.add(arrays, other.episodes[0])
    with pytest.raises(DatasetError, match="has no 'step/target'"):
        export_recording(Dataset.open(tmp_path / "no_target"), output, ROBOT)
    assert list(output.parent.iterdir()) == []
    output.write_bytes(b"precious")
    with pytest.raises(DatasetError, match="exports never overwrite"):
        export_recording(dataset, output, ROBOT)
    assert output.read_bytes() == b"precious"


def track(samples: dict[int, float]) -> Track:
    result = Track("/t")
    for at_ms, value in samples.items():
        result.add(at_ms * MS, at_ms * MS, np.array([value]))
    return result


def test_values_are_interpolated_between_neighbours_but_not_across_gaps() -> None:
    recorded = track({0: 0.0, 100: 10.0, 500: 50.0, 600: 60.0})
    ticks = np.array([0, 50, 100, 140, 300, 500, 550, 640]) * MS
    values = recorded.interpolate(ticks, 0.25, 0.1)[:, 0].tolist()
    assert values == [0.0, 5.0, 10.0, 10.0, 10.0, 50.0, 55.0, 60.0]
    with pytest.raises(DatasetError, match=r"silent for 0\.20 s"):
        recorded.interpolate(ticks, 0.1, 0.1)
    assert recorded.interpolate(ticks, 0.25, 1.0)[4, 0] == 30.0


def test_newest_is_never_newer_than_the_tick_and_goes_by_capture_time() -> None:
    images = Track("/front/image_raw")
    # The least delay, 30 ms, may be a clock that is behind. By how much the last one is later than that is known.
    for at_ms, delay_ms in ((0, 30), (50, 35), (100, 90)):
        images.add(at_ms * MS, (at_ms + delay_ms) * MS, f"captured at {at_ms}")
    assert images.newest(np.array([79, 81, 129, 131]) * MS, 1.0) == [
        "captured at 0", "captured at 50", "captured at 50", "captured at 100",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--control-hz", "5"], "--control-hz does not apply: recordings are imported at the rate of their robot"),
        (["--success"], "--success is for MCAP recordings of another program, and .* says itself what it holds"),
        (["--topics", "nonsense"], "--topics is for MCAP recordings of another program"),
    ],
)
def test_flags_that_would_do_nothing_are_refused(dataset: Dataset, tmp_path: Path, flags: list[str], expected: str):
    export_recording(dataset, tmp_path / "all.mcap", ROBOT, episodes=dataset.episodes[:1])
    with pytest.raises(ConfigError, match=expected):
        cli.run(["data", "import", str(tmp_path / "all.mcap"), "--output", str(tmp_path / "back"), *flags])


def test_commands_export_and_import(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "bag"  # a rosbag2 folder is imported by its only file
    file, again = folder / "bag_0.mcap", tmp_path / "again"
    cli.run(["data", "export", str(dataset.path), "--format", "mcap", "--output", str(file), "--mask", "valid"])
    (folder / "metadata.yaml").write_text("rosbag2_bagfile_information: {}\n")
    cli.run(["data", "import", str(folder), "--output", str(again)])
    assert json.loads((again / "results.json").read_text())["import"]["format"] == "mcap"
    assert "1 episodes (1 successes)" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="belongs to --format lerobot, not mcap"):
        cli.run(["data", "export", str(again), "--format", "mcap", "--output", str(tmp_path / "x.mcap"), "--images"])
