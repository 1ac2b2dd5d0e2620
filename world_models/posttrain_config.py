"""Settings of post-training. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simtoreal.policies.reinforcement_config import ClipConfig


@dataclass(frozen=True, kw_only=True)
class PosttrainConfig:
    """How the dynamics of a world model are trained on, so that videos obey their actions.

    Raises:
        ValueError: a value is out of range.
    """

    method: Literal["rlir", "sft", "sft_idm"] = "rlir"
    """``rlir``: reinforcement with the reward of the inverse-dynamics model (arXiv 2509.23958); ``sft``: more of the
    training on real videos; ``sft_idm``: that, and the error of the inverse-dynamics model as a loss, through which
    gradients flow into the video. All spend the same number of frame passes."""
    frame_passes: int = 1_000_000
    """Budget: frames that go through the dynamics; with gradient a frame counts three times."""
    contexts: int = 16
    """Real frames per step from which videos are generated."""
    group_size: int = 8
    """Videos from each of them that are compared (``rlir``)."""
    steps: int = 8
    """Control steps of a video; a multiple of the steps between the frames that the inverse-dynamics model compares."""
    noise_scale: float = 0.1
    """Standard deviation of the noise that makes videos of a group differ (latents have variance 1): added to every
    frame of a ``residual`` model; of a ``flow`` model, drawn afresh in every Euler step but the last one."""
    gripper_weight: float = 0.2
    """Share of the reward for reading the right sign of the gripper's command."""
    kl_weight: float = 0.1
    """Weight of the divergence from the model that it began as (``rlir``)."""
    inverse_weight: float = 0.1
    """Weight of the error of the inverse-dynamics model (``sft_idm``), in units of its squared error on real videos."""
    batch_size: int = 24
    """Windows of real videos per step (``sft``, ``sft_idm``)."""
    learning_rate: float = 3e-4
    """Of AdamW, after a warm-up of 20 steps."""
    epochs: int = 2
    """Passes over the videos of a step (``rlir``)."""
    clip: ClipConfig = field(default_factory=ClipConfig)
    """Limits of an update (``rlir``)."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``bf16`` runs matrix work in bfloat16; ``auto`` uses it where the processor has it."""
    checkpoint_every: int = 50
    """Steps between checkpoints; the newest two are kept."""
    log_every: int = 5
    """Steps between lines of metrics."""
    seed: int = 0
    """Decides contexts and noise."""

    def __post_init__(self) -> None:
        counts = ("frame_passes", "contexts", "steps", "batch_size", "epochs", "checkpoint_every", "log_every")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.group_size < 2:
            raise ValueError(f"group_size is {self.group_size}; a group needs at least 2 videos to compare")
        if min(self.noise_scale, self.learning_rate, self.max_gradient_norm) <= 0:
            raise ValueError("noise_scale, learning_rate and max_gradient_norm must be positive")
        if not 0 <= self.gripper_weight < 1 or min(self.kl_weight, self.inverse_weight, self.seed) < 0:
            raise ValueError("gripper_weight must be in [0, 1); kl_weight, inverse_weight and seed not negative")
