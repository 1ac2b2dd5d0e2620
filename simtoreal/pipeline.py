"""Stages that run one after the other, each in its own process, and resume where they were interrupted.

A stage is one ``simtoreal`` command line that writes one folder. Beside the folder lies a marker with the digest of
everything that decides the stage's result: its command line with the content of the files it names, the package
version and the digests of the stages it reads. A finished stage with the same digest is skipped, an unfinished one is
continued in its folder (most commands resume by themselves), and one whose digest changed is run again from the
beginning.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import simtoreal
from simtoreal.envs.errors import SimtorealError
from simtoreal.envs.files import write_json

if TYPE_CHECKING:
    from rich.console import Console


class PipelineError(SimtorealError):
    """A stage failed, or the output folder belongs to something else."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: also the name of its folder below the pipeline's output.
        title: what it does, for people.
        command: arguments of ``simtoreal``; ``{output}`` stands for the pipeline's folder.
        needs: names of the stages whose folders it reads.
        resumes: whether the command continues by itself; otherwise what an interruption left of its folder is removed.
    """

    name: str
    title: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()
    resumes: bool = True


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """How a stage went: ``seconds`` it took (over all attempts) and whether it was already there."""

    stage: Stage
    folder: Path
    seconds: float
    skipped: bool


def digests(stages: Sequence[Stage]) -> dict[str, str]:
    """Return stage name -> digest of what decides its result.

    Raises:
        PipelineError: a stage needs one that does not come before it, or a name repeats.
    """
    found: dict[str, str] = {}
    for stage in stages:
        missing = [name for name in stage.needs if name not in found]
        if missing or stage.name in found:
            raise PipelineError(f"stage '{stage.name}' occurs twice or needs a later stage: {missing}")
        arguments = [_identity(argument) for argument in stage.command]
        content = [simtoreal.__version__, *arguments, *(found[name] for name in stage.needs)]
        found[stage.name] = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return found


def _identity(argument: str) -> str:
    """Return what an argument means: of a file (a preset, a task) its content, wherever it lies."""
    path = Path(argument)
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else argument


def run_stages(stages: Sequence[Stage], output: Path, console: Console) -> list[StageRecord]:
    """Run every stage that is not finished yet, and say on the console what happens.

    Raises:
        PipelineError: a stage failed, another process runs the same pipeline, or a folder is not ours.
        KeyboardInterrupt: interrupted; a later call continues.
    """
    from rich.text import Text

    output.mkdir(parents=True, exist_ok=True)
    records = []
    with _locked(output):
        for number, (stage, digest) in enumerate(zip(stages, digests(stages).values(), strict=True), start=1):
            console.rule(Text(f"{number}/{len(stages)}  {stage.title}", style="bold"), align="left")
            record = _run(stage, digest, output, console)
            done = "already done, took" if record.skipped else "done in"
            console.print(f"{stage.name} {done} {format_duration(record.seconds)}", style="green")
            records.append(record)
    return records


def format_duration(seconds: float) -> str:
    """Return e.g. ``"42 s"`` or ``"7 min 05 s"``."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"


def _run(stage: Stage, digest: str, output: Path, console: Console) -> StageRecord:
    folder, marker = output / stage.name, output / ".stages" / f"{stage.name}.json"
    stored = _read_marker(marker)
    seconds = 0.0
    if stored.get("digest") == digest and folder.is_dir():
        seconds = float(str(stored.get("seconds", 0.0)))
        if stored.get("finished"):
            return StageRecord(stage=stage, folder=folder, seconds=seconds, skipped=True)
        if stage.resumes:
            console.print(f"Continuing the interrupted stage in {folder}", soft_wrap=True)
        else:
            console.print(f"The stage was interrupted: {folder} is made anew", soft_wrap=True)
            shutil.rmtree(folder)
    elif folder.exists():
        # Only what this pipeline made may be deleted; the marker is the proof.
        if not stored:
            raise PipelineError(
                f"{folder} exists but was not made by this pipeline; choose another --output or move it away"
            )
        console.print(f"The configuration of this stage changed: {folder} is made anew", soft_wrap=True)
        shutil.rmtree(folder)
    write_json(marker, {"digest": digest, "finished": False, "seconds": seconds})
    folder.mkdir(exist_ok=True)
    arguments = [argument.replace("{output}", str(output)) for argument in stage.command]
    console.print(f"$ {shlex.join(['simtoreal', *arguments])}", style="dim", soft_wrap=True, highlight=False)
    started, code = time.monotonic(), None
    try:
        code = _call([sys.executable, "-m", "simtoreal", *arguments])
    finally:
        seconds += time.monotonic() - started
        write_json(marker, {"digest": digest, "finished": code == 0, "seconds": seconds})
    if code:
        raise PipelineError(
            f"stage '{stage.name}' failed with exit status {code} (its message is above). "
            "Fix the cause and run the same command again; it continues at this stage. To run the stage alone:\n"
            f"  {shlex.join(['simtoreal', *arguments])}"
        )
    return StageRecord(stage=stage, folder=folder, seconds=seconds, skipped=False)


def _call(command: Sequence[str]) -> int:
    """Run a child in our terminal; on Ctrl-C, which it receives too, let it put its files in order."""
    with subprocess.Popen(command) as child:
        try:
            return child.wait()
        except KeyboardInterrupt:
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=20)
                child.kill()
            raise
        except BaseException:
            child.terminate()
            raise


def _read_marker(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[None]:
    with open(output / ".lock", "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PipelineError(f"another process is running a pipeline in {output}") from error
        yield
