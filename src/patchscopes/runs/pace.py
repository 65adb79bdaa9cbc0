"""Rate and time left. Work is weighed by what cells are expected to cost; how long a unit of that takes is measured for each look
apart, since it differs between looks, and the tasks of all looks take turns.

    t_i    seconds a FLOP of look i, from its finished shards, of which the latest count most
    left   Σ_i (FLOP left)_i · t_i / n,   n = seconds worked / seconds passed: workers that really run at a time

A look that has not begun is taken to be like the others. The interval is two standard errors of the shards' own speeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

RECENT = 0.15  # weight of the latest shard, where enough have finished


class Pace:
    """costs: FLOP left of every shard, at the start; looks: which look it is of."""

    def __init__(self, costs: Mapping[int, float], looks: Mapping[int, int], clock: Callable[[], float] = time.monotonic):
        self.costs, self.looks, self.clock = dict(costs), looks, clock
        self.left = dict(costs)
        self.total = sum(costs.values()) or 1.0
        self.begun: float | None = None
        self.worked = 0.0
        self._speeds: dict[int, list[float]] = {}  # seconds a FLOP, of the shards of a look in order
        self._shares: dict[int, float] = {}

    def start(self) -> None:
        """The first worker is ready."""
        if self.begun is None:
            self.begun = self.clock()

    def working(self, shard: int, share: float) -> None:
        """So much of a shard is done."""
        if shard in self.left:
            self._shares[shard] = share

    def finished(self, shard: int, seconds: float) -> None:
        """A shard took so long."""
        cost = self.left.pop(shard, 0.0)
        self._shares.pop(shard, None)
        self.worked += seconds
        if cost > 0:
            self._speeds.setdefault(self.looks[shard], []).append(seconds / cost)

    @property
    def share(self) -> float:
        """Of the work, done."""
        left = sum(cost * (1 - self._shares.get(shard, 0.0)) for shard, cost in self.left.items())
        return 1 - left / self.total

    def eta(self) -> tuple[float, float, float] | None:
        """(seconds left, at least, at most); None until a shard has finished."""
        if self.begun is None or not self._speeds:
            return None
        passed = max(self.clock() - self.begun, 1e-9)
        at_a_time = max(min(self.worked / passed, len(self.costs)), 1e-9) if self.worked else 1.0
        means = {look: _recent(speeds) for look, speeds in self._speeds.items()}
        usual = sum(means.values()) / len(means)
        left = 0.0
        variance = 0.0
        for shard, cost in self.left.items():
            rest = cost * (1 - self._shares.get(shard, 0.0))
            left += rest * means.get(self.looks[shard], usual)
        for look, speeds in self._speeds.items():
            rest = sum(cost for shard, cost in self.left.items() if self.looks[shard] == look)
            mean = sum(speeds) / len(speeds)
            spread = sum((s - mean) ** 2 for s in speeds) / max(len(speeds) - 1, 1) if len(speeds) > 1 else (0.5 * mean) ** 2
            variance += rest**2 * spread / len(speeds)
        error = 2 * math.sqrt(variance)
        return left / at_a_time, max(0.0, left - error) / at_a_time, (left + error) / at_a_time


def _recent(speeds: list[float]) -> float:
    """The mean, in which the latest counts most; of few the plain one, without the first, which warms up, as soon as there are three."""
    some = speeds[1:] if len(speeds) >= 3 else speeds
    mean, weight = some[0], 1.0
    for k, speed in enumerate(some[1:], 2):
        weight = max(1 / k, RECENT)
        mean += weight * (speed - mean)
    return mean
