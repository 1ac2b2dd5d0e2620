"""Compatibility of demonstrations: thresholds, filters, alignment, and what is stored with a dataset."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from simtoreal.data_collection.check import check
from simtoreal.data_collection.coaching import closest_stretch, worst_moments
from simtoreal.data_collection.compatibility import (
    METHODS,
    Scores,
    Thresholds,
    calibrate,
    collection_mode,
    detection_auc,
    keep_samples,
)
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, embodiment_digest
from simtoreal.data_collection.filters import (
    Filter,
    FilteredEpisode,
    check_name,
    filter_masks,
    kept_steps,
    read_filter,
    write_filter,
)
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.policies.config import BCConfig
from simtoreal.policies.training_data import open_training_data

LIMITS = Thresholds(likelihood=0.4, novelty=0.15)
STATE_BC = BCConfig(observation_steps=2, horizon=4, execute_steps=2, image_keys=(), hidden=16, layers=1)


def scores(likelihood, novelty) -> Scores:
    return Scores(np.asarray(likelihood, float), np.asarray(novelty, float))


def test_unlikely_in_a_familiar_state_is_bad_and_nothing_else():
    found = scores([0.1, 0.5, 0.1, 0.5, 0.4], [0.1, 0.1, 0.2, 0.2, 0.1])
    assert LIMITS.bad(found).tolist() == [False, True, False, False, False]
    # The unfamiliar is always compatible; elsewhere the error counts in parts of lambda.
    np.testing.assert_allclose(LIMITS.compatibility(found), [0.75, 0.0, 1.0, 1.0, 0.0])


@pytest.mark.parametrize(
    "values", [{"likelihood": 0.0}, {"novelty": -1.0}, {"tolerance": -1}, {"tolerance_share": 1.5}]
)
def test_thresholds_refuse_impossible_values(values):
    with pytest.raises(ConfigError, match="expected"):
        Thresholds(**{"likelihood": 1.0, "novelty": 1.0, **values})


@pytest.mark.parametrize("tail", [0.3, 2.0])
def test_calibration_flags_at_most_one_in_twenty_fresh_base_samples(tail):
    """Also when the errors are heavy-tailed and the episodes differ from each other."""
    rng = np.random.default_rng(0)

    def episode() -> Scores:
        scale = rng.lognormal(0.0, 0.3)
        return scores(scale * rng.lognormal(-4.0, tail, 60), 0.02 * rng.lognormal(0.0, 0.5, 60))

    shares, found = [], []
    for _ in range(20):
        limits = calibrate([episode() for _ in range(20)])
        assert limits.episodes == 20
        assert limits.flagged <= 0.05
        fresh = Scores.join([episode() for _ in range(50)])
        shares.append(limits.bad(fresh).mean())
        # Not by accepting everything: an action far beyond the usual is still found.
        conflict = scores(np.full(len(fresh), 10 * np.percentile(fresh.likelihood, 97)), fresh.novelty)
        found.append(limits.bad(conflict).mean())
    assert np.mean(shares) <= 0.05
    assert np.mean(found) > 0.85


def test_tolerance_grows_with_the_length_of_a_demonstration():
    usual, novelty = np.linspace(0.1, 0.2, 20), np.linspace(0.10, 0.11, 20)
    base = [scores(usual.copy(), novelty) for _ in range(30)]
    for episode in base[:3]:
        episode.likelihood[:2] = 9.0  # Two bad steps of 20.
    limits = calibrate(base)
    assert (limits.tolerance, limits.tolerance_share) == (2, pytest.approx(0.1))
    assert [limits.tolerated(steps) for steps in (1, 10, 20, 55, 300)] == [2, 2, 2, 5, 30]


def test_calibration_says_when_the_base_contradicts_itself():
    """One episode of two is further off than the other in half of its steps: no threshold from the other helps."""
    agreeing = calibrate([scores(np.linspace(0.1, 0.2, 20), np.full(20, 0.1)) for _ in range(4)])
    assert agreeing.warning == ""
    values = [np.full(20, 0.1) for _ in range(2)]
    values[1][:10] = 5.0
    limits = calibrate([scores(value, np.linspace(0.1, 0.11, 20)) for value in values])
    assert limits.flagged > 0.05
    assert "% of the base demonstrator's own held-out steps are called bad" in limits.warning


def test_calibration_needs_two_episodes_of_finite_scores():
    one = scores([0.1, 0.2], [0.1, 0.1])
    with pytest.raises(DatasetError, match="at least two base episodes"):
        calibrate([one])
    with pytest.raises(DatasetError, match="not finite"):
        calibrate([one, scores([np.nan], [0.1])])


def test_filters_keep_what_they_say():
    rng = np.random.default_rng(1)
    episodes = [scores(rng.uniform(0, 1, 50), rng.uniform(0, 0.4, 50)) for _ in range(6)]
    limits = [LIMITS] * 6
    kept = {method: np.concatenate(keep_samples(method, episodes, limits)) for method in METHODS}
    joined = Scores.join(episodes)
    u, n = joined.likelihood / 0.4, joined.novelty / 0.15
    assert (kept["box"] == ~((u > 1) & (n < 1))).all()
    assert (kept["rightbox"] == (u <= 1)).all()
    assert (kept["topbox"] == (n <= 1)).all()
    assert (kept["leftbox"] == ~((u <= 1) & (n < 1))).all()
    # The paper's code: dropped when novelty < 0.5 likelihood - 0.1, at lambda 0.4 and eta 0.15.
    assert (kept["line"] == ~(joined.novelty < 0.5 * joined.likelihood - 0.1)).all()
    budget = kept["box"].sum()
    assert kept["random"].sum() == budget
    assert kept["weighted"].sum() <= budget
    # Weight 0 is never drawn: far off everywhere, or moderately off where it is familiar.
    assert not kept["weighted"][(u >= 2) | ((u >= 1.5) & (n < 2 / 3))].any()
    for method in ("good", "bad"):
        per_episode = kept[method].reshape(6, 50)
        assert set(per_episode.mean(1)) <= {0.0, 1.0}
        assert 0 < per_episode.sum() <= budget


def test_bad_prefers_the_episode_with_fewer_bad_steps():
    good, bad = scores([0.0] * 10, [0.1] * 10), scores([1.0] * 4 + [0.0] * 6, [0.1] * 10)
    kept = keep_samples("bad", [bad, good], [LIMITS] * 2)
    assert not kept[0].any()
    assert kept[1].all()


def test_random_depends_on_its_seed_only():
    episodes = [scores(np.linspace(0, 1, 40), np.full(40, 0.1))]
    first, again, other = (keep_samples("random", episodes, [LIMITS], seed=seed)[0] for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


def test_unknown_filter_names_the_closest():
    with pytest.raises(ConfigError, match="Did you mean 'topbox'"):
        keep_samples("top_box", [scores([0.1], [0.1])], [LIMITS])


def test_auc_counts_ties_half():
    assert detection_auc(np.array([0.1, 0.2, 0.3]), np.array([False, False, True])) == 1.0
    assert detection_auc(np.array([1.0, 1.0]), np.array([False, True])) == 0.5
    rng = np.random.default_rng(0)
    values, flags = rng.integers(0, 5, 200).astype(float), rng.random(200) < 0.3
    pairs = np.sign(values[flags][:, None] - values[~flags]) / 2 + 0.5
    assert detection_auc(values, flags) == pytest.approx(pairs.mean())
    with pytest.raises(ConfigError, match="both kinds"):
        detection_auc(values, np.zeros(200, bool))


def _brute_force(query: np.ndarray, reference: np.ndarray) -> tuple[float, int, int]:
    cost = np.linalg.norm(query[:, None] - reference[None], axis=-1)
    total, start = cost.copy(), np.tile(np.arange(len(reference)), (len(query), 1))
    for i in range(1, len(query)):
        for j in range(len(reference)):
            options = [(total[i - 1, j], start[i - 1, j])]
            if j:
                options += [(total[i, j - 1], start[i, j - 1]), (total[i - 1, j - 1], start[i - 1, j - 1])]
            best = min(options)
            total[i, j], start[i, j] = cost[i, j] + best[0], best[1]
    end = int(total[-1].argmin())
    return total[-1, end] / len(query), int(start[-1, end]), end + 1


def test_alignment_equals_brute_force():
    rng = np.random.default_rng(0)
    for _ in range(20):
        references = [np.cumsum(rng.normal(size=(rng.integers(1, 25), 3)), 0) for _ in range(4)]
        query = np.cumsum(rng.normal(size=(rng.integers(1, 12), 3)), 0)
        found = closest_stretch(query, references)
        expected = [_brute_force(query, reference) for reference in references]
        best = int(np.argmin([entry[0] for entry in expected]))
        assert found.reference == best
        assert (found.start, found.stop) == expected[best][1:]
        assert found.distance == pytest.approx(expected[best][0])


def test_alignment_finds_a_slower_copy():
    rng = np.random.default_rng(2)
    references = [np.cumsum(rng.normal(size=(140, 34)), 0) for _ in range(12)]
    found = closest_stretch(np.repeat(references[7][40:51], 2, axis=0), references)
    assert (found.reference, found.start, found.stop) == (7, 40, 51)
    assert found.distance < 1e-6


def test_alignment_refuses_what_cannot_be_compared():
    with pytest.raises(ConfigError, match="expected \\(n, 3\\)"):
        closest_stretch(np.zeros((4, 3)), [np.zeros((5, 2))])
    with pytest.raises(ConfigError, match="needs a query"):
        closest_stretch(np.zeros((0, 3)), [np.zeros((5, 3))])


def test_worst_moments_are_the_worst_and_do_not_overlap():
    values = np.ones(80)
    values[20:25], values[28], values[60] = 0.1, 0.0, 0.5
    ranges = worst_moments(values)
    assert ranges == [(18, 39), (50, 71)]
    assert worst_moments(np.ones(30)) == []
    crowded = worst_moments(np.linspace(0, 0.9, 30), margin=3)
    steps = [step for start, stop in crowded for step in range(start, stop)]
    assert len(crowded) == 3
    assert len(steps) == len(set(steps))


def test_mode_of_an_episode():
    assert (collection_mode({}), collection_mode({"motion": {"u": 0.1}})) == ("static", "move")


# Stored filters and what training makes of them --------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    """Five episodes of 12 steps whose actions are their global step number."""
    embodiment = panda_embodiment(cameras=())
    path = tmp_path / "data"
    with DatasetWriter(path, embodiment, {"toy": {"name": "toy"}}) as writer:
        for number in range(5):
            rng = np.random.default_rng(number)
            actions = np.zeros((12, 7), np.float32)
            actions[:, 0] = (12 * number + np.arange(12)) / 100
            arrays = {
                "actions": actions, "rewards": np.zeros(12, np.float32), "dones": np.zeros(12, np.int8),
                "states": np.zeros((12, 0)), "obs/proprio": rng.normal(size=(12, 20)).astype(np.float32),
            }  # fmt: skip
            info = EpisodeInfo(
                task="toy", seed=number, success=True, operator="anna" if number < 3 else "ben", source="teleop",
                embodiment=embodiment_digest(embodiment),
            )  # fmt: skip
            writer.add(arrays, info)
    return Dataset.open(path)


def make_filter(dataset: Dataset, name: str = "compatible") -> Filter:
    rng = np.random.default_rng(0)
    keep, episodes, found = {}, {}, {}
    for episode in dataset.episodes:
        keep[episode.name] = np.ones(12, bool)
        keep[episode.name][3:6] = episode.operator == "anna"
        bad = int((~keep[episode.name]).sum())
        found[episode.name] = Scores(*rng.random((2, 12)).astype(np.float32))
        episodes[episode.name] = FilteredEpisode(
            steps=12, seed=episode.seed, operator=episode.operator, mode="static", base=False,
            compatibility=1 - bad / 12, bad_steps=bad, kept_steps=12 - bad, accepted=bad == 0,
        )  # fmt: skip
    return Filter(
        name=name, settings={"method": "box"}, thresholds={"static": {"likelihood": 0.4}}, episodes=episodes,
        keep=keep, scores=found,
    )  # fmt: skip


def test_a_filter_reads_back_as_written_and_leaves_the_episodes_alone(dataset):
    before = {file: file.read_bytes() for file in (dataset.path / "episodes").iterdir()}
    written = make_filter(dataset)
    write_filter(dataset.path, written)
    read = read_filter(dataset.path, "compatible")
    assert read.episodes == written.episodes
    for name in written.keep:
        assert (read.keep[name] == written.keep[name]).all()
        assert (read.scores[name].novelty == written.scores[name].novelty).all()
    assert {file: file.read_bytes() for file in (dataset.path / "episodes").iterdir()} == before
    anna, ben = read.operators()
    assert (anna["operator"], anna["episodes"], anna["steps"], anna["accepted"]) == ("anna", 3, 36, 3)
    assert (ben["operator"], ben["bad_share"], ben["accepted"]) == ("ben", 0.25, 0)
    # The accepted episodes are a mask like any other.
    assert [episode.operator for episode in Dataset.open(dataset.path).filter("compatible")] == ["anna"] * 3


def test_training_neither_starts_at_nor_learns_from_a_dropped_step(dataset):
    write_filter(dataset.path, make_filter(dataset))
    data = open_training_data(dataset.path, STATE_BC, mask="success", filter="compatible", hold_out=False)
    everything = open_training_data(dataset.path, STATE_BC, mask="success", hold_out=False)
    assert len(everything.train) == 60
    assert len(data.train) == 60 - 2 * 3
    batch = data.train.batch(np.arange(len(data.train)))
    steps = np.round(100 * batch["actions"][..., 0]).astype(int)
    dropped = [12 * number + step for number in (3, 4) for step in (3, 4, 5)]
    assert not set(dropped) & set(steps[batch["action_mask"]])
    assert set(range(60)) - set(dropped) == set(steps[batch["action_mask"]])
    # The window two steps before a dropped stretch of three: two actions, then nothing to learn.
    row = int(np.flatnonzero(steps[:, 0] == 12 * 3 + 1)[0])
    assert batch["action_mask"][row].tolist() == [True, True, False, False]
    # The same data with another filter are other data: a run must not be continued with them.
    assert data.fingerprint() != everything.fingerprint()


def test_what_is_dropped_does_not_decide_the_scale(dataset):
    selection = make_filter(dataset)
    for name in ("000003", "000004"):
        selection.keep[name][:] = False
    write_filter(dataset.path, selection)
    data = open_training_data(dataset.path, STATE_BC, mask="success", filter="compatible", hold_out=False)
    assert data.statistics["actions"].high[0] < 0.36


def test_a_held_out_episode_that_is_dropped_whole_does_not_validate(dataset):
    selection = make_filter(dataset)
    held_out = [episode.name for episode in dataset.filter("valid")]
    for name in held_out:
        selection.keep[name][:] = False
    write_filter(dataset.path, selection)
    assert open_training_data(dataset.path, STATE_BC, filter="compatible").valid is None


def test_windows_refuse_masks_that_do_not_fit():
    arrays = [{"actions": np.zeros((4, 7), np.float32)}]
    with pytest.raises(ConfigError, match="one value per step"):
        WindowSampler(arrays, keep=[np.ones(3, bool)])
    with pytest.raises(ConfigError, match="nothing to learn from"):
        WindowSampler(arrays, keep=[np.zeros(4, bool)])


def test_a_filter_that_does_not_cover_the_data_is_refused(dataset):
    selection = make_filter(dataset)
    del selection.episodes["000002"]
    write_filter(dataset.path, selection)
    with pytest.raises(DatasetError, match=r"episode 000002 .* was not there.*data filter"):
        kept_steps(dataset.path, "compatible", dataset.episodes)
    with pytest.raises(DatasetError, match=r"has no filter 'compatibel'\. Did you mean 'compatible'"):
        kept_steps(dataset.path, "compatibel", dataset.episodes)
    longer = [dataclasses.replace(dataset.episodes[0], steps=13)]
    with pytest.raises(DatasetError, match="had 12 steps"):
        kept_steps(dataset.path, "compatible", longer)


def _break_json(folder):
    (folder / "compatible.json").write_text("{")


def _drop_key(folder):
    content = json.loads((folder / "compatible.json").read_text())
    del content["episodes"]["000001"]["steps"]
    (folder / "compatible.json").write_text(json.dumps(content))


def _swap_arrays(folder):
    with open(folder / "compatible.npz", "wb") as handle:
        np.savez(handle, **{"000000": np.ones(12, bool)})


def _lengthen(folder):
    """Consistent digest, but more values than steps: what a decompression bomb would look like."""
    import hashlib

    content = json.loads((folder / "compatible.json").read_text())
    with open(folder / "compatible.npz", "wb") as handle:
        np.savez(handle, **{"000000": np.ones(10_000_000, bool)})
    content["arrays_sha256"] = hashlib.sha256((folder / "compatible.npz").read_bytes()).hexdigest()
    (folder / "compatible.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_json, "cannot be read as JSON"),
        (_drop_key, r"episodes\.000001\.steps is None; expected int"),
        (_swap_arrays, "does not belong to its description"),
        (_lengthen, "is larger than its 12 steps"),
        (lambda folder: (folder / "compatible.npz").unlink(), "missing or damaged"),
    ],
)
def test_damaged_filters_are_named(dataset, damage, message):
    write_filter(dataset.path, make_filter(dataset))
    damage(dataset.path / "filters")
    with pytest.raises(DatasetError, match=message):
        read_filter(dataset.path, "compatible")


def test_a_damaged_filter_only_matters_to_those_who_use_it(dataset):
    write_filter(dataset.path, make_filter(dataset))
    write_filter(dataset.path, make_filter(dataset, "other"))
    _break_json(dataset.path / "filters")
    with pytest.warns(UserWarning, match=r"mask 'compatible' is left out: .*compatible\.json: cannot be read as JSON"):
        masks = Dataset.open(dataset.path).masks
    assert masks["other"] == ["000000", "000001", "000002"]
    assert "compatible" not in masks
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_training_data(dataset.path, STATE_BC, filter="other").train) == 36 + 9
    for use in ({"mask": "compatible"}, {"filter": "compatible"}):
        with pytest.warns(UserWarning, match="left out"), pytest.raises(DatasetError, match="cannot be read as JSON"):
            open_training_data(dataset.path, STATE_BC, **use)
    with pytest.warns(UserWarning, match="left out"):
        problems = [str(problem) for problem in check(dataset.path).problems]
    assert any("cannot be read as JSON" in problem for problem in problems)


@pytest.mark.parametrize("name", ["train", "../x", "", "a b", ".hidden", "static"])
def test_names_that_a_filter_cannot_have(name):
    with pytest.raises(ConfigError, match="filter name"):
        check_name(name)


def test_writing_again_replaces_and_leaves_nothing_behind(dataset):
    write_filter(dataset.path, make_filter(dataset))
    changed = make_filter(dataset)
    changed.keep["000000"][:] = False
    write_filter(dataset.path, changed)
    assert not read_filter(dataset.path, "compatible").keep["000000"].any()
    assert sorted(file.name for file in (dataset.path / "filters").iterdir()) == ["compatible.json", "compatible.npz"]
    assert set(filter_masks(dataset.path)) == {"compatible"}
