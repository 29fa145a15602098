"""Styles: the same in every figure, and no two alike."""

from rankwise.lab.curves import training_curves
from rankwise.lab.settings import group_runs
from rankwise.lab.styles import seeds_of, styles_of


def test_styles_are_the_same_in_every_figure_and_no_two_are_alike(sweep, record, lora):
    others = [record(f"other {n}", {"method": "bitfit", "n": n}) for n in range(5)]
    others.append(record("head again", {"method": "head", "deep": True}))
    others += [record(f"LoRA r={r} fixed", lora(r, alpha=16.0)) for r in (1, 2, 4, 16, 32)]
    others.append(record("LoRA r=8 slow", lora(8), edit=lambda m: m["config"].update(lr=1e-9)))
    settings = group_runs([*sweep, *others])
    styles = styles_of(settings)
    assert set(styles) == {setting.label for setting in settings}
    assert len(set(styles.values())) == len(settings)
    ramp = [styles[f"LoRA r={r}"].colour for r in (1, 2, 4, 8, 16, 32)]
    assert ramp == sorted(ramp)
    assert len(set(ramp)) == 6
    assert styles["LoRA r=2 fixed"].colour == ramp[1]
    few = group_runs(sweep)
    keys = {key.label: key.swatch for key in training_curves(few).key}
    assert keys["LoRA r=8"] == styles_of(few)["LoRA r=8"].swatch(marker=False)


def test_seeds_are_counted(record):
    one = group_runs([record("head", {"method": "head"})])
    assert seeds_of(one) == "One seed."
    two = group_runs([record("full", {"method": "full"}, seed=s) for s in (0, 1)])
    assert seeds_of([*one, *two]) == "Seeds per method: 1 to 2."
