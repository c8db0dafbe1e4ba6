"""llama.cpp through llama-cpp-python, on a GGUF file. Runs in whichever interpreter has that package."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
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
        **used,
        **{k: v for k, v in timing.memory(bare).items() if k == "peak_rss_gb"},
    }


if __name__ == "__main__":
    side.main({"generate": generate})
