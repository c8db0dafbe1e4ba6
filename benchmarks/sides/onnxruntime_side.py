"""onnxruntime-genai on what onnxruntime_write.py made."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import side

from gemmakit.bench import timing


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, first token, prefill, decode. A context is read as a prompt, once; then the cache is set back to it."""
    started = time.perf_counter()
    import onnxruntime_genai as og

    imported = time.perf_counter() - started
    bare = timing.anonymous_bytes()
    started, folder = time.perf_counter(), Path(spec["model"])
    config = og.Config(str(folder))
    session = {"intra_op_num_threads": spec["threads"]}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    loaded = time.perf_counter() - started
    told = json.loads((folder / "genai_config.json").read_text())["model"]
    prompt = timing.prompt_ids(spec["prompt"], told["vocab_size"])
    room = max(spec["prompt"], *spec["contexts"]) + max(spec["new"], 4) + timing.FEW
    asked = og.GeneratorParams(model)
    # No token ends it: the number of tokens is what is asked for.
    asked.set_search_options(max_length=room, min_length=room, do_sample=False, batch_size=1)
    generator, filled = og.Generator(model, asked), 0

    def run(context: int, new: int, streamer: Any) -> None:
        nonlocal filled
        if context and filled != context:
            generator.rewind_to(0)
            generator.append_tokens(timing.prompt_ids(context, told["vocab_size"], seed=1))
        generator.rewind_to(context)
        filled = context
        generator.append_tokens(prompt[-1:] if context else prompt)
        for _ in range(new):
            generator.generate_next_token()
            if streamer is not None:
                streamer.put(generator.get_next_tokens()[0])

    first = timing.seconds(lambda: run(0, 1, None))
    timing.streamed(run, 0, 1)
    used = timing.memory(bare)
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return {
        "side": f"onnxruntime-genai {og.__version__}", "file_gb": size / 1e9,
        "head_dtype": json.loads((folder / "written.json").read_text())["head_dtype"],
        "import_s": imported, "load_s": loaded, "first_token_s": imported + loaded + first,
        **timing.rates(run, timing.Work.of(spec)), "first_ids": side.first_ids(run), **used,
        **{k: v for k, v in timing.memory(bare).items() if k == "peak_rss_gb"},
    }  # fmt: skip


if __name__ == "__main__":
    side.main({"generate": generate})
