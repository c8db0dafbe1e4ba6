"""Checkpoints as other programs write them: the conversions, written the other way round."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import gemmakit

sys.path.insert(0, str(Path(__file__).parents[1] / "pytorch"))

from tiny_gemma import away_from_zero, tiny

# Of google-deepmind/gemma, in the order of `family.Norms`.
NORMS = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
# K = 1, 1 < K < N, K = N; N * H != D throughout.
HEADS = {"mqa": 1, "gqa": 2, "mha": 4}
DTYPES = ("float32", "bfloat16", "float16")


def make(kind=gemmakit.GemmaForCausalLM, heads="gqa", dtype="float32", **changes):
    return tiny(kind=kind, num_key_value_heads=HEADS[heads], **changes).to(getattr(torch, dtype))


def make_member(model_type):
    """A tiny Gemma 2 or 3."""
    config = gemmakit.AutoConfig.for_model(
        model_type, vocab_size=130, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=64, sliding_window=4,
    )  # fmt: skip
    return away_from_zero(gemmakit.AutoModelForCausalLM.from_config(config)).eval()


def google_state(model):
    """The names and matrices of Google's PyTorch release."""
    out, state = {}, {n: t.clone() for n, t in model.state_dict().items() if n != "lm_head.weight"}
    for name, tensor in state.items():
        if name.endswith("q_proj.weight"):
            k, v = (state[name.replace("q_proj", f"{p}_proj")] for p in "kv")
            out[name.replace("q_proj", "qkv_proj")] = torch.cat([tensor, k, v])
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            theirs = name.replace(".q_norm.", ".query_norm.").replace(".k_norm.", ".key_norm.")
            out["embedder.weight" if name == "model.embed_tokens.weight" else theirs] = tensor
    return {**out, "freqs_cis": torch.polar(torch.ones(4, 3), torch.ones(4, 3))}


def write_google(model, folder, **changes):
    """model.ckpt and the config.json that a size of no release needs; `changes` replace tensors, None removes one."""
    state = {**google_state(model), **changes}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"model_state_dict": {n: t for n, t in state.items() if t is not None}}, folder / "model.ckpt")
    model.config.save_pretrained(folder)
    return folder / "model.ckpt"


def write_orbax(model, folder, **more):
    """The folder that google-deepmind/gemma writes for a model with fewer kv heads than heads; needs orbax."""
    ocp = pytest.importorskip("orbax.checkpoint")
    c, w = model.config, {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tree = {
        "embedder": {"input_embedding": w["model.embed_tokens.weight"]},
        "final_norm": {"scale": w["model.norm.weight"]},
    }
    for i in range(c.num_hidden_layers):
        layer = {n.split(f"layers.{i}.")[1].removesuffix(".weight"): a for n, a in w.items() if f"layers.{i}." in n}

        def heads(name, count, layer=layer):
            return layer[f"self_attn.{name}_proj"].reshape(count, c.head_dim, -1).transpose(0, 2, 1)

        out = layer["self_attn.o_proj"].T.reshape(c.num_attention_heads, c.head_dim, -1)
        kv = np.stack([heads(name, c.num_key_value_heads) for name in "kv"])
        tree[f"layer_{i}"] = {
            "attn": {"q_einsum": {"w": heads("q", c.num_attention_heads)}, "kv_einsum": {"w": kv},
                     "attn_vec_einsum": {"w": out}},
            "mlp": {"gating_einsum": np.stack([layer[f"mlp.{p}_proj"].T for p in ("gate", "up")]),
                    "linear": layer["mlp.down_proj"].T.copy()},
            **{name: {"scale": layer[ours]} for name, ours in zip(NORMS, c.kind.norms, strict=True) if ours},
        }  # fmt: skip
        for part, name in (("q", "_query_norm"), ("k", "_key_norm")):
            if f"self_attn.{part}_norm" in layer:
                tree[f"layer_{i}"]["attn"][name] = {"scale": layer[f"self_attn.{part}_norm"]}
    tree.update(more)
    ocp.PyTreeCheckpointer().save(folder.absolute(), tree)
    return folder


def state_of(folder, kind=gemmakit.GemmaForCausalLM):
    return kind.from_pretrained(folder).state_dict()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def listing(folder):
    """Every file under a folder with its bytes, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
