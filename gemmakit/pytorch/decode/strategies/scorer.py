"""Beams whose loop is the caller's own: `Beams` behind the interface that transformers 4.46 had for it.

Axis letters: B prompts, G groups, n beams of a group, K candidates of a prompt, L tokens of a row, prompt included.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor

from gemmakit.checks import Whole, check
from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.sampling import NO_TOKEN, Exponential
from gemmakit.pytorch.decode.step import Plan
from gemmakit.pytorch.decode.strategies.beam import LENGTH, Beams, Hypotheses

Ids = int | Sequence[int] | Tensor


class BeamSearchScorer:
    """Keeps the hypotheses of a beam search whose loop is one's own, as transformers 4.46 had it.

    `generate(num_beams=...)` needs none.

    Raises GenerationConfigError for settings that contradict each other, as `generate` does.
    """

    def __init__(
        self,
        batch_size: int,
        num_beams: int,
        device: torch.device | str,
        length_penalty: float = 1.0,
        do_early_stopping: bool | str = False,
        num_beam_hyps_to_keep: int = 1,
        num_beam_groups: int = 1,
        max_length: int | None = None,
    ):
        check("batch_size", batch_size, Whole(1), InputError)
        check("num_beams", num_beams, Whole(2), InputError)
        if do_early_stopping == "never" and max_length is None:
            raise InputError("do_early_stopping is 'never' and max_length is None: it counts with the longest row.")
        config = GenerationConfig(
            num_beams=num_beams,
            num_beam_groups=num_beam_groups,
            diversity_penalty=float(num_beam_groups > 1),  # the loop's own; groups are refused without
            length_penalty=length_penalty,
            early_stopping=do_early_stopping,
            num_return_sequences=num_beam_hyps_to_keep,
        )
        self.batch_size, self.num_beams, self.group_size = batch_size, num_beams, num_beams // num_beam_groups
        # Rows are filled up with NO_TOKEN: what else is there says how long they are.
        plan = Plan(config=config, total=max_length or 0, noise=Exponential(None), copies=self.group_size, pad=NO_TOKEN)
        nothing = torch.empty((batch_size, 0), dtype=torch.long, device=device)
        self._groups = [Beams(nothing, plan, self.group_size) for _ in range(num_beam_groups)]

    @property
    def is_done(self) -> bool:
        """Whether no beam of any prompt can get among the best any more."""
        return not any(bool(group.open.any()) for group in self._groups)

    def process(
        self,
        input_ids: Tensor,
        next_scores: Tensor,
        next_tokens: Tensor,
        next_indices: Tensor,
        pad_token_id: int | None = None,
        eos_token_id: Ids | None = None,
        beam_indices: Sequence[Sequence[int]] | None = None,
        group_index: int = 0,
        decoder_prompt_len: int = 0,
    ) -> dict[str, Tensor]:
        """Sort candidates into those that end and the beams of the next step.

        input_ids: (B * n, L) of the group. next_scores (B, K), sums of log probabilities, the best first; next_tokens
        (B, K); next_indices (B, K), the beam of its prompt that each goes on from. beam_indices: of each row, the rows
        that its tokens came from. Returns `next_beam_scores`, `next_beam_tokens`, `next_beam_indices`, (B * n,) each;
        for a prompt that is over 0, padding and 0.

        Raises InputError where fewer than n candidates of a prompt go on.
        """
        group, place = self._groups[group_index], input_ids.shape[-1]
        group.prompt_length = decoder_prompt_len
        candidates = self._rows(input_ids, place + 1, beam_indices).take(next_indices)
        step = 0 if beam_indices is None else len(beam_indices[0])
        candidates.scores = next_scores.float()
        candidates.ids[:, :, place] = next_tokens
        candidates.parents[:, :, step] = next_indices + group.rows
        if eos_token_id is not None:
            candidates.ended = torch.isin(next_tokens, _flat(eos_token_id, next_tokens)).long()
        was_open = group.open
        if bool((was_open & ((candidates.ended == 0).sum(-1, keepdim=True) < self.group_size)).any()):
            raise InputError(
                f"fewer than {self.group_size} candidates of a prompt go on: give (number of eos tokens + 1) * "
                f"{self.group_size} of them."
            )
        group.run_on(candidates)
        first = torch.arange(next_tokens.shape[1], device=next_tokens.device) < self.group_size
        group.offer(candidates, (candidates.ended > 0) & first, place + 1 - decoder_prompt_len)
        group.reconsider(candidates.scores.amax(-1, keepdim=True), place + 1 - decoder_prompt_len)
        running = group.running
        if pad_token_id is None and not bool(was_open.all()):
            raise InputError("pad_token_id is None, and a prompt that is over needs it.")
        going = {
            "next_beam_scores": (running.scores.to(next_scores.dtype), 0),
            "next_beam_tokens": (running.ids[:, :, place], pad_token_id or 0),
            "next_beam_indices": (running.parents[:, :, step], 0),
        }
        return {name: torch.where(was_open, value, over).flatten() for name, (value, over) in going.items()}

    def finalize(
        self,
        input_ids: Tensor,
        final_beam_scores: Tensor,
        final_beam_tokens: Tensor,
        final_beam_indices: Tensor,
        max_length: int | None,
        pad_token_id: int | None = None,
        eos_token_id: Ids | None = None,
        beam_indices: Sequence[Sequence[int]] | None = None,
        decoder_prompt_len: int = 0,
    ) -> dict[str, Tensor | None]:
        """The best of what ended and of what still ran.

        input_ids: (B * G * n, L), final_beam_scores: (B * G * n,), the groups of a prompt side by side. Returns
        `sequences` (B * num_beam_hyps_to_keep, longest), `sequence_scores`, and `beam_indices` if these are given.
        """
        running = self._rows(input_ids, input_ids.shape[-1], beam_indices)
        running.scores = final_beam_scores.float().view(self.batch_size, -1)
        running.ended = running.ended + LENGTH
        for i, group in enumerate(self._groups):
            at = torch.arange(i * self.group_size, (i + 1) * self.group_size, device=input_ids.device)
            part = running.take(at.expand(self.batch_size, -1))
            group.offer(part, torch.ones_like(part.ended, dtype=torch.bool), input_ids.shape[-1] - decoder_prompt_len)
        kept = self._groups[0].plan.config.num_return_sequences
        best = reduce(add, (group.finished for group in self._groups)).best(kept)
        ids, running_on = best.ids.flatten(0, 1), best.ended.flatten() == LENGTH
        lengths = (ids >= 0).sum(-1)
        if eos_token_id is not None:  # transformers ends with one what had not ended and has room
            ids = F.pad(ids, (0, 1), value=NO_TOKEN)
            first = int(_flat(eos_token_id, ids)[0])
            ids = ids.scatter(1, lengths[:, None], torch.where(running_on, first, NO_TOKEN)[:, None])
            lengths = lengths + running_on
        longest = int(lengths.max()) if max_length is None else min(int(lengths.max()), max_length)
        ids = ids[:, :longest]
        if pad_token_id is None and bool((ids < 0).any()):
            raise InputError("pad_token_id is None, and rows of several lengths need it.")
        return {
            "sequences": torch.where(ids < 0, pad_token_id or 0, ids),
            "sequence_scores": best.scores.flatten(),
            "beam_indices": None if beam_indices is None else best.parents.flatten(0, 1)[:, :longest],
        }

    def _rows(self, input_ids: Tensor, length: int, beam_indices: Sequence[Sequence[int]] | None) -> Hypotheses:
        """Rows with places for `length` tokens or more; what has finished gets as many."""
        length = max(length, self._groups[0].plan.total, self._groups[0].finished.ids.shape[-1])
        for group in self._groups:
            more = (0, length - group.finished.ids.shape[-1])
            group.finished.ids = F.pad(group.finished.ids, more, value=NO_TOKEN)
            group.finished.parents = F.pad(group.finished.parents, more, value=-1)
        rows = input_ids.view(self.batch_size, -1, input_ids.shape[-1])
        ids = F.pad(rows, (0, length - rows.shape[-1]), value=NO_TOKEN)
        parents = torch.full_like(ids, -1)
        if beam_indices is not None and len(beam_indices[0]):
            told = torch.as_tensor(beam_indices, device=ids.device)[: len(input_ids)].view(*ids.shape[:2], -1)
            parents[..., : told.shape[-1]] = told
        return Hypotheses(ids, ids.new_zeros(ids.shape[:2]), parents, ids.new_zeros(ids.shape[:2]))


def _flat(ids: Ids, like: Tensor) -> Tensor:
    """(E,), where `like` is."""
    return torch.as_tensor(ids, dtype=torch.long, device=like.device).flatten()
