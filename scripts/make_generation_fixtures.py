"""Write what transformers 4.46.3 decodes with the strategies that later versions dropped, for the parity tests.

Run in an environment of its own, then commit what it writes to tests/parity/fixtures:

    python3 -m venv old && old/bin/pip install "transformers==4.46.3" "numpy<2.3" torch safetensors sentencepiece
    old/bin/python scripts/make_generation_fixtures.py
"""

import itertools
import json
import warnings
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

FOLDER = Path(__file__).parents[1] / "tests" / "parity" / "fixtures"
FIELDS = dict(vocab_size=48, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
SPREADS = {"flat": 0.05, "peaked": 0.5}
ENDS = dict(pad_token_id=0, eos_token_id=1, max_new_tokens=10)
PROMPTS = {
    "one": [[2, 17, 30, 8, 41, 12, 17]],
    "even": [[2, 17, 30, 8, 41, 12, 17], [2, 5, 5, 19, 33, 7, 22]],
    "padded": [[2, 17, 30, 8, 41, 12, 17], [0, 0, 2, 9, 25, 40, 11], [0, 0, 0, 0, 0, 2, 36]],
}
PROCESSORS = ({}, {"repetition_penalty": 1.3}, {"no_repeat_ngram_size": 2, "min_new_tokens": 3})


def weights():
    """Standard normal numbers; the tests scale them. Norms stay near what a fresh model has."""
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**FIELDS))
    generator = torch.Generator().manual_seed(20)
    return {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def build(numbers, spread):
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(**FIELDS, attn_implementation="eager")).eval()
    scaled = {name: x * (0.1 if "norm" in name else spread) for name, x in numbers.items()}
    model.load_state_dict(scaled, strict=False)  # the head is tied
    return model


def cases():
    """(prompt, settings)."""
    for kind, (beams, groups), penalty, more in itertools.product(
        PROMPTS, ((2, 2), (4, 2), (6, 3)), (0.5, 3.0), PROCESSORS
    ):
        if kind == "padded" and more:
            continue  # gemmakit's processors do not take padding for text, as these did
        yield (
            kind,
            dict(num_beams=beams, num_beam_groups=groups, diversity_penalty=penalty, num_return_sequences=2, **more),
        )
    for kind, early, length in itertools.product(PROMPTS, (True, False, "never"), (0.0, 2.0)):
        yield (
            kind,
            dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, early_stopping=early, length_penalty=length),
        )
    for kind, alpha, k, low in itertools.product(PROMPTS, (0.2, 0.6, 1.0), (2, 4), (False, True)):
        if not low or kind == "one":
            yield kind, dict(penalty_alpha=alpha, top_k=k, low_memory=low)
    yield "even", dict(penalty_alpha=0.6, top_k=4, repetition_penalty=1.3)
    words = ([[20]], [[20, 21]], [[20, 21], [33]], [[[20, 21, 22], [33, 34]]], [[[20, 21], [33]], [40, 44]])
    for kind, beams, word, early in itertools.product(PROMPTS, (3, 5), words, (True, False)):
        yield kind, dict(num_beams=beams, force_words_ids=word, early_stopping=early)
    yield "even", dict(num_beams=4, force_words_ids=[[20, 21]], length_penalty=2.0, no_repeat_ngram_size=2)


def expected(model, kind, settings):
    ids = torch.tensor(PROMPTS[kind])
    wanted = dict(return_dict_in_generate=True, output_scores="force_words_ids" not in settings)  # it fails with both
    out = model.generate(ids, attention_mask=(ids != 0).long(), **wanted, **{**ENDS, **settings})
    scores = getattr(out, "sequences_scores", None)
    return {"sequences": out.sequences.tolist(), "sequences_scores": None if scores is None else scores.tolist()}


def main():
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    numbers = weights()
    FOLDER.mkdir(exist_ok=True)
    save_file(numbers, FOLDER / "tiny_decoder.safetensors")
    written = []
    for name, spread in SPREADS.items():
        model = build(numbers, spread)
        written += [
            {"spread": spread, "weights": name, "prompt": PROMPTS[kind], "settings": {**ENDS, **settings},
             **expected(model, kind, settings)}
            for kind, settings in cases()
        ]  # fmt: skip
    lines = ",\n".join(json.dumps(case) for case in written)
    (FOLDER / "dropped_strategies.json").write_text(
        f'{{"transformers": "{transformers.__version__}", "fields": {json.dumps(FIELDS)}, "cases": [\n{lines}\n]}}\n'
    )
    print(f"{len(written)} cases")


if __name__ == "__main__":
    main()
