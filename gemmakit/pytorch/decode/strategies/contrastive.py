"""Contrastive search: the likely token whose hidden state is least like those of the tokens before it.

Of the top_k tokens it takes the one with the largest (1 - alpha) * probability - alpha * similarity, the similarity
being the largest cosine to any earlier token's last hidden state. Source: arXiv:2202.06417.
Axis letters: B rows, k candidates, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.family import layer_type
from gemmakit.outputs import GenerateDecoderOnlyOutput
from gemmakit.pytorch.decode.prompt import Prompt, Rows
from gemmakit.pytorch.decode.protocols import CausalLM
from gemmakit.pytorch.decode.sampling import NO_TOKEN
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.stream import Run, Steps


class Memory:
    """The directions of the tokens' last hidden states, (B, T, D), to compare candidates with."""

    def __init__(self, hidden: Tensor, mask: Tensor | None, room: int):
        """hidden: (B, T, D) of the prompt; mask: bool (B, T + room), False on padding."""
        self.length = hidden.shape[1]
        shape = (hidden.shape[0], self.length + room, hidden.shape[2])
        self.directions = torch.zeros(shape, dtype=torch.float32, device=hidden.device)
        self.directions[:, : self.length] = F.normalize(hidden.float(), dim=-1)
        self.padding = None if mask is None else ~mask

    def similarity(self, hidden: Tensor) -> Tensor:
        """(B, k): the largest cosine of each candidate's state (B, k, D) to the states here."""
        cosines = F.normalize(hidden.float(), dim=-1) @ self.directions[:, : self.length].mT
        if self.padding is not None:
            cosines = cosines.masked_fill(self.padding[:, None, : self.length], float("-inf"))
        return cosines.amax(-1)

    def add(self, hidden: Tensor) -> None:
        """hidden: (B, D)."""
        self.directions[:, self.length] = F.normalize(hidden.float(), dim=-1)
        self.length += 1


class LookAhead:
    """Runs the candidates of a step beside each other, in one pass that first appends the token chosen before them.

    Every candidate sees all tokens and itself, no other candidate, and all have the same position. So no cache is ever
    copied: the candidates' keys are taken back, and the chosen one's are computed again by the next pass.
    """

    def __init__(self, rows: Rows, prompt_width: int):
        self.rows = rows
        self.pending = 0  # tokens of the buffer's end that the cache does not hold yet
        self.past = prompt_width  # positions it holds

    def __call__(self, candidates: Tensor, attentions: bool) -> SimpleNamespace:
        """candidates: (B, k) -> logits (B, k, V), hidden_states and attentions a layer with k in the place of S."""
        rows, n, k = self.rows, self.pending, candidates.shape[1]
        held = self.past + n
        ids = torch.cat((rows.buffer[:, rows.length - n : rows.length], candidates), dim=1)
        out = rows.model(
            input_ids=ids,
            attention_mask=self._masks(n, k, held),
            position_ids=self._positions(n, k, held),
            past_key_values=rows.cache,
            use_cache=True,
            output_attentions=attentions,
            output_hidden_states=True,
            return_dict=True,
            logits_to_keep=k,
        )
        assert rows.cache is not None
        rows.cache.crop(-k)
        self.past, self.pending = held, 1
        return SimpleNamespace(
            logits=out.logits,
            hidden_states=tuple(h[:, n:] for h in out.hidden_states),
            attentions=None if out.attentions is None else tuple(_own(a[:, :, n:], held) for a in out.attentions),
        )

    def _masks(self, n: int, k: int, held: int) -> dict[str, Tensor]:
        """By the kind of layer, bool (B or 1, 1, n + k, held + k)."""
        mask, device = self._mask(n, k, held), self.rows.device
        place = torch.arange(held + k, device=device).clamp_max(held)  # all candidates stand at the same one
        away = place[held - n :, None] - place
        windows = self.rows.model.model.windows
        return {layer_type(w): mask if w is None else mask & (away < w) for w in windows}

    def _mask(self, n: int, k: int, held: int) -> Tensor:
        device = self.rows.device
        sees = torch.ones((n + k, held + k), dtype=torch.bool, device=device)
        sees[:, held:] = False
        sees[n:, held:] = torch.eye(k, dtype=torch.bool, device=device)
        mask = sees[None, None]
        if self.rows.mask is None:
            return mask
        tokens = F.pad(self.rows.mask[:, :held], (0, k), value=True)
        return mask & tokens[:, None, None]

    def _positions(self, n: int, k: int, held: int) -> Tensor:
        if self.rows.positions is not None:
            known = self.rows.positions[:, held - n : held]
            return torch.cat((known, (self.rows.positions[:, held - 1 : held] + 1).expand(-1, k)), dim=1)
        places = torch.arange(held - n, held + 1, device=self.rows.device)
        return torch.cat((places[:n], places[n:].expand(k)))[None]


def _own(weights: Tensor, held: int) -> Tensor:
    """(B, N, k, held + k) -> (B, N, k, held + 1): what each candidate gives to the tokens and to itself."""
    return torch.cat((weights[..., :held], weights[..., held:].diagonal(dim1=2, dim2=3)[..., None]), dim=-1)


def contrastive_search(model: CausalLM, prompt: Prompt, plan: Plan) -> Steps[GenerateDecoderOnlyOutput]:
    """One token a row and step; with low_memory the candidates run one after another."""
    if prompt.past or (prompt.cache is not None and prompt.cache.get_seq_length()):
        raise InputError(
            "past_key_values holds tokens already, whose hidden states contrastive search would need: pass the whole "
            "prompt and no cache."
        )
    run = Run(model, prompt, plan)
    rows = run.rows
    rows.hidden_states = True
    out = rows.prefill()
    width = out.hidden_states[-1].shape[1]
    memory = Memory(out.hidden_states[-1], rows.mask, plan.total - rows.length)
    ahead = LookAhead(rows, width)
    while not run.over:
        out = _step(run, out, memory, ahead)
        yield from run.arrived()
    return run.output()


def _step(run: Run, out: Any, memory: Memory, ahead: LookAhead) -> SimpleNamespace:
    """Choose a token by what its own pass says of it; that pass is the next step's."""
    config, plan = run.plan.config, run.plan
    logits = out.logits[:, -1].float()
    scores = plan.process(run.rows.ids, logits)
    plan.outputs.add(out, logits, scores)
    assert config.top_k is not None and config.penalty_alpha is not None
    likely, tokens = scores.softmax(-1).topk(min(config.top_k, scores.shape[-1]))
    found = _looked_at(ahead, tokens, plan.outputs.attentions is not None, config.low_memory)
    alpha = config.penalty_alpha
    value = (1 - alpha) * likely - alpha * memory.similarity(found.hidden_states[-1])
    best = value.argmax(-1, keepdim=True)
    chosen = SimpleNamespace(
        logits=_at(found.logits, best),
        hidden_states=tuple(_at(h, best) for h in found.hidden_states),
        attentions=None if found.attentions is None else tuple(_at(a.transpose(1, 2), best) for a in found.attentions),
    )
    if chosen.attentions is not None:
        chosen.attentions = tuple(a.transpose(1, 2) for a in chosen.attentions)
    memory.add(chosen.hidden_states[-1][:, 0])
    sound = value.amax(-1).isfinite() & scores.amax(-1).isfinite()
    run.put(torch.where(sound, tokens.gather(1, best)[:, 0], NO_TOKEN), scores)
    return chosen


def _looked_at(ahead: LookAhead, tokens: Tensor, attentions: bool, one_by_one: bool) -> SimpleNamespace:
    if not one_by_one:
        return ahead(tokens, attentions)
    parts = []
    for i in range(tokens.shape[1]):
        if i:  # the first has appended the token before them
            ahead.pending = 0
        parts.append(ahead(tokens[:, i : i + 1], attentions))
    layers = {
        name: None if getattr(parts[0], name) is None else _stacked([getattr(p, name) for p in parts], dim)
        for name, dim in (("hidden_states", 1), ("attentions", 2))
    }
    return SimpleNamespace(logits=torch.cat([p.logits for p in parts], dim=1), **layers)


def _stacked(parts: list[tuple[Tensor, ...]], dim: int) -> tuple[Tensor, ...]:
    return tuple(torch.cat(layer, dim=dim) for layer in zip(*parts, strict=True))


def _at(values: Tensor, index: Tensor) -> Tensor:
    """values: (B, k, ...); index: (B, 1) -> (B, 1, ...)."""
    index = index.view(-1, 1, *(1 for _ in values.shape[2:]))
    return values.gather(1, index.expand(-1, 1, *values.shape[2:]))
