"""guidance steps a gemmakit model itself, from a cache that it crops."""

import re

import guidance
import pytest
from guidance import models

pytestmark = pytest.mark.usefixtures("registered")


def test_it_chooses_and_generates(model, tokenizer):
    lm = models.Transformers(model, tokenizer, echo=False)
    lm += "If the file is " + guidance.select(["there", "not there"], name="where")
    assert lm["where"] in ("there", "not there")
    lm += " so " + guidance.gen("number", regex=r"[0-9]{3}") + "." + guidance.gen("rest", max_tokens=4, temperature=0.0)
    assert re.fullmatch(r"[0-9]{3}", lm["number"])


def test_it_generates_what_the_model_would(model, tokenizer):
    lm = models.Transformers(model, tokenizer, echo=False)
    lm += "Return the" + guidance.gen("text", max_tokens=6, temperature=0.0)
    ids = tokenizer("Return the", return_tensors="pt").input_ids
    expected = tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :])
    assert expected.startswith(lm["text"]) or lm["text"].startswith(expected)
