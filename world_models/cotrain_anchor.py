"""The anchor of RL-Co for a run of reinforcement: the imitation loss on demonstrations, opened when it is needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from simtoreal.data_collection.dataset import Dataset
from simtoreal.policies.base import Policy
from simtoreal.policies.mixed_windows import open_mixed_data
from simtoreal.policies.reinforcement import Anchor, demonstration_anchor


def demonstrated_seeds(demonstrations: Sequence[Path]) -> list[int]:
    """Initial conditions of the demonstrations, which a measurement must not reuse."""
    return [episode.seed for path in demonstrations for episode in Dataset.open(path).episodes]


def anchor_on(
    demonstrations: Sequence[Path], batch_size: int, seed: int, *, filter: str | None = None
) -> Callable[[Policy], Anchor]:
    """Return what makes the anchor for a policy.

    Args:
        demonstrations: dataset folders.
        batch_size: windows per update.
        seed: decides their order.
        filter: imitate only the steps that this filter keeps, in the folders that have it.
    """

    def make(policy: Policy) -> Anchor:
        data = open_mixed_data(demonstrations, (), policy.config, real_share=1.0, filter=filter)
        return demonstration_anchor(policy, data.train, batch_size, seed)

    return make
