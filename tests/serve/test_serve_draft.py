"""gemmakit serve --draft: a smaller model proposes, and nobody is answered otherwise."""

from __future__ import annotations

import pytest
from test_metrics import measured

import gemmakit
from gemmakit.cli import main
from gemmakit.errors import InputError
from gemmakit.pytorch.decode.drafts import Gain
from gemmakit.serve.service import Loading, Service
from gemmakit.serve.settings import ServeSettings

ASKED = [
    {"prompt": "If the file is small, the file", "max_tokens": 24, "temperature": 0, "ignore_eos": True},
    {"prompt": "Once", "max_tokens": 24, "temperature": 1.2, "seed": 3, "n": 2},
    {"prompt": "1, 2, 3, 1, 2, 3, 1,", "max_tokens": 24, "temperature": 0, "frequency_penalty": 0.5},
]


def test_answers_are_those_without_a_draft_and_what_it_proposed_is_counted(serve, monkeypatch):
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)  # the draft is as large as the model
    plain = serve(ServeSettings(), max_batch_size=2, speculate=False)
    drafted = serve(ServeSettings(), loading={"assistant_model": str(gemmakit.demo_model())}, max_batch_size=2)
    for body in ASKED:
        told = [server.post("/v1/completions", **body).json()["choices"] for server in (plain, drafted)]
        assert told[0] == told[1]
    found = measured(drafted)
    proposed, right = (found[f"gemmakit:draft_model_{name}_total"] for name in ("tokens", "accepted_tokens"))
    assert 0 < right <= proposed <= found["vllm:spec_decode_num_draft_tokens_total"]
    assert right <= found["vllm:spec_decode_num_accepted_tokens_total"]
    assert measured(plain)["gemmakit:draft_model_tokens_total"] == 0


def test_a_draft_that_would_not_be_asked_is_refused(tmp_path, capsys):
    assert main(["serve", "--draft", "x", "--tensor", "2"]) == 2
    assert "--draft helps a model in one process" in capsys.readouterr().err
    (tmp_path / "modules.json").touch()
    with pytest.raises(InputError, match=r"gives embeddings, and --draft"):
        Service().load(Loading(str(tmp_path), ("x",), {"assistant_model": "y"}, None, {}))
    options = {"device_map": "cpu", "assistant_model": str(gemmakit.demo_model())}
    with pytest.raises(InputError, match="assistant_model is given, but speculate is False"):
        Service().load(Loading(str(gemmakit.demo_model()), ("x",), options, None, {"speculate": False}))
