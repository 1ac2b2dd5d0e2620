"""Which policy types exist: ours, and those that installed packages announce. Imports nothing heavy."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING

from simtoreal.envs.errors import ConfigError, MissingDependencyError, closest

if TYPE_CHECKING:
    from simtoreal.policies.base import Policy

ENTRY_POINT_GROUP = "simtoreal.policies"

# An announced family (``acme``) serves every type that begins with its name and a slash (``acme/transformer``).
BUILTIN = {
    "bc": "simtoreal.policies.bc:BCPolicy",
    "diffusion": "simtoreal.policies.diffusion:DiffusionPolicy",
    "robomimic/bc": "simtoreal.policies.robomimic:RobomimicBCPolicy",
    "robomimic/bc_rnn": "simtoreal.policies.robomimic:RobomimicPolicy",
}


def policy_types() -> dict[str, str]:
    """Return every policy type (or family) and the ``module:class`` that implements it."""
    found = {entry.name: entry.value for entry in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)}
    return {**found, **BUILTIN}


def policy_class(name: str) -> type[Policy]:
    """Import and return the class of a policy type.

    Raises:
        ConfigError: there is no such type, or what is announced as one is no :class:`Policy`.
        MissingDependencyError: its module cannot be imported.
    """
    known = policy_types()
    target = known.get(name) or known.get(name.split("/")[0])
    if target is None:
        raise ConfigError(f"unknown policy type '{name}'. {closest(name, known)}")
    module, _, attribute = target.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # Somebody else's module may fail in any way.
        raise MissingDependencyError(
            f"policy type '{name}' ({target}) cannot be imported: {type(error).__name__}: {error}"
        ) from error
    from simtoreal.policies.base import Policy

    if not (isinstance(found, type) and issubclass(found, Policy)):
        raise ConfigError(f"policy type '{name}' ({target}) is no subclass of simtoreal.policies.base.Policy")
    return found
