"""How far can a world model be trusted? It is compared with reality open loop, and with the simulator as a judge of
policies.

Everything is measured on episodes that the model did not learn from, beside what the same measurement gives on real
videos: the probe's error, the judge's reading of actions, the rate of false alarms.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs.errors import ConfigError, DatasetError
from simtoreal.envs.files import write_json
from simtoreal.envs.provenance import provenance
from simtoreal.evaluation.evaluate import FIRST_SEED
from simtoreal.evaluation.results import RESULTS_FILE, require_own_folder
from simtoreal.policies.distributed import choose_device
from simtoreal.policies.inverse_dynamics import InverseDynamics, load_inverse_dynamics
from simtoreal.world_models import measure
from simtoreal.world_models.action_following import action_following, require_judge, train_judge
from simtoreal.world_models.checkpoint import LoadedWorldModel, load_world_model
from simtoreal.world_models.clips import Clips, altered_actions, imagine_clips, real_clips, reconstruct
from simtoreal.world_models.contexts import actions_at_rest
from simtoreal.world_models.learned_episodes import fresh_episodes
from simtoreal.world_models.policy_evaluation import evaluate_policies, evaluated_task, load_policies
from simtoreal.world_models.positions import (
    PositionProbe,
    Positions,
    decode_positions,
    perceptual_distance,
    read_positions,
    tcp_columns,
    train_probe,
)
from simtoreal.world_models.side_by_side import write_side_by_side
from simtoreal.world_models.video_data import VideoData, open_video_data
from simtoreal.world_models.violations import learn_evidence

# Of results.json.
KIND = "world_model_evaluation"
# Fewer episodes give intervals that say nothing; fewer to learn from give a probe that sees nothing.
FEWEST_JUDGED, FEWEST_LEARNED = 2, 4
# A violation is reported as a warning from this rate above that of real videos on.
NOTABLE = 0.1

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What looks at the videos.

    Attributes:
        positions: simulator truth of the data.
        probe: reads positions from frames; None if nothing is known about positions.
        actions: reads actions from pairs of frames.
    """

    positions: Positions
    probe: PositionProbe | None
    actions: InverseDynamics


def choose_episodes(loaded: LoadedWorldModel, data: VideoData, limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the episodes to judge (indices), and those ``(E,)`` bool that probe and judge learn from.

    Raises:
        DatasetError: there are too few episodes that the model did not learn from.
    """
    fresh = np.flatnonzero(fresh_episodes(loaded, data))
    # If nothing was learned from, half of it is needed for the probe.
    most = min(limit, len(fresh), len(data.ends) // 2)
    judged = fresh[len(fresh) - most :]
    learned = np.ones(len(data.ends), bool)
    learned[judged] = False
    if len(judged) < FEWEST_JUDGED or learned.sum() < FEWEST_LEARNED:
        raise DatasetError(
            f"{len(fresh)} of {len(data.ends)} episodes were not learned from, which leaves {len(judged)} to judge "
            f"and {learned.sum()} for the probe; at least {FEWEST_JUDGED} and {FEWEST_LEARNED} are needed. Collect "
            "more, or add another dataset to --data."
        )
    return judged, learned


def prepare_judges(
    data: VideoData,
    learned: np.ndarray,
    output: Path,
    *,
    judge: Path | None,
    steps: int,
    device: str | None = None,
    progress: bool = False,
    say: Say = print,
) -> Judges:
    """Train what looks at the videos on real episodes, or load what was trained in ``output`` before.

    Args:
        data: real episodes.
        learned: ``(E,)`` bool: to learn from.
        output: gets the folders ``probe`` and ``judge``.
        judge: inverse-dynamics model to use instead of one of its own.
        steps: of both trainings.
        device, progress: as for the trainings.
        say: told what takes a while.

    Raises:
        EmbodimentMismatchError: ``judge`` is of another embodiment.
    """
    positions = read_positions(data)
    probe = None
    if positions.names:
        say(f"a probe learns to see {', '.join(positions.names)} in real frames")
        probe = train_probe(data, positions, learned, output / "probe", steps=steps, device=device, progress=progress)
    if judge is not None:
        actions, _ = load_inverse_dynamics(judge, device or "cpu")
        require_judge(actions, data, judge)
    else:
        say("a judge learns to read actions from real frames")
        actions = train_judge(data, learned, output / "judge", steps=steps, device=device, progress=progress)
    return Judges(positions=positions, probe=probe, actions=actions)


def evaluate_world_model(
    model: Path,
    paths: Sequence[Path],
    output: Path,
    *,
    policies: Sequence[Path] = (),
    judge: Path | None = None,
    episodes: int = 32,
    judge_steps: int = 1500,
    conditions: int = 100,
    first_seed: int = FIRST_SEED,
    task: str | None = None,
    randomization: str = "none",
    seed: int = 0,
    videos: int = 4,
    device: str | None = None,
    progress: bool = False,
    say: Say = print,
) -> dict[str, Any]:
    """Evaluate a world model, and write ``results.json`` and videos into ``output``.

    Args:
        model: run or checkpoint folder.
        paths: dataset folders of the model's embodiment; episodes that it learned from are not judged.
        output: folder; trainings of probe and judge and evaluations of policies in it are continued.
        policies: runs to evaluate in the model and in the simulator.
        judge: inverse-dynamics model (not one that gave rewards to this model); default: one is trained.
        episodes: most episodes to judge.
        judge_steps: training of probe and judge.
        conditions, first_seed, task, randomization: see
            :func:`~simtoreal.world_models.policy_evaluation.evaluate_policies`.
        seed: of the noise of imagination.
        videos: of episodes, real beside imagined.
        device: torch device; None picks a GPU if there is one.
        progress: draw progress bars.
        say: told what takes a while.

    Raises:
        CheckpointError: the model or a policy cannot be loaded.
        ConfigError: ``output`` holds the evaluation of another model.
        DatasetError: too few episodes.
        EmbodimentMismatchError: model, data, judge or a policy are of different embodiments or render profiles.
    """

    chosen = str(choose_device(device))
    loaded = load_world_model(model, chosen)
    data = open_video_data(paths, embodiment=loaded.embodiment)
    judged, learned = choose_episodes(loaded, data, episodes)
    # What would stop the evaluation in the end is said before the judges are trained.
    require_own_folder(output, KIND)
    _require_same_model(output, loaded.folder)
    if policies:
        evaluated_task(loaded, task)
        load_policies(loaded, policies, range(first_seed, first_seed + conditions), chosen)
    judges = prepare_judges(
        data, learned, output, judge=judge, steps=judge_steps, device=device, progress=progress, say=say
    )
    say(f"imagining {len(judged)} episodes")
    net = loaded.model
    real, imagined = real_clips(net, data, judged), imagine_clips(net, data, judged, seed=seed)
    swapped = resting = None
    if loaded.embodiment.action.mode == "ee_delta":
        swapped = imagine_clips(net, data, judged, altered_actions(data, judged, "swapped"), seed=seed)
    if loaded.embodiment.action.mode != "env":
        still = np.repeat(actions_at_rest(data, judged)[0], real.ends - real.starts, 0)
        resting = imagine_clips(net, data, judged, still, seed=seed)
    results = judge_videos(loaded, data, judges, learned, real, imagined, swapped, resting)
    results["notes"] = [*data.notes, *results["notes"]]
    results["videos"] = _write_videos(output, data, real, imagined, results, videos)
    if policies:
        say(f"evaluating {len(policies)} policies on {conditions} initial conditions in the simulator and in the model")
        results["policies"] = evaluate_policies(
            loaded, policies, output / "policies", task=task, randomization=randomization, conditions=conditions,
            first_seed=first_seed, device=chosen,
        )  # fmt: skip
        results["warnings"] += policy_warnings(results["policies"])
    results = {
        "kind": KIND, "model": str(loaded.folder), "data": [str(path) for path in paths],
        "step": loaded.training.get("step"), "control_hz": loaded.embodiment.control_hz,
        **results, "provenance": provenance([seed]),
    }  # fmt: skip
    write_json(output / RESULTS_FILE, results)
    return results


def _require_same_model(output: Path, folder: Path) -> None:
    """Refuse to write over what was found about another model."""
    path = output / RESULTS_FILE
    earlier = json.loads(path.read_text()).get("model") if path.is_file() else None
    if earlier is not None and Path(earlier).resolve() != folder.resolve():
        raise ConfigError(f"{output} holds the evaluation of {earlier}; choose another --output for that of {folder}")


def judge_videos(
    loaded: LoadedWorldModel,
    data: VideoData,
    judges: Judges,
    learned: np.ndarray,
    real: Clips,
    imagined: Clips,
    swapped: Clips | None = None,
    resting: Clips | None = None,
) -> dict[str, Any]:
    """Measure imagined against real videos of the same episodes.

    Args:
        loaded: the model, whose classifier is judged.
        data: what the videos are of.
        judges: see :func:`prepare_judges`.
        learned: ``(E,)`` bool: episodes from which limits of physics are learned.
        real, imagined: videos of the same episodes.
        swapped: videos of the same first frames under the actions of other episodes.
        resting: videos of the same first frames under actions that change nothing, so that they should stay.
    """
    positions, probe = judges.positions, judges.probe
    again = dataclasses.replace(real, images=reconstruct(loaded.model, real.images))
    results: dict[str, Any] = {
        "episodes": {
            "judged": len(real.episodes), "successes": int(data.success[real.episodes].sum()),
            "names": [data.names[e] for e in real.episodes], "longest": int((real.ends - real.starts).max()) - 1,
        },
        "notes": list(positions.notes),
        "psnr_db": measure.against_horizon(real, measure.psnr_db(real.images, imagined.images)),
        "psnr_reconstructed_db": measure.against_horizon(real, measure.psnr_db(real.images, again.images)),
        "proprio_tcp_m": measure.proprio_error(tcp_columns(data.embodiment), real, imagined),
        "psnr_at_rest_db": None, "perceptual": None, "positions": None, "violations": None,
    }  # fmt: skip
    if resting is not None:
        first = resting.images[resting.starts][resting.episode]
        results["psnr_at_rest_db"] = measure.against_horizon(resting, measure.psnr_db(first, resting.images))
    if probe is not None:
        distance = perceptual_distance(probe, real.images, imagined.images)
        results["perceptual"] = measure.against_horizon(real, distance)
        seen = decode_positions(probe, real), decode_positions(probe, imagined)
        names = {"imagined": seen[1], "reconstructed": decode_positions(probe, again), "floor": seen[0]}
        results["positions"] = measure.displacement(positions, real, names)
        results["violations"] = _physics(loaded, data, judges, learned, results, real, imagined, seen)
    videos = {"imagined": imagined} | ({"swapped": swapped} if swapped is not None else {})
    results["actions"] = action_following(judges.actions, real, videos)
    net = loaded.model
    threshold, consecutive = float(net.classifier.threshold), net.config.classifier.consecutive
    results["classifier"] = {
        "threshold": threshold, "consecutive": consecutive,
        "real": measure.confusion(data, real, threshold, consecutive),
        "imagined": measure.confusion(data, imagined, threshold, consecutive),
    }  # fmt: skip
    results["warnings"] = find_warnings(results)
    return results


def _physics(
    loaded: LoadedWorldModel,
    data: VideoData,
    judges: Judges,
    learned: np.ndarray,
    results: dict[str, Any],
    real: Clips,
    imagined: Clips,
    seen: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any] | None:
    known = real_clips(loaded.model, data, np.flatnonzero(learned)[:100])
    evidence, notes = learn_evidence(known, judges.positions, data.embodiment.cameras)
    results["notes"] += notes
    if not evidence:
        return None
    truth = judges.positions.values[real.frames]
    error = np.median(np.linalg.norm(seen[0] - truth, axis=-1), axis=0)
    return measure.violation_rates(evidence, {"real": (real, seen[0]), "imagined": (imagined, seen[1])}, error)


def find_warnings(results: dict[str, Any]) -> list[str]:
    """Return what a user of the model must know, one sentence each."""
    found = []
    actions = results["actions"]
    if not actions["readable"]:
        found.append("the judge cannot read any action from real videos, so nothing is known about action following")
    for name in ("imagined", "swapped"):
        if name in actions and actions[name]["follows"] is False:
            under = "the recorded actions" if name == "imagined" else "actions of other episodes"
            found.append(
                f"the model does not follow {under}: {100 * max(0.0, actions[name]['following']):.0f} % of what can be "
                "read from real videos"
            )
    moving, resting = results["psnr_db"]["mean"], (results["psnr_at_rest_db"] or {"mean": None})["mean"]
    if moving is not None and resting is not None and resting < moving:
        found.append(
            f"the picture dissolves while the arm is told to stay where it is: PSNR {resting:.1f} dB, and {moving:.1f} "
            "dB while it moves"
        )
    for rule, rates in (results["violations"] or {}).items():
        if rates["imagined"]["rate"] > rates["real"]["rate"] + NOTABLE:
            texts = {"vanishes": "vanish", "duplicates": "appear twice", "moves": "move untouched"}
            found.append(
                f"objects {texts[rule]} in {100 * rates['imagined']['rate']:.0f} % of imagined episodes "
                f"({100 * rates['real']['rate']:.0f} % of real ones are flagged, too)"
            )
    dreamt = results["classifier"]["imagined"]["episodes"]
    failures = dreamt["false_positives"] + dreamt["true_negatives"]
    if failures and dreamt["false_positives"] / failures > NOTABLE:
        found.append(
            f"{dreamt['false_positives']} of {failures} episodes that failed are imagined as successes: reinforcement "
            "would exploit that"
        )
    return found


def policy_warnings(found: Mapping[str, Any]) -> list[str]:
    """Return what to know about a model as a judge of policies, one sentence each.

    Args:
        found: see :func:`~simtoreal.world_models.policy_evaluation.evaluate_policies`.
    """
    warnings = []
    real, imagined = ([row[world]["success_rate"] for row in found["rows"]] for world in ("simulation", "imagined"))
    if len(set(imagined)) == 1 < len(set(real)):
        warnings.append(
            f"all {len(real)} policies succeed in {100 * imagined[0]:.0f} % of the imagined episodes, and in "
            f"{100 * min(real):.0f} to {100 * max(real):.0f} % of those in the simulator: the model cannot tell which "
            "is better"
        )
    interval = found["mean_bias_interval"]
    if interval is not None and interval[0] > 0 and found["mean_bias"] > NOTABLE:
        warnings.append(
            f"policies succeed {100 * found['mean_bias']:.0f} points more often in the model than in the simulator "
            f"({100 * interval[0]:.0f} to {100 * interval[1]:.0f}): reinforcement would exploit that"
        )
    return warnings


def _write_videos(
    output: Path, data: VideoData, real: Clips, imagined: Clips, results: dict[str, Any], limit: int
) -> list[dict[str, Any]]:
    """Write the episodes with violations first, then successes and failures in turn."""
    flagged = sorted({row for rates in (results["violations"] or {}).values() for row in rates["imagined"]["rows"]})
    success = data.success[real.episodes]
    rest = [row for pair in zip(np.flatnonzero(success), np.flatnonzero(~success), strict=False) for row in pair]
    order = [*flagged[: max(1, limit // 2)], *rest, *np.flatnonzero(success), *np.flatnonzero(~success)]
    found = []
    for row in list(dict.fromkeys(int(row) for row in order))[:limit]:
        inside = slice(int(real.starts[row]), int(real.ends[row]))
        file = f"videos/episode_{row:03d}.mp4"
        columns = {"real": real.images[inside], "imagined": imagined.images[inside]}
        write_side_by_side(output / file, [columns], data.embodiment.control_hz)
        broken = [rule for rule, rates in (results["violations"] or {}).items() if row in rates["imagined"]["rows"]]
        name = data.names[real.episodes[row]]
        found.append({"file": file, "episode": name, "success": bool(success[row]), "violations": broken})
    return found
