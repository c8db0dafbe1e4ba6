"""What the machine can do at most: bytes read a second, multiplications a second. Measured, in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

GB = 1e9


def measure_limits(spec: dict[str, Any]) -> dict[str, Any]:
    """bandwidth_gb_per_s, bandwidth_by (which way of reading was the fastest) and matmul_gflop_per_s by dtype.

    A spec has device, threads, and may have limit_bytes (of all buffers) and limit_s (seconds for each figure).
    """
    import torch

    torch.set_num_threads(spec["threads"])
    device, limit_s = torch.device(spec["device"]), float(spec.get("limit_s", 1.5))
    with torch.inference_mode():
        how, bandwidth = read_bandwidth(device, spec.get("limit_bytes") or default_bytes(device), limit_s)
        dtypes = ("float32", "bfloat16")
        rates = {name: matmul_rate(device, name, limit_s) / GB for name in dtypes}
    found = {"bandwidth_gb_per_s": bandwidth / GB, "bandwidth_by": how, "matmul_gflop_per_s": rates}
    return {**found, **device_facts(device)}


def device_facts(device: Any) -> dict[str, Any]:
    """Name, memory and versions of an accelerator; nothing for the CPU, which facts.machine names."""
    import torch

    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    capability = f"{about.major}.{about.minor}"
    return {"device": about.name, "device_memory_gb": about.total_memory / GB, "capability": capability,
            "cuda": torch.version.cuda}  # fmt: skip


def default_bytes(device: Any) -> int:
    """Of all buffers together: far more than any cache (a shared one may hold half a gigabyte), if it is free."""
    import torch

    from gemmakit.checkpoint.memory import free_memory_bytes

    if device.type == "cuda":
        return min(8 << 30, torch.cuda.mem_get_info(device)[0] // 8)
    return min(4 << 30, (free_memory_bytes() or 8 << 30) // 4)


def read_bandwidth(device: Any, nbytes: int, limit_s: float) -> tuple[str, float]:
    """(how, bytes a second) of the fastest of several ways to go through four buffers, one after the other.

    All four are timed together: one alone may still lie in a cache from the last time.
    """
    import torch

    buffers = [torch.ones(max(nbytes // 16, 1), dtype=torch.float32, device=device) for _ in range(4)]
    ways: dict[str, tuple[Callable[[Any], object], int]] = {"torch sum": (lambda b: b.sum(), 1)}
    if device.type == "cpu":
        native = native_read()
        if native is not None:
            ways["native read"] = (native, 1)
    else:
        target = torch.empty_like(buffers[0])
        ways["copy"] = (target.copy_, 2)  # read and written
    every = sum(buffer.nbytes for buffer in buffers)
    found = {
        how: moved * every / best_s([lambda go=go: [go(b) for b in buffers]], device, limit_s)
        for how, (go, moved) in ways.items()
    }
    how = max(found, key=lambda name: found[name])
    return how, found[how]


def native_read() -> Callable[[Any], object] | None:
    """The native kernels' read of a tensor; None without the library."""
    from gemmakit.pytorch.kernels import cpu

    return None if cpu.library() is None else cpu.read_memory


def matmul_rate(device: Any, dtype: str, limit_s: float) -> float:
    """Operations a second of torch.mm, with matrices as prefill has them: 2048 by 2048, wider on an accelerator."""
    import torch

    n = 8192 if device.type == "cuda" else 2048 if limit_s >= 0.5 else 256
    kind = getattr(torch, dtype)
    a, b = (torch.randn(n, n, device=device).to(kind) for _ in "ab")
    return 2 * n**3 / best_s([lambda: torch.mm(a, b)], device, limit_s)


def best_s(calls: list[Callable[[], object]], device: Any, limit_s: float) -> float:
    """Seconds of the fastest of the calls, made in turn until the time is up; the first round warms up."""
    synchronize(device)
    for call in calls:
        call()
    best, end = float("inf"), time.perf_counter() + limit_s
    while True:
        for call in calls:
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            best = min(best, time.perf_counter() - started)
        if time.perf_counter() > end:
            return best


def synchronize(device: Any) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
