"""Metrics of a training: ``metrics.jsonl`` (one mapping per line), TensorBoard, and the progress bar."""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

from simtoreal.envs.errors import SimtorealError
from simtoreal.envs.files import append_whole, atomic_path, explained_disk_errors

METRICS = "metrics.jsonl"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of ``metrics.jsonl``, without a last one that was torn by a crash."""
    path = run / METRICS
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


class TrainingLog:
    """Writes metrics of one run; continuing at a step forgets what was logged after it.

    Args:
        run: run folder.
        first_step: steps already taken.
        last_step: steps in all.
        progress: whether to draw a progress bar.
    """

    def __init__(self, run: Path, *, first_step: int, last_step: int, progress: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = run / METRICS
        kept = [line for line in read_metrics(run) if line["step"] <= first_step]
        with self._disk_errors():
            with atomic_path(self._path) as temporary:
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._bar = _progress_bar() if progress else None
        self._task = None
        self._seen = {"loss": "-", "error": "", "rate": "-"}
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("train", total=last_step, completed=first_step, **self._seen)

    def advance(self, step: int) -> None:
        """Show that ``step`` steps were taken."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, **self._seen)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Store metrics of a step; lists are stored but not drawn, values that are not finite as None.

        Raises:
            SimtorealError: the disk is full; earlier lines and checkpoints are intact.
        """
        line = {"step": step, **{key: _storable(value) for key, value in metrics.items()}}
        with self._disk_errors():
            append_whole(self._file, json.dumps(line, allow_nan=False).encode() + b"\n")
            for key, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(key, value, step)
        if "loss" in metrics:
            self._seen["loss"] = f"{metrics['loss']:.4f}"
        if "validation_error" in metrics:
            self._seen["error"] = f"action error {metrics['validation_error']:.4f}  "
        if "samples_per_s" in metrics:
            self._seen["rate"] = f"{metrics['samples_per_s']:.0f}"

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        os.close(self._file)
        try:
            with self._disk_errors():
                self._board.close()
        except SimtorealError:
            # What stopped the training is the error to show.
            if error is None:
                raise

    def _disk_errors(self) -> AbstractContextManager[None]:
        safe = "Earlier checkpoints are intact; free space and run the same command again with --resume."
        return explained_disk_errors(self._path, SimtorealError, safe)


def _storable(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _progress_bar() -> Any:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}  {task.fields[error]}{task.fields[rate]} samples/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
