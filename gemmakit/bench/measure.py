"""One model measured in this process, and what it is held against: the machine's limits, a quantization's quality.

Axis letters: D hidden, F mlp, N heads, K kv heads, H head_dim, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from gemmakit.bench import STARTED
from gemmakit.bench.timing import Work, anonymous_bytes, decode_key, filled, memory, prompt_ids, rates, seconds
from gemmakit.checkpoint.layout import SCALAR, tensor_shapes
from gemmakit.checkpoint.memory import free_memory_bytes
from gemmakit.config import GemmaConfig
from gemmakit.dtypes import dtype_name
from gemmakit.errors import InputError
from gemmakit.family import PRESETS
from gemmakit.hub import demo_model
from gemmakit.pytorch.cache import DynamicCache
from gemmakit.pytorch.heads import GemmaForCausalLM
from gemmakit.pytorch.kernels import cpu
from gemmakit.pytorch.methods import assign
from gemmakit.pytorch.parallel.processes import local_device
from gemmakit.pytorch.parallel.tensor import TensorPlan, tensor_plan
from gemmakit.pytorch.per_layer import LAYER_PARTS
from gemmakit.pytorch.pretrained import HEADS, complete
from gemmakit.pytorch.quantize import quantizer_for, replace_with_quantized
from gemmakit.quantization import SHORT_NAMES, parse_quantization
from gemmakit.text import GemmaTokenizer

GB = 1e9
# Shapes of random weights; "tiny" is for trying things out.
TINY: dict[str, Any] = dict(hidden_size=96, intermediate_size=320, num_hidden_layers=3, num_attention_heads=4,
                            num_key_value_heads=2, head_dim=32, vocab_size=2048)  # fmt: skip
STD = 0.02
POOL = 16_777_213  # draws that are repeated; a prime, so that no two rows are alike
GROWTH = 8  # of the work, from one size that is tried to the next
WINDOW = 512  # tokens that quality reads together, <bos> included
EMBEDDING, HEAD, TABLE = "model.embed_tokens.", "lm_head.", "model.embed_tokens_per_layer."


# -- the model ---------------------------------------------------------------------------------------------------------


def size_config(size: str, **changes: Any) -> GemmaConfig:
    """The configuration of a released size, or of "tiny". Raises InputError."""
    if size == "tiny":
        return GemmaConfig(**{**TINY, **changes})
    if size not in PRESETS:
        raise InputError(f"there is no size {size!r}; the sizes are {', '.join(PRESETS)}, tiny.")
    return GemmaConfig.preset(size, **changes)


def scheme_config(scheme: str | None) -> Any:
    """The quantization of a short name ("int8", "int4", "int4-a8"); None for none. Raises InputError."""
    if scheme is None:
        return None
    if scheme not in SHORT_NAMES:
        raise InputError(f"there is no quantization {scheme!r} here; there are {', '.join(SHORT_NAMES)}.")
    return parse_quantization(scheme)


def load(
    source: str | GemmaConfig,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    quantize: str | None = None,
    tp_plan: str | None = None,
) -> GemmaForCausalLM:
    """A folder or a name on the Hub; or, of a configuration, random weights ("auto" is bfloat16 then).

    tp_plan: as in from_pretrained.
    """
    quantization = scheme_config(quantize)
    if isinstance(source, GemmaConfig):
        kind, where = getattr(torch, "bfloat16" if dtype == "auto" else dtype), torch.device(device)
        plan = tensor_plan(tp_plan, source, where)
        return random_model(source, kind, where if plan is None else local_device(where), quantization, plan)
    kind = {} if quantization is None else {"quantization_config": quantization}
    return GemmaForCausalLM.from_pretrained(source, dtype=dtype, device_map=device, tp_plan=tp_plan, **kind)


def random_model(
    config: GemmaConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Any = None,
    plan: TensorPlan | None = None,
) -> GemmaForCausalLM:
    """Weights from N(0, 0.02), made on the device one after another and quantized at once: never all twice.

    Norms multiply by 1. The same `POOL` draws are repeated: drawing all of a 7B would take a CPU minutes, and no speed
    depends on it. plan: of the model of a part.
    """
    with torch.device("meta"):
        model = GemmaForCausalLM(config if plan is None else plan.local_config())
    quantizer = quantizer_for(config, quantization, HEADS)
    pool = torch.empty(POOL, device=device).normal_(0.0, STD).to(dtype)
    tied = model.tied_weights if config.tie_word_embeddings else {}
    for name, like in list(model.state_dict().items()):
        if name not in tied:
            norm = 1.0 - config.kind.norm_offset if "norm" in name else 0.0
            start = 1.0 if name.endswith((SCALAR, "router.scale", "per_expert_scale")) else norm
            part = None if plan is None else plan.part(name)
            rows = like.shape[0] if part is None or part.dim else part.size
            tensor = torch.full((rows, *like.shape[1:]), start, dtype=dtype, device=device)
            if tensor.ndim > 1:
                for piece in tensor.view(-1).split(len(pool)):
                    piece.copy_(pool[: len(piece)])
            if not replace_with_quantized(quantizer, model, name, tensor, device, dtype):
                assign(model, name, tensor)
    model._set_quantizer(quantizer)
    complete(model, [], dtype, device)
    if plan is not None:
        plan.enter(model)
    return model.eval()


# -- what a token costs ------------------------------------------------------------------------------------------------


def weights_read(model: GemmaForCausalLM) -> dict[str, Any]:
    """weight_bytes that a decoding step reads, head_bytes of them and head_dtype.

    Counted over the model's own tensors, in the format they are in: codes, scales and zeros of packed weights too. Of
    an embedding table that is not also the head, all layers' own one too, only a row is read, which is left out; of
    experts those that a token takes.
    """
    share = experts_read(model.config)
    tensors = model.state_dict()
    head = {n: t for n, t in tensors.items() if n.startswith(HEAD)}
    head = head or {n: t for n, t in tensors.items() if n.startswith(EMBEDDING)}
    inner = {n: t.nbytes for n, t in tensors.items() if not n.startswith((HEAD, EMBEDDING, TABLE))}
    layers = int(sum(size * (share if ".experts." in n else 1.0) for n, size in inner.items()))
    head_bytes = sum(t.nbytes for t in head.values())
    dtype = next(t.dtype for n, t in head.items() if n.endswith("weight"))
    return {
        "weight_bytes": layers + head_bytes, "head_bytes": head_bytes, "head_dtype": dtype_name(dtype),
    }  # fmt: skip


def experts_read(config: GemmaConfig) -> float:
    """The part of all experts that a token takes."""
    return (config.top_k_experts or 1) / (config.num_experts or 1) if config.enable_moe_block else 1.0


def linear_weights(config: GemmaConfig, prompt: bool = False) -> int:
    """Elements of the projections of all layers that a token meets, without the head.

    prompt: one of a prompt, whose last alone goes through the layers that read the keys of others, and through what
    stands behind the attention of the last layer.
    """
    shapes, share = tensor_shapes(config), experts_read(config)
    readers = [i for i in range(config.num_hidden_layers) if prompt and config.layer(i).kv_source is not None]
    passed = (EMBEDDING, HEAD, TABLE, *(f"model.layers.{i}." for i in readers))
    if prompt and not config.enable_moe_block:
        last = f"model.layers.{config.num_hidden_layers - 1}."
        passed += tuple(last + part for part in ("self_attn.o_proj", "mlp", *LAYER_PARTS))
    return sum(
        int(prod(shape) * (share if ".experts." in name else 1.0))
        for name, shape in shapes.items()
        if len(shape) > 1 and not name.startswith(passed)
    )


def costs(model: GemmaForCausalLM, work: Work) -> dict[str, Any]:
    """Bytes read to decode a token after each context, and operations to read one of a prompt: a multiplication and an
    addition a weight. The head runs once a prompt, and attention's own products grow with it; both are left out, so
    that shares are slightly low.
    """
    read, itemsize, held = weights_read(model), model.dtype.itemsize, model.config.cache_size
    # The middle one of the timed steps reads the keys and values of so many tokens.
    behind = {c: (c or work.prompt) + work.new // 2 + 1 for c in work.contexts}
    return {
        "bytes_a_token": {str(c): read["weight_bytes"] + itemsize * held(n) for c, n in behind.items()},
        "kv_bytes_a_token": itemsize * held(1),
        **read,
        "prefill_flops_a_token": 2 * linear_weights(model.config, prompt=True),
    }


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(
    source: str | GemmaConfig,
    work: Work,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 1,
    quantize: str | None = None,
    tp_plan: str | None = None,
    check: Callable[[GemmaForCausalLM], dict[str, Any]] = lambda _: {},
) -> dict[str, Any]:
    """Load, first token, `timing.rates`, memory, and what a token costs. Of a process that did nothing before.

    `check` adds what it finds, after everything was timed.
    """
    torch.set_num_threads(threads)
    bare, import_s = anonymous_bytes(), time.perf_counter() - STARTED
    started = time.perf_counter()
    model = load(source, dtype=dtype, device=device, quantize=quantize, tp_plan=tp_plan)
    load_s = time.perf_counter() - started
    run = greedy(model, work)
    with torch.inference_mode():
        first = seconds(lambda: run(0, 1, None))
        run(0, 3, None)
        used = memory(bare)
        found = rates(run, work)
    used |= {key: value for key, value in memory(bare).items() if key == "peak_rss_gb"}
    if device != "cpu":
        used["peak_device_gb"] = torch.cuda.max_memory_allocated() / GB
    times = {"import_s": import_s, "load_s": load_s, "first_token_s": import_s + load_s + first}
    return {**facts(model), **costs(model, work), **times, **found, **used, **check(model)}


def greedy(model: GemmaForCausalLM, work: Work) -> Callable[[int, int, Any], None]:
    """run(context, new tokens, streamer), which returns when they are there."""
    vocabulary, device = model.config.vocab_size, model.device
    ids = torch.tensor([prompt_ids(work.prompt, vocabulary)], device=device)
    caches: dict[int, DynamicCache] = {}

    def run(context: int, new: int, streamer: Any) -> None:
        prompt, cache = ids, None
        if context and work.fill == "random":
            if context not in caches:
                caches[context] = filled(torch, model, DynamicCache(), context)
            cache = caches[context]
            cache.crop(context)
            prompt = torch.full((1, context + 1), 5, device=device)
        elif context:
            prompt = torch.tensor([prompt_ids(context, vocabulary, seed=1)], device=device)
        # What a step costs is asked: text of random weights repeats itself, and would come several tokens a step.
        asked: dict[str, Any] = dict(max_new_tokens=new, eos_token_id=[], do_sample=False, speculate=False)
        model.generate(prompt, past_key_values=cache, streamer=streamer, **asked)
        synchronize(device)

    return run


def facts(model: GemmaForCausalLM) -> dict[str, Any]:
    """Which way decoding goes, and by what."""
    return {
        "torch": torch.__version__,
        "dtype": dtype_name(model.dtype),
        "instruction_set": cpu.instruction_set() if model.device.type == "cpu" else None,
        "decode_plan": {k: str(v) for k, v in model.decode_plan().items()},
    }


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- limits: what the machine can do at most, measured in the same run -------------------------------------------------


def limits(device: str, threads: int, limit_s: float = 1.5, limit_bytes: int | None = None) -> dict[str, Any]:
    """bandwidth_gb_per_s, bandwidth_by (which way of reading was the fastest), matmul_gflop_per_s by dtype; the name,
    memory and versions of an accelerator.

    limit_s: seconds for each figure, which takes a few times that at most. limit_bytes: of all buffers; far more than
    any cache if left out.
    """
    torch.set_num_threads(threads)
    where = torch.device(device)
    with torch.inference_mode():
        how, bandwidth = read_bandwidth(where, limit_bytes or _plenty_of_bytes(where), limit_s)
        matmul = {name: matmul_rate(where, name, limit_s) / GB for name in ("float32", "bfloat16")}
    found = {"bandwidth_gb_per_s": bandwidth / GB, "bandwidth_by": how, "matmul_gflop_per_s": matmul}
    if where.type != "cuda":
        return found
    about = torch.cuda.get_device_properties(where)
    return {**found, "device": about.name, "device_memory_gb": about.total_memory / GB,
            "capability": f"{about.major}.{about.minor}", "cuda": torch.version.cuda}  # fmt: skip


def _plenty_of_bytes(device: torch.device) -> int:
    """A shared cache may hold half a gigabyte; if so much is free."""
    if device.type == "cuda":
        return min(8 << 30, torch.cuda.mem_get_info(device)[0] // 8)
    return min(4 << 30, (free_memory_bytes() or 8 << 30) // 4)


def read_bandwidth(device: torch.device, nbytes: int, limit_s: float) -> tuple[str, float]:
    """(how, bytes a second) of the fastest of several ways to go through four buffers, one after the other.

    All four are timed together: one alone may still lie in a cache from the last time. nbytes: of all four, at most.
    """

    def buffers(nbytes: int) -> list[torch.Tensor]:
        return [torch.ones(max(nbytes // 16, 1), dtype=torch.float32, device=device) for _ in range(4)]

    def sums(nbytes: int) -> list[Callable[[], object]]:
        return [lambda b=b: b.sum() for b in buffers(nbytes)]

    every = buffers(fitting(max(nbytes // GROWTH**3, 64), nbytes, GROWTH, sums, device, limit_s))
    ways: dict[str, tuple[Callable[[Any], object], int]] = {"torch sum": (lambda b: b.sum(), 1)}
    if device.type != "cpu":
        ways["copy"] = (torch.empty_like(every[0]).copy_, 2)  # read and written
    elif cpu.library() is not None:
        ways["native read"] = (cpu.read_memory, 1)
    read = sum(buffer.nbytes for buffer in every)
    found = {
        how: moved * read / best_s([lambda go=go, b=b: go(b) for b in every], device, limit_s)
        for how, (go, moved) in ways.items()
    }
    how = max(found, key=lambda name: found[name])
    return how, found[how]


def matmul_rate(device: torch.device, dtype: str, limit_s: float) -> float:
    """Operations a second of torch.mm, with matrices as prefill has them: 2048 by 2048, wider on an accelerator;
    smaller ones where such a product takes too long, as of bfloat16 on a processor that only emulates it.
    """

    def product(n: int) -> list[Callable[[], object]]:
        a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in "ab")
        return [lambda: torch.mm(a, b)]

    n = fitting(64, 8192 if device.type == "cuda" else 2048, 2, product, device, limit_s)
    return 2 * n**3 / best_s(product(n), device, limit_s)


def fitting(
    least: int,
    most: int,
    factor: int,
    calls: Callable[[int], list[Callable[[], object]]],
    device: torch.device,
    limit_s: float,
) -> int:
    """The largest size up to `most` whose calls are expected to take half of limit_s, by the time of a smaller one.

    Times `factor`, a size makes GROWTH times the work. Little ones cost little to time, whatever the machine.
    """
    size = least
    while size < most and GROWTH * best_s(calls(size), device, 0.0) <= limit_s / 2:
        size = min(size * factor, most)
    return size


def best_s(calls: list[Callable[[], object]], device: torch.device, limit_s: float) -> float:
    """Seconds of the fastest round of all calls, one after another, until the time is up; the first warms up.

    Two rounds are made in any case: see `fitting` for what is not to take many times limit_s.
    """

    def every() -> None:
        for call in calls:
            call()
        synchronize(device)

    every()
    best, end = seconds(every), time.perf_counter() + limit_s
    while time.perf_counter() < end:
        best = min(best, seconds(every))
    return best


def shares(side: Mapping[str, Any] | None, limits: Mapping[str, Any]) -> dict[str, Any]:
    """Of the bandwidth, decoding after each context; of the matmul rate (the faster dtype's), prefill. 0 to 1."""
    if side is None or not limits:
        return {}
    bandwidth, matmul = limits["bandwidth_gb_per_s"] * GB, limits["matmul_gflop_per_s"]
    fastest = max(matmul, key=lambda dtype: matmul[dtype])
    decode = {c: read * side[decode_key(int(c))] / bandwidth for c, read in side.get("bytes_a_token", {}).items()}
    prefill = side["prefill_flops_a_token"] * side["prefill_tokens_per_s"] / (matmul[fastest] * GB)
    return {
        "decode_of_bandwidth": {c: round(share, 4) for c, share in decode.items()},
        "prefill_of_matmul": round(prefill, 4),
        "matmul_dtype": fastest,
    }


# -- quality: what a quantization costs, on the demo model, for random weights cannot tell -----------------------------


def quality(scheme: str, threads: int, *, device: str = "cpu", tokens: int = 8192) -> dict[str, Any]:
    """perplexity_ratio, top1_agreement and kl_nats against the demo model as it is stored, over so many tokens.

    On an accelerator the models are loaded to it as anybody's are. Where that fails, the CPU measures the same, and
    `device_error` says what failed.
    """
    try:
        return _quality(scheme, threads, device, tokens)
    except Exception as error:
        if device == "cpu":
            raise
        found = _quality(scheme, threads, "cpu", tokens)
        return {**found, "device_error": f"{type(error).__name__}: {str(error)[:500]}"}


def _quality(scheme: str, threads: int, device: str, tokens: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    demo = str(demo_model())
    name, text = held_out()
    encoded: Any = GemmaTokenizer.from_pretrained(demo)(text, add_special_tokens=False)
    ids = list(encoded["input_ids"])[:tokens]
    reference, model = load(demo, device=device), load(demo, device=device, quantize=scheme)
    return {"model": "demo", "text": name, "device": device, "tokens": len(ids), **divergence(reference, model, ids)}


def held_out() -> tuple[str, str]:
    """(its name, a text the demo model was not trained on): the repository's, else the demo's own page."""
    package = Path(__file__).resolve().parents[1]
    text = package.parent / "benchmarks" / "data" / "held_out.txt"
    if text.exists():
        return "benchmarks/data/held_out.txt", text.read_text(encoding="utf-8")
    return "the demo model's README", (package / "demo" / "README.md").read_text(encoding="utf-8")


@torch.inference_mode()
def divergence(reference: GemmaForCausalLM, model: GemmaForCausalLM, ids: list[int]) -> dict[str, float]:
    """perplexity_ratio, top1_agreement (0 to 1), kl_nats; every token of the text is predicted once."""
    nats = [0.0, 0.0]
    same = kl = 0.0
    for piece in pieces(ids):
        rows = torch.tensor([piece], device=reference.device)
        a, b = (m(rows, use_cache=False).logits[0, :-1].float().log_softmax(-1) for m in (reference, model))
        targets = rows[0, 1:, None]
        for i, scores in enumerate((a, b)):
            nats[i] -= float(scores.gather(1, targets).sum())
        same += float((a.argmax(-1) == b.argmax(-1)).sum())
        kl += float((a.exp() * (a - b)).sum())
    n = len(ids)
    ratio = float(torch.tensor((nats[1] - nats[0]) / n, dtype=torch.float64).exp())
    return {"perplexity_ratio": ratio, "top1_agreement": same / n, "kl_nats": kl / n}


def pieces(ids: list[int]) -> Iterator[list[int]]:
    for i in range(0, len(ids), WINDOW - 1):
        yield [2, *ids[i : i + WINDOW - 1]]
