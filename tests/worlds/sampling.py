"""Draws worlds from the strategy, the same ones for the same seed."""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, given, seed, settings

from worlds.strategy import worlds
from worlds.world import World

# hypothesis starts a run with its simplest example, and after ten it varies what it had: runs of
# ten without the first are independent draws
RUN = 10


def sample(count: int, first_seed: int) -> list[World]:
    """`count` worlds, drawn independently."""
    drawn: list[World] = []
    run = 0
    while len(drawn) < count:
        batch: list[World] = []

        @seed(first_seed * 100_003 + run)
        @settings(
            max_examples=RUN,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(worlds())
        def collect(world: World) -> None:
            batch.append(world)  # noqa: B023, called at once

        collect()
        drawn += batch[1:]
        run += 1
    return drawn[:count]
