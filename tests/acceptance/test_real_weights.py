"""Against the released weights, for people who have them: GEMMAKIT_REAL_MODEL=google/gemma-2b make acceptance.

The numbers are published: the ids in the tokenizer's documentation, the continuations in the integration tests that
transformers ran on gemma-2b (20 new tokens, greedy).
"""

import os

import pytest
import torch

import gemmakit

MODEL = os.environ.get("GEMMAKIT_REAL_MODEL")

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.skipif(not MODEL, reason="run with GEMMAKIT_REAL_MODEL=google/gemma-2b (a folder or a Hub id)"),
]

CONTINUATIONS = {
    "Hello I am doing": "Hello I am doing a project on the 1990s and I need to know what the most popular music",
    "Hi today": "Hi today I am going to share with you a very easy and simple recipe of <strong><em>Kaju Kat",
}


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Of the other tests: real weights may have every thread."""


@pytest.mark.parametrize("kind", [gemmakit.GemmaTokenizer, gemmakit.GemmaTokenizerFast])
def test_the_documented_sentence_has_the_documented_ids(kind):
    assert kind.from_pretrained(MODEL).encode("Hello this is a test") == [2, 4521, 736, 603, 476, 2121]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_greedy_continuations_are_the_published_ones(dtype):
    tokenizer = gemmakit.GemmaTokenizerFast.from_pretrained(MODEL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = gemmakit.GemmaForCausalLM.from_pretrained(MODEL, dtype=dtype, device_map=device)
    inputs = tokenizer(list(CONTINUATIONS), return_tensors="pt", padding=True).to(device)
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    assert tokenizer.batch_decode(out, skip_special_tokens=True) == list(CONTINUATIONS.values())
