"""One door for every method: where it saves, what it replaces, what it finds."""

import copy
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise as rw
from rankwise.errors import ArtifactError, UserError
from rankwise.inits import PiSSA
from rankwise.io.adapters import load_adapter, save_adapter
from rankwise.methods.combining import SVD, combine


class Copies(TorchDispatchMode):
    """Notes the shapes of what is copied or made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func.name() in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::empty_like"):
            self.seen.append(tuple(made.shape))
        return made


def content(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_saving_and_loading_are_inverse(saved: Path, base, trained, ids, tmp_path: Path):
    load_adapter(model := base(), saved)
    assert torch.equal(model.eval()(ids), trained()(ids))
    again = save_adapter(model, tmp_path / "again")
    assert content(again) == content(saved)
    rw.detach(model)
    assert torch.equal(model(ids), base()(ids))


def test_an_adapter_is_replaced_by_another_of_any_kind(saved: Path, trained, base):
    save_adapter(trained(rw.HeadOnly()), saved)
    assert set(content(saved)) == {"rankwise.json", "trained.safetensors"}
    save_adapter(trained(), saved)
    assert set(content(saved)) == {"adapter_config.json", "adapter_model.safetensors"}
    load_adapter(base(), saved)


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path: Path, trained):
    (tmp_path / "empty").mkdir()
    assert save_adapter(trained(), tmp_path / "empty") == tmp_path / "empty"
    assert save_adapter(trained(), str(tmp_path / "a" / "b" / "c")) == tmp_path / "a" / "b" / "c"


@pytest.mark.parametrize("with_adapter", [True, False])
def test_other_files_are_never_removed(saved: Path, trained, with_adapter: bool):
    (saved / "notes.txt").write_text("mine")
    if not with_adapter:
        (saved / "adapter_config.json").unlink()
    before = content(saved)
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\)") as found:
        save_adapter(trained(rw.HeadOnly()), saved)
    assert found.value.exit_code == 2
    assert content(saved) == before


def test_a_file_in_the_place_of_the_folder_is_kept(tmp_path: Path, trained):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        save_adapter(trained(), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


def test_a_bare_or_merged_model_has_nothing_to_save(tmp_path: Path, base):
    with pytest.raises(UserError, match="carries no adapter"):
        save_adapter(base(), tmp_path / "a")


def test_a_name_is_given_once(saved: Path, trained):
    with pytest.raises(UserError, match="carries an adapter already, and it is named 'default'"):
        load_adapter(trained(), saved)


def test_several_adapters_are_loaded_and_saved_by_name(saved: Path, trained, base, ids, tmp_path):
    other = rw.LoRA(r=3, target_modules=["fc", "embed"], bias="adapted", head="freeze")
    second = save_adapter(trained(other), tmp_path / "second")
    load_adapter(model := base(), saved, name="one")
    load_adapter(model, second, name="two")
    assert list(rw.attachments(model)) == ["one", "two"]
    with pytest.raises(UserError, match="several adapters; name one of one, two"):
        save_adapter(model, tmp_path / "a")
    for name, folder in (("one", saved), ("two", second)):
        assert content(save_adapter(model, tmp_path / name, name=name)) == content(folder)
    rw.set_active(model, "two")
    assert torch.equal(model.eval()(ids), trained(other)(ids))


def test_heads_are_saved_and_loaded_by_name(trained, base, ids, tmp_path: Path):
    folder = save_adapter(trained(rw.HeadOnly()), tmp_path / "head")
    load_adapter(model := base(), folder, name="one")
    before = {k: t.clone() for k, t in model.head.state_dict().items()}
    load_adapter(model, folder, name="two")
    assert not rw.attachments(model)["two"].active
    assert all(torch.equal(t, before[k]) for k, t in model.head.state_dict().items())
    rw.attachments(model)["two"].copies["head"].bias.data += 1
    assert content(save_adapter(model, tmp_path / "one", name="one")) == content(folder)
    assert content(save_adapter(model, tmp_path / "two", name="two")) != content(folder)
    rw.detach(model)
    assert torch.equal(model.eval()(ids), base().eval()(ids))


def test_an_adapter_that_is_not_on_the_model_is_saved(trained, base, ids, tmp_path: Path):
    """A start of rank 4 is a pair of rank 8; cut to 4 again, with the error told."""
    model = trained(rw.LoRA(r=4, target_modules=["query"], init=PiSSA(), head="train"))
    cut = combine([rw.adapter_of(model)], how=SVD(r=4))
    assert 0 < cut.error < 1
    folder = save_adapter(base(), tmp_path / "a", adapter=cut.adapter)
    load_adapter(again := base(), folder)
    rw.attach(expected := base(), cut.adapter)
    assert torch.equal(again.eval()(ids), expected.eval()(ids))
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["init_lora_weights"]) == (4, True)
    with pytest.raises(UserError, match="not both"):
        save_adapter(model, tmp_path / "b", name="default", adapter=cut.adapter)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "a\0b", "C:x", "", "a.b"])
def test_a_name_is_no_path(saved: Path, base, name: str):
    model = base()
    with pytest.raises(UserError, match="An adapter's name has letters, digits"):
        load_adapter(model, saved, name=name)
    assert [type(m) for m in model.modules()] == [type(m) for m in base().modules()]


def test_a_merged_model_takes_no_adapter(saved: Path, trained, tmp_path: Path):
    model = trained()
    rw.merge(model)
    with pytest.raises(UserError, match=r"is merged; call rankwise\.unmerge"):
        load_adapter(model, saved, name="two")
    with pytest.raises(UserError, match="is merged"):
        save_adapter(model, tmp_path / "a")


def test_the_one_adapter_in_a_folder_is_found(saved: Path, base, tmp_path: Path):
    shutil.copytree(saved, tmp_path / "run" / "checkpoint-20")
    (tmp_path / "run" / "logs").mkdir()
    load_adapter(base(), tmp_path / "run")
    shutil.copytree(saved, tmp_path / "run" / "checkpoint-10")
    with pytest.raises(UserError, match=r"several adapters; name one: .*checkpoint-10, .*-20"):
        load_adapter(base(), tmp_path / "run")
    load_adapter(base(), tmp_path / "run" / "checkpoint-10")


def test_a_folder_without_an_adapter_says_what_it_holds(tmp_path: Path, base):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ArtifactError, match=r"holds no adapter.*It holds: model\.safetensors"):
        load_adapter(base(), tmp_path)
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ArtifactError, match="Its weights are there without it"):
        load_adapter(base(), tmp_path)


def test_a_name_of_the_hub_is_not_fetched(saved: Path, base, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(UserError, match="fetches nothing: download an adapter of the hub first"):
        load_adapter(base(), "someone/their-adapter")
    load_adapter(base(), saved)


def test_a_file_is_not_a_folder(saved: Path, base):
    with pytest.raises(UserError, match=r"is a file; name the folder it is in"):
        load_adapter(base(), saved / "adapter_model.safetensors")


def test_a_mapped_adapter_copies_nothing_and_leaves_its_file_as_it_is(saved: Path, base, ids):
    before = content(saved)
    load_adapter(plain := base(), saved)
    with Copies() as copies:
        load_adapter(model := base(), saved, mmap=True)
    assert not {(2, 8), (8, 2)} & set(copies.seen)  # A and B; the head is the model's own copy
    assert_same(model, plain)
    for step in range(2):  # trained in place, as an optimiser does
        model(ids).square().sum().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=0.1 + step)
    assert not torch.allclose(model(ids), plain(ids))
    assert content(saved) == before
    load_adapter(again := base(), saved, mmap=True)
    assert_same(again, plain)


def test_a_mapped_adapter_outlives_its_folder_and_its_replacement(saved: Path, base, trained):
    load_adapter(plain := base(), saved)
    load_adapter(model := base(), saved, mmap=True)
    save_adapter(trained(rw.LoRA(r=3, target_modules=["fc"], head="freeze")), saved)
    assert_same(model, plain)
    shutil.rmtree(saved)
    assert_same(model, plain)
    assert_same(copy.deepcopy(model), plain)


@pytest.mark.parametrize("more", [{"init": PiSSA()}, {"dora": True}])
def test_a_mapped_adapter_with_a_start_of_its_own_or_a_magnitude(more, tmp_path, base, trained):
    method = rw.LoRA(r=2, target_modules=["fc"], head="freeze", **more)
    saved = save_adapter(trained(method), tmp_path / "a")
    load_adapter(plain := base(), saved)
    load_adapter(model := base(), saved, mmap=True)
    assert_same(model, plain)


def assert_same(model: torch.nn.Module, other: torch.nn.Module) -> None:
    """The same state bit for bit; products over rows at other addresses may differ by roundings."""
    there = other.state_dict()
    assert model.state_dict().keys() == there.keys()
    assert all(torch.equal(t, there[n]) for n, t in model.state_dict().items())
