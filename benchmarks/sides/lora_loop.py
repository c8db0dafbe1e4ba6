"""LoRA steps with a peer's modules and loss, as its recipe has them: forward, backward, AdamW; and what they took.

Fields of the spec: rows (a JSON file of [ids, labels] in the order of the steps), batch_size, lr, steps, threads.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")


def padded(rows: list[list[list[int]]]) -> tuple[Any, Any]:
    """ids and labels (B, S), as long as the longest row, padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    ids, labels = ([row[i] + [fill] * (width - len(row[i])) for row in rows] for i, fill in ((0, 0), (1, -100)))
    return torch.tensor(ids), torch.tensor(labels)


def longest(spec: dict[str, Any]) -> int:
    return max(len(ids) for ids, _ in json.loads(Path(spec["rows"]).read_text()))


def forget_peak() -> None:
    """What loading took at most is no longer told: these packages read files in ways of their own."""
    gc.collect()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def steps(spec: dict[str, Any], side: str, model: Any, loss_of: Callable[[Any, Any], Any]) -> dict[str, Any]:
    """loss_of: of ids and labels."""
    import torch

    forget_peak()
    size, rows = spec["batch_size"], json.loads(Path(spec["rows"]).read_text())[: spec["steps"] * spec["batch_size"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=spec["lr"])
    model.train()
    tokens, seconds, losses = 0, 0.0, list[float]()
    for number in range(spec["steps"]):
        batch, start = rows[number * size : (number + 1) * size], time.perf_counter()
        loss = loss_of(*padded(batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if number:  # the first also pays for what is set up once
            tokens += sum(len(ids) for ids, _ in batch)
            seconds += time.perf_counter() - start
    peak = next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return {
        "side": side, "torch": torch.__version__, "dtype": spec["dtype"], "tokens": tokens, "seconds": seconds,
        "tokens_per_s": tokens / seconds, "peak_gb": peak * 1024 / 1e9, "trained": sum(p.numel() for p in trained),
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
