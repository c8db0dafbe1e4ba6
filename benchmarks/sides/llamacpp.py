"""llama.cpp through llama-cpp-python, on a GGUF file. Runs in whichever interpreter has that package."""

# pyright: reportMissingImports=false

from __future__ import annotations

import ctypes
import os
import statistics
import time
from typing import Any

import side

from gemmakit.bench import timing


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, first token, prefill, decode. A context is read as a prompt, once; then the cache is set back to it."""
    started = time.perf_counter()
    import llama_cpp

    imported = time.perf_counter() - started
    bare = timing.anonymous_bytes()
    started, threads = time.perf_counter(), spec["threads"]
    room = max(spec["prompt"], *spec["contexts"]) + spec["new"] + 16
    model: Any = llama_cpp.Llama(
        spec["model"], n_ctx=room, n_threads=threads, n_threads_batch=threads, logits_all=False, verbose=False
    )
    loaded = time.perf_counter() - started
    prompt = timing.prompt_ids(spec["prompt"], model.n_vocab())
    filled = 0

    def run(context: int, new: int, streamer: Any) -> None:
        nonlocal filled
        if context and filled != context:
            model.reset()
            model.eval(timing.prompt_ids(context, model.n_vocab(), seed=1))
            filled = context
        model.n_tokens = context  # what is behind it is forgotten by the next eval
        filled = context
        model.eval(prompt[-1:] if context else prompt)
        for left in range(new, 0, -1):
            token = model.sample(temp=0.0)
            if streamer is not None:
                streamer.put(token)
            if left > 1:
                model.eval([token])

    first = timing.seconds(lambda: run(0, 1, None))
    timing.streamed(run, 0, 1)
    used = timing.memory(bare)
    return {
        "side": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
        "file_gb": os.path.getsize(spec["model"]) / 1e9,
        "import_s": imported,
        "load_s": loaded,
        "first_token_s": imported + loaded + first,
        **timing.rates(run, timing.Work.of(spec)),
        "first_ids": side.first_ids(run),
        **used,
        **{k: v for k, v in timing.memory(bare).items() if k == "peak_rss_gb"},
    }


def rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of each count of `rows` that decode side by side in one low-level batch, the median of `new` steps."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model: Any = llama_cpp.llama_model_load_from_file(spec["model"].encode(), llama_cpp.llama_model_default_params())
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = {"side": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"}
    for count in spec["rows"]:
        told = llama_cpp.llama_context_default_params()
        told.n_ctx, told.n_seq_max = count * (spec["prompt"] + spec["new"] + 32), count
        told.n_batch = told.n_ubatch = max(512, count)
        told.n_threads = told.n_threads_batch = spec["threads"]
        context: Any = llama_cpp.llama_init_from_model(model, told)
        tokens = [0] * count
        for row in range(count):
            ids = timing.prompt_ids(spec["prompt"], vocabulary, seed=row)
            tokens[row] = _fed(llama_cpp, context, vocabulary, [(t, i, row) for i, t in enumerate(ids)])[row]
        steps = []
        for i in range(spec["new"] - 2):
            started = time.perf_counter()
            chosen = _fed(llama_cpp, context, vocabulary, [(t, spec["prompt"] + i, r) for r, t in enumerate(tokens)])
            tokens = [chosen[row] for row in range(count)]
            steps.append(time.perf_counter() - started)
        found[f"tokens_per_s_{count}"] = count / statistics.median(steps)
        llama_cpp.llama_free(context)
    return found


def _fed(llama_cpp: Any, context: Any, vocabulary: int, tokens: list[tuple[int, int, int]]) -> dict[int, int]:
    """Each row's likeliest next token, after one pass over (token, position, row)."""
    import numpy as np

    last = {row: i for i, (_, _, row) in enumerate(tokens)}
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, (token, position, row) in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, row
        batch.logits[i] = last[row] == i
    if llama_cpp.llama_decode(context, batch):
        raise RuntimeError(f"llama_decode refused {len(tokens)} tokens")
    shape = (vocabulary,)
    scores = {row: llama_cpp.llama_get_logits_ith(context, i) for row, i in last.items()}
    chosen = {row: int(np.ctypeslib.as_array(at, shape=shape).argmax()) for row, at in scores.items()}
    llama_cpp.llama_batch_free(batch)
    return chosen


if __name__ == "__main__":
    side.main({"generate": generate, "rows": rows})
