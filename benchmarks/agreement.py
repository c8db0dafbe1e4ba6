"""Whether the fast path of an accelerator chooses what the modules choose: a speed says nothing without it.

Three ways to the same tokens: steps replayed from a graph, the same kernels started one by one, and plain torch. Where
two part, their logits at that step tell a near tie (they differ by as much as the choice was narrow) from a fault.
Axis letters: n tokens, V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

# Of the spread of a step's logits. Rounding of a half format leaves about a hundredth after 18 layers; a wrong key, a
# wrong scale or a race leave more than this.
WRONG = 0.25


@contextmanager
def modules_alone() -> Generator[None]:
    """No Triton kernel runs meanwhile."""
    before = os.environ.get("GEMMAKIT_TRITON")
    os.environ["GEMMAKIT_TRITON"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GEMMAKIT_TRITON"]
        else:
            os.environ["GEMMAKIT_TRITON"] = before


def agreement(
    model: Any, ids: Any, new: int, plainly: Callable[[], AbstractContextManager[None]] = modules_alone
) -> dict[str, Any]:
    """ids: (1, P). What a JSON holds of `new` tokens after them.

    replayed_same: how many of the replayed tokens are those of the kernels started one by one, until the first other
    one. same: likewise those and the plain ones; at a difference `margin`, between the two tokens' plain logits, and
    whether it is a `near_tie`. logits_off: the largest difference of logits over the plain ones' standard deviation, in
    steps with the same tokens before; `wrong`: more than WRONG, or not a number.
    """
    given = {"max_new_tokens": new, "eos_token_id": [], "do_sample": False}
    count = ids.shape[1]
    replayed = model.generate(ids, **given)[0, count:].tolist()
    kept = {**given, "cuda_graphs": False, "return_dict_in_generate": True, "output_logits": True}
    fused = model.generate(ids, **kept)
    with plainly():
        plain = model.generate(ids, **kept)
    theirs, ours = (out.sequences[0, count:].tolist() for out in (plain, fused))
    same = _same(theirs, ours)
    steps = min(same + 1, new)  # at a difference the tokens before are the same still
    off = [_off(a[0], b[0]) for a, b in zip(plain.logits[:steps], fused.logits[:steps], strict=True)]
    found = {
        "tokens": new,
        "replayed_same": _same(ours, replayed),
        "same": same,
        "logits_off": max(off),
        "wrong": not max(off) <= WRONG,
    }
    if same < new:
        scores, others = plain.logits[same][0], fused.logits[same][0]
        found["margin"] = float(scores[theirs[same]] - scores[ours[same]])
        found["near_tie"] = found["margin"] <= 2 * float((scores - others).abs().max())
    return found


def _same(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _off(plain: Any, fused: Any) -> float:
    """(V,) each; infinity where one is no number."""
    found = float((plain - fused).abs().max() / plain.std())
    return found if found == found else float("inf")
