"""Which source each turn of a lane belongs to: exact shares, a pure function of (lane, turn), no tables and no state.

The turns are split off source by source with nested Beatty sequences: of q turns, floor((j·n + u)/q) of the first j go to a
source with share n/q, the others go on to the next split. Over every period (the sum of the shares) the counts are exact, at
every moment a source is at most one turn a split away from its share, and a source's own rows always come in the
source's own order, so adding a source or changing a weight reorders no other. The offsets u are spread evenly over the
lanes, which makes every batch a fair sample of the mixture (the "stratified" of stratified sampling).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from math import gcd, lcm

import numpy as np
import numpy.typing as npt

from dstrain.base.errors import ConfigError
from dstrain.base.seeds import derive
from dstrain.data.order import permute

Int64 = npt.NDArray[np.int64]

MAX_PERIOD = 1 << 24
"""Sum of the integer shares; turns up to 2^38 stay below 64 bits."""


def integer_shares(weights: Mapping[str, float], *, key: str = "weights") -> dict[str, int]:
    """Weights as the smallest whole shares in the same proportion.

    Args:
        weights: of each source, not negative, in any unit.
        key: the configuration key named in messages.

    Returns:
        Shares in the order of the names; their sum is the period, at most 2^24. Weights that have no exact proportion
        below that are rounded by largest remainder; a positive one never becomes 0.

    Raises:
        ConfigError: a weight is negative or not finite, or all are 0.
    """
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ConfigError(f"{key}: the weight of source {name!r} is {weight}; weights are 0 or more")
    exact = {name: Fraction(str(weight)) for name, weight in sorted(weights.items())}
    total = sum(exact.values())
    if total == 0:
        raise ConfigError(f"{key}: the weights of {', '.join(map(repr, weights))} add up to 0; give one of them weight")
    whole = lcm(*(weight.denominator for weight in exact.values()))
    shares = {name: int(weight * whole) for name, weight in exact.items()}
    common = gcd(*shares.values())
    shares = {name: share // common for name, share in shares.items()}
    if sum(shares.values()) <= MAX_PERIOD:
        return shares
    return _rounded({name: weight / total for name, weight in exact.items()})


def _rounded(parts: Mapping[str, Fraction]) -> dict[str, int]:
    """Largest remainder onto the longest period, at least 1 for whatever is positive."""
    ideal = {name: part * MAX_PERIOD for name, part in parts.items()}
    shares = {name: max(int(value), 1 if value > 0 else 0) for name, value in ideal.items()}
    missing = MAX_PERIOD - sum(shares.values())
    order = sorted(parts, key=lambda name: (shares[name] - ideal[name], name))
    for name in order[: max(0, missing)]:
        shares[name] += 1
    if missing < 0:  # several tiny weights were raised to 1: the largest pays
        shares[max(shares, key=lambda name: shares[name])] += missing
    return shares


class Mixture:
    """The split of every lane's turns among sources for one table of shares. Immutable."""

    def __init__(self, shares: Sequence[int], *, lanes: int, seed: int) -> None:
        """Prepare the splits.

        Args:
            shares: of each source, not all 0.
            lanes: C.
            seed: the run's seed; decides which lane begins where in the pattern.
        """
        self.num_sources = len(shares)
        self._splits: list[tuple[int, int, int, Int64]] = []
        left = sum(shares)
        lane = np.arange(lanes, dtype=np.int64)
        for source in sorted(range(len(shares)), key=lambda s: -shares[s]):  # the largest first: most turns end here
            share = shares[source]
            if share == 0:
                continue
            spread = permute(lane, lanes, derive(seed, "mixture.offset", source))
            self._splits.append((source, share, left, spread * left // lanes))
            left -= share

    def split(self, lane: Int64, turn: Int64) -> tuple[Int64, Int64]:
        """The source of each turn, and how many turns of the lane that source had before.

        Args:
            lane: (n,) lanes.
            turn: (n,) turns since the mixture began, from 0.

        Returns:
            (n,) source numbers and (n,) counts.
        """
        source = np.zeros_like(turn)
        before = np.zeros_like(turn)
        open_ = np.arange(len(turn))
        rest = turn
        for number, share, total, offset in self._splits:
            start = offset[lane[open_]]
            earlier = (rest * share + start) // total
            taken = ((rest + 1) * share + start) // total > earlier
            source[open_[taken]] = number
            before[open_[taken]] = earlier[taken]
            open_, rest = open_[~taken], (rest - earlier)[~taken]
        return source, before

    def counts(self, lane: Int64, turns: int) -> Int64:
        """(n, sources) turns of each source among the first `turns` turns of some lanes."""
        found = np.zeros((len(lane), self.num_sources), dtype=np.int64)
        rest = np.full(len(lane), turns, dtype=np.int64)
        for number, share, total, offset in self._splits:
            taken = (rest * share + offset[lane]) // total
            found[:, number] = taken
            rest = rest - taken
        return found
