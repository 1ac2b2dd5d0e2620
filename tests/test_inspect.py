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
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.data_collection.inspect_motion import (
    MotionScale,
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
from simtoreal.envs import load_task
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
    dataset = make_dataset(tmp_path / "a", episodes=3, rest=6)
    scale = MotionScale.of(dataset)
    arrays = dataset.read(dataset.episodes[0])
    expected = np.zeros(len(arrays["actions"]), bool)
    expected[:6] = True
    assert (idle_steps(arrays, scale) == expected).all()
    described = describe_motion(arrays, scale)
    assert described["idle_start_steps"] == 6
    assert described["idle_share"] == pytest.approx(6 / len(expected))
    commanded = {**arrays, "actions": arrays["actions"].copy()}
    commanded["actions"][2, 0] = 0.5
    commanded["actions"][4:, 6] = -1  # The gripper is told to close in step 4 and stays told to.
    moving = {**arrays, "obs/proprio": arrays["obs/proprio"].copy()}
    moving["obs/proprio"][3, 5] += 0.1
    assert np.flatnonzero(idle_steps(commanded, scale)).tolist() == [0, 1, 3, 5]
    assert np.flatnonzero(idle_steps(moving, scale)).tolist() == [0, 1, 4, 5]


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


def test_an_image_that_repeats_is_frozen_only_while_the_robot_moves() -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    images[3:7] = images[3]
    idle = np.zeros(12, bool)
    assert describe_images(images, idle)["longest_frozen_steps"] == 3
    assert describe_images(images, idle)["frozen_share"] == pytest.approx(3 / 12)
    idle[3:6] = True
    rested = describe_images(images, idle)
    assert (rested["frozen_share"], rested["identical_share"]) == (0, pytest.approx(3 / 12))
    assert rested["longest_identical_steps"] == 3


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
                arrays["obs/front_image"][4:10] = arrays["obs/front_image"][4]
            if number == 3:
                arrays["step/timestamp_ns"][9:] += 200_000_000
            if number == 5:
                arrays, info = make_episode(5, 18, rest=8)
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
