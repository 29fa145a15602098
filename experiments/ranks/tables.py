"""What the ranks of an experiment show, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean

from experiments.ranks.study import Study

from rankwise.lab import words
from rankwise.lab.comparing import best_of
from rankwise.lab.noise import LEVEL
from rankwise.lab.records import RunRecord
from rankwise.lab.settings import Comparison, Setting, against, compare, corrected, noise_of


def tables(
    study: Study,
    first: Mapping[int, Setting],
    after: Sequence[Setting],
    beside: int | None = None,
) -> Iterator[str]:
    """What was found, in Markdown: all beside a rank, nested beside apart, and in words.

    Args:
        study: with the runs trained apart.
        first: the nested run cut to each rank.
        after: what follows from the advice.
        beside: the rank that all are compared with; None for the best of those trained apart.
    """
    apart = study.apart
    best = best_of(list(apart.values()))
    assert best is not None  # every run has a score
    reference = best if beside is None else apart[beside]
    every = [*apart.values(), *first.values(), *after]
    made = {id(c.setting): c for c in against(reference, [s for s in every if s is not reference])}
    pairs = corrected([compare(first[r], apart[r]) for r in apart])
    metric, rows = study.pinned.metric, study.pinned.parts["eval"].rows
    seeds = words.count(len(best.runs), "seed")
    yield f"{study.pinned.about}: {metric} on {rows:,} evaluation rows, {seeds}."
    yield f"\n| update | trained parameters | {metric} | beside {reference.label} | p |"
    yield "|---|--:|--:|--:|--:|"
    for s in every:
        cells = "| " if s is reference else _beside(made[id(s)])
        yield f"| {s.label} | {_size(s)} | {_score(s)} | {cells} |"
    yield "\n| r | apart | nested | nested beside apart | p |\n|--:|--:|--:|--:|--:|"
    for r, pair in zip(apart, pairs, strict=True):
        yield f"| {r} | {_score(apart[r])} | {_score(first[r])} | {_beside(pair)} |"
    tests = f"{len(made)} and over {len(pairs)}"
    yield f"\n± and intervals at 95 %, over rows and seeds; p is Holm's, over {tests}.\n"
    yield f"- Best of the ranks trained apart: {best.label}, {_score(best)}."
    yield f"- Advised, by seed: {words.listed([_ranks(run) for run in after[0].runs])}."
    for s in after:
        yield _told(made[id(s)], list(made.values()))
    yield _told_of_pairs(dict(zip(apart, pairs, strict=True)))


def _told(found: Comparison, made: Sequence[Comparison]) -> str:
    """A setting beside the best, and what is smaller and no worse."""
    metric, best, mean = found.setting.first.metric, found.reference, _trained(found.setting)
    size = words.amount(metric, abs(found.difference))
    way = f"{size} {'better' if found.difference > 0 else 'worse'} than"
    way = way if found.difference else "as good as"
    said = (
        f"- {found.setting.label}: {way} {best.label}, {'more than' if found.clear else 'within'} "
        "the noise"
    )
    if found.noise is not None and not found.clear:
        seen = words.amount(metric, found.noise.half_width(1 - LEVEL / len(made)))
        said += f" (a difference below about {seen} would not be seen)"
    if found.verdict == "worse":
        return f"{said}."
    near = [best, *(c.setting for c in made if c.verdict in ("better", "not told apart"))]
    smaller = [s.label for s in near if _trained(s) < mean]
    if not smaller:
        return f"{said}. Nothing smaller is."
    return f"{said}. Smaller, and within it too: {words.listed(smaller)}."


def _told_of_pairs(pairs: Mapping[int, Comparison]) -> str:
    """At which ranks nested training was another than training apart."""
    parts: list[str] = []
    for verdict in ("better", "worse", "not told apart", "not known"):
        ranks = [str(r) for r, pair in pairs.items() if pair.verdict == verdict]
        parts += [f"{verdict} at r = {words.listed(ranks)}"] if ranks else []
    return f"- Nested beside apart: {'; '.join(parts)}."


def _trained(setting: Setting) -> float:
    return fmean(run.counts.trainable for run in setting.runs)


def _size(setting: Setting) -> str:
    sizes = [run.counts.trainable for run in setting.runs]
    return f"{max(sizes):,}" if len({*sizes}) == 1 else f"{min(sizes):,} to {max(sizes):,}"


def _score(setting: Setting) -> str:
    metric, noise = setting.first.metric, noise_of([(1.0, setting)])
    wide = "" if noise is None else f" ± {words.amount(metric, noise.half_width(), unit=False)}"
    return f"{words.score(metric, setting.score)}{wide}"


def _beside(found: Comparison) -> str:
    """Two cells: the difference with its interval, and p."""
    metric, noise = found.setting.first.metric, found.noise
    if noise is None or found.corrected is None:
        return f"{_signed(metric, found.difference)} | "
    wide = noise.half_width()
    ends = (_signed(metric, found.difference + side * wide) for side in (-1, 1))
    size = f"{_signed(metric, found.difference)} ({' to '.join(ends)})"
    return f"{size} | {words.chance(found.corrected)}"


def _signed(metric: str, value: float) -> str:
    return f"{'−' if value < 0 else '+'}{words.amount(metric, abs(value), unit=False)}"


def _ranks(run: RunRecord) -> str:
    ranks: list[int] = list(run.method["ranks"].values())
    layers = "in every layer" if len({*ranks}) == 1 else f"by layer ({sum(ranks)} in {len(ranks)})"
    return f"r = {words.spread(ranks)} {layers}"
