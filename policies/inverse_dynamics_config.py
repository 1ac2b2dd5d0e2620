"""Settings of the inverse-dynamics model. Imports nothing heavy, so that ``--help`` stays fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from simtoreal.policies.config import AugmentationConfig, PolicyConfig, VisionConfig


@dataclass(frozen=True, kw_only=True)
class InverseDynamicsConfig(PolicyConfig):
    """What happened between two pictures? Encoders as those of the policies, so that they can begin with its weights.

    Raises:
        ValueError: a value is out of range.
    """

    type: Literal["inverse_dynamics"] = "inverse_dynamics"
    """Kind of the model."""
    observation_steps: Literal[2] = 2
    """Frames of a pair."""
    horizon: Literal[1] = 1
    """Actions that are predicted: the mean one between the frames."""
    execute_steps: Literal[1] = 1
    """See ``horizon``."""
    state_keys: tuple[()] = ()
    """None: with proprio the action could be read without looking (Brandfonbrener et al. 2023)."""
    pair_hz: float = 5.0
    """Rate at which frames are compared; at the control rate neighbouring frames hardly differ."""
    lag_steps: int | None = None
    """Control steps by which the motion follows the action; None finds the lag that explains the motion best."""
    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image encoder (``image_steps`` has no effect, two images are encoded)."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Changes made to training batches, the same for both frames."""
    hidden: int = 256
    """Width of the perceptron."""
    layers: int = 2
    """Hidden layers of the perceptron."""

    def __post_init__(self) -> None:
        if not self.image_keys:
            raise ValueError("image_keys is empty; an inverse-dynamics model sees nothing but images")
        super().__post_init__()
        if self.pair_hz <= 0 or (self.lag_steps is not None and self.lag_steps < 0):
            raise ValueError("pair_hz must be positive and lag_steps not negative")
        if self.hidden < 1 or self.layers < 1:
            raise ValueError("hidden and layers must be at least 1")
