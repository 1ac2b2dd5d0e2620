"""Checkpoints: self-contained, refused when they do not fit, and never lost to a crash or a full disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_reaching as toy

from simtoreal.envs.errors import CheckpointError, EmbodimentMismatchError
from simtoreal.policies.checkpoint import (
    checkpoints_to_continue,
    clear_leftovers,
    load_policy,
    save_checkpoint,
    save_policy,
)
from simtoreal.policies.diffusion import DiffusionPolicy
from simtoreal.policies.training_data import to_tensors


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    config = toy.small_diffusion()
    data = toy.data(config, episodes=4)
    torch.manual_seed(0)
    return DiffusionPolicy(config, data.embodiment, data.statistics).eval()


@pytest.fixture
def folder(tmp_path, policy) -> Path:
    path = tmp_path / "checkpoint"
    path.mkdir()
    save_policy(path, policy, training={"step": 1, "task": {"name": "toy"}})
    return path


def save_step(run: Path, step: int, policy: DiffusionPolicy) -> Path:
    return save_checkpoint(
        run, step, policy, weights=policy.state_dict(), state={"x": torch.zeros(3)}, training={"step": step}
    )


def edit(path: Path, change) -> None:
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def test_a_checkpoint_loads_knowing_only_its_path(folder, policy):
    loaded = load_policy(folder)
    assert loaded.config == policy.config
    assert loaded.embodiment == policy.embodiment
    assert loaded.task == {"name": "toy"}
    assert not loaded.policy.training
    observation = to_tensors(toy.data(policy.config, episodes=4).train.batch(np.arange(3)), torch.device("cpu"))[
        "observation"
    ]
    chunks = [one.predict(observation, [""] * 3, torch.Generator().manual_seed(1)) for one in (policy, loaded.policy)]
    assert torch.equal(*chunks)


def test_a_checkpoint_holds_no_pickle(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["config.yaml", "embodiment.json", "model.safetensors", "stats.safetensors", "training.json"]


def test_another_embodiment_is_refused_field_by_field(folder):
    other = dataclasses.replace(toy.embodiment(32), control_hz=30.0)
    with pytest.raises(EmbodimentMismatchError) as caught:
        load_policy(folder).embodiment.require_equal(other, "checkpoint", "environment")
    text = str(caught.value)
    for line in ("control_hz: 20.0 != 30.0", "cameras.front.height: 24 != 32", "cameras.front.width: 24 != 32"):
        assert line in text
    assert "3 fields differ" in text


def drop(tensors):
    del tensors["encoder.fuse.0.weight"]


def add(tensors):
    tensors["intruder"] = torch.zeros(2)


def reshape(tensors):
    tensors["encoder.fuse.0.bias"] = torch.zeros(5)


def poison(tensors):
    tensors["encoder.fuse.0.bias"][3] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "missing: encoder.fuse.0.weight"),
        (add, r"foreign: intruder \(2,\)"),
        (reshape, r"shape: encoder.fuse.0.bias is \(5,\), expected \(32,\)"),
        (poison, "encoder.fuse.0.bias is not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, change, message):
    edit(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_policy(folder)


def test_statistics_that_do_not_fit_are_refused(folder):
    edit(folder / "stats.safetensors", lambda tensors: tensors.pop("proprio.high"))
    with pytest.raises(CheckpointError, match=r"proprio.high"):
        load_policy(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "stats.safetensors", "training.json", "embodiment.json"])
def test_truncated_files_are_refused_by_name(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=name):
        load_policy(folder)


@pytest.mark.parametrize("name", ["stats.safetensors", "training.json", "embodiment.json", "config.yaml"])
def test_missing_files_are_refused_by_name(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_policy(folder)


def test_a_foreign_header_is_refused(folder):
    (folder / "model.safetensors").write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_policy(folder)


def test_unknown_settings_and_types_are_refused_with_the_closest_name(folder):
    config = folder / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("horizon:", "horizn:"))
    with pytest.raises(CheckpointError, match=r"'horizn'. Did you mean 'horizon'"):
        load_policy(folder)
    config.write_text(text.replace("type: diffusion", "type: diffusoin"))
    with pytest.raises(CheckpointError, match="Did you mean 'diffusion'"):
        load_policy(folder)


def test_a_path_without_checkpoint_says_what_is_expected(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        load_policy(tmp_path)


def test_a_run_keeps_the_newest_two_and_links_the_last(tmp_path, policy):
    for step in (10, 20, 30):
        save_step(tmp_path, step, policy)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["000020", "000030", "last"]
    assert load_policy(tmp_path).training["step"] == 30
    (tmp_path / "checkpoints" / "last").unlink()
    assert load_policy(tmp_path).training["step"] == 30


def test_a_run_killed_before_it_could_link_its_last_checkpoint_has_the_newest(tmp_path, policy):
    for step in (10, 20):
        save_step(tmp_path, step, policy)
    last = tmp_path / "checkpoints" / "last"
    assert load_policy(tmp_path).folder == last
    last.unlink()
    last.symlink_to("000010")
    assert load_policy(tmp_path).training["step"] == 20
    clear_leftovers(tmp_path)
    assert last.resolve().name == "000020"


def test_saved_copies_are_left_alone(tmp_path, policy):
    save_step(tmp_path, 10, policy)
    copy = tmp_path / "checkpoints" / "000010_best"
    shutil.copytree(tmp_path / "checkpoints" / "000010", copy)
    for step in (20, 30, 40):
        save_step(tmp_path, step, policy)
    assert [path.name for path in checkpoints_to_continue(tmp_path, resume=True)] == ["000030", "000040"]
    assert load_policy(tmp_path).training["step"] == 40
    assert load_policy(copy).training["step"] == 10


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, policy):
    """The file size limit makes the operating system refuse the write halfway, as a full disk does."""
    save_step(tmp_path, 10, policy)
    size = (tmp_path / "checkpoints" / "000010" / "model.safetensors").stat().st_size
    program = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import test_checkpoint, toy_reaching as toy
        from simtoreal.envs.errors import CheckpointError
        from simtoreal.policies.checkpoint import load_policy
        run = Path({str(tmp_path)!r})
        policy = load_policy(run).policy
        resource.setrlimit(resource.RLIMIT_FSIZE, ({size // 2}, {size // 2}))
        try:
            test_checkpoint.save_step(run, 20, policy)
        except CheckpointError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "cannot write checkpoint" in done.stdout
    assert "last is intact. Free disk space, then continue with --resume" in done.stdout
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["000010", "last"]
    assert load_policy(tmp_path).training["step"] == 10


def test_training_record_is_plain_json(folder):
    assert json.loads((folder / "training.json").read_text())["step"] == 1
