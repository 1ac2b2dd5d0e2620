"""The whole of ``simtoreal world-model posttrain``: judges, training, and judgement on episodes set apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError
from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance
from simtoreal.evaluation.bootstrap import mean_with_interval
from simtoreal.evaluation.policies import checkpoint_digest
from simtoreal.evaluation.results import RESULTS_FILE, require_own_folder
from simtoreal.policies import checkpoint as folders
from simtoreal.policies.distributed import choose_device
from simtoreal.policies.inverse_dynamics import load_inverse_dynamics
from simtoreal.world_models.action_following import require_judge
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.clips import Clips, imagine_clips, real_clips
from simtoreal.world_models.evaluate import Say, choose_episodes, prepare_judges
from simtoreal.world_models.inverse_reward import InverseReward, require_whole_pairs
from simtoreal.world_models.learned_episodes import learned_seeds
from simtoreal.world_models.posttrain import posttrain
from simtoreal.world_models.posttrain_config import PosttrainConfig
from simtoreal.world_models.posttrain_judgement import HELD_OUT, judge_change, score_clips
from simtoreal.world_models.video_data import VideoData, open_video_data

# Of results.json.
KIND = "world_model_posttraining"


def run_posttraining(
    model: Path,
    inverse: Path,
    paths: Sequence[Path],
    output: Path,
    config: PosttrainConfig,
    *,
    judge: Path | None = None,
    judge_steps: int = 1500,
    judges_folder: Path | None = None,
    episodes: int = 32,
    resume: bool = False,
    device: str | None = None,
    progress: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Post-train a world model, judge it before and after, and write ``results.json`` into ``output``.

    Args:
        model: run of the world model.
        inverse: run of the inverse-dynamics model that gives the reward.
        paths: dataset folders of the model's embodiment.
        output: run folder of the new world model.
        config: how.
        judge: held-out inverse-dynamics model; default: one with another seed and other sizes is trained.
        judge_steps: training of probe and judge.
        judges_folder: where these are kept; default: ``output/judges``. Runs that are compared should share them.
        episodes: to judge on; they and no others are not trained on.
        resume: continue the run in ``output``.
        device: torch device; None picks a GPU if there is one.
        progress, say: see :func:`~simtoreal.world_models.evaluate.prepare_judges`.

    Raises:
        CheckpointError: a model cannot be loaded.
        ConfigError: ``judge`` is the model that gives the reward; or see
            :func:`~simtoreal.world_models.posttrain.posttrain`.
        DatasetError: too few episodes that the model did not learn from.
        EmbodimentMismatchError: the models and data are of different embodiments or render profiles.
    """
    chosen = str(choose_device(device))
    loaded = load_world_model(model, chosen)
    data = open_video_data(paths, embodiment=loaded.embodiment)
    judged, learned = choose_episodes(loaded, data, episodes)
    judged_seeds = {data.seeds[episode] for episode in judged}
    rewarding, described = load_inverse_dynamics(inverse, chosen)
    require_judge(rewarding, data, inverse)
    # What would stop the training in the end is said before the judges are trained.
    require_own_folder(output, KIND)
    folders.checkpoints_to_continue(output, resume)
    require_whole_pairs(rewarding, config.steps)
    if judge is not None:
        _require_other(judge, described.folder)
    judges = prepare_judges(
        data, learned, judges_folder or output / "judges", judge=judge, steps=judge_steps, device=chosen,
        progress=progress, say=say,
    )  # fmt: skip
    real = real_clips(loaded.model, data, judged)
    reward = InverseReward(rewarding, real, config.gripper_weight)
    rewards = {"training_reward": reward, HELD_OUT: InverseReward(judges.actions, real, config.gripper_weight)}
    say(f"imagining {len(judged)} episodes")
    before = score_clips(real, _imagine(loaded, data, judged, config.seed), judges, rewards)
    ceiling = score_clips(real, real, judges, rewards)
    say(f"training with method '{config.method}'")
    result = posttrain(loaded, config, data, learned, reward, output, resume=resume, progress=progress)
    after = score_clips(real, _imagine(loaded, data, judged, config.seed), judges, rewards)
    results = {
        "kind": KIND, "model": str(model), "inverse_dynamics": str(inverse),
        "data": [str(path) for path in paths], "config": folders.plain_config(config),
        "run": str(result.run), "steps": result.steps, "frame_passes": result.frame_passes, "seconds": result.seconds,
        "episodes": {"judged": len(judged), "learned": int(learned.sum())},
        "reward_deviation": dict(zip(data.embodiment.action.names, reward.deviation.tolist(), strict=True)),
        "real": {name: mean_with_interval(values) for name, values in ceiling.items()},
        **judge_change(before, after),
        "per_episode": {
            moment: {name: [_number(value) for value in values] for name, values in scores.items()}
            for moment, scores in (("before", before), ("after", after))
        },
        "notes": [*data.notes, *judges.positions.notes, *_overlap(loaded, described.training, judged_seeds)],
        "provenance": provenance([config.seed]),
    }  # fmt: skip
    write_json(output / RESULTS_FILE, results)
    return results


def _imagine(loaded: LoadedWorldModel, data: VideoData, judged: np.ndarray, seed: int) -> Clips:
    loaded.model.eval()
    return imagine_clips(loaded.model, data, judged, seed=seed)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _require_other(judge: Path, rewarding: Path) -> None:
    folder = folders.find_checkpoint(judge)
    if checkpoint_digest(folder) == checkpoint_digest(rewarding):
        raise ConfigError(
            f"--judge {judge} is the model that gives the reward. What a video was made to please cannot judge it: "
            "give one with another seed and other sizes, or leave --judge out"
        )


def _overlap(loaded: LoadedWorldModel, inverse: dict[str, Any], judged: set[int]) -> list[str]:
    """Notes if the rewarding model learned from the episodes of the world model, or from those that are judged."""
    seen, notes = set((inverse.get("data") or {}).get("seeds", ())), []
    if common := learned_seeds(loaded.training.get("data") or {}) & seen:
        notes.append(
            f"the inverse-dynamics model and the world model saw {len(common)} initial conditions in common: the "
            "reward partly knows what the data look like instead of what actions do; train it on other episodes"
        )
    if common := judged & seen:
        notes.append(
            f"the inverse-dynamics model learned from {len(common)} of the {len(judged)} initial conditions judged: "
            "its error on real videos, which scales the reward, is too small, and 'training_reward' is partly "
            "remembered; train it on other episodes"
        )
    return notes
