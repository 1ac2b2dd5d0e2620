"""The processes that train together: one, or several started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process among those that train together.

    Attributes:
        rank: number of this process; 0 writes files and shows progress.
        world: how many there are.
        device: where this process computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            torch.distributed.barrier()


def choose_device(name: str | None) -> torch.device:
    """Return a torch device (``cpu``, ``cuda``, ``cuda:1``); None picks a GPU if there is one.

    Raises:
        ConfigError: the device does not exist.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device '{name}' is not a torch device (cpu, cuda, cuda:1): {error}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device '{name}' was asked for, but torch {torch.__version__} finds no GPU here; use cpu")
    count = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(chosen.type, 0)
    if (chosen.index or 0) >= count:
        there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))])
        raise ConfigError(f"device '{name}' is not there or cannot be trained on; expected one of {there}")
    return chosen


@contextmanager
def joined_processes(device: str | None = None) -> Iterator[Processes]:
    """Join the processes started by ``torchrun`` (gloo on CPUs, nccl on GPUs), or be the only one.

    Args:
        device: torch device; None picks a GPU if there is one.

    Raises:
        ConfigError: the device does not exist.
    """
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    torch.distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(torch.distributed.get_rank(), torch.distributed.get_world_size(), chosen)
    finally:
        torch.distributed.destroy_process_group()
