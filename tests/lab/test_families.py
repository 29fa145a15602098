"""LoRA over its ranks: one line for each rule for α and for each kind of LoRA."""

from rankwise.lab.families import families
from rankwise.lab.settings import group_runs


def told(runs):
    lines = families(group_runs(runs))
    return {line.label: [s.first.rank for s in line.members] for line in lines}


def test_one_rule_is_one_line(record, lora):
    runs = [record(f"LoRA r={r}", lora(r)) for r in (4, 1, 2)]
    runs.append(record("head", {"method": "head"}))
    assert told(runs) == {"LoRA over its ranks": [1, 2, 4]}
    assert told(runs[3:]) == {}


def test_two_rules_are_two_lines_that_meet(record, lora):
    runs = [record(f"LoRA r={r}", lora(r)) for r in (2, 4, 8)]
    runs += [record(f"fixed r={r}", lora(r, alpha=8.0)) for r in (2, 8)]
    assert told(runs) == {"LoRA, α = 2·r": [2, 4, 8], "LoRA, α = 8": [2, 4, 8]}


def test_what_follows_no_rule_stands_alone(record, lora):
    runs = [record(f"LoRA r={r}", lora(r)) for r in (2, 4)]
    runs.append(record("odd", lora(8, alpha=3.0)))
    assert told(runs) == {"LoRA, α = 2·r": [2, 4], "LoRA, α = 3": [8]}


def test_other_options_make_other_lines(record, lora):
    runs = [record(f"LoRA r={r}", lora(r)) for r in (2, 4)]
    runs.append(record("LoRA r=4", lora(4, target_modules=["all-linear"])))
    assert told(runs) == {"LoRA, query, value": [2, 4], "LoRA, all-linear": [4]}
