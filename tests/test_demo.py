"""Stages that resume, and the whole demo: interrupted, continued, complete."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from report_folders import make_cotraining, make_evaluation, make_filtered_dataset, make_run
from rich.console import Console

from simtoreal.commands import doctor
from simtoreal.commands.demo import Config, stages_of
from simtoreal.commands.demo import main as demo
from simtoreal.demo_report import demo_results, measured_folders, summary_rows
from simtoreal.demo_stages import FULL_PROFILES, PROFILES
from simtoreal.envs.errors import ConfigError, MissingDependencyError
from simtoreal.envs.files import write_json
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.evaluation.results import append_episode, summarize
from simtoreal.pipeline import PipelineError, Stage, StageRecord, digests, format_duration, run_stages


def _evaluation(folder: Path, successes: int) -> Path:
    episodes = [
        EpisodeResult(
            episode=index, seed=index, success=index < successes, steps=9, duration_s=0.5, milestones={},
            instruction="", failure="" if index < successes else "timeout",
        )
        for index in range(10)
    ]  # fmt: skip
    for episode in episodes:
        append_episode(folder, episode)
    write_json(folder / "results.json", {"task": "reach", "label": folder.name, **summarize(episodes)})
    return folder


@pytest.fixture
def stages(tmp_path: Path) -> list[Stage]:
    """Two small stages of the real command line; the second stands for one that reads the first."""
    folders = (str(_evaluation(tmp_path / "x", 9)), str(_evaluation(tmp_path / "y", 4)))
    return [
        Stage(name="first", title="First", command=("compare", *folders, "--output", "{output}/first")),
        Stage(
            name="second",
            title="Second",
            command=("compare", *folders, "--alpha", "0.1", "--output", "{output}/second"),
            needs=("first",),
        ),
    ]


def _run(stages: list[Stage], output: Path) -> dict[str, bool]:
    """Return stage name -> whether it was skipped."""
    records = run_stages(stages, output, Console(file=io.StringIO()))
    return {record.stage.name: record.skipped for record in records}


def test_finished_stages_are_skipped_and_changed_ones_run_again(stages: list[Stage], tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert _run(stages, output) == {"first": False, "second": False}
    assert (output / "first" / "results.json").is_file()
    assert _run(stages, output) == {"first": True, "second": True}
    (output / "second" / "leftover").touch()
    changed = [stages[0], Stage(**{**vars(stages[1]), "command": (*stages[1].command, "--unpaired")})]
    assert _run(changed, output) == {"first": True, "second": False}
    assert not (output / "second" / "leftover").exists()
    assert json.loads((output / "second" / "results.json").read_text())["paired"] is False


def test_a_changed_stage_invalidates_those_that_read_it(stages: list[Stage], tmp_path: Path) -> None:
    before = digests(stages)
    preset = tmp_path / "preset.yaml"
    preset.write_text("alpha: 0.2\n")
    changed = [Stage(**{**vars(stages[0]), "command": (*stages[0].command, "--config", str(preset))}), stages[1]]
    middle = digests(changed)
    assert all(before[name] != middle[name] for name in before)
    preset.write_text("alpha: 0.3\n")
    assert all(middle[name] != digests(changed)[name] for name in before)
    with pytest.raises(PipelineError, match="needs a later stage"):
        digests(stages[::-1])


def test_failure_is_explained_and_the_next_run_continues(stages: list[Stage], tmp_path: Path) -> None:
    output = tmp_path / "out"
    missing = tmp_path / "x" / "results.json"
    content = missing.read_text()
    _run(stages[:1], output)
    missing.unlink()
    with pytest.raises(PipelineError, match="stage 'second' failed with exit status 2"):
        _run(stages, output)
    missing.write_text(content)
    assert _run(stages, output) == {"first": True, "second": False}


def test_foreign_folders_and_parallel_runs_are_refused(stages: list[Stage], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "first").mkdir(parents=True)
    (output / "first" / "precious").touch()
    with pytest.raises(PipelineError, match="not made by this pipeline"):
        _run(stages, output)
    assert (output / "first" / "precious").exists()
    with open(output / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(PipelineError, match="another process"):
            _run(stages, output)


def test_durations_are_readable() -> None:
    assert [format_duration(seconds) for seconds in (3.21, 42.0, 425.0)] == ["3.2 s", "42 s", "7 min 05 s"]


def test_what_an_interrupted_command_cannot_continue_is_made_anew(stages: list[Stage], tmp_path: Path) -> None:
    output = tmp_path / "out"
    for index, resumes in enumerate((True, False)):
        stage = Stage(**{**vars(stages[index]), "needs": (), "resumes": resumes})
        (output / stage.name).mkdir(parents=True)
        (output / stage.name / "leftover").touch()
        marker = {"digest": digests([stage])[stage.name], "finished": False, "seconds": 1.0}
        write_json(output / ".stages" / f"{stage.name}.json", marker)
        assert _run([stage], output) == {stage.name: False}
        assert (output / stage.name / "leftover").exists() == resumes


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("profile", sorted(PROFILES))
def test_every_profile_uses_flags_that_exist(profile: str, full: bool) -> None:
    from simtoreal import cli

    assert FULL_PROFILES.keys() == PROFILES.keys()
    stages = stages_of(Config(profile=profile, full=full))  # type: ignore[arg-type]
    assert digests(stages)
    for stage in stages:
        verb, rest = cli._split_verb(stage.command)
        module = __import__(cli._module_name(verb), fromlist=["Config"])
        flags = cli._read_flags(verb, module, rest)
        if verb == "data filter":  # Writes into the dataset that it filters.
            assert flags.dataset.name in stage.needs
        else:
            assert flags.output.name == stage.name
        # What a stage reads was written by one that it needs.
        read = {part.removeprefix("{output}/").split("/")[0] for part in stage.command if part.startswith("{output}/")}
        assert read - {stage.name} <= set(stage.needs)


def test_the_two_demos_never_share_a_folder() -> None:
    assert Config().folder != Config(full=True).folder
    assert Config(full=True, output=Path("x")).folder == Path("x")
    with pytest.raises(ConfigError, match="--seed is -1"):
        Config(seed=-1)


def test_results_of_the_full_demo_say_what_each_part_changed(tmp_path: Path) -> None:
    for name in ("demonstrations", "second_operator", "still"):
        speed = {"episodes": 3, "episodes_per_s": 2.0, "success_rate": 1.0, "interval": [0.5, 1.0]}
        write_json(tmp_path / name / "results.json", {"collect": speed})
    make_filtered_dataset(tmp_path / "merged")
    make_run(tmp_path / "policy", "diffusion")
    make_cotraining(tmp_path / "cotrain")
    for when, successes, missed in (("before", 4, 1), ("after", 10, 2)):
        timing = {"gap": "standard", "missed_periods": missed, "p99_period_error_ms": 0.5}
        make_evaluation(tmp_path / f"robot_{when}", successes, 12, **timing)
    stages = stages_of(Config(full=True))
    records = [StageRecord(stage=stage, folder=tmp_path / stage.name, seconds=2.0, skipped=False) for stage in stages]
    results = demo_results(Config(full=True, output=tmp_path), records, tmp_path / "report.html")
    assert [(row["operator"], row["accepted"], row["episodes"]) for row in results["filter"]] == [
        ("ada", 1, 1),
        ("<ben>", 1, 2),
    ]
    assert results["cotrain"]["base"]["successes"] == 8
    assert results["cotrain"]["final"]["successes"] == 14
    assert results["cotrain"]["gap"] == pytest.approx(0.15)  # Of the last measurement.
    assert results["cotrain"]["real_episodes"] == 28
    # Six initial conditions fail before and succeed after, none the other way: 2 * 0.5^6.
    assert results["robot_comparison"]["p_value"] == pytest.approx(0.03125)
    assert results["robot_comparison"]["difference"] == pytest.approx(0.5)
    assert results["seconds"] == 2.0 * len(stages)
    shown = dict(summary_rows(results))
    assert shown["operator <ben>"] == "1 of 2 demonstrations accepted"
    assert shown["imagined - real success"] == "+15 points [-10, +40]"
    assert shown["improved policy on the 'standard' twin"].startswith("83 % (10/12")
    assert shown["control loop"] == "3 missed periods, p99 error 0.50 ms"
    measurements = tmp_path / "cotrain" / "measurements"
    assert measured_folders(tmp_path / "cotrain") == (
        measurements / "base" / "real",
        measurements / "policy_0" / "real",
    )


def test_a_machine_without_ros_is_told_before_the_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "ROS_SCRIPT", "raise ImportError(\"No module named 'rclpy'\")")
    with pytest.raises(MissingDependencyError, match=r"ROS 2: .*No module named 'rclpy'\n  fix: .*simtoreal\[ros\]"):
        demo(Config(profile="smoke", output=tmp_path / "demo"))
    assert not (tmp_path / "demo").exists()


def _demo(output: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "simtoreal", "demo", "--profile", "smoke", "--task", "reach"]
    command += ["--output", str(output)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ
    )


def _stop_in_stage(demo: subprocess.Popen[str], marker: Path) -> str:
    """Press Ctrl-C as soon as a stage has begun; return what was printed."""
    deadline = time.monotonic() + 300
    while not marker.exists() and demo.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(demo.pid, signal.SIGINT)
    return demo.communicate(timeout=60)[0]


@pytest.mark.timeout(900)
def test_demo_interrupted_and_continued_is_complete(tmp_path: Path) -> None:
    output = tmp_path / "demo"
    demo = _demo(output)
    printed = _stop_in_stage(demo, output / ".stages" / "policy.json")
    assert demo.returncode == 130, printed
    assert not (output / "results.json").exists()
    demo = _demo(output)
    printed = demo.communicate(timeout=600)[0]
    assert demo.returncode == 0, printed
    assert "demonstrations already done" in printed
    results = json.loads((output / "results.json").read_text())
    assert results["collect"]["episodes"] == 12
    assert results["collect"]["episodes_per_s"] > 0
    assert results["train"]["parameters"] > 100_000
    assert results["train"]["seconds"] > 0
    for key, n in (("sim", 4), ("baseline", 4), ("robot", 1)):
        low, high = results[key]["interval"]
        assert results[key]["n"] == n
        assert low <= results[key]["success_rate"] <= high
    assert results["robot"]["gap"] == "standard"
    assert results["robot"]["missed_periods"] >= 0
    assert results["robot"]["p99_period_error_ms"] >= 0
    assert Path(results["report"]).stat().st_size > 100_000
    assert (output / "overview.jpg").read_bytes()[:2] == b"\xff\xd8"
