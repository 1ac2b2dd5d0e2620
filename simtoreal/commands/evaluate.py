"""Run a policy on unseen initial conditions in simulation and measure its success."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simtoreal.envs.errors import ConfigError

if TYPE_CHECKING:
    from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
    from simtoreal.envs.rollout import Actor
    from simtoreal.envs.tabletop_vector import TabletopVectorEnv


@dataclass(frozen=True, kw_only=True)
class Config:
    """An interrupted evaluation continues when the same command is run again."""

    output: Path
    """Folder for episodes.jsonl, results.json and videos."""
    policy: Path | None = None
    """Training run or checkpoint folder; not needed for the expert."""
    task: str | None = None
    """Task name or yaml file; default: the task the policy was trained on."""
    actor: Literal["policy", "expert"] = "policy"
    """Who acts: the policy, or the scripted expert of the task."""
    episodes: int = 100
    """Number of initial conditions."""
    seed: int = 100_000
    """First initial condition; the others follow. Demonstrations use seeds from 0 upwards."""
    policy_seed: int = 0
    """Seed of the actor's own randomness (the noise that a diffusion policy starts from)."""
    execute_steps: int | None = None
    """Actions taken from each predicted chunk (control steps); default: those of the policy's training."""
    ensembling: float | None = None
    """Decay of temporal ensembling, e.g. 0.01: a chunk is predicted at every step and overlapping ones are averaged;
    default: off."""
    num_envs: int = 16
    """Simulations stepped together; changes the speed, not which episodes are run."""
    randomization: str | None = None
    """Domain randomisation of the simulation; default: none."""
    videos: int = 3
    """Videos of successes, and of failures."""
    outside: bool = True
    """Draw the first video of each kind from outside too, at 640x480 (some seconds each)."""
    image_size_px: int = 64
    """Camera resolution for the expert's videos; a policy brings its own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy runs; auto uses a GPU if there is one."""
    allow_training_seeds: bool = False
    """Accept initial conditions that were demonstrated."""
    diversity: bool = False
    """Measure which of the ways to do the task are taken, and how evenly: run every initial condition several times
    with other noise of the actor (instead of --episodes and --videos). Repeats of one condition are alike: the interval
    of the success rate is over conditions."""
    contexts: int | None = None
    """Initial conditions with --diversity; default: those of D3IL (avoid 1, align 60). From 2 to 9 give no interval of
    an entropy, and 1 gives intervals that are of this one condition."""
    rollouts: int | None = None
    """Rollouts from each of them; default: those of D3IL (avoid 100, align 8)."""
    env: str | None = None
    """Gymnasium id of a foreign environment to evaluate in (ID or module:ID), for policies trained on imported data;
    default: the one that the data name, if they are foreign."""
    horizon: int | None = None
    """Control steps per episode in a foreign environment; default: what its registration says."""
    success_key: str = ""
    """Entry of the foreign environment's info that says success, or 'terminated'; default: success, is_success, or
    terminated if it has neither."""
    observations: tuple[str, ...] = ()
    """KEY=ENTRY[+ENTRY...]: entries of the foreign environment's observation that make up a key of the data, or
    KEY=render; needed only where names and shapes do not tell."""

    def __post_init__(self) -> None:
        for name in ("episodes", "num_envs", "image_size_px"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if min(self.seed, self.policy_seed, self.videos) < 0:
            raise ConfigError("--seed, --policy-seed and --videos must not be negative")
        if not self.diversity and (self.contexts is not None or self.rollouts is not None):
            raise ConfigError("--contexts and --rollouts belong to --diversity; without it use --episodes")
        if min(self.contexts or 1, self.rollouts or 1) < 1 or 0 in (self.contexts, self.rollouts):
            raise ConfigError("--contexts and --rollouts must be at least 1")
        if self.actor == "policy" and self.policy is None:
            raise ConfigError("--policy is missing: give the folder of a training run, or use --actor expert")
        if self.execute_steps is not None and self.ensembling is not None:
            raise ConfigError("--execute-steps and --ensembling exclude each other: ensembling predicts at every step")
        if self.actor == "expert" and (self.execute_steps is not None or self.ensembling is not None):
            raise ConfigError("--execute-steps and --ensembling are for policies; the expert predicts no chunks")
        if self.actor == "expert" and self.policy is not None:
            raise ConfigError("--policy and --actor expert exclude each other")
        if self.actor == "expert" and (self.horizon is not None or self.success_key or self.observations):
            raise ConfigError("--horizon, --success-key and --observations are for policies in a foreign environment")
        if self.actor == "expert" and self.task is None:
            raise ConfigError("--task is missing: the expert needs to know what to do")
        if self.env is not None and self.diversity:
            raise ConfigError("--diversity counts the behaviours that a task of simtoreal names; it excludes --env")
        if self.env is not None and (self.task or self.actor == "expert" or self.randomization):
            raise ConfigError("--env is for policies in a foreign environment: no --task, expert or --randomization")
        if self.horizon is not None and self.horizon < 1:
            raise ConfigError(f"--horizon is {self.horizon}, expected at least 1")


def main(config: Config) -> None:
    """Evaluate, write the results and print them."""
    if config.diversity:
        _measure_diversity(config)
        return
    from rich.console import Console

    from simtoreal.envs.gymnasium_env import GymnasiumVectorEnv
    from simtoreal.evaluation.evaluate import check_unseen, evaluate
    from simtoreal.evaluation.foreign import DrawnVideos, rate_note
    from simtoreal.evaluation.outside import OutsideView
    from simtoreal.evaluation.progress import EpisodeProgress
    from simtoreal.evaluation.results import read_episodes
    from simtoreal.evaluation.statistics import format_rate

    console = Console(markup=False)
    seeds = range(config.seed, config.seed + config.episodes)
    env, actor, settings, training_seeds = _prepare(config)
    foreign = isinstance(env, GymnasiumVectorEnv)
    outside = OutsideView(env.task) if config.videos and config.outside and not foreign else None
    recorder = DrawnVideos(env, config.output / "videos", config.videos) if foreign and config.videos else None
    try:
        warning = check_unseen(seeds, training_seeds, allowed=config.allow_training_seeds)
        if config.policy is not None and not training_seeds:
            warning = "its demonstrations are not there any more, so they could not be checked for the same conditions"
        if warning:
            console.print(f"Warning: {warning}", style="yellow", soft_wrap=True)
        notes = [warning] if warning else []
        for note in rate_note(env) if foreign else []:
            console.print(f"Note: {note}", style="yellow", soft_wrap=True)
            notes.append(note)
        known = [result.success for result in read_episodes(config.output) if result.seed in seeds]
        with EpisodeProgress(console, f"evaluating {settings['label']}", config.episodes, known) as progress:
            results = evaluate(
                env,
                actor,
                seeds,
                config.output,
                settings,
                videos=config.videos,
                outside=outside,
                recorder=recorder,
                listeners=[progress],
                notes=notes,
            )
    finally:
        env.close()
        if outside is not None:
            outside.close()
    for name, milestone in results["milestones"].items():
        console.print(f"  {name:<16} {format_rate(milestone['successes'], milestone['n'])}", highlight=False)
    for tag, count in results["failures"].items():
        console.print(f"  failed by {tag}: {count}", highlight=False)
    rate = format_rate(results["successes"], results["n"])
    console.print(
        f"Result: {settings['label']} on {settings['task']}: success {rate}; written to {config.output}",
        highlight=False,
        soft_wrap=True,
    )


def _measure_diversity(config: Config) -> None:
    import dataclasses

    from rich.console import Console

    from simtoreal.evaluation.diversity import evaluate_diversity, pinned_counts, read_rollouts
    from simtoreal.evaluation.evaluate import check_unseen
    from simtoreal.evaluation.progress import EpisodeProgress
    from simtoreal.evaluation.statistics import format_rate

    console = Console(markup=False)
    env, actor, settings, training_seeds = _prepare(dataclasses.replace(config, videos=0, episodes=config.num_envs))
    contexts, rollouts = pinned_counts(env.task.name, config.contexts, config.rollouts)
    seeds = range(config.seed, config.seed + contexts)
    try:
        warning = check_unseen(seeds, training_seeds, allowed=config.allow_training_seeds)
        known = [bool(row["success"]) for row in read_rollouts(config.output)]
        title = f"{contexts} x {rollouts} rollouts of {settings['label']}"
        with EpisodeProgress(console, title, contexts * rollouts, known) as progress:
            results = evaluate_diversity(
                env, actor, seeds, rollouts, config.output, settings, listeners=[progress],
                notes=[warning] if warning else [],
            )  # fmt: skip
    finally:
        env.close()
    for name, count in sorted(results["behaviors"].items(), key=lambda item: -item[1]):
        console.print(f"  {name:<28} {count}", highlight=False)
    known = results["entropy_interval"]
    given = results["conditional_entropy_interval"]
    console.print(
        f"  entropy {results['entropy']:.3f} as D3IL counts it; without the bias of small samples "
        f"{results['entropy_corrected']:.3f}" + (f" (95 % interval {known[0]:.3f}-{known[1]:.3f})" if known else ""),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    console.print(
        f"  conditional entropy {results['conditional_entropy']:.3f} as {rollouts} rollouts per context show it"
        + (f" (95 % interval of that {given[0]:.3f}-{given[1]:.3f}; the policy's own is no lower)" if given else ""),
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    rate = format_rate(results["successes"], results["n"], contexts=results["contexts"], interval=results["interval"])
    console.print(
        f"Result: {settings['label']} on {settings['task']}: entropy {results['entropy']:.3f}, success {rate}, score "
        f"{results['score']:.3f}; written to {config.output}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip


def _prepare(config: Config) -> tuple[TabletopVectorEnv | GymnasiumVectorEnv, Actor, dict[str, Any], set[int]]:
    """Return environment, actor, the settings that decide the outcome, and the seeds of the training data."""
    from simtoreal.envs import load_task, make_vector_env
    from simtoreal.envs.task_file import parse_task
    from simtoreal.evaluation.evaluate import task_digest

    num_envs = min(config.num_envs, config.episodes)
    shared = {
        "backend": "simulation",
        "actor": config.actor,
        "first_seed": config.seed,
        "policy_seed": config.policy_seed,
        "randomization": config.randomization,
        "execute_steps": config.execute_steps,
        "ensembling": config.ensembling,
    }
    if config.policy is None:
        from simtoreal.data_collection.expert import ScriptedExpert

        env = make_vector_env(
            config.task,
            num_envs,
            image_size=config.image_size_px,
            observe="image" if config.videos else "state",
            record_state=bool(config.videos and config.outside),
            randomization=config.randomization,
        )
        expert = ScriptedExpert(env.task, env.embodiment, seed=config.policy_seed)
        task = env.task
        identity = {"label": "expert", "policy": None}
        settings = {"task": task.name, **identity, "horizon": task.horizon, **shared, "task_digest": task_digest(task)}
        return env, expert, settings, set()  # type: ignore[return-value]

    from simtoreal.evaluation.foreign import DRAWN_COPIES, environment_of, make_foreign_env, parse_observations
    from simtoreal.evaluation.policies import checkpoint_digest, load_actor, training_seeds

    loaded, actor = load_actor(
        config.policy,
        device=config.device,
        seed=config.policy_seed,
        execute_steps=config.execute_steps,
        ensembling=config.ensembling,
    )
    identity = {
        "label": loaded.config.type,
        "policy": str(config.policy),
        "checkpoint": checkpoint_digest(loaded.folder),
    }
    env_id = "" if config.task else environment_of(loaded, config.env)
    if env_id:
        sources = parse_observations(config.observations)
        foreign = make_foreign_env(
            loaded, env_id, num_envs, success_key=config.success_key, horizon=config.horizon, sources=sources,
            drawn=DRAWN_COPIES if config.videos else 0,
        )  # fmt: skip
        choices = {"success_key": config.success_key, "observations": sources, "horizon": foreign.task.horizon}
        settings = {"task": foreign.task.name, **identity, **shared, **choices, "backend": "gymnasium"}
        return foreign, actor, settings, training_seeds(loaded)
    if config.horizon or config.success_key or config.observations:
        raise ConfigError("--horizon, --success-key and --observations are for a foreign environment (--env)")
    if config.task is None and not loaded.task:
        raise ConfigError(f"{config.policy} was trained on several tasks; say which one with --task")
    task = load_task(config.task) if config.task else parse_task(loaded.task, source=str(loaded.folder))
    images = bool(config.videos or loaded.config.image_keys)
    env = make_vector_env(
        task,
        num_envs,
        embodiment=loaded.embodiment,
        observe="image" if images else "state",
        record_state=bool(config.videos and config.outside),
        randomization=config.randomization,
    )
    settings = {"task": task.name, **identity, "horizon": task.horizon, **shared, "task_digest": task_digest(task)}
    return env, actor, settings, training_seeds(loaded)
