"""Settings of policies and of their training. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What every policy says about its inputs and outputs.

    Raises:
        ValueError: a value is out of range.
    """

    type: str
    """Registered name of the policy."""
    observation_steps: int = 2
    """Most recent observations given to the policy (control steps)."""
    horizon: int = 16
    """Actions predicted at once (control steps)."""
    execute_steps: int = 8
    """Actions of each prediction that are executed before the next one (control steps)."""
    image_keys: tuple[str, ...] = ("front_image", "wrist_image")
    """Camera observations that the policy reads."""
    state_keys: tuple[str, ...] = ("proprio",)
    """Vector observations that the policy reads; ``object_state`` exists in simulation only."""

    OLDER: ClassVar[Mapping[str, Any]] = {}
    """What settings were that a checkpoint does not name because it is older, where that is not their default."""

    def __post_init__(self) -> None:
        if self.observation_steps < 1:
            raise ValueError(f"observation_steps is {self.observation_steps}; expected at least 1")
        if not 1 <= self.execute_steps <= self.horizon:
            raise ValueError(
                f"execute_steps is {self.execute_steps}; expected between 1 and the horizon ({self.horizon})"
            )
        if not self.keys:
            raise ValueError("image_keys and state_keys are both empty; the policy would see nothing")
        for name in ("image_keys", "state_keys"):
            keys = getattr(self, name)
            if len(set(keys)) < len(keys):
                raise ValueError(f"{name} is {', '.join(keys)}; expected every key once")
        vision = getattr(self, "vision", None)
        if vision is not None and vision.image_steps > self.observation_steps:
            raise ValueError(
                f"vision.image_steps is {vision.image_steps}; expected at most observation_steps "
                f"({self.observation_steps}), the policy is not given more images"
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """Every observation key that the policy reads."""
        return (*self.image_keys, *self.state_keys)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Image encoder: residual network with GroupNorm, then spatial softmax (Chi et al. 2023, §IV)."""

    widths: tuple[int, ...] = (32, 64, 64)
    """Channels of the first convolution and of each residual stage (multiples of 8)."""
    blocks: int = 1
    """Residual blocks per stage."""
    output_stride: int = 4
    """Image pixels per cell of the last feature map (power of two, at least 2)."""
    keypoints: int = 32
    """Points that the spatial softmax reports per camera."""
    features: int = 128
    """Size of the feature vector per image."""
    shared: bool = False
    """Use the same weights for every camera."""
    image_steps: int = 1
    """Most recent images that are encoded; vectors always use all observation steps. Encoding images is most of
    the cost of a training step, and the velocity that a second image would show is in the vectors already."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or any(width < 8 or width % 8 for width in self.widths):
            raise ValueError(f"widths is {self.widths}; expected two or more positive multiples of 8")
        stride = self.output_stride
        if stride < 2 or stride & (stride - 1) or stride > 2 ** len(self.widths):
            raise ValueError(f"output_stride is {stride}; expected a power of two from 2 to {2 ** len(self.widths)}")
        if self.blocks < 1 or self.keypoints < 1 or self.features < 1 or self.image_steps < 1:
            raise ValueError("blocks, keypoints, features and image_steps must be at least 1")


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig:
    """Changes made to training batches only."""

    shift_px: int = 3
    """Random translation of every image (pixels, both axes; the border is repeated)."""
    brightness: float = 0.1
    """Random offset of the intensity (fraction of the full range)."""
    contrast: float = 0.2
    """Random relative change of the contrast."""
    colour: float = 0.1
    """Random relative change of each colour channel."""
    state_noise: float = 0.02
    """Standard deviation of noise on normalised vectors, whose range is [-1, 1]."""

    def __post_init__(self) -> None:
        if min(self.shift_px, self.brightness, self.contrast, self.colour, self.state_noise) < 0:
            raise ValueError("augmentation strengths must not be negative")


@dataclass(frozen=True, kw_only=True)
class BCConfig(PolicyConfig):
    """Behaviour cloning: a multilayer perceptron regresses the whole chunk (the baseline)."""

    type: Literal["bc"] = "bc"
    """Registered name."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image encoder."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Changes made to training batches."""
    hidden: int = 512
    """Width of the perceptron."""
    layers: int = 3
    """Hidden layers of the perceptron."""
    loss: Literal["l1", "l2"] = "l1"
    """``l1`` learns the median of what was demonstrated, ``l2`` its mean."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden < 1 or self.layers < 1:
            raise ValueError("hidden and layers must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig(PolicyConfig):
    """Diffusion policy (Chi et al. 2023): the chunk is generated by iterative denoising."""

    type: Literal["diffusion"] = "diffusion"
    """Registered name."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image encoder."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Changes made to training batches."""
    denoiser: Literal["unet", "transformer"] = "unet"
    """``unet``: conditional 1-D U-Net; ``transformer``: adaLN transformer."""
    unet_widths: tuple[int, ...] = (64, 128)
    """Channels of each level of the U-Net (multiples of 8); the horizon must be divisible by 2^(levels-1)."""
    transformer_width: int = 192
    """Token size of the transformer (multiple of 64)."""
    transformer_layers: int = 4
    """Layers of the transformer."""
    condition_width: int = 256
    """Size of the fused observation given to the denoiser."""
    scheduler: Literal["flow", "ddpm", "ddim", "dpm"] = "flow"
    """``flow``: rectified flow with Euler steps; ``ddpm``, ``ddim`` and ``dpm`` (DPM-Solver++): the same diffusion
    process sampled three ways, so a checkpoint trained with one runs with the others."""
    train_timesteps: int = 100
    """Noise levels of the diffusion process (``flow`` is continuous)."""
    inference_steps: int = 8
    """Denoising steps per prediction."""
    noise_samples: int = 4
    """Noise levels trained per encoded observation: the encoder costs far more than the denoiser."""
    loss: Literal["l2", "l1"] = "l2"
    """What the denoiser learns by: with ``l2`` the mean of the clean chunks that a noisy one may have been, as sampling
    assumes, with ``l1`` their median. Where demonstrations go one way, ``l1`` is more exact; where they go several,
    it loses some of them (docs/diversity.md)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.unet_widths or any(width < 8 or width % 8 for width in self.unet_widths):
            raise ValueError(f"unet_widths is {self.unet_widths}; expected positive multiples of 8")
        multiple = 2 ** (len(self.unet_widths) - 1)
        if self.denoiser == "unet" and self.horizon % multiple:
            raise ValueError(
                f"horizon is {self.horizon}; {len(self.unet_widths)} U-Net levels need a multiple of {multiple}"
            )
        if self.transformer_width < 64 or self.transformer_width % 64:
            raise ValueError(f"transformer_width is {self.transformer_width}; expected a multiple of 64")
        if self.transformer_layers < 1 or self.condition_width < 1 or self.noise_samples < 1:
            raise ValueError("transformer_layers, condition_width and noise_samples must be at least 1")
        if self.train_timesteps < 1:
            raise ValueError(f"train_timesteps is {self.train_timesteps}; expected at least 1")
        if self.inference_steps < 1 or (self.scheduler != "flow" and self.inference_steps > self.train_timesteps):
            raise ValueError(
                f"inference_steps is {self.inference_steps}; expected 1 to train_timesteps ({self.train_timesteps})"
            )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How a policy is trained.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int = 3500
    """Optimiser steps; the learning rate follows a cosine over all of them."""
    batch_size: int = 64
    """Windows per step, over all processes."""
    learning_rate: float = 1e-3
    """Highest learning rate, reached after the warm-up."""
    warmup_steps: int = 200
    """Steps of linear warm-up. Of fewer than twice as many steps, it takes what is beyond this number, but at least a
    tenth of them."""
    weight_decay: float = 1e-3
    """Decoupled weight decay (AdamW)."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``bf16`` runs matrix work in bfloat16 (autocast); ``auto`` uses it where the processor has it."""
    validate_every: int = 500
    """Steps between measurements of the action error on held-out episodes."""
    validation_windows: int = 256
    """Held-out windows per measurement."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the newest two are kept."""
    log_every: int = 20
    """Steps between lines of metrics."""
    seed: int = 0
    """Decides initial weights, batches, noise and augmentation."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "validate_every", "validation_windows", "checkpoint_every", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.learning_rate <= 0 or self.max_gradient_norm <= 0:
            raise ValueError("learning_rate and max_gradient_norm must be positive")
        if self.warmup_steps < 0 or self.weight_decay < 0 or self.seed < 0:
            raise ValueError("warmup_steps, weight_decay and seed must not be negative")
