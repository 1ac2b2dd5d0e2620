"""Replay buffers of diffusion_policy and UMI, written with the zarr library, and stores that are damaged or hostile."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("zarr")

import numcodecs
import zarr
from exchange_damage import read_all, survive_damage

from simtoreal import cli
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.exchange import ImportResult, import_dataset
from simtoreal.data_collection.replay_buffer_import import ReplayBufferReader
from simtoreal.data_collection.zarr_codecs import declared_size
from simtoreal.envs.errors import DatasetError

ENDS = (10, 17, 30)
BLOSC = numcodecs.Blosc("zstd", 5)


def write_store(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    ends: Sequence[int] = ENDS,
    *,
    chunks: Mapping[str, tuple[int, ...]] | None = None,
    compressors: Mapping[str, Any] | None = None,
) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=2)
    for name, values in arrays.items():
        chunk = (chunks or {}).get(name, (7, *values.shape[1:]))
        array = group.create_array(
            f"data/{name}", shape=values.shape, dtype=values.dtype, chunks=chunk,
            compressors=(compressors or {}).get(name, BLOSC),
        )  # fmt: skip
        array[:] = values
    stored = group.create_array("meta/episode_ends", shape=(len(ends),), dtype="i8", chunks=(len(ends),))
    stored[:] = ends
    return path


def pusht(steps: int = 30) -> dict[str, np.ndarray]:
    """What diffusion_policy's PushT file holds, images as float32 of whole numbers included."""
    rng = np.random.default_rng(0)
    return {
        "img": rng.integers(0, 256, (steps, 24, 24, 3)).astype(np.float32),
        "state": rng.uniform(0, 512, (steps, 5)).astype(np.float32),
        "action": rng.uniform(0, 512, (steps, 2)).astype(np.float32),
        "keypoint": rng.uniform(0, 512, (steps, 9, 2)).astype(np.float32),
        "n_contacts": np.ones((steps, 1), dtype=np.float32),
    }


def umi(steps: int = 30) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    vectors = {"eef_pos": 3, "eef_rot_axis_angle": 3, "gripper_width": 1}
    arrays = {f"robot0_{name}": rng.normal(size=(steps, size)).astype(np.float32) for name, size in vectors.items()}
    arrays |= {f"robot0_demo_{name}_pose": rng.normal(size=(steps, 6)) for name in ("start", "end")}
    ramp = 8 * np.arange(1, steps + 1, dtype=np.uint8)[:, None, None, None]
    return {**arrays, "camera0_rgb": np.broadcast_to(ramp, (steps, 32, 32, 3)).copy()}


def umi_store(path: Path) -> Path:
    """Images in JPEG-XL, one per chunk, as UMI writes them."""
    codecs = pytest.importorskip("imagecodecs.numcodecs")
    codecs.register_codecs(verbose=False)
    jpeg_xl = codecs.Jpegxl(level=99, effort=3)
    return write_store(path, umi(), chunks={"camera0_rgb": (1, 32, 32, 3)}, compressors={"camera0_rgb": jpeg_xl})


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def run_import(path: Path, output: Path, **options: Any) -> tuple[Dataset, ImportResult]:
    with ReplayBufferReader(path, **options) as reader:
        result = import_dataset(reader, output)
    return Dataset.open(output), result


def check_pusht(dataset: Dataset) -> None:
    expected = pusht()
    assert [episode.steps for episode in dataset.episodes] == [10, 7, 13]
    arrays = dataset.read(dataset.episodes[1])
    np.testing.assert_array_equal(arrays["obs/camera_image"], expected["img"][10:17].astype(np.uint8))
    np.testing.assert_array_equal(arrays["actions"], expected["action"][10:17])
    np.testing.assert_array_equal(arrays["obs/keypoint"], expected["keypoint"][10:17])


COMPRESSORS = {
    "none": None, "blosc": BLOSC, "blosc-lz4": numcodecs.Blosc("lz4", 1, numcodecs.Blosc.BITSHUFFLE),
    "bz2": numcodecs.BZ2(), "gzip": numcodecs.GZip(), "lz4": numcodecs.LZ4(), "zlib": numcodecs.Zlib(),
    "zstd": numcodecs.Zstd(),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPRESSORS)
def test_pusht_is_read_with_every_compressor(tmp_path: Path, name: str) -> None:
    arrays = pusht()
    store = write_store(tmp_path / "pusht.zarr", arrays, compressors=dict.fromkeys(arrays, COMPRESSORS[name]))
    dataset, result = run_import(store, tmp_path / "out")
    check_pusht(dataset)
    assert (dataset.embodiment.control_hz, dataset.embodiment.action.mode) == (10, "env")
    assert "observation 'img' is called 'camera_image' here" in result.notes


def test_times_of_a_real_robot_keep_their_precision(tmp_path: Path) -> None:
    """As diffusion_policy records them: as float32, a second of today is rounded to the next 128."""
    stamps_s = 1.7e9 + np.arange(30) / 10 + np.random.default_rng(0).uniform(0, 0.01, 30)
    arrays = {"action": np.ones((30, 6)), "robot_eef_pose": np.ones((30, 6)), "timestamp": stamps_s}
    store = write_store(tmp_path / "real.zarr", arrays)
    dataset, result = run_import(store, tmp_path / "out", control_hz=10.0)
    found = dataset.read(dataset.episodes[1])
    np.testing.assert_allclose(found["step/timestamp_ns"] * 1e-9, stamps_s[10:17], atol=1e-6)
    assert "obs/timestamp" not in found
    assert any("'timestamp' is taken for the times" in note for note in result.notes)
    # Milliseconds, say: nothing is known about them.
    store = write_store(tmp_path / "other.zarr", {**arrays, "timestamp": 1000 * stamps_s})
    other, _ = run_import(store, tmp_path / "two", control_hz=10.0)
    assert "obs/timestamp" in other.read(other.episodes[0])


def test_zip_with_a_folder_inside_is_read_in_place(tmp_path: Path) -> None:
    store = write_store(tmp_path / "pusht.zarr", pusht())
    archive = zipped(store, tmp_path / "pusht.zip", "pusht_cchi/pusht.zarr/")
    check_pusht(run_import(archive, tmp_path / "out")[0])


def test_chunks_across_every_axis(tmp_path: Path) -> None:
    store = write_store(tmp_path / "s.zarr", pusht(), chunks={"img": (4, 10, 24, 2), "action": (30, 1)})
    check_pusht(run_import(store, tmp_path / "out")[0])


@pytest.mark.parametrize("fill", [None, 0.0, 2.5, "NaN"])
@pytest.mark.parametrize("archived", [False, True])
def test_episodes_whose_chunks_are_missing_are_skipped(tmp_path: Path, fill: object, archived: bool) -> None:
    """An interrupted copy looks like chunks that hold the fill value; as zeros they were demonstrated actions."""
    store = write_store(tmp_path / "s.zarr", pusht() | {"timestamp": np.arange(30) / 10})
    for name in ("action", "timestamp"):
        describe(store, f"data/{name}", fill_value=fill)
        next((store / "data" / name).glob("4*")).unlink()  # the last two rows
    dataset, result = run_import(zipped(store, tmp_path / "s.zip") if archived else store, tmp_path / "out")
    assert [episode.steps for episode in dataset.episodes] == [10, 7]
    assert len(result.skipped) == 1
    assert "episode 000002" in result.skipped[0]
    assert "'data/action' lacks 1 of the 3 chunks of rows 17 to 29. Copy the store again" in result.skipped[0]


@pytest.mark.parametrize(("largest", "scale"), [(255, 1), (1, 255)])
def test_brightness_is_that_of_the_store_and_not_of_an_episode(tmp_path: Path, largest: int, scale: int) -> None:
    arrays = pusht()
    arrays["img"] = np.minimum(arrays["img"], largest)
    arrays["img"][:10] = np.minimum(arrays["img"][:10], 1)  # of 255, or of 1
    dataset, _ = run_import(write_store(tmp_path / "s.zarr", arrays), tmp_path / "out")
    first, second = (dataset.read(dataset.episodes[number])["obs/camera_image"] for number in (0, 1))
    np.testing.assert_array_equal(first, arrays["img"][:10] * scale)
    np.testing.assert_array_equal(second, arrays["img"][10:17] * scale)


def test_umi_actions_are_the_next_poses(tmp_path: Path) -> None:
    store = umi_store(tmp_path / "umi.zarr")
    dataset, result = run_import(zipped(store, tmp_path / "umi.zarr.zip"), tmp_path / "out")
    assert (dataset.embodiment.name, dataset.embodiment.control_hz) == ("umi", 59.94)
    assert any("59.94 Hz" in note for note in result.notes)
    expected = umi()
    pose = np.concatenate([expected[f"robot0_{k}"] for k in ("eef_pos", "eef_rot_axis_angle", "gripper_width")], axis=1)
    arrays = dataset.read(dataset.episodes[1])
    np.testing.assert_array_equal(arrays["actions"], pose[[*range(11, 17), 16]])
    np.testing.assert_array_equal(arrays["obs/robot0_eef_pos"], expected["robot0_eef_pos"][10:17])
    difference = arrays["obs/camera0_image"].astype(int) - expected["camera0_rgb"][10:17]
    assert np.abs(difference).max() <= 4
    assert "step/robot0_demo_end_pose" in arrays
    assert "obs/robot0_demo_end_pose" not in arrays


def test_unknown_rate_is_asked_for(tmp_path: Path) -> None:
    arrays = {name: values for name, values in pusht().items() if name != "n_contacts"}
    store = write_store(tmp_path / "own.zarr", arrays)
    with pytest.raises(DatasetError, match="does not store the control rate"):
        ReplayBufferReader(store)
    dataset, _ = run_import(store, tmp_path / "out", control_hz=15.0, task="own")
    assert (dataset.embodiment.control_hz, list(dataset.tasks)) == (15, ["own"])


@pytest.mark.parametrize("size", [40, 300, 70_000])
def test_declared_sizes_are_those_of_the_libraries(size: int) -> None:
    content = np.random.default_rng(0).integers(0, 4, size, dtype=np.uint8).tobytes()
    for codec in (BLOSC, numcodecs.LZ4(), numcodecs.Zstd()):
        assert declared_size(bytes(codec.encode(content)), codec.codec_id) == size


def describe(store: Path, name: str = "data/img", **changes: object) -> None:
    file = store / name / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def unpickling(store: Path) -> None:
    describe(store, filters=[{"id": "pickle"}])


def unpickling_compressor(store: Path) -> None:
    describe(store, compressor={"id": "pickle"})


def object_array(store: Path) -> None:
    describe(store, dtype="|O")


def endless(store: Path) -> None:
    describe(store, shape=[10**12, 24, 24, 3])


def giant_chunk(store: Path) -> None:
    describe(store, chunks=[10**6, 24, 24, 3])


def giant_rows(store: Path) -> None:
    describe(store, shape=[30, 10**6, 10**6, 3], chunks=[1, 100, 100, 3])


def inflating(store: Path) -> None:
    describe(store, compressor={"id": "zlib", "level": 9})
    (store / "data/img/0.0.0.0").write_bytes(numcodecs.Zlib(9).encode(bytes(50_000_000)))


def inflating_blosc(store: Path) -> None:
    (store / "data/img/1.0.0.0").write_bytes(BLOSC.encode(bytes(50_000_000)))


def cut_chunk(store: Path) -> None:
    file = store / "data/img/1.0.0.0"
    file.write_bytes(file.read_bytes()[:-40])


def linked_chunk(store: Path) -> None:
    file = store / "data/img/1.0.0.0"
    file.unlink()
    file.symlink_to("/etc/passwd")


def backward_ends(store: Path) -> None:
    array = zarr.open_array(store / "meta/episode_ends", mode="r+")
    array[:] = [10, 5, 30]


def late_end(store: Path) -> None:
    array = zarr.open_array(store / "meta/episode_ends", mode="r+")
    array[2] = 31


def no_action(store: Path) -> None:
    shutil.rmtree(store / "data/action")


def third_version(store: Path) -> None:
    (store / "zarr.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (unpickling, r"compressor 'blosc' with filters \[\{'id': 'pickle'\}\] is not read"),
        (unpickling_compressor, "compressor 'pickle'"),
        (object_array, "type object"),
        (endless, "at most 20000000 rows"),
        (giant_chunk, "would take .* GB of memory"),
        (giant_rows, "would take .* GB of memory"),
        (inflating, "holds 48385 bytes or more, expected 48384"),
        (inflating_blosc, "its header says 50000000 bytes"),
        (cut_chunk, "data/img/1.0.0.0' cannot be decompressed"),
        (linked_chunk, "1.0.0.0: is a symbolic link"),
        (backward_ends, "must increase from episode to episode"),
        (late_end, "has 30 rows, 'meta/episode_ends' needs 31"),
        (no_action, "has no 'data/action'"),
        (third_version, "is a zarr version 3 store"),
    ],
)
def test_damaged_and_hostile_stores_are_refused_by_name(tmp_path: Path, damage, message: str) -> None:
    store = write_store(tmp_path / "pusht.zarr", pusht())
    damage(store)
    with pytest.raises(DatasetError, match=message):
        read_all(ReplayBufferReader, store)


def test_image_of_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    store = umi_store(tmp_path / "umi.zarr")
    import imagecodecs

    larger = np.zeros((512, 512, 3), dtype=np.uint8)
    (store / "data/camera0_rgb/12.0.0.0").write_bytes(imagecodecs.jpegxl_encode(larger))
    with ReplayBufferReader(store) as reader, pytest.raises(DatasetError, match=r"not an image of shape \(32, 32, 3\)"):
        reader.read("000001")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "data\\..\\x"])
def test_archives_with_paths_that_leave_them_are_refused(tmp_path: Path, name: str) -> None:
    archive = zipped(write_store(tmp_path / "pusht.zarr", pusht()), tmp_path / "pusht.zip")
    with zipfile.ZipFile(archive, "a") as handle:
        handle.writestr(zipfile.ZipInfo(name), b"x")
    with pytest.raises(DatasetError, match="is refused; expected a path inside the store"):
        ReplayBufferReader(archive)


def test_archive_that_inflates_is_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "pusht.zarr", pusht(), compressors=dict.fromkeys(pusht()))
    (store / "data/img/1.0.0.0").write_bytes(bytes(50_000_000))
    archive = tmp_path / "pusht.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as handle:
        for file in store.rglob("*"):
            if file.is_file():
                handle.write(file, str(file.relative_to(store)))
    assert archive.stat().st_size < 500_000
    with ReplayBufferReader(archive) as reader, pytest.raises(DatasetError, match=r"'data/img/1\.0\.0\.0' would take"):
        reader.read("000000")


def test_training_on_an_import_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, data, run = write_store(tmp_path / "pusht.zarr", pusht()), tmp_path / "data", tmp_path / "run"
    cli.run(["data", "import", str(store), "--output", str(data)])
    assert "3 episodes (3 successes), 30 steps, 0 skipped" in capsys.readouterr().out
    keys = ["--bc.image-keys", "--bc.state-keys", "state"]
    small = ["--bc.hidden", "16", "--bc.layers", "1", "--trainer.batch-size", "4", "--steps", "2", "--device", "cpu"]
    cli.run(["train", "--data", str(data), "--output", str(run), "--policy", "bc", *keys, *small])
    assert json.loads((run / "results.json").read_text())["train"]["steps"] == 2


def test_random_damage_ends_in_an_error_that_names_the_file(tmp_path: Path) -> None:
    noticed = survive_damage(
        ReplayBufferReader, write_store(tmp_path / "pusht.zarr", pusht()), tmp_path / "damaged", rounds=40
    )
    assert noticed > 6
