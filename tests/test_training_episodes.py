"""What is learnt from and what is held out, for every mask: on files, and through the filter and training commands."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from plane_demonstrations import plane_dataset

from simtoreal import cli
from simtoreal.data_collection.compatibility import Scores
from simtoreal.data_collection.dataset import META, Dataset, read_meta
from simtoreal.data_collection.filters import Filter, FilteredEpisode, write_filter
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.files import write_json
from simtoreal.policies.config import BCConfig
from simtoreal.policies.training_data import open_training_data
from simtoreal.policies.training_episodes import choose_episodes
from simtoreal.policies.weighting import Weighting

STATE_BC = BCConfig(image_keys=(), state_keys=("proprio",), horizon=4, execute_steps=2)
FAILED = {3, 7}
VALID = {11}  # The tenth success.
MOVED = {1, 7, 11}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Thirteen episodes, two of them failures and three in a moving scene; filter ``generous`` accepts all of them."""
    folder = tmp_path_factory.mktemp("episodes")
    plain = plane_dataset(folder / "plain", ["up_right"] * 13)
    with DatasetWriter(folder / "mixed", plain.embodiment, plain.tasks) as writer:
        for number, info in enumerate(plain.episodes):
            extra = {"motion": {}} if number in MOVED else {}
            success = number not in FAILED
            writer.add(plain.read(info), dataclasses.replace(info, success=success, extra=extra))
    made = Dataset.open(folder / "mixed")
    write_json(made.path / META, {**read_meta(made.path), "masks": {"mine": ["000003", "000004", "000011"]}})
    keep = {info.name: [True] * info.steps for info in made.episodes}
    write_filter(
        made.path,
        Filter(
            name="generous", settings={}, thresholds={},
            episodes={
                info.name: FilteredEpisode(
                    steps=info.steps, seed=info.seed, operator=info.operator, mode="static", base=False,
                    compatibility=1.0, bad_steps=0, kept_steps=info.steps, accepted=True,
                )
                for info in made.episodes
            },
            keep={name: np.array(flags) for name, flags in keep.items()},
            scores={name: Scores(*np.zeros((2, len(flags)), np.float32)) for name, flags in keep.items()},
        ),
    )  # fmt: skip
    return Dataset.open(made.path)


def numbers(episodes: list) -> set[int]:
    return {int(episode.name) for episode in episodes}


GOOD = set(range(13)) - FAILED - VALID


@pytest.mark.parametrize(
    ("mask", "weighted", "expected"),
    [
        ("train", False, GOOD),
        ("success", False, GOOD),
        ("generous", False, GOOD),
        ("static", False, GOOD - MOVED),
        ("move", False, MOVED - FAILED - VALID),
        ("move", True, MOVED - VALID),
        ("all", False, set(range(13)) - VALID),
        ("failure", False, FAILED),
        ("mine", False, {3, 4}),
    ],
)
def test_held_out_episodes_and_unwanted_failures_are_never_learnt_from(dataset, mask, weighted, expected):
    choice = choose_episodes(dataset, mask, weighted=weighted)
    assert numbers(choice.train) == expected
    assert numbers(choice.valid) == (VALID - MOVED if mask == "static" else VALID)
    masked = numbers(dataset.filter(mask))
    assert len(choice.notes) == bool(masked & VALID) + bool((masked & FAILED) - expected)


def test_a_filter_accepts_no_failure(dataset):
    assert numbers(dataset.filter("generous")) == set(range(13)) - FAILED


def test_all_of_a_mask_can_be_asked_for(dataset):
    choice = choose_episodes(dataset, "all", hold_out=False)
    assert numbers(choice.train) == set(range(13))
    assert choice.valid == []
    assert numbers(choose_episodes(dataset, "failure", hold_out=False).valid) == VALID


def test_a_mask_of_nothing_but_held_out_episodes_is_refused(dataset):
    with pytest.raises(DatasetError, match=r"mask 'valid' leaves nothing to learn from: 1 episodes .* held out"):
        choose_episodes(dataset, "valid")


@pytest.mark.parametrize("mask", ["train", "success"])
def test_data_without_any_success_say_so(tmp_path: Path, mask: str):
    good = plane_dataset(tmp_path / "good", ["up_right"] * 2)
    with DatasetWriter(tmp_path / "failed", good.embodiment, good.tasks) as writer:
        for info in good.episodes:
            writer.add(good.read(info), dataclasses.replace(info, success=False))
    failed = Dataset.open(tmp_path / "failed")
    with pytest.raises(DatasetError, match=r"none of its 2 episodes succeeded.*--mask all"):
        choose_episodes(failed, mask)
    assert numbers(choose_episodes(failed, "all").train) == {0, 1}


def test_a_dataset_without_held_out_episodes_trains_all_the_same(tmp_path: Path):
    single = plane_dataset(tmp_path / "single", ["up_right"])
    data = open_training_data(single.path, STATE_BC, mask="all")
    assert data.valid is None
    assert len(data.train) == single.episodes[0].steps


def test_windows_follow_the_choice(dataset):
    lengths = {int(episode.name): episode.steps for episode in dataset.episodes}
    data = open_training_data(dataset.path, STATE_BC, mask="all", scene_frame=False)
    assert len(data.train) == sum(lengths[number] for number in set(range(13)) - VALID)
    assert data.valid is not None
    assert len(data.valid) == lengths[11]
    weighting = Weighting(method="return")
    weighted = open_training_data(dataset.path, STATE_BC, mask="move", weighting=weighting, scene_frame=False)
    assert len(weighted.train) == lengths[1] + lengths[7]


def test_moving_episodes_that_do_not_say_how_things_moved_are_refused(dataset):
    with pytest.raises(DatasetError, match=r"000001\.hdf5: .* does not say how it moved .*--no-scene-frame"):
        open_training_data(dataset.path, STATE_BC)
    assert len(open_training_data(dataset.path, STATE_BC, mask="static", hold_out=False).train) > 0


def test_train_says_what_it_leaves_out(dataset, tmp_path, capsys):
    cli.run(
        ["train", "--data", str(dataset.path), "--mask", "move", "--no-scene-frame",
         "--output", str(tmp_path / "run [old]"), "--policy", "bc", "--steps", "2", "--bc.image-keys", "--bc.hidden",
         "16", "--bc.layers", "1", "--trainer.batch-size", "8", "--device", "cpu"]
    )  # fmt: skip
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 failures of mask 'move' are left out" in printed
    assert "1 episodes of mask 'move' are held out" in printed
    assert f"-> {tmp_path / 'run [old]'}" in printed


def test_train_learns_from_held_out_episodes_only_if_told_to(dataset, tmp_path, capsys):
    small = ["--policy", "bc", "--steps", "2", "--bc.image-keys", "--bc.hidden", "16", "--bc.layers", "1"]
    common = ["train", "--data", str(dataset.path), *small, "--no-scene-frame", "--trainer.batch-size", "8"]
    lengths = {int(episode.name): episode.steps for episode in dataset.episodes}
    for flags, learnt in (([], GOOD), (["--no-hold-out"], GOOD | VALID)):
        cli.run([*common, "--mask", "success", *flags, "--output", str(tmp_path / f"run{len(learnt)}")])
        windows = sum(lengths[number] for number in learnt)
        assert f"training bc on {windows} windows" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ConfigError, match=r"--no-hold-out changes nothing with --mask train.*Add --mask success"):
        cli.run([*common, "--no-hold-out", "--output", str(tmp_path / "refused")])
    assert not (tmp_path / "refused").exists()


def test_every_dataset_has_a_mask_of_still_scenes(dataset, tmp_path):
    still = plane_dataset(tmp_path / "still", ["up_right"] * 3)
    assert numbers(still.filter("static")) == {0, 1, 2}
    assert "move" not in still.masks
    assert numbers(choose_episodes(still, "static").train) == {0, 1}
    assert numbers(dataset.filter("static")) | numbers(dataset.filter("move")) == set(range(13))
