"""One decoding step, written once: forward, float, processors, pick, pad, end.

The token loop runs it as it is, `capture` and `batch.capture` record it on fixed memory, and the batch engine spreads
it over rows that choose apart. Axis letters: R rows (prompts times their copies), n tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.protocols import CausalLM, Processor
from gemmakit.pytorch.decode.sampling import Exponential, Pick, greedy
from gemmakit.pytorch.decode.stopping import Criterion, first_reason, reasons
from gemmakit.pytorch.shapes import Bool, Float, Int, Shaped


@runtime_checkable
class Appending(Protocol):
    """Rows of tokens that grow by one each."""

    @property
    def ids(self) -> Tensor:
        """What processors read, int64 (R, n)."""
        ...

    def append(self, token: Tensor) -> Tensor:
        """token: (R,), NO_TOKEN counts as 0. Returns what criteria read, (R, n) whose last column is the token."""
        ...


def forward(
    model: CausalLM,
    ids: Tensor | None,
    cache: Any,
    mask: Tensor | Mapping[str, Tensor] | None = None,
    positions: Tensor | None = None,
    *,
    embeds: Tensor | None = None,
    keep: int | Tensor = 1,
    attentions: bool = False,
    hidden_states: bool = False,
    **more: Any,
) -> Any:
    """A pass without loss or gradient bookkeeping. keep: how many last positions get logits, or which ones."""
    return model(
        input_ids=ids,
        inputs_embeds=embeds,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=cache is not None,
        output_attentions=attentions,
        output_hidden_states=hidden_states,
        return_dict=True,
        logits_to_keep=keep,
        **more,
    )


@dataclass
class Step:
    """How the next token of each row is chosen, and what ends a row.

    eos: (E,) on the rows' device, None if no token ends a row; eos_ids: the same for the host.
    """

    processors: Sequence[Processor] = ()
    pick: Pick = greedy
    pad: int = 0
    eos: Tensor | None = None
    eos_ids: Sequence[int] = ()
    criteria: Sequence[Criterion] = ()

    def process(self, ids: Int[Tensor, "R n"], logits: Float[Tensor, "R V"]) -> Float[Tensor, "R V"]:
        """float32 scores after all processors, in their order."""
        scores = logits.float()
        for processor in self.processors:
            scores = processor(ids, scores)
        return scores

    def choose(
        self, ids: Int[Tensor, "R n"], logits: Float[Tensor, "R V"]
    ) -> tuple[Int[Tensor, " R"], Float[Tensor, "R V"]]:
        """Tokens, NO_TOKEN where there was none to choose, and the scores they were picked from."""
        scores = self.process(ids, logits)
        return self.pick(scores), scores

    def append(
        self, rows: Appending, token: Int[Tensor, " R"], scores: Float[Tensor, "R V"], ends: Int[Tensor, " R"]
    ) -> tuple[Int[Tensor, " R"], Int[Tensor, " R"]]:
        """Write the tokens down. ends: indices of REASONS. Returns tokens and ends as they are now.

        Rows that are over get padding; a lone one is not asked again.
        """
        over = ends > 0 if len(token) > 1 else None
        if over is not None:
            token = torch.where(over, self.pad, token)
        ids = rows.append(token)
        if self.eos is not None or self.criteria:
            now = self.ends(ids, scores)
            ends = now.to(ends) if over is None else torch.where(over, ends, now)
        return token, ends

    def ends(self, ids: Int[Tensor, "R n"], scores: Float[Tensor, "_ V"]) -> Shaped[Tensor, " R"]:
        """Above 0 where the last token of ids ends the row: an index of REASONS, or True for an eos.

        scores: what the last tokens were picked from, a row each where there are criteria.
        """
        last = ids[:, -1]
        if self.eos is None:
            found = torch.zeros_like(last, dtype=torch.bool)
        else:
            found = last == self.eos if len(self.eos) == 1 else (last[:, None] == self.eos).any(-1)
        return reasons(self.criteria, ids, scores, found) if self.criteria else found

    def ended(self, ids: Int[Tensor, "R n"], scores: Float[Tensor, "_ V"]) -> Bool[Tensor, " R"]:
        """The rows that `ends`."""
        return self.ends(ids, scores).to(torch.bool)

    def reason(self, token: int, ids: Tensor | None, scores: Tensor | None) -> str | None:
        """Why a lone row ends with this token, for who has it on the host; None if it goes on.

        ids: (1, n) with the token, and the scores (1, V) it was picked from; only criteria need them.
        """
        if token in self.eos_ids:
            return "eos"
        if not self.criteria:
            return None
        assert ids is not None and scores is not None
        return first_reason(self.criteria, ids, scores)


@dataclass
class StepOutputs:
    """What the caller wants to see of each step; None of what it does not."""

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None

    def add(self, out: Any, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits.float())
        if self.attentions is not None:
            self.attentions.append(out.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(out.hidden_states)

    def only_scores(self, wanted: bool) -> None:
        """Keep nothing else, and scores only if they are wanted."""
        self.scores = [] if wanted else None
        self.logits = self.attentions = self.hidden_states = None

    def take_scores(self) -> Tensor | None:
        """(V,) of the oldest step of one row, which is forgotten here."""
        return None if self.scores is None else self.scores.pop(0)[0]

    def kept(self, steps: int) -> dict[str, tuple[Any, ...] | None]:
        """The fields of an output, for its first `steps` tokens."""
        return {n: None if v is None else tuple(v[:steps]) for n, v in vars(self).items()}


@dataclass(kw_only=True)
class Plan(Step):
    """A call's steps, and what strategies ask beside."""

    config: GenerationConfig
    total: int  # tokens a row may have, prompt included
    noise: Exponential
    copies: int = 1  # rows a prompt
    assistant: Any = None
    outputs: StepOutputs = field(default_factory=StepOutputs)
