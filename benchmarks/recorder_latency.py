"""How long does recording a step keep a control loop waiting, also when the disk stalls?

    sudo python benchmarks/recorder_latency.py         # about 2 minutes; root only to freeze a disk of its own

Both sides append the same records to the same file system at the rate of a control loop: a plain ``write`` in the
loop, and the journal's thread. In the second half the file system (ext4 in a file) is frozen for a second, as a
card, a network disk or the write-back of another program does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from interleaved import read_no_flags, write_benchmark

from simtoreal.data_collection.journal import Journal
from simtoreal.envs.files import append_whole

# Rows of two 64-pixel cameras and of two 640x480 cameras.
SIZES = {"64 px": 25_000, "640x480": 1_843_200}
PERIOD_S, STEPS, ROUNDS, STALL_S = 0.05, 60, 7, 1.0


class PlainFile:
    """What a recorder without a thread does."""

    def __init__(self, path: Path) -> None:
        self.path, self._descriptor = path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)

    def append(self, record: bytes) -> None:
        append_whole(self._descriptor, record)

    def discard(self) -> None:
        os.close(self._descriptor)
        self.path.unlink()


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A file system that can be frozen without stopping the machine."""
    with tempfile.TemporaryDirectory() as name:
        image, folder = Path(name) / "image", Path(name) / "disk"
        folder.mkdir()
        with open(image, "wb") as file:
            file.truncate(512 * 2**20)
        subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(folder)], check=True)
        try:
            yield folder
        finally:
            subprocess.run(["umount", str(folder)], check=True)


def latencies_ms(make: Callable[[Path], Any], folder: Path, size: int, *, stall: bool) -> np.ndarray:
    """Milliseconds that each of ``STEPS`` appends took."""
    sink, record = make(folder / "steps"), os.urandom(size)
    found, deadline = [], time.perf_counter()
    thaw = threading.Timer(STALL_S, subprocess.run, [["fsfreeze", "-u", str(folder)]])
    for step in range(STEPS):
        if stall and step == STEPS // 3:
            subprocess.run(["fsfreeze", "-f", str(folder)], check=True)
            thaw.start()
        begin = time.perf_counter()
        sink.append(record)
        found.append((time.perf_counter() - begin) * 1e3)
        deadline = max(deadline + PERIOD_S, time.perf_counter())
        time.sleep(max(0.0, deadline - time.perf_counter()))
    if stall:
        thaw.join()
    sink.discard()
    return np.array(found)


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    arms: list[dict[str, Any]] = []
    sides = {"write in the loop": PlainFile, "journal": Journal}
    worst: dict[str, list[float]] = {name: [] for name in sides}
    with small_disk() as folder:
        for label, size in SIZES.items():
            for stall in (False, True):
                rounds: dict[str, list[np.ndarray]] = {name: [] for name in sides}
                for _ in range(ROUNDS if stall else 2):
                    for name, make in sides.items():
                        rounds[name].append(latencies_ms(make, folder, size, stall=stall))
                for name, found in rounds.items():
                    longest = [float(part.max()) for part in found]
                    title = f"{label}, {'stalled' if stall else 'healthy'} disk, {name}"
                    arms.append({
                        "name": f"{title}: longest append of a round (ms)", "value": float(np.median(longest)),
                        "interval": [min(longest), max(longest)], "n": len(longest),
                        "median_ms": float(np.median(np.concatenate(found))),
                    })  # fmt: skip
                    if stall:
                        worst[name] += longest
    ratios = np.array(worst["write in the loop"]) / np.array(worst["journal"])
    headline = {
        "metric": "longest append while the disk stalls for 1 s, ms (ratio: baseline / ours)",
        "ours": float(np.median(worst["journal"])), "baseline": float(np.median(worst["write in the loop"])),
        "baseline_name": "write in the loop", "ratio": float(np.median(ratios)), "difference": None,
        "interval": [float(ratios.min()), float(ratios.max())], "n": len(ratios), "p_value": None,
    }  # fmt: skip
    notes = f"{STEPS} appends per round at {1 / PERIOD_S:g} Hz on ext4 in a file; fsfreeze for {STALL_S:g} s."
    path = write_benchmark(
        "recorder_latency", "How long does recording a step keep a control loop waiting when the disk stalls?",
        headline, arms, seconds=time.perf_counter() - begin, notes=notes,
    )  # fmt: skip
    print(f"{path}: {headline}")
    for arm in arms:
        print(f"{arm['name']}: {arm['value']:.2f}, median of all {arm['median_ms']:.3f}")


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()
