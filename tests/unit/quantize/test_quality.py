"""What quantization may cost the demo model on text that it has not seen."""

from pathlib import Path

import demo_tasks
import pytest
import torch

import gemmakit

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def perplexity():
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())
    text = (ROOT / "benchmarks" / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def of(how):
        load = gemmakit.GemmaForCausalLM.from_pretrained
        model = load(gemmakit.demo_model(), dtype=torch.float32, quantization_config=how)
        return demo_tasks.perplexity(model, ids)[0]

    return of


@pytest.mark.slow
def test_int8_stays_within_a_thousandth_and_int4_within_three_hundredths(perplexity):
    exact = perplexity(None)
    assert perplexity("int8") / exact < 1.001
    assert perplexity("int4") / exact < 1.03
