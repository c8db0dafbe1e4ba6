"""Text for calibration that the model writes itself, where there is no other at hand.

Williams, Chrysostomou and Aletras, "Self-calibration for Language Model Quantization and Pruning" (2024). Here it is
drawn from <bos> alone at temperature 1, from all words: what the model takes language to be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig

TEXTS, TOKENS = 32, 256
# Texts that are written at a time: as many rows as read a weight at the cost of one.
AT_ONCE = 8


def written_ids(model: Any, report: Callable[[str, int, int], None]) -> Tensor:
    """(TEXTS, TOKENS) token ids, <bos> first, by a model with a head; the same every time.

    Shorter where the model's max_position_embeddings are. report: called with "writing", the texts that there are, and
    TEXTS. Nothing is drawn from torch's generator as the caller left it.

    Raises InputError where the config names no bos_token_id.
    """
    config = model.config
    if config.bos_token_id is None:
        raise InputError("the model's config has no bos_token_id from which to write a text: pass calibration_ids.")
    ends = model.generation_config.eos_token_id if model.generation_config.eos_token_id is not None else []
    # A text that ended would leave its row without numbers to learn from; nobody writes <pad> either.
    unwritten = {*(ends if isinstance(ends, list) else [ends]), config.bos_token_id, config.pad_token_id} - {None}
    tokens = min(TOKENS, config.max_position_embeddings)
    how = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens - 1, eos_token_id=None,
        pad_token_id=config.pad_token_id, suppress_tokens=sorted(unwritten),
    )  # fmt: skip
    written = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for done in range(0, TEXTS, AT_ONCE):
            start = torch.full((min(AT_ONCE, TEXTS - done), 1), config.bos_token_id)
            written.append(model.generate(start, generation_config=how) if tokens > 1 else start)
            report("writing", done + len(start), TEXTS)
    return torch.cat(written)
