"""Success of the demo's policies: in simulation, under the twin's gap, and on the twin over ROS 2 in real time.

    simtoreal demo                                   # trains the two policies
    python benchmarks/pick_place.py                  # about 25 minutes, most of it real time on the twin; resumable

Both policies see the same initial conditions in simulation, so they are compared in pairs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from interleaved import write_benchmark
from parts import parts_of

from simtoreal.evaluation.results import load_evaluation
from simtoreal.evaluation.statistics import paired_test

EPISODES = 100
SIMULATION_SEED, TWIN_SEED = 400_000, 500_000


def run(arguments: list[str], folder: Path) -> dict[str, Any]:
    """Run a command of simtoreal into a folder, and return its results; a finished one is not repeated."""
    subprocess.run([sys.executable, "-m", "simtoreal", *arguments, "--output", str(folder)], check=True)
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def arm(name: str, results: dict[str, Any]) -> dict[str, Any]:
    """Row of the table: a success rate with its interval."""
    return {"name": name, "value": results["success_rate"], "n": results["n"], "interval": results["interval"]}


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo"), help="folder of a finished demo")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_pick_place"))
    options = parser.parse_args()
    arms, folders, done = [], {}, []
    for policy, stage in (("diffusion", "policy"), ("bc", "baseline")):
        for gap in ("none", "standard"):
            folder = options.output / f"{policy}_{gap}"
            command = ["evaluate", "--policy", str(options.demo / stage), "--episodes", str(EPISODES)]
            command += ["--seed", str(SIMULATION_SEED), "--randomization", gap, "--videos", "0"]
            done.append(run(command, folder))
            arms.append(arm(f"{policy}, simulation, gap {gap}", done[-1]))
            folders[policy, gap] = folder
    twin = run(
        ["deploy", "--policy", str(options.demo / "policy"), "--episodes", str(EPISODES), "--seed", str(TWIN_SEED),
         "--gap", "standard", "--videos", "1", "--no-record"],
        options.output / "twin_standard",
    )  # fmt: skip
    arms.append(arm("diffusion, twin over ROS 2, gap standard", twin))
    ours, baseline = (load_evaluation(folders[policy, "none"]).outcomes for policy in ("diffusion", "bc"))
    test = paired_test(ours, baseline)
    headline = {
        "metric": "success rate in simulation", "ours": arms[0]["value"], "baseline": arms[2]["value"],
        "baseline_name": "bc on the same data", "ratio": None, "difference": arms[0]["value"] - arms[2]["value"],
        "interval": None, "n": EPISODES, "p_value": test.p_value,
    }  # fmt: skip
    write_benchmark(
        "pick_place",
        "How often does the demo's image diffusion policy succeed, in simulation and on the twin over ROS 2?",
        headline,
        arms,
        parts=parts_of([*done, twin]),
        seeds=[SIMULATION_SEED, TWIN_SEED],
        notes=(
            f"Twin: {twin['missed_periods']} missed control periods, p99 period error "
            f"{twin['p99_period_error_ms']:.2f} ms, inference p99 {twin['inference_p99_ms']:.0f} ms. The policies are "
            "those of one run of `simtoreal demo` (one training seed)."
        ),
    )


if __name__ == "__main__":
    main()
