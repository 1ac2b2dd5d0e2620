"""Does gathering training windows from memory beat robomimic's SequenceDataset, and by how much?

Both sides read the same dataset folder and return the same windows: two observations of two 64-pixel cameras and
proprio, and sixteen actions, in batches of 64 (uint8 images). The peer is ``robomimic.utils.dataset.SequenceDataset``
without its cache, wrapped in torch's ``DataLoader`` in this process; as robomimic does, it loads the images of the
whole 17-step sequence although two are used. A third side is the same peer asked for two-step sequences only, so that
it reads no more images than are used (and returns two actions): it bounds what a smarter request could gain.

    python benchmarks/window_sampler.py [--rounds 9] [--output benchmarks/results/window_sampler.json]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simtoreal.data_collection.dataset import Dataset
from simtoreal.data_collection.episode import EpisodeInfo, embodiment_digest
from simtoreal.data_collection.windows import WindowSampler
from simtoreal.data_collection.writer import DatasetWriter
from simtoreal.envs.files import write_json
from simtoreal.envs.panda import panda_embodiment
from simtoreal.envs.provenance import provenance

OBSERVATION_STEPS, HORIZON, BATCH, IMAGE = 2, 16, 64, 64
EPISODES, STEPS = 60, 70
KEYS = ("front_image", "wrist_image", "proprio")
OUR_BATCHES, PEER_BATCHES = 200, 3


def make_dataset(path: Path) -> Dataset:
    """A dataset of random content: what is in the pixels does not change how fast they are read."""
    rng = np.random.default_rng(0)
    embodiment = panda_embodiment(IMAGE)
    with DatasetWriter(path, embodiment, {"random": {"name": "random"}}) as writer:
        for seed in range(EPISODES):
            image = (STEPS, IMAGE, IMAGE, 3)
            arrays = {
                "actions": rng.uniform(-1, 1, (STEPS, 7)).astype(np.float32),
                "rewards": np.zeros(STEPS, np.float32),
                "dones": np.zeros(STEPS, np.int8),
                "states": np.zeros((STEPS, 0)),
                "obs/front_image": rng.integers(0, 256, image, dtype=np.uint8),
                "obs/wrist_image": rng.integers(0, 256, image, dtype=np.uint8),
                "obs/proprio": rng.normal(size=(STEPS, embodiment.proprio.dim)).astype(np.float32),
            }
            info = EpisodeInfo(
                task="random", seed=seed, success=True, operator="random", source="policy",
                embodiment=embodiment_digest(embodiment),
            )  # fmt: skip
            writer.add(arrays, info)
    return Dataset.open(path)


def our_batches(dataset: Dataset, *, memory_map: bool) -> Callable[[int], float]:
    """Return a function that draws batches with :class:`WindowSampler` and returns windows per second."""
    sampler = WindowSampler(dataset, dataset.episodes, OBSERVATION_STEPS, HORIZON, KEYS, memory_map=memory_map)
    rng = np.random.default_rng(1)

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            batch = sampler.batch(rng.integers(0, len(sampler), BATCH))
        seconds = time.perf_counter() - begun
        assert batch["actions"].shape == (BATCH, HORIZON, 7)
        return count * BATCH / seconds

    return run


def robomimic_batches(dataset: Dataset, sequence: int) -> Callable[[int], float]:
    """Return a function that draws batches through robomimic and returns windows per second."""
    from simtoreal.policies.robomimic import import_robomimic

    import_robomimic()
    import robomimic.utils.obs_utils as obs_utils
    import torch
    from robomimic.utils.dataset import SequenceDataset

    obs_utils.initialize_obs_modality_mapping_from_dict({"rgb": list(KEYS[:2]), "low_dim": list(KEYS[2:])})
    sequences = SequenceDataset(
        hdf5_path=str(dataset.path / "dataset.hdf5"), obs_keys=KEYS, dataset_keys=("actions",),
        frame_stack=OBSERVATION_STEPS, seq_length=sequence, get_pad_mask=True, hdf5_cache_mode=None,
        hdf5_use_swmr=False, load_next_obs=False,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(sequences, batch_size=BATCH, shuffle=True, drop_last=True)
    batches = iter(loader)

    def run(count: int) -> float:
        nonlocal batches
        begun = time.perf_counter()
        for _ in range(count):
            batch = next(batches, None)
            if batch is None:
                batches = iter(loader)
                batch = next(batches)
        seconds = time.perf_counter() - begun
        assert batch["actions"].shape[0] == BATCH
        return count * BATCH / seconds

    return run


def measure(dataset: Dataset, rounds: int) -> dict[str, list[float]]:
    """Windows per second of every side, one value per round; the sides take turns within a round."""
    sides: dict[str, tuple[Callable[[int], float], int]] = {
        "ours, memory": (our_batches(dataset, memory_map=False), OUR_BATCHES),
        "robomimic, uncached": (robomimic_batches(dataset, HORIZON), PEER_BATCHES),
        "ours, memory map": (our_batches(dataset, memory_map=True), OUR_BATCHES),
        "robomimic, uncached, short": (robomimic_batches(dataset, 1), PEER_BATCHES),
    }
    for run, count in sides.values():
        run(count)  # page cache and allocator are warm for both before the first round
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, (run, count) in sides.items():
            rates[name].append(run(count))
    return rates


def report(rates: dict[str, list[float]], seconds: float) -> dict[str, Any]:
    """Return the result in the schema of docs/results.md."""
    ours, peer = rates["ours, memory"], rates["robomimic, uncached"]
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    return {
        "name": "window_sampler",
        "question": "How much faster are windows gathered from memory than read by robomimic's SequenceDataset?",
        **provenance([0, 1]),
        "seconds": seconds,
        "headline": {
            "metric": f"windows/s (2 observations of 2 cameras at {IMAGE} px, {HORIZON} actions, batch {BATCH})",
            "ours": statistics.median(ours),
            "baseline": statistics.median(peer),
            "baseline_name": "robomimic 0.3.0 SequenceDataset, no cache, one process",
            "ratio": statistics.median(ratios),
            "difference": statistics.median(ours) - statistics.median(peer),
            "interval": [min(ratios), max(ratios)],
            "n": len(ratios),
            "p_value": None,
        },
        "arms": [
            {"name": name, "value": statistics.median(values), "n": len(values), "interval": [min(values), max(values)]}
            for name, values in rates.items()
        ],
        "notes": "Ratio: median over interleaved rounds; intervals: smallest and largest round. Files are in the page "
        "cache. 'short' asks robomimic for no more images than are used, but returns 2 actions instead of 16.",
    }


def main() -> None:
    """Measure, print and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "window_sampler.json")
    options = parser.parse_args()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        rates = measure(make_dataset(Path(folder) / "dataset"), max(7, options.rounds))
    result = report(rates, time.perf_counter() - begun)
    write_json(options.output, result)
    for arm in result["arms"]:
        print(f"{arm['name']:30} {arm['value']:12,.0f} windows/s")
    headline = result["headline"]
    print(f"window_sampler: {headline['ratio']:.0f}x robomimic uncached (n={headline['n']} rounds) -> {options.output}")


if __name__ == "__main__":
    main()
