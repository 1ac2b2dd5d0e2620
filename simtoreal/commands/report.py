"""Write one self-contained HTML page from a dataset, trainings, a co-training, evaluations and deployments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything is optional; the page shows what it is given."""

    output: Path = Path("report.html")
    """Page to write."""
    data: Path | None = None
    """Dataset of demonstrations."""
    filter: str | None = None
    """Name of a filter of the dataset that the policy learned through."""
    runs: tuple[Path, ...] = ()
    """Training runs; the first is the policy that the page is about, others are baselines."""
    cotraining: Path | None = None
    """Co-training that improved the policy."""
    evaluations: tuple[Path, ...] = ()
    """Evaluations in simulation; the first is of the policy that the page is about."""
    deployments: tuple[Path, ...] = ()
    """Deployments on a robot or its twin, in the same order."""


def main(config: Config) -> None:
    """Write the page."""
    import tempfile

    from rich.console import Console

    from simtoreal.evaluation.outside import has_drawable_success, write_demonstration
    from simtoreal.evaluation.report import ReportSources, label_folders, write_report

    console = Console(markup=False)
    video = None
    # The page holds the video itself; a file of that name beside it may be the user's.
    with tempfile.TemporaryDirectory() as drawn:
        if config.data is not None and has_drawable_success(config.data):
            with console.status("drawing a demonstration"):
                video = write_demonstration(config.data, Path(drawn) / "demonstration.mp4")
        sources = ReportSources(
            dataset=config.data,
            demonstration_video=video,
            filter=config.filter,
            cotraining=config.cotraining,
            runs=label_folders(config.runs, ("train", "policy")),
            evaluations=label_folders(config.evaluations, ("label",)),
            deployments=label_folders(config.deployments, ("label",)),
        )
        write_report(sources, config.output)
    size = config.output.stat().st_size / 1e6
    console.print(f"Report written to {config.output} ({size:.1f} MB, one file)", highlight=False, soft_wrap=True)
