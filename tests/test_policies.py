"""Normalisation, encoders, denoisers, noise processes, the registry and the actor."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import toy_reaching as toy

from simtoreal.data_collection.foreign_embodiment import foreign_embodiment
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.envs.errors import ConfigError, DatasetError, MissingDependencyError
from simtoreal.policies.actor import PolicyActor
from simtoreal.policies.augmentation import colour_transform, random_shift
from simtoreal.policies.base import masked_mean, normal_noise
from simtoreal.policies.bc import BCPolicy
from simtoreal.policies.config import AugmentationConfig, BCConfig, DiffusionConfig, TrainerConfig, VisionConfig
from simtoreal.policies.diffusion import DiffusionPolicy
from simtoreal.policies.encoders import ImageEncoder, SpatialSoftmax
from simtoreal.policies.normalization import ACTIONS, CLIP, Normalizer, fit_statistics, has_known_units
from simtoreal.policies.registry import policy_class, policy_types
from simtoreal.policies.schedulers import Diffusion, Flow, spread_times
from simtoreal.policies.training_data import fit_all, to_tensors


@pytest.fixture(scope="module")
def toy_data():
    return toy.data(toy.small_diffusion(), episodes=4)


def make(kind: str, toy_data, **changes):
    torch.manual_seed(0)
    if kind == "bc":
        config = BCConfig(
            image_keys=("front_image",), vision=toy.small_vision(), horizon=8, execute_steps=4, hidden=32, **changes
        )
        return BCPolicy(config, toy_data.embodiment, toy_data.statistics)
    config = toy.small_diffusion(denoiser=kind, **changes)
    return DiffusionPolicy(config, toy_data.embodiment, toy_data.statistics)


# --- normalisation ---------------------------------------------------------------------------------------------------


def test_percentiles_are_exact_and_outliers_are_clipped():
    values = np.linspace(0, 1, 1001, dtype=np.float32)[:, None].copy()
    values[0], values[-1] = -3.0, 3.0
    statistics = fit_statistics(values)
    assert statistics.low[0] == pytest.approx(np.percentile(values, 2), abs=1e-6)
    assert statistics.high[0] == pytest.approx(np.percentile(values, 98), abs=1e-6)
    normalizer = Normalizer({"x": statistics})
    scaled = normalizer.normalize("x", torch.from_numpy(values))
    assert scaled.abs().max() == CLIP
    inside = scaled[100:-100]
    torch.testing.assert_close(normalizer.denormalize("x", inside), torch.from_numpy(values[100:-100]))


def test_constant_and_noisy_dimensions_are_not_magnified():
    rng = np.random.default_rng(0)
    values = np.stack([np.full(500, 0.7), 0.3 + 1e-4 * rng.standard_normal(500)], axis=1).astype(np.float32)
    scaled = Normalizer({"x": fit_statistics(values)}).normalize("x", torch.from_numpy(values))
    assert scaled.abs().max() < 0.05


def test_rare_motion_keeps_its_range():
    gripper = np.ones((1000, 1), dtype=np.float32)
    gripper[:10] = -1.0
    statistics = fit_statistics(gripper)
    assert (statistics.low[0], statistics.high[0]) == (-1.0, 1.0)


def test_a_glitch_does_not_decide_the_scale_and_is_reported():
    values = np.random.default_rng(0).uniform(-1, 1, (4000, 2)).astype(np.float32)
    clean = fit_statistics(values)
    values[17, 1] = 60.0
    statistics = fit_statistics(values, ["slow", "fast"], "velocity")
    np.testing.assert_allclose([statistics.low, statistics.high], [clean.low, clean.high], rtol=0.01)
    assert clean.notes == ()
    (note,) = statistics.notes
    assert note.startswith("'velocity' reaches -1 … 60 in dimension 1 (fast), but in fewer than 0.1 % of the frames")
    commanded = fit_statistics(values, ["slow", "fast"], "actions")
    assert (commanded.high[1], commanded.notes) == (60.0, ())
    values[17:21, 1] = 60.0
    statistics = fit_statistics(values)
    assert statistics.high[1] == 60.0
    assert statistics.notes == ()


@pytest.mark.parametrize(("scale", "known"), [(1, True), (1, False), (1000, False)])
def test_commanded_actions_that_are_cut_are_noted(scale, known):
    values = np.random.default_rng(0).uniform(-0.3, 0.3, (10_000, 2)).astype(np.float32)
    assert fit_statistics(scale * values, key="actions", known_units=known).notes == ()
    values[:190, 1] = 1.0
    values *= scale
    statistics = fit_statistics(values, ["dx", "dz"], "actions", known_units=known)
    other = fit_statistics(values, key="velocity", known_units=known)
    np.testing.assert_array_equal([statistics.low, statistics.high], [other.low, other.high])
    assert other.notes == ()
    scaled = torch.from_numpy(values)
    normalizer = Normalizer({ACTIONS: statistics})
    learned = normalizer.denormalize(ACTIONS, normalizer.normalize(ACTIONS, scaled))
    (note,) = statistics.notes
    assert note.startswith("'actions' far outside of what is usual are cut: dimension 1 (dz) to -")
    assert "in 1.9 % of the frames, " in note
    assert note.endswith(f"by up to {(scaled - learned).abs().max().item():.2g})")


def test_a_motion_that_hardly_ever_happens_keeps_its_range_beside_a_constant():
    gripper = np.ones((4000, 1), dtype=np.float32)
    gripper[:2] = -1.0
    statistics = fit_statistics(gripper)
    assert (statistics.low[0], statistics.high[0], statistics.notes) == (-1.0, 1.0, ())


def test_small_units_are_scaled_where_units_are_not_known():
    rng = np.random.default_rng(0)
    values = np.zeros((500, 4), dtype=np.float32)
    values[:, 0] = 0.0017 * rng.standard_normal(500)  # metres per step
    values[:, 1] = rng.choice([-1, 1], 500)
    values[:, 2] = 0.7
    values[:, 3] = 1e-7 * rng.standard_normal(500)  # what a computation with values of 1 leaves
    normalizer = Normalizer({"x": fit_statistics(values, known_units=False)})
    scaled = normalizer.normalize("x", torch.from_numpy(values))
    assert 0.4 < scaled[:, 0].std() < 0.6
    assert scaled[:, 2:].abs().max() < 0.01
    # A constant moves no more than what moves least: its action must not drown, a sensor's deviation not be magnified.
    low, high = normalizer.statistics["x"].low, normalizer.statistics["x"].high
    np.testing.assert_allclose((high - low)[[2, 3]], (high - low)[0], rtol=1e-3)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("constant", [0.0, 0.7, -1.7e6, 1e30])
def test_constants_of_any_size_become_zero(constant, known):
    values = np.full((100, 1), constant)
    scaled = Normalizer({"x": fit_statistics(values, known_units=known)}).normalize("x", torch.from_numpy(values))
    assert scaled.abs().max() < 0.2


def test_values_beyond_float32_are_refused_by_key_and_dimension():
    values = np.zeros((10, 2))
    values[3, 1] = 1e39
    with pytest.raises(DatasetError, match=r"'encoder_counts' reaches 1e\+39 in dimension 1 \(elbow\)"):
        fit_statistics(values, ["shoulder", "elbow"], "encoder_counts")


def test_only_our_own_units_are_known():
    own, foreign = toy.embodiment(), foreign_embodiment(name="x", control_hz=10, action_dim=7)
    assert all(has_known_units(own, key) for key in ("actions", "proprio", "object_state"))
    assert not has_known_units(own, "wrench")
    assert not has_known_units(foreign, "actions")
    actions = np.random.default_rng(0).uniform(-0.002, 0.002, (50, 7)).astype(np.float32)
    windows = WindowSampler([{"actions": actions, "obs/force": 1e-3 * actions}], keys=("force",))
    config = BCConfig(image_keys=(), state_keys=("force",))
    fitted = fit_all(windows, foreign, config)
    assert (fitted["actions"].high < 0.003).all()
    assert (fitted["force"].high < 3e-6).all()
    assert (fit_all(windows, own, config)["actions"].high > 0.009).all()


def test_rotation_entries_keep_their_scale():
    values = np.full((50, 2), 0.9, dtype=np.float32)
    statistics = fit_statistics(values, ["tcp_r11", "tcp_x"])
    assert (statistics.low[0], statistics.high[0]) == (-1.0, 1.0)
    assert statistics.high[1] - statistics.low[1] < 0.1


def test_statistics_refuse_values_that_are_not_finite():
    values = np.zeros((5, 3), dtype=np.float32)
    values[3, 1] = np.nan
    with pytest.raises(DatasetError, match=r"'proprio' is not finite at frame 3, dimension 1"):
        fit_statistics(values, key="proprio")
    with pytest.raises(DatasetError, match="at least one frame"):
        fit_statistics(np.zeros((0, 3)))


# --- images ----------------------------------------------------------------------------------------------------------


def test_random_shift_translates_all_frames_of_a_sample_alike_and_repeats_the_border():
    torch.manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    image = torch.stack([rows, columns, rows], dim=-1).to(torch.uint8)
    images = image.expand(64, 2, 12, 12, 3)
    moved = random_shift(images, 3)
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    assert torch.equal(moved[:, 0], moved[:, 1])
    seen = set()
    for sample in moved[:, 0].int():
        down, right = int(sample[6, 6, 0]) - 6, int(sample[6, 6, 1]) - 6
        seen.add((down, right))
        assert torch.equal(sample[..., 0], (rows + down).clamp(0, 11).int())
        assert torch.equal(sample[..., 1], (columns + right).clamp(0, 11).int())
    assert max(abs(value) for pair in seen for value in pair) == 3
    assert len(seen) > 20


def test_colour_transform_without_augmentation_maps_pixels_to_unit_range():
    scale, bias = colour_transform(2, None, torch.device("cpu"))
    torch.testing.assert_close(scale * 0 + bias, torch.full((2, 3), -1.0))
    torch.testing.assert_close(scale * 255 + bias, torch.full((2, 3), 1.0))


def test_colour_transform_differs_between_samples_and_stays_in_its_bounds():
    torch.manual_seed(0)
    config = AugmentationConfig(brightness=0.1, contrast=0.2, colour=0.1)
    scale, bias = colour_transform(500, config, torch.device("cpu"))
    grey = scale * 127.5 + bias
    assert grey.abs().max() <= 0.2 + 1e-6
    gain = scale * 127.5
    assert gain.min() >= 0.8 * 0.9 - 1e-6
    assert gain.max() <= 1.2 * 1.1 + 1e-6
    assert gain.std() > 0.05


def test_spatial_softmax_reports_the_place_of_a_peak():
    layer = SpatialSoftmax(1, 1)
    with torch.no_grad():
        layer.heat.weight.fill_(50.0)
        layer.heat.bias.zero_()
    features = torch.zeros(1, 1, 5, 9)
    features[0, 0, 1, 8] = 1.0
    torch.testing.assert_close(layer(features), torch.tensor([[1.0, -0.5]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("stride", "cells"), [(2, 32), (4, 16), (8, 8)])
def test_output_stride_decides_the_size_of_the_feature_map(stride, cells):
    encoder = ImageEncoder(VisionConfig(widths=(8, 8, 8), output_stride=stride))
    assert encoder.stages(torch.zeros(1, 3, 64, 64)).shape[-2:] == (cells, cells)


def test_evaluation_ignores_augmentation_and_older_images(toy_data):
    policy = make("bc", toy_data).eval()
    observation = to_tensors(toy_data.train.batch(np.arange(3)), torch.device("cpu"))["observation"]
    first = policy.predict(observation, [""] * 3, None)
    changed = {**observation, "front_image": observation["front_image"].clone()}
    changed["front_image"][:, 0] = 0
    assert torch.equal(first, policy.predict(changed, [""] * 3, None))
    changed["front_image"][:, 1] = 0
    assert not torch.equal(first, policy.predict(changed, [""] * 3, None))


def test_cameras_can_share_an_encoder(toy_data):
    embodiment = dataclasses.replace(
        toy_data.embodiment,
        cameras=(toy_data.embodiment.cameras[0], dataclasses.replace(toy_data.embodiment.cameras[0], name="wrist")),
    )
    own, shared = (
        BCPolicy(
            BCConfig(vision=dataclasses.replace(toy.small_vision(), shared=share), hidden=32),
            embodiment,
            toy_data.statistics,
        )
        for share in (False, True)
    )
    assert len(own.encoder.images) == 2
    assert len(shared.encoder.images) == 1
    image = torch.randint(0, 256, (3, 2, toy.SIZE, toy.SIZE, 3), dtype=torch.uint8)
    observation = {"front_image": image, "wrist_image": image.flip(2), "proprio": torch.zeros(3, 2, 20)}
    assert shared.eval().predict(observation, [""] * 3, None).shape == (3, 16, 7)


def test_bf16_autocast_changes_little(toy_data):
    policy = make("bc", toy_data).eval()
    observation = to_tensors(toy_data.train.batch(np.arange(8)), torch.device("cpu"))["observation"]
    exact = policy.predict(observation, [""] * 8, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = policy.predict(observation, [""] * 8, None)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).abs().max() < 0.05


# --- losses and chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bc", "unet", "transformer"])
def test_masked_actions_do_not_enter_the_loss(kind, toy_data):
    policy = make(kind, toy_data, augmentation=AugmentationConfig(shift_px=0, state_noise=0.0))
    batch = to_tensors(toy_data.train.batch(np.array([9, 11, 13])), torch.device("cpu"))
    assert not batch["action_mask"].all()
    if kind == "bc":
        # The denoisers see the masked part of the noisy chunk; only the regression is independent of it.
        losses = []
        for fill in (0.0, 1.0):
            batch["actions"][~batch["action_mask"]] = fill
            losses.append(policy.eval().loss(batch)["loss"])
        assert losses[0] == losses[1]
    loss = policy.train().loss(batch)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    reached = [name for name, parameter in policy.named_parameters() if parameter.grad is not None]
    assert len(reached) == len(list(policy.parameters()))


class Zeros(torch.nn.Module):
    """A denoiser that always says 0."""

    def forward(self, noisy, time, condition):
        return torch.zeros_like(noisy)


@pytest.mark.parametrize("scheduler", ["flow", "ddim"])
@pytest.mark.parametrize(("loss", "expected"), [("l2", 0.625), ("l1", 0.75)])
def test_loss_of_the_denoiser_is_the_mean_error_of_what_is_no_padding(loss, expected, scheduler, toy_data):
    policy = make("unet", toy_data, loss=loss, scheduler=scheduler)
    policy.denoiser = Zeros()
    batch = to_tensors(toy_data.train.batch(np.array([0, 1])), torch.device("cpu"))
    clean = torch.tensor([0.5, -1.0]).repeat(4)[None, :, None].expand(2, 8, 7)
    batch["actions"] = policy.normalizer.denormalize(ACTIONS, clean)
    batch["actions"][1, 2:] = 9.0
    batch["action_mask"] = torch.arange(8) < torch.tensor([[8], [2]])
    assert policy.loss(batch)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_diffusion_learns_by_the_squared_error_unless_told_otherwise(toy_data):
    """To the last bit what it was before there was a choice."""
    policy = make("unet", toy_data).eval()
    batch = to_tensors(toy_data.train.batch(np.array([9, 11, 13])), torch.device("cpu"))
    torch.manual_seed(1)
    loss = policy.loss(batch)["loss"]
    torch.manual_seed(1)
    samples = policy.config.noise_samples
    clean = policy.normalizer.normalize(ACTIONS, batch["actions"]).repeat_interleave(samples, dim=0)
    noise = torch.randn_like(clean)
    noisy, time = policy.process.corrupt(clean, noise, spread_times(3, samples, torch.device("cpu")).flatten())
    condition = policy.encoder(batch["observation"]).repeat_interleave(samples, dim=0)
    error = (policy.denoiser(noisy, time, condition) - clean).square()
    assert torch.equal(loss, masked_mean(error, batch["action_mask"].repeat_interleave(samples, dim=0)))


def test_masked_mean_averages_over_valid_steps_only():
    error = torch.tensor([[[1.0, 3.0], [100.0, 100.0]]])
    assert masked_mean(error, torch.tensor([[True, False]])) == 2.0
    assert masked_mean(error, torch.tensor([[False, False]])) == 0.0


@pytest.mark.parametrize("kind", ["bc", "unet", "transformer"])
def test_chunks_have_the_right_shape_and_stay_in_bounds(kind, toy_data):
    policy = make(kind, toy_data).eval()
    observation = to_tensors(toy_data.train.batch(np.arange(5)), torch.device("cpu"))["observation"]
    chunk = policy.predict(observation, [""] * 5, torch.Generator().manual_seed(0))
    assert chunk.shape == (5, 8, 7)
    assert chunk.dtype == torch.float32
    assert chunk.abs().max() <= 1.0


def test_nan_in_the_weights_reaches_the_action_instead_of_being_clipped_away(toy_data):
    policy = make("unet", toy_data).eval()
    with torch.no_grad():
        policy.denoiser.output.bias.fill_(float("nan"))
    observation = to_tensors(toy_data.train.batch(np.arange(1)), torch.device("cpu"))["observation"]
    assert torch.isnan(policy.predict(observation, [""], None)).all()


# --- noise processes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "process", [Flow(6), Diffusion("ddim", 50, 10), Diffusion("ddpm", 50, 50), Diffusion("dpm", 50, 10)],
    ids=["flow", "ddim", "ddpm", "dpm"],
)  # fmt: skip
def test_a_perfect_denoiser_regenerates_the_clean_chunk(process):
    torch.manual_seed(0)
    clean = torch.rand(3, 8, 7) * 1.6 - 0.8
    generated = process.generate(lambda noisy, time: clean, torch.randn_like(clean), torch.Generator().manual_seed(0))
    torch.testing.assert_close(generated, clean, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("kind", "steps"), [("ddim", 29), ("ddim", 57), ("ddim", 60), ("ddim", 97), ("ddpm", 29), ("dpm", 29)]
)
def test_many_steps_draw_from_what_was_learned_also_where_they_do_not_divide_the_levels(kind, steps):
    """The best denoiser of a normal distribution is known, and so is what comes out."""
    mean, deviation = 0.3, 0.25
    process = Diffusion(kind, 100, steps)

    def best(noisy, time):
        kept = process.scheduler.alphas_cumprod[(time * 100).round().long()][:, None, None]
        precision = 1 / deviation**2 + kept / (1 - kept)
        return (mean / deviation**2 + kept.sqrt() * noisy / (1 - kept)) / precision

    generator = torch.Generator().manual_seed(0)
    drawn = process.generate(best, torch.randn(4000, 4, 2, generator=generator), generator)
    assert drawn.mean().item() == pytest.approx(mean, abs=0.01)
    assert drawn.std().item() == pytest.approx(deviation, rel=0.2)


@pytest.mark.parametrize("steps", [1, 4, 10, 50, 100])
def test_ddim_is_diffusers_to_the_last_bit_where_its_steps_fit(steps):
    process = Diffusion("ddim", 100, steps)
    noise = torch.randn(5, 8, 7, generator=torch.Generator().manual_seed(0))

    def denoiser(noisy, time):
        return torch.sin(3 * noisy + time[:, None, None]) * 1.7

    expected, scheduler = noise, process.scheduler
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:
        clean = denoiser(expected, expected.new_full((5,), float(timestep) / 100))
        expected = scheduler.step(clean, timestep, expected).prev_sample
    assert torch.equal(process.generate(denoiser, noise, None), expected)


@pytest.mark.parametrize("process", [Flow(6), Diffusion("ddim", 50, 10)], ids=["flow", "diffusion"])
def test_corruption_runs_from_the_clean_chunk_to_noise(process):
    clean, noise = torch.ones(2, 4, 3), torch.randn(2, 4, 3)
    noisy, time = process.corrupt(clean, noise, torch.tensor([0.0, 0.999]))
    assert (noisy[0] - clean[0]).abs().max() < 0.15
    assert (noisy[1] - noise[1]).abs().max() < 0.15
    assert time[0] < 0.05
    assert time[1] > 0.9


def test_noise_levels_of_one_observation_are_spread():
    times = spread_times(100, 4, torch.device("cpu"))
    assert torch.equal((times * 4).long(), torch.arange(4).expand(100, 4))


def test_noise_per_row_does_not_depend_on_the_neighbours():
    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    both = normal_noise((2, 3, 4), [generator(1), generator(2)], torch.device("cpu"))
    alone = normal_noise((1, 3, 4), [generator(2)], torch.device("cpu"))
    assert torch.equal(both[1:], alone)
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        normal_noise((2, 3), [generator(0)], torch.device("cpu"))


# --- registry and settings -------------------------------------------------------------------------------------------


def test_registry_knows_our_types_and_suggests_the_closest():
    assert policy_class("diffusion") is DiffusionPolicy
    assert {"bc", "diffusion"} <= set(policy_types())
    with pytest.raises(ConfigError, match="Did you mean 'diffusion'"):
        policy_class("difusion")


def test_third_parties_register_through_an_entry_point(tmp_path, monkeypatch):
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    lines = "theirs = third_party_policy:Theirs\nbroken = no_such_module:Policy\n"
    lines += "raises = third_party_raises:Policy\nother = third_party_policy:Other\n"
    (info / "entry_points.txt").write_text(f"[simtoreal.policies]\n{lines}")
    text = "from simtoreal.policies.bc import BCPolicy\nclass Theirs(BCPolicy):\n    pass\nclass Other:\n    pass\n"
    (tmp_path / "third_party_policy.py").write_text(text)
    (tmp_path / "third_party_raises.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert policy_class("theirs").__name__ == "Theirs"
    with pytest.raises(MissingDependencyError, match="no_such_module"):
        policy_class("broken")
    with pytest.raises(MissingDependencyError, match=r"'raises' .* cannot be imported: ZeroDivisionError"):
        policy_class("raises")
    with pytest.raises(ConfigError, match=r"'other' \(third_party_policy:Other\) is no subclass of .*Policy"):
        policy_class("other")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DiffusionConfig(execute_steps=17), "execute_steps is 17"),
        (lambda: DiffusionConfig(horizon=15, execute_steps=8), "multiple of 2"),
        (lambda: DiffusionConfig(scheduler="ddim", inference_steps=200), "inference_steps is 200"),
        (lambda: DiffusionConfig(train_timesteps=0), "train_timesteps is 0; expected at least 1"),
        (lambda: BCConfig(image_keys=(), state_keys=()), "would see nothing"),
        (lambda: BCConfig(image_keys=("a_image",) * 2), "image_keys is a_image, a_image; expected every key once"),
        (lambda: BCConfig(state_keys=("proprio",) * 2), "state_keys is proprio, proprio; expected every key once"),
        (lambda: BCConfig(vision=VisionConfig(image_steps=3)), r"image_steps is 3; expected at most obs.*_steps \(2\)"),
        (lambda: VisionConfig(widths=(8, 12)), "multiples of 8"),
        (lambda: VisionConfig(output_stride=3), "power of two"),
        (lambda: AugmentationConfig(shift_px=-1), "negative"),
        (lambda: TrainerConfig(steps=0), "steps is 0"),
    ],
)
def test_settings_out_of_range_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_camera_that_the_embodiment_lacks_is_refused(toy_data):
    with pytest.raises(ConfigError, match=r"'wrist_image'.*Valid: front_image"):
        DiffusionPolicy(DiffusionConfig(), toy_data.embodiment, toy_data.statistics)


# --- actor -----------------------------------------------------------------------------------------------------------


def observation_of(toy_data, rows: np.ndarray) -> dict[str, np.ndarray]:
    return toy_data.train.batch(rows)["observation"]


def test_an_episode_does_not_depend_on_its_slot(toy_data):
    policy = make("unet", toy_data)
    observation = observation_of(toy_data, np.array([3, 40]))
    one, other = PolicyActor(policy, seed=5), PolicyActor(policy, seed=5)
    one.reset(np.array([0, 1]), [100, 101])
    other.reset(np.array([7]), [101])
    for _ in range(2):
        both = one.act(observation, ["", ""], np.array([0, 1]))
        alone = other.act({key: value[1:] for key, value in observation.items()}, [""], np.array([7]))
        np.testing.assert_allclose(both[1], alone[0], atol=1e-5)
    different = PolicyActor(policy, seed=6)
    different.reset(np.array([0, 1]), [100, 101])
    assert np.abs(different.act(observation, ["", ""], np.array([0, 1])) - both).max() > 1e-3


def test_actor_reads_only_the_keys_of_its_config(toy_data):
    actor = PolicyActor(make("unet", toy_data))
    observation = observation_of(toy_data, np.array([0]))
    outcomes = []
    for extra in ({}, {"object_state": np.full((1, 2, 9), np.nan, dtype=np.float32)}):
        actor.reset(np.array([0]), [1])
        outcomes.append(actor.act({**observation, **extra}, [""], np.array([0])))
    np.testing.assert_array_equal(*outcomes)
    with pytest.raises(ConfigError, match="reads 'proprio', but the environment gives"):
        actor.act({"front_image": observation["front_image"]}, [""], np.array([0]))


def test_actor_exposes_execution_and_ensembling(toy_data):
    policy = make("bc", toy_data)
    assert PolicyActor(policy).execute_steps == 4
    assert PolicyActor(policy).ensembling is None
    actor = PolicyActor(policy, execute_steps=2, ensembling=0.01)
    assert (actor.observation_steps, actor.execute_steps, actor.ensembling) == (2, 2, 0.01)
    with pytest.raises(ConfigError, match="execute_steps is 9"):
        PolicyActor(policy, execute_steps=9)
    with pytest.raises(ConfigError, match="ensembling"):
        PolicyActor(policy, ensembling=-1.0)


def test_scene_truth_is_used_only_when_configured(toy_data):
    config = toy.small_diffusion(image_keys=(), state_keys=("proprio", "object_state"))
    statistics = {**toy_data.statistics, "object_state": fit_statistics(np.random.default_rng(0).random((50, 9)))}
    policy = DiffusionPolicy(config, toy_data.embodiment, statistics).eval()
    observation = {"proprio": torch.zeros(2, 2, 20), "object_state": torch.zeros(2, 2, 9)}
    assert policy.predict(observation, ["", ""], None).shape == (2, 8, 7)
    assert ACTIONS in policy.normalizer.statistics
