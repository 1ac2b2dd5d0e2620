"""Trajectory weighting: which episodes training draws more often, and that a resumed training draws the same."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import toy_reaching as toy

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.trainer import train
from simtoreal.policies.training_data import batch_indices, open_training_data
from simtoreal.policies.weighting import (
    Weighting,
    discounted_return,
    effective_share,
    episode_weights,
    window_probabilities,
)


def test_return_prefers_fast_success_to_slow_and_slow_to_none():
    fast, slow, failed = np.zeros(20), np.zeros(60), np.zeros(60)
    fast[-1] = slow[-1] = 1
    values = [discounted_return(rewards) for rewards in (fast, slow, failed)]
    assert values == pytest.approx([0.99**19, 0.99**59, 0.0])
    assert discounted_return(np.array([1.0, 2.0, -3.0])) == pytest.approx(1 + 1.98 - 3 * 0.9801)


def test_weights_are_scaled_and_equal_returns_are_guarded():
    returns = np.array([1.0, 3.0, 2.0])
    assert episode_weights("return", returns, np.zeros((3, 1))) == pytest.approx([0.0, 1.0, 0.5])
    same = np.full(30, 0.3)
    for method in ("return", "advantage"):
        weights = episode_weights(method, same, np.random.default_rng(0).normal(size=(30, 3)))
        assert weights.tolist() == [0.0] * 30
        chosen = window_probabilities(Weighting(method=method), same, np.zeros((30, 1)), np.arange(30))
        assert chosen == pytest.approx(np.full(30, 1 / 30))


def test_advantage_is_not_fooled_by_easy_starts():
    rng = np.random.default_rng(0)
    ease, skill = rng.uniform(-1, 1, 200), np.arange(200) % 10 == 0
    # Constant, duplicated and nearly constant columns must not matter.
    beginnings = np.stack([ease, 2 * ease, np.full(200, 0.4), 1e-9 * rng.normal(size=200)], axis=1)
    returns = 0.5 * ease + 0.2 * skill
    by_return = episode_weights("return", returns, beginnings)
    by_advantage = episode_weights("advantage", returns, beginnings)
    assert (by_return[skill] > np.quantile(by_return[~skill], 0.9)).mean() < 0.5
    assert by_advantage[skill].min() > by_advantage[~skill].max()


def test_advantage_needs_more_episodes_than_coefficients():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match=r"fits 6 coefficients to 10 episodes; it needs at least 12"):
        episode_weights("advantage", rng.normal(size=10), rng.normal(size=(10, 5)))


def test_softmax_runs_over_windows():
    episode = np.repeat([0, 1, 2], [10, 30, 10])
    found = window_probabilities(
        Weighting(method="return", temperature=0.5), np.array([1.0, 1.0, 0.0]), np.zeros((3, 1)), episode
    )
    mass = np.bincount(episode, found)
    assert found.sum() == pytest.approx(1.0)
    assert mass[1] == pytest.approx(3 * mass[0])
    assert mass[0] == pytest.approx(mass[2] * np.exp(1 / 0.5))


def test_top_keeps_the_best_tenth():
    returns = np.arange(25.0)
    episode = np.repeat(np.arange(25), 4)
    found = window_probabilities(Weighting(method="top"), returns, np.zeros((25, 1)), episode)
    assert set(episode[found > 0]) == {22, 23, 24}
    assert effective_share(found) == pytest.approx(12 / 100)
    assert window_probabilities(Weighting(), returns, np.zeros((25, 1)), episode) is None
    with pytest.raises(ConfigError, match="leaves no window"):
        window_probabilities(Weighting(method="top"), returns, np.zeros((25, 1)), np.zeros(4, int))


def test_top_takes_no_failures_when_fewer_than_a_tenth_succeed():
    returns = np.zeros(40)
    returns[[7, 30]] = 0.5, 0.4
    episode = np.repeat(np.arange(40), 3)
    found = window_probabilities(Weighting(method="top"), returns, np.zeros((40, 1)), episode)
    assert set(episode[found > 0]) == {7, 30}
    assert window_probabilities(Weighting(method="top"), np.ones(40), np.zeros((40, 1)), episode) is None


@pytest.mark.parametrize("changes", [{"method": "best"}, {"temperature": 0.0}, {"temperature": float("inf")}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError, match="expected"):
        Weighting(**changes)


def test_batches_follow_the_probabilities_and_depend_on_seed_and_step_only():
    probabilities = np.array([0.0, 0.5, 0.3, 0.2, 0.0])
    cumulative = np.cumsum(probabilities)
    drawn = np.concatenate([batch_indices(5, 64, 3, step, cumulative) for step in range(200)])
    assert np.bincount(drawn, minlength=5) / len(drawn) == pytest.approx(probabilities, abs=0.015)
    assert np.array_equal(batch_indices(5, 64, 3, 17, cumulative), drawn[17 * 64 : 18 * 64])
    assert not np.array_equal(batch_indices(5, 64, 3, 18, cumulative), drawn[17 * 64 : 18 * 64])
    assert not np.array_equal(batch_indices(5, 64, 4, 17, cumulative), drawn[17 * 64 : 18 * 64])


def test_weighted_training_resumes_bit_by_bit(tmp_path, monkeypatch):
    from test_trainer import assert_identical

    from simtoreal.policies import trainer as trainer_module

    config, settings = toy.small_diffusion(), toy.small_trainer()
    plain = toy.data(config)
    probabilities = np.linspace(0, 1, len(plain.train))
    data = dataclasses.replace(plain, probabilities=probabilities / probabilities.sum())
    train(config, settings, data, tmp_path / "whole")

    class Killed(Exception):
        pass

    step = trainer_module.Training.take_step

    def die(self, batch):
        if self.step == 5:
            raise Killed
        return step(self, batch)

    monkeypatch.setattr(trainer_module.Training, "take_step", die)
    with pytest.raises(Killed):
        train(config, settings, data, tmp_path / "parts")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="other settings or data"):
        train(config, settings, plain, tmp_path / "parts", resume=True)
    train(config, settings, data, tmp_path / "parts", resume=True)
    assert_identical(tmp_path / "whole", tmp_path / "parts")
    train(config, settings, plain, tmp_path / "plain")
    with pytest.raises(AssertionError):
        assert_identical(tmp_path / "whole", tmp_path / "plain")


def test_weights_of_a_dataset_with_failures(tmp_path):
    from simtoreal.data_collection.expert import ScriptedExpert
    from simtoreal.data_collection.operator_style import STYLES
    from simtoreal.data_collection.recorder import Recorder, memory_takes
    from simtoreal.data_collection.writer import DatasetWriter
    from simtoreal.envs import make_vector_env, rollout
    from simtoreal.policies.config import BCConfig

    env = make_vector_env("reach", 8, observe="state")
    with DatasetWriter(tmp_path, env.embodiment, {"reach": env.task.to_dict()}) as writer:
        for style, seeds in (("careful", range(8)), ("hasty", range(8, 16))):
            recorder = Recorder(
                memory_takes(writer), task="reach", embodiment=env.embodiment, source="expert", operator=style,
                keep=lambda result: True,
            )  # fmt: skip
            rollout(env, ScriptedExpert(env.task, env.embodiment, style=STYLES[style]), seeds, listeners=[recorder])
        # Someone who does nothing.
        idle = Recorder(
            memory_takes(writer), task="reach", embodiment=env.embodiment, source="expert", operator="idle",
            keep=lambda result: True,
        )  # fmt: skip
        rollout(env, _Idle(), range(16, 20), listeners=[idle])
    config = BCConfig(image_keys=(), state_keys=("proprio", "object_state"), horizon=4, execute_steps=2)
    data = open_training_data(tmp_path, config, mask="all", weighting=Weighting(method="return"), hold_out=False)
    operators = {episode.name: episode.operator for episode in _episodes(tmp_path)}
    assert json.dumps(sorted(set(operators.values()))) == '["careful", "hasty", "idle"]'
    mass = np.bincount(data.train.episode_of_window, data.probabilities)
    share = mass / np.bincount(data.train.episode_of_window)
    by_operator = {
        name: np.mean([share[i] for i, other in enumerate(operators.values()) if other == name])
        for name in ("careful", "hasty", "idle")
    }
    assert by_operator["hasty"] > 1.3 * by_operator["careful"]
    assert by_operator["careful"] > 5 * by_operator["idle"]
    with pytest.raises(ConfigError, match="Collect more episodes, or weight by return"):
        open_training_data(tmp_path, config, mask="all", weighting=Weighting(method="advantage"))


def _episodes(folder):
    from simtoreal.data_collection.dataset import Dataset

    return Dataset.open(folder).filter("all")


class _Idle:
    observation_steps, execute_steps, ensembling = 1, 1, None

    def reset(self, slots, seeds) -> None:
        pass

    def act(self, observation, instructions, slots) -> np.ndarray:
        return np.zeros((len(slots), 1, 7), np.float32)
