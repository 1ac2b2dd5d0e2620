"""The processes that ``recorder_kills.py`` kills: they record takes and say over a pipe what they have done.

Run as a program it forks one of them per line of JSON ``{job, folder, session}`` on its input.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simtoreal.data_collection.edit import recover
from simtoreal.data_collection.recorder import Recorder, stream_takes
from simtoreal.data_collection.writer import DatasetWriter, rebuild
from simtoreal.envs.files import append_whole
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.provenance import git_commit, versions
from simtoreal.envs.rollout import EpisodeResult, Step

EMBODIMENT = panda_embodiment(32)
LONGEST = 24
# Shortens a control period, so that recording and storing take about as long.
PERIOD_S = 0.002

Say = Callable[..., None]


# -- what is recorded: everything follows from the numbers of session and take -----------------------------------


@dataclass(frozen=True)
class Plan:
    """One take of a session: how long it is and what happens to it."""

    steps: int
    keep: bool


def plan(session: int, take: int) -> Plan:
    """What the operator of ``session`` does in ``take``."""
    rng = random.Random(f"{session}/{take}")
    return Plan(steps=rng.randint(1, LONGEST), keep=rng.random() < 0.6)


def content(session: int, take: int) -> dict[str, np.ndarray]:
    """Arrays of a take, ``LONGEST`` steps; ``states`` holds session, take and step."""
    rng = np.random.default_rng((session, take))
    return {
        "obs/front_image": rng.integers(0, 256, (LONGEST, 32, 32, 3), dtype=np.uint8),
        "obs/wrist_image": rng.integers(0, 256, (LONGEST, 32, 32, 3), dtype=np.uint8),
        "obs/proprio": rng.normal(size=(LONGEST, 20)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (LONGEST, 7)).astype(np.float32),
        "states": np.array([[session, take, step] for step in range(LONGEST)], dtype=np.float64),
        "step/target": rng.normal(size=(LONGEST, 10)),
    }


def step_of(arrays: dict[str, np.ndarray], index: int) -> Step:
    """Step ``index`` of a take as a rollout reports it."""
    observation = {key: arrays[f"obs/{key}"][index : index + 1] for key in ("front_image", "wrist_image", "proprio")}
    after = arrays["states"][[min(index + 1, LONGEST - 1)]]
    return Step(
        slots=np.array([0]), observation=observation, action=arrays["actions"][index : index + 1],
        reward=np.zeros(1), terminated=np.zeros(1, bool), truncated=np.zeros(1, bool), next_observation=observation,
        info={"sim_state": after, "target": arrays["step/target"][index : index + 1]},
    )  # fmt: skip


# -- the process that is killed ----------------------------------------------------------------------------------


def record(folder: Path, session: int, say: Say) -> None:
    """Record takes until killed."""
    with DatasetWriter(folder, EMBODIMENT, {"point": {}}) as writer:
        keep = False
        recorder = Recorder(
            stream_takes(writer), task="point", embodiment=EMBODIMENT, source="teleop", operator="x",
            keep=lambda result: keep,
        )  # fmt: skip
        for take in range(10**6):
            planned, arrays = plan(session, take), content(session, take)
            recorder.on_reset(0, take, session, {}, {"sim_state": arrays["states"][0]})
            for index in range(planned.steps):
                say("step", take, index, recorder.health["flushed"])
                recorder.on_step(step_of(arrays, index))
                time.sleep(PERIOD_S)
            say("ending", take, planned.steps, recorder.health["flushed"])
            keep = planned.keep
            result = EpisodeResult(
                episode=take, seed=session, success=True, steps=planned.steps, duration_s=1.0, milestones={},
                instruction="", failure="",
            )  # fmt: skip
            recorder.on_episode(0, result)
            say("ended", take, planned.steps, planned.steps)
            if take % 3 == 2:
                say("rebuilding", take, 0, 0)
                rebuild(folder)
                say("rebuilt", take, 0, 0)


def recover_again(folder: Path, session: int, say: Say) -> None:
    """Recover what the kill before left."""
    say("recovering", session, 0, 0)
    recover(folder)
    say("recovered", session, 0, 0)


JOBS = {"record": record, "recover": recover_again}


def serve() -> None:
    """Fork a process per request, so that a thousand of them do not spend minutes on importing."""
    stream = sys.stdout.fileno()

    def say(*words: object) -> None:
        append_whole(stream, (" ".join(map(str, words)) + "\n").encode())

    # Asked once, before the fork: they are cached.
    git_commit()
    versions()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                JOBS[request["job"]](Path(request["folder"]), request["session"], say)
            except BaseException as error:
                say("failed", type(error).__name__, json.dumps(str(error)))
            os._exit(0)
        say("pid", child)
        os.waitpid(child, 0)
        say("end")


if __name__ == "__main__":
    serve()
