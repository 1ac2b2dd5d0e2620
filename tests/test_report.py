"""The report page: self-contained, honest about n, and made from whatever is there. And the generated results page."""

from __future__ import annotations

import html.parser
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from report_folders import (
    HISTOGRAM,
    make_cotraining,
    make_evaluation,
    make_filtered_dataset,
    make_frames,
    make_run,
)

from simtoreal.commands import report as command
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import make_vector_env, rollout
from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.envs.figures import COLORS
from simtoreal.envs.files import write_json
from simtoreal.envs.video import read_video, tile, write_video
from simtoreal.evaluation.compare import compare
from simtoreal.evaluation.film import film_strip
from simtoreal.evaluation.plots import learning_plot, timing_plot
from simtoreal.evaluation.report import ReportSources, build_context, label_folders, write_report
from simtoreal.evaluation.report_sections import success
from simtoreal.evaluation.results import Evaluation, load_evaluation


class _Links(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attributes if name in ("src", "href", "data", "poster")]


def test_page_is_self_contained_and_says_n_and_interval(tmp_path: Path) -> None:
    timing = {"periods": 1000, "missed_periods": 0, "p99_period_error_ms": 0.4, "period_error_histogram": HISTOGRAM}
    runs = label_folders([make_run(tmp_path / "a", "diffusion"), make_run(tmp_path / "b", "bc")], ("train", "policy"))
    sources = ReportSources(
        runs=runs,
        evaluations={
            "diffusion": make_evaluation(tmp_path / "diffusion", 18, 20),
            "bc": make_evaluation(tmp_path / "bc", 6, 20),
        },
        deployments={"diffusion": make_evaluation(tmp_path / "robot", 4, 5, backend="twin", gap="standard", **timing)},
        reproduce=["simtoreal demo"],
        total_seconds=600,
    )
    assert list(runs) == ["diffusion", "bc"]
    path = write_report(sources, tmp_path / "report.html")
    text = path.read_text()
    page = _Links()
    page.feed(text)
    outside = [source for source in page.sources if not source.startswith(("data:", "#"))]
    assert outside == []
    assert not re.search(r"@import|url\((?!#)|<script|<link", text)
    assert page.tags.count("video") == 2
    assert page.tags.count("svg") == 3
    for shown in ("18/20", "6/20", "4/5", "diffusion is better", "cannot be told from zero", "missed periods"):
        assert shown in text, shown
    # 18 of 20: Beta(19, 3) from 70 to 97 %.
    assert "95 % interval 70-97 %" in text
    assert "It is not hardware" in text
    assert "friction scale" in text
    assert "<b>the cube</b>" not in text
    assert "&lt;b&gt;the cube" in text


def test_a_gap_that_is_certain_is_reported_of_a_policy_with_one_name_in_both_worlds(tmp_path: Path) -> None:
    timing = {"periods": 1000, "missed_periods": 0, "p99_period_error_ms": 0.4, "period_error_histogram": HISTOGRAM}
    sources = ReportSources(
        evaluations={"diffusion": make_evaluation(tmp_path / "diffusion", 39, 40)},
        deployments={"diffusion": make_evaluation(tmp_path / "robot", 8, 20, backend="twin", gap="standard", **timing)},
    )
    text = write_report(sources, tmp_path / "report.html").read_text()
    assert "The gap from simulation to the &#39;standard&#39; twin is -57 percentage points" in text


def test_the_page_of_a_policy_that_was_filtered_and_improved(tmp_path: Path) -> None:
    timing = {"periods": 1000, "missed_periods": 0, "p99_period_error_ms": 0.4, "period_error_histogram": HISTOGRAM}
    robot = {"backend": "twin", "gap": "standard", **timing}
    sources = ReportSources(
        dataset=make_filtered_dataset(tmp_path / "merged"),
        filter="compatible",
        runs={"diffusion": make_run(tmp_path / "a", "diffusion")},
        cotraining=make_cotraining(tmp_path / "cotrain"),
        evaluations={
            "after": make_evaluation(tmp_path / "after", 18, 20, randomization="standard"),
            "before": make_evaluation(tmp_path / "base", 8, 20, randomization="standard"),
        },
        deployments={
            "after": make_evaluation(tmp_path / "robot_after", 19, 25, **robot),
            "before": make_evaluation(tmp_path / "robot_before", 6, 25, **robot),
        },
    )
    text = write_report(sources, tmp_path / "report.html").read_text()
    page = _Links()
    page.feed(text)
    assert [source for source in page.sources if not source.startswith(("data:", "#"))] == []
    # Simulation, robot before and after, real beside imagined.
    assert page.tags.count("video") == 4
    # Success, learning, co-training, timing.
    assert page.tags.count("svg") == 4
    steps = re.findall(r'class="step">([^<]*)<', text)
    assert steps == ["1 Demonstrate", "2 Filter", "3 Learn", "4 Practise", "5 Evaluate", "6 Deploy"]
    cells = [re.sub(r"<[^>]*>", "|", line) for line in text.splitlines() if "<td" in line]
    table = "".join(cells)
    assert re.search(r"ada \(base\)\|+1\|+15\|+0\.0 %\|+15\|+1\|", table)
    assert re.search(r"&lt;ben&gt;\|+2\|+33\|+45\.5 %\|+18\|+1\|", table)
    assert re.search(r"policy_0\|+world_model_0\|+2\|+14/20.*?17/20.*?\+15 \(-10 to \+40\)\|+80 %", table)
    assert re.search(r"real\|+demonstrations\|+16\|+800\|", table)
    assert re.search(r"imagination\|+rollouts that something was learned from\|+128\|+9,500\|", table)
    for shown in (
        "2 of 3", "few base episodes", "How it practised in imagination", "Learned from 28 real episodes",
        "+30 percentage points (95 % interval +10 to +50; p = 0.012",
        "after is better in simulation with randomization &#39;standard&#39;: after minus before",
        "after is better on the &#39;standard&#39; twin",
        "after: the gap from simulation with randomization &#39;standard&#39; to the &#39;standard&#39; twin",
        "before: the gap from simulation with", "histograms are those of the control",
    ):  # fmt: skip
        assert shown in text, shown


def test_verdicts_are_those_of_compare_and_adjusted_for_all_pairs(tmp_path: Path) -> None:
    counts = {"a": 40, "b": 34, "c": 38, "d": 39}
    arms = [load_evaluation(make_evaluation(tmp_path / name, count, 50)) for name, count in counts.items()]
    pair = compare(arms)["pairs"][0]
    assert pair["p_value"] < 0.05 < pair["p_adjusted"]
    first, *others = success(arms, [])["verdicts"]
    assert first.startswith("a and b are not distinguishable in simulation: +12 percentage points")
    assert f"p = {pair['p_adjusted']:.2g} after Bonferroni over all 6 pairs, 50 and 50 episodes" in first
    assert len(others) == 2
    (alone,) = success(arms[:2], [])["verdicts"]
    assert alone.startswith("a is better in simulation")
    assert "Bonferroni" not in alone


def test_verdicts_between_worlds_name_both_and_call_nobody_better(tmp_path: Path) -> None:
    def arm(name: str, successes: int, **extra: object) -> Evaluation:
        return load_evaluation(make_evaluation(tmp_path / name, successes, 50, **extra), name)

    nominal, shifted = arm("nominal", 48, task_digest="a"), arm("shifted", 20, task_digest="a", randomization="hard")
    (text,) = success([nominal, shifted], [])["verdicts"]
    assert text.startswith(
        "The difference from nominal (simulation) to shifted (simulation with randomization 'hard') is -56 percentage "
    )
    assert "It is not one of policies alone: different worlds" in text
    twins = [arm(gap, count, backend="twin", gap=gap) for gap, count in (("standard", 45), ("hard", 20))]
    (text,) = success([], twins)["verdicts"]
    assert text.startswith("The difference from standard ('standard' twin) to hard ('hard' twin) is -50 percentage")
    changed = arm("changed", 20, task_digest="b")
    (text,) = success([nominal, changed], [])["verdicts"]
    assert text.endswith("It is not one of policies alone: different files of task 'pick_place'.")
    texts = success([nominal], [arm("twin", 30, backend="twin", gap="standard", task_digest="b")])["verdicts"]
    assert texts[0].startswith("The gap from simulation to the 'standard' twin is -36 percentage points")
    assert texts[0].endswith("It is not one of worlds alone: different files of task 'pick_place'.")
    assert all("better" not in text for text in [*success([nominal, shifted, changed], twins)["verdicts"], *texts])
    both = success([nominal, shifted, changed], [])["verdicts"]
    assert [text.count("after Bonferroni over 2 differences between worlds") for text in both] == [1, 1]


def test_every_stage_is_reproduced_although_training_and_evaluation_are_called_alike(tmp_path: Path) -> None:
    made = {
        "training": make_run(tmp_path / "run", "diffusion"),
        "evaluation": make_evaluation(tmp_path / "evaluation", 9, 10, label="diffusion"),
        "deployment": make_evaluation(tmp_path / "robot", 4, 5, label="diffusion", backend="twin", gap="standard"),
    }
    for kind, folder in made.items():
        content = json.loads((folder / "results.json").read_text())
        source = {"command": f"simtoreal {kind}", "commit": f"commit of {kind}"}
        write_json(folder / "results.json", {**content, "provenance": source})
    context = build_context(
        ReportSources(
            runs=label_folders([made["training"]], ("train", "policy")),
            evaluations=label_folders([made["evaluation"]], ("label",)),
            deployments=label_folders([made["deployment"]], ("label",)),
        )
    )
    assert context["reproduce"] == [f"simtoreal {kind}" for kind in made]
    (table,) = [block["table"] for block in context["details"] if block["title"] == "Source of every result"]
    assert table["rows"] == [[f"{kind} of diffusion", f"commit of {kind}"] for kind in made]
    sessions = [{"commit": commit} for commit in ("first", "first", "second")]
    folder = make_evaluation(tmp_path / "continued", 9, 10, sessions=sessions)
    details = build_context(ReportSources(evaluations={"x": folder}))["details"]
    assert details[-1]["table"]["rows"] == [["evaluation of x", "first, second"]]


def test_what_limits_a_deployment_is_on_the_page(tmp_path: Path) -> None:
    note = "the machine was too slow for the twin"
    robot = make_evaluation(tmp_path / "robot", 4, 5, backend="twin", gap="standard", notes=[note])
    notes = build_context(ReportSources(deployments={"diffusion": robot}))["notes"]
    assert f"diffusion, 'standard' twin: {note}" in notes


def test_policies_are_said_to_have_seen_the_same_data_only_if_they_did(tmp_path: Path) -> None:
    prints = {"a": "x", "b": "x", "c": "y", "old": ""}
    runs = {name: make_run(tmp_path / name, "bc", fingerprint=fingerprint) for name, fingerprint in prints.items()}

    def text(*names: str) -> str:
        return build_context(ReportSources(runs={name: runs[name] for name in names}))["learning"]["text"]

    assert text("a", "b").startswith("All policies saw the same demonstrations.")
    assert text("a", "b", "c").startswith("The policies did not see the same demonstrations")
    assert text("a", "old").startswith(
        "Whether all policies saw the same demonstrations is not known: no checkpoint of old says"
    )


def test_there_may_be_more_runs_and_deployments_than_colours(tmp_path: Path) -> None:
    timing = {"period_error_histogram": HISTOGRAM, "p99_period_error_ms": 0.4}
    count = len(COLORS) + 1
    curves = {str(index): [(1.0, 2.0), (2.0, 1.0)] for index in range(count)}
    lines = learning_plot({"loss": curves}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == count
    panels = timing_plot({str(index): timing for index in range(count)}).axes
    assert [bool(panel.patches) for panel in panels] == [True] * count


def test_a_video_beside_the_page_is_left_alone(tmp_path: Path) -> None:
    env = make_vector_env("reach", 1, image_size=32, record_state=True)
    with DatasetWriter(tmp_path / "data", env.embodiment, {"reach": env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task="reach", embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, ScriptedExpert(env.task, env.embodiment), range(1), listeners=[recorder])
    env.close()
    own = tmp_path / "demonstration.mp4"
    own.write_text("my own video")
    command.main(command.Config(data=tmp_path / "data", output=tmp_path / "report.html"))
    assert own.read_text() == "my own video"
    page = _Links()
    page.feed((tmp_path / "report.html").read_text())
    assert page.tags.count("video") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"data", "demonstration.mp4", "report.html"}


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    path = write_report(ReportSources(evaluations={"x": make_evaluation(tmp_path / "x", 3, 4)}), tmp_path / "r.html")
    text = path.read_text()
    assert "How often it succeeds" in text
    for section in ("How it learned", "How the robot was driven", "Which demonstrations", "How it practised"):
        assert section not in text
    with pytest.raises(SimtorealError, match="at least one of"):
        write_report(ReportSources(), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="finish the command"):
        write_report(ReportSources(runs={"a": tmp_path / "nothing"}), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="'train' is missing"):
        write_report(ReportSources(runs={"a": tmp_path / "x"}), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="is not from 'simtoreal cotrain'"):
        write_report(ReportSources(cotraining=tmp_path / "x"), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="filter 'compatible' is part of a dataset"):
        write_report(ReportSources(runs={"a": tmp_path / "x"}, filter="compatible"), tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_video_round_trip_and_bad_frames(tmp_path: Path) -> None:
    frames = [frame[:31, :63] for frame in make_frames()]
    path = write_video(tmp_path / "a.mp4", iter(frames), 20, scale=3)
    read = read_video(path)
    assert read.shape == (12, 94, 190, 3)  # Odd sizes are padded by one.
    difference = np.abs(read[:, 1:93:3, 1:189:3].astype(int) - np.stack(frames))
    assert difference.mean() < 4
    with pytest.raises(ConfigError, match="no frames"):
        write_video(tmp_path / "b.mp4", [], 20)
    with pytest.raises(ConfigError, match="frame 1: shape"):
        write_video(tmp_path / "b.mp4", [frames[0], frames[0][:10]], 20)
    with pytest.raises(ConfigError, match="expected uint8"):
        write_video(tmp_path / "b.mp4", [frames[0].astype(np.float32)], 20)
    with pytest.raises(ConfigError, match="fps is nan"):
        write_video(tmp_path / "b.mp4", frames, float("nan"))
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    (tmp_path / "c.mp4").write_bytes(path.read_bytes()[:200])
    with pytest.raises(SimtorealError, match="not a readable video"):
        read_video(tmp_path / "c.mp4")


def test_contact_sheets(tmp_path: Path) -> None:
    frames = make_frames(3)
    sheet = tile(frames, columns=2, labels=["one", "two", "a label that is far too long for its cell"], gap=4)
    assert sheet.shape == (2 * (32 + 18) + 4, 2 * 64 + 4, 3)
    assert np.array_equal(sheet[18:50, :64], frames[0])
    assert sheet[:18, :64].max() > 200  # The text is drawn.
    with pytest.raises(ConfigError, match="2 labels"):
        tile(frames, labels=["one", "two"])
    videos = {name: write_video(tmp_path / f"{name}.mp4", frames, 10) for name in ("x", "y")}
    assert film_strip(videos, columns=3, height=64).shape == (2 * (64 + 26) + 4, 3 * 128 + 8, 3)


RENDER = runpy.run_path(str(Path(__file__).parent.parent / "benchmarks" / "render_results.py"))


def _measurement(name: str) -> dict[str, object]:
    return {
        "name": name,
        "question": "Is it faster?",
        "command": "python benchmarks/x.py",
        "commit": "0123456789abcdef",
        "seeds": [0, 1],
        "machine": {"cpu": "cpu", "cores": 2},
        "versions": {"python": "3.11"},
        "seconds": 3.0,
        "headline": {
            "metric": "steps/s", "ours": 1200.0, "baseline": 600.0, "baseline_name": "peer", "ratio": 2.0,
            "difference": None, "interval": [1.8, 2.2], "n": 7, "p_value": None,
        },
        "arms": [{"name": "ours", "value": 1200.0, "n": 7, "interval": None}],
        "notes": ["median of 7 rounds"],
    }  # fmt: skip


def test_results_page_is_generated_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "speed.json", _measurement("speed"))
    options = ["--results", str(tmp_path), "--output", str(tmp_path / "results.md")]
    assert RENDER["main"]([*options, "--check"]) == 1
    assert RENDER["main"](options) == 0
    assert RENDER["main"]([*options, "--check"]) == 0
    text = (tmp_path / "results.md").read_text()
    assert "| [speed](#speed) | steps/s | **1,200** | 600 (peer) | 2.00x [1.8, 2.2] | 7 |" in text
    assert "median of 7 rounds" in text
    content = _measurement("speed")
    del content["seeds"]
    write_json(tmp_path / "speed.json", content)
    assert RENDER["main"](options) == 2
    assert "key 'seeds' is missing" in capsys.readouterr().err
