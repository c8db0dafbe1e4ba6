"""Diverse beam search: groups of beams, each kept from the tokens that the groups before it chose at this step.

Source: arXiv:1610.02424. Axis letters: B prompts, n beams a prompt, V vocabulary.
"""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from gemmakit.outputs import GenerateBeamDecoderOnlyOutput
from gemmakit.pytorch.decode.beam import Beams, Hypotheses, Search
from gemmakit.pytorch.decode.plan import Plan
from gemmakit.pytorch.decode.prompt import Prompt


class Group(Beams):
    """Beams that share a search with other groups."""

    def _hope(self, candidates: Hypotheses) -> Tensor:
        # As the search of transformers 4.46, which judged by what had just ended too.
        return candidates.scores.amax(-1, keepdim=True)


class Groups:
    """The groups of all prompts, side by side in the rows."""

    def __init__(self, search: Search, plan: Plan):
        count = plan.config.num_beam_groups
        size = plan.copies // count
        self.search, self.plan = search, plan
        self.groups = [Group(search.prompts, plan.total, size, plan, first=i * size) for i in range(count)]

    @property
    def running(self) -> Hypotheses:
        return _joined([group.running for group in self.groups])

    @property
    def finished(self) -> Hypotheses:
        return _joined([group.finished for group in self.groups]).best(self.plan.copies)

    def advance(self, out: Any, place: int) -> tuple[Tensor, Tensor]:
        """One step of every group, in turn; whether there was something to choose (B,), and whether any goes on."""
        search, plan = self.search, self.plan
        logits = out.logits[:, -1].float()
        plain = logits.log_softmax(-1).view(len(search.prompts), plan.copies, -1)
        used = torch.zeros_like(plain[:, 0])  # (B, V): how often earlier groups chose a token at this step
        seen, usable, going = [], [], []
        for group in self.groups:
            at = slice(len(seen) * group.size, (len(seen) + 1) * group.size)
            apart = (plain - plan.config.diversity_penalty * used[:, None]).flatten(0, 1)
            logprobs = plan.process(search.rows.ids, apart).view_as(plain)[:, at]
            seen.append(logprobs)
            group.open = was_open = group.open & search.going
            could, goes = group.advance(logprobs, place)
            usable.append(could)
            going.append(goes)
            tokens = torch.where(was_open, group.running.ids[:, :, place], plan.pad)  # a closed search chooses nothing
            used = used.scatter_add(1, tokens, torch.ones_like(tokens, dtype=used.dtype))
        plan.record.step(out, logits, torch.cat(seen, dim=1).flatten(0, 1))
        return torch.stack(usable).all(0), torch.stack(going).any()


def _joined(parts: list[Hypotheses]) -> Hypotheses:
    return reduce(add, parts)


def diverse_beam_search(model: Any, prompt: Prompt, plan: Plan) -> GenerateBeamDecoderOnlyOutput:
    """num_beam_groups searches of num_beams / num_beam_groups beams; the best hypotheses of all of them."""
    search = Search(model, prompt, plan)
    groups = Groups(search, plan)
    out = search.rows.prefill(plan.copies, plan.config.prefill_chunk_size)
    while True:
        usable, going = groups.advance(out, search.rows.length)
        search.move(groups.running, usable, going)
        if search.over():
            return search.output(groups.finished)
        out = search.rows.next()
