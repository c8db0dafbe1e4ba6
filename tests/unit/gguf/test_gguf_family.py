"""GGUF files of Gemma 2 and 3: llama.cpp's names, windows, tables, caps, scale; what it cannot express is refused."""

import re

import pytest
import torch
from gguf_models import CONFIG, tensors_of, vocabulary

import gemmakit
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.errors import CheckpointError, ConfigError
from gemmakit.family import KINDS
from gemmakit.gguf import read_gguf_header

MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
TABLES = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
}
GEMMA4 = dict(
    model_type="gemma4_text", sliding_window_pattern=2, global_head_dim=64, final_logit_softcapping=30.0,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
    },
)  # fmt: skip
GEMMA4_DENSE = dict(GEMMA4, attention_k_eq_v=True, num_global_key_value_heads=1, hidden_size_per_layer_input=0)
# The last two of six layers read the keys of others.
GEMMA4_SMALL = dict(GEMMA4, num_kv_shared_layers=2, use_double_wide_mlp=True, hidden_size_per_layer_input=32,
                    vocab_size_per_layer_input=CONFIG["vocab_size"])  # fmt: skip
MEMBERS = {
    "gemma2": dict(model_type="gemma2", num_hidden_layers=4),
    "gemma2 with caps of its own": dict(
        model_type="gemma2", num_hidden_layers=4, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
        layer_types=MIXED,
    ),
    "gemma3": dict(model_type="gemma3_text", num_hidden_layers=7),
    "gemma3 from 4B": dict(
        model_type="gemma3_text", num_hidden_layers=4, layer_types=MIXED, rope_parameters=TABLES,
        final_logit_softcapping=30.0,
    ),
    "gemma3 without windows": dict(model_type="gemma3_text", num_hidden_layers=2, layer_types=MIXED[:1] * 2),
    "gemma4 dense": dict(GEMMA4_DENSE, num_hidden_layers=4),
    "gemma4 of small size": dict(GEMMA4_SMALL, num_hidden_layers=6),
}  # fmt: skip


def made(seed=0, **changes):
    values = {**CONFIG, "query_pre_attn_scalar": CONFIG["head_dim"], "sliding_window": 8, **changes, "dtype": "float32"}
    model = gemmakit.AutoModelForCausalLM.from_config(gemmakit.GemmaConfig.from_dict(values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
        for layer in model.model.layers:
            if layer.layer_scalar is not None:
                layer.layer_scalar.fill_(0.75)
    return model.eval()


def written(model, path, kind="F32"):
    return write_gguf(path, model.config, tensors_of(model), vocabulary(), kind)


@pytest.mark.parametrize("member", MEMBERS)
def test_what_is_written_is_read_as_the_same_model(tmp_path, member):
    model = made(**MEMBERS[member])
    again = gemmakit.AutoModelForCausalLM.from_pretrained(written(model, tmp_path / "x.gguf"))
    assert type(again) is type(model)
    for i in range(model.config.num_hidden_layers):
        assert again.config.layer(i) == model.config.layer(i), i
        assert again.config.rope(again.config.layer(i).rope) == model.config.rope(model.config.layer(i).rope), i
    assert again.config.final_logit_softcapping == model.config.final_logit_softcapping
    ids = torch.randint(0, CONFIG["vocab_size"], (1, 30), generator=torch.Generator().manual_seed(1))
    lossy = "norm" if model.config.kind.norm_offset else "nothing"  # 1 + w loses bits that w has
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
    for (name, ours), theirs in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert lossy in name or torch.equal(ours, theirs), name


def test_tensors_have_llama_cpps_names_and_norms_are_stored_with_their_one(tmp_path):
    """Source: the tensor list of the published Gemma 3 files."""
    gguf = pytest.importorskip("gguf")
    model = made(**MEMBERS["gemma3"])
    reader = gguf.GGUFReader(written(model, tmp_path / "x.gguf"))
    held = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    layer = model.model.layers[0]
    norms = {
        "attn_norm": layer.input_layernorm, "post_attention_norm": layer.post_attention_layernorm,
        "ffn_norm": layer.pre_feedforward_layernorm, "post_ffw_norm": layer.post_feedforward_layernorm,
        "attn_q_norm": layer.self_attn.q_norm, "attn_k_norm": layer.self_attn.k_norm,
    }  # fmt: skip
    for name, norm in norms.items():
        assert torch.equal(held[f"blk.0.{name}.weight"], norm.weight + 1), name
    matrices = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    assert {n.split(".")[2] for n in held if n.startswith("blk.0.")} == {*norms, *matrices}
    keys = {key: field.contents() for key, field in reader.fields.items()}
    assert keys["gemma3.attention.sliding_window"] == 8
    assert keys["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False, True]
    assert (keys["gemma3.rope.freq_base"], keys["gemma3.rope.freq_base_swa"]) == (1e6, 1e4)


def test_gemma_4_has_the_names_and_keys_of_llama_cpps_converter(tmp_path):
    """Source: conversion/gemma.py and the tensor table of gguf-py."""
    gguf = pytest.importorskip("gguf")
    model = made(**MEMBERS["gemma4 of small size"])
    reader = gguf.GGUFReader(written(model, tmp_path / "x.gguf"))
    held = {tensor.name: torch.tensor(tensor.data.copy()) for tensor in reader.tensors}
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GEMMA4]}
    assert {re.sub(r"^blk\.\d+", "blk.{bid}", name).removesuffix(".weight") for name in held} <= known
    layer = model.model.layers[1]
    for name, tensor in {
        "per_layer_token_embd": model.model.embed_tokens_per_layer.weight,
        "per_layer_model_proj": model.model.per_layer_model_projection.weight,
        "per_layer_proj_norm": model.model.per_layer_projection_norm.weight,
        "blk.1.inp_gate": layer.per_layer_input_gate.weight,
        "blk.1.proj": layer.per_layer_projection.weight,
        "blk.1.post_norm": layer.post_per_layer_input_norm.weight,
        "blk.1.layer_output_scale": layer.layer_scalar,
        "blk.1.attn_k_norm": layer.self_attn.k_norm.weight,
    }.items():
        assert torch.equal(held[f"{name}.weight"], tensor), name
    assert held["rope_freqs.weight"].tolist() == [1.0] * 8 + [torch.tensor(1e30).item()] * 24
    assert "blk.4.attn_k.weight" not in held
    keys = {key.removeprefix("gemma4."): field.contents() for key, field in reader.fields.items()}
    assert keys["feed_forward_length"] == [96] * 4 + [192] * 2
    assert keys["attention.head_count_kv"] == 2
    assert keys["attention.sliding_window_pattern"] == [True, False] * 3
    assert (keys["attention.shared_kv_layers"], keys["embedding_length_per_layer_input"]) == (2, 32)
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        assert (keys[key], keys[f"{key}_swa"]) == (64, 32)
    assert keys["tokenizer.ggml.model"] == "gemma4"


@pytest.mark.parametrize("kind", [gemmakit.GemmaTokenizer, gemmakit.GemmaTokenizerFast])
def test_merges_give_back_the_tokenizer_that_scores_make(tmp_path, kind):
    path = written(made(**MEMBERS["gemma4 dense"]), tmp_path / "x.gguf", "F16")
    ours, again = kind.from_pretrained(gemmakit.demo_model()), kind.from_pretrained(path)
    for text in ("the letter list", "  two\t\tand\n\n\n", "漢字 🙂 \0", "<start_of_turn>user <0x41>"):
        assert again(text)["input_ids"] == ours(text)["input_ids"]
    assert gemmakit.GemmaConfig.from_pretrained(path).eos_token_id == [1, 107]


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("attention.head_count_kv", [2, 1, 1, 1], "layers of one kind have the same number"),
        ("feed_forward_length", [96, 96, 96, 192], "may be twice as wide"),
        ("attention.value_length_swa", 16, "value_length_swa is 16"),
        ("attention.head_count", 2, "attn_q.weight has the shape"),
        ("tokenizer.ggml.merges", ["ab", "a b"], "item 0 of tokenizer.ggml.merges"),
    ],
)
def test_settings_that_contradict_the_tensors_are_refused(tmp_path, monkeypatch, key, change, said):
    from gemmakit.checkpoint.formats import gguf_writing

    model, honest = made(**MEMBERS["gemma4 dense"]), {}
    for part in ("model_keys", "word_keys"):
        honest[part] = getattr(gguf_writing, part)
        full = key if key.startswith("tokenizer") else f"gemma4.{key}"
        more = {full: change}
        monkeypatch.setattr(
            gguf_writing,
            part,
            lambda *a, part=part, more=more: {k: more.get(k, v) for k, v in honest[part](*a).items()},
        )
    path = written(model, tmp_path / "x.gguf", "F16")
    reader = gemmakit.GemmaTokenizer if key.startswith("tokenizer") else gemmakit.GemmaConfig
    with pytest.raises(CheckpointError, match=re.escape(said)):
        reader.from_pretrained(path)


def test_keys_of_layers_that_read_those_of_others_are_passed_over(tmp_path):
    """Google's releases hold some, and llama.cpp's converter carries them along."""
    gguf = pytest.importorskip("gguf")
    model = made(**MEMBERS["gemma4 of small size"])
    path = written(model, tmp_path / "x.gguf")
    reader, more = gguf.GGUFReader(path), tmp_path / "more.gguf"
    writer = gguf.GGUFWriter(more, "gemma4")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data)
        if tensor.name.startswith(("blk.2.attn_k", "blk.2.attn_v")):
            writer.add_tensor(tensor.name.replace("blk.2", "blk.4"), tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    again = gemmakit.AutoModelForCausalLM.from_pretrained(more)
    ids = torch.tensor([[2, 5, 9, 700]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, gemmakit.AutoModelForCausalLM.from_pretrained(path)(ids).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("member", ["gemma2", "gemma3", "gemma4 of small size"])
def test_blocks_are_kept_as_they_are_and_norms_of_heads_are_no_projections(tmp_path, member, kind):
    again = gemmakit.AutoModelForCausalLM.from_pretrained(written(made(**MEMBERS[member]), tmp_path / "x.gguf", kind))
    assert again.quantization_config.bits == int(kind[1])
    assert again.quantization_config.modules_to_not_convert is None
    with torch.no_grad():
        assert again(torch.tensor([[2, 5, 9]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(model_type="vaultgemma"), "model_type='vaultgemma'"),
        (dict(GEMMA4_SMALL, num_hidden_layers=6, vocab_size_per_layer_input=99), "vocab_size_per_layer_input=99"),
        (dict(model_type="gemma2", query_pre_attn_scalar=77), "scores scaled by 0.1139"),
        (dict(model_type="gemma2", attn_logit_softcapping=None), "attn_logit_softcapping=None"),
        (dict(model_type="gemma2", layer_types=["full_attention"] * 2), "no layer with a window"),
        (dict(model_type="gemma3_text", use_bidirectional_attention=True), "use_bidirectional_attention=True"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_not_written(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        written(made(**changes), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("member", "layers", "scalar"), [("gemma2", 46, 144), ("gemma3_text", 62, 168)])
def test_the_largest_models_scale_scores_by_the_width_all_heads_share(tmp_path, member, layers, scalar):
    """27B: llama.cpp knows it by its layers, as no file says it."""
    model = made(model_type=member, num_hidden_layers=layers, hidden_size=scalar * 2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=16, intermediate_size=32, query_pre_attn_scalar=scalar)  # fmt: skip
    config = gemmakit.GemmaConfig.from_pretrained(written(model, tmp_path / "x.gguf"))
    assert config.query_pre_attn_scalar == scalar


def header_of(path, **metadata):
    """A file with one tensor and these keys."""
    gguf = pytest.importorskip("gguf")
    import numpy as np

    writer = gguf.GGUFWriter(path, metadata.pop("architecture"))
    for key, value in metadata.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_gguf_header(path)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (dict(architecture="gemma3", split__no=0, split__count=2), "part 1 of 2.*gguf-split"),
        (dict(architecture="gemma3n"), r"'gemma3n': gemmakit runs .*Gemma 3 \('gemma3'\)"),
        (dict(architecture="gemma4", gemma4__expert_count=8), "mixture of 8 experts"),
        (dict(architecture="clip"), "'clip': gemmakit runs"),
        (dict(architecture="gemma3", gemma3__expert_count=8), "mixture of 8 experts"),
    ],
)
def test_what_is_not_run_is_refused_by_name(tmp_path, keys, said):
    header = header_of(tmp_path / "x.gguf", **keys)
    with pytest.raises(CheckpointError, match=said):
        header.require_gemma()
    with pytest.raises(CheckpointError, match=said):
        gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "x.gguf")


def test_every_member_that_llama_cpp_knows_has_an_architecture_of_its_own():
    names = [kind.gguf_architecture for kind in KINDS.values() if kind.gguf_architecture]
    assert len(names) == len(set(names))
    assert {"gemma", "gemma2", "gemma3", "gemma4"} <= set(names)


@pytest.mark.parametrize("head", ["Q8_0", "F16"])
def test_a_few_matrices_of_8_bits_among_others_become_numbers_and_the_embedding_alone_stays(
    tmp_path, head, monkeypatch
):
    """As in files of K-quants: layers of one format run fused, and the embedding is most of a small model's bytes."""
    from gemmakit.checkpoint.formats import gguf_writing

    def chosen(theirs, shape, kind):
        if "norm" in theirs:
            return "F32"
        return head if theirs == "token_embd.weight" else "Q8_0" if theirs == "blk.0.attn_v.weight" else "F16"

    monkeypatch.setattr(gguf_writing, "_kind_for", chosen)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(
        written(made(**MEMBERS["gemma3"]), tmp_path / "x.gguf", "Q8_0")
    )
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear"}
    assert (type(model.model.embed_tokens).__name__ == "QuantizedEmbedding") == (head == "Q8_0")
