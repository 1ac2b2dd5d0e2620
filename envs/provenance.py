"""What a stored number needs to be trusted: command, commit, seeds, machine and versions."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("simtoreal", "mujoco", "gymnasium", "torch", "diffusers", "numpy", "h5py", "opencv-python-headless")


@functools.cache
def git_commit() -> str:
    """Commit of the source tree this package runs from (``-dirty`` if modified), or ``"unknown"``."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return "unknown"
    try:
        head = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if dirty.stdout.strip() else "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, core count and load of this machine, and its GPU if torch is in use and computes on one."""
    model = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    found = {"cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()[0], "system": platform.platform()}
    # Not imported here: what does not compute with torch should not wait for it.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name(0)
    return found


def provenance(seeds: Sequence[int] = ()) -> dict[str, Any]:
    """Return the block stored with every result: command, commit, seeds, machine, versions."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": git_commit(),
        "seeds": [int(seed) for seed in seeds],
        "machine": machine(),
        "versions": versions(),
    }
