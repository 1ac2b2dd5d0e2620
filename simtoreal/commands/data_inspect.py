"""Find what is wrong with a dataset: gaps, frozen images, idling, jerk, copies, drift; write a page with plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from simtoreal.data_collection.inspection import Inspection

_COLORS = {3: "red", 2: "yellow", 1: "default"}
_ROWS = 15


@dataclass(frozen=True, kw_only=True)
class Config:
    """Nothing is changed. 'simtoreal data check' tells whether the files themselves are intact."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path
    """Folder for inspect.html and results.json."""
    images: bool = True
    """Read the images too, to find frozen ones; most of the time goes there."""


def main(config: Config) -> None:
    """Inspect, write the page and results.json, print the findings."""
    import dataclasses

    from rich.console import Console

    from simtoreal.data_collection.inspect_page import write_page
    from simtoreal.data_collection.inspection import inspect
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.results import require_own_folder

    require_own_folder(config.output, "inspect")
    console = Console(markup=False)
    with console.status("reading episodes") as status:
        inspection = inspect(
            config.dataset,
            images=config.images,
            progress=lambda done, total: status.update(f"reading episodes: {done} of {total}"),
        )
        page = write_page(inspection, config.output / "inspect.html")
    content = {
        "dataset": str(config.dataset),
        "findings": [dataclasses.asdict(finding) for finding in inspection.findings],
        "suspicious": {
            name: [dataclasses.asdict(finding) for finding in found] for name, found in inspection.suspicious.items()
        },
        "summary": inspection.summary,
        "episodes": list(inspection.episodes),
    }
    write_json(config.output / "results.json", {"inspect": content, "provenance": provenance()})
    _print(console, inspection)
    console.print(
        f"{config.dataset}: {len(inspection.findings)} findings, {len(inspection.suspicious)} of "
        f"{len(inspection.episodes)} episodes to look at -> {page}",
        soft_wrap=True,
    )


def _print(console: Console, inspection: Inspection) -> None:
    from rich.table import Table
    from rich.text import Text

    for finding in inspection.findings:
        line = f"{finding.kind}: {finding.text}{f' ({finding.remedy})' if finding.remedy else ''}"
        console.print(Text(line, style=_COLORS[finding.weight]), soft_wrap=True)
    if not inspection.suspicious:
        return
    table = Table(title="episodes to look at")
    for name in ("episode", "operator", "steps", "why"):
        table.add_column(name, justify="right" if name == "steps" else "left")
    described = {episode["name"]: episode for episode in inspection.episodes}
    for name, found in list(inspection.suspicious.items())[:_ROWS]:
        why = Text("\n").join(Text(finding.text, style=_COLORS[finding.weight]) for finding in found)
        table.add_row(name, described[name]["operator"], str(described[name]["steps"]), why)
    console.print(table)
    if len(inspection.suspicious) > _ROWS:
        console.print(f"and {len(inspection.suspicious) - _ROWS} more, in results.json")
