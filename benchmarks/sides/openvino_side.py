"""OpenVINO on what openvino_write.py made: one prompt by its runtime, rows by openvino_genai's continuous batching."""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import side

from gemmakit.bench import timing


def options(threads: int) -> dict[str, Any]:
    # As many threads as the others have, also where two of them share a core.
    return {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1,
            "ENABLE_HYPER_THREADING": True}  # fmt: skip


def head(model: Any) -> Any:
    """The product of the output layer."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    return node


def head_dtype(model: Any) -> str:
    """The type that the weights of the output layer are stored in, by our names."""
    node = head(model).input_value(1).get_node()
    while node.get_type_name() != "Constant":
        node = node.input_value(0).get_node()
    name = node.get_output_element_type(0).get_type_name()
    known = {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    return known.get(name, name.replace("i", "int").replace("u", "uint"))


def last_only(model: Any) -> None:
    """The last position alone goes into the output layer, as openvino_genai arranges too."""
    import numpy as np
    from openvino import opset13 as op

    node = head(model)
    one, end = np.array([1]), np.array([np.iinfo(np.int64).max])
    node.input(0).replace_source_output(op.slice(node.input_value(0), -one, end, one, one).output(0))
    model.validate_nodes_and_infer_types()


def about(folder: Path) -> dict[str, Any]:
    import openvino as ov

    told = json.loads((folder / "written.json").read_text())
    size = (folder / "openvino_model.bin").stat().st_size
    version = ov.__version__.split("-")[0]
    return {"side": f"openvino {version}", "file_gb": size / 1e9, "head_dtype": told["head_dtype"]}


def vocabulary_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def chosen(compiled: Any) -> dict[str, str]:
    """What the plugin settled on."""
    names = ("INFERENCE_PRECISION_HINT", "KV_CACHE_PRECISION", "DYNAMIC_QUANTIZATION_GROUP_SIZE")
    found = {}
    for name in names:
        value = compiled.get_property(name)
        found[name.lower()] = value.to_string() if hasattr(value, "to_string") else str(value)
    return found


def generate(spec: dict[str, Any]) -> dict[str, Any]:
    """Load, first token, prefill, decode. A context is read as a prompt, once; its keys and values are put back."""
    started = time.perf_counter()
    import numpy as np
    import openvino as ov

    imported = time.perf_counter() - started
    bare = timing.anonymous_bytes()
    started, folder = time.perf_counter(), Path(spec["model"])
    core = ov.Core()
    model = core.read_model(folder / "openvino_model.xml")
    last_only(model)
    compiled = core.compile_model(model, "CPU", options(spec["threads"]))
    request = compiled.create_infer_request()
    del model
    loaded = time.perf_counter() - started
    inputs, vocabulary = {name for port in compiled.inputs for name in port.names}, vocabulary_of(folder)
    prompt = timing.prompt_ids(spec["prompt"], vocabulary)
    kept: dict[int, dict[str, Any]] = {}

    def step(ids: list[int], past: int) -> int:
        feed = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, past + len(ids)), np.int64),
            "position_ids": np.arange(past, past + len(ids), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in feed.items() if name in inputs}, share_inputs=True)
        return int(request.get_output_tensor(0).data[0, -1].argmax())

    def fill(context: int) -> None:
        if context not in kept:
            request.reset_state()
            step(timing.prompt_ids(context, vocabulary, seed=1), 0)
            kept[context] = {s.name: ov.Tensor(np.array(s.state.data)) for s in request.query_state()}
        for state in request.query_state():
            state.state = kept[context][state.name]

    def run(context: int, new: int, streamer: Any) -> None:
        if context:
            fill(context)
        else:
            request.reset_state()
        given = prompt[-1:] if context else prompt
        token = step(given, context)
        for past in range(context + len(given), context + len(given) + new):
            if streamer is not None:
                streamer.put(token)
            if past < context + len(given) + new - 1:
                token = step([token], past)

    first = timing.seconds(lambda: run(0, 1, None))
    timing.streamed(run, 0, 1)
    used = timing.memory(bare)
    return {
        **about(folder), **chosen(compiled), "import_s": imported, "load_s": loaded,
        "first_token_s": imported + loaded + first,
        **timing.rates(run, timing.Work.of(spec)), "first_ids": side.first_ids(run), **used,
        **{k: v for k, v in timing.memory(bare).items() if k == "peak_rss_gb"},
    }  # fmt: skip


def rows(spec: dict[str, Any]) -> dict[str, Any]:
    """Tokens/s of each count of `rows` in one batch of the ContinuousBatchingPipeline, the median of `new` steps."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    folder = Path(spec["model"])
    scheduler, settings = genai.SchedulerConfig(), genai.GenerationConfig()
    scheduler.enable_prefix_caching, scheduler.dynamic_split_fuse = False, True
    scheduler.max_num_seqs = max(spec["rows"])
    scheduler.max_num_batched_tokens = max(256, max(spec["rows"]) * spec["prompt"])  # all prompts in one step
    scheduler.cache_size = 1  # GB
    pipeline = genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", options(spec["threads"]))
    settings.max_new_tokens = spec["new"] + 1
    settings.ignore_eos, settings.do_sample = True, False
    found: dict[str, Any] = {}
    for count in spec["rows"]:
        asked = []
        for row in range(count):
            ids = timing.prompt_ids(spec["prompt"], vocabulary_of(folder), seed=row)
            asked.append(pipeline.add_request(row, ov.Tensor(np.array([ids], np.int64)), settings))
        waiting = {*range(count)}
        while waiting:  # until all have a token, and so are decoding
            pipeline.step()
            waiting -= {row for row in waiting if asked[row].can_read()}
        steps = [timing.seconds(pipeline.step) for _ in range(spec["new"] - 2)]
        found[f"tokens_per_s_{count}"] = count / statistics.median(steps)
        while pipeline.has_non_finished_requests():
            pipeline.step()
    return {**about(folder), **found}


def losses(spec: dict[str, Any]) -> dict[str, Any]:
    """Of each of `pieces`, lists of ids, the sum of -log p of its tokens but the first; activations in float32."""
    import numpy as np
    import openvino as ov

    folder = Path(spec["model"])
    unrounded = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = ov.Core().compile_model(folder / "openvino_model.xml", "CPU", options(spec["threads"]) | unrounded)
    request, found = compiled.create_infer_request(), []
    inputs = {name for port in compiled.inputs for name in port.names}
    for piece in spec["pieces"]:
        request.reset_state()
        feed = {
            "input_ids": np.array([piece], np.int64),
            "attention_mask": np.ones((1, len(piece)), np.int64),
            "position_ids": np.arange(len(piece), dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in feed.items() if name in inputs}, share_inputs=True)
        logits, lost = request.get_output_tensor(0).data[0], 0.0
        for row, token in zip(logits[:-1].astype(np.float64), piece[1:], strict=True):
            top = row.max()
            lost += float(top + np.log(np.exp(row - top).sum()) - row[token])
        found.append(lost)
    return {**about(folder), "losses": found}


if __name__ == "__main__":
    side.main({"generate": generate, "rows": rows, "losses": losses})
