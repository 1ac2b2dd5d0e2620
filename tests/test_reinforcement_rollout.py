"""Rollouts over chunks: what is kept of them, what ends them, and that only the start decides where they begin."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from point_policy import TrickyPointEnv, point_policy, teach
from point_world import HORIZON, PointVectorEnv
from toy_reaching import small_vision

from simtoreal.envs import load_task
from simtoreal.envs.errors import ConfigError, EmbodimentMismatchError, SimtorealError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.policies.chunk_rollout import Starts, collect_rollouts, executed_log_prob
from simtoreal.policies.reinforcement_config import ExplorationConfig

# Of the point world: seeds with remainder 3 modulo 5 cannot be solved.
SEEDS = (10, 11, 13, 14)
NOISE = ExplorationConfig(noise_scale=0.05)


@pytest.fixture(scope="module")
def policy():
    return teach(point_policy(), 150, error=0.0)


def collect(env, policy, starts, **changes):
    return collect_rollouts(env, policy, starts, **{"exploration": NOISE, "noise_seed": 1, **changes})


def test_rollouts_end_with_success_or_time_and_nothing_after_that_counts(policy):
    rollouts = collect(PointVectorEnv(4), policy, Starts.repeated(SEEDS, 1))
    assert rollouts.success.tolist() == [True, True, False, True]
    assert rollouts.terminated.tolist() == [True, True, False, True]
    assert rollouts.returns().tolist() == [1, 1, 0, 1]
    assert rollouts.steps[2] == HORIZON
    assert (rollouts.steps[[0, 1, 3]] < HORIZON).all()
    lengths = rollouts.lengths()
    assert lengths.tolist() == [int(np.ceil(steps / 4)) for steps in rollouts.steps.tolist()]
    # Chunks are of 4 actions; the one in which a rollout ended counts only those that were executed.
    executed = torch.zeros(4, dtype=torch.int64).index_add(0, rollouts.rollout, rollouts.executed)
    assert executed.tolist() == rollouts.steps.tolist()
    assert rollouts.control_steps == rollouts.steps.sum()
    assert rollouts.rollout.tolist() == sorted(rollouts.rollout.tolist())


def test_rewards_arrive_in_the_chunk_that_earned_them(policy):
    rollouts = collect(PointVectorEnv(4), policy, Starts.repeated(SEEDS, 1))
    last = rollouts.lengths().cumsum(0) - 1
    assert rollouts.reward[last].tolist() == [1, 1, 0, 1]
    assert rollouts.reward.sum() == 3


def test_log_probs_are_those_of_the_stored_observations_and_chains(policy):
    rollouts = collect(PointVectorEnv(3), policy, Starts.repeated(SEEDS, 2))
    assert rollouts.observation["proprio"].shape[1:] == (1, 20)
    again = policy.log_prob(rollouts.observation, rollouts.instruction, rollouts.chain, NOISE)
    joint = executed_log_prob(again, rollouts.executed)
    torch.testing.assert_close(joint, rollouts.log_prob, atol=1e-3, rtol=1e-5)
    features = policy.features(rollouts.observation, rollouts.instruction)
    torch.testing.assert_close(features, rollouts.features)
    assert (rollouts.executed < 4).any()
    assert not torch.allclose(again.sum(-1), rollouts.log_prob)


def test_images_are_kept_as_bytes_or_not_at_all():
    policy = point_policy(image_keys=("front_image",), observation_steps=2)
    kept = collect(PointVectorEnv(2), policy, Starts.repeated(SEEDS[:2], 1))
    assert kept.observation["front_image"].dtype == torch.uint8
    assert kept.observation["front_image"].shape[1:] == (2, 16, 16, 3)
    # The first observation is repeated; later ones are of consecutive control steps.
    frames = kept.observation["proprio"][:, :, :3]
    assert torch.equal(frames[0, 0], frames[0, 1])
    assert not torch.equal(frames[1, 0], frames[1, 1])
    dropped = collect(PointVectorEnv(2), policy, Starts.repeated(SEEDS[:2], 1), keep_observations=False)
    assert dropped.observation == {}
    torch.testing.assert_close(dropped.features, kept.features)


def test_a_group_begins_in_the_same_place_and_its_rollouts_differ(policy):
    starts = Starts.repeated((10, 11), 3)
    assert starts.seeds == (10, 10, 10, 11, 11, 11)
    assert starts.groups.tolist() == [0, 0, 0, 1, 1, 1]
    rollouts = collect(PointVectorEnv(4), policy, starts)
    first = rollouts.lengths().cumsum(0) - rollouts.lengths()
    begun = rollouts.observation["proprio"][first, 0, :3]
    for group in (0, 1):
        rows = torch.nonzero(rollouts.groups == group).flatten()
        assert (begun[rows] == begun[rows[0]]).all()
        assert len({float(value) for value in rollouts.log_prob[first[rows]]}) == 3
    assert not torch.equal(begun[0], begun[3])


@pytest.mark.parametrize("num_envs", [1, 3, 11])
def test_number_of_environments_changes_nothing(policy, num_envs):
    starts = Starts.repeated(SEEDS, 2)
    expected = collect(PointVectorEnv(8), policy, starts)
    got = collect(PointVectorEnv(num_envs), policy, starts)
    assert got.steps.tolist() == expected.steps.tolist()
    assert got.seeds.tolist() == expected.seeds.tolist()
    torch.testing.assert_close(got.chain, expected.chain, atol=1e-3, rtol=1e-3)


def test_reset_options_follow_their_rollout(policy):
    env = TrickyPointEnv(2)
    init = np.array([[0.3, 0, 0], [0, 0.4, 0], [0, 0, 0.5]])
    rollouts = collect(env, policy, Starts.repeated((0, 1, 2), 2, {"init": init, "mode": "still"}))
    first = rollouts.lengths().cumsum(0) - rollouts.lengths()
    begun = rollouts.observation["proprio"][first, 0, :3].numpy()
    np.testing.assert_allclose(begun, np.repeat(init, 2, axis=0), atol=1e-6)
    assert all(options["mode"] == "still" for _, options in env.resets)


def test_rollouts_are_cut_off_after_the_largest_number_of_chunks(policy):
    rollouts = collect(PointVectorEnv(4), policy, Starts.repeated((13, 18), 1), max_chunks=2)
    assert rollouts.lengths().tolist() == [2, 2]
    assert rollouts.steps.tolist() == [8, 8]
    assert not rollouts.terminated.any()


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fault", "simulation diverged"),
        ("observation", "observation 'proprio' is not finite"),
        ("reward", "the reward is not finite"),
    ],
)
def test_faulty_rollouts_are_dropped_and_counted(policy, kind, reason):
    starts = Starts.repeated(SEEDS, 2)
    rollouts = collect(TrickyPointEnv(3, broken={11: kind}), policy, starts)
    assert rollouts.faults == (reason, reason)
    assert rollouts.seeds.tolist() == [10, 10, 13, 13, 14, 14]
    assert set(rollouts.rollout.tolist()) == set(range(6))
    for values in (rollouts.features, rollouts.last_features, rollouts.log_prob, rollouts.reward, rollouts.chain):
        assert torch.isfinite(values).all()
    sound = collect(PointVectorEnv(3), policy, starts)
    assert rollouts.returns().tolist() == sound.returns()[[0, 1, 4, 5, 6, 7]].tolist()


def test_an_environment_that_always_fails_is_an_error(policy):
    with pytest.raises(SimtorealError, match=r"all 2 rollouts were dropped.*simulation diverged"):
        collect(TrickyPointEnv(1, broken={10: "fault"}), policy, Starts.repeated((10,), 2))


def test_environments_that_do_not_fit_are_refused(policy):
    env = PointVectorEnv(1)
    env.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ConfigError, match="DISABLED"):
        collect(env, policy, Starts.repeated((0,), 1))
    with pytest.raises(EmbodimentMismatchError):
        collect(PointVectorEnv(1, image_size=24), policy, Starts.repeated((0,), 1))
    blind = point_policy(state_keys=("proprio",), image_keys=("front_image",))
    blind.embodiment = panda_embodiment(16)
    env = TabletopVectorEnv("reach", 1, embodiment=panda_embodiment(16), observe="state")
    with pytest.raises(ConfigError, match="the policy reads 'front_image'"):
        collect(env, blind, Starts.repeated((0,), 1))
    with pytest.raises(ConfigError, match="reset option 'init' has 3 rows for 2 rollouts"):
        Starts(seeds=(0, 1), groups=np.arange(2), options={"init": np.zeros((3, 4))})
    with pytest.raises(ConfigError, match="0 seeds"):
        Starts(seeds=(), groups=np.arange(0))


class Drawing(TabletopVectorEnv):
    """Draws always."""

    images_wanted = property(lambda self: True, lambda self, value: None)


def test_images_between_decisions_are_neither_drawn_nor_missed():
    class Saving(TabletopVectorEnv):
        drawn = 0

        def _draw(self, drawn):
            Saving.drawn += len(drawn)
            return super()._draw(drawn)

    policy, found = point_policy(image_keys=("front_image", "wrist_image"), observation_steps=2), []
    for kind in (Drawing, Saving):
        env = kind("reach", 4, image_size=16, autoreset_mode=AutoresetMode.DISABLED)
        found.append(collect(env, policy, Starts.repeated(range(4), 1), max_chunks=6, keep_observations=False))
        assert env.images_wanted
        env.close()
    drawing, saving = found
    for name in ("features", "log_prob", "chain", "last_features", "steps"):
        assert torch.equal(getattr(drawing, name), getattr(saving, name)), name
    # The first images, and one per decision.
    assert Saving.drawn == 4 + len(saving.reward)


def test_a_policy_that_looks_at_two_pictures_sees_both_where_an_episode_is_cut_off():
    """The horizon lies within a chunk: the last picture is always drawn, and the one before it is looked at, too."""
    policy = point_policy(
        image_keys=("front_image",), observation_steps=2, vision=dataclasses.replace(small_vision(), image_steps=2)
    )
    task, found = dataclasses.replace(load_task("reach"), horizon=2 * policy.config.execute_steps + 3), []
    for kind in (Drawing, TabletopVectorEnv):
        env = kind(task, 2, image_size=16, autoreset_mode=AutoresetMode.DISABLED)
        rollouts = collect(env, policy, Starts.repeated(range(2), 1), max_chunks=6, keep_observations=False)
        found.append(rollouts.last_features)
        env.close()
    assert torch.equal(*found)
