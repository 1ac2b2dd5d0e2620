"""The part of proprio that needs no learning: the commanded end-effector target is arithmetic."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from simtoreal.envs.embodiment import TARGET_NAMES, Embodiment
from simtoreal.policies.normalization import Statistics

TARGETS = "targets"


class KnownProprio(nn.Module):
    """Overwrites the entries of proprio that repeat the target of the command.

    Args:
        embodiment: proprio entries of the names in ``TARGET_NAMES`` are known.
        statistics: how ``proprio`` and ``targets`` are scaled.
    """

    def __init__(self, embodiment: Embodiment, statistics: Mapping[str, Statistics]) -> None:
        super().__init__()
        names = embodiment.proprio.names
        known = [name in TARGET_NAMES and embodiment.action.mode != "env" for name in names]
        column = [TARGET_NAMES.index(name) if flag else 0 for name, flag in zip(names, known, strict=True)]
        self.any = any(known)
        self.register_buffer("known", torch.tensor(known), persistent=False)
        self.register_buffer("column", torch.tensor(column) + embodiment.action.dim, persistent=False)
        scale, shift = torch.zeros(len(names)), torch.zeros(len(names))
        for index, name in enumerate(names):
            if known[index]:
                mine, theirs = statistics["proprio"], statistics[TARGETS]
                source = TARGET_NAMES.index(name)
                half, centre = (mine.high - mine.low)[index] / 2, (mine.high + mine.low)[index] / 2
                scale[index] = float((theirs.high - theirs.low)[source] / 2 / half)
                shift[index] = float(((theirs.high + theirs.low)[source] / 2 - centre) / half)
        self.register_buffer("factor", scale, persistent=False)
        self.register_buffer("offset", shift, persistent=False)

    def forward(self, proprio: Tensor, command: Tensor) -> Tensor:
        """Return ``proprio`` ``(..., P)`` after ``command`` ``(..., A + 10)``, both scaled."""
        if not self.any:
            return proprio
        return torch.where(self.known, command[..., self.column] * self.factor + self.offset, proprio)
