"""A tiny Gemma with weights at a scale where mistakes show."""

import torch

import gemmakit

VOCAB = 130
BOS = 2


def tiny_config(**changes):
    """1 < K < N and N * H != D unless changed."""
    fields = dict(vocab_size=VOCAB, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, head_dim=12, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    return gemmakit.GemmaConfig(**{**fields, **changes})


def tiny(seed=0, kind=gemmakit.GemmaForCausalLM, **changes):
    """A model in evaluation mode; norms and biases are away from zero."""
    return away_from_zero(kind(tiny_config(**changes)), seed).eval()


def away_from_zero(model, seed=0):
    """The model with weights at that scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            away = "norm" in name or name.endswith("bias")
            parameter.normal_(0.1 if away else 0.0, 0.3 if away else 0.2, generator=generator)
    return model


def prompts(rows=2, width=9, seed=1):
    ids = torch.randint(4, VOCAB, (rows, width), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = BOS
    return ids


def left_padded(rows, width):
    """Rows of different lengths -> ids (B, width) with the pad token in front, and their mask."""
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = row
        mask[i, width - len(row) :] = 1
    return ids, mask


def far(ours, reference):
    """The largest difference as a share of the reference's largest value."""
    ours, reference = ours.detach(), reference.detach()
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max())


def reference_logits(model, ids, visible, positions=None):
    """Gemma as the paper writes it, in float64, head by head. visible: bool (B, S, S), query by key.

    A query that may look nowhere attends to nothing and gets zeros.
    """
    c, w = model.config, {n: p.detach().double() for n, p in model.named_parameters()}
    B, S = ids.shape
    N, K, H = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    positions = torch.arange(S).expand(B, S) if positions is None else positions
    angles = positions[..., None].double() * c.rope_theta ** (-torch.arange(0, H, 2).double() / H)
    cos, sin = angles.cos(), angles.sin()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * (1 + w[name])

    def turned(x):
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    def linear(x, name):
        bias = w.get(name + ".bias")
        return x @ w[name + ".weight"].T + (0 if bias is None else bias)

    x = w["model.embed_tokens.weight"][ids] * c.hidden_size**0.5
    for i in range(c.num_hidden_layers):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(h, f"{at}self_attn.{p}_proj").split(H, dim=-1) for p in "qkv")
        heads = []
        for n in range(N):
            key, value = turned(k[n // (N // K)]), v[n // (N // K)]
            scores = (turned(q[n]) @ key.mT / H**0.5).masked_fill(~visible, -torch.inf)
            heads.append(scores.softmax(-1).nan_to_num(0.0) @ value)
        x = x + linear(torch.cat(heads, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj")
        gelu = 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
        x = x + linear(gelu * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    head = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, "model.norm.weight") @ head.T
