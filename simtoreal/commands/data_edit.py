"""Make a corrected copy of a dataset: leave episodes out, relabel, trim; what does not change is hard-linked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True, kw_only=True)
class Config:
    """The source stays as it is, so that every edit can be undone by deleting its result."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder."""
    output: Path
    """Folder of the new dataset."""
    remove: tuple[str, ...] = ()
    """Episodes to leave out, e.g. 3 7-9."""
    keep_mask: str | None = None
    """Keep only the episodes of this mask, e.g. success or the name of a filter."""
    episodes: tuple[str, ...] = ()
    """Episodes that the changes below apply to, e.g. 0-4 12; default: all."""
    relabel_instruction: str | None = None
    """New language instruction."""
    set_operator: str | None = None
    """New name of who acted."""
    trim_idle: bool = False
    """Leave out the steps at rest before the first motion, and those after the last one that are not needed for the
    task's success."""


def main(config: Config) -> None:
    """Edit and write results.json."""
    from rich.console import Console

    from simtoreal.data_collection.edit_episodes import Edit, edit, parse_numbers
    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance

    console = Console(markup=False)
    changes = Edit(
        remove=parse_numbers(config.remove, "--remove"),
        keep_mask=config.keep_mask,
        only=parse_numbers(config.episodes, "--episodes"),
        instruction=config.relabel_instruction,
        operator=config.set_operator,
        trim_idle=config.trim_idle,
    )
    result = edit(config.dataset, config.output, changes)
    dataset = result.derivation.dataset
    content = {
        "source": str(config.dataset),
        "episodes": len(dataset.episodes),
        "removed": list(result.removed),
        "rewritten": list(result.rewritten),
        "trimmed_steps": result.trimmed_steps,
        "notes": list(result.derivation.notes),
    }
    write_json(config.output / "results.json", {"edit": content, "provenance": provenance()})
    for note in result.derivation.notes:
        console.print(note, style="yellow", soft_wrap=True)
    console.print(
        f"{config.output}: {content['episodes']} episodes, {len(result.removed)} removed, {len(result.rewritten)} "
        f"rewritten, {result.trimmed_steps} steps trimmed, the others linked",
        soft_wrap=True,
    )
