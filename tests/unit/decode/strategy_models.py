"""Tiny models for every strategy, and every strategy by name."""

import functools

import torch

import gemmakit
from gemmakit.family import KINDS
from gemmakit.pytorch.decode.stream import HostQueue

VOCAB = 40
BOS = 2
WINDOW = 8
# The members whose layers have windows.
_WINDOWED = dict(sliding_window=WINDOW, query_pre_attn_scalar=20, tie_word_embeddings=False)  # a tied one echoes
_CAPPED = dict(_WINDOWED, attn_logit_softcapping=5.0, final_logit_softcapping=8.0)
_BOTH = ["sliding_attention", "full_attention"]
MEMBERS = {
    "gemma2": dict(_CAPPED, layer_types=_BOTH),
    "gemma3_text": dict(_WINDOWED, layer_types=_BOTH),
    "vaultgemma": dict(_CAPPED, layer_types=_BOTH[::-1]),
    # Its last two layers read the keys and values of the first two, and each has an embedding of its own.
    "gemma4_text": dict(
        {name: value for name, value in _WINDOWED.items() if name != "query_pre_attn_scalar"},
        num_hidden_layers=4,
        layer_types=_BOTH * 2,
        num_kv_shared_layers=2,
        global_head_dim=12,
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
        hidden_size_per_layer_input=4,
        vocab_size_per_layer_input=VOCAB,
    ),
}


@functools.cache
def model(seed=0, spread=0.5, vocab=VOCAB, layers=2, member="gemma"):
    """In float64, so that the order of sums decides nothing."""
    sizes = dict(
        vocab_size=vocab, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=96,
    )  # fmt: skip
    config, kind = (getattr(gemmakit, KINDS[member].classes[role]) for role in ("config", "causal_lm"))
    made = kind(config(**{**sizes, **MEMBERS.get(member, {})})).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.normal_(0.0, 0.1 if "norm" in name else spread, generator=generator)
    return made


def draft():
    return model(seed=9, layers=1)


# Those that decode batches, and those that follow one row.
MANY = {
    "greedy": dict(),
    "sample": dict(do_sample=True, seed=4),
    "sample_two": dict(do_sample=True, seed=4, num_return_sequences=2),
    "beam": dict(num_beams=3, num_return_sequences=2),
    "beam_never": dict(num_beams=3, early_stopping="never", length_penalty=2.0),
    "beam_sample": dict(num_beams=3, do_sample=True, seed=4, num_return_sequences=2),
    "diverse": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.7, num_return_sequences=2),
    "constrained": dict(num_beams=4, force_words_ids=[[30, 31], [22]], num_return_sequences=2),
    "contrastive": dict(penalty_alpha=0.6, top_k=4),
    "contrastive_low_memory": dict(penalty_alpha=0.6, top_k=4, low_memory=True),
}
ONE = {
    "assisted": dict(assistant_model=draft),
    "assisted_by_itself": dict(assistant_model=model),
    "assisted_sample": dict(assistant_model=draft, do_sample=True, seed=4),
    "lookup": dict(prompt_lookup_num_tokens=5),
    "lookup_sample": dict(prompt_lookup_num_tokens=5, do_sample=True, seed=4),
}
ALL = {**MANY, **ONE}


def settings(name, **more):
    """Keyword arguments of generate()."""
    out = {"max_new_tokens": 9, "pad_token_id": 0, "eos_token_id": [1, 7], **ALL[name], **more}
    if "assistant_model" in out:
        out["assistant_model"] = out["assistant_model"]()
    return out


def rows(*lengths, seed=3):
    """Prompts of these lengths, as lists; the same tokens come again, for lookups to find."""
    generator = torch.Generator().manual_seed(seed)
    return [[BOS, *torch.randint(10, 16, (n - 1,), generator=generator).tolist()] for n in lengths]


def left_padded(lists, extra=0):
    """(ids, mask), with `extra` columns of padding for all."""
    width = max(map(len, lists)) + extra
    ids = torch.tensor([[0] * (width - len(row)) + row for row in lists])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in lists])
    return ids, mask


def new_tokens(sequences, width, eos=(1, 7)):
    out = []
    for row in sequences[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in eos), len(row))
        out.append(row[:end])
    return out


def read_late(patch):
    """As from an accelerator: what a step tells is read while the next one runs."""
    init = HostQueue.__init__

    def late(self, device):
        init(self, device)
        self.lag = 1

    patch.setattr(HostQueue, "__init__", late)


class Uncaptured:
    """Runs a step as it is: stands for a device that records."""

    budget_bytes = 1 << 30

    def __init__(self, device):
        pass

    def capture(self, step):
        return step

    def drain(self):
        pass
