"""Files and folders appear whole or not at all."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import rankwise
from rankwise.errors import EnvironmentFault, UserError
from rankwise.io import files


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


def test_a_file_is_written_with_its_parents_and_nothing_else_stays(tmp_path: Path):
    path = files.write_text(tmp_path / "a" / "b.txt", "zwei\n")
    assert path.read_bytes() == b"zwei\n"
    assert names(path.parent) == ["b.txt"]


def test_the_mode_follows_the_umask(tmp_path: Path, umask: int):
    files.write_bytes(tmp_path / "file", b"1")
    with files.folder(tmp_path / "folder") as inside:
        files.write_bytes(inside / "file", b"1")
    modes = {n: (tmp_path / n).stat().st_mode & 0o777 for n in ("file", "folder", "folder/file")}
    assert modes == {
        "file": 0o666 & ~umask,
        "folder": 0o777 & ~umask,
        "folder/file": 0o666 & ~umask,
    }


def test_json_keeps_the_order_of_its_keys_and_refuses_nan(tmp_path: Path):
    path = files.write_json(tmp_path / "x.json", {"b": 1, "a": "ä"})
    assert list(json.loads(path.read_text("utf-8"))) == ["b", "a"]
    with pytest.raises(UserError, match=r"x\.json: this cannot be written as JSON"):
        files.write_json(path, {"a": float("nan")})
    assert list(json.loads(path.read_text("utf-8"))) == ["b", "a"]


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_an_interrupt_keeps_the_old_file_and_removes_the_new(tmp_path: Path):
    path = files.write_text(tmp_path / "x", "old")

    def chunks():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_chunks(path, chunks())
    assert path.read_text() == "old"
    assert names(tmp_path) == ["x"]


# A process of its own imports the files room alone, without torch, which takes seconds.
ALONE = """
import sys, types
package = types.ModuleType("rankwise")
package.__path__ = [sys.argv.pop(1)]
sys.modules["rankwise"] = package
"""


def alone(code: str, *arguments: str) -> list[str]:
    package = Path(rankwise.__file__).parent
    return [sys.executable, "-c", ALONE + code, str(package), *arguments]


LIMITED = """
import resource, sys
from rankwise.errors import EnvironmentFault
from rankwise.io import files
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    if sys.argv[2] == "file":
        files.write_bytes(sys.argv[1], b"x" * 5000)
    else:
        with files.folder(sys.argv[1]) as inside:
            files.write_bytes(inside / "small", b"x")
            files.write_bytes(inside / "large", b"x" * 5000)
except EnvironmentFault as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of file size are set as on Linux")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_full_disk_keeps_the_old_and_leaves_nothing_behind(tmp_path: Path, kind: str):
    # A limit on file size fails in write(2) as a full disk does, and needs no disk.
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").write_text("old")
    done = subprocess.run(
        alone(LIMITED, str(target), kind), capture_output=True, text=True, check=False
    )
    assert done.returncode == 4, done.stderr
    assert "File too large" in done.stdout
    assert "unchanged" in done.stdout
    assert "ulimit" in done.stdout
    assert names(tmp_path) == ["target"]
    kept = target if kind == "file" else target / "old"
    assert kept.read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody may write to")
def test_a_folder_that_cannot_be_written_to_is_a_fault_of_the_machine():
    with pytest.raises(EnvironmentFault, match="was not written") as found:
        files.write_text("/proc/rankwise-test", "x")
    assert found.value.exit_code == 4
    with pytest.raises(EnvironmentFault, match="was not written"), files.folder("/proc/rankwise"):
        pass


def test_a_name_that_is_too_long_says_so(tmp_path: Path):
    with pytest.raises(EnvironmentFault, match="Choose a shorter name"):
        files.write_text(tmp_path / ("x" * 300), "x")
    assert names(tmp_path) == []


def test_a_folder_in_the_place_of_a_file_is_the_users_mistake(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="folder' cannot be written: Is a directory"):
        files.write_text(tmp_path / "folder", "x")
    with pytest.raises(UserError, match="file' cannot be written"), files.folder(tmp_path / "file"):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        files.write_text(tmp_path / "file" / "below", "x")
    assert names(tmp_path) == ["file", "folder"]


def test_a_folder_appears_at_the_end_of_the_block(tmp_path: Path):
    target = tmp_path / "adapter"
    with files.folder(target) as inside:
        files.write_text(inside / "a", "1")
        assert not target.exists()
    assert names(target) == ["a"]
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_folder_is_replaced_as_a_whole(tmp_path: Path, monkeypatch, can_swap: bool):
    if not can_swap:  # as where the system has no renameat2
        monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    target = tmp_path / "adapter"
    for name in ("first", "second"):
        with files.folder(target) as inside:
            files.write_text(inside / name, name)
    assert names(target) == ["second"]
    assert names(tmp_path) == ["adapter"]


def test_without_a_swap_the_old_folder_comes_back_when_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setattr("ctypes.CDLL", lambda *_, **__: object())
    target = tmp_path / "adapter"
    with files.folder(target) as inside:
        files.write_text(inside / "old", "old")
    rename, calls = Path.rename, []

    def failing(self: Path, other: Path) -> Path:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(EnvironmentFault, match="Input/output error"), files.folder(target) as new:
        files.write_text(new / "new", "new")
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_a_block_that_fails_leaves_the_old_folder(tmp_path: Path):
    target = tmp_path / "adapter"
    with files.folder(target) as inside:
        files.write_text(inside / "old", "old")

    def interrupted() -> None:
        with files.folder(target) as inside:
            files.write_text(inside / "half", "x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(target) == ["old"]
    assert names(tmp_path) == ["adapter"]


def test_the_folder_a_process_works_in_is_not_replaced(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Name a new folder inside it"), files.folder("."):
        pass


KILLED = """
import os, sys
from rankwise.io import files
n = 0
while True:
    n += 1
    with files.folder(sys.argv[1]) as inside:
        for name in ("a", "b"):
            files.write_text(inside / name, str(n))
    print(n, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux swaps folders in one step")
def test_a_killed_process_leaves_one_whole_folder(tmp_path: Path):
    target = tmp_path / "adapter"
    for _ in range(5):
        process = subprocess.Popen(alone(KILLED, str(target)), stdout=subprocess.PIPE)
        with process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(200):  # the reader never finds it missing or mixed
                descriptor = os.open(target, os.O_RDONLY)
                os.close(descriptor)
            process.kill()
        assert names(target) == ["a", "b"]
        assert (target / "a").read_text() == (target / "b").read_text()


def test_sha256_is_the_one_of_hashlib(tmp_path: Path):
    content = os.urandom(3 << 20)
    path = files.write_bytes(tmp_path / "x", content)
    assert files.sha256_file(path) == hashlib.sha256(content).hexdigest()


def test_a_missing_file_names_its_neighbours(tmp_path: Path):
    (tmp_path / "adapter").mkdir()
    with pytest.raises(UserError, match=r"There is no 'adaptor' in .* Did you mean 'adapter'\?"):
        files.sha256_file(tmp_path / "adaptor")
    with pytest.raises(UserError, match="no more of it"):
        files.sha256_file(tmp_path / "no" / "such" / "file")
    with pytest.raises(UserError, match="is a folder"):
        files.sha256_file(tmp_path / "adapter")


def test_a_name_with_a_null_byte_is_no_path(tmp_path: Path):
    with pytest.raises(UserError, match="is no path"):
        files.write_text(f"{tmp_path}/a\0b", "x")


def test_text_is_added_to_the_end(tmp_path):
    file = tmp_path / "log"
    assert files.append_text(file, "a\n") == 2
    assert files.append_text(file, "é\n") == 5
    assert file.read_bytes() == "a\né\n".encode()


def test_a_part_of_a_line_is_taken_back(tmp_path):
    """A limit on the file's size stands for a disk that is full in the middle of a line."""
    resource = pytest.importorskip("resource")
    file = tmp_path / "log"
    files.append_text(file, "a" * 90)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        with pytest.raises(EnvironmentFault, match="ulimit"):
            files.append_text(file, "b" * 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert file.read_text() == "a" * 90
