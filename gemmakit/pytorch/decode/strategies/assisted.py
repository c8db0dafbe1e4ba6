"""Assisted decoding: something cheap drafts a few tokens, the model checks all of them in one pass.

The result is what the model alone gives: it chooses every token itself, by its own scores and the noise that this token
meets in any case, and a draft only says which may be chosen in the same pass. A model that drafts draws by the noise of
the tokens it drafts, and so agrees where the two distributions mostly do: nothing is refused by chance, as in
arXiv:2211.17192, and no token changes. One row. Axis letters: k drafted tokens, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import DynamicCache
from gemmakit.pytorch.decode.drafts import ModelGain, Rewound, bytes_share, width_cost
from gemmakit.pytorch.decode.processors import FORBIDDEN
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN, greedy, sampler
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.stream import Run, Steps, refuse_no_token
from gemmakit.pytorch.kernels.cpu import MAX_ROWS
from gemmakit.streamers import StepTokens


class Drafter(Protocol):
    """Proposes tokens, and learns how that went.

    processed: whether what it proposes has passed the processors, so that none of it is forbidden.
    """

    processed: bool

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Tensor | None:
        """At least one token (k,) int64, at most `limit`; or None. ids: (1, n) so far, of which `new` came since."""
        ...

    def learn(self, proposed: int, accepted: int, seconds: float) -> None: ...


class DraftModel:
    """A smaller model drafts, by the same choice and the same processors as the model it helps, while that pays."""

    processed = True

    def __init__(self, model: CausalLM, prompt: Prompt, plan: Plan):
        helper = plan.assistant
        settings = _settings(plan.config, helper)
        self.threshold = settings.assistant_confidence_threshold
        self.plan, self.pick = plan, sampler(plan.noise) if plan.config.do_sample else greedy
        device = next(helper.parameters()).device
        self.gain = ModelGain(width_cost(prompt.ids.device) + bytes_share(helper, model), settings)
        mask = None if prompt.padding is None else ~prompt.padding.to(device)
        own = Prompt(ids=prompt.ids.to(device), embeds=None, mask=mask, cache=DynamicCache(), past=0)
        self.rows = Rows(helper, own, plan.total, plan.pad)

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Tensor | None:
        if not (count := self.gain.wanted(limit)):
            return None
        rows, noise = self.rows, self.plan.noise if self.plan.config.do_sample else None
        assert rows.cache is not None
        state = None if noise is None else noise.state(ids)
        rows.buffer[:, : ids.shape[1]] = ids
        rows.length = ids.shape[1]
        rows.cache.crop(min(rows.cache.get_seq_length(), rows.length - 1))
        for _ in range(count):
            probability = self._one(ids.device)
            # Reading it waits for the device, as a threshold must.
            if self.threshold and probability.item() < self.threshold:
                break
        if noise is not None and state is not None:  # the check draws for the same tokens
            noise.restore(state, ids)
        return rows.buffer[0, ids.shape[1] : rows.length].to(ids.device)

    def _one(self, device: torch.device) -> Tensor:
        """Draft a token; its probability ()."""
        rows = self.rows
        assert rows.cache is not None
        out = rows.forward(rows.cache.get_seq_length(), rows.length)
        scores = self.plan.process(rows.ids.to(device), out.logits[:, -1].float().to(device))
        # A draft model that is not sound proposes what it will: the check does not rely on it.
        token = self.pick(scores).clamp_min(0)
        rows.buffer[:, rows.length] = token
        rows.length += 1
        return scores.softmax(-1).nan_to_num(0.0)[0, token[0]]

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        self.gain.enter(proposed, accepted, seconds)


def _settings(config: GenerationConfig, assistant: Any) -> GenerationConfig:
    """The drafting settings: those of the call where they were changed, else those the assistant carries."""
    default = GenerationConfig()
    names = ("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold")
    changed = {n: getattr(config, n) for n in names if getattr(config, n) != getattr(default, n)}
    return assistant.generation_config.updated(**changed)


def agreement(tokens: Tensor, drafted: Tensor) -> Tensor:
    """How many of the drafted (k,) the model's own tokens (k + 1,) repeat from the beginning on."""
    return (tokens[:-1] == drafted).cumprod(0).sum()


class Checker:
    """Rounds of running the newest token and a proposal, keeping what is right and taking the rest back."""

    def __init__(self, run: Run, drafter: Drafter, noise: Rewound | None):
        """noise: what the plan picks by, where it draws."""
        self.run, self.rows, self.plan, self.drafter, self.noise = run, run.rows, run.plan, drafter, noise

    def round(self, drafted: Tensor) -> tuple[StepTokens, int]:
        """The tokens that come next, and how many of the proposed were right.

        There are no more tokens than these if one of them could not be chosen, or ends the row.
        """
        rows, plan, start, k = self.rows, self.plan, self.rows.length, len(drafted)
        rows.buffer[:, start : start + k] = drafted
        out = rows.forward(start - 1, start + k, keep=k + 1)
        logits = out.logits[0].float()
        each = self._processed(logits, drafted, start)
        tokens = plan.pick(torch.cat(each))
        right = agreement(tokens, drafted[: len(each) - 1])
        *found, accepted = torch.cat((tokens, right[None])).tolist()
        rows.buffer[0, start : start + accepted + 1] = tokens[: accepted + 1].clamp_min(0)
        reason = None
        for i, token in enumerate(found[: accepted + 1]):
            if token == NO_TOKEN or reason is not None:
                break
            plan.outputs.add(_at(out, i, start + rows.offset), logits[i : i + 1], each[i])
            reason = self._take(token, each[i])
        rows.buffer[0, rows.length : start + k + 1] = plan.pad
        if self.noise is not None:
            self.noise.keep(rows.length - start)
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
    noise = Rewound(plan.noise) if plan.config.do_sample else None
    run = Run(model, prompt, plan if noise is None else replace(plan, pick=sampler(noise)))
    run.queue.lag = 0  # a draft needs the tokens before it
    checker, rows = Checker(run, drafter, noise), run.rows
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
        accepted, proposed = 0, 0 if proposal is None else len(proposal)
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
    return speculate(model, prompt, plan, DraftModel(model, prompt, plan))
