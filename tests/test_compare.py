"""Comparing finished evaluations: pairing, verdicts, error rates and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from simtoreal.commands.compare import Config, main
from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import write_json
from simtoreal.envs.rollout import EpisodeResult
from simtoreal.evaluation.compare import NOT_DISTINGUISHABLE, compare, load_arms
from simtoreal.evaluation.results import (
    Evaluation,
    EvaluationError,
    append_episode,
    failure_tag,
    load_evaluation,
    read_episodes,
    summarize,
)


def _episode(seed: int, success: bool, index: int = 0) -> EpisodeResult:
    return EpisodeResult(
        episode=index,
        seed=seed,
        success=success,
        steps=40 if success else 160,
        duration_s=2.0 if success else 8.0,
        milestones={"grasped": success or seed % 2 == 0, "placed": success},
        instruction="put the cube on the plate",
        failure="" if success else "timeout",
    )


def _write(folder: Path, outcomes: list[bool], *, first_seed: int = 100_000, **extra: object) -> Path:
    episodes = [_episode(first_seed + i, success, i) for i, success in enumerate(outcomes)]
    for episode in episodes:
        append_episode(folder, episode)
    content = {"task": "pick_place", "label": folder.name, "horizon": 160, **summarize(episodes), **extra}
    write_json(folder / "results.json", content)
    return folder


def test_difference_is_found_and_best_is_named(tmp_path: Path) -> None:
    good = _write(tmp_path / "good", [True] * 45 + [False] * 5)
    poor = _write(tmp_path / "poor", [True] * 20 + [False] * 30)
    result = compare(load_arms([good, poor]))
    (pair,) = result["pairs"]
    assert (pair["only_first"], pair["only_second"], pair["both"], pair["neither"]) == (25, 0, 20, 5)
    assert pair["p_value"] == pytest.approx(2 * 0.5**25)
    assert pair["verdict"] == "good is better"
    assert pair["difference"] == pytest.approx(-0.5)
    low, high = pair["difference_interval"]
    assert low < -0.5 < high < 0
    # Seven wins of one side in a row reach an e-value of 20; here the discordant pairs begin at pair 21.
    assert pair["e_decided_after"] is not None
    assert pair["e_decided_after"] <= 30
    assert {arm["label"]: arm["letters"] for arm in result["arms"]} == {"good": "a", "poor": "b"}


def test_same_policy_twice_is_not_distinguishable(tmp_path: Path) -> None:
    outcomes = [bool(i % 3) for i in range(60)]
    arms = load_arms([_write(tmp_path / "run" / name, outcomes) for name in ("first", "again")])
    (pair,) = compare(arms)["pairs"]
    assert pair["p_value"] == 1.0
    assert pair["verdict"] == NOT_DISTINGUISHABLE
    assert pair["e_decided_after"] is None


def test_false_claims_are_as_rare_as_promised() -> None:
    """Randomised A/A: equal policies with independent rollout noise, three at a time, alpha over all pairs 10 %."""
    rng = np.random.default_rng(5)
    evaluations = []
    for index in range(60):
        episodes = tuple(_episode(seed, bool(rng.random() < 0.6)) for seed in range(40))
        results = {"task": "push", **summarize(episodes)}
        evaluations.append(Evaluation(folder=Path(str(index)), label=str(index), results=results, episodes=episodes))
    claims = [
        any(pair["verdict"] != NOT_DISTINGUISHABLE for pair in compare(evaluations[i : i + 3], alpha=0.1)["pairs"])
        for i in range(0, 60, 3)
    ]
    # 20 families at a true rate below 10 %: five or more claims would happen with probability 4 %.
    assert sum(claims) <= 4


def test_many_policies_get_letters_and_corrected_p_values(tmp_path: Path) -> None:
    folders = [
        _write(tmp_path / "a", [True] * 57 + [False] * 3),
        _write(tmp_path / "b", [True] * 55 + [False] * 5),
        _write(tmp_path / "c", [True] * 15 + [False] * 45),
    ]
    result = compare(load_arms(folders))
    assert [arm["letters"] for arm in result["arms"]] == ["a", "a", "b"]
    for pair in result["pairs"]:
        assert pair["p_adjusted"] == pytest.approx(min(1.0, 3 * pair["p_value"]))


def test_unpaired_uses_independent_episodes(tmp_path: Path) -> None:
    good = _write(tmp_path / "good", [True] * 45 + [False] * 5)
    poor = _write(tmp_path / "poor", [True] * 10 + [False] * 20, first_seed=500_000)
    with pytest.raises(EvaluationError, match="0 are common"):
        compare(load_arms([good, poor]))
    result = compare(load_arms([good, poor]), paired=False)
    assert result["pairs"][0]["verdict"] == "good is better"
    assert "e_value" not in result["pairs"][0]


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one = _write(tmp_path / "one", [True, False])
    other_task = _write(tmp_path / "two", [True, False], task="push")
    longer = _write(tmp_path / "three", [True, False], horizon=300)
    with pytest.raises(EvaluationError, match="different tasks"):
        compare(load_arms([one, other_task]))
    with pytest.raises(EvaluationError, match="160 and 300 steps"):
        compare(load_arms([one, longer]))
    with pytest.raises(EvaluationError, match="at least two"):
        load_arms([one])
    with pytest.raises(EvaluationError, match="given twice"):
        load_arms([one, tmp_path / "x" / ".." / "one"])
    with pytest.raises(EvaluationError, match="not a finished evaluation"):
        load_arms([one, tmp_path / "missing"])
    diverse = _write(tmp_path / "diverse", [True, False], kind="diversity")
    with pytest.raises(EvaluationError, match=r"is a diversity measurement: .* without --diversity"):
        load_arms([one, diverse])
    with pytest.raises(EvaluationError, match="1 labels for 2"):
        load_arms([one, longer], ["only"])
    with pytest.raises(EvaluationError, match="a label of its own"):
        compare([load_evaluation(folder, "same") for folder in (one, _write(tmp_path / "four", [False, False]))])
    with pytest.raises(ConfigError, match="--alpha"):
        Config(folders=(one,), alpha=1.5)


def test_no_policy_is_better_than_one_under_other_conditions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many, few = [True] * 45 + [False] * 5, [True] * 20 + [False] * 30
    twin = {"backend": "twin", "task_digest": "a"}
    easy = _write(tmp_path / "easy", many, **twin, gap="standard")
    hard = _write(tmp_path / "hard", few, **twin, gap="hard")
    other = _write(tmp_path / "other", few, **{**twin, "task_digest": "b"}, gap="standard")
    alike = _write(tmp_path / "alike", few, **twin, gap="standard")
    old = _write(tmp_path / "old", few, backend="twin", gap="standard")  # From before digests were noted.
    claims = {
        hard: ("easy has the higher rate", "different worlds ('standard' twin, 'hard' twin)"),
        other: ("easy has the higher rate", "different files of task 'pick_place'"),
        alike: ("easy is better", ""),
        old: ("easy is better", ""),
    }
    for folder, (verdict, note) in claims.items():
        result = compare(load_arms([easy, folder]))
        assert result["pairs"][0]["verdict"] == verdict
        assert bool(result["notes"]) == bool(note)
        assert note in "".join(result["notes"])
    nominal = [_write(tmp_path / name, many, randomization=name) for name in ("none", "training")]
    nominal.append(_write(tmp_path / "unsaid", many))
    assert [len(compare(load_arms([nominal[0], folder]))["notes"]) for folder in nominal[1:]] == [1, 0]
    main(Config(folders=(easy, hard)))
    printed = " ".join(capsys.readouterr().out.split())
    assert "easy 'standard' 90.0 %" in printed
    assert "hard 'hard' twin 40.0 %" in printed
    assert "Result: easy has the higher rate" in printed


def test_two_world_models_and_two_readings_of_a_foreign_environment_are_other_worlds(tmp_path: Path) -> None:
    many, few = [True] * 45 + [False] * 5, [True] * 20 + [False] * 30
    model = {"backend": "world_model", "world_model": "world_model_0"}
    foreign = {"backend": "gymnasium", "success_key": "", "observations": {}}
    first = _write(tmp_path / "first", many, **model, world_model_checkpoint="a" * 16)
    other = _write(tmp_path / "other", few, **model, world_model_checkpoint="b" * 16)
    moved = {**model, "world_model": "../run/world_model_0"}
    alike = _write(tmp_path / "alike", few, **moved, world_model_checkpoint="a" * 16)
    old = _write(tmp_path / "old", few, **model)  # From before checkpoints were noted.
    door = _write(tmp_path / "door", many, **foreign)
    won = _write(tmp_path / "won", few, **{**foreign, "success_key": "won"})
    drawn = _write(tmp_path / "drawn", few, **{**foreign, "observations": {"image": ["render"]}})
    same = _write(tmp_path / "same", few, **foreign)
    unsaid = _write(tmp_path / "unsaid", few, backend="gymnasium")
    claims = {
        (first, other): "different world models (world_model_0 aaaaaaaa, world_model_0 bbbbbbbb)",
        (first, alike): "",
        (first, old): "",
        (door, won): "different --success-key (default, won)",
        (door, drawn): "different --observations (default, {'image': ['render']})",
        (door, same): "",
        (door, unsaid): "",
    }
    for pair, note in claims.items():
        result = compare(load_arms(pair))
        claim = "has the higher rate" if note else "is better"
        assert result["pairs"][0]["verdict"] == f"{pair[0].name} {claim}"
        assert bool(result["notes"]) == bool(note)
        assert note in "".join(result["notes"])


def test_results_that_contradict_the_table_are_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "run", [True, False, True])
    content = json.loads((folder / "results.json").read_text())
    write_json(folder / "results.json", {**content, "n": 2, "successes": 1})
    with pytest.raises(EvaluationError, match="holds 2/3"):
        load_evaluation(folder)


def test_a_line_cut_off_by_a_crash_is_forgotten_and_replaced(tmp_path: Path) -> None:
    _write(tmp_path, [True, False])
    path = tmp_path / "episodes.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole[: len(whole) // 4])
    assert len(read_episodes(tmp_path)) == 2
    append_episode(tmp_path, _episode(100_002, True, 2))
    assert [result.seed for result in read_episodes(tmp_path)] == [100_000, 100_001, 100_002]
    path.write_bytes(b"{broken}\n" + whole)
    with pytest.raises(EvaluationError, match="line 1"):
        read_episodes(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(EvaluationError, match="more than once"):
        read_episodes(tmp_path)


def test_summary_counts_milestones_and_failures() -> None:
    summary = summarize([_episode(seed, seed == 0, seed) for seed in range(4)])
    assert (summary["n"], summary["successes"], summary["success_rate"]) == (4, 1, 0.25)
    assert summary["milestones"]["grasped"]["successes"] == 2
    assert summary["completion"]["counts"] == [2, 1, 1]
    assert summary["failures"] == {"timeout:grasped": 2, "timeout:placed": 1}
    assert summary["time_to_success_s"]["median"] == 2.0
    assert failure_tag(_episode(0, True)) == ""
    with pytest.raises(EvaluationError, match="no episodes"):
        summarize([])


def test_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = (_write(tmp_path / "x", [True] * 12), _write(tmp_path / "y", [True] * 11 + [False]))
    main(Config(folders=folders, output=tmp_path / "comparison"))
    printed = capsys.readouterr().out
    assert NOT_DISTINGUISHABLE in printed.replace("\n", " ")
    assert "Result: not distinguishable" in printed
    content = json.loads((tmp_path / "comparison" / "results.json").read_text())
    assert content["arms"][1]["n"] == 12
    assert content["provenance"]["commit"]
    assert (tmp_path / "comparison" / "comparison.png").read_bytes()[:4] == b"\x89PNG"
