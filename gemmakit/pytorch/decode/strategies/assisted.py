"""Assisted decoding: something cheap drafts a few tokens, the model checks all of them in one pass.

The result is what the model alone would give: with greedy choice the same tokens, with sampling the same distribution.
Source: arXiv:2211.17192, algorithm 1. One row. Axis letters: k drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import DynamicCache
from gemmakit.pytorch.decode.processors import FORBIDDEN
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN, Noise
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.stream import Run, Steps, refuse_no_token
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.streamers import StepTokens


@dataclass
class Proposal:
    """tokens: (k,) int64. probabilities: (k, V) they were drawn from; None when they were not drawn."""

    tokens: Tensor
    probabilities: Tensor | None = None


class Drafter(Protocol):
    """Proposes tokens, says which of them are right, and learns from it.

    processed: whether what it proposes has passed the processors, so that none of it is forbidden.
    """

    processed: bool

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Proposal | None:
        """At least one token, at most `limit`; or None. ids: (1, n) so far, of which `new` came since the last time."""
        ...

    def check(self, scores: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
        """scores: (k + 1, V) of the model, processed. Returns tokens (k + 1,) and a number n: the first n + 1 count."""
        ...

    def keep(self, count: int) -> None:
        """So many of the tokens that were checked have come."""
        ...

    def learn(self, proposed: int, accepted: int, seconds: float) -> None: ...


class DraftModel:
    """A smaller model drafts, by the same choice and the same processors as the model it helps."""

    processed = True

    def __init__(self, prompt: Prompt, plan: Plan):
        model = plan.assistant
        settings = _settings(plan.config, model)
        self.count = settings.num_assistant_tokens
        self.fixed = settings.num_assistant_tokens_schedule == "constant"
        self.threshold = settings.assistant_confidence_threshold
        self.plan = plan
        device = next(model.parameters()).device
        mask = None if prompt.padding is None else ~prompt.padding.to(device)
        own = Prompt(ids=prompt.ids.to(device), embeds=None, mask=mask, cache=DynamicCache(), past=0)
        self.rows = Rows(model, own, plan.total, plan.pad)

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Proposal | None:
        if limit < 1:
            return None
        rows = self.rows
        assert rows.cache is not None
        rows.buffer[:, : ids.shape[1]] = ids
        rows.length = ids.shape[1]
        rows.cache.crop(min(rows.cache.get_seq_length(), rows.length - 1))
        probabilities: list[Tensor] = []
        while len(probabilities) < min(self.count, limit):
            probabilities.append(self._one(ids.device))
            # Reading it waits for the device, as a threshold must.
            if self.threshold and probabilities[-1][0, rows.buffer[0, rows.length - 1]].item() < self.threshold:
                break
        tokens = rows.buffer[0, ids.shape[1] : rows.length].to(ids.device)
        return Proposal(tokens, torch.cat(probabilities) if self.plan.config.do_sample else None)

    def _one(self, device: torch.device) -> Tensor:
        """Draft a token; the probabilities (1, V) it was chosen by."""
        rows = self.rows
        assert rows.cache is not None
        out = rows.forward(rows.cache.get_seq_length(), rows.length)
        scores = self.plan.process(rows.ids.to(device), out.logits[:, -1].float().to(device))
        # A draft model that is not sound proposes what it will: the check does not rely on it.
        probability = scores.softmax(-1).nan_to_num(0.0)
        weights = probability / self.plan.noise(probability) if self.plan.config.do_sample else probability
        rows.buffer[:, rows.length] = weights.argmax(-1)
        rows.length += 1
        return probability

    def check(self, scores: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
        if proposal.probabilities is None:
            return agreement(self.plan.pick(scores), proposal)
        return speculative(scores, proposal.tokens, proposal.probabilities, self.plan.noise)

    def keep(self, count: int) -> None:
        pass

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        """Two tokens more after a draft that was right to the end, one less after one that was not."""
        if not self.fixed and proposed:
            self.count = self.count + 2 if accepted == proposed else max(1, self.count - 1)


def _settings(config: GenerationConfig, assistant: Any) -> GenerationConfig:
    """The drafting settings: those of the call where they were changed, else those the assistant carries."""
    default = GenerationConfig()
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    changed = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}
    return assistant.generation_config.updated(**changed)


def agreement(tokens: Tensor, proposal: Proposal) -> tuple[Tensor, Tensor]:
    """The model's own tokens (k + 1,), and how many of the proposal they repeat from its beginning on.

    Where the model draws its tokens, the draw alone decides: they are distributed as if nothing had been proposed.
    """
    return tokens, (tokens[:-1] == proposal.tokens).cumprod(0).sum()


def speculative(scores: Tensor, drafted: Tensor, q: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Keep drafted token i with probability min(1, p_i / q_i); after the first that is not kept, draw from (p - q)+.

    scores: (k + 1, V); drafted: (k,); q: (k, V). Returns tokens (k + 1,) and how many of the drafted are kept.
    """
    k = len(drafted)
    p, at = scores.softmax(-1), torch.arange(k, device=scores.device)
    likely, drawn_with = p[at, drafted], q[at, drafted]
    uniform = (-noise(likely[None])).exp()[0]
    kept = (uniform * drawn_with < likely) & (drawn_with > 0)
    rest = torch.cat(((p[:k] - q).clamp_min(0), p[k:]))
    # Where p and q are equal nothing is refused but by rounding; p itself is right then.
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)
    drawn = torch.where(scores.amax(-1).isfinite(), (rest / noise(rest)).argmax(-1), NO_TOKEN)
    count = kept.long().cumprod(0).sum()
    places = torch.arange(k + 1, device=scores.device)
    return torch.where(places < count, torch.cat((drafted, drawn[-1:])), drawn), count


class Checker:
    """Rounds of running the newest token and a proposal, keeping what is right and taking the rest back."""

    def __init__(self, run: Run, drafter: Drafter):
        self.run, self.rows, self.plan, self.drafter = run, run.rows, run.plan, drafter

    def round(self, proposal: Proposal) -> tuple[StepTokens, int]:
        """The tokens that come next, and how many of the proposed were right.

        There are no more tokens than these if one of them could not be chosen, or ends the row.
        """
        rows, plan, start, k = self.rows, self.plan, self.rows.length, len(proposal.tokens)
        rows.buffer[:, start : start + k] = proposal.tokens
        out = rows.forward(start - 1, start + k, keep=k + 1)
        logits = out.logits[0].float()
        each = self._processed(logits, proposal.tokens, start)
        tokens, right = self.drafter.check(
            torch.cat(each), Proposal(proposal.tokens[: len(each) - 1], proposal.probabilities)
        )
        *found, accepted = torch.cat((tokens, right[None])).tolist()
        rows.buffer[0, start : start + accepted + 1] = tokens[: accepted + 1].clamp_min(0)
        reason = None
        for i, token in enumerate(found[: accepted + 1]):
            if token == NO_TOKEN or reason is not None:
                break
            plan.outputs.add(_at(out, i, start + rows.offset), logits[i : i + 1], each[i])
            reason = self._take(token, each[i])
        rows.buffer[0, rows.length : start + k + 1] = plan.pad
        self.drafter.keep(rows.length - start)
        excess = start + k - (rows.length - 1)
        if excess and rows.cache is not None:  # crop(0) would forget everything
            rows.cache.crop(-excess)
        return self.run.took(found[: rows.length - start], reason), accepted

    def _processed(self, logits: Tensor, drafted: Tensor, start: int) -> list[Tensor]:
        """The scores (1, V) of each position, up to the first drafted token that is forbidden.

        Nothing is asked after a forbidden token: a grammar, say, knows no way on from there.
        """
        out = list(logits.split(1))
        for i in range(len(out) if self.plan.processors else 0):
            if i and not self.drafter.processed and not bool(out[i - 1][0, drafted[i - 1]] > FORBIDDEN):
                return out[:i]
            out[i] = self.plan.process(self.rows.buffer[:, : start + i], out[i])
        return out

    def _take(self, token: int, scores: Tensor) -> str | None:
        """Count the token in; why the row ends with it, if it does."""
        rows = self.rows
        rows.length += 1
        reason = self.plan.reason(token, rows.ids, scores)
        return "length" if reason is None and rows.length == self.plan.total else reason


def _at(out: Any, i: int, seen: int) -> SimpleNamespace:
    """What the pass showed of its i-th position, as if it had run alone. seen: positions the first of them sees."""
    weights, hidden = out.attentions, out.hidden_states
    return SimpleNamespace(
        attentions=None if weights is None else tuple(w[:, :, i : i + 1, : seen + i] for w in weights),
        hidden_states=None if hidden is None else tuple(h[:, i : i + 1] for h in hidden),
    )


def speculate(
    model: CausalLM, prompt: Prompt, plan: Plan, drafter: Drafter, only_alike: bool = False
) -> Steps[GenerateDecoderOnlyOutput]:
    """Rounds of drafting and checking, after a first token of the model's own.

    only_alike: check nothing where a bit may depend on how many tokens a pass has.
    """
    run = Run(model, prompt, plan)
    run.queue.lag = 0  # a draft needs the tokens before it
    checker, rows = Checker(run, drafter), run.rows
    # What is not right is taken back.
    most = plan.total if rows.cache is None or rows.cache.spare is None else rows.cache.spare
    run.prefill()
    if rows.alike:
        most = min(most, MAX_ROWS - 1)
    elif only_alike:
        most = 0
    (step,) = run.arrived()
    yield step
    while not run.over:
        start = time.perf_counter()
        proposal = drafter.propose(rows.ids, step.tokens[0], min(most, plan.total - rows.length - 1))
        accepted, proposed = 0, 0 if proposal is None else len(proposal.tokens)
        if proposal is None:
            run.choose(rows.next())
            (step,) = run.arrived()
        else:
            step, accepted = checker.round(proposal)
        drafter.learn(proposed, accepted, time.perf_counter() - start)
        yield step
        if not run.over and len(step.tokens[0]) <= accepted:
            refuse_no_token((NO_TOKEN,), run.delivered + 1)
    return run.output()


def one_row(prompt: Prompt) -> None:
    if len(prompt.ids) > 1:
        raise InputError(
            f"assisted decoding follows one row, and this call has {len(prompt.ids)}: rows would keep different "
            "numbers of drafted tokens. Call generate() once a row."
        )


def assisted_generation(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """A draft model (`plan.assistant`) proposes, the model checks."""
    one_row(prompt)
    if prompt.embeds is not None:
        raise InputError(
            "inputs_embeds is given with assistant_model, which has embeddings of its own: pass input_ids."
        )
    return speculate(model, prompt, plan, DraftModel(prompt, plan))
