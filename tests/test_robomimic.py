"""robomimic's algorithms on our data: learning, checkpoints, rollouts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import point_world
import pytest
import torch

pytest.importorskip("robomimic")

from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.rollout import rollout
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import load_policy
from simtoreal.policies.config import TrainerConfig
from simtoreal.policies.normalization import ACTIONS, CLIP
from simtoreal.policies.robomimic import RobomimicBCConfig, RobomimicConfig, RobomimicPolicy
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import TrainingData, open_training_data, to_tensors

SIZE = 40


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "point"
    env = point_world.PointVectorEnv(8, SIZE)
    with DatasetWriter(path, env.embodiment, {"point": {"name": "point"}}) as writer:
        recorder = Recorder(
            memory_takes(writer), task="point", embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, point_world.PointExpert(), list(range(150)), listeners=[recorder])
    return path


def make_config(kind: str, **changes: object) -> RobomimicConfig:
    chunk = {"horizon": 4, "execute_steps": 1} if "rnn" in kind else {"horizon": 1, "execute_steps": 1}
    content = {"type": f"robomimic/{kind}", "image_keys": (), "hidden": 48, "layers": (64, 64), **chunk}
    return (RobomimicBCConfig if kind == "bc" else RobomimicConfig)(**{**content, **changes})


def make_policy(config: RobomimicConfig, data: TrainingData, seed: int = 0) -> RobomimicPolicy:
    torch.manual_seed(seed)
    return RobomimicPolicy(config, data.embodiment, data.statistics)


@pytest.mark.parametrize("kind", ["bc", "bc_rnn"])
def test_trained_policy_solves_the_task_after_reloading(dataset: Path, tmp_path: Path, kind: str) -> None:
    config = make_config(kind)
    data = open_training_data(dataset, config)
    trainer = TrainerConfig(steps=300, batch_size=64, warmup_steps=20, validate_every=300, checkpoint_every=300)
    train(config, trainer, data, tmp_path / "run", device="cpu")
    loaded = load_policy(tmp_path / "run")
    assert loaded.config == config
    assert isinstance(loaded.policy, RobomimicPolicy)
    env = point_world.PointVectorEnv(4, SIZE)
    seeds = [seed for seed in range(1000, 1025) if not point_world.fails(seed)]
    results = rollout(env, PolicyActor(loaded.policy), seeds)
    assert sum(result.success for result in results) >= 0.8 * len(seeds)
    again = rollout(point_world.PointVectorEnv(7, SIZE), PolicyActor(loaded.policy), seeds)
    assert [result.steps for result in again] == [result.steps for result in results]


@pytest.mark.parametrize("kind", ["bc", "bc_rnn"])
def test_images_are_learned_from(dataset: Path, kind: str) -> None:
    config = make_config(kind, image_keys=("front_image", "wrist_image"), state_keys=())
    data = open_training_data(dataset, config)
    policy = make_policy(config, data)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    batch = to_tensors(data.train.batch(np.arange(16)), torch.device("cpu"))
    initial = [parameter.detach().clone() for parameter in policy.parameters()]
    losses = []
    for _ in range(8):
        loss = policy.loss(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = [not torch.equal(a, b) for a, b in zip(initial, policy.parameters(), strict=True)]
    assert all(moved)
    policy.eval()
    with torch.inference_mode():
        chunk = policy.predict(batch["observation"], batch["instruction"], torch.Generator().manual_seed(0))
    assert chunk.shape == (16, config.horizon, 7)
    assert chunk.abs().max() <= 1


def test_encoding_once_equals_robomimics_own_forward(dataset: Path) -> None:
    config = make_config("bc_rnn", image_keys=("front_image",))
    data = open_training_data(dataset, config)
    policy = make_policy(config, data).eval()
    batch = to_tensors(data.train.batch(np.arange(6)), torch.device("cpu"))
    ours = policy.loss(batch)["loss"]
    network = policy.nets["policy"]
    network.nets["encoder"] = network.nets["encoder"].encoder
    policy._shared = None
    theirs = policy.loss(batch)["loss"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_padded_actions_do_not_count(dataset: Path) -> None:
    config = make_config("bc_rnn")
    data = open_training_data(dataset, config)
    policy = make_policy(config, data)
    batch = to_tensors(data.train.batch(np.arange(6)), torch.device("cpu"))
    padded = ~batch["action_mask"]
    assert padded.any()
    changed = {**batch, "actions": torch.where(padded[..., None], -batch["actions"], batch["actions"])}
    torch.testing.assert_close(policy.loss(changed)["loss"], policy.loss(batch)["loss"])


def test_targets_and_actions_reach_as_far_as_those_of_our_own_policies(dataset: Path, monkeypatch) -> None:
    config = make_config("bc_rnn")
    data = open_training_data(dataset, config)
    policy = make_policy(config, data)
    batch = to_tensors(data.train.batch(np.arange(6)), torch.device("cpu"))
    far = torch.full_like(batch["actions"], 1.4)
    prepare, targets = policy._prepare, []

    def watch(observation, actions):
        targets.append(actions)
        return prepare(observation, actions)

    monkeypatch.setattr(policy, "_prepare", watch)
    policy.loss({**batch, "actions": policy.normalizer.denormalize(ACTIONS, far)})
    torch.testing.assert_close(targets[0] * CLIP, far)

    class Furthest(torch.nn.Linear):
        def forward(self, obs_dict):
            return torch.ones(6, config.horizon, 7)

    policy.nets["policy"] = Furthest(1, 1)
    chunk = policy.predict(batch["observation"], batch["instruction"], None)
    torch.testing.assert_close(chunk, policy.actions_from_normalized(torch.full_like(far, CLIP)))


def test_a_run_that_does_not_name_its_reach_had_that_of_the_percentiles(dataset: Path, tmp_path: Path) -> None:
    config = make_config("bc", action_reach=1.0)
    data = open_training_data(dataset, config)
    trainer = TrainerConfig(steps=1, batch_size=8)
    train(config, trainer, data, tmp_path, device="cpu")
    stored = tmp_path / "checkpoints/last/config.yaml"
    stored.write_text(stored.read_text().replace("action_reach: 1.0\n", ""))
    assert "action_reach" not in stored.read_text()
    assert load_policy(tmp_path).config == config
    train(config, trainer, data, tmp_path, device="cpu", resume=True)
    with pytest.raises(ConfigError, match=r"policy.action_reach: 1.0 \(checkpoint\) != 1.5 \(now\)"):
        train(make_config("bc"), trainer, data, tmp_path, device="cpu", resume=True)


def test_settings_that_robomimic_cannot_do_are_refused() -> None:
    with pytest.raises(ValueError, match="observation_steps is 2"):
        make_config("bc_rnn", observation_steps=2)
    with pytest.raises(ValueError, match="horizon is 8"):
        make_config("bc", horizon=8)
    with pytest.raises(ValueError, match="action_reach is 2"):
        make_config("bc", action_reach=2)


def test_both_types_have_settings_that_fit_them() -> None:
    from simtoreal import cli
    from simtoreal.commands import train as command

    for name, chunk in (("robomimic/bc", (1, 1)), ("robomimic/bc_rnn", (10, 5))):
        read = command.policy_config(
            cli._read_flags("train", command, ["--data", "d", "--output", "o", "--policy", name])
        )
        assert (read.type, read.horizon, read.execute_steps) == (name, *chunk)
    with pytest.raises(ConfigError, match=r"unknown policy type 'robomimic'. Did you mean 'robomimic/bc'"):
        command.policy_config(
            cli._read_flags("train", command, ["--data", "d", "--output", "o", "--policy", "robomimic"])
        )


def test_settings_on_the_command_line_may_be_lists(tmp_path: Path) -> None:
    from simtoreal import cli
    from simtoreal.commands import train as command

    given = ["--data", "d", "--output", "o", "--policy", "robomimic/bc_rnn"]
    settings = ["--settings", "hidden", "64", "image_keys", "[front_image]", "layers", "[32, 32]"]
    read = command.policy_config(cli._read_flags("train", command, [*given, *settings]))
    assert read == RobomimicConfig(hidden=64, image_keys=("front_image",), layers=(32, 32))
    preset = tmp_path / "preset.yaml"
    preset.write_text("settings: {hidden: 64, image_keys: [front_image], layers: [32, 32]}\n")
    assert command.policy_config(cli._read_flags("train", command, [*given, "--config", str(preset)])) == read
    with pytest.raises(ConfigError, match="'layers' is 32; expected a list"):
        command.policy_config(cli._read_flags("train", command, [*given, "--settings", "layers", "32"]))


def test_images_too_small_for_the_encoder_are_refused(dataset: Path) -> None:
    config = make_config("bc", image_keys=("front_image",))
    data = open_training_data(dataset, config)
    with pytest.raises(ConfigError, match="shrink to one cell"):
        RobomimicPolicy(config, point_world.PointVectorEnv(1, 32).embodiment, data.statistics)


def test_two_policies_with_different_keys_coexist(dataset: Path) -> None:
    first_config = make_config("bc", image_keys=("front_image",))
    data = open_training_data(dataset, first_config)
    first = make_policy(first_config, data).eval()
    batch = to_tensors(data.train.batch(np.arange(3)), torch.device("cpu"))
    before = first.predict(batch["observation"], batch["instruction"], None)
    make_policy(make_config("bc_rnn"), data)
    torch.testing.assert_close(first.predict(batch["observation"], batch["instruction"], None), before)


def test_missing_robomimic_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['robomimic'] = None\n"
        "from simtoreal.policies.robomimic import import_robomimic\n"
        "from simtoreal.envs.errors import MissingDependencyError\n"
        "try:\n    import_robomimic()\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install --no-deps -r requirements/robomimic.txt" in result.stdout


def test_importing_the_adapter_does_not_import_robomimic() -> None:
    code = "import sys, simtoreal.policies.robomimic; assert 'robomimic' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)
