"""What an accelerator has to show, in one command of under ten minutes: weights are made there, nothing is downloaded.

    python benchmarks/gpu.py --json FILE
    python benchmarks/gpu.py --device cpu --size tiny --quick    # the same code, where there is no accelerator

Every part is a process of its own: what fails, runs out of memory or out of time costs its own row and no other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from checkpoints import fields
from report import plain_lines, recipe_table
from rounds import Found, Side, SideFailed, run_command

from gemmakit.cli.env import about, available_cores
from gemmakit.errors import GemmakitError, InputError
from gemmakit.files import write_text

WHAT = "random weights made on the device; batch 1 unless said; rates are differences of runs of two lengths"
BUDGET_S = 570.0
LEAST_S = 15.0  # a part that has less than this left is not begun
# No part takes what the others need: a peer's compiler may take minutes, and a device that hangs all there is.
OURS_S, PEER_S = 150.0, 120.0
SCHEMES = ("int8", "int4", "int4-g128")


@dataclass(frozen=True)
class Scale:
    """How much of everything: tokens and rows. The default is what PERFORMANCE goals are stated for."""

    new: int = 64
    prompt: int = 16
    context: int = 8000  # 8,192 less room for the new tokens
    prefill: int = 2048
    batches: tuple[int, ...] = (64, 256)
    batch_prompt: int = 512
    batch_new: int = 48
    train: int = 2048
    check: int = 48  # tokens that are compared with those of plain torch
    repeats: int = 3
    limit_s: float = 1.5

    def settings(self) -> dict[str, Any]:
        return {**vars(self), "batches": list(self.batches)}


SMALL = Scale(new=24, prompt=4, context=64, prefill=32, batches=(2, 3), batch_prompt=8, batch_new=24, train=32,
              check=8, repeats=1, limit_s=0.05)  # fmt: skip


@dataclass
class Recipe:
    """Runs the parts, most telling first and peers behind, and saves after each.

    Args:
        sizes: shapes, in their order: the first gets everything, the others decoding and prefill, last.
        peers: measure transformers too, where it is installed.
    """

    sizes: Sequence[str] = ("2b", "7b")
    device: str = "cuda"
    dtype: str = "bfloat16"
    threads: int = 1
    scale: Scale = field(default_factory=Scale)
    peers: bool = True
    budget_s: float = BUDGET_S
    save: Path | None = None
    say: Callable[[str], None] = lambda _: None
    run_command: Callable[[Sequence[str], float], Found] = run_command

    def require(self) -> None:
        """Raises InputError for a size or a device that there is not."""
        for size in self.sizes:
            fields(size)
        if self.device != "cpu" and not torch.cuda.is_available():
            raise InputError(f"--device {self.device}: this torch sees no CUDA device. See gemmakit doctor.")

    def run(self) -> dict[str, Any]:
        """What the JSON holds. Ctrl-C gives what there is, `interrupted` true."""
        begun, parts, interrupted = time.monotonic(), dict[str, Found](), False
        try:
            for side in self.sides():
                left = self.budget_s - (time.monotonic() - begun)
                self.say(f"{side.label} ({left:.0f} s left)")
                parts[side.label] = self._part(side, left)
                self._keep(parts, interrupted)
        except KeyboardInterrupt:
            interrupted = True
        self._keep(parts, interrupted)
        return self.result(parts, interrupted)

    def _part(self, side: Side, left_s: float) -> Found:
        if left_s < LEAST_S:
            return {"error": f"not begun: the {self.budget_s:.0f} s were used up"}
        begun = time.monotonic()
        try:
            found = self.run_command(side.command, min(left_s, OURS_S if side.script == "gemmakit_side" else PEER_S))
        except SideFailed as error:
            found = {"error": str(error), **({"stderr": error.tail} if error.tail else {})}
        return {**found, "took_s": round(time.monotonic() - begun, 1)}

    def _keep(self, parts: dict[str, Found], interrupted: bool) -> None:
        if self.save is not None:
            write_text(self.save, json.dumps(self.result(parts, interrupted), indent=1) + "\n")

    def result(self, parts: dict[str, Found], interrupted: bool) -> dict[str, Any]:
        return {
            "what": WHAT,
            **about(self.threads, "triton", "transformers"),
            "settings": {
                "device": self.device,
                "dtype": self.dtype,
                "sizes": list(self.sizes),
                **self.scale.settings(),
            },
            "limits": parts.get("limits", {}),
            "quality": {s: parts[key] for s in SCHEMES if (key := f"quality {s}") in parts},
            "parts": {label: found for label, found in parts.items() if not label.startswith(("limits", "quality"))},
            "peer": "transformers is not installed" if self.peers and not _installed() else None,
            "interrupted": interrupted,
        }

    # -- the parts -------------------------------------------------------------------------------------------------

    def sides(self) -> Iterator[Side]:
        """All there is to measure, in order. Labels are "size side what"."""
        limits = {"part": "limits", "device": self.device, "threads": self.threads, "limit_s": self.scale.limit_s}
        if self.scale is SMALL:
            limits["limit_bytes"] = 1 << 20
        yield Side("limits", "gemmakit_side", limits)
        yield from self._main(self.sizes[0])
        for size in self.sizes[1:]:
            yield from self._decoding(size)

    def _main(self, size: str) -> Iterator[Side]:
        yield from self._decoding(size)
        yield from self._together(size, "gemmakit")
        for chunk in (None, max(self.scale.train // 4, 1)):
            what = "train" if chunk is None else f"train, loss by {chunk}"
            yield self._side(size, "gemmakit", what, tokens=self.scale.train, chunk=chunk)
        for scheme in SCHEMES:
            spec = {"part": "quality", "quantize": scheme, "threads": self.threads, "device": self.device}
            yield Side(
                f"quality {scheme}", "gemmakit_side", {**spec, **({"tokens": 256} if self.scale is SMALL else {})}
            )
        if self._peer:
            yield from self._peers(size)

    def _peers(self, size: str) -> Iterator[Side]:
        context = self.scale.context
        yield self._side(size, "transformers eager", "generate")
        # Its static cache stays as long as the longest call made it: each length in a process of its own.
        static = {"static": True, "prefill": None}
        yield self._side(size, "transformers static", "generate", **static, contexts=[0])
        yield self._side(size, "transformers", "train", tokens=self.scale.train)
        yield from self._together(size, "transformers")
        yield self._side(size, "transformers static", f"generate after {context}", **static, contexts=[context])

    def _decoding(self, size: str) -> Iterator[Side]:
        for scheme in (None, *SCHEMES):
            check = {"quantize": scheme, "check": self.scale.check}
            yield self._side(size, f"gemmakit {scheme or 'plain'}", "generate", **check)

    def _together(self, size: str, side: str) -> Iterator[Side]:
        for rows in self.scale.batches:
            yield self._side(size, side, f"batch {rows}", **self._batch(rows))

    def _batch(self, rows: int) -> dict[str, Any]:
        """The shorter run outlasts the reading of the prompts, which is done a few at a time: both end with all."""
        few = 8 + rows * self.scale.batch_prompt // 4096
        return {"rows": rows, "prompt": self.scale.batch_prompt, "few": few, "new": self.scale.batch_new}

    @property
    def _peer(self) -> bool:
        return self.peers and _installed()

    def _side(self, size: str, side: str, what: str, **spec: Any) -> Side:
        scale, ours = self.scale, side.startswith("gemmakit")
        part = what.replace(",", "").split()[0]
        base: dict[str, Any] = {
            "part": part, "config": fields(size), "dtype": self.dtype, "device": self.device, "threads": self.threads,
            "repeats": scale.repeats, "new": scale.new, "prompt": scale.prompt, "contexts": [0, scale.context],
            "prefill": scale.prefill, "fill": "prompt", "stream": False,
        }  # fmt: skip
        return Side(f"{size} {side} {what}", "gemmakit_side" if ours else "transformers_side", {**base, **spec})


def _installed() -> bool:
    return find_spec("transformers") is not None


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try it out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--size", nargs="+", default=["2b", "7b"], help="shapes; the first gets everything")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds it may take")
    parser.add_argument("--json", type=Path, help="write everything measured there, after each part")
    parser.add_argument("--quick", action="store_true", help="a trial: the numbers are rough")
    args = parser.parse_args(given)
    recipe = Recipe(
        sizes=args.size, device=args.device, dtype=args.dtype, threads=args.threads, budget_s=args.budget,
        save=args.json, say=lambda message: print(message, file=sys.stderr, flush=True),
        scale=SMALL if args.quick else Scale(),
    )  # fmt: skip
    try:
        recipe.require()
    except GemmakitError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    result = recipe.run()
    print("\n".join(plain_lines(recipe_table(result))))
    return 130 if result["interrupted"] else int(all("error" in part for part in result["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
