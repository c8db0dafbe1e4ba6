"""On paper: how a model spreads over accelerators, what each holds, reads and sends, and the tokens/s that follow.

`python benchmarks/spread.py` prints the table of docs/scale.md; `--check` holds the arithmetic against two processes on
this machine: bytes and messages to the last one (tests do too), and the time of a step.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemmakit import GemmaConfig
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.pytorch.parallel.tensor import TensorPlan

TABLE, EMBEDDING = "model.embed_tokens_per_layer.", "model.embed_tokens."
SIZES = ("2b", "7b", "gemma3-27b")
COUNTS = (8, 64, 1000)


@dataclass(frozen=True)
class Machine:
    """memory_bytes and bandwidth (bytes/s) of one accelerator; link (bytes/s each way) and latency_s of a message
    between the `node` of a machine; network (bytes/s each way) of each to other machines; flops/s in bfloat16.
    """

    memory_bytes: float
    bandwidth: float
    link: float
    latency_s: float
    node: int
    network: float
    flops: float


# NVIDIA's data sheet of the H200, with a 400 Gbit/s port each; 20 us for a small sum over 8 of them is a guess.
H200 = Machine(141e9, bandwidth=4.8e12, link=450e9, latency_s=20e-6, node=8, network=50e9, flops=989e12)


@dataclass(frozen=True)
class Step:
    """What a decoding step costs each of `tensor` processes that share a model.

    held_bytes: of weights. weight_bytes: of these, what is read, without tables that are read by row. cache_bytes: of
    all rows' keys and values.
    messages: (kind, bytes) of each meeting of the processes, in bytes that one of them gives.
    """

    tensor: int
    held_bytes: int
    weight_bytes: int
    cache_bytes: int
    messages: tuple[tuple[str, int], ...]

    @property
    def wire_bytes(self) -> float:
        """That each sends: a sum over a ring goes round twice, of what is gathered each sends its own to all."""
        T = self.tensor
        return sum(n * (2 * (T - 1) / T if kind == "sum" else T - 1) for kind, n in self.messages)

    def seconds(self, machine: Machine) -> float:
        sends = len(self.messages) * machine.latency_s + self.wire_bytes / machine.link
        return (self.weight_bytes + self.cache_bytes) / machine.bandwidth + sends


def step(config: GemmaConfig, tensor: int, rows: int, context: int = 0, itemsize: int = 2) -> Step:
    """A decoding step of `rows` rows after `context` tokens each, in a dtype of `itemsize` bytes."""
    plan = TensorPlan(config, 0, tensor)
    local = plan.local_config() if tensor > 1 else config
    numbers = {}
    for name, shape in tensor_shapes(config).items():
        part = plan.part(name)
        numbers[name] = prod(shape) if part is None else prod(shape) // part.whole * part.size
    tables = [TABLE] if config.tie_word_embeddings else [TABLE, EMBEDDING]
    by_row = sum(n for name, n in numbers.items() if name.startswith(tuple(tables)))
    hidden, vocabulary = rows * config.hidden_size * itemsize, -(-config.vocab_size // tensor) * rows * itemsize
    sums = (("sum", hidden),) * (1 + 2 * config.num_hidden_layers)
    messages = (*sums, ("gather", vocabulary)) if tensor > 1 else ()
    held, cache = sum(numbers.values()), rows * local.cache_size(context)
    return Step(tensor, held * itemsize, (held - by_row) * itemsize, cache * itemsize, messages)


def layouts(config: GemmaConfig, machine: Machine, rows: int, context: int) -> dict[int, tuple[Step, float]]:
    """By how many share a model, what fits into a node's accelerators: a step, and its seconds."""
    found = {}
    for tensor in (1, 2, 4, 8):
        if tensor > machine.node or config.num_attention_heads % tensor:
            continue
        one = step(config, tensor, rows, context)
        if one.held_bytes + one.cache_bytes < 0.9 * machine.memory_bytes:
            found[tensor] = one, one.seconds(machine)
    return found


def table(machine: Machine = H200, rows: int = 64, context: int = 2048) -> list[str]:
    """The lines of docs/scale.md: the layout of the most tokens/s in all, and that of the fewest ms a token."""
    lines = [
        "| model | accelerators | layout | weights | keys, values | sent a step | ms a token | tokens/s, all |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        config = GemmaConfig.preset(size)
        fits = layouts(config, machine, rows, context)
        most = min(fits, key=lambda tensor: fits[tensor][1] * tensor)
        least = min(fits, key=lambda tensor: fits[tensor][1])
        for count in COUNTS:
            for tensor in dict.fromkeys((most, least)):
                one, took = fits[tensor]
                replicas = count // tensor
                how = f"{replicas} x `--tensor {tensor}`" if tensor > 1 else f"{replicas} whole"
                lines.append(
                    f"| {size} | {count:,} | {how} | {one.held_bytes / 1e9:.1f} GB "
                    f"| {one.cache_bytes / 1e9:.1f} GB | {one.wire_bytes / 1e6:.1f} MB "
                    f"| {took * 1e3:.2f} | {replicas * rows / took:,.0f} |"
                )
    return lines


def training(machine: Machine = H200, tokens: int = 8192, efficiency: float = 0.4) -> list[str]:
    """Full training in mixed precision under FSDP2: 4 bytes a weight and 8 of moments, all shared; layers gathered in
    2 bytes twice, gradients summed in 4. tokens: a step, of each accelerator.
    """
    lines = ["| model | accelerators | state | sent a step | tokens/s, all |", "|---|---|---|---|---|"]
    for size in SIZES:
        config = GemmaConfig.preset(size)
        weights = sum(map(prod, tensor_shapes(config).values()))
        for count in COUNTS:
            state, sent = 16 * weights / count, weights * (2 * 2 + 4) * (count - 1) / count
            wire = machine.link if count <= machine.node else machine.network
            took = max(6 * weights * tokens / (efficiency * machine.flops), sent / wire)  # the one beside the other
            lines.append(
                f"| {size} | {count:,} | {state / 1e9:.2f} GB | {sent / 1e9:.0f} GB | {count * tokens / took:,.0f} |"
            )
    return lines


# -- what this machine says of it --------------------------------------------------------------------------------------


def counted(call):
    """(kind, bytes) of each message while `call` runs."""
    import torch.distributed as dist

    seen, plain = [], (dist.all_reduce, dist.all_gather)

    def all_reduce(tensor, *rest, **more):
        seen.append(("sum", tensor.nbytes))
        return plain[0](tensor, *rest, **more)

    def all_gather(out, tensor, *rest, **more):
        seen.append(("gather", tensor.nbytes))
        return plain[1](out, tensor, *rest, **more)

    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        call()
    finally:
        dist.all_reduce, dist.all_gather = plain
    return tuple(seen)


def process(folder: str) -> None:
    """One of the processes of `check`: prints what it found as a line of JSON."""
    import torch
    import torch.distributed as dist

    from gemmakit import DynamicCache, GemmaForCausalLM

    torch.set_num_threads(1)
    model = GemmaForCausalLM.from_pretrained(folder, tp_plan="auto")
    plan, ids = model.tensor_parallel, torch.full((1, 1), 7)

    def once(cache):
        with torch.inference_mode():
            model(ids, past_key_values=cache)

    def timed(call, times=40):
        took = []
        for _ in range(times):
            start = time.perf_counter()
            call()
            took.append(time.perf_counter() - start)
        return statistics.median(took)

    cache = DynamicCache()
    once(cache)
    found = {"step_s": timed(lambda: once(cache)), "held": model.get_memory_footprint(return_buffers=False)}
    if plan is not None:
        small = torch.zeros(model.config.hidden_size, dtype=model.dtype)
        found |= {"sum_s": timed(lambda: dist.all_reduce(small), 400), "read": plan.read_bytes}
        found["messages"] = counted(lambda: once(cache))
    print(json.dumps(found))


def check(folder: str) -> None:
    """A step of one process, and what follows for two that share the memory's bandwidth no more than cores do."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "parallel"))
    from together import together

    (one,) = together(__file__, "--process", folder, size=1)
    two = together(__file__, "--process", folder, size=2)
    config = GemmaConfig.from_pretrained(folder)
    on_paper = step(config, 2, 1)
    assert two[0]["held"] == two[0]["read"] == on_paper.held_bytes, (two, on_paper)
    assert tuple(map(tuple, two[0]["messages"])) == on_paper.messages
    share = on_paper.weight_bytes / step(config, 1, 1).weight_bytes
    expected = share * one["step_s"] + len(on_paper.messages) * two[0]["sum_s"]
    print(f"held by each: {on_paper.held_bytes:,} bytes, as predicted; {len(on_paper.messages)} messages, as predicted")
    print(f"a step of one process {one['step_s'] * 1e3:.2f} ms; a sum {two[0]['sum_s'] * 1e6:.0f} us")
    print(f"of two: {expected * 1e3:.2f} ms predicted, {two[0]['step_s'] * 1e3:.2f} ms measured")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", metavar="FOLDER", help="a model of bfloat16 weights")
    parser.add_argument("--process", metavar="FOLDER", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.process:
        process(asked.process)
    elif asked.check:
        check(asked.check)
    else:
        print("\n".join([*table(), "", *training()]))


if __name__ == "__main__":
    main()
