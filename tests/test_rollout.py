"""Rotations, action semantics and the rollout loop."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium.vector import AutoresetMode

from simtoreal.envs import Listener, make_env, make_vector_env, panda_embodiment, rollout, rotation
from simtoreal.envs.action import action_towards, integrate_action
from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ConfigError, EmbodimentMismatchError


def _random_vectors(count: int, length: float) -> np.ndarray:
    vectors = np.random.default_rng(0).normal(size=(count, 3))
    return length * vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


@pytest.mark.parametrize("angle", [1e-9, 0.3, 3.1])
def test_rotation_representations_agree(angle):
    vectors = _random_vectors(50, angle)
    q = rotation.from_rotation_vector(vectors)
    assert np.allclose(rotation.to_rotation_vector(q), vectors, atol=1e-9)
    matrices = rotation.to_matrix(q)
    assert np.allclose(np.linalg.det(matrices), 1)
    assert np.allclose(rotation.to_matrix(rotation.from_matrix(matrices)), matrices)
    assert np.allclose(rotation.to_matrix(rotation.from_6d(rotation.to_6d(q))), matrices)
    product = rotation.to_matrix(rotation.quaternion_multiply(q, q[::-1]))
    assert np.allclose(product, matrices @ matrices[::-1])


def test_action_towards_inverts_integration():
    embodiment, rng = panda_embodiment(), np.random.default_rng(1)
    down = rotation.to_6d(np.array([0.0, 1.0, 0.0, 0.0]))
    target = np.tile([0.5, 0.0, 0.2, *down, 1.0], (200, 1))
    action = rng.uniform(-1, 1, (200, 7)).astype(np.float32)
    after = integrate_action(target, action, embodiment)
    recovered = action_towards(target, after, embodiment)
    assert np.allclose(recovered[:, :6], action[:, :6], atol=1e-5)
    assert np.array_equal(recovered[:, 6] > 0, action[:, 6] > 0)


def test_targets_stay_in_the_workspace():
    embodiment = panda_embodiment()
    target = np.array([0.5, 0.0, 0.2, 1, 0, 0, 0, 1, 0, 1.0])
    for _ in range(60):
        target = integrate_action(target, np.array([1, 1, -1, 0, 0, 0, 1.0]), embodiment)
    assert target[:3].tolist() == [
        embodiment.workspace_high_m[0], embodiment.workspace_high_m[1], embodiment.workspace_low_m[2],
    ]  # fmt: skip


def test_embodiment_round_trip_and_field_by_field_difference():
    import json

    mine, theirs = panda_embodiment(64), panda_embodiment(96, render_profile="high")
    assert Embodiment.from_dict(json.loads(json.dumps(mine.to_dict()))) == mine
    assert mine.differences(mine) == []
    with pytest.raises(EmbodimentMismatchError, match=r"cameras.front.height: 64 != 96") as error:
        mine.require_equal(theirs, "checkpoint", "dataset")
    assert "render_profile: fast != high" in str(error.value)
    assert mine.differences(panda_embodiment(32, cameras=("front",))) == [
        "cameras: front, wrist != front", "cameras.front.height: 64 != 32", "cameras.front.width: 64 != 32",
    ]  # fmt: skip
    assert panda_embodiment(cameras=()).differences(mine) == ["cameras: none != front, wrist"]


class _Scripted:
    """Actor with known chunks: the action's first entry counts, so executed steps can be told apart."""

    def __init__(self, observation_steps: int, horizon: int, execute_steps: int, ensembling=None) -> None:
        self.observation_steps, self.execute_steps, self.ensembling = observation_steps, execute_steps, ensembling
        self.horizon, self.calls, self.seen = horizon, [], []

    def reset(self, slots, seeds) -> None:
        self.calls.append(("reset", slots.tolist(), list(seeds)))

    def act(self, observation, instructions, slots):
        self.calls.append(("act", slots.tolist(), list(instructions)))
        self.seen.append({key: value.copy() for key, value in observation.items()})
        chunk = np.zeros((len(slots), self.horizon, 7), np.float32)
        chunk[:, :, 0] = np.arange(self.horizon) / 100
        return chunk


class _Log(Listener):
    def __init__(self) -> None:
        self.steps, self.resets, self.results = [], [], []

    def on_reset(self, slot, episode, seed, observation, info) -> None:
        self.resets.append((slot, episode, seed, observation["proprio"].copy()))

    def on_step(self, step) -> None:
        self.steps.append(step)

    def on_episode(self, slot, result) -> None:
        self.results.append((slot, result))


def test_chunks_history_and_refill():
    env = make_vector_env("reach", 2, observe="state")
    actor, log = _Scripted(observation_steps=3, horizon=8, execute_steps=4), _Log()
    results = rollout(env, actor, [7, 8, 9], listeners=[log])
    assert [result.seed for result in results] == [7, 8, 9]
    assert [result.episode for result in results] == [0, 1, 2]
    assert all(result.failure == "timeout" and result.steps == env.task.horizon for result in results)
    assert results[0].duration_s == pytest.approx(env.task.horizon / 20)
    executed = np.array([step.action[0, 0] for step in log.steps[:8]])
    assert np.allclose(executed, np.tile(np.arange(4) / 100, 2))
    # The history begins with the first observation repeated and then slides.
    first, second = actor.seen[0]["proprio"], actor.seen[1]["proprio"]
    assert np.array_equal(first[:, 0], first[:, 2])
    assert np.array_equal(second[0, 1], log.steps[2].next_observation["proprio"][0])
    assert np.array_equal(second[0, 2], log.steps[3].next_observation["proprio"][0])
    assert ("reset", [0], [9]) in actor.calls


def test_observation_of_a_step_precedes_its_action():
    env = make_vector_env("reach", 1, observe="state")
    log = _Log()
    rollout(env, _Scripted(1, 4, 2), [3], listeners=[log])
    assert np.array_equal(log.steps[0].observation["proprio"][0], log.resets[0][3])
    for earlier, later in zip(log.steps, log.steps[1:], strict=False):
        assert np.array_equal(earlier.next_observation["proprio"], later.observation["proprio"])


def test_temporal_ensembling_averages_overlapping_chunks():
    env = make_vector_env("reach", 1, observe="state")
    log = _Log()
    rollout(env, _Scripted(1, 4, 4, ensembling=0.5), [3], listeners=[log])
    # Step 2 sees predictions from chunks made at 0, 1, 2, which say .02, .01, .00; the oldest weighs most.
    weights = np.exp(-0.5 * np.arange(3))
    expected = (weights @ np.array([0.02, 0.01, 0.0])) / weights.sum()
    assert log.steps[2].action[0, 0] == pytest.approx(expected, abs=1e-6)


class _Episodes(Listener):
    """Everything that was seen in each episode, and what each action was an answer to."""

    def __init__(self) -> None:
        self.running, self.seen, self.answered = {}, {}, {}

    def on_reset(self, slot, episode, seed, observation, info) -> None:
        self.running[slot], self.seen[seed], self.answered[seed] = seed, [observation], []

    def on_step(self, step) -> None:
        for row, slot in enumerate(step.slots):
            seed = self.running[slot]
            self.answered[seed].append({key: value[row] for key, value in step.observation.items()})
            self.seen[seed].append({key: value[row] for key, value in step.next_observation.items()})


@pytest.mark.parametrize(("observe", "randomization"), [("state", None), ("state", "standard"), ("image", "training")])
def test_number_of_environments_does_not_change_the_episodes(observe, randomization):
    from simtoreal.data_collection.expert import ScriptedExpert

    outcomes, logs = [], []
    for count in (1, 3):
        env = make_vector_env("lift", count, observe=observe, image_size=16, randomization=randomization)
        logs.append(_Episodes())
        outcomes.append(rollout(env, ScriptedExpert(env.task, env.embodiment), range(5), listeners=[logs[-1]]))
    assert outcomes[0] == outcomes[1]
    alone, together = logs
    for seed in range(5):
        for mine, theirs in zip(alone.seen[seed], together.seen[seed], strict=True):
            for key in mine:
                # A pixel on an edge may differ by a grey level between pictures drawn one or three at a time.
                assert np.abs(mine[key].astype(float) - theirs[key]).max() <= (1 if key.endswith("image") else 0)
        for given, answered in zip(together.seen[seed], together.answered[seed], strict=False):
            assert all(np.array_equal(given[key], answered[key]) for key in given)


def test_single_environment_is_the_same_loop():
    from simtoreal.data_collection.expert import ScriptedExpert

    single, vector = make_env("lift", observe="state"), make_vector_env("lift", 1, observe="state")
    expert = ScriptedExpert(vector.task, vector.embodiment)
    assert rollout(single, expert, [4, 5]) == rollout(vector, expert, [4, 5])


def test_fault_ends_the_episode_with_its_reason():
    env = make_vector_env("reach", 1, observe="state")

    class Break(Listener):
        def on_step(self, step) -> None:
            env.fields["qvel"][0, 0] = np.nan

    [result] = rollout(env, _Scripted(1, 4, 2), [0], listeners=[Break()])
    assert result.failure == "simulation diverged"
    assert not result.success
    assert result.steps == 2


def test_self_resetting_environments_are_refused():
    env = make_vector_env("reach", 1, observe="state", autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(ConfigError, match="DISABLED"):
        rollout(env, _Scripted(1, 4, 2), [0])


def test_stop_abandons_running_episodes():
    env = make_vector_env("reach", 2, observe="state")
    log = _Log()
    results = rollout(env, _Scripted(1, 4, 2), range(10), listeners=[log], stop=lambda: len(log.steps) >= 70)
    assert len(results) == 2
