"""The report page: self-contained, honest about n, and made from whatever is there. And the generated results page."""

from __future__ import annotations

import html.parser
import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest

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
        deployment=_evaluation(tmp_path / "robot", 4, 5, backend="twin", gap="standard", **timing),
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


def test_what_is_missing_is_left_out(tmp_path: Path) -> None:
    path = write_report(ReportSources(evaluations={"x": _evaluation(tmp_path / "x", 3, 4)}), tmp_path / "r.html")
    text = path.read_text()
    assert "How often it succeeds" in text
    assert "How it learned" not in text
    assert "How the robot was driven" not in text
    with pytest.raises(SimtorealError, match="at least one of"):
        write_report(ReportSources(), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="finish the command"):
        write_report(ReportSources(runs={"a": tmp_path / "nothing"}), tmp_path / "none.html")
    with pytest.raises(SimtorealError, match="'train' is missing"):
        write_report(ReportSources(runs={"a": tmp_path / "x"}), tmp_path / "none.html")
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
