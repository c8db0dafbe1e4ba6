"""Strategies that transformers 5 no longer has, against what 4.46.3 wrote (scripts/make_generation_fixtures.py)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gemmakit
from gemmakit.generation.constraints import DisjunctiveConstraint, PhrasalConstraint

FOLDER = Path(__file__).parent / "fixtures"
WRITTEN = json.loads((FOLDER / "dropped_strategies.json").read_text())
CASES = WRITTEN["cases"]


def name_of(case):
    off = ("pad_token_id", "eos_token_id", "max_new_tokens")
    settings = "-".join(f"{k}={v}" for k, v in case["settings"].items() if k not in off)
    return f"{case['weights']}-{len(case['prompt'])}rows-{settings}"


@pytest.fixture(scope="module")
def models():
    numbers = load_file(FOLDER / "tiny_decoder.safetensors")
    out = {}
    for spread in {case["spread"] for case in CASES}:
        model = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**WRITTEN["fields"])).eval()
        scaled = {name: x * (0.1 if "norm" in name else spread) for name, x in numbers.items()}
        model.load_state_dict(scaled, strict=False)  # the head is tied
        out[spread] = model
    return out


def new_tokens(sequences, width, eos=1):
    """Up to the eos and with it; what fills the row after that differs."""
    rows = [row[width:] for row in sequences]
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def as_constraints(words):
    return [DisjunctiveConstraint(w) if isinstance(w[0], list) else PhrasalConstraint(w) for w in words]


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_as_transformers_4_decoded(models, case):
    ids = torch.tensor(case["prompt"])
    words = case["settings"].get("force_words_ids")
    if words and len({isinstance(word[0], list) for word in words}) == 2:  # the same, said by objects
        case["settings"]["constraints"] = as_constraints(case["settings"].pop("force_words_ids"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = models[case["spread"]].generate(
            ids, attention_mask=ids != 0, return_dict_in_generate=True, output_scores=True, **case["settings"]
        )
    assert new_tokens(out.sequences.tolist(), ids.shape[1]) == new_tokens(case["sequences"], ids.shape[1])
    if case["sequences_scores"] is not None:
        assert torch.allclose(out.sequences_scores, torch.tensor(case["sequences_scores"]), atol=1e-4)
