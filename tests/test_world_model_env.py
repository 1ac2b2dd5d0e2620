"""The learned backend keeps the interface, begins in real frames, and ends what it cannot imagine."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from point_policy import point_policy
from small_world import FLOW, MOMENT, RESIDUAL, make_world_data

from simtoreal.envs import rollout
from simtoreal.envs.action import integrate_action
from simtoreal.envs.contract import check_robot_env
from simtoreal.envs.errors import ActionError, ConfigError, EmbodimentMismatchError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.task import SUCCESS_HOLD_STEPS
from simtoreal.policies.chunk_rollout import Starts, collect_rollouts
from simtoreal.policies.reinforcement_config import ExplorationConfig
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.contexts import Contexts
from simtoreal.world_models.reward_calibration import calibrate_reward
from simtoreal.world_models.trainer import train_world_model
from simtoreal.world_models.vector_env import OUT_OF_THE_QUESTION, WorldModelVectorEnv, closeness
from simtoreal.world_models.video_data import VideoData, open_video_data
from simtoreal.world_models.world_model import WorldModel, fit_world_statistics

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> VideoData:
    return open_video_data([make_world_data(tmp_path_factory.mktemp("world") / "data")])


@pytest.fixture(scope="module")
def loaded(data, tmp_path_factory) -> LoadedWorldModel:
    run = tmp_path_factory.mktemp("run")
    train_world_model(RESIDUAL, MOMENT, data, run, device="cpu")
    loaded = load_world_model(run)
    # A model this small sees success where there is none; when it does is none of the interface's business.
    loaded.model.classifier.threshold.fill_(2.0)
    return loaded


@pytest.fixture
def env(loaded, data):
    return WorldModelVectorEnv(loaded, 3, data)


class Still:
    """Acts without moving."""

    observation_steps, execute_steps, ensembling = 2, 4, None

    def reset(self, slots, seeds):
        pass

    def act(self, observation, instructions, slots):
        action = np.zeros((len(slots), 8, 7), np.float32)
        action[..., -1] = 1.0
        return action


def test_it_keeps_the_contract(env):
    check_robot_env(env, deterministic=True)


def test_a_flow_model_keeps_the_contract_but_for_the_motion_it_has_not_learned(loaded, data, monkeypatch):
    torch.manual_seed(0)
    model = WorldModel(FLOW, data.embodiment, fit_world_statistics(data)).eval().requires_grad_(False)
    model.classifier.threshold.fill_(2.0)
    monkeypatch.setattr("simtoreal.envs.contract._Contract.check_motion", lambda self: None)
    untrained = dataclasses.replace(loaded, model=model)
    check_robot_env(WorldModelVectorEnv(untrained, 2, data), deterministic=True)


def test_episodes_begin_in_real_frames(env, data):
    observation, info = env.reset(seed=[0, 1, len(data.ends)])
    for slot, episode in enumerate((0, 1, 0)):
        start = data.starts[episode]
        for view, key in enumerate(data.embodiment.image_keys):
            assert np.array_equal(observation[key][slot], data.images[start, view])
        assert np.array_equal(observation["proprio"][slot], data.proprio[start])
        assert info["instruction"][slot] == data.instructions[episode]
    assert info["init_id"].tolist() == [0, 1, 0]
    assert "object_state" not in observation


def test_the_target_is_that_of_the_real_episode(env, data):
    env.reset(seed=[0, 1, 2])
    for step in range(4):
        action = data.actions[data.starts[:3] + step]
        *_, info = env.step(action)
        np.testing.assert_allclose(info["target"], data.targets[data.starts[:3] + step], atol=1e-4)


def test_equal_seeds_equal_episodes_wherever_they_run(env):
    observation, _ = env.reset(seed=[4, 4, 5])
    actions = np.tile(np.float32([0.3, -0.2, 0.1, 0, 0, 0, 1]), (3, 1))
    for _ in range(5):
        observation, *_ = env.step(actions)
    for value in observation.values():
        np.testing.assert_allclose(
            value[0].astype(float), value[1].astype(float), atol=1e-4 if value.dtype.kind == "f" else 1
        )
    assert np.abs(observation["proprio"][0] - observation["proprio"][2]).max() > 1e-3


def test_a_seed_also_fixes_the_episodes_that_follow(env):
    def follow() -> int:
        env.reset()
        return env._generators[0].initial_seed()

    env.reset(seed=5)
    first = follow()
    env.reset(seed=5)
    assert env.np_random_seed == 5
    assert follow() == first


def test_the_control_loop_runs_on_it(env, data):
    results = rollout(env, Still(), range(5))
    assert [result.steps for result in results] == [env.task.horizon] * 5
    assert {result.failure for result in results} == {"timeout"}
    actor = Still()
    actor.embodiment = panda_embodiment(16, render_profile="high")
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        rollout(env, actor, range(3))


def test_success_needs_as_many_frames_in_a_row_as_in_the_simulation_and_pays_once(env, monkeypatch):
    held = [0.9] * SUCCESS_HOLD_STEPS
    told = iter([*held[1:], 0.1, *held, 0.9])
    env.threshold = 0.5

    def probability(latents, proprio):
        return torch.full((len(latents),), next(told))

    monkeypatch.setattr(env.model, "success_probability", probability)
    env.reset(seed=0)
    action = np.zeros((3, 7), np.float32)
    rewards, ended = [], []
    for _ in range(2 * SUCCESS_HOLD_STEPS):
        _, reward, terminated, _, info = env.step(action)
        rewards.append(reward[0])
        ended.append(bool(terminated[0]))
        assert info["success"].tolist() == terminated.tolist()
    assert rewards == [0] * (2 * SUCCESS_HOLD_STEPS - 1) + [1]
    assert ended == [False] * (2 * SUCCESS_HOLD_STEPS - 1) + [True]
    assert not env.step(action)[1].any(), "an episode that has ended is paid no more"


def test_what_comes_close_to_success_is_rewarded_by_how_close(loaded, data, monkeypatch):
    env = WorldModelVectorEnv(loaded, 3, data, graded=True)
    env.threshold, env.consecutive = 0.5, 2
    told = iter([0.2, 0.3, 0.01, 0.4, 0.25, 0.9, 0.9])
    monkeypatch.setattr(
        env.model, "success_probability", lambda latents, proprio: torch.full((len(latents),), next(told))
    )
    env.reset(seed=0)
    action = np.zeros((3, 7), np.float32)
    rewards = [env.step(action)[1][0] for _ in range(7)]
    # Of two frames in a row the less likely one counts, and only what is closer than anything before is rewarded.
    first, second = closeness(np.array([0.2, 0.25]), 0.5)
    assert rewards == pytest.approx([0, first, 0, 0, second - first, 0, 1 - second])
    assert 0 < first < second < 1
    # An episode that follows begins from nothing.
    told = iter([0.1, 0.1])
    env.reset(seed=0, options={"reset_mask": np.array([True, False, False])})
    env.step(action)
    _, reward, _, _, _ = env.step(action)
    assert reward.tolist() == pytest.approx([float(closeness(np.array(0.1), 0.5)), 0, 0])


def test_closeness_is_ordered_as_probability_is_and_ends_at_the_threshold():
    probability = np.array([0.0, 1e-4, 1e-3, 0.1, 0.5, 0.89, 0.9, 1.0])
    close = closeness(probability, 0.9)
    assert close[:2].tolist() == [0, 0]
    assert close[-2:].tolist() == [1, 1]
    assert (np.diff(close[1:-1]) > 0).all()
    # The middle between the odds that count for nothing and those of the threshold.
    odds = (OUT_OF_THE_QUESTION + np.log(9)) / 2
    assert closeness(1 / (1 + np.exp(-odds)), 0.9) == pytest.approx(0.5)


def test_a_policy_is_imagined_beyond_success_to_calibrate_its_reward(loaded, data, monkeypatch):
    """Episodes begin where given, and each is judged by the best two frames in a row of all its steps."""
    env = WorldModelVectorEnv(loaded, 3, data, places=[(episode, 0) for episode in range(5)])
    env.threshold, env.consecutive = 0.3, 2
    env.task = dataclasses.replace(env.task, horizon=6)
    reached = np.array([0.9, 0.8, 0.4, 0.6, 0.1])

    def probability(latents, proprio):
        # Highest in the third and fourth step; a single frame does not count.
        context = env._context[~env._ended]
        step = env._steps[~env._ended]
        peak = np.where((step == 3) | (step == 4), reached[context], 0.05)
        return torch.from_numpy(np.where(step == 6, 1.0, peak))

    monkeypatch.setattr(env.model, "success_probability", probability)
    found, taken = calibrate_reward(env, Still(), np.array([True, False, False, True, False]))
    assert (found["before"], found["imagined_before"], found["real"], found["imagined"]) == (0.3, 0.8, 0.4, 0.4)
    assert found["threshold"] == pytest.approx(0.7)
    assert (taken, env.threshold) == (30, 0.3)
    # A policy that never succeeded does not do so in imagination either; one that always did changes nothing.
    found, _ = calibrate_reward(env, Still(), np.zeros(5, bool))
    assert (found["threshold"], found["imagined"]) == (pytest.approx(0.95), 0.0)
    found, _ = calibrate_reward(env, Still(), np.ones(5, bool))
    assert (found["threshold"], found["imagined"]) == (0.3, 0.8)


def test_a_slot_that_is_no_longer_finite_ends(env, monkeypatch):
    env.reset(seed=0)
    action = np.zeros((3, 7), np.float32)
    before, *_ = env.step(action)
    imagine = env.model.imagine

    def poisoned(state, commands, noise):
        state, latents, proprio = imagine(state, commands, noise)
        latents[1] = torch.nan
        state.memory[1, -1] = torch.nan
        return state, latents, proprio

    monkeypatch.setattr(env.model, "imagine", poisoned)
    observation, reward, terminated, truncated, info = env.step(action)
    assert truncated.tolist() == [False, True, False]
    assert not terminated.any()
    assert reward[1] == 0
    assert info["sim_fault"].tolist() == ["", "imagination not finite", ""]
    assert all(np.isfinite(value).all() for value in observation.values())
    assert np.array_equal(observation["front_image"][1], before["front_image"][1])
    monkeypatch.undo()
    mask = np.array([False, True, False])
    _, info = env.reset(seed=[None, 7, None], options={"reset_mask": mask})
    assert info["sim_fault"].tolist() == ["", "", ""]
    *_, truncated, _ = env.step(action)
    assert not truncated.any()


def test_contexts_of_key_frames(loaded, data):
    episode = int(np.argmax(data.ends - data.starts))
    env = WorldModelVectorEnv(loaded, 2, data, places=[(episode, 0), (episode, 8)])
    observation, info = env.reset(seed=0)
    assert np.array_equal(observation["front_image"][1], data.images[data.starts[episode] + 8, 0])
    np.testing.assert_allclose(info["target"][1], data.targets[data.starts[episode] + 7], atol=1e-4)
    ended = np.zeros(2, bool)
    for step in range(1, env.task.horizon + 1):
        *_, truncated, _ = env.step(np.zeros((2, 7), np.float32))
        assert truncated[1] == (step >= env.task.horizon - 8)
        ended |= truncated
    assert ended.all()


def test_what_led_to_a_key_frame_is_seen_by_who_acts_there(loaded, data):
    """In the control loop and in the rollouts of reinforcement."""
    episode = int(np.argmax(data.ends - data.starts))
    frame = data.starts[episode] + 8
    assert not np.array_equal(data.proprio[frame], data.proprio[frame - 1])
    env = WorldModelVectorEnv(loaded, 2, data, places=[(episode, 0), (episode, 8)])
    looked = []

    class Looking(Still):
        def act(self, observation, instructions, slots):
            looked.append({key: value.copy() for key, value in observation.items()})
            return super().act(observation, instructions, slots)

    rollout(env, Looking(), range(2))
    policy = point_policy(observation_steps=2, embodiment=data.embodiment)
    rollouts = collect_rollouts(
        env, policy, Starts(seeds=(0, 1), groups=np.arange(2)), exploration=ExplorationConfig(), noise_seed=0,
        max_chunks=1,
    )  # fmt: skip
    first = data.starts[episode]
    expected = data.proprio[[[first, first], [frame - 1, frame]]]
    assert np.array_equal(looked[0]["proprio"], expected)
    assert np.array_equal(looked[0]["front_image"], data.images[[[first, first], [frame - 1, frame]], 0])
    assert np.array_equal(rollouts.observation["proprio"].numpy(), expected)


def test_contexts_that_do_not_fit(loaded, data):
    torch.manual_seed(0)
    model = WorldModel(FLOW, data.embodiment, fit_world_statistics(data)).eval()
    assert model.memory == 3
    with pytest.raises(ConfigError, match="memory of the world model holds 3"):
        Contexts(model, data, [(0, 1)])
    assert len(Contexts(model, data, [(0, 0), (0, 2)])) == 2
    with pytest.raises(ConfigError, match="has steps 0 to"):
        Contexts(model, data, [(0, 1000)])
    with pytest.raises(ConfigError, match="the data hold episodes"):
        Contexts(model, data, [(99, 0)])
    other = dataclasses.replace(data, embodiment=panda_embodiment(16, render_profile="high"))
    with pytest.raises(EmbodimentMismatchError, match="render_profile"):
        WorldModelVectorEnv(loaded, 2, other)


# Announced actions ------------------------------------------------------------------------------------------------


def actions_of(episodes: int, steps: int) -> np.ndarray:
    actions = np.random.default_rng(0).uniform(-0.5, 0.5, (episodes, steps, 7)).astype(np.float32)
    actions[..., -1] = 1.0
    return actions


def run_steps(env, actions, announced=None, slots=None) -> np.ndarray:
    """Images ``(steps, N, H, W, 3)`` of the first camera."""
    env.reset(seed=0)
    if announced is not None:
        env.announce(announced, np.arange(env.num_envs) if slots is None else np.array(slots))
    return np.stack([env.step(actions[:, step])[0]["front_image"] for step in range(actions.shape[1])])


def test_announced_actions_are_imagined_in_one_pass(env, loaded, data, monkeypatch):
    actions = actions_of(3, 4)
    commands = []
    original = loaded.model.imagine
    monkeypatch.setattr(
        loaded.model,
        "imagine",
        lambda state, told, noise: commands.append(told.shape[1]) or original(state, told, noise),
    )
    images = run_steps(env, actions, actions)
    assert commands == [4]
    # The same as asking the model for the four frames at once.
    env.reset(seed=0)
    targets, told = env._targets.copy(), []
    for step in range(4):
        targets = integrate_action(targets, actions[:, step], env.embodiment)
        told.append(targets)
    with torch.inference_mode(), torch.autocast(**env._autocast):
        state = env._state
        _, latents, _ = original(state, env._commands(actions, np.stack(told, 1)), None)
        expected = np.stack([env._decode(latents[:, step])[:, 0] for step in range(4)])
    np.testing.assert_array_equal(images, expected)


def test_steps_may_differ_from_what_was_announced(env):
    actions = actions_of(3, 4)
    alone = run_steps(env, actions)
    # Announced for one episode only; of the others nothing is known.
    some = run_steps(env, actions, actions[:1], slots=[0])
    np.testing.assert_array_equal(some[:, 1:], alone[:, 1:])
    # Announced wrongly: as if nothing had been announced, also for the steps after the first wrong one.
    wrong = run_steps(env, actions, actions[:, ::-1].copy())
    np.testing.assert_array_equal(wrong, alone)
    # What was announced before a reset is forgotten by it.
    env.reset(seed=0)
    env.announce(actions, np.arange(3))
    np.testing.assert_array_equal(run_steps(env, actions), alone)
    with pytest.raises(ActionError):
        env.announce(3 * actions, np.arange(3))


def test_announced_actions_are_taken_as_steps_take_them(env, loaded, monkeypatch):
    """Other numbers are converted to float32, and what is out of range by a rounding is clipped."""
    actions = actions_of(3, 4)
    actions[..., 0] = 1.0
    passes, original = [], loaded.model.imagine
    monkeypatch.setattr(
        loaded.model, "imagine", lambda state, told, noise: passes.append(told.shape[1]) or original(state, told, noise)
    )
    expected = run_steps(env, actions, actions)
    others = actions.astype(np.float64)
    # No float32, and a little too large.
    others[..., 0] += 5e-4
    others[..., 1] += 1e-12
    np.testing.assert_array_equal(run_steps(env, actions, others), expected)
    assert passes == [4, 4]
    env.announce(actions[:, :0], np.arange(3))


def test_a_longer_chunk_of_one_episode_leaves_what_was_announced_for_others(env, loaded, monkeypatch):
    actions = actions_of(3, 4)
    expected = run_steps(env, actions, actions)
    env.reset(seed=0)
    env.announce(actions[:2], np.arange(2))
    env.announce(np.concatenate([actions[2:], actions[2:]], 1), np.array([2]))
    monkeypatch.setattr(loaded.model, "imagine", lambda *_: pytest.fail("all of it was announced"))
    images = np.stack([env.step(actions[:, step])[0]["front_image"] for step in range(4)])
    np.testing.assert_allclose(images[:, :2].astype(int), expected[:, :2], atol=1)


def test_a_rollout_announces_its_chunks(env, monkeypatch):
    announced = []
    original = env.announce
    monkeypatch.setattr(
        env, "announce", lambda actions, slots: announced.append(actions.shape) or original(actions, slots)
    )
    rollout(env, Still(), range(3))
    assert announced
    assert all(shape[1:] == (4, 7) for shape in announced)
