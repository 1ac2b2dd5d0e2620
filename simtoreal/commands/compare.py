"""Tell whether evaluated policies differ: posteriors, paired tests, letters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from simtoreal.envs.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Evaluations must be of one task and, unless ``unpaired``, of the same initial conditions."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders written by evaluate or deploy."""
    labels: tuple[str, ...] = ()
    """Names for the table, one per folder; default: the stored labels."""
    unpaired: bool = False
    """Use Barnard's test on independent episodes instead of pairing by initial condition."""
    alpha: float = 0.05
    """Probability of any false claim of a difference, over all pairs together."""
    output: Path | None = None
    """Folder for results.json and comparison.png; nothing is written without it."""

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise ConfigError(f"--alpha is {self.alpha}, expected a probability between 0 and 1")


def main(config: Config) -> None:
    """Print the comparison and, with ``output``, write it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from simtoreal.envs.files import write_json
    from simtoreal.envs.provenance import provenance
    from simtoreal.evaluation.compare import NOT_DISTINGUISHABLE, compare, load_arms
    from simtoreal.evaluation.results import require_own_folder

    if config.output is not None:
        require_own_folder(config.output, "comparison")
    arms = load_arms(config.folders, config.labels)
    result = compare(arms, paired=not config.unpaired, alpha=config.alpha)
    console = Console(markup=False)

    table = Table(title=f"{result['task']}: success rate with 95 % posterior interval", box=SIMPLE_HEAD)
    for name in ("policy", "world", "success", "n", "95 % interval", "median time", "letters"):
        table.add_column(name, justify="left" if name in ("policy", "world", "letters") else "right")
    for arm in result["arms"]:
        low, high = arm["interval"]
        time = arm["time_to_success_s"]
        table.add_row(
            arm["label"],
            arm["world"],
            f"{100 * arm['success_rate']:.1f} %",
            str(arm["n"]),
            f"{100 * low:.0f}-{100 * high:.0f} %",
            f"{time['median']:.1f} s" if time else "-",
            arm["letters"],
        )
    console.print(table)

    family = f"Bonferroni over {len(result['pairs'])} pair(s), alpha {config.alpha:g}"
    pairs = Table(title=f"{result['test']}, {family}", box=SIMPLE_HEAD)
    columns = ["pair", "difference [points]", "p adj."] + ([] if config.unpaired else ["wins", "e-value"])
    for name in [*columns, "verdict"]:
        text = name in ("pair", "verdict")
        pairs.add_column(name, justify="left" if text else "right", no_wrap=name == "verdict")
    for pair in result["pairs"]:
        low, high = (f"{100 * value:+.0f}" for value in pair["difference_interval"])
        cells = [
            f"{pair['second']} minus {pair['first']}",
            f"{100 * pair['difference']:+.1f} ({low} to {high})",
            f"{pair['p_adjusted']:.2g}",
        ]
        if not config.unpaired:
            after = f", decided after {pair['e_decided_after']}" if pair["e_decided_after"] else ""
            cells += [f"{pair['only_second']} : {pair['only_first']}", f"{pair['e_value']:.2g}{after}"]
        pairs.add_row(*cells, pair["verdict"])
    console.print(pairs)
    console.print("Policies that share a letter are not distinguishable at this number of episodes.")
    for note in result["notes"]:
        console.print(f"Note: {note}.")

    if config.output is not None:
        from simtoreal.evaluation.plots import save_png, success_plot

        save_png(success_plot(result["arms"]), config.output / "comparison.png")
        result["provenance"] = provenance()
        write_json(config.output / "results.json", result)
        console.print(f"Written to {config.output}", soft_wrap=True)
    distinct = sum(pair["verdict"] != NOT_DISTINGUISHABLE for pair in result["pairs"])
    if len(result["pairs"]) == 1:
        console.print(f"Result: {result['pairs'][0]['verdict']} (p = {result['pairs'][0]['p_adjusted']:.2g})")
    else:
        console.print(f"Result: {distinct} of {len(result['pairs'])} pairs are distinguishable")
