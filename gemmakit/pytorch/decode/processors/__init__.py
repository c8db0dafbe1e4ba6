"""What changes a step's logits: small frozen values, called with what is there so far.

Every processor takes ids (B, n), prompt and new tokens, and float32 scores (B, V), and gives scores of the same shape;
a forbidden token has -inf. What a step does follows from ids and scores alone (what some remember only saves work), so
beams may change places and drafts be taken back. `build` strings them together in the order of
`gemmakit.generation.PROCESSOR_ORDER`.
"""

from gemmakit.pytorch.decode.processors.chain import Context, build
from gemmakit.pytorch.decode.processors.forcing import ForcedAt, MinLength, OnlyFinite, PrefixAllowed, Suppressed
from gemmakit.pytorch.decode.processors.shaping import (
    EosDecay,
    NoPromptNgram,
    NoRepeatNgram,
    PromptBonus,
    RepetitionPenalty,
    SequenceBias,
)
from gemmakit.pytorch.decode.processors.truncating import (
    Epsilon,
    Eta,
    MinP,
    Renormalized,
    Temperature,
    TopH,
    TopK,
    TopP,
    Typical,
)
from gemmakit.pytorch.decode.scores import FORBIDDEN, Processor

# These read the scores of a row and nothing else, are equal if they do the same, and wait for no accelerator.
BY_SCORES = (Temperature, TopH, TopK, TopP, MinP, Typical, Epsilon, Eta, OnlyFinite, Renormalized)

__all__ = [
    "BY_SCORES",
    "FORBIDDEN",
    "Context",
    "EosDecay",
    "Epsilon",
    "Eta",
    "ForcedAt",
    "MinLength",
    "MinP",
    "NoPromptNgram",
    "NoRepeatNgram",
    "OnlyFinite",
    "PrefixAllowed",
    "Processor",
    "PromptBonus",
    "Renormalized",
    "RepetitionPenalty",
    "SequenceBias",
    "Suppressed",
    "Temperature",
    "TopH",
    "TopK",
    "TopP",
    "Typical",
    "build",
]
