"""What does the full demo take on this machine, and what is each of its steps worth on fresh initial conditions?

    simtoreal demo --full                            # demonstrations, filter, policy, co-training, the twin
    python benchmarks/demo_full.py                   # minutes; resumable

The policy before co-training, after imitating what really succeeded, and after reinforcement in imagination, on the
same initial conditions, which neither the demo nor any setting has seen, in the simulation with the twin's gap, which
the policy practised for. The twin's episodes and all times are those of the demo itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cotraining_study import compare
from interleaved import write_benchmark
from parts import parts_of
from pick_place import arm, run

from simtoreal.evaluation.results import load_evaluation

EPISODES, FRESH_SEED = 200, 9_000_000
POLICIES = {"before": "policy", "imitation of successes": "cotrain/imitation", "and imagination": "cotrain/policy"}


def main() -> None:
    """Run and store the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("outputs/demo_full"), help="folder of a finished full demo")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_demo_full"))
    options = parser.parse_args()
    demo = json.loads((options.demo / "results.json").read_text())
    arms, outcomes, done = [], {}, []
    for name, policy in POLICIES.items():
        folder = options.output / policy.replace("/", "_")
        command = ["evaluate", "--policy", str(options.demo / policy), "--task", demo["task"], "--videos", "0"]
        command += ["--randomization", demo["robot_before"]["gap"]]
        results = run([*command, "--episodes", str(EPISODES), "--seed", str(FRESH_SEED)], folder)
        arms.append(arm(f"simulation with the gap, fresh conditions: {name}", results))
        outcomes[name] = load_evaluation(folder).outcomes
        done.append(results)
    arms += [arm(f"twin over ROS 2: {moment}", demo[f"robot_{moment}"]) for moment in ("before", "after")]
    first, imitation, last = ({0: one} for one in outcomes.values())
    headline = {
        "metric": f"{demo['task']}: success after the full demo", "baseline_name": "its policy before co-training",
        **compare(last, first),
    }  # fmt: skip
    versus, twin = compare(last, imitation), demo["robot_comparison"]
    low, high = versus["interval"]
    lowest, highest = twin["difference_interval"]
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in demo["stages"].items())
    write_benchmark(
        "demo_full",
        "What does `simtoreal demo --full` take, and what is each of its steps worth on fresh initial conditions?",
        headline,
        arms,
        parts=parts_of(done),
        seeds=[*demo["provenance"]["seeds"], FRESH_SEED],
        notes=(
            f"Profile {demo['profile']}: {demo['seconds'] / 60:.1f} min at commit {demo['provenance']['commit'][:12]} "
            f"(seconds: {stages}). Imagination against imitation alone: {100 * versus['difference']:+.1f} points "
            f"[{100 * low:+.1f}, {100 * high:+.1f}], p = {versus['p_value']:.2g}. On the twin, after minus before: "
            f"{100 * twin['difference']:+.1f} points [{100 * lowest:+.1f}, {100 * highest:+.1f}], p = "
            f"{twin['p_value']:.2g}. One training seed."
        ),
    )


if __name__ == "__main__":
    main()
