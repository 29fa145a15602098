import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.errors import EnvironmentFault, UserError
from rankwise.train.folder import claim, refuse_used

HOLD = """
import sys, time
from pathlib import Path
from rankwise.train.folder import claim
with claim(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_that_is_not_there_or_empty_may_be_used(tmp_path: Path) -> None:
    refuse_used(tmp_path / "new")
    refuse_used(tmp_path)


def test_a_lock_that_a_killed_run_left_is_no_use(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text("12345")
    refuse_used(tmp_path)


def test_anything_else_is(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not empty"):
        refuse_used(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        refuse_used(tmp_path / "notes.txt")
    (tmp_path / "manifest.json").touch()
    with pytest.raises(UserError, match=r"holds a run already\. Go on with it: .*--resume"):
        refuse_used(tmp_path)


def test_one_process_holds_a_folder_until_it_dies(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid}"), claim(folder):
            pass
        holder.kill()
    with claim(folder):
        assert (folder / "run.lock").read_text() == str(os.getpid())
        with pytest.raises(UserError, match=f"process {os.getpid()}"), claim(folder):
            pass
    with claim(folder):
        pass


def test_what_a_killed_run_was_writing_is_swept_away(tmp_path: Path) -> None:
    half_done = [
        tmp_path / ".adapter.1-ab.tmp",
        tmp_path / "checkpoints" / ".step-00000003.1-ab.tmp",
    ]
    for folder in half_done:
        folder.mkdir(parents=True)
        (folder / "tensors.safetensors").touch()
    (tmp_path / ".manifest.json.1-ab.tmp").touch()
    kept = tmp_path / "checkpoints" / "step-00000002"
    kept.mkdir()
    with claim(tmp_path):
        names = {p.name for p in tmp_path.rglob("*")}
    assert names == {"run.lock", "checkpoints", kept.name}


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentFault, match="cannot be written"), claim(tmp_path / "file" / "x"):
        pass
