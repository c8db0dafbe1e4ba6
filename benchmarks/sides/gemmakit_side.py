"""gemmakit, measured as its peers are; the machine's limits and a quantization's quality in processes like it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import side

from gemmakit import __version__
from gemmakit.bench import measure, timing  # from here on torch's import counts
from gemmakit.config import GemmaConfig


def source_of(spec: dict[str, Any]) -> Any:
    return GemmaConfig(**spec["config"]) if "config" in spec else spec["model"]


def load(spec: dict[str, Any]) -> Any:
    """The model in evaluation mode."""
    import torch

    torch.set_num_threads(spec["threads"])
    chosen = {key: spec.get(key) for key in ("dtype", "device", "quantize")}
    return measure.load(source_of(spec), **chosen)


def about(model: Any, spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    found = {"side": f"gemmakit {__version__}", **measure.facts(model), "said": [*spec["said"]]}
    return found if spec["device"] == "cpu" else {**found, "peak_device_gb": torch.cuda.max_memory_allocated() / 1e9}


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    chosen = {key: spec.get(key) for key in ("dtype", "device", "threads", "quantize")}
    return measure.speed(source_of(spec), timing.Work.of(spec), **chosen, check=lambda model: checked(model, spec))


def checked(model: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """What is looked at once everything was timed: the way decoding went, and whether its tokens are the right ones."""
    found = about(model, spec)
    if spec["device"] != "cpu":
        found["graphs"] = graphs_kept(model)
    if spec.get("check"):
        found["agreement"] = agreed(model, spec)
    return found


def graphs_kept(model: Any) -> int:
    """How many recorded steps there are: none means that steps ran one by one."""
    from gemmakit.pytorch.decode.capture import captured_steps

    return len(captured_steps(model).entries)


def agreed(model: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """What went wrong instead where it cannot be had: the times are there already."""
    import torch
    from agreement import agreement

    # Long enough for several tiles of keys.
    ids = timing.prompt_ids(min(300, max(spec["contexts"])), model.config.vocab_size, seed=2)
    try:
        return agreement(model, torch.tensor([ids], device=spec["device"]), spec["check"])
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def batch(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of `rows` prompts decoded together by generate_batch: runs of `few` and few + new tokens, subtracted."""
    model, replays = load(spec), counted_replays()
    rows = spec["rows"]
    prompts = [timing.prompt_ids(spec["prompt"], model.config.vocab_size, seed=i) for i in range(rows)]
    settings = {"max_batch_size": rows, "prefill_tokens": 8192, "eos_token_id": [], "do_sample": False}

    def run(new: int) -> float:
        def call() -> None:
            model.generate_batch(prompts, max_new_tokens=new, **settings)
            measure.synchronize(model.device)

        return timing.seconds(call)

    few, many = spec["few"], spec["few"] + spec["new"]
    run(few)
    took = timing.above_zero(statistics.median(run(many) - run(few) for _ in range(spec["repeats"])))
    read, context = measure.weights_read(model), spec["prompt"] + spec["few"] + spec["new"] // 2
    step = read["weight_bytes"] + rows * model.config.cache_size(context) * model.dtype.itemsize
    return {
        **about(model, spec), "batch_tokens_per_s": rows * spec["new"] / took, "batch_bytes_a_step": step, "rows": rows,
        "replayed_passes": replays(),
    }  # fmt: skip


def rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of each count of `rows` that decode side by side in the batch engine, the median of `new` steps."""
    from gemmakit import BatchEngine, Request

    model, found = load(spec), {}
    # Not min_new_tokens, for which each row's scores are looked through apart: llama.cpp's side takes the best of all.
    settings = {"max_new_tokens": spec["new"] + 1, "eos_token_id": [], "do_sample": False}
    for count in spec["rows"]:
        room = count * (spec["prompt"] + spec["new"] + 32)
        engine = BatchEngine(model, max_batch_size=count, cache_tokens=room, share_prefixes=False, speculate=False)
        for i in range(count):
            engine.add(Request(timing.prompt_ids(spec["prompt"], model.config.vocab_size, seed=i), settings=settings))
        waiting = set(range(count))
        while waiting:  # until all have a token, and so are decoding
            waiting -= {event.id for event in engine.step()}
        steps = [timing.seconds(engine.step) for _ in range(spec["new"] - 2)]
        found[f"tokens_per_s_{count}"] = count / statistics.median(steps)
        found["batch_invariant"] = str(engine.batch_invariant)
    return {**about(model, spec), **found}


def counted_replays() -> Callable[[], int]:
    """What tells how many of the engine's passes were replayed from a graph since now."""
    from gemmakit.pytorch.decode.batch.capture import StaticBatch

    count, replay = [0], StaticBatch.run

    def counted(self: StaticBatch, rows: Any) -> None:
        count[0] += 1
        replay(self, rows)

    StaticBatch.run = counted
    return lambda: count[0]


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of a training step: forward, loss (`chunk`: so many positions at a time), backward, AdamW."""
    import torch

    model = load(spec).train()
    tokens = spec["tokens"]
    ids = torch.tensor([timing.prompt_ids(tokens, model.config.vocab_size)], device=spec["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=spec["device"] != "cpu")

    def step() -> None:
        model(ids, labels=ids, use_cache=False, loss_chunk_size=spec.get("chunk")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        measure.synchronize(model.device)

    step()
    step()
    took = statistics.median(timing.seconds(step) for _ in range(spec["repeats"]))
    flops = training_flops(model.config, tokens) / tokens
    return {**about(model, spec), "train_tokens_per_s": tokens / took, "train_flops_a_token": flops}


def training_flops(config: Any, tokens: int) -> int:
    """Operations of a training step over one sequence: 6 a weight and token, head included, and 12 * N * H * S / 2 a
    layer and token for causal attention. Source: arXiv:2204.02311, appendix B.
    """
    weights = measure.linear_weights(config) + config.vocab_size * config.hidden_size
    attention = 6 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * tokens
    return tokens * (6 * weights + attention)


def limits(spec: dict[str, Any]) -> dict[str, Any]:
    return measure.limits(spec["device"], spec["threads"], spec.get("limit_s", 1.5), spec.get("limit_bytes"))


def quality(spec: dict[str, Any]) -> dict[str, Any]:
    given = {key: spec[key] for key in ("device", "tokens") if key in spec}
    return measure.quality(spec["quantize"], spec["threads"], **given)


if __name__ == "__main__":
    parts = {"generate": generate, "batch": batch, "rows": rows, "train": train, "limits": limits, "quality": quality}
    side.main(parts, listen_to="gemmakit")
