"""docs/transformers.md names what transformers' classes have and gemmakit's lack, each with a reason."""

import pytest
import transformers_gaps

import gemmakit


@pytest.fixture(scope="module")
def rows():
    return transformers_gaps.reasoned()


def test_every_gap_has_a_reason_and_every_reason_a_gap(rows):
    _, without, unused = rows
    assert without == [], "give each a reason in scripts/transformers_gaps.py, or the class what it lacks"
    assert unused == [], "nothing is missing any more that these patterns match: take them out"


def test_the_page_is_what_the_script_makes():
    text = transformers_gaps.PAGE.read_text(encoding="utf-8")
    assert transformers_gaps.page(text) == text, "run python scripts/transformers_gaps.py"


def test_a_new_gap_would_be_seen(monkeypatch):
    """A method taken away, and an argument."""
    monkeypatch.delattr(gemmakit.pytorch.methods.ModelMethods, "num_parameters")
    monkeypatch.delattr(gemmakit.pytorch.quantize.QuantizedMethods, "num_parameters")
    monkeypatch.setattr(gemmakit.GemmaConfig, "to_json_string", lambda self: "")
    _, without, _ = transformers_gaps.reasoned()
    assert without == ["GemmaConfig.to_json_string(use_diff)", "GemmaModel.num_parameters"]
