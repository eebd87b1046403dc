"""Statistics: paired differences between arms, with bootstrap intervals over seeds.

A seed is the unit: it draws the target domain, the songs, the initial adapter and the noise. Differences are taken
within a seed and averaged over the cells of a group (domains, numbers of songs) before seeds are resampled.

With few seeds the usual percentile interval is too narrow. This one is expanded as in Hesterberg 2015, "What Teachers
Should Know About the Bootstrap": its quantiles are those at which a normal interval would be as wide as Student's. With
5 seeds the bootstrap has not enough values for that (its interval would still miss in 8 % of the cases, not in 5), so
an interval is never narrower than Student's.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

ENUMERATED = 50_000
DRAWS = 20_000

Contrast = Mapping[str, float]
"""Weights of the arms, which sum to 0."""

CONTRASTS: dict[str, Contrast] = {
    "plugin − ACE-Step": {"law+drop": 1.0, "eight": -1.0},
    "law − eight steps": {"law": 0.5, "law+drop": 0.5, "eight": -0.5, "eight+drop": -0.5},
    "dropout − none": {"eight+drop": 0.5, "law+drop": 0.5, "eight": -0.5, "law": -0.5},
    "30 % high t − plugin": {"law+drop+high": 1.0, "law+drop": -1.0},
    "padded − as generated": {"law+drop+padded": 1.0, "law+drop": -1.0},
    "tenth − newest": {"mean of a tenth": 1.0, "law+drop": -1.0},
    "third − newest": {"mean of a third": 1.0, "law+drop": -1.0},
    "half − newest": {"mean of a half": 1.0, "law+drop": -1.0},
    "third − tenth": {"mean of a third": 1.0, "mean of a tenth": -1.0},
    "half − third": {"mean of a half": 1.0, "mean of a third": -1.0},
    "third − exact third": {"mean of a third": 1.0, "mean of a third, exact": -1.0},
    "interaction": {"law+drop": 1.0, "law": -1.0, "eight+drop": -1.0, "eight": 1.0},
}


@dataclass(frozen=True)
class Difference:
    """A mean difference over seeds and its interval (NaN with fewer than 3 seeds)."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    @property
    def shown(self) -> bool:
        """Whether the interval excludes zero. Nothing is claimed otherwise."""
        return self.low > 0.0 or self.high < 0.0


def difference(by_seed: Sequence[float], level: float = 0.95) -> Difference:
    """The mean of one difference per seed, with its expanded percentile interval.

    Random numbers: from a generator of its own; none with up to 6 seeds, whose resamples are all enumerated.
    """
    number, values = len(by_seed), tuple(by_seed)
    if number < 3 or not all(map(math.isfinite, values)):
        return Difference(fmean(values) if values else math.nan, math.nan, math.nan, values)
    tail = expanded_tail(number, level)
    means = sorted(_resampled_means(values))
    cut = int(tail * len(means))
    mean = fmean(values)
    reach = student(number, level) * stdev(values) / math.sqrt(number)
    return Difference(mean, min(means[cut], mean - reach), max(means[-1 - cut], mean + reach), values)


def expanded_tail(number: int, level: float = 0.95) -> float:
    """The probability to cut off on either side, so that the interval is as wide as Student's would be."""
    return NormalDist().cdf(-math.sqrt(number / (number - 1)) * student(number, level))


def student(number: int, level: float = 0.95) -> float:
    """Student's quantile for the mean of `number` values."""
    from scipy.stats import t

    return float(t.ppf(0.5 + level / 2, number - 1))


def _resampled_means(values: Sequence[float]) -> list[float]:
    number = len(values)
    if number**number <= ENUMERATED:
        return [sum(chosen) / number for chosen in itertools.product(values, repeat=number)]
    generator = random.Random(0)
    return [sum(generator.choices(values, k=number)) / number for _ in range(DRAWS)]


def contrast(values: Mapping[tuple[int, str], Sequence[float]], weights: Contrast) -> Difference:
    """A contrast between arms | given for each (seed, arm) the values of a group's cells, in one order.

    Seeds that lack an arm, or one of its cells, are left out: they are not pairs.
    """
    seeds = sorted({seed for seed, _ in values})
    sizes = {len(found) for found in values.values()}
    most = max(sizes, default=0)
    whole = [seed for seed in seeds if all(len(values.get((seed, arm), ())) == most for arm in weights)]
    return difference([sum(w * fmean(values[seed, arm]) for arm, w in weights.items()) for seed in whole])
