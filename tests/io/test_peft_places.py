"""Where the tensors of a file belong."""

import torch

from rankwise.io.peft_config import PeftConfig
from rankwise.io.peft_keys import named
from rankwise.io.peft_layout import Notes
from rankwise.io.peft_meaning import meaning
from rankwise.io.peft_names import Rule
from rankwise.io.peft_places import Places, mismatch, place

A, B = torch.ones(2, 8), torch.ones(8, 2)
QUERY = "base_model.model.blocks.0.query"
SOUND = {
    f"{QUERY}.lora_A.weight": A,
    f"{QUERY}.lora_B.weight": B,
    "base_model.model.embed.lora_embedding_A": torch.ones(2, 20),
    "base_model.model.embed.lora_embedding_B": B,
    "base_model.model.head.weight": torch.ones(3, 8),
    "base_model.model.head.bias": torch.ones(3),
    "base_model.model.embed.base_layer.weight": torch.ones(20, 8),
}


def placed(model, tensors, targets=("0.query", "embed"), saved=("head",), **options) -> Places:
    rule = Rule(tuple(targets), modules_to_save=tuple(saved))
    config = PeftConfig(rule, 2, 4.0, {}, {}, **options)
    notes = Notes()
    return place(named(tensors), config, notes, meaning(config, notes, model, None))


def test_each_tensor_finds_its_place(base):
    found = placed(base(), SOUND)
    assert found.problems == []
    assert found.forms["blocks.0.query"]["lora_B.weight"] is B
    assert list(found.forms["embed"]) == ["lora_embedding_A", "lora_embedding_B"]
    assert list(found.trained) == ["head.weight", "head.bias"]
    assert list(found.base) == ["embed.weight"]


def test_biases_magnitudes_and_rows_find_theirs(base):
    more = {
        f"{QUERY}.lora_magnitude_vector": torch.ones(8),
        "base_model.model.embed.lora_magnitude_vector": torch.ones(8),
        f"{QUERY}.base_layer.bias": torch.ones(8),
    }
    found = placed(base(), {**SOUND, **more}, dora=True, bias="lora_only")
    assert found.problems == []
    assert list(found.magnitudes) == ["embed", "blocks.0.query"]
    assert list(found.biases) == ["blocks.0.query.bias"]
    rows = {
        f"{QUERY}.lora_A.weight": A,
        f"{QUERY}.lora_B.weight": B,
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 8),
    }
    found = placed(base(), rows, targets=("0.query",), saved=(), tokens={"embed": (1, 2)})
    assert found.problems == []
    assert list(found.tokens) == ["embed"]


def test_what_is_missing_or_of_another_shape_is_told(base):
    lacking = {k: t for k, t in SOUND.items() if not k.endswith("lora_B.weight")}
    assert placed(base(), lacking).problems == [
        "target_modules means 'blocks.0.query', and the file has no lora_B for it."
    ]
    problems = placed(base(), SOUND, dora=True, bias="lora_only").problems
    assert problems[:2] == [
        "the file has no lora_magnitude_vector of 'embed'.",
        "the file has no lora_magnitude_vector of 'blocks.0.query'.",
    ]
    assert "the file has no bias for 'blocks.0.query.bias': it was lost" in problems[2]
    wrong = {**SOUND, f"{QUERY}.lora_magnitude_vector": torch.ones(3)}
    assert "has shape (3,), expected (8,)" in placed(base(), wrong, dora=True).problems[1]


def test_what_is_switched_off_has_no_place(base):
    more = {
        f"{QUERY}.lora_magnitude_vector": torch.ones(8),
        f"{QUERY}.lora_B.bias": torch.ones(8),
        f"{QUERY}.lora_diag": torch.ones(2),
        f"{QUERY}.lora_monteclora_sampler.x": torch.ones(2),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": torch.ones(2, 8),
    }
    reasons = [
        "use_dora is off",
        "lora_bias is off",
        "KaSA",
        "MonteCLoRA",
        "trainable_token_indices",
    ]
    problems = placed(base(), {**SOUND, **more}).problems
    assert len(problems) == len(reasons)
    assert all(reason in p for reason, p in zip(reasons, problems, strict=True))


def test_a_copy_that_is_there_twice_must_be_the_same(base):
    again = {"base_model.model.head.modules_to_save.default.bias": torch.ones(3)}
    assert placed(base(), {**SOUND, **again}).problems == []
    other = {"base_model.model.head.modules_to_save.bias": torch.zeros(3)}
    (problem,) = placed(base(), {**SOUND, **other}).problems
    assert problem == "'head.bias' is there twice, with other numbers."


def test_many_lost_tensors_are_told_quickly(base):
    # Looking for the nearest name takes milliseconds, so only the first few get a hint.
    lost = {f"base_model.model.nowhere.{i}.lora_A.weight": A for i in range(5000)}
    problems = placed(base(), {**SOUND, **lost}).problems
    assert len(problems) == 5000
    assert sum("Did you mean" in problem for problem in problems) <= 3


def test_a_buffer_of_whole_numbers_stays_one():
    assert mismatch(torch.tensor(3), torch.tensor(0)) is None
    assert mismatch(torch.ones(2).half(), torch.ones(2)) is None
    assert "floating-point" in (mismatch(torch.tensor(3), torch.tensor(0.5)) or "")
    assert "has shape (2,), and (3,)" in (mismatch(torch.ones(2), torch.ones(3)) or "")
