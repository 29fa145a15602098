"""What is left to do, as a function of the grid and of what its runs have come to so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from rankwise.lab.compare.grid import HEAD, Cell, Grid
from rankwise.lab.compare.tuning import (
    Outcome,
    Settled,
    ladder,
    nearest_rung,
    search,
    sparing_rate,
)

__all__ = ["Work", "work_of"]


@dataclass(frozen=True)
class Work:
    """The state of a grid.

    Attributes:
        cells: every run known to be needed, finished ones among them, in the order to do them: the
            searches, then seed by seed, so that what is there early compares everything.
        settled: the searches that are over, by their key.
        expected: the cost of the whole grid, as far as it can be told now.
        count: how many runs the whole grid has, as far as that can be told now.
        head_rate: the output layer's learning rate in all but head-only, where it has its own.
    """

    cells: tuple[Cell, ...]
    settled: Mapping[str, Settled]
    expected: int
    count: int
    head_rate: float | None

    def left(self, outcomes: Mapping[str, Outcome]) -> list[Cell]:
        """The runs that are needed and have come to nothing yet."""
        return [cell for cell in self.cells if cell.name not in outcomes]


def work_of(grid: Grid, outcomes: Mapping[str, Outcome], metric: str) -> Work:
    """The runs that the grid needs, given what those of them that are over have come to.

    Where the output layer is to have a rate that head-only training was good at, that search comes
    first, and all but head-only waits for it.

    Args:
        grid: what is compared.
        outcomes: by the names of the cells.
        metric: what the searches are judged by.
    """
    cells: list[Cell] = []
    settled: dict[str, Settled] = {}
    unsure: list[Cell] = []
    waiting = False
    for key in grid.searches():
        found, place = _search(grid, key, {} if waiting else outcomes, metric)
        (unsure if waiting else cells).extend(found)
        if place is not None:
            settled[key] = place
        if key == HEAD and grid.head_first:
            waiting = place is None
            tried = {cell.config.learning_rate: cell.name for cell in found}
            known = {rate: outcomes[name] for rate, name in tried.items() if name in outcomes}
            grid = replace(grid, head_rate=None if waiting else sparing_rate(known, metric))
    for seed in range(grid.config.seeds):
        for regime in grid.regimes():
            place = settled.get(regime.search)
            if place is None:
                unsure.append(grid.run_cell(regime, grid.centre(regime.search), seed))
            elif place.rate is not None:
                cells.append(grid.run_cell(regime, place.rate, seed))
    expected = sum(cell.cost for cell in (*cells, *unsure))
    return Work(tuple(cells), settled, expected, len(cells) + len(unsure), grid.head_rate)


def _search(
    grid: Grid, key: str, outcomes: Mapping[str, Outcome], metric: str
) -> tuple[list[Cell], Settled | None]:
    """The runs of one search, and what it has settled on when it is over."""
    centre = grid.centre(key)
    if grid.config.rates == 1:
        return [], Settled(centre)
    every = {ladder(i): grid.search_cell(key, ladder(i)) for i in _rungs(grid, centre)}
    tried = {r: outcomes[c.name] for r, c in every.items() if c.name in outcomes}
    found = search(centre, tried, metric, grid.config.rates, grid.config.widen)
    if isinstance(found, Settled):
        return [every[rate] for rate in sorted(tried)], found
    return [every[rate] for rate in sorted({*tried, *found})], None


def _rungs(grid: Grid, centre: float) -> range:
    """Every rung that a search around ``centre`` may come to."""
    far = grid.config.rates // 2 + grid.config.widen
    return range(nearest_rung(centre) - far, nearest_rung(centre) + far + 1)
