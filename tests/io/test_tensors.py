"""safetensors files: nothing damaged gets in, and what is written others read."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from rankwise.errors import ArtifactError, RankwiseError, UserError
from rankwise.io.tensors import MAX_HEADER, MAX_TENSORS, read_tensors, write_tensors


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin: int, end: int, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.fixture
def read(tmp_path: Path):
    def from_bytes(content: bytes):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        return read_tensors(path)

    return from_bytes


ALL_DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]


def test_the_library_reads_what_is_written(tmp_path: Path):
    tensors = {str(d): (torch.randn(3, 5) * 10).to(d) for d in ALL_DTYPES}
    tensors |= {
        "transposed": torch.randn(4, 3).T,
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "ä.b": torch.arange(7),
    }
    tensors["shared"] = tensors["transposed"]
    path = write_tensors(tmp_path / "x.safetensors", tensors, {"key": "value"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "key": "value"}


def test_what_the_library_writes_is_read(tmp_path: Path):
    tensors = {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16(), "c": torch.tensor(1)}
    save_file(tensors, tmp_path / "x.safetensors", {"k": "v"})
    found = read_tensors(tmp_path / "x.safetensors")
    assert found.metadata == {"k": "v"}
    assert found.tensors.keys() == tensors.keys()
    assert all(torch.equal(found.tensors[n], t) for n, t in tensors.items())


def test_equal_content_gives_equal_bytes(tmp_path: Path):
    a, b = torch.ones(2), torch.zeros(3, dtype=torch.float64)
    first = write_tensors(tmp_path / "1", {"a": a, "b": b}).read_bytes()
    assert first == write_tensors(tmp_path / "2", {"b": b, "a": a}).read_bytes()


def test_what_cannot_be_written_is_named(tmp_path: Path):
    tensors = {"c": torch.zeros(1, dtype=torch.complex64), "m": torch.zeros(1, device="meta")}
    with pytest.raises(UserError, match=r"(?s)'c' is torch\.complex64.*'m' is a meta tensor"):
        write_tensors(tmp_path / "x", tensors)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_file_is_called_empty(read):
    with pytest.raises(ArtifactError, match="is empty") as found:
        read(b"")
    assert found.value.exit_code == 3


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, MAX_HEADER + 1])
def test_a_monstrous_header_is_refused_before_anything_is_allocated(read, length: int):
    start = time.perf_counter()
    with pytest.raises(ArtifactError, match=f"header claims {length:,} bytes"):
        read(raw(b"{}", length=length))
    assert time.perf_counter() - start < 0.1


def test_a_header_longer_than_the_file_is_a_cut_file(read):
    with pytest.raises(ArtifactError, match=r"the header alone needs 1,008 bytes, the file has 10"):
        read(raw(b"{}", length=1000))
    with pytest.raises(ArtifactError, match="8 bytes at least, this has 3"):
        read(b"abc")


@pytest.mark.parametrize("change", [-1, -17, 1, 900])
def test_cut_and_trailing_bytes_tell_both_numbers(read, change: int):
    whole = save({"a": torch.zeros(5), "b": torch.zeros(7)})
    content = whole[:change] if change < 0 else whole + b"x" * change
    with pytest.raises(ArtifactError, match=f"expected 48 bytes of data, has {48 + change}"):
        read(content)


LAYOUTS = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "'b' overlaps the tensor before it"),
    "same bytes": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "overlaps"),
    "hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "'b' leaves a hole"),
    "hole at the start": ({"a": entry(4, 8)}, 8, "'a' leaves a hole"),
    "negative": ({"a": entry(-4, 0)}, 4, "no valid offsets"),
    "backwards": ({"a": entry(4, 0)}, 4, "no valid offsets"),
    "too short": ({"a": entry(0, 4, [2])}, 4, "needs 8 bytes, its offsets span 4"),
    "overflow": ({"a": entry(0, 4, [2**32, 2**32])}, 4, "no possible shape"),
    "overflow to zero": ({"a": entry(0, 0, [2**62, 4, 0])}, 0, "no possible shape"),
    "negative shape": ({"a": entry(0, 4, [-1])}, 4, "no possible shape"),
    "true for one": ({"a": entry(0, 4, [True])}, 4, "no possible shape"),
    "fractional": ({"a": entry(0, 4, [1.0])}, 4, "no possible shape"),
    "dtype": ({"a": entry(0, 4, [1], "F99")}, 4, "has dtype 'F99'"),
    "no dtype": ({"a": {"shape": [1], "data_offsets": [0, 4]}}, 4, "must be described by dtype"),
    "no object": ({"a": 3}, 0, "described by int"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "__metadata__ must hold texts"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_an_impossible_layout_is_refused(read, case: str):
    header, size, message = LAYOUTS[case]
    with pytest.raises(ArtifactError, match=message):
        read(raw(header, bytes(size)))


def test_all_damage_is_told_at_once(read):
    with pytest.raises(ArtifactError, match=r"(?s)'a' has dtype.*'b' has no possible shape"):
        read(raw({"a": entry(0, 4, [1], "F99"), "b": entry(4, 8, [-1])}, bytes(8)))


def test_a_name_that_occurs_twice_is_refused_where_the_library_lets_it_pass(read, tmp_path: Path):
    one = json.dumps(entry(0, 4))
    content = raw(f'{{"a":{one},"a":{one}}}'.encode(), bytes(4))
    (tmp_path / "twice").write_bytes(content)
    assert list(load_file(tmp_path / "twice")) == ["a"]
    with pytest.raises(ArtifactError, match="the key 'a' occurs twice"):
        read(content)


@pytest.mark.parametrize("spelling", ["data_offsets", "data_\\u006fffsets"])
def test_a_flood_of_tensors_is_refused(read, spelling: str):
    part = f'"dtype":"F32","shape":[0],"{spelling}":[0,0]'
    text = "{" + ",".join(f'"{i}":{{{part}}}' for i in range(200_000)) + "}"
    with pytest.raises(ArtifactError, match=f"200,000 tensors; more than {MAX_TENSORS:,}"):
        read(raw(text.encode()))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 200_000, "nested too deeply"),
        (b"not json", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b"[]", "must be a JSON object, not list"),
        (b"9" * 10_000, "not valid JSON"),
        (b"", "not valid JSON"),
    ],
)
def test_a_header_that_is_no_header_is_refused(read, header: bytes, message: str):
    with pytest.raises(ArtifactError, match=message):
        read(raw(header))


def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    tensors = {"fine": torch.ones(2), "nan": torch.tensor([1, float("nan")]).half()}
    tensors["inf"] = torch.tensor([float("-inf")] * 3, dtype=torch.bfloat16)
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match=r"(?s)'(inf|nan)' has (3 of 3|1 of 2)") as found:
        read_tensors(path)
    assert "fine" not in str(found.value)
    assert "'inf' has 3 of 3" in str(found.value)
    assert "'nan' has 1 of 2" in str(found.value)
    assert read_tensors(path, allow_nonfinite=True).tensors.keys() == tensors.keys()


def test_a_missing_file_is_the_users_mistake_and_names_the_nearest(tmp_path: Path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=r"Did you mean 'adapter_model\.safetensors'\?"):
        read_tensors(tmp_path / "adapter_model.safetensor")
    with pytest.raises(UserError, match="is a folder"):
        read_tensors(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="not a regular file"):
        read_tensors(tmp_path / "pipe")


SOUND = save({"a": torch.ones(2, 3), "b.weight": torch.ones(1).half()}, {"k": "v"})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F8_E4M3", "C64"]) | JSON,
        "shape": st.lists(st.integers(-1, 3) | st.integers(), max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 30) | st.integers(), min_size=2, max_size=2),
    }
)


def only_our_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = read_tensors(path)
    except RankwiseError as error:
        str(error).encode("utf-8")
    else:
        assert sum(t.numel() * t.element_size() for t in found.tensors.values()) <= len(content)


@settings(
    max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)
@given(
    content=st.one_of(
        st.binary(max_size=300),
        st.tuples(st.dictionaries(st.text(), ENTRY | JSON, max_size=3), st.binary(max_size=40)).map(
            lambda parts: raw(parts[0], parts[1])
        ),
        st.tuples(st.integers(0, len(SOUND) - 1), st.binary(max_size=9)).map(
            lambda change: SOUND[: change[0]] + change[1] + SOUND[change[0] + len(change[1]) :]
        ),
    )
)
def test_arbitrary_bytes_give_tensors_or_our_errors(tmp_path: Path, content: bytes):
    only_our_errors(tmp_path / "x.safetensors", content)
