"""What the benchmarks share: fair timing, names of results, and parts that an earlier run left."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import compatibility_study
import interleaved
import move
import parts
import rlir
import world_model

from simtoreal.data_collection.dataset import Dataset


def test_every_timed_run_begins_with_the_same_and_the_order_rotates():
    state, begun = {"a": 0, "b": 0}, []

    def arm(name: str):
        def run() -> None:
            begun.append((name, state[name]))
            state[name] += 1

        return run

    seconds = interleaved.time_rounds({"a": arm("a"), "b": arm("b")}, 2, prepare=lambda: state.update(a=0, b=0))
    assert begun == [(name, 0) for name in "ababba"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_only_the_defaults_give_a_benchmarks_own_result():
    parser = argparse.ArgumentParser()
    parser.add_argument("--policies", nargs="+", default=["bc"])
    parser.add_argument("--seeds", type=int, default=3)

    def name(*arguments: str) -> str:
        return interleaved.result_name("study", parser, parser.parse_args(arguments), "policies", "seeds")

    assert name() == name("--policies", "bc", "--seeds", "3") == "study"
    assert name("--seeds", "1") == "study_seeds_1"
    assert name("--policies", "bc", "diffusion") == "study_policies_bc_diffusion"


def make(path: Path, settings: dict, commit: str, monkeypatch: pytest.MonkeyPatch) -> parts.Part:
    """A part, as a session with code of ``commit`` makes it in two seconds."""
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(parts, "git_commit", lambda: commit)
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))
    with parts.part(path, settings) as found:
        if not found.finished:
            path.write_text("made")
    return found


def test_a_part_is_read_again_only_with_its_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, settings = tmp_path / "seed_1", {"steps": 100, "policy": {"loss": "l2", "keys": ("a", "b")}}
    assert not make(path, settings, "one", monkeypatch).commits[1:]
    again = make(path, settings, "two", monkeypatch)
    assert (again.finished, again.seconds, again.commits) == (True, 2.0, ["one"]), "reading makes nothing"
    changed = {**settings, "policy": {**settings["policy"], "loss": "l1"}}
    with pytest.raises(SystemExit, match=r"seed_1: .*policy\.loss: 'l2' there, 'l1' now\)\. Delete it, or .* --output"):
        make(path, changed, "two", monkeypatch)
    path.unlink()
    assert make(path, changed, "two", monkeypatch).commits == ["two"], "what was deleted is made anew"
    (tmp_path / "seed_1.settings.json").unlink()
    with pytest.raises(SystemExit, match=r"there is no seed_1\.settings\.json"):
        make(path, changed, "two", monkeypatch)


def test_an_interrupted_part_goes_on_with_its_seconds_and_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, settings = tmp_path / "run", {"steps": 100}
    clock = iter([10.0, 13.0])
    monkeypatch.setattr(parts, "git_commit", lambda: "one")
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))

    def interrupted() -> None:
        with parts.part(path, settings):
            path.mkdir()
            (path / "checkpoint").touch()
            noted = json.loads((tmp_path / "run.settings.json").read_text())
            assert (noted["settings"], noted["killed"]) == (settings, 1), "should it be killed now"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not parts.find_part(path, settings).finished
    with pytest.raises(SystemExit, match="steps: 100 there, 200 now"):
        parts.find_part(path, {"steps": 200})
    clock = iter([20.0, 22.0])
    monkeypatch.setattr(parts, "git_commit", lambda: "two")
    with parts.part(path, settings) as found:
        assert not found.finished
    assert found == parts.Part(settings, seconds=5.0, commits=["one", "two"], finished=True, killed=0)


def test_a_result_sums_its_parts_and_names_their_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interleaved, "RESULTS", tmp_path)
    old = parts.Part({}, seconds=3.0, commits=["0123456789abcdef-dirty"], finished=True)
    new = parts.Part({}, seconds=4.0, commits=[parts.git_commit()], finished=True)

    def write(*made: parts.Part) -> dict:
        path = interleaved.write_benchmark("x", "?", {}, [], seconds=0.5, notes="As always.", parts=made)
        return json.loads(path.read_text())

    assert (write(new)["seconds"], write(new)["notes"]) == (4.5, "As always.")
    mixed = write(old, new)
    assert mixed["seconds"] == 7.5
    assert mixed["notes"][0] == "As always."
    killed = parts.Part({}, commits=[parts.git_commit()], killed=2)
    assert write(killed)["notes"] == ["As always.", "The seconds are without those of 2 session(s) that were killed."]
    assert "made at 0123456789ab-dirty, " in mixed["notes"][1]


def test_an_interrupted_collection_is_not_taken_for_a_complete_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(env, actor, seeds, listeners):
        original(env, actor, seeds[:1], listeners=listeners)
        raise KeyboardInterrupt

    original = world_model.rollout
    monkeypatch.setattr(world_model, "TASK", "reach")
    monkeypatch.setattr(world_model, "rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        world_model.collect(tmp_path / "data", 3, 0, disturbed=True)
    monkeypatch.setattr(world_model, "rollout", original)
    for _ in range(2):
        folder = world_model.collect(tmp_path / "data", 3, 0, disturbed=True)
        assert sorted(episode.seed for episode in Dataset.open(folder).episodes) == [0, 1, 2]


@pytest.mark.parametrize("benchmark", [world_model, rlir])
def test_settings_of_the_profiles_can_be_stored_and_differ(benchmark, tmp_path: Path):
    for name, profile in benchmark.PROFILES.items():
        stored = parts.find_part(tmp_path / name, benchmark.settings_of(profile))
        assert stored.settings["profile"]["preset"] == profile.preset
        assert stored.settings == parts.find_part(tmp_path / name, benchmark.settings_of(profile)).settings


def test_the_learner_of_reach2d_sees_the_position_only():
    env = compatibility_study.state_env("reach2d", 2, position=True)
    env.reset(seed=0)
    proprio = env.step(np.full((2, 7), 0.5, np.float32))[0]["proprio"]
    env.close()
    assert (proprio[:, :3] != 0).all()
    assert (proprio[:, 3:] == 0).all()


def finish(run: move.Run, output: Path, episodes: int) -> None:
    """A run of benchmarks/move.py, without the work."""
    entry = {
        "task": run.task, "arm": run.arm, "budget": run.budget, "seed": run.seed, "episodes": episodes,
        "placements": [move._placement(move.load_task(run.task), seed) for seed in range(4)],
        "init_ids": [4, 5, 6, 7], "successes": [True, False, run.arm == move.MOVE, False],
    }  # fmt: skip
    with parts.part(move.result_of(run, output), move.settings_of(run)):
        interleaved.write_json(move.result_of(run, output), entry)


def test_move_publishes_under_its_own_name_only_when_every_run_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results, work = tmp_path / "results", tmp_path / "work"
    monkeypatch.setattr(interleaved, "RESULTS", results)
    monkeypatch.setattr(move, "RESULTS", results)
    still = move.Run(task="reach", arm=move.STATIC, budget=4000, seed=0)
    moving = dataclasses.replace(still, arm=move.MOVE, motion=move.SCENE_MOTIONS["move"])
    other = dataclasses.replace(moving, seed=1)
    runs = [still, moving, dataclasses.replace(still, arm=move.SAME_EPISODES), other]
    monkeypatch.setattr(move, "planned", lambda: runs)
    finish(still, work, 40)
    move.summarize(work)
    assert "nothing is written" in capsys.readouterr().out
    finish(moving, work, 41)
    move.summarize(work)
    assert [file.name for file in results.iterdir()] == ["move_partial.json"]
    finish(other, work, 41)
    move.summarize(work)
    # Nearly as many episodes: the third arm is not another one.
    assert [file.name for file in results.iterdir()] == ["move.json"]
    monkeypatch.setattr(move, "BATCH", 16)
    with pytest.raises(SystemExit, match=r"trainer\.batch_size: 32 there, 16 now"):
        move.summarize(work)


def test_the_task_of_move_is_written_anew_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert move.load_task(move.write_slow_task("reach", tmp_path / "work")).horizon == move.HORIZON
    monkeypatch.setattr(move, "HORIZON", 123)
    assert move.load_task(move.write_slow_task("reach", tmp_path / "work")).horizon == 123
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["reach.yaml"]


def test_a_stage_that_arms_have_in_common_is_counted_once():
    full = {"seconds": 7.25, "stages": {"measure_base": 2.25, "rollouts_0": 5.0}, "provenance": {"commit": "one"}}
    adopting = {"seconds": 5.25, "stages": {"measure_base": 2.25, "rollouts_0": 3.0}, "provenance": {"commit": "two"}}
    found = parts.parts_of([full, adopting, {"seconds": 4.0}])
    assert [(one.seconds, one.commits) for one in found] == [(7.25, ["one"]), (3.0, ["two"]), (4.0, [])]
