"""Statistics of success rates: posteriors, paired, sequential and unpaired tests, and letters for many policies.

The recipe follows the evaluation protocol of the LBM study (TRI, 2025): a Beta posterior per policy, tests paired on
initial conditions, Bonferroni over all pairs and a compact letter display. The sequential test is a plain Bayes
factor on discordant pairs, an e-process (Ville's inequality), so it may be looked at after every episode.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from simtoreal.envs.errors import ConfigError

# Jeffreys prior of the e-process: best worst-case regret of all Beta priors.
PRIOR = 0.5


# With fewer contexts, how much the repeats of one start are alike is not known well enough to take them for less alike
# than they can be.
FEWEST_CONTEXTS = 10


def _check_counts(successes: float, n: float) -> None:
    if n < 0 or not 0 <= successes <= n:
        raise ConfigError(f"{successes} successes in {n} trials are impossible; expected 0 <= successes <= n")


def posterior_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """Credible interval of a success rate under a uniform prior, Beta(1 + k, 1 + n - k).

    Equal-tailed, except that without any success (or failure) the whole tail is put on the other side: the interval
    then begins at 0 (ends at 1) and contains the measured rate (Brown, Cai and DasGupta 2001, section 4).

    Args:
        successes: number of successes k; need not be whole, see :func:`effective_trials`.
        n: number of trials; 0 gives the prior's interval.
        level: probability inside the interval.

    Raises:
        ConfigError: impossible counts.
    """
    from scipy.stats import beta

    _check_counts(successes, n)
    tail = (1.0 - level) / 2.0
    tails = [tail, 1.0 - tail]
    if n and successes == 0:
        tails = [0.0, level]
    elif n and successes == n:
        tails = [1.0 - level, 1.0]
    low, high = beta.ppf(tails, 1 + successes, 1 + n - successes)
    return float(low), float(high)


def effective_trials(successes: Sequence[int] | np.ndarray, rollouts: int) -> float:
    """Return how many independent trials repeated rollouts from the same starts are worth, between S and S R.

    A policy that always ends alike from one start tells nothing new by repeating it. The design effect (Kish 1965) is
    the variance of the success rates between contexts over that of independent rollouts; S R is divided by it.
    Where it cannot be told from the data, i.e. without any success (or failure) or with fewer than
    :data:`FEWEST_CONTEXTS` contexts, every context counts once. A single context is another question, how often the
    policy succeeds from this start, and then all its rollouts count.

    Args:
        successes: ``(S,)`` of every context, out of ``rollouts``.
        rollouts: R per context, at least 1.

    Raises:
        ConfigError: no contexts, or impossible counts.
    """
    counts = np.asarray(successes)
    if not len(counts):
        raise ConfigError("there are no contexts to count")
    for count in counts:
        _check_counts(count, rollouts)
    contexts, rate = len(counts), counts.mean() / rollouts
    if contexts == 1:
        return float(rollouts)
    if contexts < FEWEST_CONTEXTS or rate in (0.0, 1.0):
        return float(contexts)
    design_effect = (counts / rollouts).var(ddof=1) * rollouts / (rate * (1 - rate))
    return float(np.clip(contexts * rollouts / max(design_effect, 1.0), contexts, contexts * rollouts))


def repeated_interval(successes: Sequence[int] | np.ndarray, rollouts: int) -> tuple[float, float]:
    """95 % credible interval of a success rate over contexts that were repeated: :func:`posterior_interval` of the
    measured rate with the number of :func:`effective_trials`, whose arguments and errors it shares."""
    effective = effective_trials(successes, rollouts)
    total, trials = int(np.sum(successes)), len(successes) * rollouts
    return posterior_interval(effective if total == trials else total / trials * effective, effective)


def format_rate(successes: int, n: int, *, contexts: int = 0, interval: Sequence[float] | None = None) -> str:
    """Return e.g. ``"93 % (93/100, 95 % interval 86-97 %)"``, the way every success rate is printed.

    Args:
        successes, n: independent episodes, unless the others say otherwise.
        contexts: number of starts that n rollouts were repeated from, named beside n; 0 if each was run once.
        interval: to print in place of that of n independent episodes.
    """
    if not n:
        return "no episodes"
    low, high = posterior_interval(successes, n) if interval is None else interval
    repeated = f" from {contexts} {'context' if contexts == 1 else 'contexts'}" if contexts else ""
    rate = f"{100 * successes / n:.0f} % ({successes}/{n}{repeated}"
    return f"{rate}, 95 % interval {100 * low:.0f}-{100 * high:.0f} %)"


def graded_posterior(
    counts: Sequence[int], values: Sequence[float], level: float = 0.95
) -> tuple[float, tuple[float, float]]:
    """Posterior mean and credible interval of a graded score, under Dirichlet(1, ..., 1 + counts).

    Args:
        counts: episodes that ended with each attainable score, ``(L,)``.
        values: the attainable scores, ``(L,)``, e.g. fractions of milestones reached.
        level: probability inside the interval.

    Returns:
        Mean (exact) and interval (20,000 posterior draws from a fixed generator, error below 0.5 % of the range).

    Raises:
        ConfigError: lengths differ or a count is negative.
    """
    if len(counts) != len(values) or not len(counts) or min(counts) < 0:
        raise ConfigError(f"graded score: counts {list(counts)} and values {list(values)} do not fit together")
    alpha = 1.0 + np.asarray(counts, dtype=np.float64)
    scores = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(0).dirichlet(alpha, size=20_000) @ scores
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(draws, [tail, 1.0 - tail])
    return float(alpha @ scores / alpha.sum()), (float(low), float(high))


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Exact test of two policies on the same initial conditions (McNemar, conditional on discordant pairs).

    Attributes:
        n: pairs.
        both, neither: pairs on which the policies agree.
        only_first, only_second: discordant pairs, on which just one of them succeeds.
        p_value: two-sided, exact binomial.
    """

    n: int
    both: int
    neither: int
    only_first: int
    only_second: int
    p_value: float


def paired_test(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """Compare two policies whose i-th outcomes belong to the same initial condition.

    Raises:
        ConfigError: the outcomes have different lengths.
    """
    from scipy.stats import binom

    a, b = _outcomes(first, second)
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    discordant = only_first + only_second
    # The smaller tail twice: exact because the distribution under equality is symmetric.
    p_value = min(1.0, 2.0 * float(binom.cdf(min(only_first, only_second), discordant, 0.5))) if discordant else 1.0
    return PairedTest(
        n=len(a),
        both=int((a & b).sum()),
        neither=int((~a & ~b).sum()),
        only_first=only_first,
        only_second=only_second,
        p_value=p_value,
    )


def _outcomes(first: Sequence[bool], second: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ConfigError(f"paired outcomes must have the same length, got {a.shape} and {b.shape}")
    return a, b


def e_value(only_first: int, only_second: int, *, one_sided: bool = False) -> float:
    """Evidence against "equally good" from discordant pairs, valid whenever one looks.

    With s pairs won by the second and f by the first policy, ``B(a+s, a+f) / B(a, a) * 2^(s+f)`` with a = 1/2 is
    the Bayes factor of an unknown win probability over 1/2. Its expectation is 1 under equality, so that by Ville's
    inequality it ever exceeds ``1 / alpha`` with probability at most ``alpha``.

    Args:
        only_first, only_second: discordant pairs.
        one_sided: evidence that the *second* policy is better; the win probability under the alternative is then
            restricted to above 1/2, and the null includes "the second is worse".

    Raises:
        ConfigError: a negative count.
    """
    from scipy.special import betaincc, betaln

    if min(only_first, only_second) < 0:
        raise ConfigError(f"discordant pairs cannot be negative: {only_first}, {only_second}")
    won, lost = PRIOR + only_second, PRIOR + only_first
    log_e = float(betaln(won, lost) - betaln(PRIOR, PRIOR)) + (only_first + only_second) * math.log(2.0)
    value = math.exp(min(log_e, 700.0))
    return 2.0 * float(betaincc(won, lost, 0.5)) * value if one_sided else value


def e_process(first: Sequence[bool], second: Sequence[bool], *, one_sided: bool = False) -> np.ndarray:
    """:func:`e_value` after each pair, ``(n,)``. Reject equality the first time it reaches ``1 / alpha``."""
    a, b = _outcomes(first, second)
    only_first, only_second = np.cumsum(a & ~b), np.cumsum(b & ~a)
    return np.array(
        [e_value(int(f), int(s), one_sided=one_sided) for f, s in zip(only_first, only_second, strict=True)]
    )


def unpaired_p_value(first_successes: int, first_n: int, second_successes: int, second_n: int) -> float:
    """Two-sided p-value of Barnard's exact test, for outcomes without common initial conditions.

    Raises:
        ConfigError: impossible counts or no trials.
    """
    from scipy.stats import barnard_exact

    _check_counts(first_successes, first_n)
    _check_counts(second_successes, second_n)
    if not first_n or not second_n:
        raise ConfigError("an unpaired comparison needs at least one episode on both sides")
    table = [[first_successes, second_successes], [first_n - first_successes, second_n - second_successes]]
    if 0 in (sum(table[0]), sum(table[1])):
        return 1.0  # All succeeded or all failed: nothing speaks for a difference.
    return min(1.0, float(barnard_exact(table).pvalue))


def bonferroni(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for the number of comparisons made together."""
    return [min(1.0, value * len(p_values)) for value in p_values]


def letter_display(rates: Mapping[str, float], different: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Compact letter display: two policies share a letter exactly when they are *not* distinguishable.

    Insert-and-absorb (Piepho 2004): begin with one column of everyone; for each significant pair, split every column
    that holds both; drop columns contained in others; letter the rest in the order of their members' rates.

    Args:
        rates: policy name -> success rate; the best gets the letter ``a``.
        different: pairs found to differ.

    Raises:
        ConfigError: a pair names an unknown policy or the same one twice.
    """
    columns = [frozenset(rates)]
    for first, second in different:
        if first == second or first not in rates or second not in rates:
            raise ConfigError(f"pair ({first}, {second}) does not name two of the policies {sorted(rates)}")
        split: set[frozenset[str]] = set()
        for column in columns:
            split |= {column - {first}, column - {second}} if {first, second} <= column else {column}
        columns = [column for column in split if not any(column < other for other in split)]
    order = sorted(rates, key=lambda name: (-rates[name], name))
    rank = {name: position for position, name in enumerate(order)}
    columns.sort(key=lambda column: sorted(rank[name] for name in column))
    letters = list(itertools.islice(_letters(), len(columns)))
    return {
        name: "".join(letter for letter, column in zip(letters, columns, strict=True) if name in column)
        for name in rates
    }


def _letters() -> itertools.chain[str]:
    """``a`` to ``z``, then ``(aa)``, ``(ab)``, ... so that a longer label stays readable."""
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    pairs = (f"({first}{second})" for first, second in itertools.product(alphabet, repeat=2))
    return itertools.chain(alphabet, pairs)
