"""Which episodes a policy learns from, and which are held out."""

from __future__ import annotations

from dataclasses import dataclass

from simtoreal.data_collection.compatibility import MOVING, STATIC, collection_mode
from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo
from simtoreal.envs.errors import DatasetError


@dataclass(frozen=True)
class EpisodeChoice:
    """Episodes to learn from, held-out ones, and what was left out of the mask."""

    train: list[EpisodeInfo]
    valid: list[EpisodeInfo]
    notes: tuple[str, ...] = ()


def choose_episodes(dataset: Dataset, mask: str, *, hold_out: bool = True, weighted: bool = False) -> EpisodeChoice:
    """Return the episodes of ``mask`` to learn from and those of ``valid``, which are held out whatever the mask.

    Of ``static`` and ``move`` only the held-out episodes of the same mode validate.

    Failures of a mask that follows from other things than success (``static``, ``move``) are left out. They are
    learnt from if the mask asks for them (``all``, ``failure``, or one that somebody wrote into ``meta.json``), or if
    windows are weighted, which is for data of mixed quality.

    Args:
        dataset: with the mask.
        mask: its name.
        hold_out: False learns from all of the mask, and holds out what else is in ``valid``.
        weighted: windows are drawn by the quality of their episodes.

    Raises:
        DatasetError: there is no such mask, or nothing of it is left.
    """
    if mask in ("train", "success") and mask not in dataset.masks:
        raise DatasetError(
            f"{dataset.path}: none of its {len(dataset.episodes)} episodes succeeded, and mask '{mask}' is of "
            "successes. Collect successful episodes, or learn from the failures with --mask all."
        )
    named = dataset.filter(mask)
    valid = dataset.filter("valid") if "valid" in dataset.masks else []
    failures = weighted or mask in ("all", "failure") or mask in dataset.meta.get("masks", {})
    wanted = [episode for episode in named if failures or episode.success]
    apart = {episode.name for episode in valid} if hold_out else set()
    train = [episode for episode in wanted if episode.name not in apart]
    failed, kept_apart = len(named) - len(wanted), len(wanted) - len(train)
    notes = []
    if failed:
        notes.append(f"{failed} failures of mask '{mask}' are left out; --mask all or --weighting learns from failures")
    if kept_apart:
        notes.append(f"{kept_apart} episodes of mask '{mask}' are held out (mask 'valid')")
    if not train:
        raise DatasetError(
            f"{dataset.path}: mask '{mask}' leaves nothing to learn from: {'; '.join(notes)}. "
            "Collect more, or choose another mask."
        )
    taken = {episode.name for episode in train}
    if mask in (STATIC, MOVING):
        valid = [episode for episode in valid if collection_mode(episode.extra) == mask]
    return EpisodeChoice(train, [episode for episode in valid if episode.name not in taken], tuple(notes))
