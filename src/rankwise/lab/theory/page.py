"""The theory's page: one self-contained HTML file, a pure function of the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.lab import words
from rankwise.lab.drawing import Figure
from rankwise.lab.page import fill
from rankwise.lab.theory import figures, findings, heatmaps
from rankwise.lab.theory.experiments import MEETING
from rankwise.lab.theory.records import TheoryRecord

__all__ = ["Section", "make_page", "sections", "summary"]

TITLES = {
    "bounds": "The rank bounds the error",
    "inputs": "Inputs that are not alike in all directions",
    "samples": "Few samples",
    "scaling": "The rank decides what can be learned, the scaling how fast",
}
TEXTS = {
    "bounds": """
        A linear layer with {inputs} inputs and {outputs} outputs has a frozen weight W0; a teacher
        of the same shape has W*. The change that would make the layer the teacher is Δ* = W* − W0.
        Only A and B train: y = x (W0 + δ)ᵀ with δ = s · B A, s = 2, A random and B zero at the
        start, as in every adapter that Rankwise makes.

        No matrix of rank r is nearer to Δ* than its r largest singular values, so the squared error
        cannot fall below the sum of squares of the others, Σ σi² over i > r (Eckart and Young
        1936). Whether gradients find that matrix is another question. Here they are asked, at every
        rank, for teachers whose singular values are of four kinds; NumPy's singular value
        decomposition says what the bound is.

        Training is Adam on the exact expected loss for {steps} steps, its rate falling to zero
        along half a cosine. Plain gradient descent needs the more steps for a singular value the
        smaller it is; Adam gives each number steps of its own size.
    """,
    "inputs": """
        The bound above holds when inputs are white: as much of them in each direction. Here they
        have a covariance Σ whose largest eigenvalue is {ratio:g} times the smallest, and the loss
        is ‖(Δ* − δ) √Σ‖², with √Σ the symmetric root of Σ. What is best then is reduced-rank
        regression: the r largest singular values of Δ* √Σ, taken back through √Σ (Izenman 1975),
        and not those of Δ*.
    """,
    "samples": """
        So far the loss was exact. From samples with noise in their outputs (standard deviation
        {noise:g}; ‖Δ*‖ is 1) the best update can only be estimated. The error of the rank is the
        bound above; what is beyond it is the error of estimation. A higher rank lowers the first
        and has more to estimate.
    """,
    "scaling": """
        A layer of {width} by {width} and a teacher with Δ* of rank 1: every rank can learn all of
        it, so that only the optimisation differs. Each learning rate gets {scaling_steps} steps.
        The three scalings agree at r = {meeting}, where s = 2. A rate trains when at most {trains}
        of the error is left, in the mean over {scaling_draws} teachers; it diverges when any of
        them ends above where it began.

        Why they differ: the first step of gradient descent at rate η moves δ by −η s² G AᵀA, with G
        the gradient with respect to W, and AᵀA grows like r. So the speed goes with s²·r: like 1/r
        when α is fixed, like r when α = 2r, and it stays when s = α/√r (Kalajdzievski 2023). Adam
        moves each number of B by about η whatever the gradient, so δ moves with s·r: it stays when
        α is fixed, grows like r when α = 2r, and like √r when s = α/√r. What a rate must not exceed
        follows another law, for it depends on the steepest direction at the end of training.
    """,
}


@dataclass(frozen=True)
class Section:
    """A part of the page: what is asked and how, what was found, and its figures."""

    name: str
    title: str
    paragraphs: tuple[str, ...]
    found: tuple[str, ...]
    figures: tuple[Figure, ...]


def make_page(record: TheoryRecord, parts: Sequence[Section]) -> bytes:
    """The page of a record and its :func:`sections`; the same record gives the same bytes.

    Raises:
        EnvironmentFault: Jinja2 is not installed.
    """
    return fill(
        "theory.html.jinja",
        title="What the rank and the scaling of an update do, where everything can be computed",
        theory=record.theory,
        tiles=_tiles(record),
        sections=parts,
        facts=_facts(record),
        options=[(name, str(value)) for name, value in asdict(record.theory).items()],
    )


def summary(record: TheoryRecord) -> str:
    """What was found, as lines for the terminal."""
    parts = [
        "\n".join([TITLES[name], *(f"  {sentence}" for sentence in found)])
        for name, found in findings.by_section(record).items()
    ]
    return "\n\n".join(parts)


def sections(record: TheoryRecord) -> list[Section]:
    """The parts of the page, in its order, their figures drawn.

    Raises:
        EnvironmentFault: Matplotlib is not installed.
    """
    sizes = {
        **asdict(record.theory),
        "trains": words.percent(findings.TRAINS),
        "meeting": MEETING,
    }
    drawn = {
        "bounds": lambda: (figures.error_by_rank(record), figures.distance(record)),
        "inputs": lambda: (figures.inputs_loss(record), figures.inputs_weights(record)),
        "samples": lambda: (figures.samples(record),),
        "scaling": lambda: tuple(heatmaps.heatmaps(record)),
    }
    return [
        Section(
            name,
            TITLES[name],
            tuple(" ".join(text.split()).format(**sizes) for text in TEXTS[name].split("\n\n")),
            tuple(found),
            drawn[name](),
        )
        for name, found in findings.by_section(record).items()
    ]


def _tiles(record: TheoryRecord) -> list[tuple[str, ...]]:
    """The few numbers at the top of the page: what, value, explanation, and its colour."""
    rows, inputs = record.bounds, record.inputs
    met = sum(findings.reaches(row.error, row.bound) for row in rows)
    followed = sum(findings.reaches(row.loss, row.loss_bound) for row in inputs)
    names = dict.fromkeys(row.spectrum for row in rows)
    falling = [n for n in names if findings.falls([r for r in rows if r.spectrum == n])]
    few = min(row.rows for row in record.samples)
    best = findings.best_rank([row for row in record.samples if row.rows == few])

    def tone(part: int, whole: int) -> str:
        return "good" if part == whole else "bad"

    return [
        (
            *("At the bound", f"{met} of {len(rows)}", "spectra and ranks, white inputs"),
            tone(met, len(rows)),
        ),
        (
            *("At regression's bound", f"{followed} of {len(inputs)}", "ranks, other inputs"),
            tone(followed, len(inputs)),
        ),
        (
            *("Error falls with r", f"{len(falling)} of {len(names)}", "spectra"),
            tone(len(falling), len(names)),
        ),
        ("Best rank from few samples", f"r = {best.r}", f"from {few:,} samples with noise", ""),
    ]


def _facts(record: TheoryRecord) -> list[tuple[str, str]]:
    """What the numbers stand on."""

    def pairs(mapping: Mapping[str, Any]) -> str:
        return ", ".join(f"{k} {v}" for k, v in mapping.items() if v is not None) or "not recorded"

    return [
        ("Made by", record.theory.call()),
        ("Time of the computation", words.duration(record.seconds)),
        ("Number format", "float64"),
        ("Code", pairs(record.code)),
        ("Versions", pairs(record.versions)),
        ("Hardware", pairs(record.hardware)),
    ]
