"""Does it help to move the scene while demonstrating (MOVE), at an equal budget of time steps?

    python benchmarks/move.py                     # about 2 hours on one core; resumable
    python benchmarks/move.py &                   # a second process takes other runs of the same list
    python benchmarks/move.py --summarize         # only write the result of what is finished

The result is benchmarks/results/move.json once every run is finished, and move_partial.json before.

An operator who is as slow as a person (20 to 30 % of the arm's speed) demonstrates from one 64-pixel camera, with the
scene at rest or in motion, for the same budget of control steps. Where motion makes demonstrations longer, a third arm
has the scene at rest and only as many episodes as the moving one. Every arm is trained with several seeds, which also
decide which demonstrations are given, and evaluated with nothing in motion on the same grid of held-out placements.

Two tasks: reach, where the goal can move until it is reached, and pick_place, where everything is at rest when it
is touched.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from interleaved import RESULTS, write_benchmark
from parts import find_part, part

from simtoreal.data_collection.collect import CollectionPlan, collect
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.operator_style import OperatorStyle
from simtoreal.envs import load_task, make_vector_env
from simtoreal.envs.files import atomic_path, write_json
from simtoreal.envs.rollout import rollout
from simtoreal.envs.scene_motion import SCENE_MOTIONS, SceneMotion
from simtoreal.envs.task import TaskSpec, sample_initial_condition
from simtoreal.policies.config import DiffusionConfig, TrainerConfig, VisionConfig

BATCH, HORIZON = 32, 400
SEEDS = (0, 1, 2)
# Only HISTORY_BUDGET was chosen on these placements, and nothing on the demonstrations from COLLECTION_SEED on.
EPISODES, FIRST_SEED, COLLECTION_SEED = 200, 3_000_000, 900
GRID_X, GRID_Y = 4, 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A task of the comparison, with its operator and its budgets of control steps."""

    operator: OperatorStyle
    budgets: tuple[int, ...]
    training_steps: int


STUDIES = {
    "pick_place": Study(
        operator=OperatorStyle(name="person_paced", speed=0.3, gain=0.3),
        budgets=(3000, 2000),
        training_steps=1500,
    ),
    "reach": Study(
        operator=OperatorStyle(name="person_paced", speed=0.2, gain=0.2), budgets=(4000,), training_steps=1500
    ),
}
STATIC, MOVE, SAME_EPISODES = "static", "move", "static, same episodes"
# Arms that learn from the demonstrations of another one.
_SHARED = {
    "static, two images": STATIC, "move, two images": MOVE, "move, labels as recorded": MOVE,
    "move, two images, labels as recorded": MOVE,
}  # fmt: skip
# Moving arms and what they are compared with: the same policy, the scene at rest.
PAIRS = {MOVE: STATIC, "move, two images": "static, two images"}
# With two images the arm at rest needs more demonstrations before it succeeds in a fifth of the cases.
HISTORY_BUDGET = 4500
RESAMPLES = 4000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training: an arm with a budget and a seed."""

    task: str
    arm: str
    budget: int
    seed: int
    motion: SceneMotion = SCENE_MOTIONS["none"]
    scene_frame: bool = True
    image_steps: int = 1

    @property
    def name(self) -> str:
        """Folder of the run."""
        return (
            f"{self.task}-{self.arm.replace(', ', '_').replace(' ', '_').replace('/', '_')}-{self.budget}-{self.seed}"
        )


def planned() -> list[Run]:
    """Every run, the comparisons of pick_place first."""
    motion = SCENE_MOTIONS["move"]
    comparisons: dict[str, list[Run]] = {task: [] for task in STUDIES}
    for task, study in STUDIES.items():
        for budget in study.budgets:
            for seed in SEEDS:
                static = Run(task=task, arm=STATIC, budget=budget, seed=seed)
                comparisons[task].append(static)
                comparisons[task].append(dataclasses.replace(static, arm=MOVE, motion=motion))
                comparisons[task].append(dataclasses.replace(static, arm=SAME_EPISODES))
    return comparisons["pick_place"] + variations() + comparisons["reach"]


def variations() -> list[Run]:
    """What else might matter, at the first budget of pick_place: speed, history, labels, cameras."""
    motion, runs = SCENE_MOTIONS["move"], []
    for seed in SEEDS:
        static = Run(task="pick_place", arm="static, two images", budget=HISTORY_BUDGET, seed=seed, image_steps=2)
        runs += [static, dataclasses.replace(static, arm="move, two images", motion=motion)]
    for seed in SEEDS:
        static = Run(task="pick_place", arm=STATIC, budget=STUDIES["pick_place"].budgets[0], seed=seed)
        move = dataclasses.replace(static, arm=MOVE, motion=motion)
        for cap in (0.1, 0.6):
            other = dataclasses.replace(motion, object_speed_m_s=cap, target_speed_m_s=cap)
            runs.append(dataclasses.replace(move, arm=f"move, cap {cap:g} m/s", motion=other))
        runs.append(dataclasses.replace(static, arm="static, two images", image_steps=2))
        runs.append(dataclasses.replace(move, arm="move, two images", image_steps=2))
        runs.append(dataclasses.replace(move, arm="move, labels as recorded", scene_frame=False))
        recorded = "move, two images, labels as recorded"
        runs.append(dataclasses.replace(move, arm=recorded, image_steps=2, scene_frame=False))
        for arm, name in (("static, cameras differ", "views"), ("move, cameras too", "move_views")):
            runs.append(dataclasses.replace(static, arm=arm, motion=SCENE_MOTIONS[name]))
    return runs


def held_out_grid(task: TaskSpec) -> list[int]:
    """Initial conditions that fill a grid over the object's box evenly, the same for everybody."""
    spec = task.initial[task.moving_object]
    index = [item.name for item in task.objects].index(task.moving_object)
    per_cell = EPISODES // (GRID_X * GRID_Y)
    cells: dict[tuple[int, int], list[int]] = {}
    seed = FIRST_SEED
    while sum(map(len, cells.values())) < EPISODES:
        x, y, _ = sample_initial_condition(task, np.random.default_rng(seed)).positions[index]
        column = min(int((x - spec.x_m[0]) / (spec.x_m[1] - spec.x_m[0]) * GRID_X), GRID_X - 1)
        row = min(int((y - spec.y_m[0]) / (spec.y_m[1] - spec.y_m[0]) * GRID_Y), GRID_Y - 1)
        cell = cells.setdefault((column, row), [])
        if len(cell) < per_cell:
            cell.append(seed)
        seed += 1
    return sorted(seed for cell in cells.values() for seed in cell)


def slow_task(name: str) -> dict[str, Any]:
    """The task with time enough for a slow operator."""
    return {**load_task(name).to_dict(), "horizon": HORIZON}


def write_slow_task(name: str, output: Path) -> str:
    """Its file, which other processes may be reading or writing."""
    path, text = output / f"{name}.yaml", yaml.safe_dump(slow_task(name), sort_keys=False)
    if not path.exists() or path.read_text() != text:
        with atomic_path(path) as temporary:
            temporary.write_text(text)
    return str(path)


def result_of(run: Run, output: Path) -> Path:
    """File with the outcomes of a run."""
    return output / "results" / f"{run.name}.json"


def settings_of(run: Run) -> dict[str, Any]:
    """What decides the outcomes of a run, see :func:`~parts.find_part`."""
    policy, trainer = training_of(run)
    return {
        "run": run, "task": slow_task(run.task), "operator": STUDIES[run.task].operator, "policy": policy,
        "trainer": trainer, "collection_seed": COLLECTION_SEED, "evaluation": [EPISODES, FIRST_SEED, GRID_X, GRID_Y],
    }  # fmt: skip


def training_of(run: Run) -> tuple[DiffusionConfig, TrainerConfig]:
    """Settings of policy and training."""
    # Half as wide as the default, so that some thirty trainings are an afternoon of a processor core.
    vision = VisionConfig(widths=(16, 32, 32), image_steps=run.image_steps)
    policy = DiffusionConfig(image_keys=("front_image",), vision=vision, noise_samples=2)
    return policy, TrainerConfig(steps=STUDIES[run.task].training_steps, batch_size=BATCH, seed=run.seed)


def demonstrate(run: Run, output: Path) -> CollectionPlan:
    """Collect the demonstrations of a run."""
    study = STUDIES[run.task]
    name = dataclasses.replace(run, arm=_SHARED.get(run.arm, run.arm)).name
    plan = CollectionPlan(
        output=output / "data" / name, task=write_slow_task(run.task, output), steps=run.budget, cameras=("front",),
        motion=run.motion, style=study.operator, workers=1, seed=COLLECTION_SEED + run.seed,
    )  # fmt: skip
    if run.arm == SAME_EPISODES:
        episodes = _episodes(dataclasses.replace(run, arm=MOVE, motion=SCENE_MOTIONS["move"]), output)
        plan = dataclasses.replace(plan, steps=None, episodes=episodes)
    # Another process may be collecting the same demonstrations: wait for it.
    plan.output.parent.mkdir(parents=True, exist_ok=True)
    with open(plan.output.with_suffix(".lock"), "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        # The identity has the name of the task's file only.
        settings = {**plan.identity(), "task": slow_task(run.task), "steps": plan.steps, "episodes": plan.episodes}
        with part(plan.output, settings):
            collect(plan)
    return plan


def _episodes(run: Run, output: Path) -> int:
    return len(Dataset.open(demonstrate(run, output).output).episodes)


def differs(run: Run, output: Path) -> bool:
    """Whether motion changed the number of episodes by more than a tenth, so that the third arm is another one."""
    if run.arm != SAME_EPISODES:
        return True
    rest = _episodes(dataclasses.replace(run, arm=STATIC), output)
    moving = _episodes(dataclasses.replace(run, arm=MOVE, motion=SCENE_MOTIONS["move"]), output)
    return _differ(rest, moving)


def _differ(rest: int, moving: int) -> bool:
    return abs(moving - rest) > 0.1 * rest


def execute(run: Run, output: Path) -> None:
    """Collect, train, evaluate, and store what came out."""
    from simtoreal.evaluation.policies import load_actor
    from simtoreal.policies.trainer import train
    from simtoreal.policies.training_data import open_training_data

    plan = demonstrate(run, output)
    dataset = Dataset.open(plan.output)
    policy, trainer = training_of(run)
    data = open_training_data(plan.output, policy, mask="success", scene_frame=run.scene_frame, hold_out=False)
    folder = output / "runs" / run.name
    train(policy, trainer, data, folder, resume=True, device="cpu")
    loaded, actor = load_actor(folder, device="cpu")
    task = load_task(plan.task)
    seeds = held_out_grid(task)
    # Whoever was trained on cameras that differ is asked about cameras that differ.
    seen = SCENE_MOTIONS["views"] if run.motion.places_cameras else None
    env = make_vector_env(task, 25, embodiment=loaded.embodiment, motion=seen)
    results = rollout(env, actor, seeds)
    env.close()
    placements = [_placement(task, episode.seed) for episode in dataset.episodes]
    write_json(
        result_of(run, output),
        {
            "task": run.task, "arm": run.arm, "budget": run.budget, "seed": run.seed, "episodes": len(dataset.episodes),
            "frames": sum(episode.steps for episode in dataset.episodes), "placements": placements,
            "init_ids": seeds, "successes": [bool(result.success) for result in results],
            "milestones": {
                name: float(np.mean([result.milestones[name] for result in results])) for name in task.milestones
            },
        },
    )  # fmt: skip


def _placement(task: TaskSpec, seed: int) -> list[float]:
    """Positions of every object, in metres, joined."""
    return sample_initial_condition(task, np.random.default_rng(seed)).positions.ravel().tolist()


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether this process, and no other one that is alive, may do a run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def summarize(output: Path) -> None:
    """Write the benchmark's JSON from the finished runs, if they allow a comparison."""
    finished = {}
    for run in sorted(planned(), key=lambda run: run.name):
        made = find_part(result_of(run, output), settings_of(run))
        if made.finished:
            finished[run.name] = json.loads(result_of(run, output).read_text()), made
    done, parts = [entry for entry, _ in finished.values()], [made for _, made in finished.values()]
    arms, comparisons = [], {}
    for task in STUDIES:
        for budget in sorted({entry["budget"] for entry in done if entry["task"] == task}):
            found = {arm: _select(done, task, arm, budget) for arm in dict.fromkeys(entry["arm"] for entry in done)}
            order = sorted((arm for arm in found if found[arm]), key=lambda arm: (arm != STATIC, arm != MOVE))
            for arm in order:
                arms.append(_arm(f"{task}, {budget} steps: {arm}", found[arm], found.get(PAIRS.get(arm, STATIC), {})))
            for moving, rest in PAIRS.items():
                if set(found.get(moving, {})) & set(found.get(rest, {})):
                    comparisons[task, budget, moving] = _compare(found[moving], found[rest])
    if not comparisons:
        print("no moving arm and the one that it is compared with are finished for the same seed; nothing is written")
        return
    # The question is asked where the arm at rest is between 20 and 40 %, and of all training seeds.
    complete = {key: one for key, one in comparisons.items() if one["n"] == len(SEEDS) * EPISODES} or comparisons
    (task, budget, moving), headline = min(complete.items(), key=lambda pair: abs(pair[1]["baseline"] - 0.3))
    whole = all(run.name in finished or _left_out(run, finished) for run in planned())
    path = write_benchmark(
        "move" if whole else "move_partial",
        "Does it help to move the scene while demonstrating, at an equal budget of time steps?",
        {
            "metric": f"{task}: success after {budget} steps of demonstration",
            "baseline_name": PAIRS[moving],
            **headline,
        },
        arms,
        parts=parts,
        seeds=[FIRST_SEED, COLLECTION_SEED, *SEEDS],
        notes=_notes(done, comparisons),
    )
    if whole:
        # Of the process that ended first, when several shared the work.
        (RESULTS / "move_partial.json").unlink(missing_ok=True)
    print(f"stored in {path}")


def _left_out(run: Run, finished: dict[str, Any]) -> bool:
    """Whether a run was not done because it would be that of the scene at rest again, see :func:`differs`."""
    names = [dataclasses.replace(run, arm=arm).name for arm in (STATIC, MOVE)]
    if run.arm != SAME_EPISODES or not set(names) <= set(finished):
        return False
    return not _differ(*(finished[name][0]["episodes"] for name in names))


def _select(done: list[dict[str, Any]], task: str, arm: str, budget: int) -> dict[int, Any]:
    """Finished runs by seed."""
    return {e["seed"]: e for e in done if (e["task"], e["arm"], e["budget"]) == (task, arm, budget)}


def _arm(name: str, found: dict[int, Any], static: dict[int, Any]) -> dict[str, Any]:
    from simtoreal.evaluation.statistics import paired_test, posterior_interval

    outcomes = [success for entry in found.values() for success in entry["successes"]]
    rates = [float(np.mean(entry["successes"])) for entry in found.values()]
    shared = sorted(set(found) & set(static))
    test = paired_test(*([s for k in shared for s in side[k]["successes"]] for side in (found, static)))
    return {
        "name": name, "value": float(np.mean(outcomes)), "n": len(outcomes),
        "interval": list(posterior_interval(sum(outcomes), len(outcomes))),
        "training_seeds": len(rates), "seed_sd": float(np.std(rates, ddof=1)) if len(rates) > 1 else None,
        "episodes": float(np.mean([entry["episodes"] for entry in found.values()])),
        "p_vs_static": test.p_value if shared and found is not static else None,
    }  # fmt: skip


def _compare(move: dict[int, Any], static: dict[int, Any]) -> dict[str, Any]:
    """Ratio of success rates with an interval that resamples training seeds, then initial conditions."""
    from simtoreal.evaluation.statistics import paired_test

    shared = sorted(set(move) & set(static))
    a = np.array([move[seed]["successes"] for seed in shared])
    b = np.array([static[seed]["successes"] for seed in shared])
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(RESAMPLES):
        rows, columns = rng.integers(len(shared), size=len(shared)), rng.integers(a.shape[1], size=a.shape[1])
        ratios.append(a[rows][:, columns].mean() / max(b[rows][:, columns].mean(), 1e-9))
    return {
        "ours": float(a.mean()), "baseline": float(b.mean()), "ratio": float(a.mean() / max(b.mean(), 1e-9)),
        "difference": float(a.mean() - b.mean()), "interval": np.quantile(ratios, (0.025, 0.975)).tolist(),
        "n": int(a.size), "p_value": paired_test(a.ravel().tolist(), b.ravel().tolist()).p_value,
    }  # fmt: skip


def _notes(done: list[dict[str, Any]], comparisons: dict[tuple[str, int, str], dict[str, Any]]) -> list[str]:
    notes = [
        f"{task}, {budget} steps: {moving} {c['ours']:.3f}, {PAIRS[moving]} {c['baseline']:.3f}, "
        f"ratio {c['ratio']:.2f} [{c['interval'][0]:.2f}, {c['interval'][1]:.2f}] (training seeds, then initial "
        f"conditions resampled), p = {c['p_value']:.2g} (n={c['n']}, pairs of all training seeds)"
        for (task, budget, moving), c in comparisons.items()
    ]
    for task, budget, moving in comparisons:
        static = _select(done, task, PAIRS[moving], budget)
        rows = [_by_distance(arm, task, _select(done, task, arm, budget), static) for arm in (PAIRS[moving], moving)]
        notes.append(
            f"{task}, {budget} steps, success by thirds of the distance (m) to the nearest placement among the static "
            f"demonstrations: {'; '.join(rows)}"
        )
    notes.append(
        "p over pooled pairs treats rollouts as independent given the trainings; the ratio's interval includes the "
        "spread between trainings. Arms without a seed_sd have one training seed."
    )
    return notes


def _by_distance(arm: str, task: str, found: dict[int, Any], static: dict[int, Any]) -> str:
    spec = load_task(task)
    distances, outcomes = [], []
    for seed in sorted(set(found) & set(static)):
        reference = np.array(static[seed]["placements"])
        for init, success in zip(found[seed]["init_ids"], found[seed]["successes"], strict=True):
            distances.append(np.linalg.norm(reference - np.array(_placement(spec, init)), axis=-1).min())
            outcomes.append(success)
    bounds = np.quantile(distances, (0.0, 1 / 3, 2 / 3, 1.0))
    thirds = np.clip(np.searchsorted(bounds, distances, side="right") - 1, 0, 2)
    parts = [
        f"{bounds[k]:.3f}-{bounds[k + 1]:.3f}: {np.mean(np.array(outcomes)[thirds == k]):.2f} (n={np.sum(thirds == k)})"
        for k in range(3)
    ]
    return f"{arm} " + ", ".join(parts)


def main() -> None:
    """Do the runs that are left, then summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmark_move"), help="work folder, resumable")
    parser.add_argument("--summarize", action="store_true", help="only write the result of the finished runs")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=sorted({run.arm for run in planned()}),
        metavar="ARM",
        help='do only the runs of these arms, e.g. static "move, two images"',
    )
    options = parser.parse_args()
    if not options.summarize:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        for run in planned():
            if options.arms and run.arm not in options.arms:
                continue
            path, settings = result_of(run, options.output), settings_of(run)
            with _claimed(options.output / "claims" / run.name) as ours:
                if ours and not find_part(path, settings).finished and differs(run, options.output):
                    print(f"{time.strftime('%H:%M:%S')} {run.name}", flush=True)
                    with part(path, settings):
                        execute(run, options.output)
                    result = json.loads(path.read_text())
                    print(f"  {np.mean(result['successes']):.3f} with {result['episodes']} episodes", flush=True)
    summarize(options.output)


if __name__ == "__main__":
    main()
