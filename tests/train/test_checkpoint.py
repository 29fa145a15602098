import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rankwise.errors import ArtifactError
from rankwise.methods.groups import parameter_groups
from rankwise.train import checkpoint
from rankwise.train.checkpoint import Progress
from rankwise.train.optim import adamw, set_rate

CPU = torch.device("cpu")
Trained = tuple[nn.Module, dict[str, nn.Parameter], torch.optim.Optimizer]


def network() -> Trained:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2, bias=False))
    parameters = dict(model.named_parameters())
    return model, parameters, adamw(parameter_groups(model, 0.0, weight_decay=0.01))


def step(trained: Trained) -> None:
    model, _, optimizer = trained
    set_rate(optimizer, 0.1)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save(folder: Path, trained: Trained, number: int, keep: int = 9) -> Path:
    progress = Progress(micro_batch=4, step=number, best=float("nan"), live=("a", "b"))
    return checkpoint.save(folder, progress, trained[1], trained[2], CPU, keep)


def load(folder: Path, trained: Trained) -> tuple[Progress | None, list[str]]:
    return checkpoint.load_newest(folder, trained[1], trained[2], CPU)


def state(trained: Trained) -> dict[str, torch.Tensor]:
    _, parameters, optimizer = trained
    found = {n: p.detach().clone() for n, p in parameters.items()}
    for name, parameter in parameters.items():
        found |= {f"{k} {name}": t.clone() for k, t in optimizer.state[parameter].items()}
    return found


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_another_process_goes_on_as_this_one_would_have(tmp_path: Path) -> None:
    here, there = network(), network()
    for _ in range(3):
        step(here)
    random.random()
    np.random.rand(3)
    np.random.randn()  # NumPy keeps the second of two normal numbers for later
    random.gauss(0, 1)
    save(tmp_path, here, 3)
    draws = (
        random.random(),
        random.gauss(0, 1),
        np.random.randn(),
        np.random.rand(),
        torch.rand(2),
    )
    step(here)
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    progress, notes = load(tmp_path, there)
    assert progress is not None
    assert (progress.step, progress.micro_batch, progress.live, notes) == (3, 4, ("a", "b"), [])
    assert progress.window == (0.0, 0)
    again = (
        random.random(),
        random.gauss(0, 1),
        np.random.randn(),
        np.random.rand(),
        torch.rand(2),
    )
    assert again[:4] == draws[:4]
    assert torch.equal(again[4], draws[4])
    step(there)
    assert same(state(here), state(there))


def test_before_the_first_step_there_is_no_optimiser_state(tmp_path: Path) -> None:
    here, there = network(), network()
    save(tmp_path, here, 0)
    load(tmp_path, there)
    assert all(torch.equal(here[1][n], p) for n, p in there[1].items())
    assert not there[2].state


def test_the_newest_are_kept(tmp_path: Path) -> None:
    trained = network()
    for number in (1, 2, 10, 100):
        save(tmp_path, trained, number, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(bytes(raw))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "complete.json"])
@pytest.mark.parametrize("harm", [cut, flip, Path.unlink, lambda p: p.write_bytes(b"")])
def test_a_damaged_newest_is_passed_over(
    tmp_path: Path, name: str, harm: Callable[[Path], None]
) -> None:
    trained, other = network(), network()
    step(trained)
    save(tmp_path, trained, 1)
    wanted = state(trained)
    step(trained)
    harm(save(tmp_path, trained, 2) / name)
    progress, notes = load(tmp_path, other)
    assert progress is not None
    assert progress.step == 1
    assert same(state(other), wanted)
    assert len(notes) == 1
    assert "step-00000002 is damaged and passed over" in notes[0]


def test_when_all_are_damaged_nothing_is_touched(tmp_path: Path) -> None:
    trained, other = network(), network()
    for number in (1, 2):
        step(trained)
        flip(save(tmp_path, trained, number) / "tensors.safetensors")
    before = state(other)
    with pytest.raises(ArtifactError, match=r"step-00000002.*step-00000001") as caught:
        load(tmp_path, other)
    assert caught.value.exit_code == 3
    assert same(state(other), before)


def test_none_yet_is_no_fault(tmp_path: Path) -> None:
    assert load(tmp_path / "checkpoints", network()) == (None, [])


def test_a_folder_of_a_temporary_name_is_no_checkpoint(tmp_path: Path) -> None:
    trained = network()
    made = save(tmp_path, trained, 7)
    made.rename(tmp_path / ".step-00000007.123-abcd.tmp")
    (tmp_path / "step-notes").mkdir()
    assert load(tmp_path, trained) == (None, [])


def test_a_write_that_fails_half_way_leaves_what_was_there(tmp_path: Path) -> None:
    trained = network()
    save(tmp_path, trained, 1)
    unwritable = Progress(micro_batch=4, step=2, best_metrics={"loss": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, unwritable, trained[1], trained[2], CPU, 9)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_parameters_of_another_run_do_not_fit(tmp_path: Path) -> None:
    save(tmp_path, network(), 1)
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 4, bias=False))
    parameters = dict(model.named_parameters())
    with pytest.raises(ArtifactError, match="other parameters"):
        checkpoint.load_newest(tmp_path, parameters, adamw(parameter_groups(model, 0.0)), CPU)


def test_a_checkpoint_of_another_format_is_not_guessed_at(tmp_path: Path) -> None:
    from rankwise.io.files import sha256_file

    folder = save(tmp_path, network(), 1)
    told = json.loads((folder / "state.json").read_text()) | {"format": 2}
    (folder / "state.json").write_text(json.dumps(told))
    seal = {n: sha256_file(folder / n) for n in ("tensors.safetensors", "state.json")}
    (folder / "complete.json").write_text(json.dumps(seal))
    with pytest.raises(ArtifactError, match="another version"):
        load(tmp_path, network())


def test_damaged_ones_of_later_steps_make_room(tmp_path: Path) -> None:
    """After a fall-back they would be the newest, and crowd out what is written from then on."""
    trained = network()
    for number in (1, 5, 9):
        save(tmp_path, trained, number)
    cut(tmp_path / "step-00000009" / "state.json")
    cut(tmp_path / "step-00000005" / "state.json")
    assert load(tmp_path, trained)[0] is not None
    save(tmp_path, trained, 2, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    progress, notes = load(tmp_path, network())
    assert progress is not None
    assert (progress.step, notes) == (2, [])


def test_a_generator_of_another_device_is_left_alone() -> None:
    """What a GPU's generator saw says nothing to a CPU, which has no second generator to set."""
    seen = checkpoint.capture_rng(CPU)
    wanted = torch.rand(3)
    checkpoint.restore_rng(seen | {"device": torch.zeros(16, dtype=torch.uint8)}, CPU)
    assert torch.equal(torch.rand(3), wanted)
