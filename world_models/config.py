"""Settings of a world model and of its training. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simtoreal.policies.config import TrainerConfig

# Pixels per latent cell: three halvings.
STRIDE = 8


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Convolutional autoencoder that all cameras share: one latent vector per 8x8 pixels.

    Raises:
        ValueError: a value is out of range.
    """

    channels: int = 16
    """Size of a latent vector."""
    encoder_widths: tuple[int, int, int] = (32, 64, 96)
    """Channels at 1/2, 1/4 and 1/8 of the resolution (multiples of 8)."""
    decoder_widths: tuple[int, int, int] = (96, 48, 24)
    """Channels at 1/8, 1/4 and 1/2 of the resolution (multiples of 8)."""
    rarity: float = 0.5
    """Exponent of the loss weight of rare colours: a pixel counts in proportion to its colour's frequency to the power
    of minus this. 0 lets small objects vanish."""
    change: float = 2.0
    """Additional loss weight of pixels that differ from the median of their episode."""
    largest_weight: float = 30.0
    """Bound of a pixel's weight, relative to the mean."""
    noise: float = 0.05
    """Standard deviation of noise on the latents while training, so that the decoder tolerates imperfect ones."""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}; expected at least 1")
        if any(width < 8 or width % 8 for width in (*self.encoder_widths, *self.decoder_widths)):
            raise ValueError("encoder_widths and decoder_widths must be positive multiples of 8")
        if min(self.rarity, self.change, self.noise) < 0 or self.largest_weight < 1:
            raise ValueError("rarity, change and noise must not be negative, largest_weight at least 1")


@dataclass(frozen=True, kw_only=True)
class DynamicsConfig:
    """What comes next, given the past and the action.

    Raises:
        ValueError: a value is out of range.
    """

    kind: Literal["residual", "flow"] = "residual"
    """``residual``: deterministic and small; ``flow``: rectified-flow transformer (WoVR, arXiv 2602.13977, §3)."""
    memory: int = 2
    """Most recent frames that the model sees, beside the first frame of the episode (WoVR: 4)."""
    width: int = 96
    """Channels (``residual``) or token size (``flow``; multiple of 64)."""
    layers: int = 4
    """Residual blocks, or transformer layers."""
    chunk: int = 8
    """Frames that are generated at once; any smaller number can be asked for. Errors add up from chunk to chunk."""
    patch: int = 2
    """Latent cells per token and axis (``flow``)."""
    sampling_steps: int = 5
    """Euler steps per generated chunk (``flow``)."""
    context_noise: float = 0.1
    """Standard deviation of noise on the remembered frames while training, so that the model tolerates its own
    imperfect ones. The first frame of the episode stays clean (WoVR §3)."""
    changed_weight: float = 8.0
    """Additional loss weight of latent cells that differ from the last frame that is known, or from the first."""
    proprio_weight: float = 10.0
    """Loss weight of proprio against the images."""
    rest_share: float = 0.0625
    """Share of the windows to learn from in which the first frame of an episode stays as it is, under actions that
    change nothing. No demonstration shows that, and a model that never saw it lets the picture dissolve. 0 where
    recordings begin in motion."""
    unroll: tuple[int, ...] = (8, 16, 24)
    """Steps for which ``residual`` lives on its own predictions while it learns; every entry gets an equal share of
    the training steps, in turn."""

    def __post_init__(self) -> None:
        for name in ("memory", "layers", "chunk", "patch", "sampling_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        multiple = 8 if self.kind == "residual" else 64
        if self.width < multiple or self.width % multiple:
            raise ValueError(f"width is {self.width}; '{self.kind}' needs a multiple of {multiple}")
        if not self.unroll or min(self.unroll) < 1:
            raise ValueError(f"unroll is {self.unroll}; expected one or more numbers of at least 1")
        if min(self.context_noise, self.changed_weight, self.proprio_weight) < 0:
            raise ValueError("context_noise, changed_weight and proprio_weight must not be negative")
        if not 0 <= self.rest_share < 1:
            raise ValueError(f"rest_share is {self.rest_share}; expected a value in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Whether a frame shows success.

    Raises:
        ValueError: a value is out of range.
    """

    width: int = 48
    """Channels of the convolutions (multiple of 8)."""
    consecutive: int = 2
    """Frames in a row of a recording that must show success: one alone is too easily a hallucination (WoVR's reward).
    A recorded success ends soon after its first one, and an imagined one may be a little late, so few must do. Where
    imagination goes on, as many are asked for as in the simulation: else passing through the goal would pay."""
    near_steps: int = 15
    """Frames before the first success, and at the end of failures, that count as hard negatives."""
    generated_episodes: int = 160
    """Training episodes that are imagined to learn from generated frames, too (all, if there are fewer)."""
    close_error: float = 0.3
    """Weighted squared error of the latents below which a generated frame still shows what really happened, and so has
    its label (latents have variance 1)."""

    def __post_init__(self) -> None:
        if self.width < 8 or self.width % 8:
            raise ValueError(f"width is {self.width}; expected a positive multiple of 8")
        if min(self.consecutive, self.near_steps, self.generated_episodes) < 1 or self.close_error <= 0:
            raise ValueError("consecutive, near_steps and generated_episodes must be at least 1, close_error positive")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One of the three trainings that make a world model.

    Raises:
        ValueError: a value is out of range.
    """

    steps: int
    """Optimiser steps; the learning rate follows a cosine over all of them."""
    batch_size: int
    """Images (tokenizer), windows (dynamics) or frames (classifier) per step."""
    learning_rate: float = 1e-3
    """Highest learning rate."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""

    def __post_init__(self) -> None:
        self.schedule()

    def schedule(self) -> TrainerConfig:
        """The same as settings of the policy trainer, whose optimiser and learning-rate schedule are used."""
        return TrainerConfig(
            steps=self.steps, batch_size=self.batch_size, learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class WorldModelTrainerConfig:
    """How the parts are trained, one after the other.

    Raises:
        ValueError: a value is out of range.
    """

    tokenizer: StageConfig = field(default_factory=lambda: StageConfig(steps=1500, batch_size=48, learning_rate=2e-3))
    """Training of the tokenizer."""
    dynamics: StageConfig = field(default_factory=lambda: StageConfig(steps=1500, batch_size=32))
    """Training of the dynamics."""
    classifier: StageConfig = field(default_factory=lambda: StageConfig(steps=400, batch_size=128))
    """Training of the success classifier."""
    fine_tune_share: float = 1.0
    """With an initial model: this share of the steps of dynamics and classifier. The tokenizer is kept, so that latents
    keep their meaning. Less is quicker; with 0.3 a second model ranked rollouts worse than the first one
    (docs/world-model-experiments.md)."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``bf16`` runs matrix work in bfloat16; ``auto`` uses it where the processor has it."""
    checkpoint_every: int = 250
    """Steps between checkpoints; the newest two are kept."""
    log_every: int = 20
    """Steps between lines of metrics."""
    seed: int = 0
    """Decides initial weights, batches and noise."""

    def __post_init__(self) -> None:
        if not 0 < self.fine_tune_share <= 1:
            raise ValueError(f"fine_tune_share is {self.fine_tune_share}; expected a value in (0, 1]")
        if min(self.checkpoint_every, self.log_every) < 1 or self.seed < 0:
            raise ValueError("checkpoint_every and log_every must be at least 1, seed not negative")


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """The parts of a world model."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Images to latents and back."""
    dynamics: DynamicsConfig = field(default_factory=DynamicsConfig)
    """Latents and proprio from one step to the next."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """Success from latents and proprio."""
