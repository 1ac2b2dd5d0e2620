"""Statistics that are merged must be those of all steps together, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest

from simtoreal.data_collection.statistics import ImageStatistics, VectorStatistics
from simtoreal.envs.errors import DatasetError

QUANTILES = (0.0, 0.01, 0.02, 0.1, 1 / 3, 0.5, 0.75, 0.98, 0.99, 1.0)


def skewed_episodes() -> list[np.ndarray]:
    """Episodes of very different lengths and distributions: long rest, short motion, a gripper that rarely closes."""
    generator = np.random.default_rng(0)
    long = np.column_stack([generator.exponential(0.01, 4000), np.zeros(4000), np.ones(4000)])
    short = np.column_stack([generator.normal(5, 2, 37), generator.uniform(-1, 1, 37), -np.ones(37)])
    single = np.array([[1000.0, -7.0, 1.0]])
    return [part.astype(np.float32) for part in (long, short, single, short[:5] - 3)]


def assert_equals_numpy(statistics: VectorStatistics, rows: np.ndarray) -> None:
    rows = rows.astype(np.float64)
    assert statistics.count == len(rows)
    for q in QUANTILES:
        assert (statistics.quantile(q) == np.quantile(rows, q, axis=0)).all(), q
    assert (statistics.minimum == rows.min(axis=0)).all()
    assert (statistics.maximum == rows.max(axis=0)).all()
    np.testing.assert_allclose(statistics.mean, rows.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(statistics.std, rows.std(axis=0), rtol=1e-10)


def test_merged_quantiles_are_those_of_all_steps_where_averaged_ones_are_not() -> None:
    episodes = skewed_episodes()
    parts = [VectorStatistics.of(episode) for episode in episodes]
    assert_equals_numpy(VectorStatistics.merge(parts), np.concatenate(episodes))
    # The usual mistake, on the same data: the mean of the quantiles weighted by length is far off.
    weights = [len(episode) for episode in episodes]
    averaged = np.average([part.quantile(0.98) for part in parts], axis=0, weights=weights)
    right = np.quantile(np.concatenate(episodes).astype(np.float64), 0.98, axis=0)
    assert abs(averaged[0] - right[0]) > 3 * abs(right[0])
    assert right[1] == 0
    assert abs(averaged[1]) > 0.001


def test_merging_does_not_depend_on_order_grouping_or_cuts() -> None:
    episodes = skewed_episodes()
    whole = VectorStatistics.of(np.concatenate(episodes))
    parts = [VectorStatistics.of(episode) for episode in episodes]
    generator = np.random.default_rng(1)
    for _ in range(5):
        order = generator.permutation(len(parts))
        left = VectorStatistics.merge([parts[i] for i in order[:2]])
        right = VectorStatistics.merge([parts[i] for i in order[2:]])
        merged = VectorStatistics.merge([right, left])
        assert (merged.ordered == whole.ordered).all()
        assert (merged.mean == whole.mean).all()
        assert (merged.std == whole.std).all()
    cuts = np.array_split(np.concatenate(episodes), 13)
    assert (VectorStatistics.merge([VectorStatistics.of(cut) for cut in cuts]).ordered == whole.ordered).all()


@pytest.mark.parametrize("shape", [(1, 3, 4, 3), (7, 5, 6, 3), (3, 4, 4, 1)])
def test_image_statistics_are_those_of_all_pixels(shape: tuple[int, ...]) -> None:
    generator = np.random.default_rng(2)
    bright = generator.integers(180, 256, shape).astype(np.uint8)
    dark = np.where(generator.random((11, *shape[1:])) < 0.9, 0, generator.integers(0, 60, (11, *shape[1:])))
    dark = dark.astype(np.uint8)
    merged = ImageStatistics.merge([ImageStatistics.of(bright), ImageStatistics.of(dark)])
    pixels = np.concatenate([bright, dark]).reshape(-1, shape[-1]).astype(np.float64)
    assert merged.frames == len(bright) + len(dark)
    assert merged.count == len(pixels)
    for q in QUANTILES:
        assert (merged.quantile(q) == np.quantile(pixels, q, axis=0)).all(), q
    assert (merged.minimum == pixels.min(axis=0)).all()
    assert (merged.maximum == pixels.max(axis=0)).all()
    np.testing.assert_allclose(merged.mean, pixels.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(merged.std, pixels.std(axis=0), rtol=1e-12)


def test_what_cannot_be_described_is_refused() -> None:
    with pytest.raises(DatasetError, match="finite"):
        VectorStatistics.of(np.array([[1.0, np.nan]]))
    with pytest.raises(DatasetError, match="at least one"):
        VectorStatistics.of(np.zeros((0, 2)))
    with pytest.raises(DatasetError, match="must agree"):
        VectorStatistics.merge([VectorStatistics.of(np.zeros((2, 2))), VectorStatistics.of(np.zeros((2, 3)))])
    with pytest.raises(DatasetError, match="no dimensions"):
        VectorStatistics.merge([])
    with pytest.raises(DatasetError, match="uint8"):
        ImageStatistics.of(np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match="between 0 and 1"):
        VectorStatistics.of(np.zeros((2, 1))).quantile(98)
