"""Attention of others in the place of gemmakit's, as TransformerLens puts some: what it is told is the whole truth."""

import copy

import pytest
import torch
from tiny_gemma import away_from_zero, left_padded, prompts, tiny_config
from torch import nn

import gemmakit

MEMBERS = {
    "gemma": (gemmakit.GemmaForCausalLM, gemmakit.GemmaConfig, {}),
    "gemma2": (gemmakit.Gemma2ForCausalLM, gemmakit.Gemma2Config, dict(sliding_window=4)),
    "gemma3": (
        gemmakit.Gemma3ForCausalLM,
        gemmakit.Gemma3TextConfig,
        dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"]),
    ),
}


class Rewritten(nn.Module):
    """Attention by what transformers tells its modules: tables (B, S, H), a 4-D mask, a cache."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, hidden_states, position_embeddings, attention_mask, past_key_values=None, **more):
        own, (B, S, _) = self.own, hidden_states.shape
        cos, sin = (table[:, None] for table in position_embeddings)
        heads = lambda x, norm: x if norm is None else norm(x)  # noqa: E731
        q, k, v = (x.view(B, S, -1, own.head_dim).transpose(1, 2) for x in own.project(hidden_states))
        q, k = heads(q, own.q_norm), heads(k, own.k_norm)
        q, k = (
            x * cos + torch.cat((-x[..., own.head_dim // 2 :], x[..., : own.head_dim // 2]), -1) * sin for x in (q, k)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, own.layer_idx)
        k, v = (x.repeat_interleave(own.num_key_value_groups, 1) for x in (k, v))
        scores = q @ k.mT * own.scaling
        if own.attn_logit_softcapping is not None:
            scores = own.attn_logit_softcapping * torch.tanh(scores / own.attn_logit_softcapping)
        additive = attention_mask.is_floating_point()
        scores = scores + attention_mask if additive else scores.masked_fill(~attention_mask, -1e30)
        return own.o_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, S, -1)), None


class Around(nn.Module):
    """What only passes on, as wrappers for checkpoints and sharding do."""

    def __init__(self, own):
        super().__init__()
        self.own = own

    def forward(self, *args, **kwargs):
        return self.own(*args, **kwargs)


def pair(member, kind):
    """A model, and one with other attention modules around the same numbers."""
    model, config, more = MEMBERS[member]
    fields = {**tiny_config().to_dict(), **more}
    for name in ("model_type", "architectures", "rope_parameters", "hidden_activation", "hidden_act"):
        fields.pop(name, None)
    one = away_from_zero(model(config(**fields))).eval()
    other = copy.deepcopy(one)
    for layer in other.model.layers:
        layer.self_attn = kind(layer.self_attn)
    return one, other


def rows():
    return left_padded([r[: 11 - 4 * i] for i, r in enumerate(prompts(2, 11))], 11)


def same(one, other, mask=None):
    seen = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(other[seen], one[seen], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("kind", [Rewritten, Around])
@pytest.mark.parametrize("member", MEMBERS)
@torch.no_grad()
def test_it_computes_what_ours_does(member, kind):
    one, other = pair(member, kind)
    ids, mask = rows()
    same(one(ids, mask).logits, other(ids, mask).logits, mask)
    same(one(ids).logits, other(ids).logits)
    packed = torch.cat((torch.arange(6), torch.arange(5))).expand(2, -1)
    same(one(ids, position_ids=packed).logits, other(ids, position_ids=packed).logits)
    long = torch.cat((torch.arange(20), torch.arange(20)))[None]  # documents of one row that are attended to apart
    tokens = prompts(1, 40)
    same(one(tokens, position_ids=long).logits, other(tokens, position_ids=long).logits)
    both = torch.ones(2, 1, 11, 11, dtype=torch.bool)  # every token sees every other
    for given in (both, torch.zeros(both.shape)):
        same(one(ids, given).logits, other(ids, given).logits)


@pytest.mark.parametrize("kind", [Rewritten, Around])
@pytest.mark.parametrize("member", MEMBERS)
@torch.no_grad()
def test_it_goes_on_from_a_cache(member, kind):
    """Past the windows, token by token and several at once."""
    one, other = pair(member, kind)
    ids, mask = rows()
    told = [m(ids, mask, use_cache=True).past_key_values for m in (one, other)]
    for width in (1, 3, 1):
        more = prompts(2, width, seed=width)
        mask = torch.cat((mask, torch.ones(2, width, dtype=torch.long)), 1)
        out = [m(more, mask, past_key_values=c, use_cache=True) for m, c in zip((one, other), told, strict=True)]
        same(out[0].logits, out[1].logits)
        told = [o.past_key_values for o in out]
    asked = dict(attention_mask=rows()[1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    for more in ({}, {"num_beams": 2}):
        assert torch.equal(one.generate(ids, **asked, **more), other.generate(ids, **asked, **more))


@torch.no_grad()
def test_a_wrapper_around_ours_is_in_the_way_of_nothing():
    """Static caches and weights too."""
    one, other = pair("gemma2", Around)
    ids, mask = rows()
    asked = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=None)
    expected = one.generate(ids, **asked, cache_implementation="static")
    assert torch.equal(other.generate(ids, **asked, cache_implementation="static"), expected)
    weights = [m(ids, mask, output_attentions=True).attentions for m in (one, other)]
    for a, b in zip(*weights, strict=True):
        torch.testing.assert_close(a, b)
