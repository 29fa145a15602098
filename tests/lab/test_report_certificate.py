"""The merge certificate in a report: passed, failed, in doubt, or refused."""

import pytest

from rankwise.errors import ArtifactError
from rankwise.lab.report import write_report


@pytest.fixture
def shown(tmp_path, sweep, parse):
    """The words of a report that holds a certificate."""

    def show(certificate):
        path = tmp_path / "r.html"
        return parse(write_report(path, title="t", runs=sweep[:1], certificate=certificate)).text

    return show


def test_a_failed_certificate_says_what_failed(shown, certificate):
    certificate["passed"] = False
    certificate["layers"][2]["error"] = 1.0
    certificate["problems"] = ["the outputs of layer 2 move"]
    text = shown(certificate)
    assert "failed The adapter was merged" in text
    assert "1 of 6 did not pass" in text
    assert "the outputs of layer 2 move" in text
    assert "encoder.layer.2.query 1 2e-07 0.03 over" in text


def test_a_layer_that_failed_for_another_reason_is_marked(shown, certificate):
    certificate["passed"] = False
    certificate["layers"][2]["passed"] = False
    assert "1 of 6 did not pass" in shown(certificate)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["layers"][0].update(error=1.0),
        lambda c: c["layers"][0].update(error=None),
        lambda c: c["outputs"].update(error=1.0),
        lambda c: c.update(finite=False),
    ],
)
def test_a_certificate_that_contradicts_itself_is_in_doubt(shown, certificate, spoil):
    spoil(certificate)
    text = shown(certificate)
    assert "in doubt The adapter was merged" in text
    assert "its own numbers do not" in text


def test_outputs_may_not_have_been_compared(shown, certificate):
    certificate["outputs"] = None
    text = shown(certificate)
    assert "Outputs: not compared, as no probe was given." in text
    assert "passed The adapter was merged" in text


def test_all_that_a_certificate_lacks_is_said(shown, certificate, tmp_path):
    del certificate["dtype"], certificate["layers"][1]["bound"], certificate["outputs"]["effect"]
    certificate["passed"] = "yes"
    certificate["finite"] = 1
    certificate["sha256"] = {"base": 3, "adapter": None}
    with pytest.raises(ArtifactError) as caught:
        shown(certificate)
    message = str(caught.value)
    for line in (
        "'dtype' is missing.",
        "'layers[1].bound' is missing.",
        "'outputs.effect' is missing.",
        "'passed' must be bool, got 'yes'.",
        "'finite' must be bool, got 1.",
        "'sha256.base' must be str or null, got 3.",
        "'sha256.merged' is missing.",
    ):
        assert line in message
    assert not (tmp_path / "r.html").exists()
