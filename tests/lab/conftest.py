"""Run folders as the training room writes them, a report of them, and readers of its HTML."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest

from rankwise.lab.records import RunRecord, read_run
from rankwise.lab.report import write_report
from rankwise.train.answers import NAME, Answers, write_answers

BASE = 22_713_216
HEAD = 3_080
LAYERS, WIDTH = 6, 384

Edit = Callable[[dict[str, Any]], object]
MakeRun = Callable[..., Path]
Lora = Callable[..., dict[str, Any]]
Record = Callable[..., RunRecord]


def manifest(
    name: str, method: dict[str, Any], accuracy: float, seed: int, rows: int
) -> dict[str, Any]:
    """A complete manifest of one run."""
    adapter = 0
    if method["method"] == "lora":
        adapter = LAYERS * 2 * method["r"] * (WIDTH + WIDTH)  # query and value of each layer
    full = method["method"] == "full"
    trainable = HEAD + (BASE if full else adapter)
    return {
        "format": 1,
        "name": name,
        "method": method,
        "config": {"epochs": 4, "lr": 5e-5 if full else 1e-3, "batch": 32, "seed": seed},
        "seed": seed,
        "task": "classification",
        "metric": "accuracy",
        "metrics": {"accuracy": accuracy, "f1": accuracy - 0.03, "loss": 1.6 - accuracy},
        "counts": {
            "base": BASE,
            "adapter": adapter,
            "adapter_formula": adapter or None,
            "head": HEAD,
            "trainable": trainable,
        },
        "seconds": {"train": 20.0 + trainable / 4e5, "eval": 3.1},
        "memory": {"of": "process", "peak": 500_000_000 + 16 * trainable},
        "diverged": False,
        "artifact_bytes": 4 * trainable + 1500,
        "status": "finished",
        "data": {
            "train": {"source": "banking77/train.csv", "rows": 2400, "fingerprint": "a1b2c3d4"},
            "eval": {"source": "banking77/test.csv", "rows": rows, "fingerprint": "e5f6a7b8"},
        },
        "base": {"source": "all-MiniLM-L6-v2", "fingerprint": "0011223344556677"},
        "code": {"version": "0.1.0", "commit": "abc1234"},
        "versions": {"python": "3.11.9", "torch": "2.13.0"},
        "hardware": {"cpu": "Some CPU", "cores": 2, "device": "cpu", "dtype": "float32"},
        "notes": [],
    }


def events(accuracy: float, epochs: int, per_epoch: int) -> list[dict[str, Any]]:
    """Training that falls smoothly with a ripple, and one evaluation per epoch that rises."""
    lines: list[dict[str, Any]] = []
    for step in range(1, epochs * per_epoch + 1):
        epoch = step / per_epoch
        loss = 0.4 + 3.5 * math.exp(-(0.5 + accuracy) * epoch) + 0.15 * math.sin(2.7 * step)
        lines.append(
            {"event": "train", "step": step, "epoch": epoch, "loss": loss, "lr": 1e-3}
            | {"grad_norm": 1.0, "seconds": 0.1 * step, "skipped": False}
        )
        if step % per_epoch == 0:
            score = accuracy * (1 - math.exp(-1.3 * epoch)) / (1 - math.exp(-1.3 * epochs))
            lines.append(
                {"event": "eval", "step": step, "epoch": epoch, "loss": 2 - score}
                | {"accuracy": score, "f1": score - 0.03}
            )
    return lines


def answers(name: str, accuracy: float, seed: int, rows: int) -> Answers:
    """Answers with that many right: the rows differ in difficulty, each run has luck of its own."""
    difficulty = np.random.default_rng(0).normal(size=rows)
    luck = np.random.default_rng([crc32(name.encode("utf-8", "replace")), seed]).normal(size=rows)
    right = np.zeros(rows)
    right[np.argsort(difficulty + 0.5 * luck)[: round(accuracy * rows)]] = 1
    ones = np.ones(rows)
    return Answers(
        rows=np.arange(rows),
        losses=1.2 - right,
        targets=ones.astype(int),
        labels=ones,
        predictions=right,
        classes=2,
    )


def write_run(
    parent: Path,
    name: str,
    method: dict[str, Any],
    accuracy: float = 0.74,
    *,
    seed: int = 0,
    rows: int = 872,
    edit: Edit | None = None,
    log: list[dict[str, Any]] | None = None,
    answered: bool = True,
) -> Path:
    """Write a run folder inside ``parent``; ``edit`` may change the manifest first."""
    tree = manifest(name, copy.deepcopy(method), accuracy, seed, rows)
    if edit is not None:
        edit(tree)
    lines = events(accuracy, 4, 30) if log is None else log
    folder = parent / f"{len(list(parent.glob('*'))):03}"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(tree), "utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, "utf-8")
    if answered and tree.get("data", {}).get("eval") is not None:
        made = answers(name, accuracy, seed, rows)
        write_answers(folder / NAME, made, tree["data"]["eval"]["fingerprint"])
    return folder


def lora_method(r: int, **options: Any) -> dict[str, Any]:
    """The method of a LoRA run, as the manifest holds it."""
    targets = {"target_modules": ["query", "value"], "adapted": ["layer.0.query"]}
    return {"method": "lora", "r": r, "alpha": 2.0 * r} | targets | options


@pytest.fixture(scope="session")
def lora() -> Lora:
    """Makes the method of a LoRA run."""
    return lora_method


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """Makes run folders, all inside one folder named runs."""
    return partial(write_run, tmp_path / "runs")


@pytest.fixture
def record(make_run: MakeRun) -> Record:
    """Makes records, each read back from a folder that ``make_run`` wrote."""
    return lambda *args, **kwargs: read_run(make_run(*args, **kwargs))


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> list[RunRecord]:
    """Head-only, LoRA at six ranks and full fine-tuning, one seed each, on 872 rows."""
    folder = tmp_path_factory.mktemp("sweep")
    scores = {1: 0.682, 2: 0.741, 4: 0.758, 8: 0.771, 16: 0.776, 32: 0.773}
    folders = [
        write_run(folder, "head only", {"method": "head"}, 0.603),
        *(write_run(folder, f"LoRA r={r}", lora_method(r), p) for r, p in scores.items()),
        write_run(folder, "full fine-tuning", {"method": "full"}, 0.789),
    ]
    return [read_run(path) for path in folders]


@pytest.fixture(scope="session")
def spectra() -> dict[str, list[float]]:
    """Falling singular values for the query and value projections of six layers."""
    return {
        f"encoder.layer.{n}.attention.self.{part}": [
            math.exp(-(0.35 + 0.06 * n + (0.25 if part == "value" else 0)) * k) for k in range(8)
        ]
        for n in range(LAYERS)
        for part in ("query", "value")
    }


def passed_certificate() -> dict[str, Any]:
    """A merge certificate that passed."""
    return {
        "passed": True,
        "dtype": "float32",
        "layers": [
            {"name": f"encoder.layer.{n}.query", "error": 6e-8, "bound": 2e-7, "effect": 0.03}
            for n in range(LAYERS)
        ],
        "outputs": {"error": 4e-7, "effect": 0.41, "tolerance": 1e-5},
        "finite": True,
        "sha256": {"base": "b" * 64, "adapter": "a" * 64, "merged": None},
        "probe": "8 rows of the evaluation data",
    }


@pytest.fixture
def certificate() -> dict[str, Any]:
    """A merge certificate that passed, for a test to change."""
    return passed_certificate()


@pytest.fixture(scope="session")
def report(
    tmp_path_factory: pytest.TempPathFactory,
    sweep: list[RunRecord],
    spectra: dict[str, list[float]],
) -> Path:
    """A report with every part, for tests that only read it."""
    return write_report(
        tmp_path_factory.mktemp("report") / "made" / "report.html",
        title="What rank does it need?",
        runs=sweep,
        certificate=passed_certificate(),
        spectra=spectra,
        notes=["One note."],
    )


VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements with their attributes and text; complains where a tag is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


@pytest.fixture(scope="session")
def parse() -> Callable[[Path | str], Page]:
    """Reads an HTML file, or HTML text, with Python's own parser."""
    return lambda page: Page(page if isinstance(page, str) else page.read_text("utf-8"))


# --- pages in a browser --------------------------------------------------------------------------

MEASURE = """
<script>
addEventListener("load", () => {
  const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
  const found = {
    figures: Object.fromEntries([...document.querySelectorAll("figure")]
      .map(f => [f.id, size(f.querySelector("svg.plot"))])),
    marks: [...document.querySelectorAll("svg.plot use, svg.plot path")]
      .filter(e => getComputedStyle(e).stroke === "none" && getComputedStyle(e).fill === "none")
      .length,
    drawn: document.querySelectorAll("svg.plot use, svg.plot path").length,
    wide: document.documentElement.scrollWidth, window: innerWidth,
    small: Math.min(...[...document.querySelectorAll("svg.plot text")]
      .map(t => t.getBoundingClientRect().height)),
    outside: [...document.querySelectorAll("svg.plot text")].filter(t => {
      const b = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect();
      return b.left < s.left - 2 || b.right > s.right + 2 || b.bottom > s.bottom + 2;
    }).map(t => t.textContent),
    loaded: performance.getEntriesByType("resource").map(e => e.name)
      .filter(n => !n.startsWith("data:")),
    ground: getComputedStyle(document.body).backgroundColor,
    line: getComputedStyle(document.querySelector("path[style*='stroke: var(--c2)']")).stroke,
  };
  document.title = "measured " + JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("chromium is not installed")
    return found


@pytest.fixture
def measure_page(
    chromium: str, tmp_path: Path, parse: Callable[[Path | str], Page]
) -> Callable[..., dict[str, Any]]:
    """Says what a browser lays out of a page, in a window of some width.

    The page's own ban on scripts is lifted for the measurement. Headless windows may not be made
    narrow, so the page is laid out in a frame of that width.
    """

    def measure(page: Path, width: int, *options: str) -> dict[str, Any]:
        text = re.sub(
            r'<meta http-equiv="Content-Security-Policy".*?>', "", page.read_text("utf-8")
        )
        copy = tmp_path / "measured.html"
        copy.write_text(text.replace("</body>", MEASURE + "</body>"), "utf-8")
        frame = tmp_path / "frame.html"
        frame.write_text(
            f'<iframe src="measured.html" style="width:{width}px;height:900px;border:0"></iframe>'
            '<script>addEventListener("load", () => setTimeout(() => {'
            "document.title = document.querySelector('iframe').contentDocument.title}, 300))"
            "</script>",
            "utf-8",
        )
        words = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--allow-file-access-from-files", "--virtual-time-budget=4000"),
            *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1400,1000"),
            *(*options, "--dump-dom", frame.as_uri()),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
        title = next(text for text in parse(done.stdout).texts if text.startswith("measured "))
        return json.loads(title.removeprefix("measured "))

    return measure


@pytest.fixture
def shown_whole(measure_page: Callable[..., dict[str, Any]]) -> Callable[..., None]:
    """Checks that a browser shows every figure of a page in full, and loads nothing."""

    def check(page: Path, figures: list[str], width: int, *options: str) -> None:
        found = measure_page(page, width, *options)
        assert list(found["figures"]) == figures
        for name, (wide, high) in found["figures"].items():
            assert wide > 300, name
            assert high > 100, name  # two bars on a phone
        assert found["loaded"] == []
        assert found["window"] == width
        assert found["wide"] <= width
        assert found["small"] >= 10
        assert found["outside"] == []

    return check
