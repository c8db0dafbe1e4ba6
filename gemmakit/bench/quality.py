"""What a quantization costs, on the demo model: a speed without it says nothing, and random weights cannot tell.

Against the demo model as it is stored: the ratio of perplexities, the share of positions whose likeliest token is the
same, and the mean Kullback-Leibler divergence in nats.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOW = 512  # tokens read together, <bos> included


def held_out() -> tuple[str, str]:
    """(its name, a text the demo model was not trained on): the repository's, else the demo's own page."""
    package = Path(__file__).resolve().parents[1]
    text = package.parent / "benchmarks" / "data" / "held_out.txt"
    if text.exists():
        return "benchmarks/data/held_out.txt", text.read_text(encoding="utf-8")
    return "the demo model's README", (package / "demo" / "README.md").read_text(encoding="utf-8")


def measure_quality(spec: dict[str, Any]) -> dict[str, Any]:
    """spec: quantize, threads, tokens (how many of the text, 8,192 if absent), device ("cpu" if absent).

    On an accelerator the models are loaded to it as anybody's are. Where that fails, the CPU measures the same, and
    `device_error` says what failed.
    """
    device = spec.get("device", "cpu")
    try:
        return _measured(spec, device)
    except Exception as error:
        if device == "cpu":
            raise
        return {**_measured(spec, "cpu"), "device_error": f"{type(error).__name__}: {str(error)[:500]}"}


def _measured(spec: dict[str, Any], device: str) -> dict[str, Any]:
    import torch

    from gemmakit.bench.models import obtain
    from gemmakit.hub import demo_model
    from gemmakit.text import GemmaTokenizer

    torch.set_num_threads(spec["threads"])
    demo = str(demo_model())
    name, text = held_out()
    encoded: Any = GemmaTokenizer.from_pretrained(demo)(text, add_special_tokens=False)
    ids = list(encoded["input_ids"])[: spec.get("tokens", 8192)]
    plain = {"model": demo, "dtype": "auto", "device": device}
    reference, model = obtain(plain), obtain({**plain, "quantize": spec["quantize"]})
    return {"model": "demo", "text": name, "device": device, "tokens": len(ids), **compare(reference, model, ids)}


def compare(reference: Any, model: Any, ids: list[int]) -> dict[str, float]:
    """perplexity_ratio, top1_agreement (0 to 1), kl_nats; every token of the text is predicted once."""
    import torch

    nats = [0.0, 0.0]
    same = divergence = 0.0
    with torch.inference_mode():
        for piece in pieces(ids):
            rows = torch.tensor([piece], device=reference.device)
            a, b = (m(rows, use_cache=False).logits[0, :-1].float().log_softmax(-1) for m in (reference, model))
            targets = rows[0, 1:, None]
            for i, scores in enumerate((a, b)):
                nats[i] -= float(scores.gather(1, targets).sum())
            same += float((a.argmax(-1) == b.argmax(-1)).sum())
            divergence += float((a.exp() * (a - b)).sum())
    n = len(ids)
    ratio = float(torch.tensor((nats[1] - nats[0]) / n, dtype=torch.float64).exp())
    return {"perplexity_ratio": ratio, "top1_agreement": same / n, "kl_nats": divergence / n}


def pieces(ids: list[int]) -> Iterator[list[int]]:
    for i in range(0, len(ids), WINDOW - 1):
        yield [2, *ids[i : i + WINDOW - 1]]
