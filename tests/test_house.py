"""The house keeps its laws: rooms, captions, sizes, light imports, reasons for dependencies."""

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "rankwise"
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if p.read_text("utf-8").strip())
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))

LONGEST_FILE = 400
LONGEST_FUNCTION = 60  # lines, the docstring not counted
LONGEST_CAPTION = 110

# Distributions whose module is not called as they are.
MODULE_OF = {"pyyaml": "yaml", "scikit-learn": "sklearn"}
# The layers of bitsandbytes write their weight out through a function of its package.
ALLOWED_BELOW = {"bitsandbytes", "numpy", "regex", "torch"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), filename=str(path))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package in src."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=False,
    )


# --- rooms ---------------------------------------------------------------------------------------


def test_imports_only_go_down():
    found = run_python("from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("folder", sorted({p.parent for p in PACKAGE.rglob("*.py")}), ids=relative)
def test_every_room_is_a_package(folder: Path):
    # Without an __init__.py a folder is invisible to the import linter and to the wheel's tests.
    assert (folder / "__init__.py").is_file()


def test_the_contract_of_the_lower_rooms_names_every_dependency():
    contracts = {c["id"]: c for c in PROJECT["tool"]["importlinter"]["contracts"]}
    forbidden = set(contracts["lower-rooms"]["forbidden_modules"])
    modules = {module_of(r) for r in runtime_requirements()}
    assert modules - ALLOWED_BELOW <= forbidden


# --- captions ------------------------------------------------------------------------------------


def caption(path: Path) -> str:
    """The first line of a file's docstring."""
    return (ast.get_docstring(parsed(path)) or "").split("\n")[0]


def listed_files() -> dict[str, str]:
    """Path → caption of each line `path — caption` in ARCHITECTURE.md, paths from the root.

    A path is written from the repository's root or from src/rankwise/.
    """
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    lines = re.findall(r"^[\s`*-]*([\w./-]+\.py)`?\s+—\s+(.+?)\s*$", text, flags=re.MULTILINE)
    found: dict[str, str] = {}
    for name, words in lines:
        path = name if (ROOT / name).exists() else f"src/rankwise/{name}"
        assert path not in found, f"ARCHITECTURE.md lists {path} twice"
        found[path] = words
    return found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_every_file_begins_with_its_caption(path: Path):
    line = caption(path)
    assert line.endswith("."), f"{relative(path)} must begin with a docstring of one sentence"
    assert len(line) < LONGEST_CAPTION


def test_the_architecture_page_lists_every_file_with_its_caption():
    listed = listed_files()
    expected = {relative(p): caption(p) for p in SOURCES}
    wrong = [f"{k} — {v}" for k, v in expected.items() if listed.get(k) != v]
    assert not wrong, "ARCHITECTURE.md should say:\n" + "\n".join(wrong)


def test_the_architecture_page_lists_no_file_that_is_not_there():
    assert [name for name in listed_files() if not (ROOT / name).is_file()] == []


# --- sizes and loose ends ------------------------------------------------------------------------


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=relative)
def test_no_file_is_too_long(path: Path):
    assert len(path.read_text("utf-8").splitlines()) <= LONGEST_FILE


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """How many lines a function takes, its docstring not counted."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        docstring = function.body[0]
        lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
    return lines


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_no_function_is_too_long(path: Path):
    functions = [
        node
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: length(f) for f in functions if length(f) > LONGEST_FUNCTION}
    assert long == {}


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=relative)
def test_nothing_is_left_unfinished(path: Path):
    words = ("NotImplemented" + "Error", "TO" + "DO", "FIX" + "ME", "XX" + "X")
    text = path.read_text("utf-8")
    assert [word for word in words if re.search(rf"\b{word}\b", text)] == []


def test_no_file_names_a_path_of_one_machine():
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    if listing.returncode != 0:
        pytest.skip("this is not a git checkout")
    machine_path = re.compile(rb"(?<![\w.~-])/(?:work|tmp|root|home|Users)/[\w.]")
    found = [
        f"{name}:{number}"
        for name in listing.stdout.decode().split("\0")
        if name and (ROOT / name).is_file()
        for number, line in enumerate((ROOT / name).read_bytes().splitlines(), start=1)
        if machine_path.search(line)
    ]
    assert found == []


# --- public names --------------------------------------------------------------------------------


def test_every_public_name_says_what_it_is():
    rankwise = importlib.import_module("rankwise")
    things = {name: getattr(rankwise, name) for name in rankwise.__all__}
    silent = [
        name
        for name, thing in things.items()
        if (inspect.isclass(thing) or inspect.isroutine(thing))
        # a dataclass without a docstring gets its signature for one
        and (not thing.__doc__ or thing.__doc__.startswith(f"{name}("))
    ]
    assert things
    assert silent == []


# --- light imports -------------------------------------------------------------------------------

LOADED = "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"


def test_importing_the_package_loads_nothing_heavy():
    found = run_python(f"import sys, rankwise\n{LOADED}")
    assert found.returncode == 0, found.stderr
    heavy = {
        *("datasets", "jinja2", "matplotlib", "pandas", "peft", "pyarrow", "pydantic", "rich"),
        *("scipy", "sklearn", "tokenizers", "transformers", "typer"),
    }
    assert heavy & set(found.stderr.split()) == set()


def test_help_is_shown_without_torch():
    module, _, function = PROJECT["project"]["scripts"]["rankwise"].partition(":")
    found = run_python(
        f"import sys\nfrom {module} import {function} as main\n"
        f"try:\n    main()\nfinally:\n    {LOADED}",
        "--help",
    )
    assert found.returncode == 0, found.stderr
    assert "Usage" in found.stdout
    heavy = {"matplotlib", "numpy", "torch", "transformers"}
    assert heavy & set(found.stderr.split()) == set()


# --- dependencies --------------------------------------------------------------------------------


def runtime_requirements() -> list[Requirement]:
    """What the package and its extras, bar `dev`, ask for by name."""
    project = PROJECT["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(x for k, v in extras.items() if k != "dev" for x in v)]
    return [r for r in map(Requirement, lines) if r.name != project["name"]]


def module_of(requirement: Requirement) -> str:
    name = canonicalize_name(requirement.name)
    return MODULE_OF.get(name, name.replace("-", "_"))


def direct_dependencies() -> dict[str, str]:
    """Name → where pyproject.toml asks for it: core, or the extras that name it."""
    project = PROJECT["project"]
    places = {"core": project["dependencies"], **project["optional-dependencies"]}
    found: dict[str, list[str]] = {}
    for place, lines in places.items():
        for requirement in map(Requirement, lines):
            if requirement.name != project["name"]:
                found.setdefault(canonicalize_name(requirement.name), []).append(place)
    return {name: ", ".join(where) for name, where in found.items()}


def test_every_dependency_has_its_reason():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    row = re.compile(r"^\| ([\w-]+) \| .+ \| .+ \| ([\w, ]+) \|$", flags=re.MULTILINE)
    table = {canonicalize_name(name): extra for name, extra in row.findall(text)}
    assert table.pop("package") == "extra"
    assert table == direct_dependencies()


def test_the_build_backend_is_pinned_with_the_tools():
    backend = {canonicalize_name(Requirement(x).name) for x in PROJECT["build-system"]["requires"]}
    assert backend <= set(direct_dependencies())


def test_the_constraints_pin_every_dependency_to_a_version_it_accepts():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    project = PROJECT["project"]
    requirements = [
        *runtime_requirements(),
        *map(Requirement, project["optional-dependencies"]["dev"]),
    ]
    refused = [
        str(r)
        for r in requirements
        if canonicalize_name(r.name) not in pinned
        or pinned[canonicalize_name(r.name)] not in r.specifier
    ]
    assert refused == []


def imports(tree: ast.AST, at_load: bool) -> Iterator[str]:
    """The modules a file imports; with ``at_load`` only those it imports while it is loaded."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]
        elif not (at_load and runs_later(node)):
            yield from imports(node, at_load)


def runs_later(node: ast.AST) -> bool:
    """Whether what stands in ``node`` is not run while the file is loaded."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_what_a_file_imports_is_declared(path: Path):
    declared = {module_of(r) for r in runtime_requirements()}
    known = declared | set(sys.stdlib_module_names) | {"rankwise"}
    assert set(imports(parsed(path), at_load=False)) - known == set()


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_an_extra_is_imported_only_where_it_is_used(path: Path):
    core = {module_of(Requirement(x)) for x in PROJECT["project"]["dependencies"]}
    extras = {module_of(r) for r in runtime_requirements()} - core
    assert set(imports(parsed(path), at_load=True)) & extras == set()


def test_every_declared_dependency_is_used():
    used: set[str] = set()
    for path in SOURCES:
        tree = parsed(path)
        used |= set(imports(tree, at_load=False))
        # a package may also be found by its name, without importing it
        used |= {str(n.value) for n in ast.walk(tree) if isinstance(n, ast.Constant)}
    assert {module_of(r) for r in runtime_requirements()} - used == set()
