"""Inference in a process of its own, and the actor that turns its chunks into actions without ever waiting for it.

The runtime and this process share a piece of memory for observations and chunks, and a socket that says what lies
in it. ``python -m simtoreal.robot.inference`` is the process.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.envs.embodiment import Embodiment
from simtoreal.envs.errors import ActionError, CheckpointError, EmbodimentMismatchError, RobotError

MEMORY_BYTES = 64 << 20  # sparse: only what is used exists
CHUNK_BYTES = 1 << 20  # at the end of the memory
START_TIMEOUT_S = 120.0
MAX_BYTES = 65536


@dataclass(frozen=True, kw_only=True)
class PolicyDescription:
    """What the inference process says about the policy it has loaded.

    Attributes:
        embodiment: that the policy was trained for.
        task: specification of the task of its data, empty if there were several.
        type: registered name of the policy.
        keys: observation keys that it reads.
        observation_steps, horizon, execute_steps: see ``PolicyConfig``.
        folder: of the checkpoint.
        digest: of weights and configuration.
        training_seeds: initial conditions of its demonstrations, as far as known.
    """

    embodiment: Embodiment
    task: dict[str, Any]
    type: str
    keys: tuple[str, ...]
    observation_steps: int
    horizon: int
    execute_steps: int
    folder: str
    digest: str
    training_seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A finished chunk.

    Attributes:
        actions: ``(horizon, action_dim)`` float32.
        tag: as given with the request.
        latency_ns: from the request until the chunk was ready.
    """

    actions: np.ndarray
    tag: Any
    latency_ns: int


class InferenceProcess:
    """Handle of the inference process. One request at a time.

    Args:
        policy: folder of a training run or checkpoint.
        seed: of the policy's own noise.
        device: ``auto``, ``cpu`` or ``cuda``.
        threads: of torch in the process; leave cores to the control loop.

    Raises:
        CheckpointError: the policy cannot be loaded (with the process's own message).
    """

    def __init__(self, policy: Path, *, seed: int = 0, device: str = "auto", threads: int = 1) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptor = os.memfd_create("simtoreal-inference", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, MEMORY_BYTES)
        self._memory = mmap.mmap(descriptor, MEMORY_BYTES)
        command = [
            sys.executable, "-m", "simtoreal.robot.inference",
            "--socket", str(theirs.fileno()), "--memory", str(descriptor), "--policy", str(policy),
            "--seed", str(seed), "--device", device, "--threads", str(threads),
        ]  # fmt: skip
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=(theirs.fileno(), descriptor), stdin=subprocess.DEVNULL, start_new_session=True
            )
        os.close(descriptor)
        self._channel = ours
        self._tag: Any = None
        self._sent_ns = 0
        self.busy = False
        self.latencies_ns: list[int] = []
        try:
            ready = self._receive(START_TIMEOUT_S)
        except RobotError as error:
            self.close()
            raise CheckpointError(f"the inference process does not start: {error}") from error
        if ready is None or "error" in ready:
            self.close()
            raise CheckpointError(ready["error"] if ready else f"loading {policy} takes over {START_TIMEOUT_S:g} s")
        try:
            self.description = self._describe(ready)
        except (EmbodimentMismatchError, KeyError, TypeError, ValueError) as error:
            self.close()
            raise CheckpointError(
                f"the inference process describes its policy in a way not understood: {error!r}"
            ) from error

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def request(
        self, observation: Mapping[str, np.ndarray], instruction: str, *, tag: Any, new_seed: int | None = None
    ) -> None:
        """Ask for a chunk; returns at once.

        Args:
            observation: ``(observation_steps, ...)`` for every key in ``description.keys``.
            instruction: what to do.
            tag: returned with the prediction.
            new_seed: seed of the episode, with the first request of it.

        Raises:
            RobotError: a request is running, the process is gone, or the observation lacks a key or is too large.
        """
        if self.busy:
            raise RobotError("the inference process is still computing; ask for the result first")
        entries, offset = [], 0
        for key in self.description.keys:
            if key not in observation:
                raise RobotError(f"the policy reads '{key}', but the robot gives {sorted(observation)}")
            array = np.ascontiguousarray(observation[key])
            if offset + array.nbytes > MEMORY_BYTES - CHUNK_BYTES:
                raise RobotError(f"observations take more than the {MEMORY_BYTES >> 20} MiB that are shared")
            self._memory[offset : offset + array.nbytes] = array.tobytes()
            entries.append([key, array.dtype.str, list(array.shape), offset])
            offset += -(-array.nbytes // 64) * 64
        message = {"entries": entries, "instruction": instruction, "new_seed": new_seed}
        self._tag, self._sent_ns, self.busy = tag, time.monotonic_ns(), True
        try:
            self._channel.send(json.dumps(message).encode())
        except OSError as error:
            raise self._gone() from error

    def poll(self, timeout_s: float = 0.0) -> Prediction | None:
        """Return the prediction if it is ready, waiting at most ``timeout_s``.

        Raises:
            RobotError: the process has died or reports an error.
        """
        if not self.busy:
            return None
        answer = self._receive(timeout_s)
        if answer is None:
            return None
        self.busy = False
        if "error" in answer:
            raise RobotError(f"inference failed: {answer['error']}")
        try:
            shape = tuple(answer["shape"])
            actions = np.frombuffer(self._memory, np.float32, math.prod(shape), MEMORY_BYTES - CHUNK_BYTES)
            actions = actions.reshape(shape)
            latency_ns = int(answer["finished_ns"]) - self._sent_ns
        except (KeyError, TypeError, ValueError) as error:
            raise RobotError(f"the inference process answers in a way not understood: {error!r}") from error
        self.latencies_ns.append(latency_ns)
        return Prediction(actions=actions.copy(), tag=self._tag, latency_ns=latency_ns)

    def close(self) -> None:
        """End the process; may be repeated."""
        self._channel.close()  # it ends by itself when it notices; a running prediction does not matter any more
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(1.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()

    def _receive(self, timeout_s: float) -> dict[str, Any] | None:
        try:
            self._channel.settimeout(timeout_s)  # 0: never wait
            content = self._channel.recv(MAX_BYTES)
        except (BlockingIOError, TimeoutError):
            return None
        except OSError as error:
            raise self._gone() from error
        if not content:
            raise self._gone()
        try:
            answer = json.loads(content)
        except ValueError as error:
            raise RobotError(
                f"malformed message of {len(content)} bytes from the inference process: {error}"
            ) from error
        if not isinstance(answer, dict):
            raise RobotError(
                f"malformed message from the inference process: {type(answer).__name__}, expected a mapping"
            )
        return answer

    def _describe(self, ready: dict[str, Any]) -> PolicyDescription:
        # A message holds 64 KiB, too little for the seeds of large datasets: they come through the memory.
        seeds = np.frombuffer(self._memory, np.int64, ready.pop("training_seed_count"))
        embodiment = Embodiment.from_dict(ready.pop("embodiment"))
        rest: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in ready.items()}
        return PolicyDescription(embodiment=embodiment, training_seeds=tuple(seeds.tolist()), **rest)

    def _gone(self) -> RobotError:
        try:
            code: int | None = self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            code = None
        return RobotError(f"the inference process {self.pid} has died (exit code {code}); see its message above")


def chunk_to_targets(actions: np.ndarray, target: np.ndarray, embodiment: Embodiment) -> np.ndarray:
    """Absolute targets ``(horizon, 10)`` of a chunk.

    Args:
        actions: ``(horizon, action_dim)`` in the embodiment's action mode.
        target: ``(10,)`` target at the time of the observation that the chunk was computed from.
        embodiment: gives mode, limits and workspace.

    Raises:
        ActionError: not finite or out of range: the policy is broken.
    """
    from simtoreal.envs.action import check_action, integrate_action

    try:
        checked = check_action(actions, actions.shape, bounded=embodiment.action.mode == "ee_delta")
    except ActionError as error:
        raise ActionError(f"the policy returned a chunk that must not be executed: {error}") from error
    targets = []
    for action in checked:
        target = integrate_action(target, action, embodiment)
        targets.append(target)
    return np.stack(targets)


class _Server:
    """The inference process: answers requests until the runtime is gone."""

    def __init__(self, channel: socket.socket, memory: mmap.mmap) -> None:
        self.channel, self.memory = channel, memory

    def run(self, policy: Path, seed: int, device: str, threads: int) -> None:
        """Load the policy, tell about it, serve."""
        from simtoreal.envs.errors import SimtorealError

        try:
            import torch

            torch.set_num_threads(threads)
            from simtoreal.evaluation.policies import checkpoint_digest, load_actor, training_seeds

            loaded, actor = load_actor(policy, device=device, seed=seed)
            actor.reset(np.array([0]), [0])
            self._warm_up(actor, loaded)
        except SimtorealError as error:
            self._answer({"error": str(error)})
            return
        config = loaded.config
        seeds = np.array(sorted(training_seeds(loaded)), dtype=np.int64)
        self.memory[: seeds.nbytes] = seeds.tobytes()
        self._answer(
            {
                "embodiment": loaded.embodiment.to_dict(), "task": loaded.task, "type": config.type,
                "keys": config.keys, "observation_steps": config.observation_steps, "horizon": config.horizon,
                "execute_steps": config.execute_steps, "folder": str(loaded.folder),
                "digest": checkpoint_digest(loaded.folder), "training_seed_count": len(seeds),
            }
        )  # fmt: skip
        while content := self.channel.recv(MAX_BYTES):
            request = json.loads(content)
            try:
                self._answer(self._predict(actor, request))
            except (SimtorealError, RuntimeError) as error:
                self._answer({"error": f"{type(error).__name__}: {error}"})

    def _warm_up(self, actor: Any, loaded: Any) -> None:
        """The first predictions are much slower than the others; they must not happen while the robot moves."""
        shapes = {f"{camera.name}_image": (camera.height, camera.width, 3) for camera in loaded.embodiment.cameras}
        shapes["proprio"] = (loaded.embodiment.proprio.dim,)
        observation = {}
        for key in loaded.config.keys:
            if key not in shapes:
                raise CheckpointError(f"{loaded.folder} reads '{key}', which no robot can observe; train without it")
            kind = np.uint8 if key.endswith("_image") else np.float32
            observation[key] = np.zeros((1, loaded.config.observation_steps, *shapes[key]), dtype=kind)
        for _ in range(3):
            actor.act(observation, [""], np.array([0]))

    def _predict(self, actor: Any, request: dict[str, Any]) -> dict[str, Any]:
        slots = np.array([0])
        if request["new_seed"] is not None:
            actor.reset(slots, [request["new_seed"]])
        observation = {}
        for key, kind, shape, offset in request["entries"]:
            dtype = np.dtype(kind)
            flat = np.frombuffer(self.memory, dtype, int(np.prod(shape)), offset)
            observation[key] = flat.reshape(1, *shape).copy()
        chunk = np.ascontiguousarray(actor.act(observation, [request["instruction"]], slots)[0], dtype=np.float32)
        start = MEMORY_BYTES - CHUNK_BYTES
        if chunk.nbytes > CHUNK_BYTES:
            raise RuntimeError(f"a chunk of shape {chunk.shape} does not fit into {CHUNK_BYTES} bytes")
        self.memory[start : start + chunk.nbytes] = chunk.tobytes()
        return {"shape": list(chunk.shape), "finished_ns": time.monotonic_ns()}

    def _answer(self, content: dict[str, Any]) -> None:
        self.channel.send(json.dumps(content).encode())


def main() -> None:
    """Entry point of the inference process."""
    parser = argparse.ArgumentParser(description="Inference process of a deployment; started by the runtime.")
    for name in ("--socket", "--memory", "--seed", "--threads"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--device", required=True)
    arguments = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the runtime, whose end ends this process too
    channel = socket.socket(fileno=arguments.socket)
    memory = mmap.mmap(arguments.memory, MEMORY_BYTES)
    try:
        _Server(channel, memory).run(arguments.policy, arguments.seed, arguments.device, arguments.threads)
    except (BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    main()
