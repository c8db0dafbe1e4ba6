"""Run by test_tensor_demo.py in one and in two processes: tokens of 50 prompts, and the memory of a larger model.

Arguments: the folder of a larger model, and one of the demo model in int8.
"""

import gc
import json
import sys
import warnings
from pathlib import Path

import torch

from gemmakit import AutoTokenizer, GemmaForCausalLM, demo_model
from gemmakit.bench.timing import _status_bytes
from gemmakit.pytorch.parallel import processes

warnings.simplefilter("ignore")
TEXT = Path(__file__).parents[2] / "benchmarks" / "data" / "held_out.txt"


def prompts(tokenizer, count=50):
    """50 places of a text, 4 to 13 tokens from there."""
    ids = tokenizer(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).input_ids
    starts = range(0, count * (len(ids) // count), len(ids) // count)
    return [[2, *ids[start : start + 3 + i % 10]] for i, start in enumerate(starts)]


def tokens(model, rows, **settings):
    """24 new ones a prompt, greedily, 8 prompts at a time."""
    found = []
    for start in range(0, len(rows), 8):
        batch = rows[start : start + 8]
        wide = max(map(len, batch))
        ids = torch.tensor([[0] * (wide - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (wide - len(row)) + [1] * len(row) for row in batch])
        out = model.generate(ids, attention_mask=mask, max_new_tokens=24, do_sample=False, **settings)
        found += out[:, wide:].tolist()
    return found


def main():
    large, int8 = sys.argv[1:]
    processes.join()
    torch.set_num_threads(1)
    rows = prompts(AutoTokenizer.from_pretrained(demo_model()))
    found = {}
    for name, source, dtype in (
        ("float32", demo_model(), "float32"),
        ("bfloat16", demo_model(), "auto"),
        ("int8", int8, "float32"),
    ):
        model = GemmaForCausalLM.from_pretrained(source, dtype=dtype, tp_plan="auto")
        found[name] = tokens(model, rows)
        if name == "float32":
            found["static"] = tokens(model, rows, cache_implementation="static")
            found["alone"] = [model.generate(torch.tensor([row]), max_new_tokens=24)[0].tolist() for row in rows[:8]]
    del model
    gc.collect()
    before = _status_bytes("VmRSS")
    model = GemmaForCausalLM.from_pretrained(large, tp_plan="auto")
    model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4)
    found["memory"] = _status_bytes("VmHWM") - before
    found["read"] = None if model.tensor_parallel is None else model.tensor_parallel.read_bytes
    print(json.dumps(found))
    processes.leave()


main()
