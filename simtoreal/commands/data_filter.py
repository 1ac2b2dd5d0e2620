"""Mark the steps of a dataset that conflict with base data; nothing is deleted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from simtoreal.policies.compatibility_config import ScorerConfig

if TYPE_CHECKING:
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.filters import Filter


@dataclass(frozen=True, kw_only=True)
class Config:
    """Flags of ``simtoreal data filter``; ``simtoreal train --filter compatible`` uses the result."""

    dataset: tyro.conf.Positional[Path]
    """Dataset folder to filter. It may hold the base episodes too ('data merge'); they are recognised and kept."""
    against: Path
    """Dataset folder with the base data: what the policy is good at already."""
    method: Literal["box", "random", "good", "bad", "weighted", "line", "topbox", "leftbox", "rightbox"] = "box"
    """``box`` drops steps that are unlikely in a familiar state; the others are controls, see docs/compatibility.md."""
    output_name: str = "compatible"
    """Name of the filter, and of the mask of accepted episodes."""
    scorer: Literal["mlp", "diffusion"] = "mlp"
    """``mlp``: error of a regressed action; ``diffusion``: error of denoising, for base data with several ways. The
    scorer is trained once, stored beside the base data and reused."""
    members: int = ScorerConfig.members
    """Networks of the scorer."""
    hidden: int = ScorerConfig.hidden
    """Width of its two hidden layers (the paper: 1024)."""
    epochs: int = ScorerConfig.epochs
    """Passes over the base data."""
    minimum_steps: int = ScorerConfig.minimum_steps
    """Optimiser steps on base data so small that the passes would be fewer."""
    keys: tuple[str, ...] = ()
    """Vector observations to compare; by default proprio and, where recorded, object_state."""
    encoder: Path | None = None
    """Run of a policy trained on the base data, whose frozen image features are compared instead of vectors."""
    lambda_: Annotated[float | None, tyro.conf.arg(name="lambda")] = None
    """Squared action error above which a step is unlikely; calibrated on held-out base data by default."""
    eta: float | None = None
    """Disagreement of the ensemble below which a state is familiar; calibrated by default."""
    tolerance: int | None = None
    """Bad steps of an episode that is still accepted; calibrated by default."""
    seed: int = 0
    """Of the methods that draw steps."""
    device: str | None = None
    """Torch device (cpu, cuda, cuda:1); by default a GPU if there is one."""


def main(config: Config) -> None:
    """Score, print the table per operator, and write the filter.

    Raises:
        ConfigError: a flag is wrong, or images are to be scored without an encoder.
        DatasetError: a dataset is damaged, too small, or of a collection mode without thresholds.
        EmbodimentMismatchError: the datasets are of different robots.
    """
    import dataclasses

    from rich.console import Console

    from simtoreal.data_collection.compatibility import Thresholds
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.filters import check_name, write_filter
    from simtoreal.data_collection.view import write_view
    from simtoreal.envs.provenance import provenance
    from simtoreal.policies.compatibility_features import make_features
    from simtoreal.policies.compatibility_filter import filter_dataset
    from simtoreal.policies.compatibility_scorer import require_same_task
    from simtoreal.policies.compatibility_store import open_scorer
    from simtoreal.policies.distributed import choose_device

    check_name(config.output_name)
    device = str(choose_device(config.device))
    base, dataset = Dataset.open(config.against), Dataset.open(config.dataset)
    refuse_hidden(dataset, config.output_name)
    require_same_task(base, {episode.task for episode in dataset.episodes}, str(config.dataset))
    features = make_features(base, config.keys, config.encoder, device)
    console = Console(markup=False)
    with console.status("training the scorer, or reading it"):
        scorer = open_scorer(base, features, scorer_config(config), device=device)
    result = filter_dataset(
        dataset, scorer, name=config.output_name, method=config.method, likelihood=config.lambda_,
        novelty=config.eta, tolerance=config.tolerance, seed=config.seed,
    )  # fmt: skip
    warnings = {mode: Thresholds(**limits).warning for mode, limits in result.thresholds.items()}
    warnings = {mode: text for mode, text in warnings.items() if text}
    report = {
        "warnings": warnings,
        "entropy": _entropies(dataset, result),
        "outcomes": _outcomes(dataset, result),
        "provenance": provenance([config.seed]),
    }
    result = dataclasses.replace(result, report=report)
    path = write_filter(config.dataset, result)
    write_view(Dataset.open(config.dataset))  # robomimic sees the mask as well.
    _show(console, config, result)
    console.print(f"{path}: use it with 'simtoreal train --data {config.dataset} --filter {config.output_name}'",
                  soft_wrap=True)  # fmt: skip


def refuse_hidden(dataset: Dataset, name: str) -> None:
    """Refuse the name of a mask that somebody set: it would go on naming their episodes, not those that are accepted.

    Raises:
        ConfigError: there is such a mask, as in data that were filtered before they were exported and imported.
    """
    from simtoreal.data_collection.dataset import META
    from simtoreal.envs.errors import ConfigError

    if name in dataset.meta.get("masks", {}):
        raise ConfigError(
            f"{dataset.path} has a mask '{name}' of its own, which would hide what the filter accepts. Choose another "
            f"--output-name, or take the mask out of 'masks' in {dataset.path / META}"
        )


def scorer_config(config: Config) -> ScorerConfig:
    """Return the settings of the scorer.

    Raises:
        ConfigError: a value is out of range.
    """
    from simtoreal.envs.errors import ConfigError

    try:
        return ScorerConfig(
            kind=config.scorer, members=config.members, hidden=config.hidden, epochs=config.epochs,
            minimum_steps=config.minimum_steps,
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"--members, --hidden, --epochs, --minimum-steps: {error}") from error


def _entropies(dataset: Dataset, result: Filter) -> dict[str, Any] | None:
    """Behaviour entropy of all successes and of the accepted ones; None where the task names no behaviours."""
    from simtoreal.data_collection.dataset import Dataset
    from simtoreal.data_collection.diversity import dataset_diversity

    if len(dataset.tasks) != 1 or not dataset.task.get("behaviors"):
        return None
    accepted = [episode for episode in dataset.episodes if result.episodes[episode.name].accepted]
    after = Dataset(dataset.path, dataset.embodiment, dataset.meta, accepted)
    return {"before": dataset_diversity(dataset), "after": dataset_diversity(after) if accepted else None}


def _outcomes(dataset: Dataset, result: Filter) -> dict[str, dict[str, int]]:
    """Episodes, steps and kept steps of the successes and of the failures."""
    outcomes = {name: {"episodes": 0, "steps": 0, "kept_steps": 0} for name in ("successes", "failures")}
    for episode in dataset.episodes:
        row = outcomes["successes" if episode.success else "failures"]
        row["episodes"] += 1
        row["steps"] += episode.steps
        row["kept_steps"] += result.episodes[episode.name].kept_steps
    return outcomes


def _show(console: Any, config: Config, result: Filter) -> None:
    from rich.table import Table

    table = Table(title=f"{config.dataset} against {config.against}, filter '{result.name}' ({config.method})")
    for title in ("operator", "episodes", "steps", "compatibility", "bad steps", "kept steps", "accepted"):
        table.add_column(title, justify="left" if title == "operator" else "right")
    for row in result.operators():
        table.add_row(
            f"{row['operator']} (base)" if row["base"] else row["operator"],
            str(row["episodes"]), str(row["steps"]), f"{row['compatibility']:.2f}",
            f"{100 * row['bad_share']:.1f} %", str(row["kept_steps"]), f"{row['accepted']} of {row['episodes']}",
        )  # fmt: skip
    console.print(table)
    for mode, limits in result.thresholds.items():
        source = "given"
        if limits["episodes"]:
            flagged = f"{100 * limits['flagged']:.1f} % of its held-out steps are flagged"
            source = f"calibrated on {limits['episodes']} base episodes; {flagged}"
        values = f"lambda {limits['likelihood']:.3g}, eta {limits['novelty']:.3g}"
        most = f"at most {limits['tolerance']} bad steps"
        if limits["tolerance_share"]:
            most += f" or {100 * limits['tolerance_share']:.1f} %, whichever is more"
        console.print(f"{mode}: {values}, {most} ({source})", soft_wrap=True)
    if result.report["outcomes"]["failures"]["episodes"]:
        kept = [f"{row['kept_steps']} of {row['steps']} steps of {row['episodes']} {name}"
                for name, row in result.report["outcomes"].items()]  # fmt: skip
        console.print(f"kept: {' and '.join(kept)}; policies do not learn from failures by default", soft_wrap=True)
    for mode, text in result.report["warnings"].items():
        console.print(f"{mode}: {text}", style="yellow", soft_wrap=True)
    if entropy := result.report["entropy"]:
        after = f"{entropy['after']['entropy']:.2f}" if entropy["after"] else "none accepted"
        console.print(f"behaviour entropy: {entropy['before']['entropy']:.2f} -> {after} (accepted episodes)")
