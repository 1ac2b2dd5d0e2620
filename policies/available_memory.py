"""How much main memory this process may still take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
CONTROL_GROUP, CONTROL_GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that this process may take without anything being swapped or killed.

    What the machine has available, at most what its control groups (containers, services; cgroup v2) leave, shared with
    the processes that ``torchrun`` started on this machine. The page cache counts as available: it makes room.
    """
    available = min([_available(), *_left_in_control_groups()])
    return available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _available() -> int:
    with contextlib.suppress(OSError):
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_control_groups() -> list[int]:
    """Bytes left of the limit of this process's group and of every group above it that has one."""
    try:
        lines = CONTROL_GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    own = [line.removeprefix("0::/") for line in lines if line.startswith("0::/")]
    left = []
    for part in own:
        group = CONTROL_GROUPS / part
        for folder in (group, *group.parents):
            if not folder.is_relative_to(CONTROL_GROUPS):
                break
            try:
                limit = (folder / "memory.max").read_text(encoding="ascii").strip()
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text("ascii").splitlines())
            except OSError:
                continue
            if limit != "max":
                left.append(max(0, int(limit) - used + int(counts.get("inactive_file", 0))))
    return left
