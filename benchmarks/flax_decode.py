"""Greedy decode and prefill of the Flax backend on the CPU, in turn with other programs.

    python benchmarks/flax_decode.py FOLDER --make --size 2b --layers 4
    python benchmarks/flax_decode.py FOLDER [--dtype bfloat16] [--rounds 3] [--out FILE.json]

`--make` writes random weights of a size, with so many layers. The others: google-deepmind/gemma (its Sampler) and
keras-hub on JAX (what CausalLM.generate compiles), in the environments of `make peers PEERS="gemma keras-hub"`, with
random weights of the same shape by their own initializers; this package's PyTorch; and with --old-python the FlaxGemma
of transformers 4.46.3 (see scripts/make_flax_fixtures.py), inside jax.jit, the way its documentation says. The sides
that have no environment are left out, with a word.

Every measurement is a fresh process; the sides alternate, and each round's ratio is reported with the median. Compile
time is apart: what the first call of a shape takes longer than the next ones. Prefill is the time to the first new
token, decode that between calls of two lengths.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

from output import finish

PEERS = ("gemma", "keras-hub")  # peers.FLAX_PEERS, which the others' interpreters cannot import
SIDES = ("flax", "pytorch", "old_flax", *PEERS)
WIDTHS = {"float32": 4, "bfloat16": 2}
NO_TOKEN = -1


class Command(NamedTuple):
    label: str
    command: list[str]


class Runner(NamedTuple):
    """A loaded model.

    run(new, room): generate `new` tokens; `room`: how many that call's memory is made for, of programs that read a
    prompt in it. Returns when they are there.
    """

    run: object
    versions: str
    parameters: int


def shape_of(args):
    return json.loads((args.checkpoint / "config.json").read_text())


def prompt_of(args, vocabulary):
    import numpy as np

    ids = np.random.default_rng(0).integers(5, vocabulary, (1, args.prompt))
    ids[0, 0] = 2
    return ids


def flax_runner(args):
    import jax

    from gemmakit import FlaxGemmaForCausalLM, __version__

    model = FlaxGemmaForCausalLM.from_pretrained(args.checkpoint, param_dtype=args.dtype)
    ids = prompt_of(args, model.config.vocab_size)

    def run(new, room):
        # A number of new tokens that needs another bucket would compile anew: both lengths are of one bucket.
        return model.generate(ids, max_new_tokens=new, eos_token_id=None, do_sample=False).sequences

    return Runner(run, f"gemmakit {__version__} flax, jax {jax.__version__}", model.num_parameters())


def pytorch_runner(args):
    import torch

    from gemmakit import GemmaForCausalLM, __version__

    torch.set_num_threads(args.threads)
    model = GemmaForCausalLM.from_pretrained(args.checkpoint, dtype=getattr(torch, args.dtype))
    ids = torch.tensor(prompt_of(args, model.config.vocab_size))

    def run(new, room):
        return model.generate(ids, max_new_tokens=new, eos_token_id=None, do_sample=False, speculate=False)

    return Runner(run, f"gemmakit {__version__} pytorch, torch {torch.__version__}", model.num_parameters())


def old_flax_runner(args):
    import jax
    import transformers

    model = transformers.FlaxGemmaForCausalLM.from_pretrained(args.checkpoint, from_pt=True)
    model.params = {"float32": model.to_fp32, "bfloat16": model.to_bf16}[args.dtype](model.params)
    ids = prompt_of(args, model.config.vocab_size)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    compiled = jax.jit(
        lambda params, ids, new: model.generate(ids, params=params, max_new_tokens=new, **settings).sequences,
        static_argnums=2,
    )

    def run(new, room):
        return compiled(model.params, ids, new).block_until_ready()

    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(model.params))
    return Runner(run, f"transformers {transformers.__version__}, jax {jax.__version__}", count)


def gemma_runner(args):
    """google-deepmind/gemma's own Sampler; a tokenizer would be downloaded, so it gets one that reads numbers."""
    import dataclasses
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    from gemma import gm

    told = shape_of(args)
    kinds = {"full_attention": gm.nn.AttentionType.GLOBAL, "sliding_attention": gm.nn.AttentionType.LOCAL_SLIDING}
    third = told["model_type"] == "gemma3_text"
    base = (gm.nn.Gemma3_270M if third else gm.nn.Gemma2_2B).config
    first = dict(final_logit_softcap=None, attn_logits_soft_cap=None, use_post_attn_norm=False, use_post_ffw_norm=False)
    config = dataclasses.replace(
        base,
        num_embed=told["vocab_size"],
        embed_dim=told["hidden_size"],
        hidden_dim=told["intermediate_size"],
        num_heads=told["num_attention_heads"],
        head_dim=told["head_dim"],
        num_kv_heads=told["num_key_value_heads"],
        attention_types=tuple(
            kinds[kind] for kind in told.get("layer_types") or ["full_attention"] * told["num_hidden_layers"]
        ),
        **({"sliding_window_size": told["sliding_window"]} if third else first),
    )

    class Ends:
        BOS, PAD = 2, 0
        EOS = END_OF_TURN = BEGIN_OF_TOOL_RESPONSE = NO_TOKEN  # the number of tokens is what is asked for

    class Numbers(gm.text.Tokenizer):
        special_tokens = Ends

        def encode(self, text, **_):
            return [int(word) for word in text.split()]

        def decode(self, ids):
            return " ".join(map(str, np.asarray(ids).tolist()))

    model = gm.nn.Transformer(config=config, dtype=jnp.dtype(args.dtype))
    params = model.init(jax.random.key(0), jnp.full((1, 2), 5))["params"]
    sampler = gm.text.Sampler(
        model=model,
        params=params,
        tokenizer=Numbers(path=""),
        sampling=gm.text.Greedy(),
        cache_length=args.prompt + args.many + 2,  # it stops short of the end
        max_out_length=args.many,
        pad_length=args.prompt,
    )
    text = " ".join(map(str, prompt_of(args, told["vocab_size"])[0]))

    def run(new, room):
        made = sampler.sample(text, max_new_tokens=new).split()
        assert all(int(word) for word in made[: new - 1]), f"it ended before {new} tokens: {made}"
        return made

    count = sum(leaf.size for leaf in jax.tree_util.tree_leaves(params))
    return Runner(run, f"gemma {version('gemma')}, jax {jax.__version__}", count)


def keras_hub_runner(args):
    """What keras-hub's generate() compiles, which reads a prompt in the array that it writes the new tokens to.

    generate() itself joins the results, and fails on the images that a Gemma 3 without a preprocessor does not have.
    """
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras_hub
    import numpy as np

    told = shape_of(args)
    shape = dict(
        vocabulary_size=told["vocab_size"], num_layers=told["num_hidden_layers"], hidden_dim=told["hidden_size"],
        num_query_heads=told["num_attention_heads"], num_key_value_heads=told["num_key_value_heads"],
        head_dim=told["head_dim"], dtype=args.dtype,
    )  # fmt: skip
    if told["model_type"] == "gemma3_text":
        backbone = keras_hub.models.Gemma3Backbone(
            intermediate_dim=told["intermediate_size"], image_size=None, use_post_ffw_norm=True,
            use_post_attention_norm=True, use_sliding_window_attention=True,
            sliding_window_size=told["sliding_window"], **shape,
        )  # fmt: skip
        model = keras_hub.models.Gemma3CausalLM(preprocessor=None, backbone=backbone)
    else:  # which counts what comes of the gate and what it gates together
        backbone = keras_hub.models.GemmaBackbone(intermediate_dim=2 * told["intermediate_size"], **shape)
        model = keras_hub.models.GemmaCausalLM(backbone=backbone, preprocessor=None)
    model.compile(sampler="greedy")
    generate = model.make_generate_function()
    prompt = prompt_of(args, told["vocab_size"])[0]

    def run(new, room):
        ids = np.resize(prompt, args.prompt + room)[None].astype(np.int32)  # what is read is the whole, masked or not
        mask = (np.arange(args.prompt + room) < args.prompt + room - new)[None]
        return np.asarray(generate({"token_ids": ids * mask, "padding_mask": mask}, stop_token_ids=None)["token_ids"])

    return Runner(run, f"keras-hub {keras_hub.__version__}, jax {jax.__version__}", model.count_params())


RUNNERS = {"flax": flax_runner, "pytorch": pytorch_runner, "old_flax": old_flax_runner, "gemma": gemma_runner,
           "keras-hub": keras_hub_runner}  # fmt: skip


def measure(args):
    """One side, in this process. Times in seconds."""
    started = time.perf_counter()
    runner = RUNNERS[args.side](args)
    loaded = time.perf_counter() - started

    def timed(new, room):
        t = time.perf_counter()
        runner.run(new, room)
        return time.perf_counter() - t

    calls = {"first": (1, 1), "few": (args.few, args.many), "many": (args.many, args.many)}
    first = {name: timed(*call) for name, call in calls.items()}
    again = {name: statistics.median(timed(*call) for _ in range(args.repeats)) for name, call in calls.items()}
    a_token = (again["many"] - again["few"]) / (args.many - args.few)
    return {
        "side": runner.versions,
        "parameters": runner.parameters,
        "load_s": round(loaded, 2),
        "compile_s": round(max(0.0, sum(first[name] - again[name] for name in calls)), 2),
        "prefill_tokens_per_s": round(args.prompt / again["first"], 2),
        "tokens_per_s": round(1 / a_token, 3),
    }


def command_of(args, side):
    """The command that measures a side; those of other programs run this very file with their own interpreters."""
    from peers import interpreter

    python = args.old_python if side == "old_flax" else interpreter(side) if side in PEERS else sys.executable
    passed = {"--threads": args.threads, "--prompt": args.prompt, "--few": args.few, "--many": args.many,
              "--repeats": args.repeats, "--dtype": args.dtype, "--side": side}  # fmt: skip
    return [python, __file__, str(args.checkpoint), *(str(x) for pair in passed.items() for x in pair)]


def sides_of(args):
    """The sides that can be measured here."""
    from gemmakit.errors import MissingDependency

    for side in args.sides:
        if side == "old_flax" and not args.old_python:
            continue
        try:
            yield Command(side, command_of(args, side))
        except MissingDependency as error:
            print(f"{side} is left out: {error}", file=sys.stderr)


def compare(args):
    """The sides in turn; the ratios are of tokens/s, the Flax backend's over the other's."""
    # Here and not above: the others' interpreters, which run this file too, have no gemmakit.
    from rounds import interleave

    from gemmakit import GemmaConfig
    from gemmakit.bench.measure import linear_weights
    from gemmakit.cli.env import about

    done = interleave(list(sides_of(args)), args.rounds, say=lambda message: print(message, file=sys.stderr))
    if done.failed:
        sys.exit("; ".join(f"{side} failed: {why}" for side, why in done.failed.items()))
    medians = {side: done.medians(side) for side in done.labels()}
    counts = {side: found["parameters"] for side, found in medians.items()}
    if len(set(counts.values())) != 1:
        sys.exit(f"the models are not of one shape: parameters {counts}")
    ratios = {f"flax over {side}": done.ratios("flax", side) for side in medians if side != "flax"}
    rates = ("tokens_per_s", "prefill_tokens_per_s", "compile_s")
    config = GemmaConfig.from_pretrained(args.checkpoint)
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size")
    return {
        "what": f"greedy decode and prefill on the CPU, {args.dtype} weights and head, batch 1, random weights (the "
        "peers' by their own initializers), after compilation",
        **about(args.threads, "transformers"),
        "model": {name: getattr(config, name) for name in names} | {"parameters": counts["flax"]},
        "bytes_a_token": WIDTHS[args.dtype] * (linear_weights(config) + config.vocab_size * config.hidden_size),
        "prompt": args.prompt,
        "new": [args.few, args.many],
        "median_ratio": {name: found["tokens_per_s"] for name, found in ratios.items()},
        "prefill_ratio": {name: found["prefill_tokens_per_s"] for name, found in ratios.items()},
        **{rate: {side: found[rate] for side, found in medians.items()} for rate in rates},
        "rounds": done.rounds,
    }


def make(args):
    from checkpoints import write_random

    from gemmakit.bench.measure import size_config

    changes = {"num_hidden_layers": args.layers, "vocab_size": args.vocab}
    config = size_config(args.size, **{name: value for name, value in changes.items() if value is not None})
    write_random(args.checkpoint, config, args.dtype)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--make", action="store_true", help="write the checkpoint instead of measuring")
    parser.add_argument("--size", default="2b", help="of what is written: 2b, gemma3-270m, tiny")
    parser.add_argument("--layers", type=int, help="of what is written, where not the size's own")
    parser.add_argument("--vocab", type=int, help="of what is written, where not the size's own")
    parser.add_argument("--dtype", choices=WIDTHS, default="float32", help="of the weights, on every side")
    parser.add_argument("--threads", type=int, default=2, help="of torch; JAX takes all cores")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--few", type=int, default=1, help="new tokens of the shorter call")
    parser.add_argument("--many", type=int, default=16, help="of the longer; the difference is what is timed")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes a side")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--old-python", help="interpreter of an environment with transformers 4.46.3")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES)
    args = parser.parse_args()
    if args.make:
        return make(args)
    if args.side:
        return print(json.dumps(measure(args)))
    result = compare(args)
    return finish(result, args.out, ("median_ratio", "prefill_ratio", "tokens_per_s", "prefill_tokens_per_s"))


if __name__ == "__main__":
    main()
