"""Statistics against hand-computed values, exhaustive enumeration and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from simtoreal.envs.errors import ConfigError
from simtoreal.evaluation.statistics import (
    bonferroni,
    e_process,
    e_value,
    format_rate,
    graded_posterior,
    letter_display,
    paired_test,
    posterior_interval,
    unpaired_p_value,
)


def test_interval_without_success_has_its_closed_form() -> None:
    # Beta(1, 11): P(x < q) = 1 - (1 - q)^11.
    low, high = posterior_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(1 - 0.05 ** (1 / 11))
    assert posterior_interval(10, 10) == pytest.approx((1 - high, 1 - low))
    assert posterior_interval(0, 0) == pytest.approx((0.025, 0.975))


def test_interval_contains_the_measured_rate_and_95_percent() -> None:
    from scipy.stats import beta

    for n in (1, 2, 3, 7, 20, 100):
        for successes in range(n + 1):
            low, high = posterior_interval(successes, n)
            assert 0.0 <= low <= successes / n <= high <= 1.0
            posterior = beta(1 + successes, 1 + n - successes)
            assert posterior.cdf(high) - posterior.cdf(low) == pytest.approx(0.95)


@pytest.mark.parametrize(("n", "half_width"), [(20, 0.20), (50, 0.134), (100, 0.096), (200, 0.069)])
def test_interval_has_the_published_width(n: int, half_width: float) -> None:
    low, high = posterior_interval(n // 2, n)
    assert (high - low) / 2 == pytest.approx(half_width, abs=0.005)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ConfigError, match="11 successes in 10"):
        posterior_interval(11, 10)
    with pytest.raises(ConfigError, match="-1 successes"):
        posterior_interval(-1, 10)


def test_rate_is_printed_with_n_and_interval() -> None:
    assert format_rate(93, 100) == "93 % (93/100, 95 % interval 86-97 %)"
    assert format_rate(0, 0) == "no episodes"


def test_graded_posterior_agrees_with_beta_for_two_scores() -> None:
    mean, interval = graded_posterior([30, 70], [0.0, 1.0])
    assert mean == pytest.approx(71 / 102)
    assert interval == pytest.approx(posterior_interval(70, 100), abs=0.005)
    # Three scores by hand: alpha = (2, 3, 4).
    assert graded_posterior([1, 2, 3], [0.0, 0.5, 1.0])[0] == pytest.approx((0.5 * 3 + 4) / 9)
    with pytest.raises(ConfigError, match="do not fit"):
        graded_posterior([1, 2], [0.0])


def test_paired_test_by_hand() -> None:
    first = [True] * 9 + [False] + [True] * 5 + [False] * 5
    second = [False] * 9 + [True] + [True] * 5 + [False] * 5
    result = paired_test(first, second)
    assert (result.only_first, result.only_second, result.both, result.neither) == (9, 1, 5, 5)
    assert result.p_value == pytest.approx(2 * (1 + 10) / 2**10)
    assert paired_test(second, first).p_value == pytest.approx(result.p_value)
    assert paired_test([True, False], [True, False]).p_value == 1.0
    with pytest.raises(ConfigError, match="same length"):
        paired_test([True], [True, False])


def test_paired_test_is_exact_over_all_outcomes() -> None:
    """Under equality, P(p <= alpha) <= alpha, by enumerating every outcome of 9 discordant pairs."""
    p_values = []
    for outcome in itertools.product([False, True], repeat=9):
        p_values.append(paired_test(outcome, [not win for win in outcome]).p_value)
    for alpha in (0.01, 0.05, 0.1, 0.5):
        assert np.mean(np.asarray(p_values) <= alpha + 1e-12) <= alpha + 1e-12


def test_e_value_by_hand() -> None:
    assert e_value(0, 0) == pytest.approx(1.0)
    assert e_value(1, 0) == pytest.approx(1.0)  # One win of an unknown side says nothing.
    # Two wins of the same side: E[theta^2] = 3/8 under Beta(1/2, 1/2), times 4.
    assert e_value(0, 2) == pytest.approx(1.5)
    assert e_value(2, 0) == pytest.approx(1.5)
    assert e_value(1, 1) == pytest.approx(0.5)
    # One-sided after one win: 2 * integral over (1/2, 1) of theta d(arcsine) * 2 = 1 + 2 / pi.
    assert e_value(0, 1, one_sided=True) == pytest.approx(1 + 2 / math.pi)
    assert e_value(1, 0, one_sided=True) == pytest.approx(1 - 2 / math.pi)
    assert math.isfinite(e_value(0, 5000))


@pytest.mark.parametrize("one_sided", [False, True])
def test_e_value_is_a_martingale_under_equality(one_sided: bool) -> None:
    for first, second in itertools.product(range(12), repeat=2):
        now = e_value(first, second, one_sided=one_sided)
        up = e_value(first + 1, second, one_sided=one_sided)
        down = e_value(first, second + 1, one_sided=one_sided)
        assert (up + down) / 2 == pytest.approx(now, rel=1e-9)


def _crossing_rate(p_first: float, p_second: float, *, n: int, repeats: int, one_sided: bool = False) -> float:
    rng = np.random.default_rng(7)
    crossed = 0
    for _ in range(repeats):
        outcomes = e_process(rng.random(n) < p_first, rng.random(n) < p_second, one_sided=one_sided)
        crossed += bool((outcomes >= 20.0).any())
    return crossed / repeats


def test_e_process_keeps_its_error_rate_and_finds_a_difference() -> None:
    """Looking after every one of 60 pairs, alpha = 5 %; power as simulated in the protocol's table."""
    assert _crossing_rate(0.5, 0.5, n=60, repeats=400) <= 0.05
    assert _crossing_rate(0.5, 0.5, n=60, repeats=400, one_sided=True) <= 0.07
    assert _crossing_rate(0.6, 0.4, n=60, repeats=200, one_sided=True) <= 0.01
    assert _crossing_rate(0.35, 0.65, n=100, repeats=200) == pytest.approx(0.92, abs=0.06)


def test_e_process_ends_at_the_e_value() -> None:
    first = [True, True, False, True, False]
    second = [True, False, False, False, True]
    assert e_process(first, second)[-1] == pytest.approx(e_value(2, 1))
    assert e_process(first, second)[0] == 1.0


def test_barnard() -> None:
    # Published example (scipy documentation, Wald pooled): 7/15 against 12/15 vaccinated.
    assert unpaired_p_value(7, 15, 12, 15) == pytest.approx(0.06815343, abs=1e-4)
    assert unpaired_p_value(5, 5, 9, 9) == 1.0
    assert unpaired_p_value(0, 5, 0, 9) == 1.0
    assert unpaired_p_value(90, 100, 30, 50) < 0.001
    with pytest.raises(ConfigError, match="at least one episode"):
        unpaired_p_value(0, 0, 1, 2)


def test_bonferroni() -> None:
    assert bonferroni([0.01, 0.2, 0.5]) == pytest.approx([0.03, 0.6, 1.0])
    assert bonferroni([]) == []


def test_letters_by_hand() -> None:
    rates = {"bc": 0.3, "diffusion": 0.9, "flow": 0.6}
    assert letter_display(rates, []) == {"bc": "a", "diffusion": "a", "flow": "a"}
    assert letter_display(rates, [("bc", "diffusion")]) == {"diffusion": "a", "flow": "ab", "bc": "b"}
    everyone = [("bc", "diffusion"), ("bc", "flow"), ("flow", "diffusion")]
    assert letter_display(rates, everyone) == {"diffusion": "a", "flow": "b", "bc": "c"}
    with pytest.raises(ConfigError, match="unknown"):
        letter_display(rates, [("bc", "unknown")])


def test_letters_are_shared_exactly_by_the_indistinguishable() -> None:
    rng = np.random.default_rng(3)
    for _ in range(300):
        names = [f"policy{i}" for i in range(int(rng.integers(1, 8)))]
        rates = {name: float(rng.random()) for name in names}
        pairs = list(itertools.combinations(names, 2))
        different = [pair for pair in pairs if rng.random() < 0.4]
        order = rng.permutation(len(different))
        letters = letter_display(rates, [different[i] for i in order])
        assert all(letters[name] for name in names)
        for pair in pairs:
            shared = set(letters[pair[0]]) & set(letters[pair[1]])
            assert bool(shared) == (pair not in different), (rates, different, letters)
