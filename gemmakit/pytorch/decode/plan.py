"""How to decode: what every strategy is told besides the model and the prompt, and what it tells the host.

Axis letters: R rows (prompts times their copies), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gemmakit.generation import GenerationConfig
from gemmakit.pytorch.decode.sampling import Exponential
from gemmakit.pytorch.decode.step import Step, StepOutputs


@dataclass(kw_only=True)
class Plan(Step):
    """A call's steps, and what strategies ask beside."""

    config: GenerationConfig
    total: int  # tokens a row may have, prompt included
    noise: Exponential
    copies: int = 1  # rows a prompt
    assistant: Any = None
    record: StepOutputs = field(default_factory=StepOutputs)


class Ends:
    """All of a plan's ways to end as one criterion, for decoding functions of the caller's own."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self.max_length = plan.total

    def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """ids: (R, n) -> bool (R,)."""
        return self._plan.ended(ids, scores) | (ids.shape[1] >= self.max_length)
