"""Random damage to files, for readers that have to answer it with an error of ours and nothing else."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from simtoreal.data_collection.exchange import Reader
from simtoreal.envs.errors import SimtorealError


def read_all(open_reader: Callable[[Path], Reader], source: Path) -> None:
    """Read every episode of ``source``."""
    with open_reader(source) as reader:
        for episode in reader.episodes:
            reader.read(episode)


def survive_damage(open_reader: Callable[[Path], Reader], source: Path, scratch: Path, *, rounds: int) -> int:
    """Damage a copy of ``source`` in a new way ``rounds`` times and read it; return how often that was noticed.

    Any other exception than a :class:`SimtorealError` is the test's failure.
    """
    messages: list[tuple[str, str]] = []
    for seed in range(rounds):
        target = scratch / f"round-{seed}" / source.name
        target.parent.mkdir(parents=True)
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, target)
        _damage(target, random.Random(seed))
        try:
            read_all(open_reader, target)
        except SimtorealError as error:
            messages.append((str(target), str(error)))
        shutil.rmtree(target.parent)
    silent = [message for target, message in messages if target not in message]
    assert not silent, f"messages that do not name the file: {silent}"
    return len(messages)


def _damage(target: Path, rng: random.Random) -> None:
    files = sorted(file for file in target.rglob("*") if file.is_file()) if target.is_dir() else [target]
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    if rng.random() < 0.2:
        content = content[: rng.randrange(len(content))]
    else:
        for _ in range(rng.choice((1, 8, 64))):
            content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content)
