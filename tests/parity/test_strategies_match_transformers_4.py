"""Strategies that transformers 5 no longer has, against what 4.46.3 wrote (scripts/make_generation_fixtures.py)."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import gemmakit
from gemmakit.errors import GenerationConfigError, InputError
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


def searched(model, prompt, mask, settings):
    """A loop of one's own around BeamSearchScorer, as transformers 4.46 documents one, of groups of beams or of one."""
    beams, groups = settings["num_beams"], settings.get("num_beam_groups", 1)
    B, P, n, total = *prompt.shape, beams // groups, prompt.shape[1] + settings["max_new_tokens"]
    scorer = gemmakit.BeamSearchScorer(
        B, beams, prompt.device, settings.get("length_penalty", 1.0), settings.get("early_stopping", False),
        settings.get("num_return_sequences", 1), groups, max_length=total,
    )  # fmt: skip
    ends = dict(pad_token_id=settings["pad_token_id"], eos_token_id=settings["eos_token_id"], decoder_prompt_len=P)
    rows, mask = prompt.repeat_interleave(beams, 0), mask.repeat_interleave(beams, 0)
    sums = torch.full((B, groups, n), -1e9)
    sums[:, :, 0] = 0.0
    grid = torch.arange(len(rows)).view(B, groups, n)
    history = [() for _ in rows]
    while not scorer.is_done and rows.shape[1] < total:
        seen = torch.cat((mask, torch.ones(len(rows), rows.shape[1] - P, dtype=mask.dtype)), dim=1)
        with torch.no_grad():
            logprobs = model(rows, seen).logits[:, -1].log_softmax(-1)
        used, tokens, parents = torch.zeros(B, 1, logprobs.shape[-1]), torch.zeros_like(grid), grid.clone()
        for g in range(groups):
            at = grid[:, g].flatten()
            scores = logprobs[at].view(B, n, -1) - settings.get("diversity_penalty", 0.0) * used + sums[:, g, :, None]
            best, flat = scores.flatten(1).topk(2 * n)
            V = logprobs.shape[-1]
            told = {"beam_indices": [history[i] for i in at]} if groups == 1 else {}
            out = scorer.process(rows[at], best, flat % V, flat // V, group_index=g, **ends, **told)
            sums[:, g] = out["next_beam_scores"].view(B, n)
            tokens[:, g] = out["next_beam_tokens"].view(B, n)
            parents[:, g] = at[out["next_beam_indices"]].view(B, n)
            used.scatter_add_(2, tokens[:, g, None], torch.ones(B, 1, n))
        rows = torch.cat((rows[parents.flatten()], tokens.flatten()[:, None]), dim=1)
        history = [(*history[i], int(i)) for i in parents.flatten()]
    told = {"beam_indices": history} if groups == 1 else {}
    return scorer.finalize(rows, sums.flatten(), tokens.flatten(), parents.flatten(), total, **ends, **told)


PLAIN = {"num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences", "early_stopping",
         "length_penalty", "pad_token_id", "eos_token_id", "max_new_tokens"}  # fmt: skip


@pytest.mark.parametrize(
    "case", [c for c in CASES if "num_beam_groups" in c["settings"] and c["settings"].keys() <= PLAIN], ids=name_of
)
def test_a_loop_around_the_scorer_finds_what_transformers_4_found(models, case):
    ids = torch.tensor(case["prompt"])
    out = searched(models[case["spread"]], ids, (ids != 0).long(), case["settings"])
    assert out["sequences"].tolist() == case["sequences"]
    torch.testing.assert_close(out["sequence_scores"], torch.tensor(case["sequences_scores"]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("beams", "kept"), [(2, 1), (5, 3)])
@pytest.mark.parametrize("spread", sorted({case["spread"] for case in CASES}))
def test_a_loop_around_the_scorer_finds_what_generate_finds(models, spread, beams, kept):
    settings = dict(num_beams=beams, num_return_sequences=kept, early_stopping=True, length_penalty=0.7,
                    pad_token_id=0, eos_token_id=1, max_new_tokens=10)  # fmt: skip
    ids = torch.tensor([[2, 17, 30, 8, 41, 12, 17], [0, 0, 2, 9, 25, 40, 11]])
    model, mask = models[spread], (ids != 0).long()
    out = searched(model, ids, mask, settings)
    expected = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, output_scores=True, **settings
    )  # fmt: skip
    assert out["sequences"].tolist() == expected.sequences.tolist()
    torch.testing.assert_close(out["sequence_scores"], expected.sequences_scores, atol=1e-4, rtol=0)
    assert out["beam_indices"][:, : expected.beam_indices.shape[1]].tolist() == expected.beam_indices.tolist()


def test_a_scorer_says_what_it_cannot_do():
    scorer = gemmakit.BeamSearchScorer(1, 2, "cpu")
    rows, few = torch.tensor([[2, 5], [2, 6]]), torch.tensor([[1, 7]])
    with pytest.raises(InputError, match="fewer than 2 candidates of a prompt go on"):
        scorer.process(rows, torch.tensor([[-0.1, -0.2]]), few, torch.tensor([[0, 1]]), 0, 1)
    with pytest.raises(InputError, match="num_beams is 1"):
        gemmakit.BeamSearchScorer(1, 1, "cpu")
    with pytest.raises(InputError, match="max_length is None"):
        gemmakit.BeamSearchScorer(1, 2, "cpu", do_early_stopping="never")
    with pytest.raises(GenerationConfigError, match="groups share the beams evenly"):
        gemmakit.BeamSearchScorer(1, 3, "cpu", num_beam_groups=2)
