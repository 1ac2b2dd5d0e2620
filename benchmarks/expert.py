"""How often the scripted expert solves each task.

python benchmarks/expert.py
"""

from __future__ import annotations

import time

from interleaved import read_no_flags, write_benchmark

from simtoreal.data_collection.expert import ScriptedExpert
from simtoreal.envs import list_tasks, make_vector_env, rollout
from simtoreal.evaluation.statistics import posterior_interval

EPISODES, FIRST_SEED = 200, 50_000


def main() -> None:
    """Run and store the measurement."""
    begin = time.perf_counter()
    arms = []
    for task in list_tasks():
        env = make_vector_env(task, 50, observe="state")
        results = rollout(env, ScriptedExpert(env.task, env.embodiment), range(FIRST_SEED, FIRST_SEED + EPISODES))
        wins = [result for result in results if result.success]
        arms.append(
            {
                "name": task,
                "value": len(wins) / EPISODES,
                "n": EPISODES,
                "interval": list(posterior_interval(len(wins), EPISODES)),
                "mean_steps": sum(result.steps for result in wins) / max(len(wins), 1),
            }
        )
        print(f"{task}: {len(wins)}/{EPISODES}")
    worst = min(arms, key=lambda arm: arm["value"])
    headline = {
        "metric": f"success rate of the worst task ({worst['name']})",
        "ours": worst["value"], "baseline": None, "baseline_name": None, "ratio": None, "difference": None,
        "interval": worst["interval"], "n": EPISODES, "p_value": None,
    }  # fmt: skip
    write_benchmark(
        "expert",
        "How often does the scripted expert solve each task from unseen initial conditions?",
        headline,
        arms,
        seconds=time.perf_counter() - begin,
        seeds=[FIRST_SEED],
        notes=f"Seeds {FIRST_SEED} to {FIRST_SEED + EPISODES - 1} for every task, nominal physics, style 'expert'.",
    )


if __name__ == "__main__":
    read_no_flags(__doc__)
    main()
