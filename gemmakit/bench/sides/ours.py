"""gemmakit, measured as its peers are; the machine's limits and a quantization's quality in processes like it."""

from __future__ import annotations

import statistics
import time
from typing import Any

import common


def load(spec: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """torch, the model in evaluation mode, and seconds of import and load."""
    started = time.perf_counter()
    import torch

    import gemmakit
    from gemmakit.bench.models import obtain

    _ = gemmakit.GemmaForCausalLM  # its import is part of the start

    torch.set_num_threads(spec["threads"])
    spec["said"] = common.Said("gemmakit")
    imported = time.perf_counter() - started
    spec["bare"] = common.anonymous_bytes()
    started = time.perf_counter()
    model = obtain(spec)
    return torch, model, {"import_s": imported, "load_s": time.perf_counter() - started}


def about(torch: Any, model: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Versions, which way decoding went, and what it has to read."""
    import gemmakit
    from gemmakit.bench.counting import kv_bytes, prefill_flops, weights_read
    from gemmakit.pytorch.kernels import cpu

    weights, token = weights_read(model), kv_bytes(model.config, model.dtype.itemsize)
    read = {str(c): weights.total + token * _position(c, spec) for c in spec.get("contexts", ())}
    return {
        "side": f"gemmakit {gemmakit.__version__}",
        "torch": torch.__version__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "instruction_set": cpu.instruction_set() if spec["device"] == "cpu" else None,
        "decode_plan": {k: str(v) for k, v in model.decode_plan().items()},
        "said": list(spec["said"].lines),
        "bytes_a_token": read,
        "weight_bytes": weights.total,
        "kv_bytes_a_token": token,
        "head_bytes": weights.head,
        "head_dtype": weights.head_dtype,
        "prefill_flops_a_token": prefill_flops(model.config),
    }


def _position(context: int, spec: dict[str, Any]) -> int:
    """Tokens whose keys and values the middle one of the timed steps reads."""
    return (context or spec["prompt"]) + spec["new"] // 2 + 1


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    torch, model, times = load(spec)
    from gemmakit import DynamicCache

    device, vocabulary = spec["device"], model.config.vocab_size
    ids = torch.tensor([common.prompt_ids(spec["prompt"], vocabulary)], device=device)
    caches: dict[int, Any] = {}

    def run(context: int, new: int, streamer: Any) -> None:
        prompt, cache = ids, None
        if context and spec.get("fill") == "random":
            if context not in caches:
                caches[context] = common.filled(torch, model, DynamicCache(), context)
            cache = caches[context]
            cache.crop(context)
            prompt = torch.full((1, context + 1), 5, device=device)
        elif context:
            prompt = torch.tensor([common.prompt_ids(context, vocabulary, seed=1)], device=device)
        model.generate(
            prompt, past_key_values=cache, max_new_tokens=new, eos_token_id=[], do_sample=False, streamer=streamer
        )
        _wait(torch, device)

    with torch.inference_mode():
        first = common.seconds(lambda: run(0, 1, None))
        run(0, 3, None)
        used = common.memory(spec["bare"])
        found = common.rates(run, spec)
    total = times["import_s"] + times["load_s"] + first
    peak = {k: v for k, v in common.memory(spec["bare"]).items() if k == "peak_rss_gb"}
    kept: dict[str, Any] = {"first_token_s": total, **found, **used, **peak, **device_memory(torch, device)}
    if device != "cpu":
        kept["graphs"] = graphs_kept(model)
    kept = {**about(torch, model, spec), **times, **kept}
    if spec.get("check"):
        # Long enough for several tiles of keys.
        long = common.prompt_ids(min(300, max(spec["contexts"])), vocabulary, seed=2)
        kept["agreement"] = checked(model, torch.tensor([long], device=device), spec["check"])
    return kept


def graphs_kept(model: Any) -> int:
    """How many recorded steps there are: none means that steps ran one by one."""
    from gemmakit.pytorch.decode import graphs

    return len(graphs.kept(model).entries)


def checked(model: Any, ids: Any, new: int) -> dict[str, Any]:
    """What went wrong instead where it cannot be had: the times are there already."""
    from gemmakit.bench.agreement import agreement

    try:
        return agreement(model, ids, new)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def batch(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of `rows` prompts decoded together by generate_batch: runs of `few` and few + new tokens, subtracted."""
    torch, model, times = load(spec)
    from gemmakit.pytorch.decode.captured_batch import FixedBatch

    vocabulary, rows = model.config.vocab_size, spec["rows"]
    replays, replay = [0], FixedBatch.run

    def counted(self: FixedBatch, rows: Any) -> None:
        replays[0] += 1
        replay(self, rows)

    FixedBatch.run = counted
    prompts = [common.prompt_ids(spec["prompt"], vocabulary, seed=i) for i in range(rows)]
    settings = {"max_batch_size": rows, "prefill_tokens": 8192, "eos_token_id": [], "do_sample": False}

    def run(new: int) -> float:
        def call() -> None:
            model.generate_batch(prompts, max_new_tokens=new, **settings)
            _wait(torch, spec["device"])

        return common.seconds(call)

    few, many = spec["few"], spec["few"] + spec["new"]
    run(few)
    took = common.above_zero(statistics.median(run(many) - run(few) for _ in range(spec["repeats"])))
    step = {"batch_bytes_a_step": _batch_bytes(model, spec), "rows": rows}
    found = {"batch_tokens_per_s": rows * spec["new"] / took, **step, "replayed_passes": replays[0]}
    return {**about(torch, model, {**spec, "contexts": []}), **times, **found, **device_memory(torch, spec["device"])}


def _batch_bytes(model: Any, spec: dict[str, Any]) -> int:
    from gemmakit.bench.counting import kv_bytes, weights_read

    context = spec["prompt"] + spec["few"] + spec["new"] // 2
    return weights_read(model).total + spec["rows"] * context * kv_bytes(model.config, model.dtype.itemsize)


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of a training step: forward, loss (`chunk`: so many positions at a time), backward, AdamW."""
    torch, model, times = load(spec)
    from gemmakit.bench.counting import training_flops

    model.train()
    tokens, device = spec["tokens"], spec["device"]
    ids = torch.tensor([common.prompt_ids(tokens, model.config.vocab_size)], device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=device != "cpu")

    def step() -> None:
        model(ids, labels=ids, use_cache=False, loss_chunk_size=spec.get("chunk")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(torch, device)

    step()
    step()
    took = statistics.median(common.seconds(step) for _ in range(spec["repeats"]))
    flops = training_flops(model.config, tokens)
    found = {"train_tokens_per_s": tokens / took, "train_flops_a_token": flops / tokens}
    return {**about(torch, model, {**spec, "contexts": []}), **times, **found, **device_memory(torch, device)}


def _wait(torch: Any, device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def device_memory(torch: Any, device: str) -> dict[str, float]:
    return {} if device == "cpu" else {"peak_device_gb": torch.cuda.max_memory_allocated() / 1e9}


def limits(spec: dict[str, Any]) -> dict[str, Any]:
    from gemmakit.bench.limits import measure_limits

    return measure_limits(spec)


def quality(spec: dict[str, Any]) -> dict[str, Any]:
    from gemmakit.bench.quality import measure_quality

    return measure_quality(spec)


if __name__ == "__main__":
    common.main({"generate": generate, "batch": batch, "train": train, "limits": limits, "quality": quality})
