"""Parallel collection: which episodes result, interruption by SIGKILL, and everything that can go wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import point_world
import pytest
import yaml

from simtoreal.data_collection import collect as collect_module
from simtoreal.data_collection.collect import CollectionPlan, CollectionProgress, collect
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.ledger import Ledger
from simtoreal.data_collection.writer import require_dataset_folder
from simtoreal.envs.errors import ConfigError, DatasetError, SimtorealError
from simtoreal.envs.task_file import load_task

# The first 20 seeds of the range that the expert can solve.
FIRST_20 = [seed for seed in range(100) if not point_world.fails(seed)][:20]


def make_plan(output: Path, **changes: object) -> CollectionPlan:
    content = {"output": output, "task": "point", "episodes": 20, "image_size": 16, "workers": 2, "num_envs": 3}
    return CollectionPlan(**{**content, **changes})


def content_digest(path: Path) -> str:
    """Digest of every array and its order, without wall-clock times and the state of the source tree."""
    digest = hashlib.sha256()
    dataset = Dataset.open(path)
    for episode in dataset.episodes:
        digest.update(dataclasses.replace(episode, started="", commit="", path=None).to_json().encode())
        for name, array in sorted(dataset.read(episode).items()):
            digest.update(name.encode() + array.tobytes())
    return digest.hexdigest()


def assert_clean(path: Path) -> None:
    assert not (path / ".collect").exists()
    assert not [file for file in path.rglob("*") if file.suffix in (".tmp", ".part")]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the plan's data collected without any interruption."""
    path = tmp_path_factory.mktemp("reference")
    collect(make_plan(path, workers=1, num_envs=7), setup=point_world.setup)
    return content_digest(path)


def test_result_depends_on_neither_workers_nor_environments(tmp_path: Path, reference: str) -> None:
    result = collect(make_plan(tmp_path), setup=point_world.setup)
    assert [episode.seed for episode in Dataset.open(tmp_path).episodes] == FIRST_20
    assert content_digest(tmp_path) == reference
    assert [outcome.seed for outcome in result.outcomes] == list(range(FIRST_20[-1] + 1))
    assert {outcome.seed for outcome in result.outcomes if not outcome.success} == {3, 8, 13, 18, 23}
    assert_clean(tmp_path)


def test_repeating_does_nothing_and_asking_for_more_extends(tmp_path: Path, reference: str) -> None:
    collect(make_plan(tmp_path / "a", episodes=7), setup=point_world.setup)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a/episodes").iterdir()}
    assert collect(make_plan(tmp_path / "a", episodes=7), setup=point_world.setup).session == 0
    collect(make_plan(tmp_path / "a"), setup=point_world.setup)
    after = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "a/episodes").iterdir()}
    assert before.items() <= after.items()
    assert content_digest(tmp_path / "a") == reference


def test_failures_are_kept_on_request(tmp_path: Path) -> None:
    collect(make_plan(tmp_path, keep_failures=True), setup=point_world.setup)
    dataset = Dataset.open(tmp_path)
    assert [episode.seed for episode in dataset.episodes] == list(range(FIRST_20[-1] + 1))
    assert [episode.seed for episode in dataset.filter("failure")] == [3, 8, 13, 18, 23]


def test_seeds_of_collections_are_disjoint(tmp_path: Path) -> None:
    collect(make_plan(tmp_path, episodes=2, seed=7, workers=1), setup=point_world.setup)
    assert [episode.seed for episode in Dataset.open(tmp_path).episodes] == [7_000_000, 7_000_001]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    collect(make_plan(tmp_path, episodes=2, workers=1), setup=point_world.setup)
    with pytest.raises(ConfigError, match="seed: 0 != 1"):
        collect(make_plan(tmp_path, episodes=2, seed=1), setup=point_world.setup)
    with pytest.raises(ConfigError, match="expected one or more distinct names"):
        make_plan(tmp_path, cameras=("front", "front"))
    with pytest.raises(ConfigError, match="cameras are none"):
        make_plan(tmp_path, cameras=())
    with pytest.raises(ConfigError, match="expected at most 2048"):
        make_plan(tmp_path, image_size=100_000)
    with pytest.raises(ConfigError, match="episodes is 0"):
        make_plan(tmp_path, episodes=0)


def test_a_task_that_was_edited_is_refused_although_nothing_is_left_to_do(tmp_path: Path) -> None:
    file, content = tmp_path / "mine.yaml", load_task("reach").to_dict()
    file.write_text(yaml.safe_dump(content))
    plan = make_plan(tmp_path / "a", task=str(file), episodes=1, workers=1, num_envs=1)
    collect(plan)
    assert collect(plan).session == 0
    for edit, message in (
        ({"horizon": 61}, "holds episodes of another specification of task 'reach'. Write to a new folder"),
        ({"goal": "at(tcp, goal, 0.02)"}, "holds episodes of another specification of task 'reach'"),
        ({"name": "mine"}, "holds episodes of task 'reach', and .*mine.yaml is of task 'mine' now"),
    ):
        file.write_text(yaml.safe_dump({**content, **edit}))
        with pytest.raises(DatasetError, match=message):
            collect(plan)
    file.unlink()
    assert collect(plan).session == 0, "what is complete needs no file of its task"
    assert Dataset.open(plan.output).task == content


SLOW = """
import sys, time
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_collect import make_plan, slow_setup
from simtoreal.data_collection.collect import collect
if __name__ == "__main__":
    collect(make_plan(Path(sys.argv[1])), setup=slow_setup)
"""


def slow_setup(plan: CollectionPlan) -> tuple:
    env, expert = point_world.setup(plan)
    step = env.step

    def slow_step(actions: np.ndarray) -> tuple:
        time.sleep(0.05)
        (plan.output / f"alive-{os.getpid()}").touch()
        return step(actions)

    env.step = slow_step  # type: ignore[method-assign]
    return env, expert


def wait_for(condition, what: str) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_sigkill_and_resume_give_exactly_the_requested_episodes(tmp_path: Path, reference: str) -> None:
    output, script = tmp_path / "a", tmp_path / "slow.py"
    script.write_text(SLOW)
    for enough in (2, 9):
        process = subprocess.Popen([sys.executable, str(script), str(output), str(Path(__file__).parent)])
        wait_for(lambda count=enough: len(list((output / "episodes").glob("*.hdf5"))) >= count, "first episodes")
        process.send_signal(signal.SIGKILL)
        process.wait()
        workers = [int(file.name.removeprefix("alive-")) for file in output.glob("alive-*")]
        assert len(workers) == 2
        wait_for(lambda pids=workers: not any(map(is_running, pids)), "the end of the orphaned workers")
        for file in output.glob("alive-*"):
            file.unlink()
        assert 0 < len(Dataset.open(output).episodes) < 20
    finished = {file.name: file.stat().st_mtime_ns for file in (output / "episodes").iterdir()}
    result = collect(make_plan(output), setup=point_world.setup)
    assert 0 < result.session < len(result.outcomes)
    assert finished.items() <= {file.name: file.stat().st_mtime_ns for file in (output / "episodes").iterdir()}.items()
    assert content_digest(output) == reference
    assert_clean(output)
    lines = (output / "collection.jsonl").read_text().splitlines()
    assert len({json.loads(line)["seed"] for line in lines}) >= len(result.outcomes) - 2


@pytest.mark.parametrize(
    ("before", "after", "last_seed"),
    [
        ({"episodes": 6}, {"episodes": 6}, 6),
        ({"episodes": 6}, {"episodes": 4}, 4),
        ({"episodes": None, "steps": 480}, {"episodes": None, "steps": 20}, 3),
    ],
)
def test_a_collection_stopped_while_only_an_earlier_seed_was_missing_continues(
    tmp_path: Path, before: dict, after: dict, last_seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = []

    def stop(progress: CollectionProgress) -> None:
        shown.append(progress)
        if progress.successes == 6:
            raise KeyboardInterrupt

    # All seeds run at once; seed 3 fails, and takes longer than the others.
    plan = make_plan(tmp_path, workers=1, num_envs=8, **before)
    with pytest.raises(KeyboardInterrupt):
        collect(plan, setup=point_world.setup, on_progress=stop)
    assert shown[-1].episodes == 3, "only what is committed counts"
    assert shown[-1].steps == sum(episode.steps for episode in Dataset.open(tmp_path).episodes)

    def wait_for_somebody(connections: list) -> list:
        assert connections, "nobody is running the missing seed, so this would wait for ever"
        return wait(connections)

    monkeypatch.setattr(collect_module, "wait", wait_for_somebody)
    result = collect(dataclasses.replace(plan, **after), setup=point_world.setup)
    assert result.session == 1
    assert [outcome.seed for outcome in result.outcomes] == list(range(last_seed + 1))
    assert_clean(tmp_path)


def test_idle_workers_get_a_seed_even_if_the_ledger_asks_for_none(
    tmp_path: Path, reference: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "want", lambda ledger: 0)
    collect(make_plan(tmp_path), setup=point_world.setup)
    assert content_digest(tmp_path) == reference


def test_log_torn_by_a_crash_is_repaired(tmp_path: Path, reference: str) -> None:
    collect(make_plan(tmp_path / "a", episodes=7), setup=point_world.setup)
    log = tmp_path / "a/collection.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    collect(make_plan(tmp_path / "a"), setup=point_world.setup)
    assert content_digest(tmp_path / "a") == reference


@pytest.mark.parametrize("line", ["garbage", '{"seed": 1}', '{"seed": "a", "success": true}', "[]", "\udcff"])
def test_damaged_log_is_named(tmp_path: Path, line: str) -> None:
    log = tmp_path / "collection.jsonl"
    log.write_bytes(line.encode(errors="surrogateescape") + b"\n")
    with pytest.raises(DatasetError, match=r"collection.jsonl: line 1 is not the outcome of a seed .* Delete the line"):
        collect(make_plan(tmp_path), setup=point_world.setup)
    log.unlink()


def dying_setup(plan: CollectionPlan) -> tuple:
    env, expert = point_world.setup(plan)
    calls = iter(range(1000))
    act = expert.act

    def dying_act(*arguments: object) -> np.ndarray:
        if next(calls) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*arguments)

    expert.act = dying_act  # type: ignore[method-assign]
    return env, expert


def test_killed_worker_is_reported_and_its_finished_episodes_stay(tmp_path: Path, reference: str) -> None:
    with pytest.raises(SimtorealError, match=r"died \(exit code -9.*run the command again"):
        collect(make_plan(tmp_path / "a", workers=1), setup=dying_setup)
    assert 0 < len(Dataset.open(tmp_path / "a").episodes) < 20
    collect(make_plan(tmp_path / "a"), setup=point_world.setup)
    assert content_digest(tmp_path / "a") == reference


def full_disk_setup(plan: CollectionPlan) -> tuple:
    env, expert = point_world.setup(plan)
    calls = iter(range(1000))
    act = expert.act

    def act_until_full(*arguments: object) -> np.ndarray:
        if next(calls) == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        return act(*arguments)

    expert.act = act_until_full  # type: ignore[method-assign]
    return env, expert


def test_full_disk_is_reported_and_nothing_is_half_written(tmp_path: Path, reference: str) -> None:
    with pytest.raises(DatasetError, match="the disk is full"):
        collect(make_plan(tmp_path / "a", workers=1), setup=full_disk_setup)
    assert 0 < len(Dataset.open(tmp_path / "a").episodes) < 20
    assert not [file for file in (tmp_path / "a").rglob("*") if file.suffix in (".tmp", ".part")]
    collect(make_plan(tmp_path / "a"), setup=point_world.setup)
    assert content_digest(tmp_path / "a") == reference


def test_full_disk_in_the_main_process_is_reported_and_the_collection_continues(tmp_path: Path, reference: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / "a"

    def fill(progress: CollectionProgress) -> None:
        if progress.session == 5:
            # Room for half a line of the log, and none for the dataset's description.
            size = (path / "collection.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, limits[1]))

    try:
        with pytest.raises(
            DatasetError, match=r"collection\.jsonl: the disk is full .* every finished episode is intact"
        ):
            collect(make_plan(path, workers=1), setup=point_world.setup, on_progress=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (path / "collection.jsonl").read_text().endswith("}\n")
    assert len((path / "collection.jsonl").read_text().splitlines()) == 5
    result = collect(make_plan(path), setup=point_world.setup)
    assert result.session < len(result.outcomes)
    assert content_digest(path) == reference
    assert_clean(path)


def broken_setup(plan: CollectionPlan) -> tuple:
    raise ZeroDivisionError("environment of the test")


def config_error_setup(plan: CollectionPlan) -> tuple:
    raise ConfigError("a clear message")


def test_errors_of_workers_arrive(tmp_path: Path) -> None:
    with pytest.raises(SimtorealError, match="ZeroDivisionError: environment of the test"):
        collect(make_plan(tmp_path), setup=broken_setup)
    with pytest.raises(ConfigError, match="a clear message"):
        collect(make_plan(tmp_path), setup=config_error_setup)


def hopeless_setup(plan: CollectionPlan) -> tuple:
    env, expert = point_world.setup(plan)
    expert.act = lambda observation, instructions, slots: np.zeros((len(slots), 1, 7), dtype=np.float32)  # type: ignore
    return env, expert


def test_hopeless_expert_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"only 0 of \d+ attempts at 'point' succeeded"):
        collect(make_plan(tmp_path), setup=hopeless_setup)


@pytest.mark.parametrize("command", ["collect", "teleop"])
def test_the_results_of_another_command_are_not_overwritten(tmp_path: Path, command: str) -> None:
    from simtoreal.commands import collect as collecting
    from simtoreal.commands import teleop

    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "results.json").write_text('{"train": {}, "provenance": {}}')
    before = sorted(tmp_path.rglob("*"))
    start = {
        "collect": lambda: collecting.main(collecting.Config(task="reach", output=tmp_path, episodes=1, workers=1)),
        "teleop": teleop.open_collection(teleop.Config(task="reach", output=tmp_path)).__enter__,
    }[command]
    with pytest.raises(DatasetError, match=r"neither a dataset nor empty \(it holds checkpoints, results.json\)"):
        start()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_whose_writer_was_killed_at_once_is_continued(tmp_path: Path) -> None:
    (tmp_path / "episodes").mkdir()
    (tmp_path / ".lock").touch()
    (tmp_path / ".meta.json.x1.tmp").touch()
    require_dataset_folder(tmp_path)


def test_folder_in_use_is_refused(tmp_path: Path) -> None:
    from simtoreal.data_collection.writer import lock_folder

    collect(make_plan(tmp_path, episodes=2, workers=1), setup=point_world.setup)
    with lock_folder(tmp_path), pytest.raises(DatasetError, match="another process"):
        collect(make_plan(tmp_path), setup=point_world.setup)


def test_simulated_expert_gives_the_same_data_with_any_number_of_environments(tmp_path: Path) -> None:
    changes = {"task": "pick_place", "episodes": 3, "image_size": 32, "workers": 1}
    collect(make_plan(tmp_path / "a", **changes, num_envs=1))
    collect(make_plan(tmp_path / "b", **changes, num_envs=3))
    dataset, other = Dataset.open(tmp_path / "a"), Dataset.open(tmp_path / "b")
    assert dataset.task["name"] == "pick_place"
    for mine, theirs in zip(dataset.episodes, other.episodes, strict=True):
        assert (mine.seed, mine.steps) == (theirs.seed, theirs.steps)
        arrays, others = dataset.read(mine), other.read(theirs)
        for name, array in arrays.items():
            # The rasteriser may round a pixel differently at another place of its canvas.
            tolerance = 2 if name.endswith("_image") else 0
            np.testing.assert_allclose(array.astype(np.float64), others[name], rtol=0, atol=tolerance, err_msg=name)
    assert arrays["step/target"].shape[1] == 10
    assert arrays["states"].shape[1] > 0
    assert arrays["obs/front_image"].std() > 5


def test_recorded_states_reproduce_the_recorded_observations(tmp_path: Path) -> None:
    from simtoreal.envs import make_env

    collect(make_plan(tmp_path, task="lift", episodes=1, image_size=32, workers=1, num_envs=1))
    dataset = Dataset.open(tmp_path)
    arrays = dataset.read(dataset.episodes[0])
    env = make_env("lift", image_size=32)
    env.reset(seed=dataset.episodes[0].seed)
    for step in (0, 10, 20):
        env.unwrapped.set_state(arrays["states"][step])
        observation, *_ = env.step(arrays["actions"][step])
        np.testing.assert_array_equal(observation["proprio"], arrays["obs/proprio"][step + 1])
        np.testing.assert_array_equal(observation["front_image"], arrays["obs/front_image"][step + 1])
    env.close()


def test_command_writes_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from simtoreal.commands.collect import Config, main

    config = Config(task="reach", output=tmp_path / "d [old]", episodes=3, image_size=16, workers=1, num_envs=3)
    main(config)
    results = json.loads((tmp_path / "d [old]/results.json").read_text())
    collected = results["collect"]
    assert (collected["episodes"], collected["successes"]) == (3, 3)
    assert collected["tried"] == 3 + len(collected["failures"])
    assert collected["interval"][0] < collected["success_rate"] <= 1
    assert collected["episodes_per_s"] > 0
    assert results["provenance"]["seeds"][0] == 0
    printed = capsys.readouterr().out
    assert "95 % interval" in printed
    assert f"in {config.output}: expert success" in printed
    main(dataclasses.replace(config, episodes=2))
    expected = f"{config.output} already holds 3 successful episodes of reach: nothing left to do"
    assert expected in capsys.readouterr().out
    assert json.loads((tmp_path / "d [old]/results.json").read_text()) == results
    with pytest.raises(ConfigError, match="Did you mean 'careful'"):
        main(dataclasses.replace(config, style="carefull"))
