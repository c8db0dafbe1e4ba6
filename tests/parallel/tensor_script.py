"""Run by test_tensor.py in two processes: each prints what it finds as one line of JSON."""

import json
import os
import sys
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from spread import counted
from test_tensor import MODEL_SETTINGS
from tiny_shapes import COMMON, SHAPES

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.errors import InputError
from gemmakit.pytorch.decode.batch import BatchEngine, Request
from gemmakit.pytorch.parallel import processes
from gemmakit.pytorch.parallel.lockstep import LeadingEngine, follow
from gemmakit.pytorch.quantize_checkpoint import quantize_checkpoint
from gemmakit.quantization import WeightOnlyConfig

warnings.simplefilter("ignore")


def rows(vocabulary, count=8, longest=9):
    """Prompts of uneven lengths."""
    return [torch.randint(5, vocabulary, (1 + i % longest,)).tolist() for i in range(count)]


def padded(prompts):
    wide = max(map(len, prompts))
    ids = torch.tensor([[0] * (wide - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (wide - len(p)) + [1] * len(p) for p in prompts])


@torch.no_grad()
def compared(one, part, prompts):
    """The largest difference of logits, and whether every way to generate gives the same tokens."""
    ids, mask = padded(prompts)
    told = dict(attention_mask=mask, max_new_tokens=8)
    a, b = (model(ids, attention_mask=mask).logits for model in (one, part))
    same = {}
    for name, settings in {"greedy": {}, "static": {"cache_implementation": "static"}}.items():
        same[name] = torch.equal(*(model.generate(ids, **told, **settings) for model in (one, part)))
    first = torch.tensor(prompts[2:3])
    same["alone"] = torch.equal(*(model.generate(first, max_new_tokens=8) for model in (one, part)))
    batches = [[r.new_ids for r in model.generate_batch(prompts, max_new_tokens=8)] for model in (one, part)]
    same["batch"] = batches[0] == batches[1]
    drawn = part.generate(ids, do_sample=True, **told)
    everywhere = processes.shared(drawn.tolist())
    return {"apart": float((a - b).abs().max()), "same": same, "drawn": drawn.tolist() == everywhere}


def asked(engine, prompts, close=lambda: None):
    """Tokens and ends of requests that come in between steps, of which one is cancelled and one waits too long."""
    found = {}

    def step():
        for event in engine.step():
            found.setdefault(event.id, []).append([event.token, event.finish_reason])

    told = {"do_sample": True, "seed": 3, "max_new_tokens": 8}
    for prompt in prompts:
        engine.add(Request(prompt, settings=told))
        step()
    cancelled = engine.add(Request(prompts[0], settings=told))
    late = engine.add(Request(prompts[1], settings=told, deadline=1e-9))
    engine.cancel(cancelled)
    while engine.has_work:
        step()
    close()
    return found, found[cancelled], found[late]


def refused(engine, *requests):
    """What an engine says of requests that draw their tokens without a seed, and cannot run."""

    def said(request):
        try:
            engine.add(request)
        except InputError as error:
            return str(error)

    found = [said(request) for request in requests]
    engine.add(Request(torch.tensor([[5, 6]]), settings={"do_sample": True, "max_new_tokens": 2}))
    while engine.has_work:
        engine.step()
    engine.close()
    return found


def in_step(one, part, prompts):
    """Whether an engine that others follow gives what an engine alone does; and the next number each draws."""
    settings = dict(max_batch_size=3, page_size=4, cache_tokens=48)
    if processes.rank():
        follow(BatchEngine(part, **settings))
        return {"next": torch.rand(()).item()}
    leading = LeadingEngine(part, **settings)
    several, *ends = asked(leading, prompts)
    drawn = {"do_sample": True}
    said = refused(
        leading,
        Request([5], settings={**drawn, "max_new_tokens": 60}),
        Request([5], settings=drawn, logits_processor=[lambda ids, scores: scores]),
        Request([5], settings={**drawn, "max_time": 5.0}),
    )
    following = torch.rand(()).item()
    alone, *_ = asked(BatchEngine(one, **settings), prompts)
    return {"same": several == alone, "ends": ends, "refused": said, "next": following}


def failing(part, where):
    """How the processes of these ranks end, of which each fails at its first step."""
    failures = [RuntimeError("the first step")] if processes.rank() in where else []

    class Once(LeadingEngine if processes.rank() == 0 else BatchEngine):
        def _launch(self):
            if failures:
                raise failures.pop()
            super()._launch()

    engine = Once(part, max_batch_size=1, page_size=4, cache_tokens=64)
    try:
        if processes.rank():
            follow(engine)
            return "closed"
        with suppress(RuntimeError):
            engine.step()
        engine.step()
        if 0 in where:  # nobody hears it otherwise
            engine.close()
        return "closed"
    except RuntimeError as error:
        return str(error)


def listening():
    """The addresses, in hexadecimal, on which this process listens; none where the system does not tell."""
    tables = [table for name in ("tcp", "tcp6") if (table := Path("/proc/self/net") / name).exists()]
    own = {os.readlink(f) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()} if tables else set()
    lines = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return sorted({line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in own})


def main():
    folder = Path(sys.argv[1])
    processes.join()
    found = {}
    for name, settings in MODEL_SETTINGS.items():
        torch.manual_seed(1)
        config = GemmaConfig.from_dict({**COMMON, "num_hidden_layers": 2, **settings})
        if processes.rank() == 0:
            fresh = GemmaForCausalLM(config)
            for bias in (b for n, b in fresh.named_parameters() if n.endswith("bias")):
                torch.nn.init.normal_(bias)
            fresh.save_pretrained(folder / name)
        processes.wait()
        one = GemmaForCausalLM.from_pretrained(folder / name)
        part = GemmaForCausalLM.from_pretrained(folder / name, tp_plan="auto")
        torch.manual_seed(2)
        found[name] = {
            **compared(one, part, rows(config.vocab_size)),
            "read": part.tensor_parallel.read_bytes,
            "held": part.get_memory_footprint(return_buffers=False),
            "whole": one.get_memory_footprint(return_buffers=False),
            "plan": part.decode_plan(),
            "messages": counted(lambda model=part: model(torch.tensor([[5]] * 3))),
            "heads": part.config.num_key_value_heads,
        }
    one = GemmaForCausalLM.from_pretrained(folder / "gqa")
    part = GemmaForCausalLM.from_pretrained(folder / "gqa", tp_plan="auto")
    found["in step"] = in_step(one, part, rows(157, 6))
    found["failing"] = {"both": failing(part, (0, 1)), "second": failing(part, (1,))}
    found["listening"] = listening()
    # The codes of a stored file are split as they are, scales of whole rows and all.
    for bits in (8, 4):
        scheme = WeightOnlyConfig(bits=bits, group_size=None if bits == 8 else 32, activation_bits=16)
        sizes = dict(SHAPES["mha"], intermediate_size=128)
        if processes.rank() == 0:
            GemmaForCausalLM(GemmaConfig(**{**COMMON, **sizes, "num_hidden_layers": 2})).save_pretrained(
                folder / "plain"
            )
            quantize_checkpoint(folder / "plain", folder / f"int{bits}", scheme)
        processes.wait()
        one = GemmaForCausalLM.from_pretrained(folder / f"int{bits}")
        part = GemmaForCausalLM.from_pretrained(folder / f"int{bits}", tp_plan="auto")
        found[f"int{bits}"] = {
            **compared(one, part, rows(COMMON["vocab_size"])),
            "read": part.tensor_parallel.read_bytes,
        }
        part = GemmaForCausalLM.from_pretrained(folder / "plain", tp_plan="auto", quantization_config=f"int{bits}")
        found[f"loading int{bits}"] = part.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4).shape[1]
    print(json.dumps(found))
    processes.leave()


main()
