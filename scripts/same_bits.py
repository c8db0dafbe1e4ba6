"""What the library computes on fixed prompts, strategies, dtypes and caches, as digests, to compare two commits.

    python scripts/same_bits.py before.json                    # in a checkout of the one commit
    python scripts/same_bits.py after.json --like before.json  # in a checkout of the other: names what differs

A digest is of the raw bytes of tokens, scores, logits, gradients or text; of a generation there are two, of its tokens
and of all. An error counts by its class and message. Prompt lookup times its passes to decide how many tokens it
proposes, so the clock is replaced by one that counts.

Only public names are used, so that the script runs on any commit. Both runs belong on one machine.
"""

import argparse
import hashlib
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import gemmakit

SIZES = dict(vocab_size=199, hidden_size=64, intermediate_size=160, num_hidden_layers=3, head_dim=32,
             max_position_embeddings=512)  # fmt: skip
SHAPES = {
    "multi-query": dict(SIZES, num_attention_heads=4, num_key_value_heads=1),
    "grouped": dict(SIZES, num_attention_heads=4, num_key_value_heads=2),
    "multi-head": dict(SIZES, num_attention_heads=2, num_key_value_heads=2, attention_bias=True),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROMPT = [[2, 5, 9, 5, 9, 17, 33, 5, 9, 17], [2, 71, 8, 8, 71, 8, 8, 120, 71, 8], [0, 0, 0, 2, 44, 101, 3, 44, 101, 3]]
LONG = [[2, *[(7 * i * i + 3 * i) % 190 + 5 for i in range(59)]]]

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, two ends": dict(eos_token_id=[1, 5, 9, 71]),
    "no cache": dict(use_cache=False),
    "sample": dict(do_sample=True, seed=3),
    "sample, truncated": dict(do_sample=True, seed=5, temperature=0.7, top_k=20, top_p=0.9),
    "sample, min_p": dict(do_sample=True, seed=7, min_p=0.05, typical_p=0.95),
    "sample, cut offs": dict(do_sample=True, seed=7, epsilon_cutoff=1e-3, eta_cutoff=1e-3),
    "sample, three a prompt": dict(do_sample=True, seed=11, num_return_sequences=3),
    "penalties": dict(repetition_penalty=1.3, no_repeat_ngram_size=2, encoder_no_repeat_ngram_size=3),
    "lengths": dict(min_new_tokens=6, exponential_decay_length_penalty=(3, 1.2), eos_token_id=[1, 5]),
    "forced": dict(forced_eos_token_id=1, suppress_tokens=[3, 4, 5], begin_suppress_tokens=[8, 9],
                   bad_words_ids=[[17], [8, 71]], sequence_bias={(33,): 2.0, (5, 9): -3.0}),
    "guided": dict(guidance_scale=1.5),
    "watermark": dict(do_sample=True, seed=2, watermarking_config={"bias": 2.5, "seeding_scheme": "selfhash"}),
    "beams": dict(num_beams=4, num_return_sequences=2),
    "beams, early": dict(num_beams=3, early_stopping=True, length_penalty=0.6, eos_token_id=[1, 5, 9, 71]),
    "beams, never": dict(num_beams=3, early_stopping="never", length_penalty=-1.0, eos_token_id=[1, 5, 9, 71]),
    "beams, sampled": dict(num_beams=3, do_sample=True, seed=9, top_k=30),
    "beams, diverse": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, num_return_sequences=4),
    "beams, constrained": dict(num_beams=4, force_words_ids=[[33, 5], [17]]),
    "beams, constrained, either": dict(num_beams=4, force_words_ids=[[[71], [120, 8]]]),
    "contrastive": dict(penalty_alpha=0.6, top_k=4),
    "prompt lookup": dict(prompt_lookup_num_tokens=3),
    "static cache": dict(cache_implementation="static"),
    "offloaded cache": dict(cache_implementation="offloaded"),
    "quantized cache": dict(cache_implementation="quantized"),
    "prefill in chunks": dict(prefill_chunk_size=4),
    "everything kept": dict(output_scores=True, output_logits=True, output_attentions=True, output_hidden_states=True),
}  # fmt: skip
ONE_ROW = {"prompt lookup", "guided"}


def digest(value: Any) -> str:
    """Of tensors by their bytes, of containers by their order, of the rest by its text."""
    sha = hashlib.sha256()

    def take(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            x = x.detach().contiguous()
            sha.update(f"{tuple(x.shape)} {x.dtype}".encode())
            sha.update(x.view(torch.uint8).numpy().tobytes() if x.numel() and x.dim() else repr(x.tolist()).encode())
        elif isinstance(x, dict):
            take(list(x.items()))
        elif isinstance(x, (list, tuple)):
            for each in x:
                take(each)
            sha.update(b";")
        else:
            sha.update(repr(x).encode())

    take(value)
    return sha.hexdigest()[:16]


def outcome(run: Callable[[], Any]) -> str:
    """The digest of what a case gives, tokens first where it gives more."""
    try:
        found = run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return f"{digest(found[0])} {digest(found)}" if isinstance(found, list) else digest(found)


def tiny(shape: str, dtype: torch.dtype = torch.float32, kind: Any = None, seed: int = 0) -> Any:
    """A model of random weights large enough that scores differ well."""
    kind = kind or gemmakit.GemmaForCausalLM
    model = kind(gemmakit.GemmaConfig(**SHAPES[shape]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.empty(p.shape).normal_(0.0, 0.25 if p.dim() > 1 else 0.1, generator=generator))
    return model.to(dtype).eval()


def generated(model: Any, ids: list[list[int]], **settings: Any) -> Any:
    out = model.generate(torch.tensor(ids), max_new_tokens=16, return_dict_in_generate=True, **settings)
    parts = ("sequences", "scores", "logits", "attentions", "hidden_states", "sequences_scores", "beam_indices")
    return [getattr(out, name, None) for name in parts]


def forwards(model: Any) -> Iterator[tuple[str, Callable[[], Any]]]:
    ids, mask = torch.tensor(PROMPT), (torch.tensor(PROMPT) != 0).long()
    for how in ("eager", "sdpa"):
        model.config.attn_implementation = how
        yield f"logits, {how}", lambda: model(ids, attention_mask=mask).logits

        def stepped() -> Any:
            cache, parts = gemmakit.DynamicCache(), (slice(0, 4), slice(4, 5), slice(5, 8), slice(8, 10))
            with torch.inference_mode():
                return [model(ids[:2, part], past_key_values=cache).logits for part in parts]

        yield f"steps, {how}", stepped
    model.config.attn_implementation = None
    with torch.inference_mode():
        yield "long prompt", lambda: model(torch.tensor(LONG)).logits


def gradients(model: Any) -> Any:
    ids = torch.tensor(PROMPT[:2])
    model.train()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = [loss, *(p.grad for p in model.parameters())]
    model.zero_grad()
    model.eval()
    return found


def batched(model: Any, **settings: Any) -> Any:
    prompts = [[i for i in row if i] for row in (*PROMPT, *LONG, *PROMPT)]
    return [r.ids for r in model.generate_batch(prompts, max_new_tokens=12, max_batch_size=3, page_size=4, **settings)]


def torch_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    for shape in SHAPES:
        for dtype in DTYPES:
            model, name = tiny(shape, dtype), f"{shape}, {str(dtype)[6:]}"
            draft = tiny(shape, dtype, seed=1)
            yield from ((f"{name}: {case}", run) for case, run in forwards(model))
            yield f"{name}: gradients", lambda model=model: gradients(model)
            for case, settings in STRATEGIES.items():
                kept = {"output_scores": True, **settings}
                rows = PROMPT[:1] if case in ONE_ROW else PROMPT
                yield f"{name}: {case}", lambda m=model, r=rows, s=kept: generated(m, r, **s)
                yield f"{name}: {case}, long", lambda m=model, s=kept: generated(m, LONG, **s)
            yield f"{name}: assisted", lambda m=model, d=draft: generated(m, PROMPT[:1], assistant_model=d)
            yield f"{name}: batch", lambda m=model: batched(m)
            yield f"{name}: batch, sampled", lambda m=model: batched(m, do_sample=True, seed=4, top_k=50)
    for kind in (gemmakit.GemmaForSequenceClassification, gemmakit.GemmaForTokenClassification):
        model = tiny("grouped", kind=kind)
        mask = (torch.tensor(PROMPT) != 0).long()
        yield kind.__name__, lambda m=model, a=mask: m(torch.tensor(PROMPT), attention_mask=a).logits


def quantized_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        tiny("grouped", torch.bfloat16).save_pretrained(folder)
        for scheme in ("int8", "int4", "int4-g128"):
            target = Path(folder) / scheme
            yield f"{scheme}: files", lambda s=scheme, t=target: (gemmakit.quantize_checkpoint(folder, t, s), None)[1]
            for dtype in (torch.bfloat16, torch.float32):
                model = gemmakit.GemmaForCausalLM.from_pretrained(target, dtype=dtype)
                name = f"{scheme}, {str(dtype)[6:]}"
                yield f"{name}: weights", lambda m=model: sorted(m.state_dict().items())
                yield from ((f"{name}: {case}", run) for case, run in forwards(model))
                for case in ("greedy", "sample", "beams", "contrastive", "prompt lookup"):
                    settings = STRATEGIES[case]
                    yield f"{name}: {case}", lambda m=model, s=settings: generated(m, PROMPT[:1], **s)
                    yield f"{name}: {case}, long", lambda m=model, s=settings: generated(m, LONG, **s)
                yield f"{name}: batch", lambda m=model: batched(m)


def demo_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    name = gemmakit.demo_model()
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(name)
    texts = ["If the file", "Return the", "Die Straße, 東京, 🤖 and\ttabs\n", "def f(x):\n    return x"]
    chat = [{"role": "user", "content": "What is 34 + 58?"}]
    yield "demo: ids", lambda: [tokenizer(t)["input_ids"] for t in texts]
    yield "demo: chat", lambda: tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    for dtype in ("bfloat16", "float32"):
        model = gemmakit.AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        for text in texts:
            ids = [tokenizer(text)["input_ids"]]
            for case in ("greedy", "sample, truncated", "beams", "contrastive", "prompt lookup"):
                settings = STRATEGIES[case]
                yield f"demo, {dtype}: {text!r}, {case}", lambda m=model, i=ids, s=settings: generated(m, i, **s)
        for more in (dict(stop_strings=["the "]), dict(token_healing=True), dict(regex="[0-9]+ (apples|pears)")):
            ids = [tokenizer(texts[0])["input_ids"]]
            yield f"demo, {dtype}: {more}", lambda m=model, i=ids, s=more: generated(m, i, tokenizer=tokenizer, **s)
        pipe = gemmakit.pipeline("text-generation", model=model, tokenizer=tokenizer)
        yield f"demo, {dtype}: pipeline", lambda p=pipe: p([*texts, *texts], max_new_tokens=12, do_sample=False)
        yield f"demo, {dtype}: chat pipeline", lambda p=pipe: p(chat, max_new_tokens=12, do_sample=False)


def flax_cases() -> Iterator[tuple[str, Callable[[], Any]]]:
    import jax
    import numpy

    for shape in SHAPES:
        model = gemmakit.FlaxGemmaForCausalLM(gemmakit.GemmaConfig(**SHAPES[shape]), seed=0)
        ids = numpy.array(PROMPT)
        mask = (ids != 0).astype("int32")

        def tensor(x: Any) -> torch.Tensor:
            return torch.from_numpy(numpy.array(x))

        yield f"flax, {shape}: logits", lambda m=model, i=ids, a=mask: tensor(m(i, attention_mask=a).logits)
        cases = dict(greedy={}, beams=dict(num_beams=3), sample=dict(do_sample=True, prng_key=jax.random.PRNGKey(3)))
        for case, settings in cases.items():

            def run(m: Any = model, i: Any = ids, a: Any = mask, s: Any = settings) -> Any:
                return tensor(m.generate(i, attention_mask=a, max_new_tokens=8, **s).sequences)

            yield f"flax, {shape}: {case}", run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--like", type=Path, help="another run's file, to compare with")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-flax", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    time.perf_counter = itertools.count().__next__  # pyright: ignore[reportAttributeAccessIssue]
    like = {} if args.like is None else json.loads(args.like.read_text())
    found: dict[str, str] = {}
    for cases in (torch_cases, quantized_cases, demo_cases, *(() if args.no_flax else (flax_cases,))):
        for name, run in cases():
            found[name] = outcome(run)
        print(f"{cases.__name__}: {len(found)} cases so far", file=sys.stderr)
    args.out.write_text(json.dumps(found, indent=1))
    failed = [f"{name}: {value}" for name, value in found.items() if ": " in value]
    print("\n".join([f"{len(found)} cases, {len(failed)} of them errors", *failed]))
    if args.like is None:
        return
    names = found if args.no_flax else {**found, **like}
    differ = sorted(n for n in names if found.get(n) != like.get(n))
    for name in differ:
        print(f"differs: {name}\n    {like.get(name, 'not there')}\n    {found.get(name, 'not there')}")
    print(f"{len(found) - len(differ)} equal to the bit, {len(differ)} different")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
