"""Small folders of evaluations, trainings, a filter and a co-training, as the commands leave them behind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from toy_dataset import make_dataset

from simtoreal.data_collection.compatibility import Scores
from simtoreal.data_collection.filters import Filter, FilteredEpisode, write_filter
from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.envs.video import write_video
from simtoreal.evaluation.results import append_episode, summarize

HISTOGRAM = {"edges_ms": [0.0, 0.1, 1.0, 10.0], "counts": [900, 90, 9, 1]}


def make_frames(count: int = 12) -> list[np.ndarray]:
    ramp = np.linspace(0, 200, 64 * 32).reshape(32, 64).astype(np.uint8)
    return [np.stack([np.roll(ramp, step, axis=1)] * 3, axis=-1) for step in range(count)]


def make_evaluation(folder: Path, successes: int, n: int, **extra: object) -> Path:
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
    write_video(folder / "videos" / "success_100000.mp4", make_frames(), 20)
    videos = [{"file": "videos/success_100000.mp4", "seed": 100_000, "success": True, "outside": False}]
    content = {"task": "pick_place", "label": folder.name, "videos": videos, **summarize(episodes), **extra}
    write_json(folder / "results.json", {**content, "provenance": provenance()})
    return folder


def make_run(folder: Path, policy: str, *, fingerprint: str = "") -> Path:
    folder.mkdir(parents=True)
    if fingerprint:
        checkpoint = folder / "checkpoints" / "000190"
        write_json(checkpoint / "training.json", {"data": {"fingerprint": fingerprint}})
        for name in ("model.safetensors", "config.yaml"):
            (checkpoint / name).touch()
    lines = [{"step": step, "loss": 1.0 / step, "grad_norm": 1.0} for step in range(10, 200, 10)]
    lines.append({"step": 100, "validation_error": 0.1, "validation_error_per_step": [0.1, 0.2]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 11')
    train = {"policy": policy, "seconds": 300.0, "steps": 190, "parameters": 2_800_000, "validation_error": 0.1}
    write_json(folder / "results.json", {"train": train, "provenance": provenance()})
    return folder


def make_cotraining(folder: Path) -> Path:
    """What 'simtoreal cotrain' leaves behind, as far as a report reads it."""

    def rate(successes: int) -> dict[str, object]:
        return {"success_rate": successes / 20, "successes": successes, "n": 20, "interval": [0.2, 0.6]}

    def measured(iteration: int, policy: str, real: int, imagined: int) -> dict[str, object]:
        gap = {"gap": (imagined - real) / 20, "gap_interval": [-0.1, 0.4], "agreement": 0.8}
        both = {"real": rate(real), "imagined": rate(imagined), "world_model": "world_model_0"}
        return {"iteration": iteration, "policy": policy, **both, **gap}

    write_video(folder / "both.mp4", make_frames(), 20)
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


def make_filtered_dataset(folder: Path) -> Path:
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
