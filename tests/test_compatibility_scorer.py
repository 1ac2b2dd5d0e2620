"""The ensemble that scores demonstrations, the filter command and the coach, on small ensembles."""

from __future__ import annotations

import dataclasses
import json
import os
import re

import numpy as np
import pytest
import torch
import toy_reaching
from plane_demonstrations import demonstration, plane_dataset

from simtoreal import cli
from simtoreal.data_collection.check import check
from simtoreal.data_collection.compatibility import detection_auc
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.edit import merge
from simtoreal.data_collection.episode import EpisodeInfo, embodiment_digest
from simtoreal.data_collection.filters import read_filter, write_filter
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import CheckpointError, ConfigError, DatasetError, EmbodimentMismatchError
from simtoreal.policies.compatibility_coach import CompatibilityCoach
from simtoreal.policies.compatibility_config import ScorerConfig
from simtoreal.policies.compatibility_features import EncoderFeatures, make_features
from simtoreal.policies.compatibility_filter import filter_dataset
from simtoreal.policies.compatibility_networks import Perceptrons, RegressionEnsemble, _dropout_mask, train_ensembles
from simtoreal.policies.compatibility_scorer import fit_scorer
from simtoreal.policies.compatibility_store import CACHE, load_scorer, open_scorer
from simtoreal.policies.trainer import train

SMALL = ScorerConfig(hidden=48, epochs=1, minimum_steps=250, batch_size=64, folds=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Dataset:
    return plane_dataset(tmp_path_factory.mktemp("base") / "data", ["up_right"] * 12)


@pytest.fixture(scope="module")
def scorer(base):
    return fit_scorer(base, make_features(base), SMALL)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Dataset:
    styles = ["up_right"] * 4 + ["right_up"] * 4
    return plane_dataset(tmp_path_factory.mktemp("mixed") / "data", styles, seed=1)


# Networks ------------------------------------------------------------------------------------------------------


def test_batched_members_equal_single_networks():
    torch.manual_seed(0)
    network = Perceptrons(3, 4, 8, 2, 0.5).eval()
    inputs = torch.randn(3, 5, 4)
    for member in range(3):
        value = inputs[member]
        for layer in range(2):
            value = value @ network.weights[layer][member] + network.biases[layer][member]
            value = torch.nn.functional.layer_norm(value, (8,))
            value = torch.relu(value * network.gains[layer][member] + network.offsets[layer][member])
        expected = value @ network.weights[2][member] + network.biases[2][member]
        torch.testing.assert_close(network(inputs)[member], expected)


def test_scores_are_the_error_and_the_spread_of_the_members():
    torch.manual_seed(0)
    ensemble = RegressionEnsemble(SMALL, 5, 3, 2).eval()
    states, actions = torch.randn(6, 3), torch.rand(6, 2) * 2 - 1
    errors, novelty = ensemble.scores(states, actions)
    predicted = torch.stack([torch.tanh(ensemble.network(states.expand(5, -1, -1)))[m] for m in range(5)])
    torch.testing.assert_close(errors, ((predicted - actions) ** 2).mean(0))
    np.testing.assert_allclose(novelty.detach(), predicted.detach().numpy().std(0).mean(-1), rtol=1e-4)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_dropout_keeps_the_mean_and_every_byte_is_alike(share):
    torch.manual_seed(0)
    mask = _dropout_mask(torch.empty(400_003), share)[:400_000]
    assert float((mask == 0).float().mean()) == pytest.approx(share, abs=0.005)
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    assert ((mask.reshape(-1, 8) == 0).float().mean(0) - share).abs().max() < 0.01


def test_training_depends_on_nothing_but_its_seed(base, scorer):
    torch.manual_seed(99)
    again = fit_scorer(base, make_features(base), SMALL)
    for name, value in scorer.ensemble.state_dict().items():
        assert torch.equal(value, again.ensemble.state_dict()[name]), name
    assert again.thresholds == scorer.thresholds


# Scores ------------------------------------------------------------------------------------------------------


def test_conflicting_steps_are_found_and_compatible_ones_are_not(scorer, mixed):
    result = filter_dataset(mixed, scorer, name="compatible")
    own, foreign = result.operators()[1], result.operators()[0]
    assert (foreign["operator"], own["operator"]) == ("right_up", "up_right")
    assert own["bad_share"] < 0.1
    assert foreign["bad_share"] > 0.2
    assert foreign["accepted"] == 0
    assert own["accepted"] >= 3
    limits, conflict, score = scorer.thresholds["static"], [], []
    for episode in mixed.episodes:
        # At the start the ways part: there it is known which step conflicts.
        likelihood = result.scores[episode.name].likelihood[:3]
        score.extend(likelihood)
        conflict.extend([episode.operator == "right_up"] * 3)
    assert detection_auc(np.array(score), np.array(conflict)) > 0.95
    assert limits.flagged <= 0.05


@pytest.mark.parametrize("method", ["random", "good", "bad", "weighted", "box"])
def test_failures_use_up_nothing_of_what_successes_keep(tmp_path, scorer, method):
    styles = ["up_right"] * 3 + ["right_up"] * 3
    alone = plane_dataset(tmp_path / "alone", styles, seed=1)
    with DatasetWriter(tmp_path / "all", alone.embodiment, alone.tasks) as writer:
        for episode in alone.episodes:
            arrays = alone.read(episode)
            for success in (False, True):  # A failure wanders, which makes it long, new and partly wrong.
                longer = {name: np.repeat(array, 1 if success else 3, axis=0) for name, array in arrays.items()}
                if not success:
                    longer["actions"][::2, :2] *= -1
                failure = "" if success else "timeout"
                writer.add(longer, dataclasses.replace(episode, success=success, failure=failure))
    everything = Dataset.open(tmp_path / "all")
    expected = filter_dataset(alone, scorer, name="f", method=method)
    found = filter_dataset(everything, scorer, name="f", method=method)
    successes = [episode.name for episode in everything.episodes if episode.success]
    for before, after in zip(alone.episodes, successes, strict=True):
        assert (found.keep[after] == expected.keep[before.name]).all()
    # The failures have a budget of their own, for who learns from them as well.
    failures = [episode.name for episode in everything.episodes if not episode.success]
    box = filter_dataset(everything, scorer, name="f").keep
    assert 0 < sum(found.keep[name].sum() for name in failures) <= sum(box[name].sum() for name in failures)


def test_a_slow_operator_is_judged_by_the_share_of_bad_steps(tmp_path, scorer):
    """The same actions in the same places with a tenth of the motion: ten times the steps, and ten times the noise."""
    slow = plane_dataset(tmp_path / "slow", ["up_right"] * 4 + ["right_up"] * 4, seed=3, step=0.01)
    result = filter_dataset(slow, scorer, name="compatible")
    limits = scorer.thresholds["static"]
    foreign, own = result.operators()
    assert (own["accepted"], foreign["accepted"]) == (4, 0)
    verdicts = [episode for episode in result.episodes.values() if episode.operator == "up_right"]
    assert all(verdict.bad_steps > limits.tolerance for verdict in verdicts)
    coach = CompatibilityCoach(scorer)
    for episode in slow.episodes:
        review = coach.review(slow.read(episode))
        assert review.accepted == result.episodes[episode.name].accepted
        assert review.tolerance == limits.tolerated(episode.steps) > limits.tolerance
    # A number given by hand is a number of steps.
    given = filter_dataset(slow, scorer, name="compatible", tolerance=limits.tolerance)
    assert not any(episode.accepted for episode in given.episodes.values())


def test_what_is_new_is_compatible(tmp_path, scorer):
    far = plane_dataset(tmp_path / "far", ["right_up"] * 3, seed=2, start=(4.0, -4.0))
    result = filter_dataset(far, scorer, name="compatible")
    assert result.operators()[0]["bad_share"] < 0.1


def test_two_ways_in_the_base_need_the_diffusion_scorer():
    """At every state either of two actions; asked about them, about doing both, neither, and something else."""
    rng = np.random.default_rng(0)
    states = rng.uniform(-1, 1, (500, 4)).astype(np.float32)
    actions = rng.normal(0, 0.05, (500, 7)).astype(np.float32)
    actions[np.arange(500), rng.integers(0, 2, 500)] += 0.8
    asked = np.zeros((5, 7), np.float32)
    asked[0, 0] = asked[1, 1] = 0.8
    asked[2, :2], asked[3, :2], asked[4, 0] = 0.8, 0.4, -0.8
    found = {}
    for kind in ("mlp", "diffusion"):
        config = dataclasses.replace(SMALL, kind=kind, minimum_steps=300)
        tensors = torch.from_numpy(states), torch.from_numpy(actions)
        ensemble = train_ensembles(config, *tensors, [np.arange(500)], torch.device("cpu"))
        likelihood = ensemble.scores(torch.zeros(5, 4), torch.from_numpy(asked))[0].mean(-1)
        found[kind] = dict(zip(("one", "other", "both", "between", "opposite"), likelihood.tolist(), strict=True))
    mlp, diffusion = found["mlp"], found["diffusion"]
    # Regression takes the mean of the two, which nobody did, for the likeliest, and both for as likely as one.
    assert mlp["between"] < 0.1 * min(mlp["one"], mlp["other"])
    assert mlp["both"] < 1.5 * mlp["other"]
    assert diffusion["both"] > 4 * max(diffusion["one"], diffusion["other"])
    assert diffusion["opposite"] > 10 * max(diffusion["one"], diffusion["other"])
    assert diffusion["between"] > 0.7 * min(diffusion["one"], diffusion["other"])


def test_base_episodes_among_the_candidates_are_kept_whole(tmp_path, base, mixed, scorer):
    merge([base.path, mixed.path], tmp_path / "both")
    both = Dataset.open(tmp_path / "both")
    result = filter_dataset(both, scorer, name="compatible", method="rightbox")
    assert sum(episode.base for episode in result.episodes.values()) == len(base.episodes)
    for name, episode in result.episodes.items():
        assert not episode.base or (result.keep[name].all() and episode.accepted)
    assert result.operators()[0]["base"]


def test_moving_scenes_need_thresholds_of_their_own(tmp_path, base, scorer):
    motion = {"motion": {"u": 0.3}}
    moving = plane_dataset(tmp_path / "moving", ["up_right"] * 4, seed=3, start=(4.0, 4.0), extra=motion)
    with pytest.raises(DatasetError, match=r"mode 'move'.*fewer than two such episodes.*--lambda and --eta"):
        filter_dataset(moving, scorer, name="compatible")
    given = filter_dataset(moving, scorer, name="compatible", likelihood=0.1, novelty=0.5, tolerance=3)
    assert given.thresholds["move"]["likelihood"] == 0.1
    merge([base.path, moving.path], tmp_path / "both")
    both = Dataset.open(tmp_path / "both")
    calibrated = fit_scorer(both, make_features(both), SMALL).thresholds
    assert set(calibrated) == {"static", "move"}
    assert (calibrated["static"].episodes, calibrated["move"].episodes) == (12, 4)


def test_thresholds_can_be_given_one_by_one(mixed, scorer):
    result = filter_dataset(mixed, scorer, name="compatible", likelihood=1e5)
    assert sum(episode.bad_steps for episode in result.episodes.values()) == 0
    assert result.thresholds["static"]["novelty"] == scorer.thresholds["static"].novelty
    with pytest.raises(ConfigError, match="lambda is -1"):
        filter_dataset(mixed, scorer, name="compatible", likelihood=-1.0)


def test_base_data_must_be_enough(tmp_path):
    single = plane_dataset(tmp_path / "single", ["up_right"])
    with pytest.raises(DatasetError, match="at least two successful episodes, found 1"):
        fit_scorer(single, make_features(single), SMALL)


# On disk -----------------------------------------------------------------------------------------------------


def test_a_stored_scorer_scores_the_same_and_is_reused(tmp_path, mixed, monkeypatch):
    base = plane_dataset(tmp_path / "base", ["up_right"] * 4)
    features, config = make_features(base), dataclasses.replace(SMALL, minimum_steps=20)
    first = open_scorer(base, features, config)
    (folder,) = (base.path / CACHE).iterdir()
    arrays = mixed.read(mixed.episodes[0])
    read = load_scorer(folder)
    assert np.array_equal(read.score(arrays).likelihood, first.score(arrays).likelihood)
    assert np.array_equal(read.score(arrays).novelty, first.score(arrays).novelty)
    assert read.thresholds == first.thresholds
    assert [reference.digest for reference in read.references] == [ref.digest for ref in first.references]
    monkeypatch.setattr("simtoreal.policies.compatibility_store.fit_scorer", lambda *a, **k: pytest.fail("fitted"))
    assert open_scorer(base, features, config).thresholds == first.thresholds
    monkeypatch.undo()
    # Other base data are another scorer.
    os.utime(base.episodes[0].path, ns=(1, 1))
    open_scorer(base, features, config)
    assert len(list((base.path / CACHE).iterdir())) == 2
    (folder / "scorer.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="missing or damaged"):
        load_scorer(folder)
    (folder / "scorer.json").write_text('{"format": "simtoreal-compatibility-scorer", "format_version": 99}')
    with pytest.raises(CheckpointError):
        load_scorer(folder)


# Features ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_run(tmp_path_factory):
    """A small image policy, trained for a few steps."""
    run = tmp_path_factory.mktemp("run") / "policy"
    config = toy_reaching.small_diffusion()
    train(config, toy_reaching.small_trainer(), toy_reaching.data(config), run)
    return run


@pytest.fixture(scope="module")
def image_data(tmp_path_factory) -> Dataset:
    path, embodiment = tmp_path_factory.mktemp("images") / "data", toy_reaching.embodiment()
    rng = np.random.default_rng(0)
    with DatasetWriter(path, embodiment, {"toy": {"name": "toy"}}) as writer:
        for number in range(4):
            arrays = toy_reaching.episode(rng)
            steps = len(arrays["actions"])
            arrays |= {"rewards": np.zeros(steps, np.float32), "states": np.zeros((steps, 0))}
            arrays["dones"] = np.zeros(steps, np.int8)
            info = EpisodeInfo(
                task="toy", seed=number, success=True, operator="anna", source="teleop",
                embodiment=embodiment_digest(embodiment),
            )  # fmt: skip
            writer.add(arrays, info)
    return Dataset.open(path)


def test_images_are_scored_on_the_features_of_a_policy(image_run, image_data):
    with pytest.raises(ConfigError, match="--encoder RUN"):
        make_features(image_data)
    features = make_features(image_data, encoder=image_run)
    assert isinstance(features, EncoderFeatures)
    scorer = fit_scorer(image_data, features, dataclasses.replace(SMALL, minimum_steps=30))
    arrays = image_data.read(image_data.episodes[0])
    coach = CompatibilityCoach(scorer)
    coach.reset()
    live = []
    for step in range(len(arrays["actions"])):
        observation = {key: arrays[f"obs/{key}"][step] for key in features.keys}
        live.append(coach.step(observation, arrays["actions"][step]))
    # Step by step, with the history of the encoder, as all at once.
    expected = coach.thresholds.compatibility(scorer.score(arrays))
    np.testing.assert_allclose(live, expected, atol=1e-4)


def test_features_refuse_what_does_not_fit(base, image_run, image_data):
    with pytest.raises(ConfigError, match="not both"):
        make_features(base, keys=("proprio",), encoder=image_run)
    with pytest.raises(DatasetError, match="has no observation 'proprios'"):
        make_features(base, keys=("proprios",))
    with pytest.raises(EmbodimentMismatchError):
        make_features(base, encoder=image_run)
    images = make_features(image_data, keys=("front_image",))
    with pytest.raises(DatasetError, match="'front_image' is not a vector"):
        fit_scorer(image_data, images, SMALL)


# Coach -------------------------------------------------------------------------------------------------------


def test_coach_accepts_its_own_style_and_shows_a_stranger_where_it_parts(scorer):
    coach, rng = CompatibilityCoach(scorer), np.random.default_rng(5)
    own = demonstration(np.array([0.8, 0.8]), "up_right", rng)
    foreign = demonstration(np.array([0.8, 0.8]), "right_up", rng)
    accepted, rejected = coach.review(own), coach.review(foreign)
    assert accepted.accepted
    assert accepted.snippets == ()
    assert not rejected.accepted
    assert rejected.bad_steps > rejected.tolerance
    assert rejected.compatibility < accepted.compatibility
    bad = coach.thresholds.bad(scorer.score(foreign))
    lengths = {reference.name: len(reference.states) for reference in scorer.references}
    for snippet in rejected.snippets:
        assert bad[snippet.start : snippet.stop].any()
        assert 0 <= snippet.reference_start < snippet.reference_stop <= lengths[snippet.reference_episode]
    covered = [step for snippet in rejected.snippets for step in range(snippet.start, snippet.stop)]
    assert len(covered) == len(set(covered))


def test_coach_names_a_missing_observation(scorer):
    with pytest.raises(DatasetError, match="needs observation 'object_state'"):
        CompatibilityCoach(scorer).step({"proprio": np.zeros(20, np.float32)}, np.zeros(7, np.float32))
    with pytest.raises(DatasetError, match="no steps"):
        CompatibilityCoach(scorer).review({"actions": np.zeros((0, 7), np.float32)})
    with pytest.raises(DatasetError, match="mode 'move'"):
        CompatibilityCoach(scorer, mode="move")


# Command -----------------------------------------------------------------------------------------------------


def test_filter_command_and_training_on_its_result(tmp_path, base, mixed, capsys):
    both = tmp_path / "both"
    merge([base.path, mixed.path], both)
    with DatasetWriter(both, base.embodiment, base.tasks) as writer:
        writer.add(mixed.read(mixed.episodes[0]), dataclasses.replace(mixed.episodes[0], success=False, failure="lost"))
    flags = [
        "--against",
        str(base.path),
        "--hidden",
        "48",
        "--epochs",
        "1",
        "--minimum-steps",
        "250",
        "--device",
        "cpu",
    ]
    cli.run(["data", "filter", str(both), *flags, "--output-name", "agreeing"])
    printed = capsys.readouterr().out
    assert "right_up" in printed
    assert "0 of 4" in printed
    assert "lambda" in printed
    assert re.search(r"kept: \d+ of \d+ steps of 20 successes and \d+ of \d+ steps of 1 failures", printed)
    stored = read_filter(both, "agreeing")
    assert stored.settings["method"] == "box"
    assert {episode.operator for episode in Dataset.open(both).filter("agreeing")} == {"up_right"}
    run = tmp_path / "run"
    cli.run(
        ["train", "--data", str(both), "--filter", "agreeing", "--output", str(run), "--policy", "bc", "--steps", "4",
         "--bc.image-keys", "--bc.hidden", "16", "--bc.layers", "1", "--trainer.batch-size", "8", "--device", "cpu"]
    )  # fmt: skip
    assert (run / "checkpoints/last").exists()
    with pytest.raises(ConfigError, match="filter name 'train'"):
        cli.run(["data", "filter", str(both), *flags, "--output-name", "train"])
    with pytest.raises(ConfigError, match="members"):
        cli.run(["data", "filter", str(both), *flags, "--members", "1"])


def test_other_tasks_are_refused_before_anything_is_trained(tmp_path, base, mixed):
    other, joined = tmp_path / "other", tmp_path / "joined"
    plane_dataset(other, ["up_right"] * 2, task="weld")
    merge([base.path, other], joined)
    filtering = ["data", "filter", str(mixed.path), "--against"]
    with pytest.raises(DatasetError, match=r"is of task plane, and the base data .* of weld"):
        cli.run([*filtering, str(other)])
    with pytest.raises(DatasetError, match=r"holds several tasks \(plane, weld"):
        cli.run([*filtering, str(joined)])
    with pytest.raises(ConfigError, match="device 'gpu' is not a torch device"):
        cli.run([*filtering, str(base.path), "--device", "gpu"])
    assert not (joined / "scorers").exists()
    assert not (other / "scorers").exists()


def test_new_data_filtered_first_and_merged_with_their_base_afterwards(tmp_path, base, mixed, capsys):
    """The order of commands in docs/collection.md."""
    new, joined, other, run = (tmp_path / name for name in ("new", "all", "other", "run"))
    merge([mixed.path], new)
    cli.run(
        ["data", "filter", str(new), "--against", str(base.path), "--hidden", "48", "--epochs", "1",
         "--minimum-steps", "250", "--device", "cpu"]
    )  # fmt: skip
    cli.run(["data", "merge", str(base.path), str(new), "--output", str(joined)])
    cli.run(
        ["train", "--data", str(joined), "--filter", "compatible", "--output", str(run), "--policy", "bc", "--steps",
         "4", "--bc.image-keys", "--bc.hidden", "16", "--bc.layers", "1", "--trainer.batch-size", "8", "--device",
         "cpu"]
    )  # fmt: skip
    assert "left out" not in capsys.readouterr().out
    assert check(joined).problems == ()
    before, after = read_filter(new, "compatible"), read_filter(joined, "compatible")
    assert [verdict.base for verdict in after.episodes.values()] == [True] * 12 + [False] * 8
    assert all(after.keep[f"{number:06d}"].all() for number in range(12))
    for number, name in enumerate(before.episodes):
        assert (after.keep[f"{12 + number:06d}"] == before.keep[name]).all()
    assert not all(keep.all() for keep in after.keep.values())
    # Data that only look like the base are not taken for it.
    plane_dataset(other, ["up_right"] * 3, seed=7)
    merged = merge([other, new], tmp_path / "wrong")
    assert "do not have it and are not the base data" in merged.notes[0]
    assert "compatible" not in merged.dataset.masks


def test_filters_of_one_base_are_merged_wherever_it_lies_and_whatever_the_modes(tmp_path, base, mixed):
    motion = {"motion": {"u": 0.3}}
    moving = plane_dataset(tmp_path / "moving", ["up_right"] * 4, seed=3, extra=motion)
    both = merge([base.path, moving.path], tmp_path / "both").dataset
    elsewhere = merge([both.path], tmp_path / "elsewhere").dataset
    still = merge([mixed.path], tmp_path / "still").dataset
    more = plane_dataset(tmp_path / "more", ["right_up"] * 2, seed=5, extra=motion)
    scorers = [fit_scorer(data, make_features(data), SMALL) for data in (both, elsewhere)]
    for data, scorer in zip((still, more), scorers, strict=True):
        write_filter(data.path, filter_dataset(data, scorer, name="compatible"))
    merged = merge([still.path, more.path, both.path], tmp_path / "all")
    assert merged.notes == ()
    before, after = read_filter(more.path, "compatible"), read_filter(merged.dataset.path, "compatible")
    assert set(after.thresholds) == {"static", "move"}
    assert after.thresholds["move"] == before.thresholds["move"]
    assert [after.episodes[name] for name in merged.names[8:10]] == list(before.episodes.values())
    # The second and the third disagree on a mode that the first does not have.
    other = merge([moving.path], tmp_path / "other").dataset
    write_filter(other.path, filter_dataset(other, scorers[0], name="compatible"))
    path = other.path / "filters/compatible.json"
    content = json.loads(path.read_text())
    content["thresholds"]["move"]["likelihood"] += 1.0
    path.write_text(json.dumps(content))
    wrong = merge([still.path, more.path, other.path], tmp_path / "wrong")
    assert "were made differently" in wrong.notes[0]
