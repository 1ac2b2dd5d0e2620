"""LeRobotDataset v3.0 and v2.1: exports, imports, statistics, interruption, and files that are damaged or hostile.

That lerobot itself accepts the exports is checked by ``tests/check_with_lerobot.py`` in an environment of its own; the
golden dataset of ``tests/data`` was written by lerobot 0.4.4 there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from exchange_damage import read_all, survive_damage
from exchange_data import LENGTHS, assert_same, episode_arrays, make_dataset, pictures

pytest.importorskip("pyarrow")

import pyarrow as pa
import pyarrow.parquet as pq

from simtoreal import cli
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import read_episode
from simtoreal.data_collection.exchange import import_dataset
from simtoreal.data_collection.lerobot_export import export_lerobot
from simtoreal.data_collection.lerobot_import import LeRobotReader
from simtoreal.data_collection.lerobot_statistics import KEYS
from simtoreal.data_collection.lerobot_video import decode, encode
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError, DatasetError

GOLDEN = Path(__file__).parent / "data" / "lerobot_golden"
FEATURE_COUNT = 2 + 5 + 9 + 5  # cameras; state, action, next.*; the rest of ours; LeRobot's five defaults


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "sort")


@pytest.fixture(scope="module")
def exported(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exported") / "sort"
    assert export_lerobot(dataset, output) == sum(LENGTHS)
    return output


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def imported(root: Path, output: Path) -> Dataset:
    with LeRobotReader(root) as reader:
        import_dataset(reader, output)
    return Dataset.open(output)


def info_of(root: Path) -> dict:
    return json.loads((root / "meta/info.json").read_text())


def change_info(root: Path, **changes: object) -> None:
    (root / "meta/info.json").write_text(json.dumps({**info_of(root), **changes}))


def table(root: Path, name: str, episode: int) -> pa.Table:
    return pq.read_table(root / name / "chunk-000" / f"file-{episode:03d}.parquet")


def test_round_trip_loses_nothing_but_video_compression(dataset: Dataset, exported: Path, tmp_path: Path) -> None:
    assert_same(imported(exported, tmp_path / "back"), dataset, lossy_images_db=30)


def test_round_trip_with_images_is_exact(dataset: Dataset, tmp_path: Path) -> None:
    export_lerobot(dataset, tmp_path / "exported", codec=None)
    assert not (tmp_path / "exported/videos").exists()
    assert_same(imported(tmp_path / "exported", tmp_path / "back"), dataset)


def test_av1_round_trip(tmp_path: Path) -> None:
    source = make_dataset(tmp_path / "large", size=64)
    export_lerobot(source, tmp_path / "exported", codec="av1")
    assert_same(imported(tmp_path / "exported", tmp_path / "back"), source, lossy_images_db=30)


def test_codecs_refuse_sizes_that_they_cannot_hold(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'front' has 16 x 16 pixels; AV1 needs"):
        export_lerobot(dataset, tmp_path / "exported", codec="av1")


@pytest.mark.parametrize("size", [16, 15])
def test_videos_keep_size_and_time_of_every_frame(tmp_path: Path, size: int) -> None:
    frames = pictures(11, size, 0)
    encode(tmp_path / "v.mp4", frames, 59.94, "h264")
    part = decode(tmp_path / "v.mp4", 4 / 59.94, 5, 59.94, (size, size, 3))
    assert part.shape == (5, size, size, 3)
    differences = [[np.abs(a.astype(int) - b).mean() for b in frames] for a in part]
    assert np.argmin(differences, axis=1).tolist() == [4, 5, 6, 7, 8]


def test_layout_follows_the_rules_of_version_3(dataset: Dataset, exported: Path) -> None:
    info = info_of(exported)
    assert (info["codebase_version"], info["fps"], info["splits"]) == ("v3.0", 20, {"train": "0:3"})
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, sum(LENGTHS), 2)
    assert len(info["features"]) == FEATURE_COUNT
    assert info["features"]["observation.images.front"]["shape"] == [16, 16, 3]
    assert info["features"]["action"]["names"] == list(dataset.embodiment.action.names)
    tasks = pq.read_table(exported / "meta/tasks.parquet").to_pydict()
    assert tasks == {"task_index": [0, 1], "task": ["sort by colour", "sort by size"]}
    start = 0
    for episode, length in enumerate(LENGTHS):
        data = table(exported, "data", episode)
        expected = [name for name, feature in info["features"].items() if feature["dtype"] != "video"]
        assert data.column_names == expected
        assert data["index"].to_pylist() == list(range(start, start + length))
        assert data["frame_index"].to_pylist() == list(range(length))
        assert data["timestamp"].to_numpy().tolist() == (np.arange(length) / 20).astype(np.float32).tolist()
        assert data["task_index"].to_pylist() == [int(episode == 1 and step >= 5) for step in range(length)]
        assert data["next.done"].to_pylist() == [step == length - 1 for step in range(length)]
        assert pa.types.is_fixed_size_list(data.schema.field("action").type)
        assert data.schema.field("next.reward").type == pa.float32()
        row = table(exported, "meta/episodes", episode).to_pylist()[0]
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (start, start + length)
        assert (row["data/chunk_index"], row["data/file_index"]) == (0, episode)
        assert row["tasks"] == (["sort by colour", "sort by size"] if episode == 1 else ["sort by colour"])
        key = "videos/observation.images.front"
        assert row[f"{key}/to_timestamp"] - row[f"{key}/from_timestamp"] == pytest.approx(length / 20, abs=1e-12)
        start += length


def test_statistics_have_every_key_in_the_shape_that_lerobot_needs(exported: Path) -> None:
    info = info_of(exported)
    columns = [table(exported, "meta/episodes", episode).column_names for episode in range(3)]
    assert columns[0] == columns[1] == columns[2]
    stats = [name for name in columns[0] if name.startswith("stats/")]
    assert stats == [f"stats/{feature}/{key}" for feature in info["features"] for key in KEYS]
    row = table(exported, "meta/episodes", 1).to_pylist()[0]
    for feature, description in info["features"].items():
        for key in KEYS:
            shape = np.shape(row[f"stats/{feature}/{key}"])
            expected = (3, 1, 1) if description["dtype"] == "video" else tuple(description["shape"])
            assert shape == ((1,) if key == "count" else expected), (feature, key)
    assert row["stats/simtoreal.step.engaged/min"] == [False]


def test_statistics_are_exact_over_skewed_episodes(exported: Path) -> None:
    stats = json.loads((exported / "meta/stats.json").read_text())
    episodes = [episode_arrays(number, 16) for number in range(3)]
    state = np.concatenate([arrays["obs/proprio"] for arrays in episodes]).astype(np.float64)
    pixels = np.concatenate([arrays["obs/front_image"] for arrays in episodes]).reshape(-1, 3) / 255.0
    for feature, values, shape in (
        ("observation.state", state, (20,)),
        ("observation.images.front", pixels, (3, 1, 1)),
    ):
        for key, share in (("q01", 0.01), ("q10", 0.1), ("q50", 0.5), ("q90", 0.9), ("q99", 0.99)):
            expected = np.quantile(values, share, axis=0).reshape(shape)
            np.testing.assert_allclose(stats[feature][key], expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(stats[feature]["mean"], values.mean(0).reshape(shape), rtol=1e-12)
        np.testing.assert_allclose(stats[feature]["std"], values.std(0).reshape(shape), rtol=1e-9)
        assert stats[feature]["count"] == [sum(LENGTHS)]
    averaged = np.mean([np.quantile(arrays["obs/proprio"], 0.99, axis=0) for arrays in episodes], axis=0)
    assert not np.allclose(stats["observation.state"]["q99"], averaged, rtol=0.05)  # what merging by means would give


def test_what_a_policy_must_not_see_is_no_observation(exported: Path) -> None:
    observations = {name for name in info_of(exported)["features"] if name.startswith("observation")}
    assert observations == {"observation.images.front", "observation.images.wrist", "observation.state"}


KILLED = """
import os, signal, sys
from pathlib import Path
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection import lerobot_export
write = lerobot_export.write_table
def dying(path, columns, metadata=None):
    if "meta/episodes/chunk-000/file-001" in str(path):
        path.with_name(".file-001.parquet.half.tmp").write_bytes(b"PAR1")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, columns, metadata)
lerobot_export.write_table = dying
lerobot_export.export_lerobot(Dataset.open(sys.argv[1]), Path(sys.argv[2]))
"""


def test_killed_export_is_readable_and_continues(dataset: Dataset, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "killed"
    child = subprocess.run([sys.executable, "-c", KILLED, str(dataset.path), str(output)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert info_of(output)["total_episodes"] == 1
    first = imported(output, tmp_path / "first")
    assert [episode.steps for episode in first.episodes] == [LENGTHS[0]]
    before = os.stat(output / "data/chunk-000/file-000.parquet").st_mtime_ns
    export_lerobot(dataset, output)
    assert os.stat(output / "data/chunk-000/file-000.parquet").st_mtime_ns == before
    assert not list(output.rglob("*.tmp"))
    for name in ("meta/info.json", "meta/stats.json", "meta/simtoreal.json"):
        assert (output / name).read_text() == (exported / name).read_text()
    for episode in range(3):
        assert table(output, "data", episode).equals(table(exported, "data", episode))
        assert table(output, "meta/episodes", episode).equals(table(exported, "meta/episodes", episode))


def test_export_of_a_dataset_that_has_grown_appends(dataset: Dataset, exported: Path, tmp_path: Path) -> None:
    output = tmp_path / "grown"
    export_lerobot(dataset, output, episodes=dataset.episodes[1:2])
    with pytest.raises(DatasetError, match="other arrays"):  # only this episode has 'step/likelihood'
        export_lerobot(dataset, output)
    shutil.rmtree(output)
    pair = [dataset.episodes[0], dataset.episodes[2]]
    export_lerobot(dataset, output, episodes=pair[:1])
    assert export_lerobot(dataset, output, episodes=pair) == LENGTHS[0] + LENGTHS[2]
    assert [e.seed for e in imported(output, tmp_path / "back").episodes] == [100, 102]
    with pytest.raises(DatasetError, match=r"episode 0 is not '000002'"):
        export_lerobot(dataset, output, episodes=pair[::-1])
    with pytest.raises(DatasetError, match="more than the 1 to export"):
        export_lerobot(dataset, output, episodes=pair[:1])
    with pytest.raises(DatasetError, match="other codec"):
        export_lerobot(dataset, output, episodes=pair, codec=None)


def test_other_folders_are_not_written_to(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("do not touch")
    with pytest.raises(DatasetError, match="is not empty and no export of ours"):
        export_lerobot(dataset, tmp_path)


def golden_values(episode: int, steps: int) -> dict[str, np.ndarray]:
    """As ``golden_frame`` of ``tests/check_with_lerobot.py``."""
    t = np.arange(steps, dtype=np.float32)
    return {
        "actions": np.stack([t / 10, np.full(steps, -episode)], axis=1).astype(np.float32),
        "obs/proprio": np.stack([np.full(steps, episode), t, episode + t / 10], axis=1).astype(np.float32),
        "obs/velocity": t / 4,
        "obs/matrix": np.arange(4, dtype=np.float32).reshape(2, 2) + t[:, None, None],
    }


def check_golden(dataset: Dataset) -> None:
    assert (dataset.embodiment.name, dataset.embodiment.control_hz) == ("toy", 10)
    assert dataset.embodiment.action.names == ("a", "b")
    assert dataset.embodiment.proprio.names == ("a", "b", "c")
    assert [episode.success for episode in dataset.episodes] == [True, False]
    assert dataset.episodes[0].instructions == ("push the block", "pull it back")
    for number, steps in enumerate((6, 4)):
        arrays = dataset.read(dataset.episodes[number])
        for name, values in golden_values(number, steps).items():
            np.testing.assert_allclose(arrays[name].reshape(values.shape), values, rtol=1e-6, err_msg=name)
        expected = [0, 0, 0, 1, 1, 1] if number == 0 else [0] * 4
        assert arrays["step/instruction"].tolist() == expected
        front = arrays["obs/front_image"].astype(int)
        np.testing.assert_allclose(front[:, 10, 10, 0], 40 + 20 * np.arange(steps), atol=6)
        np.testing.assert_allclose(front[:, 50, 50, 1], 60 + 100 * number, atol=6)
        if "obs/camera_image" in arrays:  # PNG: exact
            assert arrays["obs/camera_image"][:, 0, 15, 0].tolist() == (40 + 20 * np.arange(steps)).tolist()


def test_dataset_of_lerobot_is_imported(tmp_path: Path) -> None:
    dataset = imported(GOLDEN, tmp_path / "golden")
    assert "obs/camera_image" in dataset.read(dataset.episodes[0])
    check_golden(dataset)


def older_version(root: Path) -> Path:
    """Rewrite the golden dataset as version 2.1: a file per episode, JSON lines instead of tables."""
    info = info_of(GOLDEN)
    features = {name: feature for name, feature in info["features"].items() if feature["dtype"] != "image"}
    data = pq.read_table(GOLDEN / "data/chunk-000/file-000.parquet").drop_columns(["observation.image"])
    video = GOLDEN / "videos/observation.images.front/chunk-000/file-000.mp4"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    (root / "videos/chunk-000/observation.images.front").mkdir(parents=True)
    lines = []
    for episode, (start, length) in enumerate(((0, 6), (6, 4))):
        pq.write_table(data.slice(start, length), root / f"data/chunk-000/episode_{episode:06d}.parquet")
        frames = decode(video, start / 10, length, 10, (64, 64, 3))
        encode(root / f"videos/chunk-000/observation.images.front/episode_{episode:06d}.mp4", frames, 10, "h264")
        lines.append({"episode_index": episode, "tasks": [], "length": length})
    tasks = pq.read_table(GOLDEN / "meta/tasks.parquet").to_pylist()
    texts = [{"task_index": row["task_index"], "task": row.get("task") or row["__index_level_0__"]} for row in tasks]
    (root / "meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (root / "meta/tasks.jsonl").write_text("\n".join(map(json.dumps, texts)))
    content = {**info, "codebase_version": "v2.1", "features": features}
    content["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    content["video_path"] = "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
    (root / "meta/info.json").write_text(json.dumps(content))
    return root


def test_version_2_1_is_imported(tmp_path: Path) -> None:
    check_golden(imported(older_version(tmp_path / "old"), tmp_path / "new"))


def test_episodes_that_lerobot_appended_are_imported_with_ours(copy: Path, tmp_path: Path) -> None:
    # As lerobot leaves it: another file of data and meta/episodes, info.json counts on, no description of ours.
    data = table(copy, "data", 0)
    fields = {"episode_index": np.full(9, 3), "index": np.arange(24, 33), "task_index": np.full(9, 1)}
    for name, values in fields.items():
        data = data.set_column(data.column_names.index(name), name, pa.array(values))
    pq.write_table(data, copy / "data/chunk-000/file-003.parquet")
    episodes = table(copy, "meta/episodes", 0)
    changes = {"episode_index": 3, "data/file_index": 3, "dataset_from_index": 24, "dataset_to_index": 33}
    for name, value in changes.items():
        episodes = episodes.set_column(episodes.column_names.index(name), name, pa.array([value]))
    pq.write_table(episodes, copy / "meta/episodes/chunk-000/file-003.parquet")
    assert len(imported(copy, tmp_path / "before").episodes) == 3  # info.json does not count it yet
    change_info(copy, total_episodes=4, total_frames=33)
    dataset = imported(copy, tmp_path / "after")
    assert dataset.embodiment.action.mode == "ee_delta"
    assert (dataset.episodes[3].instruction, dataset.episodes[3].source) == ("sort by size", "lerobot")
    first, last = dataset.read(dataset.episodes[0]), dataset.read(dataset.episodes[3])
    np.testing.assert_array_equal(first["actions"], last["actions"])


def hostile_template(root: Path) -> None:
    change_info(root, data_path="../../etc/{episode_index}.parquet")


def python_template(root: Path) -> None:
    change_info(root, data_path="data/{chunk_index.__class__}/file.parquet")


def absolute_template(root: Path) -> None:
    change_info(root, video_path="/etc/passwd")


def linked_file(root: Path) -> None:
    file = root / "data/chunk-000/file-001.parquet"
    file.rename(root / "elsewhere.parquet")
    file.symlink_to(root / "elsewhere.parquet")


def endless_rows(root: Path) -> None:
    zeros = pa.array(np.zeros(21_000_000, dtype=np.int8))  # 2 kB as a file
    pq.write_table(pa.table({"episode_index": zeros}), root / "meta/episodes/chunk-000/file-001.parquet")


def cut_table(root: Path) -> None:
    file = root / "data/chunk-000/file-001.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def missing_video(root: Path) -> None:
    (root / "videos/observation.images.wrist/chunk-000/file-001.mp4").unlink()


def short_video(root: Path) -> None:
    encode(root / "videos/observation.images.wrist/chunk-000/file-001.mp4", pictures(10, 16, 0), 20, "h264")


def larger_video(root: Path) -> None:
    encode(root / "videos/observation.images.wrist/chunk-000/file-001.mp4", pictures(14, 64, 0), 20, "h264")


def other_shape(root: Path) -> None:
    features = info_of(root)["features"]
    features["action"]["shape"] = [9]
    change_info(root, features=features)


def slash_in_a_name(root: Path) -> None:
    change_info(root, features={**info_of(root)["features"], "../x": {"dtype": "float32", "shape": [1]}})


def unknown_version(root: Path) -> None:
    change_info(root, codebase_version="v9.0")


def no_json(root: Path) -> None:
    (root / "meta/info.json").write_text("[" * 100_000)


def arrays_with_objects(root: Path) -> None:
    np.savez(root / "meta/simtoreal/episode-000001.npz", evil=np.array([{"a": 1}], dtype=object))


def change_column(file: Path, name: str, values: pa.Array) -> None:
    table = pq.read_table(file)
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), file)


def length_of_nan(root: Path) -> None:
    change_column(root / "meta/episodes/chunk-000/file-001.parquet", "length", pa.array([np.nan]))


def video_from_nan(root: Path) -> None:
    file = root / "meta/episodes/chunk-000/file-001.parquet"
    change_column(file, "videos/observation.images.wrist/from_timestamp", pa.array([np.nan]))


def task_without_number(root: Path) -> None:
    file = root / "meta/tasks.parquet"
    change_column(file, "task_index", pa.array([None] * pq.read_table(file).num_rows, pa.int64()))


def text_as_number(root: Path) -> None:
    change_info(root, codebase_version="v2.1")
    (root / "meta/tasks.jsonl").write_text('{"task_index": "first", "task": "lift"}')


def change_sidecar(root: Path, **entries: object) -> None:
    file = root / "meta/simtoreal.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def endless_mask(root: Path) -> None:
    change_sidecar(root, masks={"chosen": [math.inf]})


def negative_size(root: Path) -> None:
    change_sidecar(root, shapes={"step/extra": [[-1], "float32"]})


def broken_deflate(root: Path) -> None:
    file = root / "meta/simtoreal/episode-000001.npz"
    np.savez_compressed(file, extra=np.random.default_rng(0).normal(size=1000))
    content = bytearray(file.read_bytes())
    content[200:260] = b"\xff" * 60
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (hostile_template, "unknown placeholder '{episode_index}'"),
        (python_template, r"path 'data/\{chunk_index.__class__\}/file.parquet' is refused"),
        (absolute_template, "path '/etc/passwd' is refused"),
        (linked_file, "file-001.parquet: is a symbolic link"),
        (endless_rows, "declares 21000000 rows"),
        (cut_table, "file-001.parquet: cannot be read as parquet"),
        (missing_video, "file-001.mp4: is not a readable video"),
        (short_video, "file-001.mp4: ends after 10 of 14 frames"),
        (larger_video, "frames are 64 x 64, info.json says 16 x 16"),
        (other_shape, "'action' holds 63 values in 9 rows; info.json says"),
        (slash_in_a_name, r"feature '\.\./x' is malformed"),
        (unknown_version, "codebase_version is 'v9.0'"),
        (no_json, "info.json: is not valid JSON"),
        (arrays_with_objects, "episode-000001.npz: is damaged"),
        (length_of_nan, "meta: the tables of tasks and episodes are damaged"),
        (video_from_nan, "from_timestamp' is nan"),
        (task_without_number, "meta: the tables of tasks and episodes are damaged"),
        (text_as_number, "meta: the tables of tasks and episodes are damaged"),
        (endless_mask, "simtoreal.json: is damaged"),
        (negative_size, "'shapes' names types that are not numbers, or negative sizes"),
        (broken_deflate, "episode-000001.npz: is damaged"),
    ],
)
def test_damaged_and_hostile_datasets_are_refused_by_name(copy: Path, tmp_path: Path, damage, message: str) -> None:
    damage(copy)
    with pytest.raises(DatasetError, match=message):
        read_all(LeRobotReader, copy)


@pytest.mark.parametrize("damage", [cut_table, missing_video, short_video])
def test_damaged_episode_costs_only_itself(copy: Path, tmp_path: Path, damage) -> None:
    damage(copy)
    with LeRobotReader(copy) as reader:
        result = import_dataset(reader, tmp_path / "rest")
    assert (result.episodes, len(result.skipped)) == (2, 1)
    assert "episode 000001" in result.skipped[0]
    assert Dataset.open(tmp_path / "rest").filter("success")[0].seed == 100


def judged_dataset(path: Path) -> Dataset:
    """A success that only an operator judged (no 'dones'), and a failure that ended the task (with 'dones')."""
    source = make_dataset(path.with_name("source"))
    with DatasetWriter(path, source.embodiment, source.tasks) as writer:
        for number, success in ((0, True), (1, False)):
            info, arrays = read_episode(source.episodes[number].path)
            arrays["dones"][-1] = not success
            writer.add(arrays, dataclasses.replace(info, success=success, failure="" if success else "task_failed"))
    return Dataset.open(path)


def test_success_is_what_the_episode_says_and_not_where_the_task_ended(tmp_path: Path) -> None:
    root = tmp_path / "exported"
    export_lerobot(judged_dataset(tmp_path / "judged"), root, codec=None)
    assert table(root, "data", 0)["next.success"].to_pylist() == [False] * 8 + [True]
    assert not any(table(root, "data", 1)["next.success"].to_pylist())
    # As lerobot's tools leave it: without what is known about the episodes, and without us.
    shutil.rmtree(root / "meta/simtoreal")
    assert [one.success for one in imported(root, tmp_path / "own").episodes] == [True, False]
    (root / "meta/simtoreal.json").unlink()
    assert [one.success for one in imported(root, tmp_path / "foreign").episodes] == [True, False]


def test_masks_are_left_out_once_lerobot_has_numbered_anew(copy: Path, tmp_path: Path) -> None:
    change_sidecar(copy, masks={"chosen": [0, 2]})
    assert imported(copy, tmp_path / "as exported").masks["chosen"] == ["000000", "000002"]
    # Episodes 0 and 1 in each other's place, with the descriptions of the export.
    sidecars = [copy / f"meta/simtoreal/episode-00000{number}.json" for number in (0, 1)]
    contents = [json.loads(sidecar.read_text()) for sidecar in sidecars]
    for sidecar, content, steps in zip(sidecars, contents[::-1], LENGTHS, strict=False):
        sidecar.write_text(json.dumps({**content, "steps": steps}))  # of the same length
    with LeRobotReader(copy) as reader:
        result = import_dataset(reader, tmp_path / "swapped")
    assert sum(note.startswith("left out the masks: episode 0 ") for note in result.notes) == 1
    dataset = Dataset.open(tmp_path / "swapped")
    assert dataset.meta["masks"] == {}
    assert [one.operator for one in dataset.episodes] == ["copy", "copy", "person 2"]
    shutil.rmtree(copy / "meta/simtoreal")  # what lerobot's tools leave beside a copied meta/simtoreal.json
    assert imported(copy, tmp_path / "without").meta["masks"] == {}


def plain(copy: Path) -> Path:
    """The export as if lerobot had written it."""
    shutil.rmtree(copy / "meta/simtoreal")
    (copy / "meta/simtoreal.json").unlink()
    return copy


def add_features(root: Path, **shapes: list[int]) -> None:
    """Add numbers (the position of the feature) to every row."""
    features = info_of(root)["features"]
    for number, (name, shape) in enumerate(shapes.items()):
        features[name] = {"dtype": "float32", "shape": shape, "names": None}
        for file in root.glob("data/*/*.parquet"):
            rows = pq.read_table(file)
            values = [[float(number)] * shape[0] if shape != [1] else float(number)] * len(rows)
            pq.write_table(rows.append_column(name, pa.array(values)), file)
    change_info(root, features=features)


def test_image_shapes_are_understood_and_what_is_no_rgb_image_is_left_out(copy: Path, tmp_path: Path) -> None:
    features = info_of(plain(copy))["features"]
    features["observation.images.front"]["shape"] = [3, 16, 16]
    features["observation.images.depth"] = {"dtype": "image", "shape": [16, 16, 1], "names": None}
    features["observation.range"] = {"dtype": "float32", "shape": [16, 16, 1], "names": None}
    change_info(copy, features=features)
    with LeRobotReader(copy) as reader:
        result = import_dataset(reader, tmp_path / "back")
    for name in ("images.depth", "range"):
        assert f"left out feature 'observation.{name}' of shape (16, 16, 1), which is no RGB image" in result.notes
    dataset = Dataset.open(tmp_path / "back")
    assert dataset.embodiment.image_keys == ("front_image", "wrist_image")
    assert dataset.read(dataset.episodes[0])["obs/front_image"].shape == (9, 16, 16, 3)


def test_names_that_are_none_here_cost_no_episode(copy: Path, tmp_path: Path) -> None:
    add_features(plain(copy), **{"torque (Nm)": [2], "größe": [1]})
    with LeRobotReader(copy) as reader:
        result = import_dataset(reader, tmp_path / "back")
    assert (result.episodes, result.skipped) == (3, ())
    assert "feature 'torque (Nm)' is called 'step/torque__Nm_' here" in result.notes
    dataset = Dataset.open(tmp_path / "back")
    assert dataset.read(dataset.episodes[0], ["step/torque__Nm_"])["step/torque__Nm_"].shape == (9, 2)


def test_a_state_of_several_axes_is_an_observation_like_others(copy: Path, tmp_path: Path) -> None:
    features = info_of(plain(copy))["features"]
    features["observation.state"] = {"dtype": "float32", "shape": [2, 10], "names": None}
    change_info(copy, features=features)
    dataset = imported(copy, tmp_path / "back")
    assert dataset.embodiment.proprio.dim == 0
    assert dataset.read(dataset.episodes[0], ["obs/state"])["obs/state"].shape == (9, 2, 10)


def test_features_of_the_same_name_are_all_kept(copy: Path, tmp_path: Path) -> None:
    more = {"observation.proprio": [2], "force.left": [1], "force_left": [1], "instruction": [1], "timestamp_ns": [1]}
    add_features(plain(copy), **more)
    with LeRobotReader(copy) as reader:
        result = import_dataset(reader, tmp_path / "back")
    assert (result.episodes, result.skipped) == (3, ())
    dataset = Dataset.open(tmp_path / "back")
    arrays = dataset.read(dataset.episodes[0])
    assert arrays["obs/proprio"].shape == (9, 20)
    names = ["obs/proprio_2", "step/force_left", "step/force_left_2", "step/instruction_2", "step/timestamp_ns_3"]
    assert [float(arrays[name].reshape(-1)[0]) for name in names] == [0, 1, 2, 3, 4]
    assert "feature 'force_left' is called 'step/force_left_2' here; 'step/force_left' is another one" in result.notes
    assert "feature 'observation.proprio' is called 'obs/proprio_2' here; 'obs/proprio' is another one" in result.notes


@pytest.mark.parametrize("feature", ["episode_index", "frame_index", "task_index"])
def test_missing_index_is_named_and_blocks_nothing(copy: Path, tmp_path: Path, feature: str) -> None:
    info = info_of(copy)
    change_info(copy, features={name: shape for name, shape in info["features"].items() if name != feature})
    with pytest.raises(DatasetError, match=f"info.json: feature '{feature}' is missing"):
        imported(copy, tmp_path / "back")
    change_info(copy, features=info["features"])
    assert len(imported(copy, tmp_path / "back").episodes) == 3


@pytest.mark.parametrize("name", ["meta/simtoreal.json", "meta/info.json", "meta/simtoreal/episode-000000.json"])
def test_export_over_a_damaged_one_names_the_file(dataset: Dataset, copy: Path, name: str) -> None:
    (copy / name).write_text("{ broken")
    with pytest.raises(DatasetError, match=f"{name}: is not valid JSON"):
        export_lerobot(dataset, copy)


def test_export_over_one_of_unknown_length_names_the_file(dataset: Dataset, copy: Path) -> None:
    change_info(copy, total_episodes=None)
    with pytest.raises(DatasetError, match=r"info\.json: total_episodes is None"):
        export_lerobot(dataset, copy)


def test_import_needs_a_new_folder(exported: Path, dataset: Dataset) -> None:
    with LeRobotReader(exported) as reader, pytest.raises(DatasetError, match="is a dataset already"):
        import_dataset(reader, dataset.path)


def test_training_on_an_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    cli.run(["data", "import", str(GOLDEN), "--output", str(data), "--task", "toy"])
    assert "2 episodes (1 successes), 10 steps, 0 skipped" in capsys.readouterr().out
    small = ["--bc.hidden", "16", "--bc.layers", "1", "--bc.image-keys", "--trainer.batch-size", "4"]
    cli.run(
        [
            "train",
            "--data",
            str(data),
            "--output",
            str(run),
            "--policy",
            "bc",
            "--steps",
            "2",
            "--device",
            "cpu",
            *small,
        ]
    )
    assert json.loads((run / "results.json").read_text())["train"]["steps"] == 2


def test_export_from_the_command_line(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "exported"
    cli.run(["data", "export", str(dataset.path), "--format", "lerobot", "--output", str(output), "--mask", "success"])
    assert "2 episodes, 23 steps as lerobot" in capsys.readouterr().out
    assert info_of(output)["total_episodes"] == 2
    with pytest.raises(ConfigError, match="--next-obs belongs to --format robomimic"):
        cli.run(["data", "export", str(dataset.path), "--format", "lerobot", "--output", str(output), "--next-obs"])


def test_random_damage_ends_in_an_error_that_names_the_file(tmp_path: Path) -> None:
    noticed = survive_damage(LeRobotReader, GOLDEN, tmp_path / "damaged", rounds=60)
    assert noticed > 10
