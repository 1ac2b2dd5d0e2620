"""Evaluation in the real simulator: the table, resuming, videos, determinism, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from simtoreal.commands import evaluate as command
from simtoreal.envs import make_vector_env
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import write_json
from simtoreal.envs.rollout import Observation
from simtoreal.envs.video import read_video
from simtoreal.evaluation.compare import NOT_DISTINGUISHABLE, compare
from simtoreal.evaluation.evaluate import check_settings, check_unseen, evaluate
from simtoreal.evaluation.results import EvaluationError, load_evaluation, read_episodes
from simtoreal.policies.checkpoint import MODEL

SETTINGS = {"task": "reach", "label": "approach", "backend": "simulation"}
SEEDS = range(100_000, 100_010)
CONFIGS = Path(__file__).parent.parent / "configs"


class Approach:
    """Moves the target straight to the goal, for half of the seeds; the others stay where they are."""

    observation_steps, execute_steps, ensembling = 1, 4, None

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.moves: dict[int, bool] = {}
        self.calls, self.interrupt_after = 0, interrupt_after

    def reset(self, slots: np.ndarray, seeds: Sequence[int]) -> None:
        self.moves |= {int(slot): bool(seed % 2) for slot, seed in zip(slots, seeds, strict=True)}

    def act(self, observation: Observation, instructions: Sequence[str], slots: np.ndarray) -> np.ndarray:
        self.calls += 1
        if self.calls == self.interrupt_after:
            raise KeyboardInterrupt
        target, goal = observation["proprio"][:, -1, 9:12], observation["object_state"][:, -1, :3]
        chunk = np.zeros((len(slots), 4, 7), np.float32)
        chunk[:, :, :3] = np.clip((goal - target) / 0.02 / 4, -0.5, 0.5)[:, None]
        chunk[[not self.moves[int(slot)] for slot in slots]] = 0.0
        return chunk


@pytest.fixture(scope="module")
def env() -> Iterator[object]:
    made = make_vector_env("reach", 4, image_size=32)
    yield made
    made.close()


def test_outcomes_videos_and_summary(env: object, tmp_path: Path) -> None:
    results = evaluate(env, Approach(), SEEDS, tmp_path, SETTINGS, videos=1)  # type: ignore[arg-type]
    episodes = read_episodes(tmp_path)
    assert [episode.seed for episode in episodes] == list(SEEDS)
    assert [episode.success for episode in episodes] == [bool(seed % 2) for seed in SEEDS]
    assert (results["n"], results["successes"], results["success_rate"]) == (10, 5, 0.5)
    assert results["interval"][0] < 0.5 < results["interval"][1]
    assert all(episode.failure == "timeout" for episode in episodes if not episode.success)
    assert results["provenance"]["versions"]["mujoco"]
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert [video["success"] for video in results["videos"]] == [True, False]
    shown = next(episode for episode in episodes if episode.seed == results["videos"][0]["seed"])
    frames = read_video(tmp_path / results["videos"][0]["file"])
    # Two 32-pixel cameras enlarged eight times, the first picture, one per step, and half a second at the end.
    assert frames.shape[0] == 1 + shown.steps + 10
    assert frames.shape[1] == 256
    assert frames.std() > 5


def test_interrupted_evaluation_continues_to_the_same_table(env: object, tmp_path: Path) -> None:
    evaluate(env, Approach(), SEEDS, tmp_path / "whole", SETTINGS, videos=0)  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        evaluate(env, Approach(interrupt_after=30), SEEDS, tmp_path / "cut", SETTINGS, videos=0)  # type: ignore[arg-type]
    half = read_episodes(tmp_path / "cut")
    assert 0 < len(half) < len(SEEDS)
    with pytest.raises(EvaluationError, match="not a finished evaluation"):
        load_evaluation(tmp_path / "cut")
    results = evaluate(env, Approach(), SEEDS, tmp_path / "cut", SETTINGS, videos=0)  # type: ignore[arg-type]
    assert results["episodes_this_run"] == len(SEEDS) - len(half)
    whole, cut = (load_evaluation(tmp_path / name) for name in ("whole", "cut"))
    assert [(e.seed, e.success, e.steps) for e in cut.episodes] == [
        (e.seed, e.success, e.steps) for e in whole.episodes
    ]


def test_results_name_the_commands_that_ran_the_episodes(
    env: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(commit: str, seeds: Sequence[int], interrupt_after: int | None = None) -> dict[str, Any]:
        source = {"command": f"simtoreal evaluate {len(seeds)}", "commit": commit}
        for module in ("evaluate", "sessions"):
            monkeypatch.setattr(f"simtoreal.evaluation.{module}.provenance", lambda *_: source)
        return evaluate(env, Approach(interrupt_after), seeds, folder, SETTINGS, videos=0)  # type: ignore[arg-type]

    folder = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        run("first", SEEDS, interrupt_after=30)
    half = len(read_episodes(folder))
    results = run("second", SEEDS)
    assert [(s["command"], s["commit"], s["episodes"]) for s in results["sessions"]] == [
        ("simtoreal evaluate 10", "first", half),
        ("simtoreal evaluate 10", "second", len(SEEDS) - half),
    ]
    assert results["seconds"] == sum(session["seconds"] for session in results["sessions"])
    assert results["sessions"][0]["seconds"] > 0
    # Asked again, the finished one is left as it is.
    stored = (folder / "results.json").read_bytes()
    assert run("third", SEEDS) == results
    assert (folder / "results.json").read_bytes() == stored
    # What is damaged is repaired, by a session that ran nothing.
    write_json(folder / "results.json", {**results, "n": 3})
    assert run("fourth", SEEDS)["sessions"] == results["sessions"]

    # Earlier versions kept only the results.
    folder = tmp_path / "old"
    whole = run("old", SEEDS[:4])
    (folder / "sessions.json").unlink()
    kept = {key: value for key, value in whole.items() if key != "sessions"}
    write_json(folder / "results.json", {**kept, "seconds": 812.0})
    assert run("new", SEEDS[:4]) == {**kept, "seconds": 812.0}
    results = run("new", SEEDS[:6])
    assert [(s["commit"], s["episodes"]) for s in results["sessions"]] == [("old", 4), ("new", 2)]
    assert results["seconds"] == 812.0 + results["sessions"][1]["seconds"]
    # Or, interrupted, nothing.
    (folder / "sessions.json").unlink()
    (folder / "results.json").unlink()
    results = run("new", SEEDS[:7])
    assert [(s["commit"], s["seconds"], s["episodes"]) for s in results["sessions"][:1]] == [("unknown", None, 6)]
    (folder / "sessions.json").write_text("[3]")
    with pytest.raises(EvaluationError, match=r"sessions\.json is damaged"):
        run("new", SEEDS)


def test_same_policy_twice_is_not_distinguishable(env: object, tmp_path: Path) -> None:
    for name in ("first", "second"):
        evaluate(env, Approach(), SEEDS, tmp_path / name, SETTINGS, videos=0)  # type: ignore[arg-type]
    first, second = (load_evaluation(tmp_path / name, name) for name in ("first", "second"))
    assert [episode.steps for episode in first.episodes] == [episode.steps for episode in second.episodes]
    (pair,) = compare([first, second])["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["p_value"]) == (0, 0, 1.0)
    assert pair["verdict"] == NOT_DISTINGUISHABLE


def test_number_of_environments_does_not_change_the_episodes(env: object, tmp_path: Path) -> None:
    evaluate(env, Approach(), SEEDS, tmp_path / "four", SETTINGS, videos=0)  # type: ignore[arg-type]
    other = make_vector_env("reach", 3, observe="state")
    evaluate(other, Approach(), SEEDS, tmp_path / "three", SETTINGS)
    other.close()
    four, three = (load_evaluation(tmp_path / name).episodes for name in ("four", "three"))
    assert [(e.seed, e.success, e.steps) for e in four] == [(e.seed, e.success, e.steps) for e in three]


def test_another_evaluation_in_the_folder_is_refused(env: object, tmp_path: Path) -> None:
    evaluate(env, Approach(), SEEDS[:4], tmp_path, SETTINGS, videos=0)  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match=r"label: 'approach' there, 'other' now"):
        evaluate(env, Approach(), SEEDS[:4], tmp_path, {**SETTINGS, "label": "other"})  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="not asked for"):
        evaluate(env, Approach(), SEEDS[:2], tmp_path, SETTINGS)  # type: ignore[arg-type]
    (tmp_path / "settings.json").unlink()
    with pytest.raises(EvaluationError, match="no settings"):
        evaluate(env, Approach(), SEEDS[:4], tmp_path, SETTINGS)  # type: ignore[arg-type]


def test_a_task_file_that_changed_is_another_evaluation(tmp_path: Path) -> None:
    content = yaml.safe_load((CONFIGS / "tasks" / "reach.yaml").read_text())
    file = tmp_path / "reach.yaml"

    def begin(folder: Path, goal: str) -> dict[str, object]:
        file.write_text(yaml.safe_dump({**content, "goal": goal}, sort_keys=False))
        config = command.Config(actor="expert", task=str(file), output=folder, num_envs=1, videos=0)
        env, _, settings, _ = command._prepare(config)
        env.close()
        return check_settings(folder, settings)

    settings = begin(tmp_path / "out", content["goal"])
    assert begin(tmp_path / "out", content["goal"]) == settings
    with pytest.raises(EvaluationError, match=r"task_digest: .* \(the task's file was changed\)"):
        begin(tmp_path / "out", "at(tcp, goal, 0.1)")
    # Earlier versions did not note it, and nobody knows it of their episodes.
    old = {key: value for key, value in settings.items() if key != "task_digest"}
    write_json(tmp_path / "old" / "settings.json", old)
    assert begin(tmp_path / "old", content["goal"]) == old


def test_demonstrated_conditions_are_refused() -> None:
    assert check_unseen(SEEDS, range(200)) == ""
    with pytest.raises(ConfigError, match=r"50 of 100 evaluation seeds .* \(150 to 199\)"):
        check_unseen(range(150, 250), range(200))
    assert "unseen" in check_unseen(range(150, 250), range(200), allowed=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained behaviour-cloning policy for ``reach`` with 32-pixel cameras."""
    return _save_policy(tmp_path_factory.mktemp("run"), 32)


def _save_policy(folder: Path, image_size: int) -> Path:
    folder.mkdir(exist_ok=True)
    import torch

    from simtoreal.envs import load_task, panda_embodiment
    from simtoreal.policies.bc import BCPolicy
    from simtoreal.policies.checkpoint import save_policy
    from simtoreal.policies.config import BCConfig, VisionConfig
    from simtoreal.policies.normalization import Statistics

    torch.manual_seed(0)
    config = BCConfig(vision=VisionConfig(widths=(8, 8), features=16, keypoints=8), hidden=32, layers=1)
    embodiment = panda_embodiment(image_size)
    statistics = {
        "actions": Statistics(low=-np.ones(7, np.float32), high=np.ones(7, np.float32)),
        "proprio": Statistics(low=-np.ones(20, np.float32), high=np.ones(20, np.float32)),
    }
    policy = BCPolicy(config, embodiment, statistics)
    save_policy(folder, policy, training={"task": load_task("reach").to_dict(), "data": {"seeds": [0, 1, 2]}})
    return folder


def test_command_evaluates_a_checkpoint(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = command.Config(policy=checkpoint, output=tmp_path / "out [old]", episodes=3, num_envs=2, videos=1)
    command.main(config)
    printed = capsys.readouterr().out
    assert "Result: bc on reach: success" in printed
    assert f"written to {tmp_path / 'out [old]'}\n" in printed
    found = load_evaluation(tmp_path / "out [old]")
    assert found.seeds == (100_000, 100_001, 100_002)
    assert found.results["checkpoint"]
    assert found.results["horizon"] == max(episode.steps for episode in found.episodes)
    with pytest.raises(ConfigError, match="training demonstrations"):
        command.main(command.Config(policy=checkpoint, output=tmp_path / "seen", seed=1))
    with pytest.raises(ConfigError, match="--policy is missing"):
        command.Config(output=tmp_path)
    with pytest.raises(ConfigError, match="--episodes is 0"):
        command.Config(policy=checkpoint, output=tmp_path, episodes=0)


def test_an_evaluation_of_a_run_that_was_moved_continues(checkpoint: Path, tmp_path: Path) -> None:
    def run(policy: Path, episodes: int) -> dict[str, object]:
        command.main(command.Config(policy=policy, output=tmp_path / "out", episodes=episodes, num_envs=2, videos=0))
        return load_evaluation(tmp_path / "out").results

    shutil.copytree(checkpoint, tmp_path / "moved")
    run(checkpoint, 2)
    results = run(tmp_path / "moved", 3)
    assert (results["n"], results["episodes_this_run"], results["policy"]) == (3, 1, str(tmp_path / "moved"))
    weights = bytearray((tmp_path / "moved" / MODEL).read_bytes())
    weights[-1] ^= 1
    (tmp_path / "moved" / MODEL).write_bytes(weights)
    with pytest.raises(EvaluationError, match=r"(?s)policy: .*checkpoint: "):
        run(tmp_path / "moved", 4)


def test_policy_for_other_cameras_is_refused(tmp_path: Path) -> None:
    from simtoreal.envs.errors import EmbodimentMismatchError
    from simtoreal.evaluation.policies import load_actor

    _, actor = load_actor(_save_policy(tmp_path / "run", 64), device="cpu")
    env = make_vector_env("reach", 1, image_size=96)
    with pytest.raises(EmbodimentMismatchError) as caught:
        evaluate(env, actor, SEEDS, tmp_path / "out", SETTINGS)
    env.close()
    for line in ("the policy", "the environment", "cameras.front.height: 64 != 96", "cameras.wrist.width: 64 != 96"):
        assert line in str(caught.value)
    assert not read_episodes(tmp_path / "out")


def test_execution_flags_reach_the_policy_and_are_stored(checkpoint: Path, tmp_path: Path) -> None:
    common = {"policy": checkpoint, "episodes": 1, "num_envs": 1, "videos": 0}
    config = command.Config(**common, output=tmp_path / "out", execute_steps=3)
    env, actor, settings, _ = command._prepare(config)
    env.close()
    assert actor.execute_steps == 3
    assert settings["execute_steps"] == 3
    command.main(config)
    assert load_evaluation(tmp_path / "out").results["execute_steps"] == 3
    with pytest.raises(EvaluationError, match="execute_steps: 3 there, None now"):
        command.main(command.Config(**common, output=tmp_path / "out"))
    env, actor, settings, _ = command._prepare(command.Config(**common, output=tmp_path, ensembling=0.01))
    env.close()
    assert (actor.ensembling, settings["ensembling"]) == (0.01, 0.01)
    with pytest.raises(ConfigError, match="execute_steps is 999"):
        command.main(command.Config(**common, output=tmp_path / "far", execute_steps=999))
    with pytest.raises(ConfigError, match="exclude each other"):
        command.Config(**common, output=tmp_path, execute_steps=3, ensembling=0.01)
    with pytest.raises(ConfigError, match="are for policies"):
        command.Config(actor="expert", task="reach", output=tmp_path, execute_steps=3)
    with pytest.raises(ConfigError, match="are for policies in a foreign environment"):
        command.Config(actor="expert", task="reach", output=tmp_path, horizon=5)


def test_full_disk_keeps_the_episodes_before(tmp_path: Path) -> None:
    import resource

    from simtoreal.envs.rollout import EpisodeResult
    from simtoreal.evaluation.results import append_episode

    results = [
        EpisodeResult(
            episode=seed, seed=seed, success=True, steps=9, duration_s=0.5, milestones={}, instruction="", failure=""
        )
        for seed in range(4)
    ]
    for result in results[:2]:
        append_episode(tmp_path, result)
    size = (tmp_path / "episodes.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limits[1]))
    try:
        with pytest.raises(EvaluationError, match=r"episodes\.jsonl: the disk is full .* before this one are stored"):
            append_episode(tmp_path, results[2])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert read_episodes(tmp_path) == results[:2]
    assert (tmp_path / "episodes.jsonl").stat().st_size == size
    append_episode(tmp_path, results[3])
    assert [result.seed for result in read_episodes(tmp_path)] == [0, 1, 3]


def test_full_disk_while_a_video_is_written_keeps_its_episode(env: object, tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(EvaluationError, match=r"videos: the disk is full .* up to this one are stored"):
            evaluate(env, Approach(), SEEDS[:2], tmp_path, SETTINGS, videos=1)  # type: ignore[arg-type]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(read_episodes(tmp_path)) == 1
    results = evaluate(env, Approach(), SEEDS[:2], tmp_path, SETTINGS, videos=1)  # type: ignore[arg-type]
    assert (results["n"], results["episodes_this_run"]) == (2, 1)
