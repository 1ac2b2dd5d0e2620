"""Training: it learns, continues bit by bit after a crash, runs in several processes, and refuses what does not fit."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_reaching as toy

from simtoreal import cli
from simtoreal.envs.errors import ConfigError, DatasetError, SimtorealError
from simtoreal.policies import available_memory as available_memory_module
from simtoreal.policies import trainer as trainer_module
from simtoreal.policies import training_data as training_data_module
from simtoreal.policies.available_memory import available_memory
from simtoreal.policies.averaging import WeightAverage, average_decay
from simtoreal.policies.checkpoint import load_policy
from simtoreal.policies.config import AugmentationConfig, BCConfig, PolicyConfig, TrainerConfig
from simtoreal.policies.distributed import choose_device
from simtoreal.policies.trainer import choose_precision, learning_rate, train
from simtoreal.policies.training_data import batch_indices, open_training_data, to_tensors, training_batches
from simtoreal.policies.training_log import TrainingLog, read_metrics

TESTS = Path(__file__).parent


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / "last"
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    state = safetensors.torch.load_file(folder / "state.safetensors")
    return {**weights, **state}


def assert_identical(run: Path, other: Path) -> None:
    mine, theirs = tensors_of(run), tensors_of(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def learning_curve(run: Path) -> list[tuple]:
    keys = ("step", "loss", "gradient_norm", "learning_rate", "validation_error")
    return [tuple(line.get(key) for key in keys) for line in read_metrics(run)]


def run_python(program: str, **environment: str) -> subprocess.Popen:
    header = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
    return subprocess.Popen(
        [sys.executable, "-c", header + textwrap.dedent(program)],
        env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


# --- learning --------------------------------------------------------------------------------------------------------


def test_diffusion_learns_to_look(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=250)
    settings = toy.small_trainer(
        steps=200, batch_size=32, checkpoint_every=200, validate_every=200, learning_rate=3e-3, validation_windows=100
    )
    result = train(config, settings, data, tmp_path)
    blind = np.abs(data.valid.actions - np.median(data.train.actions, axis=0)).mean()
    assert result.validation_error < 0.5 * blind
    error = read_metrics(tmp_path)[-1]["validation_error_per_step"]
    assert len(error) == config.horizon
    assert np.mean(error) == pytest.approx(result.validation_error, rel=0.2)


TYPES = ["diffusion", "robomimic/bc", "robomimic/bc_rnn"]


def small_policy(kind: str) -> PolicyConfig:
    """A policy on the images of ``toy.data(..., size=40)``; robomimic's have tensors with several names."""
    if kind == "diffusion":
        return toy.small_diffusion()
    pytest.importorskip("robomimic")
    from simtoreal.policies.robomimic import RobomimicBCConfig, RobomimicConfig

    if kind == "robomimic/bc":
        return RobomimicBCConfig(image_keys=("front_image",), layers=(16,))
    return RobomimicConfig(image_keys=("front_image",), hidden=16, layers=(16,), horizon=4, execute_steps=2)


@pytest.mark.parametrize("kind", TYPES)
def test_the_weights_that_load_are_those_that_were_validated(tmp_path, kind):
    config = small_policy(kind)
    data = toy.data(config, episodes=6, size=40)
    result = train(config, toy.small_trainer(learning_rate=1e-2, precision="fp32"), data, tmp_path, device="cpu")
    loaded = load_policy(tmp_path).policy
    count = min(len(data.valid), 16)
    indices = np.linspace(0, len(data.valid) - 1, count).round().astype(int)
    batch = to_tensors(data.valid.batch(indices), torch.device("cpu"))
    with torch.inference_mode():
        predicted = loaded.predict(batch["observation"], [""] * count, torch.Generator().manual_seed(0))
    error = (predicted - batch["actions"]).abs().mean(-1)[batch["action_mask"]].mean()
    assert float(error) == pytest.approx(result.validation_error, rel=1e-5)


# --- continuing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "precision"), [("diffusion", "bf16"), *((kind, "fp32") for kind in TYPES)])
def test_resume_is_bit_identical_to_the_uninterrupted_run(tmp_path, kind, precision, monkeypatch):
    config = small_policy(kind)
    data = toy.data(config, episodes=6, size=40)
    settings = toy.small_trainer(precision=precision)
    train(config, settings, data, tmp_path / "whole")

    class Killed(Exception):
        pass

    original = trainer_module.Training.take_step

    def stop_at_five(self, batch):
        if self.step == 5:
            raise Killed
        return original(self, batch)

    monkeypatch.setattr(trainer_module.Training, "take_step", stop_at_five)
    with pytest.raises(Killed):
        train(config, settings, data, tmp_path / "parts")
    monkeypatch.undo()
    # The global generators of the new process are in another state.
    torch.manual_seed(999)
    np.random.seed(999)
    result = train(config, settings, data, tmp_path / "parts", resume=True)
    assert result.steps == settings.steps
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    assert learning_curve(tmp_path / "whole") == learning_curve(tmp_path / "parts")


TRAINING = """
    import toy_reaching as toy
    from pathlib import Path
    from simtoreal.policies.trainer import train
    config = toy.small_diffusion()
    settings = toy.small_trainer(steps={steps}, checkpoint_every=1)
    train(config, settings, toy.data(config, episodes=6), Path({run!r}), resume=True)
"""


def test_kill_at_any_moment_then_resume_gives_the_same_weights(tmp_path):
    steps = 16
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)
    settings = toy.small_trainer(steps=steps, checkpoint_every=1)
    train(config, settings, data, tmp_path / "whole")
    waits = {tmp_path / "early": 0.03, tmp_path / "late": 0.2}
    processes = {run: run_python(TRAINING.format(steps=steps, run=str(run))) for run in waits}
    for run, process in processes.items():
        deadline = time.monotonic() + 60
        while not read_metrics(run) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(waits[run])
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert any(process.returncode == -signal.SIGKILL for process in processes.values())
    for run in waits:
        train(config, settings, data, run, resume=True)
        assert_identical(tmp_path / "whole", run)
        names = [path.name for path in (run / "checkpoints").iterdir()]
        assert not [name for name in names if name.startswith(".")]


def test_a_finished_run_resumes_to_itself(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)
    first = train(config, toy.small_trainer(), data, tmp_path)
    again = train(config, toy.small_trainer(checkpoint_every=5, log_every=3), data, tmp_path, resume=True)
    assert again == first


def test_a_run_that_is_older_than_a_setting_had_its_default(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)
    first = train(config, toy.small_trainer(), data, tmp_path)
    stored = tmp_path / "checkpoints/last/config.yaml"
    stored.write_text(stored.read_text().replace("loss: l2\n", ""))
    assert "loss" not in stored.read_text()
    assert load_policy(tmp_path).config == config
    assert train(config, toy.small_trainer(), data, tmp_path, resume=True) == first
    with pytest.raises(ConfigError, match=r"policy.loss: l2 \(checkpoint\) != l1 \(now\)"):
        train(toy.small_diffusion(loss="l1"), toy.small_trainer(), data, tmp_path, resume=True)


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings_or_data(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)
    train(config, toy.small_trainer(), data, tmp_path)
    with pytest.raises(ConfigError, match="--resume"):
        train(config, toy.small_trainer(), data, tmp_path)
    with pytest.raises(ConfigError, match=r"trainer.steps: 6 \(checkpoint\) != 9 \(now\)"):
        train(config, toy.small_trainer(steps=9), data, tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"policy.inference_steps: 8 \(checkpoint\) != 4 \(now\)"):
        train(toy.small_diffusion(inference_steps=4), toy.small_trainer(), data, tmp_path, resume=True)
    with pytest.raises(ConfigError, match=r"data.fingerprint: "):
        train(config, toy.small_trainer(), toy.data(config, episodes=6, seed=1), tmp_path, resume=True)


# --- several processes -----------------------------------------------------------------------------------------------


def deterministic_setup() -> tuple[BCConfig, TrainerConfig]:
    """Nothing random, and no masked actions, so that two halves of a batch average to the whole."""
    config = BCConfig(
        image_keys=("front_image",), vision=toy.small_vision(), hidden=32, horizon=1, execute_steps=1,
        augmentation=AugmentationConfig(shift_px=0, brightness=0, contrast=0, colour=0, state_noise=0),
    )  # fmt: skip
    return config, toy.small_trainer(steps=4, precision="fp32")


def test_two_gloo_processes_train_one_policy(tmp_path):
    config, settings = deterministic_setup()
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        "import toy_reaching as toy\n"
        "from test_trainer import deterministic_setup\n"
        "from simtoreal.policies.trainer import train\n"
        "config, settings = deterministic_setup()\n"
        f"train(config, settings, toy.data(config, episodes=6), {str(tmp_path / 'two')!r}, device='cpu')\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    data = toy.data(config, episodes=6)
    train(config, settings, data, tmp_path / "one", device="cpu")
    one, two = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "two")
    weights = [name for name in one if name.startswith("parameter/")]
    assert len(weights) > 20
    for name in weights:
        # AdamW divides by the size of the gradient, so rounding grows where the gradient is nearly zero.
        torch.testing.assert_close(two[name], one[name], atol=2e-3, rtol=1e-2)
    assert json.loads((tmp_path / "two/checkpoints/last/training.json").read_text())["processes"] == 2
    assert [line["step"] for line in read_metrics(tmp_path / "two")] == [1, 2, 3, 4]
    with pytest.raises(ConfigError, match=r"processes: 2 \(checkpoint\) != 1 \(now\)"):
        train(config, settings, data, tmp_path / "two", resume=True, device="cpu")


def test_processes_share_out_the_windows_of_a_batch():
    config = toy.small_diffusion()
    windows = toy.data(config, episodes=6).train
    common = {"batch_size": 8, "seed": 0, "first_step": 0, "last_step": 1, "device": torch.device("cpu")}
    whole = next(training_batches(windows, **common))["actions"]
    parts = [next(training_batches(windows, **common, rank=rank, world=2))["actions"] for rank in range(2)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_every_epoch_visits_every_window_once_in_a_new_order():
    order = np.concatenate([batch_indices(10, 4, 0, step) for step in range(5)])
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert list(order[:10]) != list(order[10:])
    assert not np.array_equal(batch_indices(10, 4, 1, 0), batch_indices(10, 4, 0, 0))
    assert len(batch_indices(3, 8, 0, 0)) == 8


def test_memory_that_makes_room_counts_as_available(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal: 64 kB\nMemFree: 2 kB\nMemAvailable:      40 kB\nCached: 38 kB\n")
    (tmp_path / "cgroup").write_text("4:memory:/old\n0::/service/part\n")
    groups = tmp_path / "groups"
    (groups / "service" / "part").mkdir(parents=True)
    monkeypatch.setattr(available_memory_module, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(available_memory_module, "CONTROL_GROUP", tmp_path / "cgroup")
    monkeypatch.setattr(available_memory_module, "CONTROL_GROUPS", groups)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def limit(folder: Path, most: str) -> None:
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("9000\n")
        (folder / "memory.stat").write_text("anon 3000\ninactive_file 4000\n")

    assert available_memory() == 40 * 1024
    limit(groups / "service" / "part", "max")
    assert available_memory() == 40 * 1024
    limit(groups / "service", "10000")
    assert available_memory() == 10000 - 9000 + 4000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory() == 2500


def test_data_larger_than_half_of_the_available_memory_are_mapped(dataset, monkeypatch):
    config = BCConfig(state_keys=("proprio",), image_keys=("front_image",))
    for available, mapped in ((10**12, False), (1, True)):
        monkeypatch.setattr(training_data_module, "available_memory", lambda size=available: size)
        images = open_training_data(dataset, config).train.observations["front_image"]
        assert isinstance(images, np.memmap) is mapped
    shutil.rmtree(dataset / ".window_cache")


def test_learning_rate_warms_up_and_ends_at_one_percent():
    config = TrainerConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)
    assert all(math.isfinite(learning_rate(TrainerConfig(steps=5, warmup_steps=10), step)) for step in range(5))


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [(5, 1), (100, 10), (199, 20), (200, 20), (201, 21), (300, 100), (399, 199), (400, 200), (3500, 200)],
)
def test_learning_rate_of_few_steps_rises_and_falls(steps, warmup):
    config = TrainerConfig(steps=steps, learning_rate=1.0)
    rates = [learning_rate(config, step) for step in range(steps)]
    assert rates.index(1.0) == warmup - 1
    assert steps < 100 or rates[-1] == pytest.approx(0.01, abs=1e-3)


def test_weight_average_follows_its_formula_and_comes_and_goes():
    parameter = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([parameter])
    expected = 0.0
    for update in range(5):
        parameter.data = torch.full((3,), float(update + 1))
        expected = average_decay(update) * expected + (1 - average_decay(update)) * (update + 1)
        average.update()
    with average.applied():
        torch.testing.assert_close(parameter.data, torch.full((3,), expected))
    assert torch.equal(parameter.data, torch.full((3,), 5.0))
    assert average_decay(10**9) == 0.9999


def test_divergence_stops_the_training_and_keeps_the_last_checkpoint(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)
    original = data.train.batch

    def poisoned(indices):
        batch = original(indices)
        poisoned.calls += 1
        if poisoned.calls > 4:
            batch["actions"][0, 0, 0] = np.nan
        return batch

    poisoned.calls = 0
    data.train.batch = poisoned
    with pytest.raises(SimtorealError, match="training diverged at step 5"):
        train(config, toy.small_trainer(), data, tmp_path)
    assert load_policy(tmp_path).training["step"] == 4


def test_errors_of_the_data_reach_the_caller(tmp_path):
    config = toy.small_diffusion()
    data = toy.data(config, episodes=6)

    def broken(indices):
        raise DatasetError("episodes/000003.hdf5: is damaged")

    data.train.batch = broken
    with pytest.raises(DatasetError, match="000003"):
        train(config, toy.small_trainer(), data, tmp_path)


def test_precision_follows_the_processor(monkeypatch):
    assert choose_precision("fp32", torch.device("cpu")) == "fp32"
    for capabilities, expected in (({}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found, raising=False)
        assert choose_precision("auto", torch.device("cpu")) == expected


# The thread of tensorboard's writer ends with the same error.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_full_disk_is_explained_and_the_log_stays_whole(tmp_path):
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    sizes = []

    def fill_the_disk() -> None:
        with TrainingLog(tmp_path, first_step=0, last_step=9, progress=False) as log:
            log.write(1, {"loss": 0.5})
            sizes.append((tmp_path / "metrics.jsonl").stat().st_size)
            resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[0] + 5, limits[1]))
            log.write(2, {"loss": 0.25})

    try:
        with pytest.raises(SimtorealError, match=r"metrics\.jsonl: the disk is full .* are intact.* --resume"):
            fill_the_disk()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "metrics.jsonl").stat().st_size == sizes[0]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [0.5]


def test_unknown_device_is_refused(tmp_path):
    config = toy.small_diffusion()
    with pytest.raises(ConfigError, match="not a torch device"):
        train(config, toy.small_trainer(), toy.data(config, episodes=6), tmp_path, device="gpuu")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "cpu:7", "cuda:2"])
def test_devices_that_do_not_exist_are_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=f"device '{name}' is not there .* expected one of cpu, cuda:0, cuda:1$"):
        choose_device(name)
    assert [str(choose_device(one)) for one in ("cpu", "cpu:0", "cuda:1", None)] == ["cpu", "cpu:0", "cuda:1", "cuda"]


# --- real data and the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    from simtoreal.data_collection.collect import CollectionPlan, collect

    path = tmp_path_factory.mktemp("data") / "reach"
    collect(CollectionPlan(output=path, task="reach", episodes=4, image_size=32, workers=1, num_envs=4))
    return path


def test_the_command_trains_on_a_collected_dataset(dataset, tmp_path, capsys):
    from simtoreal.commands.train import Config, main
    from simtoreal.envs.registration import make_vector_env
    from simtoreal.envs.rollout import rollout
    from simtoreal.policies.actor import PolicyActor

    bc = BCConfig(vision=toy.small_vision(), hidden=32, horizon=8, execute_steps=4)
    config = Config(data=dataset, output=tmp_path / "run", policy="bc", bc=bc, trainer=toy.small_trainer(), steps=4)
    main(config)
    assert "trained bc: 4 steps" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["train"]["steps"] == 4
    assert results["train"]["parameters"] > 1000
    assert math.isfinite(results["train"]["validation_error"])
    loaded = load_policy(tmp_path / "run")
    assert loaded.task["name"] == "reach"
    env = make_vector_env("reach", 2, image_size=32)
    results = rollout(env, PolicyActor(loaded.policy), [1, 2, 3])
    assert [result.seed for result in results] == [1, 2, 3]


def test_the_command_writes_over_nothing_else(dataset, tmp_path):
    from simtoreal.commands.train import Config, main

    before = sorted(dataset.rglob("*"))
    with pytest.raises(ConfigError, match="is a dataset; choose another folder"):
        main(Config(data=dataset, output=dataset, policy="bc"))
    assert sorted(dataset.rglob("*")) == before
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results.json").write_text('{"success_rate": 1}')
    with pytest.raises(ConfigError, match="results of another command"):
        main(Config(data=dataset, output=tmp_path / "evaluation", policy="bc"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        main(Config(data=dataset, output=tmp_path / "file" / "run", policy="bc"))


def test_shipped_presets_are_known_by_name(dataset):
    from simtoreal.commands import train as command

    read = cli._read_flags("train", command, ["--config", "bc_cpu", "--data", str(dataset), "--output", "run"])
    assert read.policy == "bc"


def test_settings_of_another_policy_type_are_refused(dataset, tmp_path):
    from simtoreal.commands import train as command

    given = ["--data", str(dataset), "--output", "run", "--policy", "bc"]
    with pytest.raises(ConfigError, match=r"diffusion.horizon is set, .* but --policy is bc.*--policy diffusion"):
        command.policy_config(cli._read_flags("train", command, [*given, "--diffusion.horizon", "32"]))
    # Written-out defaults say nothing.
    preset = ["--config", "diffusion_cpu"]
    assert command.policy_config(cli._read_flags("train", command, [*given, *preset])).type == "bc"


def test_data_without_the_cameras_of_the_policy_are_refused(dataset):
    with pytest.raises(DatasetError, match=r"'side_image'.*Valid: front_image, wrist_image"):
        open_training_data(dataset, BCConfig(image_keys=("side_image",)))
    with pytest.raises(DatasetError, match="nosuch"):
        open_training_data(dataset, BCConfig(state_keys=("nosuch",)))


PRESETS = sorted((TESTS.parent / "configs" / "policies").glob("*.yaml"))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_every_preset_builds_its_policy_and_learns_from_a_batch(preset):
    from simtoreal.commands.train import Config, policy_config
    from simtoreal.envs.config import load_fields
    from simtoreal.envs.panda import panda_embodiment
    from simtoreal.policies.normalization import Statistics
    from simtoreal.policies.registry import policy_class

    config = Config(data=Path("data"), output=Path("run"), **load_fields(Config, preset))
    chosen = policy_config(config)
    bounds = {
        key: Statistics(low=-np.ones(size, np.float32), high=np.ones(size, np.float32))
        for key, size in (("actions", 7), ("proprio", 20))
    }
    policy = policy_class(chosen.type)(chosen, panda_embodiment(96), bounds)
    images = torch.randint(0, 256, (1, chosen.observation_steps, 96, 96, 3), dtype=torch.uint8)
    observation = {
        "front_image": images, "wrist_image": images, "proprio": torch.zeros(1, chosen.observation_steps, 20)
    }  # fmt: skip
    mask = torch.ones(1, chosen.horizon, dtype=torch.bool)
    batch = {"observation": observation, "actions": torch.zeros(1, chosen.horizon, 7), "action_mask": mask}
    assert torch.isfinite(policy.loss({**batch, "instruction": [""]})["loss"])
    assert policy.eval().predict(observation, [""], None).shape == (1, chosen.horizon, 7)


def test_a_preset_with_an_unknown_key_is_refused_with_the_closest_name(tmp_path):
    from simtoreal.commands.train import Config
    from simtoreal.envs.config import load_fields

    preset = tmp_path / "preset.yaml"
    preset.write_text("policy: diffusion\ndiffusion:\n  horizn: 16\n")
    with pytest.raises(ConfigError, match=r"preset.yaml: unknown key 'diffusion.horizn'. Did you mean 'horizon'"):
        load_fields(Config, preset)


def test_the_command_refuses_unknown_policies_and_settings(dataset, tmp_path):
    from simtoreal.commands.train import Config, main

    with pytest.raises(ConfigError, match="Did you mean 'diffusion'"):
        main(Config(data=dataset, output=tmp_path / "run", policy="difusion"))
    with pytest.raises(ConfigError, match="flags of its own"):
        main(Config(data=dataset, output=tmp_path / "run", settings={"horizon": 4}))
    with pytest.raises(ConfigError, match="--steps: steps is 0"):
        main(Config(data=dataset, output=tmp_path / "run", steps=0))
