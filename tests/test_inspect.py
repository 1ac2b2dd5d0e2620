"""`data inspect` finds what was done to a dataset on purpose, and nothing in one to which nothing was done."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from toy_dataset import EMBODIMENT, TASKS, make_dataset, make_episode

from simtoreal import cli
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import Arrays, EpisodeInfo, embodiment_digest
from simtoreal.data_collection.foreign_embodiment import foreign_embodiment
from simtoreal.data_collection.inspect_motion import (
    MotionScale,
    certain_motion,
    describe_motion,
    idle_steps,
    root_mean_square_jerk,
    saturation,
    spectral_arc_length,
)
from simtoreal.data_collection.inspect_page import film_strip
from simtoreal.data_collection.inspect_sensors import (
    describe_images,
    describe_scene_motion,
    describe_stamps,
    describe_timing,
)
from simtoreal.data_collection.inspect_set import find_drift, find_duplicates, fingerprint, outliers
from simtoreal.data_collection.inspection import inspect
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import load_task, make_vector_env
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import DatasetError
from simtoreal.envs.scene_motion import SceneMover, load_motion

RATE = EMBODIMENT.control_hz


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("clean") / "a", episodes=14)


def test_jerk_and_smoothness_of_known_motions() -> None:
    time = np.arange(60) / RATE
    cubic = np.stack([time**3, np.zeros(60)], axis=1)
    assert root_mean_square_jerk(cubic, RATE) == pytest.approx(6.0)
    assert root_mean_square_jerk(cubic[:3], RATE) == 0.0
    share = np.linspace(0, 1, 60)[:, None]
    minimum_jerk = 0.3 * (10 * share**3 - 15 * share**4 + 6 * share**5)
    smooth = spectral_arc_length(minimum_jerk, RATE)
    stops = minimum_jerk + 0.02 * np.sin(12 * np.pi * share) / (12 * np.pi) * 6
    halting = spectral_arc_length(stops, RATE)
    assert smooth is not None
    assert halting is not None
    assert -2.0 < smooth < -1.0
    assert halting < smooth - 0.3
    # Unlike jerk it does not depend on how large or how fast a motion is.
    assert spectral_arc_length(5 * minimum_jerk, RATE) == pytest.approx(smooth)
    assert spectral_arc_length(np.zeros((20, 3)), RATE) is None


def test_idle_needs_both_no_command_and_no_motion(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", episodes=3, steps=60, rest=46)
    scale = MotionScale.of(dataset)
    arrays = dataset.read(dataset.episodes[0])
    # Rest within half a window of the motion is not told from it.
    assert np.flatnonzero(idle_steps(arrays, scale)).tolist() == [*range(39)]
    described = describe_motion(arrays, scale)
    assert described["idle_start_steps"] == 39
    assert described["idle_share"] == pytest.approx(39 / 60)
    commanded = {**arrays, "actions": arrays["actions"].copy()}
    commanded["actions"][2, 0] = 0.5
    commanded["actions"][4:, 6] = -1  # The gripper is told to close in step 4 and stays told to.
    assert np.flatnonzero(idle_steps(commanded, scale)).tolist() == [0, 1, 3, *range(5, 39)]
    for name in ("tcp_x", "tcp_r21", "gripper_opening"):
        moving = {**arrays, "obs/proprio": arrays["obs/proprio"].copy()}
        moving["obs/proprio"][:20, EMBODIMENT.proprio.names.index(name)] += 0.05
        assert np.flatnonzero(idle_steps(moving, scale)).tolist() == [*range(12), *range(28, 39)], name
    # The joints of an arm of seven may creep while its hand rests.
    creeping = {**arrays, "obs/proprio": arrays["obs/proprio"].copy()}
    creeping["obs/proprio"][:39, EMBODIMENT.proprio.names.index("panda_joint3")] += np.linspace(0, 0.1, 39)
    assert (idle_steps(creeping, scale) == idle_steps(arrays, scale)).all()


@pytest.mark.parametrize("randomization", [None, "training", "standard"])
def test_a_simulated_arm_that_is_not_commanded_is_idle_in_spite_of_its_noise(randomization: str | None) -> None:
    env = make_vector_env("lift", 1, image_size=16, observe="state", randomization=randomization)
    actions = np.zeros((80, 7), np.float32)
    actions[:, 6], actions[40:, 2] = 1, 0.015  # Up by 6 mm/s, too little to be a command by itself.
    proprio = [env.reset(seed=3)[0]["proprio"][0]]
    proprio += [env.step(action[None])[0]["proprio"][0] for action in actions[:-1]]
    arrays = {"actions": actions, "obs/proprio": np.stack(proprio)}
    spans = {name: np.ptp(array, axis=0) for name, array in arrays.items()}
    idle = idle_steps(arrays, MotionScale(embodiment=env.embodiment, keys=("obs/proprio",), spans=spans,
                                          low=actions.min(axis=0), high=actions.max(axis=0)))  # fmt: skip
    assert idle[10:30].all()
    assert not idle[42:].any()


def panda_motion(steps: int, per_s: dict[str, float]) -> np.ndarray:
    """Proprio ``(T, 20)`` that rests but for dimensions with a constant speed."""
    proprio = np.zeros((steps, len(EMBODIMENT.proprio.names)))
    for name, speed in per_s.items():
        proprio[:, EMBODIMENT.proprio.names.index(name)] = 0.4 + speed * np.arange(steps) / RATE
    return proprio


def one_episode(path: Path, proprio: np.ndarray, embodiment: Embodiment = EMBODIMENT) -> tuple[Arrays, MotionScale]:
    """The arrays of an episode without commands, and the scale of a dataset of nothing else."""
    arrays, info = make_episode(0, len(proprio), rest=len(proprio) - 1)
    arrays |= {"obs/proprio": proprio.astype(np.float32), "actions": np.zeros_like(arrays["actions"])}
    with DatasetWriter(path, embodiment, TASKS) as writer:
        writer.add(arrays, dataclasses.replace(info, embodiment=embodiment_digest(embodiment)))
    return arrays, MotionScale.of(Dataset.open(path))


SLOW = [{"tcp_z": -0.01}, {"tcp_r21": 0.03}, {"gripper_opening": -0.05}, {"tcp_x": 0.007, "tcp_y": 0.007}]


@pytest.mark.parametrize("per_s", SLOW)
def test_noise_of_a_resting_arm_is_no_motion_and_slow_motion_is_no_rest(
    tmp_path: Path, per_s: dict[str, float]
) -> None:
    noise = {"m": 0.001, "rad": 0.002, "1": 0.002}
    deviations = np.array([noise[unit] for unit in EMBODIMENT.proprio.units])
    for seed in range(10):
        generator = np.random.default_rng(seed)
        proprio = np.concatenate([panda_motion(60, dict.fromkeys(per_s, 0.0)), panda_motion(60, per_s)])
        arrays, scale = one_episode(tmp_path / f"{seed}", proprio + generator.normal(0, deviations, proprio.shape))
        idle = idle_steps(arrays, scale)
        assert idle[:50].all()
        assert not idle[70:].any()


def test_without_noise_a_few_millimetres_per_second_are_motion(tmp_path: Path) -> None:
    arrays, scale = one_episode(tmp_path / "a", panda_motion(60, {"tcp_y": 0.003}))
    assert not idle_steps(arrays, scale).any()
    arrays, scale = one_episode(tmp_path / "b", panda_motion(60, {"tcp_y": 0.001}))
    assert idle_steps(arrays, scale).all()


def test_a_robot_without_names_and_units_rests_in_the_ranges_of_its_data(tmp_path: Path) -> None:
    foreign = foreign_embodiment(name="crane", control_hz=RATE, action_dim=7, observations={"proprio": (3,)})
    proprio = np.zeros((120, 3))
    proprio[:, 0] = 500 + 200 * np.clip(np.arange(120) - 60, 0, None) / 60
    proprio += np.random.default_rng(0).normal(0, [0.5, 0.5, 0], proprio.shape)
    proprio[:, 2] = 1e3 + 1e-6 * np.arange(120)  # Its change is what float32 cannot hold.
    arrays, scale = one_episode(tmp_path / "a", proprio, foreign)
    idle = idle_steps(arrays, scale)
    assert idle[:50].all()
    assert not idle[62:].any()
    # Without commands that change, and where nothing shows a motion, everything is idle.
    assert idle_steps(arrays, dataclasses.replace(scale, keys=())).all()


def test_saturation_is_counted_per_dimension(clean: Dataset) -> None:
    actions = np.zeros((10, 7), np.float32)
    actions[:4, 1] = -1
    actions[2:4, 3] = 1
    actions[:, 5] = 0.99
    shares = saturation(actions, MotionScale.of(clean))
    assert shares.tolist() == [0, 0.4, 0, 0.2, 0, 0, 0]


def test_gaps_skew_and_stale_sensors_are_measured() -> None:
    stamps = np.arange(20, dtype=np.int64) * 50_000_000
    assert describe_timing({"step/timestamp_ns": stamps}, 0.05) == {
        "rate_hz": pytest.approx(20), "jitter_ms": pytest.approx(0), "gaps": 0,
        "longest_interval_ms": pytest.approx(50), "gap_steps": [],
    }  # fmt: skip
    late = stamps.copy()
    late[8:] += 120_000_000
    timing = describe_timing({"step/timestamp_ns": late}, 0.05)
    assert timing is not None
    assert (timing["gaps"], timing["gap_steps"]) == (1, [7])
    assert timing["longest_interval_ms"] == pytest.approx(170)
    assert describe_timing({}, 0.05) is None
    info = EpisodeInfo(task="t", seed=0, success=True, operator="o", source="robot", embodiment="e",
                       columns={"capture_ns": ("arm", "front"), "receive_ns": ("arm", "front")})  # fmt: skip
    captured = np.stack([stamps, stamps - 30_000_000], axis=1)
    captured[5, 1] = captured[4, 1]
    arrays = {"step/capture_ns": captured, "step/receive_ns": captured + 4_000_000}
    found = describe_stamps(arrays, info)
    assert found is not None
    assert found["skew_ms"] == {"median": pytest.approx(30), "max": pytest.approx(80)}
    assert found["sensors"]["front"]["repeated_share"] == pytest.approx(1 / 19)
    assert found["sensors"]["arm"] == {
        "repeated_share": 0.0, "delay_median_ms": pytest.approx(4), "delay_max_ms": pytest.approx(4),
    }  # fmt: skip
    assert describe_stamps({}, info) is None


def test_an_image_that_repeats_is_frozen_only_while_the_robot_moves(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)
    images[3:7] = images[3]
    images[20:36] = images[20]
    moves = np.arange(40)[:, None] * 0.4
    assert describe_images(images, moves)["longest_frozen_steps"] == 15
    assert describe_images(images, moves)["frozen_share"] == pytest.approx(18 / 40)
    # In three steps nothing went far enough to be seen.
    assert describe_images(images, moves / 2)["frozen_share"] == pytest.approx(15 / 40)
    rested = describe_images(images, np.zeros((40, 1)))
    assert (rested["frozen_share"], rested["identical_share"]) == (0, pytest.approx(18 / 40))
    assert rested["longest_identical_steps"] == 15
    noisy = panda_motion(40, {"tcp_x": 0.0}) + np.random.default_rng(1).normal(0, 0.002, (40, 20))
    arrays, scale = one_episode(tmp_path / "a", noisy)
    assert describe_images(images, certain_motion(arrays, scale))["frozen_share"] == 0
    arrays["obs/proprio"][:, 0] += np.arange(40) * 0.002
    assert describe_images(images, certain_motion(arrays, scale))["longest_frozen_steps"] == 15
    # Where no vectors show the motion, the commands do.
    blind = dataclasses.replace(scale, keys=())
    assert describe_images(images, certain_motion(arrays, blind))["frozen_share"] == 0
    arrays["actions"][25, 0] = 1
    assert describe_images(images, certain_motion(arrays, blind))["longest_frozen_steps"] == 15


def test_the_dose_of_move_follows_from_the_logged_speeds() -> None:
    names = tuple(SceneMover(load_motion("move"), load_task("pick_place"), EMBODIMENT, 1).log())
    rows = np.zeros((20, len(names)))
    values = dict(zip(names, rows.T, strict=True))
    values["speed_factor_object"][:], values["speed_factor_target"][:] = 0.4, 0.7
    values["cube_vx_m_s"][:10], values["cube_vy_m_s"][:10] = 0.03, -0.04
    values["cube_turn_rad_s"][:5] = -np.pi / 2
    values["camera_azimuth_deg"][:] = np.linspace(-5, 7, 20)
    info = EpisodeInfo(task="t", seed=0, success=True, operator="o", source="expert", embodiment="e",
                       columns={"scene_motion": names})  # fmt: skip
    found = describe_scene_motion({"step/scene_motion": rows}, info, 0.05)
    assert found is not None
    assert found["speed_factor"] == 0.4
    assert found["things"]["cube"] == {
        "moving_share": 0.5, "mean_speed_m_s": pytest.approx(0.05), "distance_m": pytest.approx(0.025),
        "turn_deg": pytest.approx(22.5),
    }  # fmt: skip
    assert found["things"]["plate"]["moving_share"] == 0
    assert found["camera"] == {"azimuth_deg": pytest.approx(12), "distance_m": 0, "height_m": 0}
    assert describe_scene_motion({}, info, 0.05) is None


def test_duplicates_are_pairs_and_random_motions_are_not(clean: Dataset) -> None:
    scale = MotionScale.of(clean)
    prints = [fingerprint(info, clean.read(info), scale) for info in clean.episodes]
    assert find_duplicates(prints) == []
    arrays, info = clean.read(clean.episodes[3]), dataclasses.replace(clean.episodes[3], path=Path("000098.hdf5"))
    nearly = {**arrays, "actions": arrays["actions"] + np.float32(1e-3)}
    copy = fingerprint(dataclasses.replace(info, path=Path("000099.hdf5")), arrays, scale)
    pairs = find_duplicates([*prints, fingerprint(info, nearly, scale), copy])
    assert [(pair["first"], pair["second"], pair["kind"]) for pair in pairs] == [
        ("000003", "000099", "exact"), ("000003", "000098", "near"),
    ]  # fmt: skip
    # The same commands from another start are another demonstration.
    elsewhere = {**nearly, "obs/proprio": arrays["obs/proprio"] + 1}
    assert find_duplicates([*prints, fingerprint(info, elsewhere, scale)]) == []


def test_drift_is_a_trend_and_not_chance() -> None:
    generator = np.random.default_rng(0)
    noise = {f"n{index}": generator.normal(size=40).tolist() for index in range(60)}
    assert find_drift(noise) == []
    brightness = (100 + np.arange(40) * 0.5 + generator.normal(size=40)).tolist()
    (found,) = find_drift({**noise, "brightness": brightness, "constant": [3.0] * 40})
    assert found["name"] == "brightness"
    assert found["last"] - found["first"] == pytest.approx(13, abs=2)


def test_outliers_need_company() -> None:
    values = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01, 5.0]
    assert np.flatnonzero(np.abs(outliers(values, 0.1)) > 5).tolist() == [7]
    assert np.flatnonzero(np.abs(outliers(values, 1.0)) > 5).tolist() == []
    assert not outliers(values[-3:], 0.1).any()
    assert not outliers([2.0] * 20, 0.1).any()


@pytest.fixture(scope="module")
def spoilt(clean: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The clean episodes with one thing done to some of them."""
    path = tmp_path_factory.mktemp("spoilt") / "b"
    with DatasetWriter(path, EMBODIMENT, TASKS) as writer:
        for number, info in enumerate(clean.episodes):
            arrays = {name: array.copy() for name, array in clean.read(info).items()}
            if number == 1:
                arrays["obs/front_image"][4:] = arrays["obs/front_image"][4]
            if number == 3:
                arrays["step/timestamp_ns"][9:] += 200_000_000
            if number == 5:
                arrays, info = make_episode(5, 30, rest=18)
            if number == 7:
                arrays["actions"][:, 2] = 1
            if number == 9:
                arrays, info = make_episode(9, 90)
            if number == 11:
                info = dataclasses.replace(info, success=False, failure="timeout", operator="bob")
            writer.add(arrays, info)
        writer.add(clean.read(clean.episodes[2]), clean.episodes[2])
    return Dataset.open(path)


def test_nothing_is_found_where_nothing_is(clean: Dataset) -> None:
    inspection = inspect(clean.path)
    assert inspection.suspicious == {}
    assert inspection.findings == ()
    assert inspection.summary["episodes"] == 14


def test_exactly_what_was_done_is_found(spoilt: Dataset) -> None:
    inspection = inspect(spoilt.path)
    found = {name: sorted(finding.kind for finding in kinds) for name, kinds in inspection.suspicious.items()}
    assert found == {
        "000001": ["frozen"], "000003": ["gaps"], "000005": ["idle"], "000007": ["saturation"], "000009": ["length"],
        "000014": ["duplicate"],
    }  # fmt: skip
    assert set(list(found)[:2]) == {"000001", "000014"}  # Wrong data come first.
    assert [finding.kind for finding in inspection.findings] == ["duplicates", "frozen", "gaps", "failures"]
    assert "dz" in inspection.suspicious["000007"][0].text
    assert [row["operator"] for row in inspection.summary["operators"]] == ["ann", "bob"]
    # Without images there is nothing to say about them.
    quick = inspect(spoilt.path, images=False)
    assert "000001" not in quick.suspicious


def test_page_table_and_results_of_the_command(
    spoilt: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.run(["data", "inspect", str(spoilt.path), "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "6 of 15 episodes to look at" in printed
    assert "exact copy" in printed
    page = (tmp_path / "inspect.html").read_text()
    # Self-contained: the only addresses are data and names of XML.
    addresses = re.findall(r'(?:src|href)="([^"#][^"]{0,40})', page)
    assert addresses
    assert all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert page.count("<svg") == 4
    for name in ("000001", "000014", "bob", "frozen"):
        assert name in page
    results = json.loads((tmp_path / "results.json").read_text())["inspect"]
    assert results["suspicious"]["000003"][0]["kind"] == "gaps"
    assert len(results["episodes"]) == 15


def test_an_episode_that_lacks_a_camera_is_a_finding_with_the_pictures_that_it_has(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", EMBODIMENT, TASKS) as writer:
        for seed in range(3):
            arrays, info = make_episode(seed, 12)
            for camera in ("front", "wrist")[:seed]:
                del arrays[f"obs/{camera}_image"]
            writer.add(arrays, info)
    inspection = inspect(tmp_path / "a")
    assert {name: {one.kind for one in found} for name, found in inspection.suspicious.items()} == {
        "000001": {"layout"}, "000002": {"layout"},
    }  # fmt: skip
    strips = [film_strip(inspection.dataset, f"{number:06d}") for number in range(3)]
    assert len(strips[0]) > len(strips[1]) > 0
    assert strips[2] == ""


def test_an_empty_or_damaged_dataset_is_an_error(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "a", EMBODIMENT, TASKS):
        pass
    with pytest.raises(DatasetError, match="holds no episodes to inspect"):
        inspect(tmp_path / "a")
    make_dataset(tmp_path / "b", episodes=1)
    (tmp_path / "b/episodes/000000.hdf5").write_bytes(b"nothing")
    with pytest.raises(DatasetError, match="damaged"):
        inspect(tmp_path / "b")


def test_data_without_vectors_or_with_several_tasks_can_be_inspected(tmp_path: Path) -> None:
    tasks = {**TASKS, "other": {"name": "other", "horizon": 40}}
    with DatasetWriter(tmp_path / "images", EMBODIMENT, TASKS) as writer:
        for seed in range(3):
            arrays, info = make_episode(seed, 12)
            del arrays["obs/proprio"], arrays["step/timestamp_ns"]
            writer.add(arrays, info)
    assert inspect(tmp_path / "images").suspicious == {}
    with DatasetWriter(tmp_path / "tasks", EMBODIMENT, tasks) as writer:
        for seed, task in enumerate(("toy", "toy", "other")):
            arrays, info = make_episode(seed, 12)
            state = arrays.pop("obs/proprio")
            arrays["obs/state"] = state if task == "toy" else state[:, :7]
            writer.add(arrays, dataclasses.replace(info, task=task))
    inspection = inspect(tmp_path / "tasks")
    assert inspection.suspicious == {}
    # One odd episode within a task is not a matter of the task.
    with DatasetWriter(tmp_path / "tasks", EMBODIMENT, tasks) as writer:
        arrays, info = make_episode(9, 12)
        arrays["obs/state"] = arrays.pop("obs/proprio").astype(np.float64)
        writer.add(arrays, info)
    found = inspect(tmp_path / "tasks").suspicious
    assert [finding.kind for finding in found["000003"]] == ["layout"]
    assert "float64" in found["000003"][0].text
