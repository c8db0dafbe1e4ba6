"""Prompt lookup: what followed the text's end where it came before is proposed to follow again.

It changes no token: greedy or sampled with a seed, the row is the one that decoding token by token gives. What a
proposal costs is the wider pass that checks it; `Gain` proposes where that pays. Where not even a bit depends on how
many tokens a pass has, rows decode so by themselves. Axis letters: k proposed tokens, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.cache import DynamicCache, WindowCache
from gemmakit.pytorch.decode.capture import CAPTURES
from gemmakit.pytorch.decode.drafts import Gain, Repeats, width_cost
from gemmakit.pytorch.decode.processors import repeatable
from gemmakit.pytorch.decode.prompt import Prompt
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.strategies.assisted import one_row, speculate
from gemmakit.pytorch.decode.stream import Steps, decode
from gemmakit.pytorch.kernels import Decision
from gemmakit.pytorch.kernels.cpu import MAX_ROWS

# Fewer new tokens leave nothing to gain.
WORTH_TOKENS = 8


class Lookup:
    """Drafts from the text so far, at most `count` tokens."""

    processed = False

    def __init__(self, prompt: Prompt, plan: Plan, count: int):
        config = plan.config
        self.count, self.eos = count, config.eos_token_ids
        self.repeats = Repeats(config.max_matching_ngram_size or sys.maxsize)
        ids = prompt.ids[0] if prompt.padding is None else prompt.ids[0][~prompt.padding[0]]
        self.repeats.extend(ids.tolist())
        self.gain = Gain(width_cost(prompt.ids.device))

    def propose(self, ids: Tensor, new: Sequence[int], limit: int) -> Tensor | None:
        self.gain.follow(self.repeats, new)
        tokens = self.repeats.continuation(self.gain.count(self.repeats.run, min(self.count, limit)))
        if not tokens:
            return None
        end = next((i + 1 for i, token in enumerate(tokens) if token in self.eos), len(tokens))
        return torch.tensor(tokens[:end], dtype=torch.long, device=ids.device)

    def learn(self, proposed: int, accepted: int, seconds: float) -> None:
        self.gain.enter(proposed, accepted, seconds)


def prompt_lookup_decoding(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """The text so far proposes, the model checks."""
    one_row(prompt)
    assert plan.config.prompt_lookup_num_tokens is not None
    return speculate(model, prompt, plan, Lookup(prompt, plan, plan.config.prompt_lookup_num_tokens))


def plain_decoding(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """A token a row and step; several where the text so far proposes them, they pay, and no bit can change."""
    if speculation(model, prompt, plan).why:
        return decode(model, prompt, plan)
    return speculate(model, prompt, plan, Lookup(prompt, plan, MAX_ROWS - 1), only_alike=True)


def speculation(model: CausalLM, prompt: Prompt, plan: Plan) -> Decision:
    """Whether a call proposes tokens to itself of its own accord, as far as the call decides it."""
    why = _obstacle(model, prompt, plan)
    return Decision("a token a step", why) if why else Decision("several tokens a step where text repeats")


def _obstacle(model: CausalLM, prompt: Prompt, plan: Plan) -> str:
    if not plan.config.speculate:
        return "speculate is False"
    if model.device.type != "cpu" or model.device.type in CAPTURES:
        return f"the model is on {model.device}, where steps may be replayed"
    if (rows := len(prompt.ids) * plan.copies) != 1:
        return f"it has {rows} rows"
    if type(prompt.cache) not in (DynamicCache, WindowCache):
        return "there is no cache" if prompt.cache is None else f"the cache is a {type(prompt.cache).__name__}"
    if plan.outputs.attentions is not None or plan.outputs.hidden_states is not None:
        return "attentions or hidden states of each step are kept"
    if plan.total - prompt.ids.shape[1] < WORTH_TOKENS:
        return f"fewer than {WORTH_TOKENS} new tokens are asked for"
    others = [type(p).__name__ for p in plan.processors if not repeatable(p)]
    return f"{', '.join(others)} may count how often it is asked" if others else ""
