"""Run by another Python, which has llama-cpp-python: a job as JSON on standard input, its results on standard output.

Job: {"gguf": path, "texts": [...], "special": bool, "prompts": [[id, ...], ...], "new_tokens": n}.
Results: "ids" of each text; for each prompt the greedy "continuations" and the "gaps" between the best two logits.
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
        logits = np.array(model._ctx.get_logits_ith(-1)[: model.n_vocab()])
        second, first = np.sort(logits)[-2:]
        gaps.append(float(first - second))
        tokens.append(int(logits.argmax()))
    return tokens, gaps


def main():
    job = json.load(sys.stdin)
    # Keys and values in float32: only the weights are what is compared.
    model = llama_cpp.Llama(
        job["gguf"], n_ctx=512, n_threads=1, verbose=False, type_k=0, type_v=0, flash_attn=False, seed=0
    )
    found = {"ids": [model.tokenize(t.encode(), add_bos=True, special=job["special"]) for t in job["texts"]]}
    made = [continuation(model, ids, job["new_tokens"]) for ids in job["prompts"]]
    found["continuations"], found["gaps"] = [tokens for tokens, _ in made], [gaps for _, gaps in made]
    found["n_vocab"], found["eos"] = model.n_vocab(), model.token_eos()
    found["template"] = model.metadata.get("tokenizer.chat_template")
    json.dump(found, sys.stdout)


main()
