"""README.md and the guide are executed: every block runs, every flag they name exists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from rankwise.cli.app import COMMANDS, main, make_app

PAGES = ("README.md", "docs/guide.md")
NAME = (
    "bert-base-uncased"  # what the pages call a hub model; the tests put a local one in its place
)


def blocks(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def shell_lines(page: Path) -> list[str]:
    lines = "\n".join(blocks(page, "sh")).splitlines()
    return [line.partition(" # ")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def desk(tmp_path: Path, rows: Path, bert: Path) -> Path:
    """A folder as a reader has it: train.tsv and dev.tsv, and a config."""
    for name in ("train.tsv", "dev.tsv"):
        shutil.copy(rows / name, tmp_path / name)
    (tmp_path / "run.yaml").write_text(f"model: {bert}\ndata: train.tsv\nepochs: 1\n")
    return tmp_path


def run(words: list[str], desk: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=desk, capture_output=True, text=True, timeout=300, check=False, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_runs(
    page: str,
    desk: Path,
    bert: Path,
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In this process, one after the other; tests/cli/test_app.py starts some as a user does."""
    monkeypatch.chdir(desk)
    lines = [line for line in shell_lines(repository / page) if line.startswith("rankwise ")]
    assert lines
    for line in lines:
        words = shlex.split(line.replace(NAME, str(bert)))
        with pytest.raises(SystemExit) as left:
            main(words[1:])
        out, err = capsys.readouterr()
        if "--resume" in words:
            assert left.value.code == 2, line
            assert "is finished" in err, line
        else:
            assert not left.value.code, f"{line}\n{out}\n{err}"


def test_other_commands_of_the_page_exist(repository: Path) -> None:
    lines = [line for line in shell_lines(repository / "README.md") if line[:8] != "rankwise"]
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    extras = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    known = set(extras["project"]["optional-dependencies"])
    for line in lines:
        words = shlex.split(line)
        if words[0] == "make":
            assert f"\n{words[1]}: " in makefile, line
        else:
            assert words[:3] == ["pip", "install", "-e"], line
            assert set(words[3][2:-1].split(",")) <= known, line


@pytest.mark.slow
def test_the_python_of_the_readme_runs(repository: Path, desk: Path, bert: Path) -> None:
    (code,) = blocks(repository / "README.md", "python")
    assert NAME in code
    done = run([sys.executable, "-c", code.replace(NAME, str(bert))], desk)
    assert done.returncode == 0, done.stderr
    assert "certificate passed" in done.stdout
    assert sorted(p.name for p in (desk / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def flags() -> set[str]:
    group = typer.main.get_command(make_app(COMMANDS))
    commands = [group, *group.commands.values()]  # type: ignore[attr-defined]
    options = [option for command in commands for option in command.params]
    every = {text for option in options for text in (*option.opts, *option.secondary_opts)}
    return every | {"--help"}


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_the_page_names_exists(page: str, repository: Path) -> None:
    text = (repository / page).read_text(encoding="utf-8")
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named
    assert named <= flags()


def test_the_guide_has_a_section_for_every_command(repository: Path) -> None:
    text = (repository / "docs" / "guide.md").read_text(encoding="utf-8")
    assert {f"## rankwise {name}" for name in COMMANDS} <= set(text.splitlines())


def test_the_readmes_demo_is_what_the_command_prints_today(repository: Path) -> None:
    """The numbers are of one machine and day; the form must be today's."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- demo")[2].partition("<!-- /demo -->")[0]
    header = ("method", "r", "accuracy", "formula", "counted", "trained", "% of base", "file size")
    assert all(word in shown for word in header)
    assert "merge certificate passed" in shown
    assert "rankwise demo" in shown
