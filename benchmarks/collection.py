"""How fast image demonstrations are collected.

python benchmarks/collection.py
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from interleaved import read_no_flags, write_benchmark

TASK, EPISODES, ROUNDS = "pick_place", 200, 5


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    rates = []
    for round_index in range(ROUNDS):
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "data"
            command = ["collect", "--task", TASK, "--episodes", str(EPISODES), "--seed", str(round_index)]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "simtoreal", *command, "--output", str(output)],
                check=True,
                stdout=subprocess.DEVNULL,
            )
            wall = EPISODES / (time.perf_counter() - start)
            inside = json.loads((output / "results.json").read_text())["collect"]["episodes_per_s"]
            rates.append((inside, wall))
            print(f"{inside:.1f} episodes/s ({wall:.1f} with the start of the program)")
    values = sorted(rate for rate, _ in rates)
    headline = {
        "metric": "image episodes/s", "ours": statistics.median(values), "baseline": 15.0,
        "baseline_name": "the goal", "ratio": statistics.median(values) / 15.0, "difference": None,
        "interval": [values[0] / 15.0, values[-1] / 15.0], "n": len(values), "p_value": None,
    }  # fmt: skip
    write_benchmark(
        "collection",
        "How many pick_place demonstrations with two 64-pixel cameras are collected per second?",
        headline,
        [
            {"name": "collect", "value": headline["ours"], "interval": [values[0], values[-1]], "n": len(values)},
            {"name": "collect, start of the program included", "value": statistics.median(w for _, w in rates),
             "interval": [min(w for _, w in rates), max(w for _, w in rates)], "n": len(values)},
        ],
        seconds=time.perf_counter() - begin,
        seeds=list(range(ROUNDS)),
        notes=f"{EPISODES} episodes per round, default flags: 2 workers, scripted expert, successful episodes kept.",
    )  # fmt: skip


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()
