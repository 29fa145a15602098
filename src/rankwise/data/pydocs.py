"""The demo's data: docstrings of the running Python's standard library, labelled by topic."""

from __future__ import annotations

import ast
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from rankwise.data.examples import Examples
from rankwise.data.shuffle import permutation
from rankwise.errors import EnvironmentFault, UserError

__all__ = ["TOPICS", "docstrings"]

# The part of the library that each module belongs to. Modules named nowhere are left out, as are
# tests; a module that this Python no longer has simply adds nothing.
TOPICS: dict[str, str] = {
    "concurrency": """asyncio concurrent contextvars multiprocessing _threading_local queue sched
        signal subprocess threading""",
    "files": """_compression _pyio bz2 dbm filecmp fileinput fnmatch genericpath glob gzip io
        linecache lzma ntpath os pathlib posixpath shelve shutil stat tarfile tempfile zipapp
        zipfile""",
    "gui": "curses idlelib tkinter turtle turtledemo",
    "language": """_collections_abc _py_abc abc ast code codeop collections compileall contextlib
        copy copyreg ctypes dataclasses dis distutils enum functools importlib inspect modulefinder
        operator pickle pickletools pkgutil platform py_compile pyclbr pydoc runpy site symtable
        sysconfig tokenize types typing venv weakref zipimport""",
    "network": """asynchat asyncore cgi email ftplib hmac http imaplib ipaddress mailbox mailcap
        mimetypes netrc nntplib poplib selectors smtpd smtplib socket socketserver ssl telnetlib
        urllib uuid webbrowser wsgiref xmlrpc""",
    "numbers": """_pydecimal _strptime bisect calendar colorsys datetime decimal fractions graphlib
        heapq numbers random secrets statistics zoneinfo""",
    "testing": """bdb cProfile cgitb cmd doctest logging pdb profile pstats timeit trace traceback
        tracemalloc unittest warnings""",
    "text": """_markupbase argparse base64 codecs configparser csv difflib encodings getopt gettext
        html json locale optparse plistlib pprint quopri re reprlib rlcompleter shlex string
        textwrap tomllib xml""",
}
SHORTEST, LONGEST = 20, 200  # characters


def docstrings(
    seed: int = 0, train_rows: int | None = None, heldout_rows: int | None = None
) -> tuple[Examples, Examples]:
    """(train, held out): what a function or class does, and the part of the library it is in.

    A text is the first paragraph of a docstring, in 20 to 200 characters, with single spaces; no
    text occurs twice, and one that occurs in two topics is left out. The files are read as text
    and never imported. The rows are put in an order set by ``seed``; the first ``heldout_rows``
    are held out (default: a fifth of all), and the next ``train_rows`` train (default: the rest).
    They depend on the Python version, which the notes and the source name.

    Raises:
        UserError: more rows are asked for than there are, or fewer than one.
        EnvironmentFault: the standard library is not there as source files.
    """
    found = _collect()
    held_n = len(found) // 5 if heldout_rows is None else heldout_rows
    train_n = len(found) - held_n if train_rows is None else train_rows
    if held_n < 1 or train_n < 1 or held_n + train_n > len(found):
        raise UserError(
            f"This Python's library has {len(found)} docstrings to share out; asked for {train_n} "
            f"to train on and {held_n} held out. Ask for 1 or more of each, and no more in all."
        )
    names = tuple(sorted(TOPICS))
    version = platform.python_version()
    whole = Examples(
        task="classification",
        source=f"docstrings of Python {version}",
        lines=list(range(1, len(found) + 1)),
        texts=[text for text, _ in found],
        labels=[names.index(topic) for _, topic in found],
        label_names=names,
        columns=("docstring", "topic"),
        notes=(f"Docstrings of Python {version}: {len(found)}. Another version has others.",),
    )
    order = permutation(len(found), seed, "docstrings")
    return whole.subset(order[held_n : held_n + train_n]), whole.subset(order[:held_n])


@cache
def _collect() -> tuple[tuple[str, str], ...]:
    """(text, topic) for every text that has one topic, in order of topic, file and line."""
    library = Path(sysconfig.get_paths()["stdlib"])
    topics: dict[str, set[str]] = {}
    spelled: dict[str, str] = {}
    for topic, modules in TOPICS.items():
        for module in modules.split():
            for file in _sources(library, module):
                for text in _texts(file):
                    topics.setdefault(text.casefold(), set()).add(topic)
                    spelled.setdefault(text.casefold(), text)
    found = tuple((spelled[key], of.pop()) for key, of in topics.items() if len(of) == 1)
    if not found:
        raise EnvironmentFault(
            f"The standard library's source files are not in {library}, so the demo has no data. "
            "Run it with a Python that ships them, or give a file with --data."
        )
    return found


def _sources(library: Path, module: str) -> list[Path]:
    """The module's file, or all files of its package except tests."""
    file = library / f"{module}.py"
    files = [file] if file.is_file() else sorted((library / module).rglob("*.py"))
    return [f for f in files if not {"test", "tests", "idle_test"} & set(f.parts[:-1])]


def _texts(file: Path) -> Iterator[str]:
    """First paragraphs of the docstrings in one file; none when it cannot be parsed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in somebody else's strings
            tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return
    for node in _definitions(tree):
        paragraph = re.split(r"\n\s*\n", ast.get_docstring(node) or "")[0]
        text = " ".join(paragraph.split())
        if SHORTEST <= len(text) <= LONGEST:
            yield text


def _definitions(
    node: ast.AST,
) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Functions and classes below ``node``, at any depth, in the order of the file."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield child
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _definitions(child)
