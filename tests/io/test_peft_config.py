"""adapter_config.json: what is believed, and what is refused by name."""

import json
from pathlib import Path

import pytest
from peft import LoraConfig

from rankwise.errors import ArtifactError, UserError
from rankwise.io.peft_config import read_config

PLAIN = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["query"]}


@pytest.fixture
def read(tmp_path: Path):
    def parse(content: object, **changes: object):
        path = tmp_path / "adapter_config.json"
        if isinstance(content, dict):
            whole = {**content, **changes}
            text = json.dumps({k: v for k, v in whole.items() if v != "absent"})
            path.write_text(text, "utf-8")
        else:
            assert isinstance(content, bytes)
            path.write_bytes(content)
        return read_config(path)

    return parse


def test_a_plain_configuration(read):
    config = read(PLAIN, rank_pattern={"a": 2}, alpha_pattern={"b": 0.5}, modules_to_save=["head"])
    assert (config.r, config.alpha, config.dropout, config.rank_stabilized) == (4, 8.0, 0.0, False)
    assert config.rule.target_modules == ("query",)
    assert config.rule.modules_to_save == ("head",)
    assert (config.rank_pattern, config.alpha_pattern) == ({"a": 2}, {"b": 0.5})


def test_every_plain_option_of_peft_is_understood(tmp_path: Path):
    LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["query"],
        exclude_modules=r".*\.a",
        lora_dropout=0.1,
        use_rslora=True,
        task_type="SEQ_CLS",
        layers_to_transform=[1, 2],
        layers_pattern="layer",
        init_lora_weights="gaussian",
        base_model_name_or_path="some/base",
    ).save_pretrained(tmp_path)
    config = read_config(tmp_path / "adapter_config.json")
    assert (config.r, config.alpha, config.dropout, config.rank_stabilized) == (3, 5.0, 0.1, True)
    assert config.rule.target_modules == ("query",)
    assert config.rule.exclude_modules == r".*\.a"
    assert (config.rule.layers, config.rule.layers_pattern) == ((1, 2), ("layer",))
    assert config.base_model_name == "some/base"


NO_CONFIG = {
    "empty": (b"", "is empty"),
    "text": (b"hello", "not valid JSON"),
    "a list": (b"[1]", "must be a JSON object, not list"),
    "no type": (b"{}", "it has no peft_type"),
    "other type": (b'{"peft_type": "FOO"}', "peft_type is \"FOO\", and 'LORA' is needed"),
    "twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', "the key 'r' occurs twice"),
    "deep": (b'{"a":' * 150_000, "nested too deeply"),
    "wide": (b'{"a": "' + b"x" * 50_000_000 + b'"}', "is larger than 1,000,000 bytes"),
    "nan": (b'{"peft_type": "LORA", "lora_alpha": NaN}', "NaN is not JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not valid JSON"),
}


@pytest.mark.parametrize("case", NO_CONFIG)
def test_what_is_no_configuration_is_refused(read, case: str):
    content, message = NO_CONFIG[case]
    with pytest.raises(ArtifactError, match=message) as found:
        read(content)
    assert found.value.exit_code == 3
    assert "adapter_config.json" in str(found.value)
    assert len(str(found.value)) < 500


WRONG = [
    ({"r": 0}, r"r must be a whole number of 1 or more, and is 0\."),
    ({"r": -1}, r"and is -1\."),
    ({"r": "4"}, r'and is "4"\.'),
    ({"r": 1e9}, r"and is 1000000000\.0\."),
    ({"r": True}, r"and is true\."),
    ({"r": "absent"}, "r is missing"),
    ({"lora_alpha": "absent"}, "lora_alpha is missing, and the update is scaled by"),
    ({"lora_alpha": -1}, "lora_alpha must be a finite number above 0, and is -1"),
    ({"lora_alpha": 0}, r"and is 0\."),
    ({"lora_alpha": "16"}, 'and is "16"'),
    ({"lora_alpha": None}, r"and is null\."),
    ({"lora_alpha": 10**400}, "lora_alpha must be a finite number"),
    ({"rank_pattern": {"a": 0}}, "rank_pattern: 'a' is 0"),
    ({"rank_pattern": [1]}, "rank_pattern must map names to numbers"),
    ({"alpha_pattern": {"a": "x"}}, "alpha_pattern: 'a' is \"x\""),
    ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and below 1"),
    ({"target_modules": "absent"}, "target_modules is missing"),
    ({"target_modules": []}, "target_modules is missing"),
    ({"target_modules": [1]}, "target_modules must be a list of names"),
    ({"modules_to_save": "head"}, "modules_to_save must be a list of names"),
    ({"layers_to_transform": [0.5]}, "layers_to_transform must be whole numbers"),
    ({"use_rslora": "no"}, "use_rslora must be true or false"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "'auto_map' asks for code from elsewhere"),
    ({"trust_remote_code": True}, "'trust_remote_code' asks for code"),
    ({"learning_rte": 3}, "'learning_rte' is 3, and Rankwise does not know this key"),
    ({"bias": "some"}, 'bias must be one of none, lora_only, all, and is "some"'),
    ({"use_dora": "yes"}, "use_dora must be true or false"),
    ({"target_parameters": "a.b"}, "target_parameters must be a list of names"),
    ({"trainable_token_indices": [1, 1]}, "must be a list of different whole numbers from 0"),
    ({"trainable_token_indices": {"e": [-1]}}, "trainable_token_indices must be"),
    ({"trainable_token_indices": {"e": 3}}, "trainable_token_indices must be"),
    ({"trainable_token_indices": [2**70]}, "trainable_token_indices must be"),
    ({"init_lora_weights": "bogus"}, 'init_lora_weights is "bogus", a start'),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_a_wrong_value_is_told_with_what_was_needed(read, change, message: str):
    with pytest.raises(ArtifactError, match=message):
        read(PLAIN, **change)


def test_an_infinite_alpha_is_refused(read):
    text = b'{"peft_type": "LORA", "r": 4, "lora_alpha": 1e999, "target_modules": ["q"]}'
    with pytest.raises(ArtifactError, match="lora_alpha must be a finite number"):
        read(text)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_a_start_that_changed_the_base_is_refused_with_the_way_out(read, start: str):
    with pytest.raises(ArtifactError, match="path_initial_model_for_weight_conversion"):
        read(PLAIN, init_lora_weights=start)


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("layer_replication", [[0, 2]], "Build that base first"),
        ("alora_invocation_tokens", [1], "Use it with PEFT, or train"),
        ("use_qalora", True, "Use it with PEFT, or train"),
        ("use_bdlora", {"nblocks": 2}, "merge_and_unload"),
        ("velora_config", {"scale": 1}, "merge_and_unload"),
        ("monteclora_config", {"num_samples": 8}, "merge_and_unload"),
        ("kasa_config", {"beta": 1}, "merge_and_unload"),
        ("arrow_config", {"top_k": 3}, "each by itself"),
        ("megatron_config", {"x": 1}, "Use it in Megatron"),
    ],
)
def test_what_no_layer_can_do_is_refused_by_name_with_the_way_out(
    read, key: str, value: object, remedy: str
):
    with pytest.raises(ArtifactError, match=f"{key} is on: .*has no layer for.*{remedy}"):
        read(PLAIN, **{key: value})
    read(PLAIN, **{key: None})


def test_what_lora_has_learned_since_is_read(read):
    config = read(
        PLAIN,
        use_dora=True,
        bias="all",
        lora_bias=True,
        target_parameters=["experts.up"],
        trainable_token_indices={"embed": [3, 1]},
        ensure_weight_tying=True,
    )
    assert (config.dora, config.bias, config.lora_bias, config.tied) == (True, "all", True, True)
    assert config.parameters == ("experts.up",)
    assert config.tokens == {"embed": (3, 1)}
    assert not config.by_rankwise
    assert read(PLAIN, trainable_token_indices=[4]).tokens == {None: (4,)}


def test_parameters_alone_need_no_modules(read):
    config = read(PLAIN, target_modules=[], target_parameters=["experts.up"])
    assert config.rule.target_modules == ()
    assert read(PLAIN, target_modules=[], peft_type="RANKWISE_LORA").by_rankwise


def test_all_problems_come_in_one_error(read):
    with pytest.raises(ArtifactError, match=r"(?s)use_qalora.*r must be.*lora_alpha is missing"):
        read(PLAIN, use_qalora=True, r=0, lora_alpha="absent")


def test_a_missing_file_is_the_users_mistake(tmp_path: Path):
    with pytest.raises(UserError, match=r"There is no 'adapter_config\.json'"):
        read_config(tmp_path / "adapter_config.json")
