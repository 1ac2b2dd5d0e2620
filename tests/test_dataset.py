"""Episode files and dataset folders: round trips, robomimic's own reader, damage, hostile content, editing."""

from __future__ import annotations

import errno
import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from simtoreal.data_collection import derive
from simtoreal.data_collection.check import check
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.derive import link_or_copy
from simtoreal.data_collection.edit import merge, recover, split
from simtoreal.data_collection.episode import EpisodeInfo, embodiment_digest, read_episode, write_episode
from simtoreal.data_collection.preview import contact_sheet
from simtoreal.data_collection.robomimic_export import export_robomimic
from simtoreal.data_collection.summary import summarize
from simtoreal.data_collection.takes import StreamTake, read_part
from simtoreal.data_collection.windows import CACHE, WindowSampler
from simtoreal.data_collection.writer import DatasetWriter, lock_folder, new_dataset, rebuild
from simtoreal.envs.errors import ConfigError, DatasetError, EmbodimentMismatchError
from simtoreal.envs.panda import panda_embodiment

EMBODIMENT = panda_embodiment(16)
TASKS = {"toy": {"name": "toy", "horizon": 20}}
KEYS = ("front_image", "wrist_image", "proprio")


def make_arrays(seed: int, steps: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    image = (steps, 16, 16, 3)
    return {
        "actions": rng.uniform(-1, 1, (steps, 7)).astype(np.float32),
        "rewards": np.zeros(steps, dtype=np.float32),
        "dones": np.zeros(steps, dtype=np.int8),
        "states": rng.normal(size=(steps, 5)),
        "obs/front_image": rng.integers(0, 256, image, dtype=np.uint8),
        "obs/wrist_image": rng.integers(0, 256, image, dtype=np.uint8),
        "obs/proprio": rng.normal(size=(steps, 20)).astype(np.float32),
        "step/target": rng.normal(size=(steps, 10)),
        "step/timestamp_ns": np.arange(steps) * 50_000_000,
        "step/instruction": np.zeros(steps, dtype=np.int32),
    }


def make_info(seed: int = 0, **changes: object) -> EpisodeInfo:
    content = {
        "task": "toy",
        "seed": seed,
        "success": True,
        "operator": "expert",
        "source": "expert",
        "embodiment": embodiment_digest(EMBODIMENT),
        "instruction": "do it",
        "milestones": {"grasped": True},
        "columns": {"contacts": ("finger",)},
        "extra": {"score": 0.5},
    }
    return EpisodeInfo(**{**content, **changes})


def make_dataset(path: Path, episodes: int = 12, first_seed: int = 0) -> Dataset:
    with DatasetWriter(path, EMBODIMENT, TASKS) as writer:
        for seed in range(first_seed, first_seed + episodes):
            writer.add(make_arrays(seed, steps=8 + seed % 5), make_info(seed))
    return Dataset.open(path)


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob("*") if file.suffix in (".tmp", ".part")]


def test_episode_round_trip_is_exact(tmp_path: Path) -> None:
    arrays, info = make_arrays(3), make_info(3)
    write_episode(tmp_path / "000000.hdf5", arrays, info)
    read, content = read_episode(tmp_path / "000000.hdf5")
    assert content.keys() == arrays.keys()
    for name, array in arrays.items():
        assert content[name].dtype == array.dtype
        np.testing.assert_array_equal(content[name], array)
    assert (read.steps, read.name) == (10, "000000")
    assert (read.columns, read.extra, read.milestones) == (info.columns, info.extra, info.milestones)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("rewards"), "rewards"),
        (lambda a: a.update(rewards=a["rewards"][:-1]), "9 rows"),
        (lambda a: a["obs/proprio"].__setitem__((4, 2), np.nan), "not finite at step 4"),
        (lambda a: a.update({name: value[:0] for name, value in a.items()}), "no steps"),
    ],
)
def test_inconsistent_episode_is_not_written(tmp_path: Path, change, message: str) -> None:
    arrays = make_arrays(0)
    change(arrays)
    with pytest.raises(DatasetError, match=message):
        write_episode(tmp_path / "000000.hdf5", arrays, make_info())
    assert list(tmp_path.iterdir()) == []


def test_dataset_masks_statistics_and_description(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=25)
    assert dataset.embodiment == EMBODIMENT
    assert dataset.task == TASKS["toy"]
    assert [episode.name for episode in dataset.filter("valid")] == ["000009", "000019"]
    assert len(dataset.filter("train")) == 23
    assert len(dataset.filter()) == 25
    with pytest.raises(DatasetError, match="Did you mean 'train'"):
        dataset.filter("trian")
    actions = np.concatenate([dataset.read(episode, ["actions"])["actions"] for episode in dataset.episodes])
    stored = dataset.meta["statistics"]["values"]["actions"]
    np.testing.assert_allclose(stored["percentile_2"], np.percentile(actions, 2, axis=0), rtol=1e-6)
    assert dataset.meta["statistics"]["steps"] == len(actions)


def test_failures_are_stored_but_not_trained_on(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS) as writer:
        for seed in range(4):
            writer.add(make_arrays(seed), make_info(seed, success=seed != 1, failure="timeout" if seed == 1 else ""))
    dataset = Dataset.open(tmp_path)
    assert [episode.seed for episode in dataset.filter("failure")] == [1]
    assert 1 not in {episode.seed for mask in ("train", "valid", "success") for episode in dataset.filter(mask)}
    assert summarize(tmp_path)["failures"] == {"timeout": 1}


def test_second_writer_is_refused_and_appending_continues_the_numbers(tmp_path: Path) -> None:
    make_dataset(tmp_path, episodes=2)
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS) as writer:
        with pytest.raises(DatasetError, match="another process"):
            DatasetWriter(tmp_path, EMBODIMENT, TASKS)
        assert writer.add(make_arrays(9), make_info(9)).name == "000002.hdf5"
    assert len(Dataset.open(tmp_path).episodes) == 3
    with pytest.raises(DatasetError, match="another specification of task 'toy'"):
        DatasetWriter(tmp_path, EMBODIMENT, {"toy": {"name": "toy", "horizon": 99}})
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS):
        pass  # the refused writers left no lock behind


def test_robomimic_reads_the_view(tmp_path: Path) -> None:
    pytest.importorskip("robomimic")
    from simtoreal.policies.robomimic import import_robomimic

    import_robomimic()
    import robomimic.utils.file_utils as file_utils
    import robomimic.utils.obs_utils as obs_utils
    from robomimic.utils.dataset import SequenceDataset

    dataset = make_dataset(tmp_path / "d", episodes=11)
    view = str(tmp_path / "d" / "dataset.hdf5")
    obs_utils.initialize_obs_modality_mapping_from_dict({"rgb": ["front_image", "wrist_image"], "low_dim": ["proprio"]})
    assert file_utils.get_env_metadata_from_dataset(view)["env_name"] == "toy"
    assert len(file_utils.get_demos_for_filter_key(view, "train")) == 10
    for mask in ("train", "valid"):
        sequences = SequenceDataset(
            hdf5_path=view, obs_keys=KEYS, dataset_keys=("actions", "rewards", "dones"), frame_stack=2, seq_length=4,
            hdf5_cache_mode=None, hdf5_use_swmr=False, filter_by_attribute=mask, load_next_obs=False, get_pad_mask=True,
        )  # fmt: skip
        sampler = WindowSampler(dataset, dataset.filter(mask), 2, 4, KEYS)
        assert len(sequences) == len(sampler)
        batch = sampler.batch(np.arange(len(sampler)))
        for index in (0, 1, len(sampler) // 2, len(sampler) - 1):
            theirs = sequences[index]
            # robomimic repeats the history's action too: its first row belongs to the older frame.
            np.testing.assert_array_equal(theirs["actions"][1:], batch["actions"][index])
            np.testing.assert_array_equal(theirs["pad_mask"][1:, 0], batch["action_mask"][index])
            for key in KEYS:
                np.testing.assert_array_equal(theirs["obs"][key][:2], batch["observation"][key][index])


def test_windows_match_a_naive_loop(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, episodes=3)
    steps, horizon = 3, 6
    sampler = WindowSampler(dataset, dataset.episodes, steps, horizon, KEYS)
    mapped = WindowSampler(dataset, dataset.episodes, steps, horizon, KEYS, memory_map=True)
    again = WindowSampler(dataset, dataset.episodes, steps, horizon, KEYS, memory_map=True)
    indices = np.random.default_rng(0).permutation(len(sampler))
    batch, other = sampler.batch(indices), again.batch(indices)
    assert batch["observation"]["front_image"].dtype == np.uint8
    assert isinstance(mapped.observations["front_image"], np.memmap)
    windows = [(episode, t) for episode in dataset.episodes for t in range(episode.steps)]
    content = {episode.name: dataset.read(episode) for episode in dataset.episodes}
    for row, index in enumerate(indices):
        episode, t = windows[index]
        arrays = content[episode.name]
        for key in KEYS:
            expected = [arrays[f"obs/{key}"][max(0, t + k)] for k in range(1 - steps, 1)]
            np.testing.assert_array_equal(batch["observation"][key][row], expected)
            np.testing.assert_array_equal(other["observation"][key][row], expected)
        expected = [arrays["actions"][min(episode.steps - 1, t + k)] for k in range(horizon)]
        np.testing.assert_array_equal(batch["actions"][row], expected)
        np.testing.assert_array_equal(batch["action_mask"][row], [t + k < episode.steps for k in range(horizon)])
        assert batch["instruction"][row] == "do it"
    absolute = WindowSampler(dataset, dataset.episodes, 1, 2, ("proprio",), actions="step/target")
    assert absolute.batch(np.array([0]))["actions"].shape == (1, 2, 10)
    with pytest.raises(IndexError):
        sampler.batch(np.array([len(sampler)]))
    with pytest.raises(DatasetError, match="has no 'obs/depth'"):
        WindowSampler(dataset, dataset.episodes, 1, 1, ("depth",))


def test_joined_files_that_nobody_opened_for_a_week_are_removed(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, episodes=3)

    def opened(episodes: int, days_ago: float = 0.0) -> set[Path]:
        before = {path: path.stat().st_mtime for path in (tmp_path / CACHE).glob("*")}
        sampler = WindowSampler(dataset, dataset.episodes[:episodes], keys=("proprio",), memory_map=True)
        assert len(sampler.batch(np.array([0]))["observation"]) == 1
        mine = {path for path in (tmp_path / CACHE).glob("*") if path.stat().st_mtime != before.get(path)}
        for path in mine:
            os.utime(path, (time.time() - days_ago * 86400,) * 2)
        return mine

    old, recent = opened(1, days_ago=8), opened(2, days_ago=6)
    assert len(old) == len(recent) == 2
    assert not any(path.exists() for path in old)
    # Opening counts as use.
    assert opened(2, days_ago=0.1) == recent
    current = opened(3)
    assert set((tmp_path / CACHE).iterdir()) == recent | current


def test_windows_follow_a_changing_instruction(tmp_path: Path) -> None:
    arrays = make_arrays(0)
    arrays["step/instruction"][6:] = 1
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS) as writer:
        writer.add(make_arrays(1), make_info(1))
        writer.add(arrays, make_info(0, instruction="other", instructions=("do it", "other")))
    dataset = Dataset.open(tmp_path)
    sampler = WindowSampler(dataset, dataset.episodes, 1, 1, ("proprio",))
    assert sampler.batch(np.array([0, 15, 16]))["instruction"] == ["do it", "do it", "other"]


def test_missing_and_truncated_episodes_are_named_and_recovered(tmp_path: Path) -> None:
    make_dataset(tmp_path, episodes=5)
    (tmp_path / "episodes/000002.hdf5").unlink()
    with pytest.raises(DatasetError, match=r"000002.hdf5: is missing .*recover"):
        Dataset.open(tmp_path)
    recovery = recover(tmp_path)
    assert recovery.missing == ("000002",)
    victim = tmp_path / "episodes/000003.hdf5"
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) // 2])
    with pytest.raises(DatasetError, match=r"000003.hdf5: cannot be opened as HDF5, it is truncated"):
        Dataset.open(tmp_path)
    recovery = recover(tmp_path)
    assert [file.name for file, _ in recovery.set_aside] == ["000003.hdf5"]
    assert (tmp_path / "damaged/000003.hdf5").stat().st_size == len(content) // 2
    assert [episode.name for episode in Dataset.open(tmp_path).episodes] == ["000000", "000001", "000004"]
    with h5py.File(tmp_path / "dataset.hdf5") as view:
        assert sorted(view["data"]) == ["demo_0", "demo_1", "demo_4"]
        assert view["data/demo_4/actions"].shape[1] == 7


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a dataset"), ("{", "not valid JSON"), ("{}", "format"), ('"x"', "format")],
)
def test_bad_description(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "meta.json").write_text(content)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(tmp_path)


def test_other_format_version(tmp_path: Path) -> None:
    make_dataset(tmp_path, episodes=1)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "format_version": 9}))
    with pytest.raises(DatasetError, match="format version 9"):
        Dataset.open(tmp_path)


def test_other_embodiment(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "a", episodes=2)
    other = panda_embodiment(32)
    with pytest.raises(EmbodimentMismatchError, match="height"):
        Dataset.open(tmp_path / "a", embodiment=other)
    with pytest.raises(EmbodimentMismatchError, match="height"):
        DatasetWriter(tmp_path / "a", other, TASKS)
    arrays = make_arrays(0)
    path = tmp_path / "a/episodes/000002.hdf5"
    write_episode(path, arrays, make_info(embodiment=embodiment_digest(other)))
    with pytest.raises(EmbodimentMismatchError, match=r"000002.hdf5: was recorded with another embodiment"):
        Dataset.open(tmp_path / "a")
    arrays["obs/front_image"] = np.zeros((10, 8, 8, 3), dtype=np.uint8)
    write_episode(path, arrays, make_info())
    with pytest.raises(EmbodimentMismatchError, match="front_image' has shape"):
        Dataset.open(tmp_path / "a")
    path.unlink()
    with DatasetWriter(tmp_path / "b", other, TASKS):
        pass
    with pytest.raises(EmbodimentMismatchError, match="height"):
        merge([dataset.path, tmp_path / "b"], tmp_path / "c")


def _external_link(file: h5py.File, secret: Path) -> None:
    del file["rewards"]
    file["rewards"] = h5py.ExternalLink(str(secret), "/data")


def _soft_link(file: h5py.File, secret: Path) -> None:
    file["obs/again"] = h5py.SoftLink("/actions")


def _external_storage(file: h5py.File, secret: Path) -> None:
    del file["rewards"]
    file.create_dataset("rewards", (10,), np.float32, external=[(str(secret), 0, 40)])


def _virtual(file: h5py.File, secret: Path) -> None:
    layout = h5py.VirtualLayout((10,), np.float32)
    layout[:] = h5py.VirtualSource(str(secret), "data", (10,))
    del file["rewards"]
    file.create_virtual_dataset("rewards", layout)


def _unwritten(file: h5py.File, secret: Path) -> None:
    file.create_dataset("step/huge", (10, 10_000_000_000), np.uint8, chunks=(1, 1000))


def _loop(file: h5py.File, secret: Path) -> None:
    file["obs/loop"] = file["obs"]


def _objects(file: h5py.File, secret: Path) -> None:
    file.create_dataset("step/note", data=["text"] * 10)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (_external_link, "'/rewards' is an external link"),
        (_soft_link, "'/obs/again' is a soft link"),
        (_external_storage, "'/rewards' keeps its data in an external file"),
        (_virtual, "'/rewards' is a virtual dataset"),
        (_unwritten, "'/step/huge' declares"),
        (_loop, "nested too deep"),
        (_objects, "'/step/note' has type object"),
    ],
)
def test_hostile_episode_is_refused(tmp_path: Path, poison, message: str) -> None:
    secret = tmp_path / "secret.hdf5"
    with h5py.File(secret, "w") as file:
        file["data"] = np.ones(10, dtype=np.float32)
    make_dataset(tmp_path / "d", episodes=1)
    path = tmp_path / "d/episodes/000001.hdf5"
    write_episode(path, make_arrays(0), make_info())
    with h5py.File(path, "r+") as file:
        poison(file, secret)
    with pytest.raises(DatasetError, match=message):
        Dataset.open(tmp_path / "d")
    with pytest.raises(DatasetError, match=message):
        read_episode(path)


def test_symbolic_link_is_refused(tmp_path: Path) -> None:
    make_dataset(tmp_path / "a", episodes=1)
    make_dataset(tmp_path / "b", episodes=1)
    (tmp_path / "a/episodes/000001.hdf5").symlink_to(tmp_path / "b/episodes/000000.hdf5")
    with pytest.raises(DatasetError, match="symbolic link"):
        Dataset.open(tmp_path / "a")


def test_merge_and_split_link_the_same_files(tmp_path: Path) -> None:
    first = make_dataset(tmp_path / "a", episodes=7)
    second = make_dataset(tmp_path / "b", episodes=4, first_seed=100)
    merged = merge([first.path, second.path], tmp_path / "c").dataset
    assert [episode.seed for episode in merged.episodes] == [*range(7), *range(100, 104)]
    assert (tmp_path / "a/episodes/000006.hdf5").samefile(tmp_path / "c/episodes/000006.hdf5")
    parts = split(merged.path, tmp_path / "parts", {"train": 0.75, "test": 0.25}, seed=1)
    seeds = {name: {episode.seed for episode in part.dataset.episodes} for name, part in parts.items()}
    assert (len(seeds["train"]), len(seeds["test"])) == (8, 3)
    assert seeds["train"] | seeds["test"] == {episode.seed for episode in merged.episodes}
    assert parts["test"].dataset.episodes == Dataset.open(tmp_path / "parts/test").episodes
    assert len(Dataset.open(first.path).episodes) == 7
    with pytest.raises(DatasetError, match="already exists and is not an empty folder"):
        merge([first.path], tmp_path / "c")
    with pytest.raises(ConfigError, match="at most 1"):
        split(merged.path, tmp_path / "more", {"a": 0.8, "b": 0.8})
    with pytest.raises(ConfigError, match="'b' would be empty"):
        split(merged.path, tmp_path / "more", {"a": 0.9, "b": 0.01})


def test_what_is_interrupted_leaves_nothing_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = make_dataset(tmp_path / "a", episodes=4)
    made = []

    def interrupted(source: Path, target: Path) -> None:
        made.append(target)
        if len(made) == 3:
            assert not (tmp_path / "out").exists()
            raise KeyboardInterrupt
        link_or_copy(source, target)

    monkeypatch.setattr(derive, "link_or_copy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge([a.path], tmp_path / "out")
    made.clear()
    with pytest.raises(KeyboardInterrupt):  # in the second part, when the first one is there
        split(a.path, tmp_path / "parts", {"first": 0.5, "second": 0.5})
    monkeypatch.undo()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "parts"]
    assert list((tmp_path / "parts").iterdir()) == []
    # What SIGKILL leaves has another name, and the next call clears it away.
    (tmp_path / "out.unfinished/episodes").mkdir(parents=True)
    (tmp_path / "out.unfinished/episodes/000000.hdf5").write_text("half")
    assert len(merge([a.path], tmp_path / "out").dataset.episodes) == 4
    assert not (tmp_path / "out.unfinished").exists()
    writing = DatasetWriter(tmp_path / "more.unfinished", EMBODIMENT, TASKS)
    with writing, pytest.raises(DatasetError, match="is being written by another process"):
        merge([a.path], tmp_path / "more")
    assert (tmp_path / "more.unfinished/meta.json").exists()


def test_a_copied_file_is_no_episode(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=3)
    copied = dataset.path / "episodes/000001 (copy).hdf5"
    copied.write_bytes(dataset.episodes[1].path.read_bytes())
    assert [one.name for one in Dataset.open(dataset.path).episodes] == ["000000", "000001", "000002"]
    assert [(one.where, one.what) for one in check(dataset.path).problems] == [
        ("episodes/000001 (copy).hdf5", "does not belong here")
    ]
    assert export_robomimic(Dataset.open(dataset.path), tmp_path / "all.hdf5") == dataset.meta["statistics"]["steps"]
    with DatasetWriter(dataset.path, EMBODIMENT, TASKS) as writer:
        assert writer.add(make_arrays(5), make_info(5)).name == "000003.hdf5"
    assert recover(dataset.path).set_aside == ()
    assert copied.exists()


def test_later_episodes_inherit_nothing_from_lost_ones(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=5)
    set_masks(dataset.path, good=["000000", "000003", "000004"], last=["000004"])
    dataset.episodes[3].path.unlink()
    dataset.episodes[4].path.write_bytes(b"damaged")
    recover(dataset.path)
    assert Dataset.open(dataset.path).meta["masks"] == {"good": ["000000"]}
    with DatasetWriter(dataset.path, EMBODIMENT, TASKS) as writer:
        assert writer.add(make_arrays(7), make_info(7)).name == "000005.hdf5"  # damaged/ holds 000004
    Dataset.open(dataset.path).episodes[-1].path.unlink()
    writer = DatasetWriter(dataset.path, EMBODIMENT, TASKS)
    assert writer.next_path().name == "000006.hdf5"  # meta.json lists 000005
    writer.release()


def set_masks(path: Path, **masks: list[str]) -> None:
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "masks": masks}))


def test_masks_name_episodes_as_their_files_do(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=3)
    set_masks(dataset.path, good=["000000", "2"])
    with pytest.raises(DatasetError, match="mask 'good' names episode '2'; write '000002'"):
        Dataset.open(dataset.path).filter("good")
    # Masks may still name what an earlier recovery set aside.
    set_masks(dataset.path, good=["000000", "000009"])
    assert Dataset.open(dataset.path).masks["good"] == ["000000"]
    found = [one.what for one in check(dataset.path).problems]
    assert "mask 'good' names 1 episodes that do not exist, e.g. 000009" in found


def test_the_same_command_started_twice_fills_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first look at what a killed one has left to the last rename, nobody else gets in."""
    folder, seen = tmp_path / "out.unfinished", []
    (folder / "episodes").mkdir(parents=True)
    remove, rename = shutil.rmtree, os.replace

    def others_are_refused(then: Callable[..., None], path: Path, *more: object, **options: object) -> None:
        if Path(path) in (folder, folder / "episodes"):
            with pytest.raises(DatasetError, match="is being written by another process"):
                lock_folder(folder)
            seen.append(then)
        then(path, *more, **options)

    monkeypatch.setattr(shutil, "rmtree", functools.partial(others_are_refused, remove))
    monkeypatch.setattr(os, "replace", functools.partial(others_are_refused, rename))
    with new_dataset(tmp_path / "out", EMBODIMENT, TASKS) as writer:
        writer.add(make_arrays(0), make_info(0))
    assert seen == [remove, rename]
    monkeypatch.undo()
    assert len(Dataset.open(tmp_path / "out").episodes) == 1
    DatasetWriter(tmp_path / "out", EMBODIMENT, TASKS).close()


def test_without_hard_links_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "source").write_bytes(b"content")
    link_or_copy(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == b"content"
    assert not (tmp_path / "target").is_symlink()


def test_rebuild_after_the_derived_files_are_lost(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, episodes=3)
    (tmp_path / "dataset.hdf5").unlink()
    assert rebuild(tmp_path).meta == dataset.meta
    assert (tmp_path / "dataset.hdf5").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_dataset import EMBODIMENT, TASKS, make_arrays, make_info
from simtoreal.data_collection.takes import StreamTake
from simtoreal.data_collection.writer import DatasetWriter
from pathlib import Path
writer = DatasetWriter(Path(sys.argv[1]), EMBODIMENT, TASKS)
writer.add(make_arrays(0), make_info(0))
take = StreamTake(writer.part_path(), writer.add, make_info(1, success=False, failure="aborted"))
arrays = make_arrays(1, steps=37)
for step in range(37):
    take.append({name: array[step] for name, array in arrays.items()})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_sigkill_loses_no_flushed_step(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)]
    assert subprocess.run(command, check=False).returncode == -9
    assert len(Dataset.open(tmp_path).episodes) == 1
    recovery = recover(tmp_path)
    assert [(info.steps, info.seed, info.failure) for info in recovery.recovered] == [(37, 1, "aborted")]
    assert leftovers(tmp_path) == []
    dataset = Dataset.open(tmp_path)
    expected = make_arrays(1, steps=37)
    for name, array in dataset.read(dataset.episodes[1]).items():
        np.testing.assert_array_equal(array, expected[name])
    assert [episode.seed for episode in dataset.filter("failure")] == [1]


def test_torn_and_damaged_steps_of_a_part(tmp_path: Path) -> None:
    part = tmp_path / "000000.part"
    take = StreamTake(part, lambda arrays, info: None, make_info(1))
    arrays = make_arrays(1)
    for step in range(10):
        take.append({name: array[step] for name, array in arrays.items()})
    take.finish()
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    info, read = read_part(part)
    assert info.steps == 9
    np.testing.assert_array_equal(read["obs/front_image"], arrays["obs/front_image"][:9])
    row_bytes = sum(array[0].nbytes for array in arrays.values()) + 4
    middle = len(content) - 5 * row_bytes - row_bytes // 2
    part.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(DatasetError, match="step 4 of 10 is damaged"):
        read_part(part)


def test_keeping_a_long_take_holds_it_in_memory_once(tmp_path: Path) -> None:
    info = make_info(1)
    file = tmp_path / "0.hdf5"
    take = StreamTake(tmp_path / "0.part", lambda arrays, info: write_episode(file, arrays, info), info)
    row = {name: array[0] for name, array in make_arrays(1).items()}
    row["obs/front_image"] = np.zeros((240, 320, 3), np.uint8)
    for _ in range(100):
        take.append(row)
    tracemalloc.start()
    try:
        take.keep(info)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1.2 * 100 * sum(array.nbytes for array in row.values())
    with h5py.File(file) as stored:
        assert stored["obs/front_image"].shape == (100, 240, 320, 3)


def test_parts_without_content_are_cleared(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS) as writer:
        writer.part_path().touch()
        junk = writer.part_path()
        junk.write_bytes(b"not\na journal")
    recovery = recover(tmp_path)
    assert [file.name for file in recovery.emptied] == ["000000.part"]
    assert [file.name for file, _ in recovery.set_aside] == [junk.name]


def test_recover_refuses_a_dataset_being_written(tmp_path: Path) -> None:
    make_dataset(tmp_path, episodes=1)
    with DatasetWriter(tmp_path, EMBODIMENT, TASKS) as writer:
        take = StreamTake(writer.part_path(), writer.add, make_info(5))
        arrays = make_arrays(5)
        take.append({name: array[0] for name, array in arrays.items()})
        with pytest.raises(DatasetError, match="another process"):
            recover(tmp_path)
        take.discard()
    assert leftovers(tmp_path) == []


FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from test_dataset import EMBODIMENT, TASKS, make_arrays, make_info
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import DatasetError
from pathlib import Path
with DatasetWriter(Path(sys.argv[1]), EMBODIMENT, TASKS) as writer:
    writer.add(make_arrays(0, steps=10), make_info(0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    try:
        writer.add(make_arrays(1, steps=100), make_info(1))
    except DatasetError as error:
        print(error)
    writer.add(make_arrays(2, steps=10), make_info(2))
"""


def test_full_disk_leaves_finished_episodes_only(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "the disk is full" in result.stdout
    assert "000001.hdf5" in result.stdout
    assert [(e.name, e.seed) for e in Dataset.open(tmp_path).episodes] == [("000000", 0), ("000001", 2)]
    assert leftovers(tmp_path) == []


def test_full_disk_while_streaming_keeps_the_steps_before(tmp_path: Path) -> None:
    code = FULL.replace("writer.add(make_arrays(1, steps=100), make_info(1))", STREAM)
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "the disk is full" in result.stdout
    recovery = recover(tmp_path)
    assert len(recovery.recovered) == 1
    assert 1 <= recovery.recovered[0].steps < 100


STREAM = """
        from simtoreal.data_collection.takes import StreamTake
        take = StreamTake(writer.part_path(), writer.add, make_info(1))
        arrays = make_arrays(1, steps=100)
        for step in range(100):
            take.append({name: array[step] for name, array in arrays.items()})
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_really_full_file_system(tmp_path: Path) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], check=False).returncode:
        pytest.skip("this machine does not allow mounting")
    try:
        written = []

        def fill() -> None:
            with DatasetWriter(mount, EMBODIMENT, TASKS) as writer:
                for seed in range(50):
                    written.append(writer.add(make_arrays(seed), make_info(seed)))

        with pytest.raises(DatasetError, match="disk is full"):
            fill()
        assert 1 <= len(written) < 50
        assert len(Dataset.open(mount).episodes) == len(written)
        assert leftovers(mount) == []
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_under_the_window_cache_is_an_error_and_no_sigbus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=2)
    places = []

    def full(descriptor: int, begin: int, size: int) -> None:
        places.append(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DatasetError, match=r"front_image\.npy: the disk is full"):
        WindowSampler(dataset, keys=("front_image",), memory_map=True)
    assert places[0] > sum(episode.steps for episode in dataset.episodes) * 16 * 16 * 3
    assert list((dataset.path / CACHE).iterdir()) == []


@pytest.mark.parametrize("place", [0, 100, 3_000, 20_000, 40_000])
def test_a_full_disk_during_an_export_does_not_blame_the_episodes(tmp_path: Path, place: int) -> None:
    dataset = make_dataset(tmp_path / "d", episodes=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (place, limits[1]))
    try:
        with pytest.raises(DatasetError, match=r"out\.hdf5: the disk is full") as caught:
            export_robomimic(dataset, tmp_path / "out.hdf5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "damaged" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["d"]
    # HDF5, which a failing write can leave so that the process crashes later, is still to be used.
    for _ in range(20):
        assert len(dataset.read(dataset.episodes[0])["actions"]) == dataset.episodes[0].steps
    assert export_robomimic(dataset, tmp_path / "out.hdf5") == sum(episode.steps for episode in dataset.episodes)


def test_contact_sheet_plays_every_episode(tmp_path: Path) -> None:
    from simtoreal.envs.video import read_video

    dataset = make_dataset(tmp_path, episodes=5)
    path = contact_sheet(dataset, dataset.episodes, "front", tmp_path / "sheet.mp4")
    assert len(read_video(path)) == max(episode.steps for episode in dataset.episodes)
    with pytest.raises(DatasetError, match="Did you mean 'front'"):
        contact_sheet(dataset, dataset.episodes, "fornt", tmp_path / "sheet.mp4")


def test_damaged_metadata_gives_one_kind_of_error(tmp_path: Path) -> None:
    path = tmp_path / "000000.hdf5"
    write_episode(path, make_arrays(0, steps=2), make_info())
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(content)
        for position in rng.integers(0, len(content), 3):
            damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            read_episode(path)
        except DatasetError:  # any other exception fails the test
            refused += 1
    assert refused > 50


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simtoreal import cli
    from simtoreal.commands import data_info, data_merge, data_recover, data_split, data_view

    for name, first_seed in (("a", 0), ("b", 50)):
        make_dataset(tmp_path / name, episodes=5, first_seed=first_seed)
    merged, parts = tmp_path / "c", tmp_path / "parts"
    data_merge.main(data_merge.Config(datasets=(tmp_path / "a", tmp_path / "b"), output=merged))
    assert json.loads((merged / "results.json").read_text())["merge"]["episodes"] == 10
    data_split.main(data_split.Config(dataset=merged, output=parts))
    assert json.loads((parts / "results.json").read_text())["split"]["parts"] == {"train": 8, "test": 2}
    cli.run(["data", "split", str(merged), "--output", str(tmp_path / "d"), "--parts", "small=0.1", "rest=0.9"])
    assert len(Dataset.open(tmp_path / "d/small").episodes) == 1
    assert len(Dataset.open(tmp_path / "d/rest").episodes) == 9
    for part in ("small", "small=many", "=0.5", "../up=0.5", "a=nan"):
        with pytest.raises(ConfigError, match="is not NAME=SHARE"):
            data_split.main(data_split.Config(dataset=merged, output=tmp_path / "e", parts=(part,)))
    with pytest.raises(ConfigError, match="'a' occurs twice"):
        data_split.main(data_split.Config(dataset=merged, output=tmp_path / "e", parts=("a=0.1", "a=0.2")))
    with pytest.raises(ConfigError, match="c is a dataset; choose another folder"):
        data_split.main(data_split.Config(dataset=merged, output=merged))
    assert "merge" in json.loads((merged / "results.json").read_text())
    with pytest.raises(DatasetError, match="is not an empty folder"):  # it holds the results of another command
        data_merge.main(data_merge.Config(datasets=(merged,), output=parts))
    assert "split" in json.loads((parts / "results.json").read_text())
    data_info.main(data_info.Config(dataset=merged))
    printed = capsys.readouterr().out
    assert "10 of 10" in printed
    assert "obs/front_image" in printed
    data_view.main(data_view.Config(dataset=merged, episodes=4, output=tmp_path / "sheet.mp4"))
    assert (tmp_path / "sheet.mp4").stat().st_size > 1000
    (merged / "episodes/000004.hdf5").unlink()
    data_recover.main(data_recover.Config(dataset=merged))
    assert "9 readable episodes" in " ".join(capsys.readouterr().out.split())
    assert len(Dataset.open(tmp_path / "a").episodes) == 5
