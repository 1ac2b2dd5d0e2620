"""The denoising chain as a random walk: its densities, its limits, and what it needs of the policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toy_reaching as toy

from simtoreal.envs.errors import ConfigError
from simtoreal.policies.denoising_chain import GaussianChain
from simtoreal.policies.diffusion import DiffusionPolicy
from simtoreal.policies.reinforcement_config import ExplorationConfig
from simtoreal.policies.schedulers import Flow
from simtoreal.policies.training_data import to_tensors

NOISE = ExplorationConfig(noise_scale=0.1)


def make_policy(**changes) -> tuple[DiffusionPolicy, dict]:
    """An untrained policy in evaluation mode, and a batch of its windows."""
    config = toy.small_diffusion(**changes)
    data = toy.data(config, episodes=4)
    torch.manual_seed(0)
    policy = DiffusionPolicy(config, data.embodiment, data.statistics)
    return policy.eval(), to_tensors(data.train.batch(np.arange(6)), torch.device("cpu"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("scheduler", "steps", "denoiser"),
    [("flow", 8, "unet"), ("flow", 3, "transformer"), ("ddim", 4, "unet"), ("ddim", 7, "unet")],
)
def test_without_noise_the_walk_is_the_deterministic_sampler(scheduler, steps, denoiser):
    policy, batch = make_policy(scheduler=scheduler, inference_steps=steps, denoiser=denoiser)
    inputs = batch["observation"], batch["instruction"]
    plain = policy.predict(*inputs, generator())
    sample = policy.sample_with_log_prob(*inputs, generator(), ExplorationConfig(noise_scale=1e-7))
    torch.testing.assert_close(sample.chunk, plain, atol=1e-5, rtol=0)
    noisy = policy.sample_with_log_prob(*inputs, generator(), NOISE)
    assert (noisy.chunk - plain).abs().max() > 0.01


def test_log_prob_is_that_of_normal_distributions_over_the_executed_part():
    policy, batch = make_policy(inference_steps=3)
    sample = policy.sample_with_log_prob(
        batch["observation"], batch["instruction"], generator(), ExplorationConfig(noise_scale=0.5)
    )
    assert sample.chain.shape == (6, 4, 8, 7)
    # Levels of the flow: noise 1, 2/3, 1/3, 0. The fresh noise is 0.5, at most the noise of the level.
    levels, deviations = (1, 2 / 3, 1 / 3, 0), (0.5, 1 / 3, 0.5)
    condition = policy.condition(policy.features(batch["observation"], batch["instruction"]))
    expected = torch.zeros(6, 4)
    for step, (now, after, deviation) in enumerate(zip(levels, levels[1:], deviations, strict=False)):
        noisy = sample.chain[:, step]
        clean = policy.denoiser(noisy, torch.full((6,), float(now)), condition)
        noise = (noisy - (1 - now) * clean) / now
        kept = max(after**2 - deviation**2, 0.0) ** 0.5
        distribution = torch.distributions.Normal((1 - after) * clean + kept * noise, deviation)
        expected += distribution.log_prob(sample.chain[:, step + 1])[:, :4].sum(-1)
    torch.testing.assert_close(sample.log_prob, expected.detach(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("scheduler", ["flow", "ddim"])
def test_log_prob_computed_again_is_the_same_in_any_batch_and_has_gradients(scheduler):
    policy, batch = make_policy(scheduler=scheduler, inference_steps=4)
    sample = policy.sample_with_log_prob(batch["observation"], batch["instruction"], generator(), NOISE)
    again = policy.log_prob(batch["observation"], batch["instruction"], sample.chain, NOISE)
    torch.testing.assert_close(again, sample.log_prob, atol=1e-3, rtol=1e-5)
    part = {key: value[2:4] for key, value in batch["observation"].items()}
    two = policy.log_prob(part, batch["instruction"][2:4], sample.chain[2:4], NOISE)
    torch.testing.assert_close(two, sample.log_prob[2:4], atol=1e-3, rtol=1e-5)
    again.sum().backward()
    gradients = [parameter.grad for parameter in policy.parameters()]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_gradient_of_the_log_prob_points_to_the_sampled_chunk():
    policy, batch = make_policy(inference_steps=4)
    inputs = batch["observation"], batch["instruction"]
    chain = policy.sample_with_log_prob(*inputs, generator(), NOISE).chain
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-4)
    before = policy.log_prob(*inputs, chain, NOISE)
    for _ in range(5):
        optimizer.zero_grad()
        (-policy.log_prob(*inputs, chain, NOISE).mean()).backward()
        optimizer.step()
    assert policy.log_prob(*inputs, chain, NOISE).mean() > before.mean() + 0.01


def test_chunks_stay_as_noisy_as_in_training():
    """With a perfect denoiser of one clean chunk, a state at a level has exactly the noise of that level."""
    chain = GaussianChain(Flow(4), ExplorationConfig(noise_scale=0.3))
    target = torch.full((4, 3), 0.7)
    noise = torch.randn(20_000, 4, 3, generator=generator())
    states, _ = chain.sample(lambda noisy, time: target.expand_as(noisy), noise, generator(1))
    for index, level in enumerate((1.0, 0.75, 0.5, 0.25)):
        assert states[:, index].std(dim=0).mean().item() == pytest.approx(level, rel=0.01)
        assert states[:, index].mean().item() == pytest.approx((1 - level) * 0.7, abs=0.01)
    assert states[:, -1].std(dim=0).mean().item() == pytest.approx(0.3, rel=0.01)


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    policy, batch = make_policy()
    inputs = batch["observation"], batch["instruction"]
    all_rows = policy.sample_with_log_prob(*inputs, [generator(row) for row in range(6)], NOISE)
    alone = {key: value[4:5] for key, value in batch["observation"].items()}
    one = policy.sample_with_log_prob(alone, batch["instruction"][4:5], [generator(4)], NOISE)
    torch.testing.assert_close(one.chain[0], all_rows.chain[4], atol=1e-4, rtol=1e-4)


def test_augmentation_never_touches_log_probs_in_evaluation_mode():
    policy, batch = make_policy()
    inputs = batch["observation"], batch["instruction"]
    torch.testing.assert_close(policy.features(*inputs), policy.features(*inputs), atol=0, rtol=0)
    policy.train()
    assert not torch.equal(policy.features(*inputs), policy.features(*inputs))


def test_what_has_no_chain_is_refused():
    with pytest.raises(ConfigError, match=r"scheduler 'ddpm'.*'ddim'"):
        make_policy(scheduler="ddpm")[0].process.levels()
    with pytest.raises(ValueError, match="noise_scale is 0"):
        ExplorationConfig(noise_scale=0)
    with pytest.raises(ConfigError, match="inference_steps is 0"):
        make_policy()[0].set_inference_steps(0)


def test_number_of_denoising_steps_is_kept_in_the_config():
    policy, batch = make_policy()
    policy.set_inference_steps(2)
    assert policy.config.inference_steps == 2
    sample = policy.sample_with_log_prob(batch["observation"], batch["instruction"], generator(), NOISE)
    assert sample.chain.shape[1] == 3
