"""Run by another Python, which has llama-cpp-python, for quantized_quality.py: a job as JSON on standard input.

Writes OUT.whole.npy and OUT.stepped.npy, logits (tokens, V) of the pieces all at once and token by token, and answers
prompts greedily: {"said": [[id, ...], ...]} on standard output.

A job {"quantize": F32.gguf, "gguf": OUT.gguf, "kind": "Q4_K_M", "pure": bool} writes that file by llama.cpp itself, for
real_curve.py; pure gives every matrix the same kind, as far as its width allows.
"""

from __future__ import annotations

import ctypes
import json
import sys
from typing import Any

import llama_cpp
import numpy as np

END_OF_TURN = "<end_of_turn>"


def logits(model: Any, pieces: list[list[int]], stepped: bool) -> np.ndarray:
    out = []
    for piece in pieces:
        model.reset()
        if stepped:
            for token in piece:
                model.eval([token])
        else:
            model.eval(piece)
        out.append(np.array(model.scores[: len(piece)], dtype=np.float32))
    return np.concatenate(out)


def answer(model: Any, prompt: list[int], new_tokens: int, stops: set[int]) -> list[int]:
    model.reset()
    model.eval(prompt)
    said: list[int] = []
    while len(said) < new_tokens:
        token = int(np.argmax(model.scores[model.n_tokens - 1]))
        if token in stops:
            break
        said.append(token)
        model.eval([token])
    return said


def quantize(job: dict[str, Any]) -> None:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['kind']}")
    settings.pure = job["pure"]
    if llama_cpp.llama_model_quantize(job["quantize"].encode(), job["gguf"].encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp could not write {job['kind']}")


def main() -> None:
    job = json.load(sys.stdin)
    if "quantize" in job:
        quantize(job)
        return
    model = llama_cpp.Llama(
        model_path=job["gguf"], n_ctx=512, n_batch=512, n_ubatch=512, logits_all=True, verbose=False, n_threads=2
    )
    if job["pieces"]:
        np.save(f"{job['out']}.whole.npy", logits(model, job["pieces"], stepped=False))
        np.save(f"{job['out']}.stepped.npy", logits(model, job["pieces"][: job["stepped"]], stepped=True))
    stops = {model.token_eos(), *model.tokenize(END_OF_TURN.encode(), add_bos=False, special=True)}
    print(json.dumps({"said": [answer(model, prompt, job["new_tokens"], stops) for prompt in job["prompts"]]}))


if __name__ == "__main__":
    main()
