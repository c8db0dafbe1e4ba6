"""What a causal model is trained by: cross entropy of logits, or of the head and its logits some positions at a time.

In the second form logits of all positions never exist at once: at 2,048 positions they would be 2.1 GB in float32, and
their gradient as much again. Axis letters: B batch, S positions, n = B * S of them laid end to end, C positions a
chunk, D hidden, V vocabulary.
Source of the idea, gradients computed with the loss: Liger Kernel, arXiv:2410.10989.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from gemmakit.checks import Whole, check
from gemmakit.errors import InputError
from gemmakit.pytorch.attention import capped
from gemmakit.pytorch.kernels import linear
from gemmakit.pytorch.kernels.wide import multiply_across, multiply_plain_back
from gemmakit.pytorch.layers import Linear
from gemmakit.pytorch.masks import packed_documents
from gemmakit.pytorch.shapes import Float, Int, Shaped

IGNORED_LABEL = -100


def causal_loss(
    logits: Float[Tensor, "B S V"], targets: Int[Tensor, "B S"], num_items: int | Shaped[Tensor, ""] | None = None
) -> Float[Tensor, ""]:
    """Cross entropy in float32. targets: the id that follows each position, or -100."""
    flat, target = logits.float().flatten(0, 1), targets.to(logits.device, torch.long).flatten()
    if num_items is None:
        return F.cross_entropy(flat, target, ignore_index=IGNORED_LABEL)
    total = F.cross_entropy(flat, target, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def readable(values: Tensor) -> bool:
    """Whether there are numbers to look at: not while a graph is traced, and not on "meta"."""
    return not torch.compiler.is_compiling() and not values.is_meta and bool(values.numel())


def warn_of_nothing(targets: Int[Tensor, "*any"]) -> None:
    """Say that a mean over no target is NaN, which the next step would spread over every weight."""
    if readable(targets) and not bool((targets != IGNORED_LABEL).any()):
        warnings.warn(
            f"nothing is left to learn: every target is {IGNORED_LABEL}, so the mean loss is NaN. Leave the batch out, "
            "or pass num_items_in_batch to sum over several.",
            stacklevel=4,
        )


def next_labels(
    labels: Int[Tensor, "B S"], attention_mask: Any = None, position_ids: Int[Tensor, "#B S"] | None = None
) -> Int[Tensor, "B S"]:
    """What each position is to predict: the label after it, or -100. The last has none.

    attention_mask: where it is 2-D, (B, past + S), a position that it hides predicts nothing: a row's first token would
    else be asked of the padding on its left. position_ids: the last token of a packed document does not predict the
    next document's first, as `packed_documents` tells them apart. So a batch or a packed row has the targets of its
    rows alone, and `(next_labels(...) != -100).sum()` is what `num_items_in_batch` counts.
    """
    targets = F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED_LABEL)
    shown = None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        shown = attention_mask[:, attention_mask.shape[1] - labels.shape[1] :].to(targets.device) != 0
        targets = targets.masked_fill(~shown, IGNORED_LABEL)
    if shown is None and attention_mask is not None:
        return targets
    documents = packed_documents(position_ids, shown)
    if documents is not None:
        ends = F.pad(documents.diff() != 0, (0, 1))
        targets = targets.masked_fill(ends.to(targets.device), IGNORED_LABEL)
    return targets


def check_labels(labels: Tensor, inputs: Tensor | None, vocab_size: int) -> None:
    if inputs is not None and labels.shape != inputs.shape[:2]:
        raise InputError(f"labels has shape {tuple(labels.shape)}; the inputs are {tuple(inputs.shape[:2])}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise InputError(f"labels are {labels.dtype}; they must be token ids, or {IGNORED_LABEL}.")
    if not readable(labels):
        return
    bad = labels[((labels < 0) & (labels != IGNORED_LABEL)) | (labels >= vocab_size)]
    if bad.numel():
        raise InputError(
            f"label {int(bad[0])} is outside the vocabulary of {vocab_size} ids (0 to {vocab_size - 1}; "
            f"{IGNORED_LABEL} marks positions to ignore)."
        )


def chunked_loss(
    head: nn.Module,
    hidden: Float[Tensor, "B S D"],
    targets: Int[Tensor, "B S"] | None,
    chunk: int,
    num_items: int | Shaped[Tensor, ""] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Cross entropy of head(hidden) in float32 as `causal_loss` gives it, `chunk` positions at a time.

    targets: the id that follows each position, or -100; num_items: what to divide the sum by, instead of the number of
    targets; softcap: logits are capped, see `capped`. With a plain head the gradients are computed along with the loss:
    memory is (C, V), and (V, D) in float32 where the head is trained in several chunks, for its gradient is
    summed in float32 and rounded once. A head with hooks or adapters, or a quantized one, is run twice instead, so that
    it sees its call.

    Raises InputError without targets, or for a chunk that is no whole number above 0.
    """
    if targets is None:
        raise InputError(f"loss_chunk_size is {chunk!r}, but there are no labels to compute a loss from: give labels.")
    check("loss_chunk_size", chunk, Whole(1), InputError)
    flat, target = hidden.flatten(0, 1), targets.to(hidden.device, torch.long).flatten()
    if _is_plain(head):
        if flat.device.type == "cpu" and not torch.compiler.is_compiling():  # a device would have to be waited for
            learnt = (target != IGNORED_LABEL).nonzero()[:, 0]
            flat, target = (flat, target) if len(learnt) == len(target) else (flat[learnt], target[learnt])
        total = _Fused.apply(flat, head.weight, head.bias, target, chunk, softcap, torch.is_grad_enabled())
    else:
        total = _by_module(head, flat, target, chunk, softcap)
    if num_items is None:
        count = (target != IGNORED_LABEL).sum()
        # As torch has it: the mean of nothing is no number, and its gradient is zero.
        return torch.where(count > 0, total / count.clamp_min(1), float("nan"))
    return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def row_logprobs(
    head: nn.Module,
    hidden: Float[Tensor, "B S D"],
    targets: Int[Tensor, "B S"],
    chunk: int,
    softcap: float | None = None,
) -> Float[Tensor, " B"]:
    """The log probability of each row's targets, summed in float32, `chunk` positions at a time; -100 is ignored.

    Only positions with a target meet the head. Logits are computed again on the way back, and never all at once.
    """
    at = (targets != IGNORED_LABEL).nonzero()
    flat, target, rows = hidden[at[:, 0], at[:, 1]], targets[at[:, 0], at[:, 1]], at[:, 0]
    total = torch.zeros(len(hidden), dtype=torch.float32, device=hidden.device)
    for part in _chunks(len(flat), chunk):
        arguments = (head, flat[part], target[part], softcap)
        found = (
            checkpoint(_logprobs, *arguments, use_reentrant=False) if torch.is_grad_enabled() else _logprobs(*arguments)
        )
        total = total.index_add(0, rows[part], found)
    return total


def _logprobs(
    head: nn.Module, hidden: Float[Tensor, "n D"], target: Int[Tensor, " n"], softcap: float | None
) -> Float[Tensor, " n"]:
    return -F.cross_entropy(capped(head(hidden), softcap).float(), target, reduction="none")


def _is_plain(head: nn.Module) -> bool:
    """Whether its weight says all that the head does."""
    hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
    return type(head) is Linear and not hooked and "forward" not in head.__dict__


def _by_module(
    head: nn.Module, flat: Float[Tensor, "n D"], target: Int[Tensor, " n"], chunk: int, softcap: float | None
) -> Float[Tensor, ""]:
    total = torch.zeros((), dtype=torch.float32, device=flat.device)
    for at in _chunks(len(flat), chunk):
        arguments = (head, flat[at], target[at], softcap)
        part = checkpoint(_sum, *arguments, use_reentrant=False) if torch.is_grad_enabled() else _sum(*arguments)
        total = total + part
    return total


def _sum(
    head: nn.Module, hidden: Float[Tensor, "n D"], target: Int[Tensor, " n"], softcap: float | None
) -> Float[Tensor, ""]:
    return F.cross_entropy(capped(head(hidden), softcap).float(), target, ignore_index=IGNORED_LABEL, reduction="sum")


def _chunks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Fused(torch.autograd.Function):
    """The summed loss, and with it all gradients, which backward only scales.

    With p the softmax and y the target's indicator, a position's gradient to its logits is p - y; it is rounded to the
    activations' dtype, as autograd rounds it, before it meets the weight and the hidden states.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "n D"],
        weight: Float[Tensor, "V D"],
        bias: Float[Tensor, " V"] | None,
        target: Int[Tensor, " n"],
        chunk: int,
        softcap: float | None,
        grad: bool,
    ) -> Float[Tensor, ""]:
        wanted = [grad and need for need in ctx.needs_input_grad[:3]]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        # One product is rounded once as it is; several are summed in float32.
        sums = torch.float32 if len(hidden) > chunk else weight.dtype
        to_hidden = torch.empty_like(hidden) if wanted[0] else None
        to_weight = torch.zeros(weight.shape, dtype=sums, device=weight.device) if wanted[1] else None
        to_bias = torch.zeros(len(weight), dtype=torch.float32, device=weight.device) if wanted[2] else None
        for at in _chunks(len(hidden), chunk):
            scores = _Scores(linear(hidden[at], weight, bias), softcap)
            peak, real = scores.logsumexp(), (target[at] != IGNORED_LABEL)[:, None]
            index = target[at].clamp_min(0)[:, None]
            total += torch.where(real, peak - scores.of(index), 0.0).sum()
            if not any(wanted):
                continue
            for part, slope in scores.become_slopes(peak, index, real):
                if to_weight is not None:
                    to_weight[part] += multiply_across(slope, hidden[at].to(slope.dtype))
                if to_bias is not None:
                    to_bias[part] += slope.sum(0, dtype=torch.float32)
            if to_hidden is not None:
                to_hidden[at] = multiply_plain_back(scores.held, weight.to(scores.held.dtype))
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled = (
            None if g is None else (g * grad_outputs[0].to(torch.float32)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*scaled, None, None, None, None)


# Columns of logits that are in float32 at a time on a CPU, where they stay in its caches.
_COLUMNS = 8192


class _Scores:
    """Logits (C, V) in one memory, in their own dtype, which their slopes take; float32 are some columns at a time."""

    def __init__(self, logits: Float[Tensor, "C V"], softcap: float | None):
        self.softcap, self.held = softcap, logits
        self.parts = list(_chunks(logits.shape[1], _COLUMNS if logits.is_cpu else logits.shape[1]))
        if softcap is not None:  # of capped ones the tangent is kept, which the way back needs
            self.held = logits.div_(softcap).tanh_()

    def _scores(self, held: Float[Tensor, "C _"]) -> Float[Tensor, "C _"]:
        return (held if self.softcap is None else held * self.softcap).float()

    def logsumexp(self) -> Float[Tensor, "C 1"]:
        found = [self._scores(self.held[:, part]).logsumexp(-1) for part in self.parts]
        return torch.stack(found, -1).logsumexp(-1, keepdim=True)

    def of(self, index: Int[Tensor, "C 1"]) -> Float[Tensor, "C 1"]:
        return self._scores(self.held.gather(1, index))

    def become_slopes(
        self, peak: Float[Tensor, "C 1"], index: Int[Tensor, "C 1"], real: Shaped[Tensor, "C 1"]
    ) -> Iterator[tuple[slice, Float[Tensor, "C _"]]]:
        """Which columns, and their slopes: the gradients of the loss to what the head gave there."""
        for part in self.parts:
            held, here = self.held[:, part], index - part.start
            slope = self._scores(held).sub_(peak).exp_()
            inside = (here >= 0) & (here < slope.shape[1])
            slope.scatter_add_(1, here.clamp(0, slope.shape[1] - 1), torch.where(inside, -1.0, 0.0))
            # A position that is ignored has none, whatever its logits are.
            slope = slope.masked_fill_(~real, 0.0).to(held.dtype)
            if (
                self.softcap is not None
            ):  # each step back rounded as autograd rounds it: the cap cancels but for rounding
                slope = torch.ops.aten.tanh_backward(slope * self.softcap, held) / self.softcap
            yield part, held.copy_(slope)
