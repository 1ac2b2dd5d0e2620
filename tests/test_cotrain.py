"""Co-training: the whole loop, its costs and its continuation, with nets that learn nothing in images of 16 pixels."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from report_folders import make_filtered_dataset
from small_world import RESIDUAL, make_world_data, short_training
from toy_reaching import small_vision

import simtoreal.configs
from simtoreal import cli
from simtoreal.commands import cotrain
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.edit import merge
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.rollouts import record_rollouts
from simtoreal.demo_report import measured_folders
from simtoreal.envs import load_task, make_vector_env
from simtoreal.envs.config import build_config, read_yaml
from simtoreal.envs.errors import ConfigError, DatasetError, EmbodimentMismatchError, SimtorealError
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.envs.task_file import parse_task
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.evaluation.report import ReportSources, write_report
from simtoreal.evaluation.results import load_evaluation
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.checkpoint import load_policy, load_tensors
from simtoreal.policies.config import BCConfig, DiffusionConfig, TrainerConfig
from simtoreal.policies.exploring_actor import ExploringActor
from simtoreal.policies.mixed_windows import open_mixed_data
from simtoreal.policies.reinforcement import Reinforcement
from simtoreal.policies.reinforcement_config import ExplorationConfig, ReinforcementConfig
from simtoreal.policies.reinforcement_run import reinforce
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import batch_indices, open_training_data
from simtoreal.policies.training_log import read_metrics
from simtoreal.world_models import cotrain_measurement, ranking, trainer
from simtoreal.world_models.checkpoint import load_world_model, save_world_model
from simtoreal.world_models.config import DynamicsConfig, StageConfig, WorldModelConfig
from simtoreal.world_models.cotrain_anchor import anchor_on
from simtoreal.world_models.cotrain_config import KeyframeConfig, MeasurementConfig, RlcoConfig, WovrConfig
from simtoreal.world_models.cotrain_measurement import World
from simtoreal.world_models.cotrain_stages import LEARNING, REAL
from simtoreal.world_models.learned_episodes import learned_seeds
from simtoreal.world_models.ranking import compare_ranks, rank_rollouts, reached_probability
from simtoreal.world_models.reward_calibration import MOST_THRESHOLD, matching_threshold
from simtoreal.world_models.rlco import Rlco
from simtoreal.world_models.video_data import open_video_data
from simtoreal.world_models.world_model import WorldModel, fit_world_statistics
from simtoreal.world_models.wovr import Wovr

torch.set_num_threads(1)

TASK = load_task("reach")
DIFFUSION = DiffusionConfig(
    vision=small_vision(), horizon=8, execute_steps=4, unet_widths=(16,), condition_width=32, inference_steps=2,
    noise_samples=2,
)  # fmt: skip
IMITATION = TrainerConfig(
    steps=30, batch_size=16, warmup_steps=5, learning_rate=3e-3, checkpoint_every=100, validate_every=100
)
WOVR = WovrConfig(
    rollouts=8, refreshes=1, refresh_rollouts=4, iterations=2, ranked_starts=2, imagined_envs=12, anchor_batch=8,
    calibrated_episodes=4, graded=True,
    keyframes=KeyframeConfig(margin_steps=4, remaining_steps=10, lead_steps=(2, 6)),
    world_model=RESIDUAL,
    world_model_trainer=short_training(
        tokenizer=StageConfig(steps=40, batch_size=8, learning_rate=3e-3, warmup_steps=5),
        dynamics=StageConfig(steps=30, batch_size=8, learning_rate=2e-3, warmup_steps=5),
        classifier=StageConfig(steps=20, batch_size=16, learning_rate=2e-3, warmup_steps=5),
    ),
)  # fmt: skip
# PPO learns from every rollout, also where a model this small sees no success at all; GRPO would change nothing then.
REINFORCEMENT = ReinforcementConfig(algorithm="ppo", rollouts=12, denoising_steps=2, epochs=1, max_chunks=5)
MEASUREMENT = MeasurementConfig(episodes=4, videos=1)


def simulation(randomization: str = "none", num_envs: int = 4, **changes) -> World:
    def make():
        return make_vector_env(TASK, num_envs, image_size=16, randomization=randomization, **changes)

    return World(make=make, task=TASK, settings={"randomization": randomization})


@pytest.fixture(scope="module", autouse=True)
def few_ranked_rollouts() -> Iterator[None]:
    """Three from each start instead of eight, which takes half a minute of all these loops."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cotrain_measurement, "RANKED_ROLLOUTS", 3)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_world_data(tmp_path_factory.mktemp("demonstrations") / "data", episodes=8)


@pytest.fixture(scope="module")
def policy(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("base") / "policy"
    train(DIFFUSION, IMITATION, open_training_data(data, DIFFUSION), run, device="cpu")
    return run


def wovr(output: Path, data: Path, policy: Path, **changes) -> Wovr:
    values = {
        "policy": policy, "demonstrations": [data], "real": simulation(), "output": output, "device": "cpu",
    }  # fmt: skip
    return Wovr(
        changes.pop("config", WOVR), changes.pop("reinforcement", REINFORCEMENT),
        changes.pop("measurement", MEASUREMENT), **{**values, **changes},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(data, policy, tmp_path_factory) -> Path:
    """A whole loop."""
    output = tmp_path_factory.mktemp("wovr") / "output"
    wovr(output, data, policy).run()
    return output


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def outcome(output: Path) -> tuple:
    """What a co-training found, without how long it took."""
    results = results_of(output)
    for measurement in results["measurements"]:
        measurement.pop("seconds", None)
        if measurement["policy"] == "base":  # Where it lies, seen from the output.
            measurement.pop("run")
    kept = (
        "base",
        "final",
        "measurements",
        "calibrations",
        "rankings",
        "iterations",
        "ledger",
        "comparison",
        "dropped_rollouts",
    )
    return tuple(results[key] for key in kept)


# --- WoVR ------------------------------------------------------------------------------------------------------------


def test_the_whole_loop_leaves_a_policy_and_what_it_found(finished, policy):
    results = results_of(finished)
    assert [line["iteration"] for line in results["iterations"]] == [1, 2, 3, 4]
    names = [point["policy"] for point in results["measurements"] if "imagined" in point]
    assert names == ["base", "policy_0", "policy_0", "policy_1"]
    for point in results["measurements"]:
        if "imagined" in point:
            gap = point["imagined"]["success_rate"] - point["real"]["success_rate"]
            assert point["gap"] == pytest.approx(gap)
            # A posterior: where every rollout of one world succeeds, and none of the other, the gap of 1 lies outside.
            low, high = point["gap_interval"]
            assert -1 < low < high < 1
            assert low <= gap <= high or abs(gap) == 1
            assert point["real"]["n"] == point["imagined"]["n"] == 4
    # Real and imagined episodes begin in the same initial conditions, in order.
    folder = finished / "measurements"
    seeds = load_evaluation(folder / "policy_1" / "real").seeds
    assert seeds == load_evaluation(folder / "imagined_policy_1" / "imagined").seeds == tuple(range(100_000, 100_004))
    assert load_evaluation(folder / "imagined_policy_1" / "imagined").backend == "world_model"
    assert len(results["videos"]) == 2
    assert all((finished / video).stat().st_size > 1000 for video in results["videos"])
    assert (finished / "success.png").stat().st_size > 5000
    changed = load_policy(finished / "policy")
    before, after = load_policy(policy).policy.state_dict(), changed.policy.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    # The image encoder is frozen; everything else may move, and something did.
    assert moved
    assert not any(name.startswith("encoder.images") for name in moved)
    assert changed.config.inference_steps == REINFORCEMENT.denoising_steps


def test_rollouts_from_the_same_start_are_ranked_before_practising(finished):
    results = results_of(finished)
    assert [one["world_model"] for one in results["rankings"]] == ["calibrated_model_0", "calibrated_model_1"]
    for found in results["rankings"]:
        assert (found["starts"], found["rollouts"]) == (2, 6)
        assert 0 <= found["imagined_success"] <= 1
    # They are evaluations, and nothing learns from them.
    taken = [row for row in results["ledger"] if row["stage"].startswith("rank_model")]
    assert [(row["purpose"], row["episodes"]) for row in taken] == [("evaluation", 6)] * 2
    folder = finished / "measurements" / "rank_model_0"
    first, second = (Dataset.open(folder / f"rollouts_{number}") for number in (0, 1))
    assert [one.seed for one in first.episodes] == [one.seed for one in second.episodes] == [100_000, 100_001]
    one, other = (dataset.read(dataset.episodes[0], ["actions"])["actions"][0] for dataset in (first, second))
    assert not np.array_equal(one, other)


def test_the_policy_succeeds_as_often_in_imagination_as_it_really_did(finished):
    first, second = results_of(finished)["calibrations"]
    assert (first["world_model"], second["world_model"]) == ("calibrated_model_0", "calibrated_model_1")
    model, calibrated = (load_world_model(finished / name) for name in ("world_model_1", "calibrated_model_1"))
    assert second["before"] == pytest.approx(float(model.model.classifier.threshold))
    assert second["threshold"] == pytest.approx(float(calibrated.model.classifier.threshold))
    assert calibrated.training["calibration"]["threshold"] == second["threshold"]
    changed = {
        name
        for name, value in model.model.state_dict().items()
        if not torch.equal(value, calibrated.model.state_dict()[name])
    }
    assert changed <= {"classifier.threshold"}
    dataset = Dataset.open(finished / "rollouts_1")
    assert (second["episodes"], second["real"]) == (4, np.mean([one.success for one in dataset.episodes]))


def test_the_matching_threshold_lets_as_many_succeed():
    reached = np.array([0.2, 0.9, 0.4, 0.7])
    for successes in (1, 2, 3):
        assert (reached >= matching_threshold(reached, successes, 0.05)).sum() == successes
    assert matching_threshold(reached, 2, 0.05) == pytest.approx(0.55)
    # What the classifier takes for a failure is none the better for succeeding really.
    assert matching_threshold(reached, 3, 0.5) == 0.5
    assert matching_threshold(np.array([0.01, 0.001]), 1, 0.4) == 0.4
    # A model that sees success everywhere is not believed.
    assert matching_threshold(np.ones(3), 1, 0.5) == MOST_THRESHOLD < 1
    # Policies that always or never succeeded.
    assert matching_threshold(reached, 0, 0.05) == pytest.approx(0.95)
    assert matching_threshold(reached, 4, 0.05) == pytest.approx(0.1)
    # Where many reach the same, the nearer number, and of two as near the stricter.
    tied = np.array([0.9, 0.9, 0.9, 0.3])
    assert [(tied >= matching_threshold(tied, count, 0.05)).sum() for count in range(5)] == [0, 0, 3, 3, 4]
    tied = np.array([0.9, 0.9])
    assert (tied >= matching_threshold(tied, 1, 0.05)).sum() == 0


def test_rollouts_that_could_not_be_imagined_do_not_count_in_the_ranking(finished, monkeypatch):
    data = open_video_data([finished / "measurements" / "rank_model_0" / f"rollouts_{number}" for number in (0, 1)])
    model = load_world_model(finished / "calibrated_model_0").model

    def ranked(bad: int) -> dict:
        reached = np.linspace(0.1, 0.9, len(data.ends))
        reached[:bad] = np.nan
        monkeypatch.setattr(ranking, "reached_probability", lambda *_: reached)
        return rank_rollouts(model, data, graded=True)

    assert (ranked(0)["rollouts"], ranked(0)["dropped"]) == (4, 0)
    found = ranked(1)
    assert (found["rollouts"], found["dropped"]) == (3, 1)
    json.dumps(found, allow_nan=False)
    with pytest.raises(SimtorealError, match="none of 4 rollouts"):
        ranked(4)


def test_a_model_that_only_knows_which_scenes_are_hard_ranks_nothing():
    """Two starts: in the first both rollouts look like successes, in the second like failures; half of them are."""
    success, starts = np.array([True, False, True, False]), np.array([7, 7, 9, 9])
    blind = compare_ranks(np.array([0.9, 0.9, 0.1, 0.1]), 0.5, success, starts)
    assert (blind["same_start"], blind["same_start_pairs"]) == (0.5, 2)
    assert (blind["other_start"], blind["other_start_pairs"]) == (0.5, 2)
    assert blind["advantage_correlation"] is None
    knowing = compare_ranks(np.array([0.9, 0.2, 0.4, 0.1]), 0.3, success, starts)
    assert (knowing["same_start"], knowing["advantage_correlation"]) == (1.0, pytest.approx(1.0))
    wrong = compare_ranks(np.array([0.2, 0.9, 0.4, 0.1]), 0.3, success, starts)
    assert (wrong["same_start"], wrong["advantage_correlation"]) == (0.5, pytest.approx(0.0))
    # All that are imagined fail, by different distances: worth nothing where only success is rewarded.
    failing = np.array([0.3, 0.1, 0.2, 0.1])
    assert compare_ranks(failing, 0.5, success, starts)["advantage_correlation"] is None
    assert compare_ranks(failing, 0.5, success, starts, graded=True)["advantage_correlation"] > 0.9
    # Success after the end of a rollout of the reinforcement does not count.
    clips = SimpleNamespace(
        episodes=range(2), starts=[0, 5], ends=[5, 10],
        success_probability=np.array([1.0, 0.1, 0.2, 0.8, 0.9, 1.0, 0.3, 0.4, 0.1, 0.0]),
    )  # fmt: skip
    assert reached_probability(clips, 2).tolist() == [0.8, 0.3]
    assert reached_probability(clips, 2, 3).tolist() == [0.2, 0.3]
    assert reached_probability(clips, 2, 1).tolist() == [0.0, 0.0]
    nothing = compare_ranks(np.array([0.9, 0.9]), 0.5, np.array([True, True]), np.array([1, 1]))
    assert (nothing["same_start"], nothing["same_start_pairs"], nothing["advantage_correlation"]) == (None, 0, None)


def test_the_policy_is_evaluated_by_the_usual_command(finished, tmp_path):
    cli.run(["evaluate", "--policy", str(finished / "policy"), "--episodes", "2", "--videos", "0", "--seed", "900000",
             "--output", str(tmp_path), "--num-envs", "2", "--device", "cpu"])  # fmt: skip
    assert load_evaluation(tmp_path).task == "reach"
    with pytest.raises(ConfigError, match="initial conditions of the training demonstrations"):
        cli.run(["evaluate", "--policy", str(finished / "policy"), "--episodes", "2", "--videos", "0", "--seed",
                 str(WOVR.first_seed), "--output", str(tmp_path / "seen"), "--device", "cpu"])  # fmt: skip


def test_a_report_shows_what_it_changed(finished, tmp_path):
    base, final = measured_folders(finished)
    sources = ReportSources(cotraining=finished, evaluations={"improved": final, "base": base})
    text = write_report(sources, tmp_path / "report.html").read_text()
    assert f"Learned from {results_of(finished)['real_episodes']} real episodes" in text
    for shown in ("How it practised in imagination", "after 4 iterations", "calibrated_model_1"):
        assert shown in text, shown


def test_every_real_step_is_counted(finished, data):
    results = results_of(finished)
    datasets = [Dataset.open(path) for path in (data, finished / "rollouts_0", finished / "rollouts_1")]
    assert [len(dataset.episodes) for dataset in datasets] == [8, 8, 4]
    steps = [sum(episode.steps for episode in dataset.episodes) for dataset in datasets]
    assert (results["real_episodes"], results["real_steps"]) == (20, sum(steps))
    learned = [row for row in results["ledger"] if (row["world"], row["purpose"]) == (REAL, LEARNING)]
    assert [(row["stage"], row["episodes"], row["steps"]) for row in learned] == [
        ("rollouts_0", 8, steps[1]), ("rollouts_1", 4, steps[2]),
    ]  # fmt: skip
    assert [row["real_steps"] for row in learned] == [steps[0] + steps[1], sum(steps)]
    # Measurements are listed, with the steps that the episodes took.
    measured = [row for row in results["ledger"] if row["purpose"] == "evaluation" and row["world"] == REAL]
    folder = finished / "measurements" / "base" / "real"
    assert measured[0]["steps"] == sum(episode.steps for episode in load_evaluation(folder).episodes)
    imagined = [row for row in results["ledger"] if row["world"] == "imagination" and row["purpose"] == LEARNING]
    practised = [row for row in imagined if row["stage"].startswith("reinforcement")]
    assert sum(row["episodes"] for row in practised) == 4 * REINFORCEMENT.rollouts
    assert sum(row["steps"] for row in practised) == sum(line["control_steps"] for line in results["iterations"])
    assert [(row["stage"], row["episodes"]) for row in imagined if row not in practised] == [
        ("calibrate_model_0", 4), ("calibrate_model_1", 4),
    ]  # fmt: skip


def test_a_third_of_the_imagined_rollouts_begins_in_key_frames(finished):
    iterations = results_of(finished)["iterations"]
    assert [line["rollouts_from_keyframes"] for line in iterations] == [4] * 4
    record = json.loads((finished / "stages" / "reinforcement_0_2.json").read_text())
    assert record["contexts"]["beginnings"] == 16
    assert sum(record["contexts"]["reasons"].values()) == record["contexts"]["keyframes"] > 0


class Interrupted(Exception):
    pass


def test_interrupted_anywhere_it_ends_as_if_nothing_had_happened(finished, data, policy, tmp_path, monkeypatch):
    """In the middle of a collection, a training, reinforcement and a measurement."""
    places = {
        (TabletopVectorEnv, "step"): 100,
        (trainer._Training, "_metrics"): 2,
        (Reinforcement, "update"): 1,
        (Reinforcement, "iterate"): 2,
    }
    # The same folder may be written in two ways.
    spellings = itertools.cycle([tmp_path, Path(os.path.relpath(tmp_path))])
    for (owner, name), last in places.items():
        original, calls = getattr(owner, name), iter(range(10**9))

        def interrupting(self, *args, original=original, calls=calls, last=last, **kwargs):
            if next(calls) == last:
                raise Interrupted
            return original(self, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupting)
            with pytest.raises(Interrupted):
                wovr(next(spellings), data, policy).run()
    wovr(next(spellings), data, policy).run()
    assert outcome(tmp_path) == outcome(finished)
    for run in ("world_model_1", "reinforcement_0", "reinforcement_1"):
        for file in ("model.safetensors", "state.safetensors"):
            mine, theirs = (load_tensors(one / run / "checkpoints" / "last" / file) for one in (tmp_path, finished))
            assert [name for name in theirs if not torch.equal(mine[name], theirs[name])] == []
    # A finished one is not begun again.
    before = (tmp_path / "results.json").stat().st_mtime_ns
    wovr(tmp_path, data, policy, notify=lambda text: pytest.fail(f"did it again: {text}")).run()
    assert (tmp_path / "results.json").stat().st_mtime_ns > before
    with pytest.raises(ConfigError, match=r"wovr\.iterations: 2 there, 3 now"):
        wovr(tmp_path, data, policy, config=dataclasses.replace(WOVR, iterations=3)).run()
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "task_digest": "of another goal"}))
    with pytest.raises(ConfigError, match="task_digest: of another goal there"):
        wovr(tmp_path, data, policy).run()
    # Earlier versions did not note it.
    del settings["task_digest"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    wovr(tmp_path, data, policy).run()


def test_arms_of_a_comparison_share_what_they_have_in_common(finished, data, policy, tmp_path):
    """Without refresh: what the whole loop did with its first world model, and then on with the same model."""
    config = dataclasses.replace(WOVR, refreshes=0, iterations=3)
    measurement = dataclasses.replace(MEASUREMENT, every=2)
    arm = wovr(tmp_path / "arm", data, policy, config=config, measurement=measurement)
    begun = ("demonstrations", "measure_base", "rollouts_0", "world_model_0", "calibrate_model_0")
    shared = [*begun, "measure_model_0", "reinforcement_0_2"]
    varied = ["wovr.refreshes", "wovr.iterations", "measurement.every"]
    with pytest.raises(ConfigError, match="has not finished its stage 'measure_policy_7'"):
        arm.adopt(finished, [*shared, "measure_policy_7"], varied)
    with pytest.raises(ConfigError, match=r"other settings:\n  wovr\.refreshes: 1 there, 0 now\n"):
        arm.adopt(finished, shared, varied[1:])
    assert not (tmp_path / "arm").exists()
    arm.adopt(finished, shared, varied)
    results = arm.run()
    assert results["real_episodes"] == 16
    old = results_of(finished)["iterations"]
    assert [line["iteration"] for line in results["iterations"]] == [1, 2, 3]
    points = [(point["policy"], point["iteration"]) for point in results["measurements"] if "imagined" in point]
    assert points == [("base", 0), ("policy_0_2", 2), ("policy_0", 3)]
    # What was measured on the way is there to be used.
    steps = [load_policy(tmp_path / "arm" / point["run"]).training["step"] for point in results["measurements"]]
    assert steps[2:] == [2, 2, 3, 3]
    assert results["iterations"][:2] == old[:2]
    assert not (tmp_path / "arm" / "rollouts_1").exists()
    # What was adopted is as it was.
    assert len(read_metrics(finished / "reinforcement_0")) == 2


@pytest.mark.parametrize("iterations", [1, 0])
def test_what_succeeded_really_is_demonstrated_too(finished, data, policy, tmp_path, iterations):
    imitation = dataclasses.replace(IMITATION, steps=6)
    config = dataclasses.replace(
        WOVR, iterations=iterations, imitation_rollouts=8, imitation=imitation, refreshes=0, ranked_starts=0
    )
    output = tmp_path / "arm"
    arm = wovr(output, data, policy, config=config)
    varied = ("iterations", "imitation_rollouts", "imitation", "refreshes", "ranked_starts")
    arm.adopt(finished, ["demonstrations", "measure_base"], [f"wovr.{name}" for name in varied])
    # The policy of these tests never succeeds, so others collect in its place.
    make_world_data(output / "imitation_rollouts", episodes=8, seed=100)
    taken = {"world": "real", "purpose": "learning", "episodes": 8, "steps": 100}
    record = {"name": "imitation_rollouts", "title": "", "finished": True, "seconds": 0.0, "taken": [taken]}
    (output / "stages" / "imitation_rollouts.json").write_text(json.dumps({**record, "folder": "imitation_rollouts"}))
    results = arm.run()
    sources = [Dataset.open(path) for path in (data, output / "imitation_rollouts")]
    succeeded = [{one.seed for one in source.episodes if one.success} for source in sources]
    assert 0 < len(succeeded[1]) < 8
    imitating = load_policy(output / "imitation")
    # Some successes validate.
    learned = set(imitating.training["data"]["seeds"])
    assert learned <= set.union(*succeeded)
    assert all(learned & seeds for seeds in succeeded)
    shown = [(point["policy"], point["iteration"]) for point in results["measurements"] if "imagined" not in point]
    if not iterations:
        assert shown == [("base", 0), ("imitation", 0)]
        assert (results["iterations"], results["final"]) == ([], results["measurements"][-1]["real"])
        assert not (output / "world_model_0").exists()
        base, final = measured_folders(output)
        sources = ReportSources(cotraining=output, evaluations={"improved": final, "base": base})
        page = write_report(sources, tmp_path / "report.html").read_text()
        for told in ("imitation", "trained anew", "after imitation of its successes and 0 iterations"):
            assert told in page, told
        return
    assert shown == [("base", 0), ("imitation", 0), ("policy_0", 1)]
    assert [line["iteration"] for line in results["iterations"]] == [1]
    # The world model learns from other episodes, too: those of the policy that imitates.
    collected = [Dataset.open(output / name).episodes for name in ("imitation_rollouts", "rollouts_0")]
    seeds = [one.seed for episodes in collected for one in episodes]
    assert len(set(seeds)) == len(seeds) == 8 + 8
    assert collected[1][0].extra["checkpoint"] == checkpoint_digest(imitating.folder)
    # Reinforcement goes on from what imitated: its image encoder, which is frozen, is still there.
    before, after = imitating.policy.state_dict(), load_policy(output / "policy").policy.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder.images"))
    assert not all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("steps", "batch", "expected"), [(29, 16, (30, 16)), (10, 48, (10, 48)), (100, 16, (100, 16)), (100, 4, (30, 16))]
)
def test_imitation_learns_from_no_fewer_samples_than_the_base_policy_did(
    data, policy, tmp_path, steps, batch, expected
):
    imitation = dataclasses.replace(IMITATION, steps=steps, batch_size=batch, seed=3)
    told: list[str] = []
    config = dataclasses.replace(WOVR, imitation_rollouts=8, imitation=imitation)
    arm = wovr(tmp_path / "arm", data, policy, config=config, seed=4, notify=told.append)
    trainer = arm._imitation_trainer()
    assert trainer == dataclasses.replace(imitation, steps=expected[0], batch_size=expected[1], seed=7)
    longer = f"imitation takes 30 steps of 16, as the training of the base policy did, instead of {steps} of {batch}"
    assert told == ([] if trainer.steps == steps else [longer])


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_done(finished, data, policy, tmp_path):
    output = tmp_path / "output"
    other = tmp_path / "high"
    env = make_vector_env(TASK, 2, image_size=16, render_profile="high", autoreset_mode=AutoresetMode.DISABLED)
    expert = ScriptedExpert(TASK, env.embodiment)
    record_rollouts(env, expert, range(2), other, task=TASK, operator="expert", settings={})
    env.close()
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        wovr(output, other, policy)
    with pytest.raises(DatasetError, match="is not a dataset"):
        wovr(output, tmp_path / "nowhere", policy)
    bc = BCConfig(vision=small_vision(), hidden=16, layers=1)
    train(bc, dataclasses.replace(IMITATION, steps=1), open_training_data(data, bc), tmp_path / "bc", device="cpu")
    with pytest.raises(ConfigError, match="of type 'bc'"):
        wovr(output, data, tmp_path / "bc")
    with pytest.raises(ConfigError, match=r"measurement\.first_seed is 3"):
        wovr(output, data, policy, measurement=MeasurementConfig(first_seed=3))
    with pytest.raises(ConfigError, match=r"are going to begin in \(wovr\.first_seed\)"):
        wovr(output, data, policy, config=dataclasses.replace(WOVR, first_seed=MEASUREMENT.first_seed))
    demonstrated = Dataset.open(data).episodes[0].seed
    with pytest.raises(ConfigError, match="are among those that the demonstrations began in"):
        rlco(output, data, measurement=dataclasses.replace(MEASUREMENT, first_seed=demonstrated))
    # A world model that remembers how the measured episodes went.
    model = finished / "world_model_0"
    remembered = MeasurementConfig(first_seed=max(learned_seeds(load_world_model(model).training["data"])), episodes=2)
    with pytest.raises(ConfigError, match="world_model_0 was trained on"):
        wovr(output, data, policy, world_model=model, measurement=remembered)
    # A world model of another render profile, or one that is none.
    copy = tmp_path / "world_model"
    shutil.copytree(finished / "world_model_0" / "checkpoints" / "last", copy)
    described = json.loads((copy / "embodiment.json").read_text())
    (copy / "embodiment.json").write_text(json.dumps({**described, "render_profile": "high"}))
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        wovr(output, data, policy, world_model=copy)
    assert not output.exists()
    with pytest.raises(ConfigError, match="has a filter 'careful'"):
        wovr(output, data, policy, config=dataclasses.replace(WOVR, imitation_filter="careful"))
    with pytest.raises(ValueError, match="needs imitation_rollouts"):
        WovrConfig(iterations=0)
    flags = ["cotrain", "--config", "wovr", "--output", str(output), "--demonstrations", str(data)]
    with pytest.raises(ConfigError, match="--policy is missing"):
        cli.run(flags)


def test_what_no_world_model_shows_is_refused_before_anything_is_done(data, policy, tmp_path):
    output, state = tmp_path / "output", tmp_path / "state"
    blind = dataclasses.replace(DIFFUSION, image_keys=(), state_keys=("proprio", "object_state"))
    train(blind, dataclasses.replace(IMITATION, steps=1), open_training_data(data, blind), state, device="cpu")
    reads = "reads object_state, and a world model imagines front_image"
    with pytest.raises(ConfigError, match=reads):
        wovr(output, data, state)
    # Imitation alone needs no world model.
    wovr(output, data, state, config=dataclasses.replace(WOVR, iterations=0, imitation_rollouts=4))
    video = open_video_data([data])
    model = WorldModel(RESIDUAL, video.embodiment, fit_world_statistics(video))
    save_world_model(
        tmp_path / "model", 1, model, weights=model.state_dict(), state={"none": torch.zeros(0)},
        training={"step": 1, "finished": True, "task": video.task},
    )  # fmt: skip
    with pytest.raises(ConfigError, match=reads):
        rlco(output, data, state, config=RlcoConfig(world="world_model"), world_model=tmp_path / "model")
    coarse = dataclasses.replace(RESIDUAL, dynamics=DynamicsConfig(kind="flow", width=64, patch=4))
    with pytest.raises(ConfigError, match="patch is 4"):
        wovr(output, data, policy, config=dataclasses.replace(WOVR, world_model=coarse))
    assert not output.exists()


def test_a_policy_that_got_worse_is_not_recommended(tmp_path):
    config = cotrain.Config(output=tmp_path, demonstrations=(Path("data"),), policy=Path("base"))
    points = [("base", 96, "../base"), ("policy_0_10", 98, "policy_0_10"), ("policy_0", 77, "reinforcement_0")]
    results = {
        "comparison": {"difference_interval": [-0.18, -0.02]},
        "measurements": [
            {"policy": name, "run": run, "real": {"success_rate": count / 200, "successes": count, "n": 200}}
            for name, count, run in points
        ],
    }
    text = cotrain.advice(results, config)
    assert f"'policy_0_10' in {tmp_path / 'policy_0_10'} (49 %" in text
    assert cotrain.advice({**results, "comparison": {"difference_interval": [-0.08, 0.02]}}, config) == ""
    assert cotrain.advice({**results, "comparison": None}, config) == ""


def test_the_policy_must_be_of_the_task_that_is_demonstrated(data, policy, tmp_path):
    other = tmp_path / "other"
    merge([data], other)
    meta = json.loads((other / "meta.json").read_text())
    meta["tasks"] = {"weld": {**meta["tasks"]["reach"], "name": "weld"}}
    (other / "meta.json").write_text(json.dumps(meta))
    command = ["cotrain", "--config", "wovr_smoke", "--policy", str(policy), "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"learned task 'reach', and the demonstrations .* show 'weld'"):
        cli.run([*command, "--demonstrations", str(other)])
    assert not (tmp_path / "out").exists()


def test_what_a_world_model_would_practise_wrongly_is_refused(data, policy, tmp_path):
    def world(**changes) -> World:
        return dataclasses.replace(simulation(), task=parse_task({**TASK.to_dict(), **changes}, "test"))

    other = world(name="weld")
    with pytest.raises(ConfigError, match="8 of 8 episodes are of reach, and co-training is of 'weld'"):
        wovr(tmp_path / "out", data, policy, real=other)
    with pytest.raises(ConfigError, match="8 of 8 episodes are of reach, and co-training is of 'weld'"):
        rlco(tmp_path / "out", data, policy, real=other)
    # What ends an episode as a failure is in no picture that the model learned from.
    with pytest.raises(ConfigError, match=r"task 'reach' ends when 'at\(tcp, goal, 0.5\)', which a world model"):
        wovr(tmp_path / "out", data, policy, real=world(failure="at(tcp, goal, 0.5)"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["wovr", "wovr_smoke", "rlco"])
def test_every_preset_loads(name):
    module = importlib.import_module("simtoreal.commands.cotrain")
    path = Path(simtoreal.configs.__path__[0]) / module.PRESETS / f"{name}.yaml"
    content = read_yaml(path)
    config = build_config(
        module.Config, {"output": "x", "demonstrations": ["x"], "policy": "x", **content}, source=str(path)
    )
    assert config.method == name.partition("_")[0]
    if name == "wovr":
        shipped = read_yaml(path.parents[1] / "world_models" / "cpu.yaml")["model"]
        assert config.wovr.world_model == build_config(WorldModelConfig, shipped, source="cpu.yaml")


# --- RL-Co -----------------------------------------------------------------------------------------------------------


def test_windows_are_drawn_in_the_proportion_asked_for(data, tmp_path):
    other = make_world_data(tmp_path / "other", episodes=4, seed=50)
    mixed = open_mixed_data([other], [data], DIFFUSION, real_share=0.8)
    parts = [open_training_data(path, DIFFUSION).train for path in (other, data)]
    assert len(mixed.train) == sum(map(len, parts))
    cumulative = np.cumsum(mixed.probabilities)
    drawn = np.concatenate([batch_indices(len(mixed.train), 64, 0, step, cumulative) for step in range(40)])
    share = float((mixed.train.source_of_window[drawn] == 0).mean())
    # Standard deviation of 2560 draws: 0.008.
    assert abs(share - 0.8) < 0.03
    indices = np.array([len(parts[0]) + 3, 0, len(parts[0]), 5])
    batch = mixed.train.batch(indices)
    for row, (source, index) in enumerate(((1, 3), (0, 0), (1, 0), (0, 5))):
        wanted = parts[source].batch(np.array([index]))
        assert np.array_equal(batch["observation"]["front_image"][row], wanted["observation"]["front_image"][0])
        assert np.array_equal(batch["actions"][row], wanted["actions"][0])
        assert batch["instruction"][row] == wanted["instruction"][0]
    with pytest.raises(ConfigError, match="no simulated demonstrations"):
        open_mixed_data([other], [], DIFFUSION, real_share=0.5)
    alone = open_mixed_data([other], [], DIFFUSION, real_share=1.0)
    assert len(alone.train) == len(parts[0])


def test_a_filter_applies_to_the_folders_that_have_it(data, tmp_path):
    judged = make_filtered_dataset(tmp_path / "judged")
    policy = dataclasses.replace(DIFFUSION, image_keys=(), state_keys=("proprio",))
    whole, filtered = (
        open_mixed_data([judged, data], [], policy, real_share=1.0, filter=name).train for name in (None, "compatible")
    )
    kept = open_training_data(judged, policy, filter="compatible").train
    counts = [np.bincount(windows.source_of_window).tolist() for windows in (whole, filtered)]
    assert counts[1] == [len(kept), counts[0][1]]
    assert counts[1][0] < counts[0][0]
    # What the filter drops decides the scale neither of one folder nor of several.
    alone = open_mixed_data([judged], [], policy, real_share=1.0, filter="compatible")
    scales = open_training_data(judged, policy, filter="compatible").statistics
    assert all(np.array_equal(alone.statistics[key].low, scales[key].low) for key in scales)
    assert all(np.array_equal(alone.statistics[key].high, scales[key].high) for key in scales)
    assert alone.fingerprint() != open_mixed_data([judged], [], policy, real_share=1.0).fingerprint()
    with pytest.raises(ConfigError, match="has a filter 'careful'; make it"):
        open_mixed_data([judged, data], [], policy, real_share=1.0, filter="careful")
    with pytest.raises(ConfigError, match="has a filter 'careful'; make it"):
        anchor_on([judged, data], 8, 0, filter="careful")(SimpleNamespace(config=policy))


def rlco(output: Path, data: Path, policy: Path | None = None, weight: float = 0.2, **changes) -> Rlco:
    reinforcement = dataclasses.replace(
        REINFORCEMENT, rollouts=4, max_chunks=2, anchor_weight=weight, first_seed=7_000_000
    )
    imitation = dataclasses.replace(IMITATION, steps=3)
    config = RlcoConfig(imitation=imitation, diffusion=DIFFUSION, iterations=2, anchor_batch=8, envs=4)
    return Rlco(
        changes.pop("config", config), reinforcement,
        changes.pop("measurement", dataclasses.replace(MEASUREMENT, episodes=2)),
        demonstrations=[data], simulated=[data], real=changes.pop("real", simulation("standard")),
        practice=simulation(), policy=policy, device="cpu", output=output, **changes,
    )  # fmt: skip


def test_the_anchor_changes_the_update_and_without_weight_it_does_not(data, policy, tmp_path):
    weights = {}
    for weight in (0.0, 0.2):
        output = tmp_path / str(weight)
        results = rlco(output, data, policy, weight).run()
        weights[weight] = load_policy(output / "policy").policy.state_dict()
        lines = read_metrics(output / "reinforcement")
        assert [("anchor_gradient_norm" in line) for line in lines] == [weight > 0] * 2
        (real, simulated) = ((point["real"], point["simulation"]) for point in results["measurements"])
        assert real[0]["n"] == simulated[0]["n"] == 2
        assert results["settings"]["real"] == {"randomization": "standard"}
    assert any(not torch.equal(weights[0.0][name], weights[0.2][name]) for name in weights[0.0])
    # Without weight it is the reinforcement that knows nothing of demonstrations.
    plain = rlco(tmp_path / "unused", data, policy, 0.0).reinforcement
    env = simulation().make()
    reinforce(policy, plain, env, tmp_path / "plain", iterations=2, device="cpu")
    env.close()
    alone = load_policy(tmp_path / "plain").policy.state_dict()
    assert all(torch.equal(alone[name], weights[0.0][name]) for name in alone)
    # What the simulation showed must not measure it.
    seeds = load_policy(tmp_path / "0.2" / "policy").training["data"]["seeds"]
    assert set(range(7_000_000, 7_000_008)) <= set(seeds)


def test_imitation_of_a_mixture_comes_first(data, tmp_path):
    results = rlco(tmp_path, data).run()
    assert load_policy(tmp_path / "imitation").training["step"] == 3
    ledger = [(row["world"], row["purpose"], row["episodes"]) for row in results["ledger"]]
    assert ledger[:2] == [("real", "demonstrations", 8), ("simulation", "demonstrations", 8)]
    # Reinforcement costs nothing real.
    assert results["real_episodes"] == 8
    assert sum(row[2] for row in ledger if row[:2] == ("simulation", "learning")) == 8


def test_reinforcement_beside_reality_inside_a_world_model(finished, data, policy, tmp_path):
    config = RlcoConfig(world="world_model", iterations=1, anchor_batch=8, envs=4)
    keyframes = KeyframeConfig(share=0.5, margin_steps=2, remaining_steps=5)
    model = finished / "world_model_0"
    results = rlco(tmp_path, data, policy, config=config, world_model=model, keyframes=keyframes).run()
    assert results["iterations"][0]["rollouts_from_keyframes"] == 2
    assert "imagined" in results["measurements"][-1]
    with pytest.raises(ConfigError, match="belong together"):
        rlco(tmp_path / "other", data, policy, config=config)


# --- rollouts as data ------------------------------------------------------------------------------------------------


def test_rollouts_are_stored_whatever_became_of_them(data, policy, tmp_path):
    loaded = load_policy(policy).policy
    env = make_vector_env(TASK, 2, image_size=16)
    seeds = range(300, 306)
    arguments = {"task": TASK, "operator": "diffusion", "settings": {"note": 1}}
    outcomes = record_rollouts(env, PolicyActor(loaded), seeds, tmp_path / "whole", **arguments)
    whole = Dataset.open(tmp_path / "whole")
    assert [episode.seed for episode in whole.episodes] == list(seeds)
    assert {episode.source for episode in whole.episodes} == {"policy"}
    assert not all(episode.success for episode in whole.episodes)
    assert [(one.seed, one.success, one.steps) for one in outcomes] == [
        (episode.seed, episode.success, episode.steps) for episode in whole.episodes
    ]

    class Killed(PolicyActor):
        left = 40

        def act(self, *args):
            Killed.left -= 1
            if Killed.left < 0:
                raise Interrupted
            return super().act(*args)

    with pytest.raises(Interrupted):
        record_rollouts(env, Killed(loaded), seeds, tmp_path / "parts", **arguments)
    assert len(Dataset.open(tmp_path / "parts").episodes) == 4
    again = record_rollouts(env, PolicyActor(loaded), seeds, tmp_path / "parts", **arguments)
    assert again == outcomes
    parts = Dataset.open(tmp_path / "parts")
    for one, other in zip(whole.episodes, parts.episodes, strict=True):
        mine, theirs = whole.read(one), parts.read(other)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
    with pytest.raises(ConfigError, match="holds other data"):
        record_rollouts(env, PolicyActor(loaded), seeds, tmp_path / "parts", **{**arguments, "settings": {"note": 2}})
    env.close()


def test_an_exploring_actor_without_noise_is_the_policy(policy):
    loaded = load_policy(policy).policy
    env = make_vector_env(TASK, 2, image_size=16)
    still = ExploringActor(loaded, ExplorationConfig(noise_scale=1e-7))
    kept = []
    for actor in (PolicyActor(loaded), still, ExploringActor(loaded, ExplorationConfig(noise_scale=0.3))):
        actor.reset(np.arange(2), [1, 2])
        observation, _ = env.reset(seed=[1, 2])
        history = {key: np.repeat(value[:, None], 2, axis=1) for key, value in observation.items()}
        kept.append(actor.act(history, ["", ""], np.arange(2)))
    env.close()
    np.testing.assert_allclose(kept[1], kept[0], atol=1e-5)
    assert np.abs(kept[2] - kept[0]).max() > 0.05
