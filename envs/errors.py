"""Errors that a user can act on.

Every message says what was wrong, with which file, key or value, what was expected and how to fix it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SimtorealError(Exception):
    """Base of every error raised on purpose; the command line prints its message without a traceback."""


class ConfigError(SimtorealError):
    """A configuration, preset or command-line value is wrong."""


class TaskError(SimtorealError):
    """A task specification is malformed, or names something that does not exist."""


class ActionError(SimtorealError):
    """An action has the wrong shape or dtype, is not finite, or is out of range."""


class EmbodimentMismatchError(SimtorealError):
    """Data, checkpoint and environment describe different robots, cameras or action spaces."""


class DatasetError(SimtorealError):
    """A dataset or episode file is missing, damaged, unsafe or inconsistent."""


class DiskError(DatasetError):
    """A file of a dataset cannot be written: the disk is full, failing or too slow."""


class CheckpointError(SimtorealError):
    """A checkpoint is missing, damaged, or does not fit the policy that loads it."""


class MissingDependencyError(SimtorealError):
    """An optional package or system library is needed; the message holds the command that installs it."""


class RobotError(SimtorealError):
    """The robot, its ROS 2 graph or a sensor does not behave as the interface requires."""


class StaleObservationError(RobotError):
    """An input stopped updating, froze or was torn."""


class SafetyError(RobotError):
    """The safety gate refused or stopped the motion."""


def closest(name: str, valid: Iterable[str]) -> str:
    """Return a sentence that names the closest valid option and lists all of them.

    Args:
        name: what the user wrote.
        valid: every accepted name.
    """
    options = sorted(valid)
    listed = ", ".join(options) or "none"
    match = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    hint = f"Did you mean '{match[0]}'? " if match else ""
    return f"{hint}Valid: {listed}."


def require(module: str, extra: str, *, package: str | None = None) -> object:
    """Import an optional module, or say which extra installs it.

    Args:
        module: name to import, e.g. ``"pyrealsense2"``.
        extra: our extra that provides it, e.g. ``"realsense"``.
        package: name shown in the message when it differs from ``module``.

    Raises:
        MissingDependencyError: the module cannot be imported.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{package or module} is needed here but cannot be imported ({error}). "
            f"Install it with: pip install 'simtoreal[{extra}]'"
        ) from error
