"""Operators: named ways in which the scripted expert moves."""

from __future__ import annotations

from dataclasses import dataclass

from simtoreal.envs.errors import ConfigError

AXES = ("x", "y", "z")


@dataclass(frozen=True, kw_only=True)
class OperatorStyle:
    """How a demonstrator moves.

    Attributes:
        name: stored with every episode as its operator.
        speed: largest action, as a fraction of the action limits, in (0, 1].
        gain: share of the remaining distance covered per step, in (0, 1]; low is cautious.
        approach_height_m: height above an object from which it is approached.
        approach_offset_m: horizontal detour of the approach, base frame.
        noise: standard deviation of noise on the translation action, as a fraction of its limit.
        route: axes of the base frame along which a point is reached one after the other; together if empty.
    """

    name: str = "expert"
    speed: float = 1.0
    gain: float = 0.55
    approach_height_m: float = 0.07
    approach_offset_m: tuple[float, float] = (0.0, 0.0)
    noise: float = 0.0
    route: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("speed", "gain"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"operator style '{key}' is {getattr(self, key)}; expected a value in (0, 1]")
        if self.noise < 0:
            raise ConfigError(f"operator style 'noise' is {self.noise}; expected a value >= 0")
        if set(self.route) - set(AXES) or len(set(self.route)) < len(self.route):
            raise ConfigError(f"operator style 'route' is {self.route}; expected distinct axes of {AXES}")


STYLES = {
    style.name: style
    for style in (
        OperatorStyle(),
        OperatorStyle(name="careful", speed=0.5, gain=0.35, approach_height_m=0.1),
        OperatorStyle(name="hasty", speed=1.0, gain=0.9, approach_height_m=0.045, noise=0.08),
        OperatorStyle(name="from_left", approach_height_m=0.05, approach_offset_m=(0.0, 0.09)),
        OperatorStyle(name="from_right", approach_height_m=0.05, approach_offset_m=(0.0, -0.09)),
        OperatorStyle(name="straight"),
        OperatorStyle(name="up_right", route=("z", "y")),
        OperatorStyle(name="right_up", route=("y", "z")),
    )
}
