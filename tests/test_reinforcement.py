"""GRPO and PPO: their numbers by hand, learning of a task with a known optimum, and exact continuation."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from point_policy import TrickyPointEnv, demonstrations, point_policy, teach
from point_world import PointVectorEnv, fails

from simtoreal.envs.errors import CheckpointError, ConfigError, SimtorealError
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.rollout import rollout
from simtoreal.envs.tabletop_vector import TabletopVectorEnv
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.bc import BCPolicy
from simtoreal.policies.chunk_rollout import ChunkRollouts
from simtoreal.policies.config import BCConfig, DiffusionConfig
from simtoreal.policies.diffusion import DiffusionPolicy
from simtoreal.policies.grpo import GRPO, group_advantages
from simtoreal.policies.normalization import Statistics
from simtoreal.policies.policy_gradient import clipped_surrogate
from simtoreal.policies.ppo import PPO, clipped_value_loss, generalized_advantages
from simtoreal.policies.reinforcement import Reinforcement, demonstration_anchor
from simtoreal.policies.reinforcement_config import (
    ClipConfig,
    ExplorationConfig,
    GRPOConfig,
    PPOConfig,
    ReinforcementConfig,
)
from simtoreal.policies.trainer import seed_everything

# Starts of the point world that can be solved, apart from those that are learned from.
HELD_OUT = [seed for seed in range(5000, 5100) if not fails(seed)]


def settings(**changes) -> ReinforcementConfig:
    values = {
        "rollouts": 128, "learning_rate": 3e-4, "minibatch": 128, "first_seed": 0, "epochs": 2,
        "grpo": GRPOConfig(group_size=4), "exploration": ExplorationConfig(noise_scale=0.2),
    }  # fmt: skip
    return ReinforcementConfig(**{**values, **changes})


def success_rate(policy) -> float:
    return float(np.mean([result.success for result in rollout(PointVectorEnv(80), PolicyActor(policy), HELD_OUT)]))


def hand_made(rewards: list[list[float]], groups: list[int], terminated: list[bool]) -> ChunkRollouts:
    """Rollouts with the given reward per chunk; everything else is zeros."""
    flat = torch.tensor([reward for one in rewards for reward in one], dtype=torch.float32)
    count, rollouts = len(flat), len(rewards)
    return ChunkRollouts(
        observation={}, features=torch.zeros(count, 4), instruction=("",) * count, chain=torch.zeros(count, 2, 4, 7),
        log_prob=torch.zeros(count), executed=torch.full((count,), 4), reward=flat,
        rollout=torch.tensor([row for row, one in enumerate(rewards) for _ in one]),
        last_features=torch.zeros(rollouts, 4), terminated=torch.tensor(terminated),
        success=torch.tensor([sum(one) > 0 for one in rewards]), steps=torch.tensor([4 * len(one) for one in rewards]),
        seeds=torch.tensor(groups), groups=torch.tensor(groups), faults=(), control_steps=4 * count,
    )  # fmt: skip


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_group_advantages():
    returns = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    groups = torch.tensor([7, 7, 7, 7, 2, 2, 5, 5])
    advantages, differ = group_advantages(returns, groups, normalize=False)
    torch.testing.assert_close(advantages, torch.tensor([0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0]))
    assert differ.tolist() == [True] * 4 + [False] * 4
    # Standard deviation of 1, 0, 0, 0: sqrt(3/16).
    normalized, _ = group_advantages(returns, groups, normalize=True)
    torch.testing.assert_close(normalized[:2], torch.tensor([3**0.5, -(3**-0.5)]))


def test_graded_rollouts_that_hardly_differ_are_not_blown_up():
    returns = [0.10, 0.11, 0.10, 0.09]
    rollouts = hand_made([[one] for one in returns], [0] * 4, [False] * 4)
    samples = GRPO(GRPOConfig(group_size=4)).samples(rollouts, None)
    torch.testing.assert_close(samples["advantage"], torch.tensor([0.0, 0.1, 0.0, -0.1]))
    # How little is noise is for the caller to say, who knows what the returns are made of.
    alone, differ = group_advantages(torch.tensor(returns), torch.zeros(4, dtype=torch.int64), normalize=True)
    assert differ.all()
    torch.testing.assert_close(alone, torch.tensor([0.0, 2**0.5, 0.0, -(2**0.5)]), rtol=1e-4, atol=1e-4)


def test_a_rollout_left_alone_in_its_group_teaches_nothing():
    _, differ = group_advantages(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0, 1, 1]), normalize=True)
    assert differ.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "stopped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.2, 2.0, -2.4, False),
        (1.5, 2.0, -2.56, True),  # Good and already 28 % likelier: no more.
        (0.5, 2.0, -1.0, False),  # Good but less likely: back.
        (0.9, -1.0, 0.9, False),
        (0.5, -1.0, 0.8, True),  # Bad and already 20 % less likely: no less.
        (2.0, -1.0, 2.0, False),  # Bad but likelier: back.
        (5.0, -1.0, 3.0, True),  # Bad and far likelier: dual clip.
    ],
)
def test_clipped_surrogate(ratio, advantage, loss, stopped):
    log_ratio = torch.tensor([ratio]).log().requires_grad_()
    value, flag = clipped_surrogate(log_ratio, torch.tensor([advantage]), ClipConfig(low=0.2, high=0.28, dual=3.0))
    assert value.item() == pytest.approx(loss)
    assert flag.item() == stopped
    value.sum().backward()
    assert log_ratio.grad.item() == (0 if stopped else pytest.approx(-ratio * advantage))


def test_huge_ratios_give_finite_gradients():
    log_ratio = torch.tensor([500.0, -500.0, 500.0], requires_grad=True)
    loss, _ = clipped_surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0]), ClipConfig())
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(log_ratio.grad).all()


def test_grpo_weighs_rollouts_alike_and_leaves_out_equal_groups():
    rollouts = hand_made([[0, 1], [0, 0, 0, 0], [1], [0, 1], [0], [0, 0]], [0, 0, 1, 1, 2, 2], [True] * 6)
    algorithm = GRPO(GRPOConfig(group_size=2))
    samples = algorithm.samples(rollouts, None)
    assert samples["decisions"].tolist() == [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(samples["advantage"], torch.tensor([1.0, 1, -1, -1, -1, -1]))
    # Weights 1/2 and 1/4, divided by their mean of 1/3.
    torch.testing.assert_close(samples["weight"], torch.tensor([1.5, 1.5, 0.75, 0.75, 0.75, 0.75]))
    batch = {**samples, "old_log_prob": torch.zeros(6)}
    loss, metrics = algorithm.loss(batch, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, -1.0]), torch.zeros(6, 1))
    # Ratios 1, e (clipped to 1.28), 1, 1, 1, 1/e (clipped to 0.8).
    assert loss.item() == pytest.approx((-1.5 - 1.5 * 1.28 + 3 * 0.75 + 0.75 * 0.8) / 6)
    assert metrics["clip_fraction"].item() == pytest.approx(2 / 6)


def test_generalized_advantages():
    reward, value = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.5]), torch.tensor([0.5, 0.8, 0.1, 0.2, 0.3])
    # Rollout 0 succeeded after two chunks; rollout 1 ran out of time where the value is 0.4.
    rollout, last = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0.0, 0.4])
    got = generalized_advantages(reward, value, last, rollout, discount=0.9, gae_lambda=0.5)
    second = 1.0 - 0.8
    first = 0.9 * 0.8 - 0.5 + 0.45 * second
    e = 0.5 + 0.9 * 0.4 - 0.3
    d = 0.9 * 0.3 - 0.2 + 0.45 * e
    c = 0.9 * 0.2 - 0.1 + 0.45 * d
    torch.testing.assert_close(got, torch.tensor([first, second, c, d, e]))


def test_value_loss_gains_nothing_beyond_the_clip():
    value = torch.tensor([0.5, 1.0], requires_grad=True)
    loss = clipped_value_loss(value, torch.tensor([0.4, 0.4]), torch.tensor([1.0, 1.0]), 0.2)
    # The second is on its target, but a change of 0.2 is all that counts: (0.6 - 1)^2.
    assert loss.item() == pytest.approx(0.5 * (0.25 + 0.16) / 2)
    loss.backward()
    assert value.grad[0] < 0
    assert value.grad[1] == 0


def test_ppo_bootstraps_only_where_time_ran_out():
    policy = point_policy()
    algorithm = PPO(PPOConfig(discount=0.5, gae_lambda=0.0), policy.condition_dim)
    torch.nn.init.zeros_(algorithm.head[-1].weight)
    torch.nn.init.constant_(algorithm.head[-1].bias, 0.6)
    features = policy.features({"proprio": torch.zeros(4, 1, 20)}, [""] * 4)
    rollouts = hand_made([[0, 1], [0, 0]], [0, 1], [True, False])
    rollouts = dataclasses.replace(rollouts, features=features, last_features=features[:2])
    samples = algorithm.samples(rollouts, policy)
    torch.testing.assert_close(samples["old_value"], torch.full((4,), 0.6))
    torch.testing.assert_close(samples["target"], torch.tensor([0.3, 1.0, 0.3, 0.3]))
    assert samples["advantage"].mean().item() == pytest.approx(0, abs=1e-6)
    assert samples["advantage"].std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    loss, _ = algorithm.loss({**samples, "old_log_prob": torch.zeros(4)}, torch.zeros(4), policy.condition(features))
    loss.backward()
    assert all(parameter.grad is None for parameter in policy.parameters())


# --- learning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beginner():
    """Weights of a policy that mostly stops just short of the goal."""
    return teach(point_policy(), 100, error=0.12).state_dict()


def begin(weights) -> DiffusionPolicy:
    policy = point_policy()
    policy.load_state_dict(weights)
    return policy


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_a_poor_policy_nears_the_optimum(beginner, algorithm):
    policy = begin(beginner)
    before = success_rate(policy)
    learning = Reinforcement(policy, settings(algorithm=algorithm))
    for _ in range(10):
        metrics = learning.iterate(PointVectorEnv(64))
    assert before < 0.5
    assert success_rate(policy) > 0.9
    assert metrics["dropped_rollouts"] == 0


def test_it_runs_in_the_simulator_as_in_any_other_world():
    embodiment = panda_embodiment(cameras=())
    env = TabletopVectorEnv("reach", 4, embodiment=embodiment, observe="state")
    width = env.single_observation_space["object_state"].shape[0]
    bounds = {"actions": 7, "proprio": 20, "object_state": width}
    statistics = {
        key: Statistics(low=-np.ones(size, np.float32), high=np.ones(size, np.float32)) for key, size in bounds.items()
    }
    config = DiffusionConfig(
        horizon=8, execute_steps=4, image_keys=(), state_keys=("proprio", "object_state"), unet_widths=(16, 32),
        condition_width=32,
    )  # fmt: skip
    for algorithm in ("grpo", "ppo"):
        policy = DiffusionPolicy(config, embodiment, statistics)
        learning = Reinforcement(policy, settings(algorithm=algorithm, rollouts=8, max_chunks=3))
        first, second = learning.iterate(env), learning.iterate(env)
        assert first.keys() >= {"success", "rollouts", "control_steps", "learned_decisions", "updates"}
        assert first["control_steps"] == 8 * 12
        assert (first["updates"] > 0) == (algorithm == "ppo")  # A random policy never gets there: all groups fail.
        assert learning.iteration == 2
        assert second["rollouts"] == 8


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_continuing_equals_going_on(beginner, algorithm):
    config = settings(algorithm=algorithm, rollouts=32)

    def anchored(policy) -> Reinforcement:
        return Reinforcement(policy, config, anchor=anchor_on(policy))

    whole = anchored(begin(beginner))
    whole.iterate(PointVectorEnv(32))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    expected = whole.iterate(PointVectorEnv(32))
    torch.manual_seed(123)
    resumed = anchored(point_policy(seed=5))
    resumed.load_state_dict(state)
    got = resumed.iterate(PointVectorEnv(32))
    timeless = [name for name in expected if not name.endswith("_s")]
    assert [got[name] for name in timeless] == [expected[name] for name in timeless]
    assert expected["updates"] > 0
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def anchor_on(policy):
    batch = demonstrations(np.random.default_rng(1).uniform(-1, 1, (32, 3)), error=0.0)
    return lambda update: policy.loss(batch)["loss"]


def gradients(policy) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def test_the_anchor_adds_its_weighted_gradient(beginner):
    config = settings(rollouts=32, epochs=1, minibatch=10_000, max_gradient_norm=1e9, anchor_weight=0.3)
    plain = Reinforcement(begin(beginner), config)
    plain.iterate(PointVectorEnv(32))
    policy = begin(beginner)
    anchored = Reinforcement(policy, config, anchor=anchor_on(policy))
    metrics = anchored.iterate(PointVectorEnv(32))
    assert not policy.training
    alone = begin(beginner).train()
    seed_everything(config.seed, 0)
    loss = anchor_on(alone)(0)
    loss.backward()
    # Denoising steps, executed actions and their dimensions, each with the density of a deviation of 0.2.
    scale = 0.3 * config.denoising_steps * policy.config.execute_steps * policy.action_dim / (2 * 0.2**2)
    expected = gradients(plain.policy) + scale * gradients(alone)
    torch.testing.assert_close(gradients(policy), expected, atol=1e-5, rtol=1e-4)
    assert metrics["anchor_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["gradient_norm"] == pytest.approx(gradients(plain.policy).norm().item(), rel=1e-4)
    assert metrics["anchor_gradient_norm"] == pytest.approx(scale * gradients(alone).norm().item(), rel=1e-4)


def test_anchor_of_demonstrations_draws_other_windows_every_time():
    class Windows:
        def __len__(self) -> int:
            return 64

        def batch(self, indices):
            self.seen = indices
            batch = demonstrations(np.random.default_rng(0).uniform(-1, 1, (64, 3)))
            return {
                "observation": {key: value.numpy()[indices] for key, value in batch["observation"].items()},
                "actions": batch["actions"].numpy()[indices], "action_mask": batch["action_mask"].numpy()[indices],
                "instruction": [""] * len(indices),
            }  # fmt: skip

    windows, policy = Windows(), point_policy()
    anchor = demonstration_anchor(policy, windows, 8, seed=0)
    anchor(0).backward()
    first = windows.seen.tolist()
    anchor(1)
    assert windows.seen.tolist() != first
    anchor(0)
    assert windows.seen.tolist() == first
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_faulty_rollouts_are_counted_and_do_not_spoil_the_policy(beginner):
    policy = begin(beginner)
    learning = Reinforcement(policy, settings(rollouts=32))
    env = TrickyPointEnv(16, broken={0: "observation", 1: "fault", 2: "reward"})
    metrics = learning.iterate(env)
    assert metrics["dropped_rollouts"] == 12
    assert metrics["rollouts"] == 20
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())


@pytest.mark.parametrize("freeze", [True, False])
def test_image_encoder_is_frozen_if_asked(freeze):
    policy = point_policy(image_keys=("front_image",))
    before = [parameter.clone() for parameter in policy.feature_parameters()]
    learning = Reinforcement(policy, settings(algorithm="ppo", rollouts=4, epochs=1, freeze_encoder=freeze))
    metrics = learning.iterate(PointVectorEnv(4))
    changed = [not torch.equal(a, b) for a, b in zip(before, policy.feature_parameters(), strict=True)]
    assert any(changed) != freeze
    # One update from the rollouts' own policy: nothing differs from when they were sampled.
    assert metrics["divergence"] == pytest.approx(0, abs=1e-5)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_explained(beginner):
    bc = BCConfig(image_keys=(), horizon=4, execute_steps=4)
    statistics = point_policy().normalizer.statistics
    with pytest.raises(ConfigError, match="type 'bc' cannot be improved"):
        Reinforcement(BCPolicy(bc, panda_embodiment(16), statistics), settings())
    with pytest.raises(ConfigError, match="scheduler 'dpm'"):
        Reinforcement(point_policy(scheduler="dpm"), settings())
    with pytest.raises(ValueError, match="rollouts is 30; expected a multiple of group_size"):
        settings(rollouts=30)
    learning = Reinforcement(begin(beginner), settings())
    with pytest.raises(CheckpointError, match="cannot continue"):
        learning.load_state_dict({"iteration": torch.tensor(1)})


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(beginner):
    policy = begin(beginner)
    learning = Reinforcement(
        policy, settings(rollouts=32), anchor=lambda update: next(policy.parameters()).sum() * np.nan
    )
    with pytest.raises(SimtorealError, match="diverged in iteration 0"):
        learning.iterate(PointVectorEnv(32))
    assert all(torch.equal(value, beginner[name]) for name, value in policy.state_dict().items())
