"""The demo model over two processes says what one says; and a model takes each of two little more than half."""

from pathlib import Path

import pytest
import torch
from together import together

from gemmakit import GemmaConfig, demo_model
from gemmakit.bench.measure import random_model
from gemmakit.pytorch.quantize_checkpoint import quantize_checkpoint
from gemmakit.quantization import WeightOnlyConfig

SCRIPT = Path(__file__).with_name("demo_script.py")
# Half a gigabyte of weights, so that what a process is besides does not count.
LARGE = dict(
    hidden_size=2048, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=1,
    head_dim=256, vocab_size=32768,
)  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    random_model(GemmaConfig(**LARGE), torch.bfloat16, torch.device("cpu")).save_pretrained(folder / "large")
    quantize_checkpoint(demo_model(), folder / "int8", WeightOnlyConfig(bits=8, activation_bits=16))
    said = [together(SCRIPT, folder / "large", folder / "int8", size=size) for size in (1, 2)]
    return (*said, (folder / "large" / "model.safetensors").stat().st_size)


@pytest.mark.slow  # three processes that load torch, half a gigabyte of weights
@pytest.mark.parametrize("what", ["float32", "static", "alone", "int8"])
def test_fifty_prompts_get_the_tokens_of_one_process(found, what):
    (one,), two, _ = found
    for process in two:
        assert process[what] == one[what]


@pytest.mark.slow
def test_all_processes_choose_the_same_tokens_in_half_precision_too(found):
    (one,), two, _ = found
    assert two[0]["bfloat16"] == two[1]["bfloat16"]
    same = sum(a == b for a, b in zip(one["bfloat16"], two[0]["bfloat16"], strict=True))
    print(f"{same} of 50 prompts get the very tokens of one process in bfloat16")
    assert same > 25  # halves are rounded before they are added: a near tie may fall otherwise


@pytest.mark.slow
def test_a_process_of_two_takes_at_most_six_tenths_of_the_memory_and_reads_half_the_file(found):
    (one,), two, size = found
    for process in two:
        print(f"{process['memory']:,} of {one['memory']:,} bytes at the peak; {process['read']:,} of {size:,} read")
        assert process["memory"] < 0.6 * one["memory"]
        assert process["read"] < 0.52 * size
