"""A progress bar over episodes, with the success rate so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from simtoreal.envs.rollout import EpisodeResult, Listener
from simtoreal.evaluation.statistics import format_rate


class EpisodeProgress(Listener):
    """Shows a bar on the console while used as a context manager.

    Args:
        console: where to draw.
        title: text beside the bar.
        total: number of episodes.
        known: outcomes of episodes that are already there.
    """

    def __init__(self, console: Console, title: str, total: int, known: Sequence[bool] = ()) -> None:
        self.outcomes = list(known)
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.bar = self.progress.add_task(title, total=total, completed=len(self.outcomes), rate=self._rate())

    def __enter__(self) -> EpisodeProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.progress.stop()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the terminal to others: the bar draws over what is typed, and takes ``[y/n]`` for a style."""
        self.progress.stop()
        try:
            yield
        finally:
            self.progress.start()

    def on_episode(self, slot: int, result: EpisodeResult) -> None:
        """Advance the bar."""
        self.outcomes.append(result.success)
        self.progress.update(self.bar, completed=len(self.outcomes), rate=self._rate())

    def _rate(self) -> str:
        return f"success {format_rate(sum(self.outcomes), len(self.outcomes))}" if self.outcomes else ""
