"""How the twin differs from the simulator that policies are trained in.

The physical and visual differences are the simulator's own domain randomisation (one description for both);
what only exists on a real robot, the split of latency between what is seen and what is done, is drawn here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simtoreal.envs.errors import ConfigError, closest
from simtoreal.envs.randomization import RANDOMIZATIONS, Randomization

GAPS = ("none", "standard", "hard")
# Separates the latency draw from all others made with the same seed.
_LATENCY_STREAM = 0x1A7E
# Well below the age at which a robot's joint states count as stale (0.1 s in the shipped yaml).
SLOWEST_JOINT_STATES_S = 0.03


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Seconds between a command and its execution, and between an image and its publication."""

    command_s: float
    observation_s: float

    @property
    def joint_states_s(self) -> float:
        """Seconds between a joint state and its publication: an arm reports its joints sooner than cameras pictures."""
        return min(self.observation_s, SLOWEST_JOINT_STATES_S)


def load_gap(name: str) -> Randomization:
    """Return the differences of a gap: ``none``, ``standard`` or ``hard``.

    Raises:
        ConfigError: unknown name.
    """
    if name not in GAPS:
        raise ConfigError(f"unknown gap '{name}'. {closest(name, GAPS)}")
    return RANDOMIZATIONS[name]


def sample_latency(steps: int, control_period_s: float, seed: int) -> Latency:
    """Split a latency of ``steps`` control periods, evenly distributed, between command and observation.

    Args:
        steps: total latency in control periods, drawn with the rest of the gap.
        control_period_s: duration of one.
        seed: of the episode; the same seed gives the same split.
    """
    share = float(np.random.default_rng([seed, _LATENCY_STREAM]).uniform())
    total = steps * control_period_s
    return Latency(command_s=share * total, observation_s=(1.0 - share) * total)
