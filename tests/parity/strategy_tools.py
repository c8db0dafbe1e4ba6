"""Tiny models for decoding, the same in both libraries, with flat and with peaked next-token distributions."""

import functools
import warnings

import torch
import transformers

import gemmakit

VOCAB = 48
FIELDS = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, head_dim=8, max_position_embeddings=64)  # fmt: skip
FLAT, PEAKED = 0.05, 0.5


@functools.cache
def models(spread=PEAKED, seed=0, dtype=torch.float32, **changes):
    """(gemmakit's, transformers'): equal weights, drawn with this spread."""
    fields = {**FIELDS, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = transformers.GemmaForCausalLM(transformers.GemmaConfig(**fields)).eval()
        ours = gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**fields)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(0.0, 0.1 if "norm" in name else spread, generator=generator)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(dtype), theirs.to(dtype)


def prompt(kind="padded", seed=1):
    """ids and mask: one row, rows of one length, or rows padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    rows = 1 if kind == "one" else 3
    ids = torch.randint(4, VOCAB, (rows, 7), generator=generator)
    mask = torch.ones_like(ids)
    if kind == "padded":
        for row, missing in enumerate((0, 2, 5)):
            mask[row, :missing] = 0
            ids[row, missing] = 2
    ids[mask.cumsum(-1) == 1] = 2
    return ids.masked_fill(mask == 0, 0), mask


WANTED = dict(return_dict_in_generate=True, output_scores=True, output_logits=True)


def run(model, ids, mask, torch_seed=None, **settings):
    """An output dictionary of either library."""
    if torch_seed is not None:
        torch.manual_seed(torch_seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "assistant_model" in settings:
            settings["assistant_model"] = settings["assistant_model"][isinstance(model, transformers.GemmaForCausalLM)]
        return model.generate(ids, attention_mask=mask, **{**WANTED, **settings})


def tokens(out, width):
    """Each row's new tokens up to its end, whatever fills it up after that."""
    rows = out.sequences[:, width:].tolist()
    if "beam_indices" not in out or out.beam_indices is None:
        return [_before_padding(row) for row in rows]
    return [row[:n] for row, n in zip(rows, (out.beam_indices >= 0).sum(-1).tolist(), strict=True)]


def _before_padding(row, pad=0, eos=(1, 9)):
    for i, token in enumerate(row):
        if token in eos and not any(t not in (pad, *eos) for t in row[i + 1 :]):
            return row[: i + 1]
    return row


def distance(ours, theirs):
    """The largest difference of two tuples of tensors; forbidden scores must be forbidden in both."""
    assert len(ours) == len(theirs)
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a.isfinite(), b.isfinite())
        finite = a.isfinite()
        if finite.any():
            worst = max(worst, float((a[finite].double() - b[finite].double()).abs().max()))
    return worst
