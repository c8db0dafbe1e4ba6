"""lm-eval's own class for transformers' models scores and continues as with transformers' model."""

import pytest
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

pytestmark = pytest.mark.usefixtures("registered")
QUESTIONS = [("If the file is", " there"), ("Return the", " first word of it"), ("", "What")]


def asked(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def test_it_scores_and_continues_as_with_transformers_model(model, theirs, tokenizer, name):
    ours = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    other = HFLM(
        pretrained=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(name), batch_size=2, device="cpu"
    )
    scores = [lm.loglikelihood(asked("loglikelihood", QUESTIONS)) for lm in (ours, other)]
    for (score, greedy), (expected, expected_greedy) in zip(*scores, strict=True):
        assert score == pytest.approx(expected, abs=1e-3) and greedy == expected_greedy
    texts = [("If the file", {"until": ["\n"], "max_gen_toks": 8}), ("What is", {"until": ["?"], "max_gen_toks": 5})]
    answers = [lm.generate_until(asked("generate_until", texts)) for lm in (ours, other)]
    assert answers[0] == answers[1]
