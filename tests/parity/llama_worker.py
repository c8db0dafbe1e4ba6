"""Run by another Python, which has llama-cpp-python: a job as JSON on standard input, its results on standard output.

Job: {"gguf": path, "texts": [...], "special": bool, "prompts": [[id, ...], ...], "new_tokens": n}; and where wanted
"context", a length for all of them, "threads", "lora", the path of an adapter, and "pieces": [[id, ...], ...].
Results: "ids" of each text; for each prompt the greedy "continuations" and the "gaps" between the best two logits; for
each piece the sum of -log p of its tokens but the first, "losses".
"""

import json
import sys

import llama_cpp
import numpy as np


def continuation(model, ids, count):
    model.reset()
    tokens, gaps = [], []
    for _ in range(count):
        model.eval(ids if not tokens else tokens[-1:])
        logits = np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), (model.n_vocab(),))
        second, first = np.partition(logits, -2)[-2:]
        gaps.append(float(first - second))
        tokens.append(int(logits.argmax()))
    return tokens, gaps


def loss(model, ids):
    """Logits of all tokens are kept only here: they are large."""
    model.reset()
    model.eval(ids)
    total = 0.0
    for logits, token in zip(model.scores, ids[1:], strict=False):  # a row at a time: exp in float32, its sum not
        total += float(logits.max()) - float(logits[token]) + np.log(np.exp(logits - logits.max()).sum(dtype=float))
    return float(total)


def main():
    job = json.load(sys.stdin)
    # Keys and values in float32: only the weights are what is compared.
    settings = dict(
        n_ctx=job.get("context", 512), n_threads=job.get("threads", 1), n_threads_batch=job.get("threads", 1),
        verbose=False, type_k=0, type_v=0, flash_attn=False, seed=0,
    )  # fmt: skip
    model = llama_cpp.Llama(job["gguf"], lora_path=job.get("lora"), **settings)
    found = {"ids": [model.tokenize(t.encode(), add_bos=True, special=job["special"]) for t in job["texts"]]}
    made = [continuation(model, ids, job["new_tokens"]) for ids in job["prompts"]]
    found["continuations"], found["gaps"] = [tokens for tokens, _ in made], [gaps for _, gaps in made]
    found["n_vocab"], found["eos"] = model.n_vocab(), model.token_eos()
    found["template"] = model.metadata.get("tokenizer.chat_template")
    if job.get("pieces"):
        del model
        model = llama_cpp.Llama(job["gguf"], logits_all=True, **{**settings, "n_ctx": max(map(len, job["pieces"]))})
        found["losses"] = [loss(model, piece) for piece in job["pieces"]]
    json.dump(found, sys.stdout)


main()
