"""The report page: self-contained, honest about n, and made from whatever is there. And the generated results page."""

from __future__ import annotations

import html.parser
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from toy_dataset import make_dataset

from simtoreal.data_collection.compatibility import Scores
from simtoreal.data_collection.filters import Filter, FilteredEpisode, write_filter
from simtoreal.envs.errors import ConfigError, SimtorealError
from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.envs.video import read_video, tile, write_video
from simtoreal.evaluation.film import film_strip
from simtoreal.evaluation.report import ReportSources, label_folders, write_report
from simtoreal.evaluation.results import append_episode, summarize

HISTOGRAM = {"edges_ms": [0.0, 0.1, 1.0, 10.0], "counts": [900, 90, 9, 1]}


def _frames(count: int = 12) -> list[np.ndarray]:
    ramp = np.linspace(0, 200, 64 * 32).reshape(32, 64).astype(np.uint8)
    return [np.stack([np.roll(ramp, step, axis=1)] * 3, axis=-1) for step in range(count)]


def _evaluation(folder: Path, successes: int, n: int, **extra: object) -> Path:
    episodes = [
        EpisodeResult(
            episode=index,
            seed=100_000 + index,
            success=index < successes,
            steps=50,
            duration_s=2.5,
            milestones={"grasped": index < successes + 1},
            instruction="put <b>the cube</b> away",
            failure="" if index < successes else "timeout",
        )
        for index in range(n)
    ]
    for episode in episodes:
        append_episode(folder, episode)
    write_video(folder / "videos" / "success_100000.mp4", _frames(), 20)
    videos = [{"file": "videos/success_100000.mp4", "seed": 100_000, "success": True, "outside": False}]
    content = {"task": "pick_place", "label": folder.name, "videos": videos, **summarize(episodes), **extra}
    write_json(folder / "results.json", {**content, "provenance": provenance()})
    return folder


def _run(folder: Path, policy: str) -> Path:
    folder.mkdir(parents=True)
    lines = [{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in range(10, 200, 10)]
    lines.append({"step": 100, "validation_error": 0.1, "validation_error_per_step": [0.1, 0.2]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11')
    train = {"policy": policy, "seconds": 300.0, "steps": 190, "parameters": 2_800_000, "validation_error": 0.1}
    write_json(folder / "results.json", {"train": train, "provenance": provenance()})
    return folder


def _cotraining(folder: Path) -> Path:
    """What 'simtoreal cotrain' leaves behind, as far as a report reads it."""

    def rate(successes: int) -> dict[str, object]:
        return {"success_rate": successes / 20, "successes": successes, "n": 20, "interval": [0.2, 0.6]}

    def measured(iteration: int, policy: str, real: int, imagined: int) -> dict[str, object]:
        gap = {"gap": (imagined - real) / 20, "gap_interval": [-0.1, 0.4], "agreement": 0.8}
        both = {"real": rate(real), "imagined": rate(imagined), "world_model": "world_model_0"}
        return {"iteration": iteration, "policy": policy, **both, **gap}

    write_video(folder / "both.mp4", _frames(), 20)
    taken = [("real", "demonstrations", 16, 800), ("real", "learning", 12, 900), ("real", "evaluation", 20, 1500)]
    taken += [("imagination", "learning", 64, 5000), ("imagination", "learning", 64, 4500)]
    content = {
        "kind": "cotrain", "task": "pick_place", "base": rate(8), "final": rate(14), "real_episodes": 28,
        "real_steps": 1700, "settings": {"real": {"randomization": "none"}}, "videos": ["both.mp4"],
        "comparison": {"difference": 0.3, "difference_interval": [0.1, 0.5], "p_value": 0.012},
        "measurements": [
            {"iteration": 0, "policy": "base", "real": rate(8)},
            measured(0, "base", 8, 10),
            measured(2, "policy_0", 14, 17),
        ],
        "iterations": [{"iteration": 1, "success": 0.5}, {"iteration": 2, "success": 0.7}],
        "ledger": [dict(zip(("world", "purpose", "episodes", "steps"), entry, strict=True)) for entry in taken],
    }  # fmt: skip
    write_json(folder / "results.json", {**content, "provenance": provenance()})
    return folder


def _filtered(folder: Path) -> Path:
    """A dataset with a filter: one episode of the base operator, one accepted and one rejected of another."""
    dataset = make_dataset(folder, 3)
    verdicts, keep, scores = {}, {}, {}
    for index, episode in enumerate(dataset.episodes):
        bad = 5 * index
        verdicts[episode.name] = FilteredEpisode(
            steps=episode.steps, seed=episode.seed, operator="<ben>" if index else "ada", mode="static",
            base=index == 0, compatibility=0.5, bad_steps=bad, kept_steps=episode.steps - bad, accepted=index < 2,
        )  # fmt: skip
        keep[episode.name] = np.arange(episode.steps) >= bad
        scores[episode.name] = Scores(np.zeros(episode.steps, np.float32), np.zeros(episode.steps, np.float32))
    report = {"warnings": {"static": "few base episodes"}}
    made = Filter(
        name="compatible", settings={}, thresholds={}, episodes=verdicts, keep=keep, scores=scores, report=report
    )
    write_filter(folder, made)
    return folder


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
    runs = label_folders([_run(tmp_path / "a", "diffusion"), _run(tmp_path / "b", "bc")], ("train", "policy"))
    sources = ReportSources(
        runs=runs,
        evaluations={
            "diffusion": _evaluation(tmp_path / "diffusion", 18, 20),
            "bc": _evaluation(tmp_path / "bc", 6, 20),
        },
        deployments={"diffusion": _evaluation(tmp_path / "robot", 4, 5, backend="twin", gap="standard", **timing)},
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


def test_the_page_of_a_policy_that_was_filtered_and_improved(tmp_path: Path) -> None:
    timing = {"periods": 1000, "missed_periods": 0, "p99_period_error_ms": 0.4, "period_error_histogram": HISTOGRAM}
    robot = {"backend": "twin", "gap": "standard", **timing}
    sources = ReportSources(
        dataset=_filtered(tmp_path / "merged"),
        filter="compatible",
        runs={"diffusion": _run(tmp_path / "a", "diffusion")},
        cotraining=_cotraining(tmp_path / "cotrain"),
        evaluations={"after": _evaluation(tmp_path / "after", 18, 20), "before": _evaluation(tmp_path / "base", 8, 20)},
        deployments={
            "after": _evaluation(tmp_path / "robot_after", 19, 25, **robot),
            "before": _evaluation(tmp_path / "robot_before", 6, 25, **robot),
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
        "after is better in simulation: after minus before", "after is better on the &#39;standard&#39; twin",
        "after: the gap from simulation", "before: the gap from simulation", "histograms are those of the control",
    ):  # fmt: skip
        assert shown in text, shown


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    path = write_report(ReportSources(evaluations={"x": _evaluation(tmp_path / "x", 3, 4)}), tmp_path / "r.html")
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
    frames = [frame[:31, :63] for frame in _frames()]
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
    frames = _frames(3)
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
