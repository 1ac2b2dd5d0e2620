"""Behavioural diversity: the tasks avoid and align, labels from poses, entropies, repeated rollouts."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.diversity import (
    behaviors,
    composite_score,
    conditional_entropy,
    dataset_diversity,
    label_behavior,
    unconditional_entropy,
)
from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.data_collection.recorder import Recorder, memory_takes
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs import Listener, make_vector_env, rollout
from simtoreal.envs.errors import ConfigError, TaskError
from simtoreal.envs.predicates import SceneView, parse_predicate
from simtoreal.envs.rollout import TASK_FAILED
from simtoreal.envs.task_file import load_task, parse_task
from simtoreal.evaluation.diversity import (
    RepeatedActor,
    corrected_draws,
    entropy_draws,
    evaluate_diversity,
    interval_of,
    pinned_counts,
    read_rollouts,
    summarize_diversity,
)
from simtoreal.evaluation.results import EvaluationError
from simtoreal.evaluation.statistics import effective_trials, format_rate, posterior_interval, repeated_interval

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import diversity as benchmark

SETTINGS = {"task": "avoid", "label": "expert"}


def expert(env) -> ScriptedExpert:
    return ScriptedExpert(env.task, env.embodiment)


# --- entropies (card: D3IL) ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 24])
def test_entropy_is_one_for_all_alike_and_zero_for_one_or_none(count):
    assert unconditional_entropy([5] * count) == pytest.approx(1.0)
    assert unconditional_entropy([7] + [0] * (count - 1)) == 0.0
    assert unconditional_entropy([0] * count) == 0.0
    assert conditional_entropy(np.full((3, count), 2), 2 * count) == pytest.approx(1.0)
    assert conditional_entropy(np.eye(count, dtype=int)[[0, 1]] * 4, 4) == pytest.approx(0.0, abs=1e-9)
    assert conditional_entropy(np.zeros((3, count), int), 8) == 0.0


def test_entropies_by_hand():
    # A quarter and three quarters of two ways.
    expected = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert unconditional_entropy([1, 3]) == pytest.approx(expected)
    # The same split among 24 ways is much less of what is possible.
    assert unconditional_entropy([1, 3] + [0] * 22) == pytest.approx(expected * math.log(2) / math.log(24))
    # Contexts that always take one way each: diverse together, not from any one of them.
    counts = np.array([[4, 0], [0, 4]])
    assert unconditional_entropy(counts.sum(0)) == pytest.approx(1.0)
    assert conditional_entropy(counts, 4) < 1e-9
    # A context without a success counts as 0; failures elsewhere do not touch the shares of the successes.
    assert conditional_entropy(np.array([[2, 2], [1, 1], [0, 0]]), 8) == pytest.approx(2 / 3)


def test_miller_madow_adds_what_small_samples_lose():
    rng = np.random.default_rng(0)
    draws = [np.bincount(rng.integers(4, size=20), minlength=4) for _ in range(400)]
    plain = np.mean([unconditional_entropy(counts) for counts in draws])
    corrected = np.mean([unconditional_entropy([*counts, 0, 0], miller_madow=True) for counts in draws])
    assert plain == pytest.approx(1 - 3 / (2 * 20) / math.log(4), abs=0.01)
    assert corrected == pytest.approx(math.log(4) / math.log(6), abs=0.006)
    assert unconditional_entropy([3, 1], miller_madow=True) == pytest.approx(
        unconditional_entropy([3, 1]) + 1 / 8 / math.log(2)
    )
    assert unconditional_entropy([0, 0], miller_madow=True) == 0.0


def test_score_selects_as_the_benchmark_does():
    assert composite_score("avoid", 0.5, 1.0) == pytest.approx(0.6)
    assert composite_score("align", 0.5, 1.0) == pytest.approx(0.75)
    assert (pinned_counts("avoid"), pinned_counts("align")) == ((1, 100), (60, 8))
    assert pinned_counts("avoid", 3, 2) == (3, 2)


# --- intervals -------------------------------------------------------------------------------------------------------


def rows_of(task: str, counts: np.ndarray, rollouts: int) -> list[dict]:
    """Rollouts with ``(S, B)`` successes per context and behaviour, the others failures."""
    names = ["/".join(behavior) for behavior in behaviors(load_task(task))]
    rows = []
    for context, row in enumerate(counts):
        found = [name for name, count in zip(names, row, strict=True) for _ in range(count)]
        found += [None] * (rollouts - len(found))
        rows += [
            {"context": benchmark.EVALUATION_SEED + context, "rollout": number, "success": name is not None,
             "behavior": name, "failure_tag": "" if name else "timeout"}
            for number, name in enumerate(found)
        ]  # fmt: skip
    return rows


def table_of(task: str, counts: np.ndarray, rollouts: int) -> dict:
    return summarize_diversity(load_task(task), rows_of(task, counts, rollouts), rollouts)


def covered(draw, contexts: int, rollouts: int, truth: float, trials: int = 60) -> float:
    """Share of simulated measurements whose interval holds the true unconditional entropy."""
    held = []
    for _ in range(trials):
        draws = corrected_draws(entropy_draws(draw(), rollouts, 200)[:, 0])
        low, high = interval_of(draws, rollouts if contexts == 1 else contexts)
        held.append(low <= truth <= high)
    return float(np.mean(held))


@pytest.mark.parametrize(("contexts", "rollouts"), [(1, 100), (20, 24)])
def test_entropy_intervals_cover_the_truth_of_near_even_and_of_uneven_policies(contexts, rollouts):
    rng = np.random.default_rng(0)
    near = np.array([*(1 + 0.1 * np.sin(np.arange(24))), 2.4])  # The last one is failing.
    uneven = np.array([*(1 / np.arange(1, 25)), 0.4])
    for weights in (near, uneven):
        shares = weights / weights.sum()
        truth = unconditional_entropy(np.round(1e9 * shares[:-1]))
        share = covered(lambda p=shares: rng.multinomial(rollouts, p, size=contexts)[:, :-1], contexts, rollouts, truth)
        # Resampled entropies as they are, corrected by Miller-Madow, hold it in 0 to 15 % of the near-even ones.
        assert share >= 0.8


def test_entropy_intervals_know_that_repeats_of_one_start_are_alike():
    rng = np.random.default_rng(0)

    def deterministic() -> np.ndarray:
        return 8 * np.eye(24, dtype=int)[rng.integers(24, size=60)]

    # Miller-Madow counts 480 rollouts where there are 60, and its interval holds the truth in 27 %.
    assert covered(deterministic, 60, 8, 1.0) >= 0.8


def test_the_entropy_and_its_interval_belong_together():
    counts = np.full((1, 24), 4)
    found = table_of("avoid", counts, 100)
    assert found["entropy"] == pytest.approx(1.0)
    assert found["entropy_corrected"] == 1.0
    # Such an even sample is a rare one, and no reason to be certain.
    assert 0.96 < found["entropy_interval"][0] < 0.99
    assert found["entropy_interval"][1] == 1.0
    uneven = table_of("align", np.tile([[6, 1], [3, 3]], (30, 1)), 8)
    low, high = uneven["entropy_interval"]
    assert low < uneven["entropy_corrected"] < high
    assert uneven["entropy"] <= uneven["entropy_corrected"]
    low, high = uneven["conditional_entropy_interval"]
    assert low < uneven["conditional_entropy"] < high


def test_the_conditional_interval_is_of_what_these_rollouts_show_on_average():
    rng = np.random.default_rng(0)

    def draw(contexts: int) -> np.ndarray:
        return np.array([rng.multinomial(8, [p, 1 - p]) for p in rng.beta(2, 2, size=contexts)])

    expected = conditional_entropy(draw(4000), 8)
    held = []
    for _ in range(60):
        low, high = interval_of(entropy_draws(draw(60), 8, 200)[:, 1], 60)
        held.append(low <= expected <= high)
    assert np.mean(held) >= 0.85


def test_there_is_no_interval_where_nothing_is_known():
    few = table_of("align", np.tile([[3, 3]], (9, 1)), 8)
    one_way = table_of("align", np.tile([[8, 0]], (20, 1)), 8)
    none = table_of("align", np.zeros((20, 2), int), 8)
    single = table_of("avoid", np.full((1, 24), 4), 100)
    assert few["entropy_interval"] is one_way["entropy_interval"] is none["entropy_interval"] is None
    assert few["conditional_entropy_interval"] is one_way["conditional_entropy_interval"] is None
    assert single["conditional_entropy_interval"] is None  # One context says nothing about others.
    assert (none["entropy_corrected"], one_way["entropy_corrected"]) == (0.0, 0.0)


def test_repeats_of_a_start_that_always_ends_alike_count_once():
    alike = [8] * 53 + [0] * 7
    assert effective_trials(alike, 8) == 60
    assert repeated_interval(alike, 8) == pytest.approx(posterior_interval(53, 60))
    found = table_of("align", np.array([[count, 0] for count in alike]), 8)
    assert (found["n"], found["contexts"]) == (480, 60)
    assert found["interval"] == pytest.approx([0.778, 0.942], abs=5e-4)
    # As different as chance makes them: all rollouts count.
    independent = np.random.default_rng(1).binomial(8, 0.85, size=60)
    assert effective_trials(independent, 8) == pytest.approx(480, rel=0.25)
    # Nobody knows how much alike they are: every context counts once.
    assert repeated_interval([8] * 60, 8) == pytest.approx(posterior_interval(60, 60))
    assert repeated_interval([0] * 60, 8) == pytest.approx(posterior_interval(0, 60))
    assert effective_trials([5, 4, 3], 8) == 3
    # How often from this start.
    assert repeated_interval([90], 100) == posterior_interval(90, 100)
    assert effective_trials([1, 0] * 10, 1) == 20
    with pytest.raises(ConfigError, match="no contexts"):
        effective_trials([], 8)
    with pytest.raises(ConfigError, match="9 successes in 8 trials are impossible"):
        effective_trials([9], 8)
    text = format_rate(424, 480, contexts=60, interval=found["interval"])
    assert text == "88 % (424/480 from 60 contexts, 95 % interval 78-94 %)"


@pytest.mark.parametrize("alike", [None, 2.0, 0.3])
def test_success_intervals_over_contexts_cover_the_rate(alike):
    rng, held = np.random.default_rng(0), []
    for _ in range(150):
        rates = np.full(60, 0.85) if alike is None else rng.beta(alike * 0.85, alike * 0.15, size=60)
        low, high = repeated_interval(rng.binomial(8, rates), 8)
        held.append(low <= 0.85 <= high)
    # All rollouts as independent ones: 70 and 53 % where they are alike.
    assert np.mean(held) >= 0.9


def test_the_benchmark_has_intervals_over_contexts_and_over_all_trainings():
    alike = np.array([[8, 0]] * 30 + [[0, 8]] * 23 + [[0, 0]] * 7)
    mixed = np.random.default_rng(0).multinomial(8, [0.6, 0.3, 0.1], size=60)[:, :2]
    one, two = ([rows_of("align", counts, 8) for counts in tables] for tables in ((alike,), (alike, mixed)))
    assert benchmark.success_interval("align", one) == pytest.approx(posterior_interval(53, 60))
    draws = [benchmark.entropies("align", rows) for rows in (one, two)]
    summaries = [table_of("align", counts, 8) for counts in (alike, mixed)]
    for column, key in enumerate(("entropy", "conditional_entropy")):
        assert draws[0][0, column] == pytest.approx(summaries[0][key])
        assert draws[1][0, column] == pytest.approx(np.mean([found[key] for found in summaries]))
    row = benchmark.arm("align", "unet", two, draws[1])
    assert (row["n"], row["contexts"], row["training_seeds"], row["interval"]) == (960, 60, 2, None)
    low, high = map(float, row["conditional interval"].split("-"))
    # One training always does the same, the other does not: two trainings tell little about a third.
    assert low < 0.05
    assert high > summaries[1]["conditional_entropy"] - 0.05
    assert benchmark.arm("align", "bc_l2", one, draws[0])["conditional interval"] is None


# --- task language ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(failure="not released(pots_1)"), "failure: .*Did you mean 'post_1'"),
        (
            lambda c: c["behaviors"].update(row_1={"left": "past(tcp, post_1)"}),
            "behaviors.row_1' must be .* two labels",
        ),
        (lambda c: c["behaviors"]["row_1"].update(left=3), "behaviors.row_1.left' must be a predicate"),
        (
            lambda c: c["behaviors"]["row_1"].update(left="released(post_1)"),
            "released cannot be told from logged poses",
        ),
        (lambda c: c["behaviors"]["row_1"].update(left="pasd(tcp, post_1)"), "Did you mean 'past'"),
    ],
)
def test_mistakes_in_failure_and_behaviors_name_the_key(edit, message):
    content = load_task("avoid").to_dict()
    edit(content)
    with pytest.raises(TaskError, match=message):
        parse_task(content, "mine.yaml")


def test_aligned_needs_position_and_rotation():
    objects = load_task("align").objects
    aligned = parse_predicate("aligned(frame, mark, 0.018, 8.64)", objects)
    half = np.deg2rad([0.0, 8.0, 9.0, 0.0]) / 2
    turned = np.stack([np.cos(half), 0 * half, 0 * half, np.sin(half)], axis=-1)
    places = np.zeros((4, 3))
    places[3, 0] = 0.02
    straight = np.tile([-1.0, 0.0, 0.0, 0.0], (4, 1))  # The same rotation as (1, 0, 0, 0).
    scene = SceneView({"frame": places, "mark": np.zeros((4, 3))}, {"frame": turned, "mark": straight}, {}, {}, {}, 0)
    assert aligned(scene).tolist() == [True, True, False, False]
    with pytest.raises(TaskError, match="expects a number in degrees"):
        parse_predicate("aligned(frame, mark, 0.018, wide)", objects)


def test_touching_a_post_ends_the_episode_as_a_failure():
    class Straight:
        """Down before the first row, then straight into its only post."""

        observation_steps, execute_steps, ensembling = 1, 1, None

        def reset(self, slots, seeds) -> None:
            pass

        def act(self, observation, instructions, slots) -> np.ndarray:
            tcp = observation["proprio"][:, -1, :3]
            goal = np.where(tcp[:, 2:] > 0.03, [[0.34, 0.0, 0.02]], [[0.7, 0.0, 0.02]])
            away = goal - tcp
            away[:, 2] = np.where(np.abs(tcp[:, 0] - 0.34) > 0.05, np.maximum(away[:, 2], 0.1 - tcp[:, 2]), away[:, 2])
            actions = np.zeros((len(slots), 1, 7), np.float32)
            low = tcp[:, 2] < 0.03
            actions[:, 0, :3] = np.clip(np.where(low[:, None], [[0.03, 0, 0]], away) / 0.02, -1, 1)
            actions[:, 0, 6] = -1
            return actions

    class Rewards(Listener):
        total, ended = 0.0, False

        def on_step(self, step) -> None:
            self.total += step.reward.sum()
            self.ended |= bool(step.terminated.any())

    env, rewards = make_vector_env("avoid", 1, observe="state"), Rewards()
    [result] = rollout(env, Straight(), [3], listeners=[rewards])
    assert (result.success, result.failure) == (False, TASK_FAILED)
    assert result.steps < env.task.horizon
    assert (rewards.total, rewards.ended) == (0.0, True)


def test_passing_above_the_posts_is_a_failure():
    env = make_vector_env("avoid", 1, observe="state")
    env.reset(seed=0)
    forward = np.zeros((1, 7), np.float32)
    forward[0, 0] = 1
    for _ in range(12):
        _, reward, terminated, _, info = env.step(forward)
        if terminated[0]:
            break
    assert terminated[0]
    assert info["task_failed"][0]
    assert reward[0] == 0


def test_coming_down_behind_the_first_row_is_a_failure():
    env = make_vector_env("avoid", 1, observe="state")
    observation, _ = env.reset(seed=0)
    down = np.zeros((1, 7), np.float32)
    down[0, 2], down[0, 6] = -1, -1
    while observation["proprio"][0, 2] > 0.08:
        assert observation["proprio"][0, 0] > 0.37, "home is beyond the first row"
        observation, _, terminated, _, info = env.step(down)
        assert not terminated[0]
    for _ in range(3):
        _, _, terminated, _, info = env.step(down)
        if terminated[0]:
            break
    assert info["task_failed"][0]


def test_a_start_that_has_failed_already_is_drawn_again():
    # Under randomisation the arm may begin low and far ahead, which would be a failure without having done anything.
    env = make_vector_env("avoid", 30, observe="state", randomization="training")
    env.reset(seed=0)
    assert not env.task.failure_predicate(env._scene()).any()
    assert len(np.unique(env.batch.state.round(6), axis=0)) == 30


# --- labels and repeated rollouts ------------------------------------------------------------------------------------


def test_expert_covers_all_24_passages_and_the_labels_name_them(tmp_path):
    env = make_vector_env("avoid", 24, observe="state")
    results = evaluate_diversity(env, expert(env), range(24), 1, tmp_path, SETTINGS)
    assert (results["successes"], results["unlabelled"]) == (24, 0)
    assert len(results["behaviors"]) == 24
    assert results["entropy"] == pytest.approx(1.0)
    assert results["conditional_entropy"] < 1e-9  # One rollout from each start has no diversity.
    # The expert reads its gaps from the seed: left to right, the first row turning fastest.
    rows = {row["context"]: row["behavior"] for row in read_rollouts(tmp_path)}
    assert rows[0] == "left/left/far_left"
    assert rows[1] == "right/left/far_left"
    assert rows[23] == "right/right/far_right"


def test_align_is_labelled_by_the_side_it_is_pushed_from(tmp_path):
    env = make_vector_env("align", 8, observe="state")
    evaluate_diversity(env, expert(env), range(8), 1, tmp_path, {"task": "align"})
    for row in read_rollouts(tmp_path):
        assert row["behavior"] == (None if not row["success"] else "outside" if row["context"] % 2 else "inside")
    assert sum(row["success"] for row in read_rollouts(tmp_path)) >= 7


def test_repetitions_begin_in_the_same_state_with_other_noise():
    class States(Listener):
        def __init__(self) -> None:
            self.states, self.actions = [], []

        def on_reset(self, slot, episode, seed, observation, info) -> None:
            self.states.append((seed, info["sim_state"].copy()))

    env = make_vector_env("align", 2, observe="state", record_state=True)
    seeds, numbers = [5, 5, 5, 6, 6, 6], [0, 1, 2, 0, 1, 2]
    inner, seen = expert(env), []
    reset = inner.reset
    inner.reset = lambda slots, given: (seen.extend(given), reset(slots, given))
    states = States()
    rollout(env, RepeatedActor(inner, seeds, numbers), seeds, listeners=[states], stop=lambda: len(seen) == 6)
    by_seed = {seed: [state for other, state in states.states if other == seed] for seed in (5, 6)}
    assert [len(found) for found in by_seed.values()] == [3, 3]
    for found in by_seed.values():
        assert all(np.array_equal(found[0], state) for state in found)
    assert not np.array_equal(by_seed[5][0], by_seed[6][0])
    assert (seen[0], seen[3]) == (5, 6)  # The first repetition is the plain episode.
    assert len(set(seen)) == 6


def test_neither_the_number_of_environments_nor_an_interruption_changes_the_rollouts(tmp_path):
    tables = []
    for count in (2, 5):
        env = make_vector_env("avoid", count, observe="state")
        evaluate_diversity(env, expert(env), [40, 41], 3, tmp_path / str(count), SETTINGS)
        tables.append(read_rollouts(tmp_path / str(count)))
    assert tables[0] == tables[1]
    assert [(row["context"], row["rollout"]) for row in tables[0]] == [(c, r) for c in (40, 41) for r in range(3)]
    file = tmp_path / "2" / "rollouts.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:3]) + lines[3][:20])
    env = make_vector_env("avoid", 4, observe="state")
    evaluate_diversity(env, expert(env), [40, 41], 3, tmp_path / "2", SETTINGS)
    assert read_rollouts(tmp_path / "2") == tables[0]
    # The first session ran six, of which the damaged table has three left.
    stored = json.loads((tmp_path / "2" / "results.json").read_text())
    assert [session["episodes"] for session in stored["sessions"]] == [6, 3]
    before = (tmp_path / "2" / "results.json").read_bytes()
    assert evaluate_diversity(env, expert(env), [40, 41], 3, tmp_path / "2", SETTINGS) == stored
    assert (tmp_path / "2" / "results.json").read_bytes() == before
    # An earlier version stored other intervals; they are replaced without running anything.
    former = {key: value for key, value in stored.items() if key != "entropy_corrected"} | {"interval": [0.0, 0.1]}
    (tmp_path / "2" / "results.json").write_text(json.dumps(former))
    again = evaluate_diversity(env, expert(env), [40, 41], 3, tmp_path / "2", SETTINGS)
    assert (again["interval"], again["sessions"]) == (stored["interval"], stored["sessions"])
    with pytest.raises(EvaluationError, match="rollouts: 3 there, 4 now"):
        evaluate_diversity(env, expert(env), [40, 41], 4, tmp_path / "2", SETTINGS)


def test_tasks_without_behaviours_are_refused(tmp_path):
    env = make_vector_env("reach", 1, observe="state")
    with pytest.raises(ConfigError, match="task 'reach' says nothing about behaviours; add 'behaviors'"):
        evaluate_diversity(env, expert(env), [0], 1, tmp_path, {"task": "reach"})
    assert not list(tmp_path.iterdir())


def test_entropy_of_a_dataset_falls_when_a_filter_deletes_a_way(tmp_path):
    env = make_vector_env("align", 6, observe="state")
    with DatasetWriter(tmp_path, env.embodiment, {"align": env.task.to_dict()}) as writer:
        recorder = Recorder(
            memory_takes(writer), task="align", embodiment=env.embodiment, source="expert", operator="expert"
        )
        rollout(env, expert(env), range(6), listeners=[recorder])
    dataset = Dataset.open(tmp_path)
    whole = dataset_diversity(dataset)
    assert whole["entropy"] > 0.8
    assert (whole["seen"], whole["behaviors"]) == (2, 2)
    outside = [episode.name for episode in dataset.episodes if episode.seed % 2]
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, "masks": {"outside": outside}}))
    filtered = dataset_diversity(Dataset.open(tmp_path), "outside")
    assert (filtered["entropy"], filtered["counts"]) == (0.0, {"outside": len(outside)})


def test_a_choice_that_was_never_made_leaves_no_label():
    env = make_vector_env("avoid", 1, observe="state")
    observation, _ = env.reset(seed=0)
    assert label_behavior(env.task, observation["proprio"], observation["object_state"]) is None
    assert len(behaviors(env.task)) == 24


def test_command_line_reports_entropy_and_refuses_what_does_not_fit(tmp_path, capsys):
    from simtoreal import cli

    common = ["evaluate", "--actor", "expert", "--task", "avoid", "--output", str(tmp_path / "out")]
    cli.run([*common, "--diversity", "--contexts", "2", "--rollouts", "2"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (results["kind"], results["n"], results["contexts"], results["rollouts"]) == ("diversity", 4, 2, 2)
    printed = capsys.readouterr().out
    assert f"entropy {results['entropy']:.3f}" in printed
    assert "/4 from 2 contexts, 95 % interval" in printed
    assert f"without the bias of small samples {results['entropy_corrected']:.3f}\n" in printed
    cli.run([*common[:-1], str(tmp_path / "one"), "--diversity", "--contexts", "1", "--rollouts", "12"])
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert "/12 from 1 context, 95 % interval" in capsys.readouterr().out
    assert results["interval"] == pytest.approx(list(posterior_interval(results["successes"], 12)))
    with pytest.raises(ConfigError, match="--contexts and --rollouts belong to --diversity"):
        cli.run([*common, "--rollouts", "2"])
    with pytest.raises(ConfigError, match="must be at least 1"):
        cli.run([*common, "--diversity", "--rollouts", "0"])
