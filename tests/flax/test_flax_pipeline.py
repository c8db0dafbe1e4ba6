"""The Flax backend behind pipeline() and the command line, on the demo model that gemmakit carries."""

import subprocess
import sys

import numpy as np
import pytest

import gemmakit
from gemmakit.errors import InputError

PROMPTS = ["The yield statement", "A list", "3 + 4 = "]
SETTINGS = dict(max_new_tokens=10, do_sample=False)


@pytest.fixture(scope="module")
def pipe():
    return gemmakit.pipeline("text-generation", framework="flax", dtype="float32")


def test_a_flax_pipeline_says_what_pytorchs_says(pipe):
    oracle = gemmakit.pipeline("text-generation", dtype="float32", device="cpu")
    assert type(pipe.model).__name__ == "FlaxGemmaForCausalLM"
    assert pipe(PROMPTS, batch_size=3, **SETTINGS) == oracle(PROMPTS, batch_size=3, **SETTINGS)
    chat = [{"role": "user", "content": "What is 34 + 58?"}]
    assert pipe(chat, **SETTINGS) == oracle(chat, **SETTINGS)


def test_a_loaded_flax_model_is_taken_as_it_is(pipe):
    again = gemmakit.pipeline("text-generation", pipe.model, tokenizer=pipe.tokenizer)
    assert again.model is pipe.model
    heard = []

    class Listener(gemmakit.TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            heard.append(text)

    out = again("A list", streamer=Listener(pipe.tokenizer, skip_prompt=True), return_full_text=False, **SETTINGS)
    assert "".join(heard) == out[0]["generated_text"]


def test_what_flax_does_not_do_is_refused(pipe):
    for arguments, words in (
        (dict(framework="flax", device="cuda"), "JAX_PLATFORMS"),
        (dict(framework="jax"), "must be 'pt'"),
        (dict(framework="pt", model=pipe.model), "FlaxGemmaForCausalLM"),
    ):
        with pytest.raises(InputError, match=words):
            gemmakit.pipeline("text-generation", **arguments)
    with pytest.raises(InputError, match="stop_strings"):
        pipe("A list", stop_strings=["x"], **SETTINGS)


def command(*arguments):
    line = [sys.executable, "-m", "gemmakit.cli", "run", *arguments]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


def test_the_command_runs_on_either_backend():
    arguments = ("A list", "-n", "6", "--greedy", "--dtype", "float32")
    ours = command(*arguments, "--backend", "flax", "--stats")
    assert ours.returncode == 0, ours.stderr
    assert "6 new tokens" in ours.stderr
    assert ours.stdout == command(*arguments, "--device", "cpu").stdout
    wrong = command("A list", "--backend", "tensorflow")
    assert wrong.returncode == 2
    assert "must be pytorch or flax" in wrong.stderr


def test_the_documented_examples_run():
    """The Flax examples of the page that first documented these classes, with the package renamed."""
    folder = str(gemmakit.hub.demo_model())
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(folder)
    for name, kind in (("FlaxGemmaModel", "jax"), ("FlaxGemmaForCausalLM", "np")):
        model = getattr(gemmakit, name).from_pretrained(folder)
        inputs = tokenizer("Hello, my dog is cute", return_tensors=kind)
        outputs = model(**inputs)
        last = outputs.last_hidden_state if name == "FlaxGemmaModel" else outputs.logits[:, -1]
        assert last.shape[0] == 1
        assert np.isfinite(np.asarray(last)).all()


def test_a_stream_is_that_of_pytorch(pipe):
    oracle = gemmakit.pipeline("text-generation", dtype="float32", device="cpu")
    ids = pipe.tokenizer("What is 34 + 58?", return_tensors="pt").input_ids
    for more in ({}, dict(eos_token_id=[1, 107])):
        ours, theirs = (
            [(e.token, e.text, e.finish_reason) for e in p.model.stream(ids, tokenizer=p.tokenizer, **SETTINGS, **more)]
            for p in (pipe, oracle)
        )
        assert ours == theirs
        assert ours[-1][2] is not None
    with pytest.raises(InputError, match="one row"):
        pipe.model.stream(np.ones((2, 3), int), **SETTINGS)
