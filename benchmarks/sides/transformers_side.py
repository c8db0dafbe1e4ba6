"""transformers, measured as gemmakit is, by the same clock; nothing else of gemmakit is in its process.

Fields of a spec besides those in side.py: static (a static cache, which transformers compiles on a GPU), and for
batches and training those of gemmakit_side.py.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import side

from gemmakit.bench import timing


def load(spec: dict[str, Any]) -> tuple[Any, Any, dict[str, float]]:
    """torch, the model in evaluation mode, and seconds of import and load."""
    started = time.perf_counter()
    import torch
    from transformers import GemmaConfig, GemmaForCausalLM

    torch.set_num_threads(spec["threads"])
    imported = time.perf_counter() - started
    spec["bare"] = timing.anonymous_bytes()
    started, device = time.perf_counter(), torch.device(spec["device"])
    if "config" in spec:
        with device:
            model: Any = GemmaForCausalLM(GemmaConfig(**spec["config"])).to(getattr(torch, spec["dtype"]))
    else:
        model = GemmaForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"])
        model = model.to(device) if device.type != "cpu" else model
    model.eval()
    model.generation_config.eos_token_id = None  # the number of tokens is what is asked for, without a rule for it
    return torch, model, {"import_s": imported, "load_s": time.perf_counter() - started}


def about(torch: Any, static: bool = False) -> dict[str, Any]:
    import transformers

    return {"side": f"transformers {transformers.__version__}" + (", static" * static), "torch": torch.__version__}


def device_memory(torch: Any, device: str) -> dict[str, float]:
    return {} if device == "cpu" else {"peak_device_gb": torch.cuda.max_memory_allocated() / 1e9}


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    torch, model, times = load(spec)
    from transformers import DynamicCache

    device, static = spec["device"], spec.get("static", False)
    ids = torch.tensor([timing.prompt_ids(spec["prompt"], model.config.vocab_size)], device=device)
    extra = {"cache_implementation": "static"} if static else {}
    caches: dict[int, Any] = {}

    def run(context: int, new: int, streamer: Any) -> None:
        if context and (static or spec.get("fill") != "random"):  # a static cache is generate()'s own
            long = torch.tensor([timing.prompt_ids(context, model.config.vocab_size, seed=1)], device=device)
            model.generate(long, max_new_tokens=new, do_sample=False, streamer=streamer, **extra)
        elif context:
            if context not in caches:
                caches[context] = timing.filled(torch, model, DynamicCache(), context)
            cache = caches[context]
            if cache.get_seq_length() > context:
                cache.crop(context - cache.get_seq_length())
            long = torch.full((1, context + 1), 5, device=device)
            model.generate(long, past_key_values=cache, max_new_tokens=new, do_sample=False, streamer=streamer)
        else:
            model.generate(ids, max_new_tokens=new, do_sample=False, streamer=streamer, **extra)
        if device != "cpu":
            torch.cuda.synchronize()

    with torch.inference_mode():
        if static:  # compiled for the longest of the calls, once
            run(max(spec["contexts"]), timing.FEW + spec["new"], None)
        begin = spec["contexts"][0] if static else 0
        first = timing.seconds(lambda: run(begin, 1, None))
        run(begin, 3, None)
        used = timing.memory(spec["bare"])
        found = timing.rates(run, timing.Work.of(spec))
    if static and not spec.get("prefill"):
        del found["prefill_tokens_per_s"]  # of a prompt of another length than the other sides'
    total = times["import_s"] + times["load_s"] + first
    peak = {k: v for k, v in timing.memory(spec["bare"]).items() if k == "peak_rss_gb"}
    kept = {**about(torch, static), **times, "first_token_s": total, **found, **used, **peak}
    return {**kept, **device_memory(torch, device)}


def batch(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of `rows` prompts decoded together by generate_batch: runs of two lengths, subtracted."""
    torch, model, times = load(spec)
    from transformers import GenerationConfig

    prompts = [timing.prompt_ids(spec["prompt"], model.config.vocab_size, seed=i) for i in range(spec["rows"])]

    def run(new: int) -> float:
        config = GenerationConfig(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0)
        return timing.seconds(lambda: model.generate_batch(inputs=prompts, generation_config=config))

    few, many = spec["few"], spec["few"] + spec["new"]
    run(few)
    took = timing.above_zero(statistics.median(run(many) - run(few) for _ in range(spec["repeats"])))
    found = {"batch_tokens_per_s": spec["rows"] * spec["new"] / took}
    return {**about(torch), **times, **found, **device_memory(torch, spec["device"])}


def train(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of a training step: forward, loss, backward, AdamW."""
    torch, model, times = load(spec)
    model.train()
    ids = torch.tensor([timing.prompt_ids(spec["tokens"], model.config.vocab_size)], device=spec["device"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=spec["device"] != "cpu")

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if spec["device"] != "cpu":
            torch.cuda.synchronize()

    step()
    took = statistics.median(timing.seconds(step) for _ in range(spec["repeats"]))
    found = {"train_tokens_per_s": spec["tokens"] / took}
    return {**about(torch), **times, **found, **device_memory(torch, spec["device"])}


if __name__ == "__main__":
    side.main({"generate": generate, "batch": batch, "train": train})
