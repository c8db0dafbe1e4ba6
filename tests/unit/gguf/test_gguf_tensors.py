"""Tensors to GGUF and back: bit for bit where the format allows, and views of the file where they can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_maker import place, small
from gguf_models import CONFIG, tensors_of, vocabulary

import gemmakit
from gemmakit import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM, GemmaModel
from gemmakit.checkpoint import Checkpoint, LazyTensor, open_checkpoint, save_checkpoint
from gemmakit.checkpoint.formats.gguf import GgufFile, gguf_name, released_name
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.errors import CheckpointError, ConfigError, GemmakitError, InputError, NotEnoughMemory
from gemmakit.gguf import read_gguf_header
from gemmakit.pytorch.quantize import QuantizedEmbedding, QuantizedLinear

IDS = torch.tensor([[2, 500, 501, 900, 1200, 77]])


def test_names_go_both_ways(model):
    for name in model.state_dict():
        theirs = gguf_name(name)
        assert theirs is not None
        assert released_name(theirs) == name
        assert gguf_name(name.removeprefix("model.")) == theirs  # of a model without a head
    assert released_name("blk.0.attn_q.bias") == "model.layers.0.self_attn.q_proj.bias"
    for foreign in ("blk.0.attn_q_norm.weight", "rope_freqs.weight", "blk.x.attn_q.weight", "v.patch_embd.weight", ""):
        assert released_name(foreign) is None


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
def test_plain_kinds_come_back_bit_for_bit(model, files, kind):
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[kind]
    with open_checkpoint(files[kind]) as checkpoint:
        found = dict(checkpoint.items())
    for name in tensors_of(model):
        expected = torch.float32 if name.endswith("norm.weight") else dtype
        assert found.pop(name).dtype == expected
    assert found == {}
    again = AutoModelForCausalLM.from_pretrained(files[kind])
    assert again.dtype == dtype == again.model.norm.weight.dtype  # one dtype a model
    for name, tensor in tensors_of(again).items():
        torch.testing.assert_close(tensor.float(), model.state_dict()[name].float(), rtol=0, atol=0, msg=name)


def test_saved_as_safetensors_and_as_gguf_again_the_file_is_the_same(files, tmp_path):
    for kind in ("BF16", "Q8_0", "Q5_0", "Q4_0"):
        loaded = AutoModelForCausalLM.from_pretrained(files[kind])
        loaded.save_pretrained(tmp_path / kind)
        with open_checkpoint(tmp_path / kind) as checkpoint:
            config = GemmaConfig.from_pretrained(tmp_path / kind)
            again = write_gguf(tmp_path / f"{kind}.gguf", config, dict(checkpoint.items()), vocabulary(), kind)
        assert again.read_bytes() == files[kind].read_bytes(), kind


def test_plain_matrices_are_views_of_the_file(files):
    """Writing to one changes neither the file nor what the next reader gets; it takes no memory before."""
    for kind in ("F32", "F16", "BF16"):
        with open_checkpoint(files[kind]) as checkpoint:
            name = "model.layers.0.self_attn.q_proj.weight"
            view, again = checkpoint.tensor(name), checkpoint.tensor(name)
            first = view.clone()
            assert checkpoint.info(name).mapped
            before = files[kind].read_bytes()
            view.zero_()
            assert torch.equal(again, first)
            assert files[kind].read_bytes() == before
            array = checkpoint.tensor(name, "np")
            base = array
            while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
                base = base.base
            assert isinstance(base, np.memmap)
    model = AutoModelForCausalLM.from_pretrained(files["BF16"])
    weight = model.model.layers[0].self_attn.q_proj.weight
    with (
        open("/proc/self/maps") if torch.os.path.exists("/proc/self/maps") else pytest.skip("/proc shows maps") as maps
    ):
        ranges = [line.split("-", 1)[0] for line in maps if str(files["BF16"]) in line]
    assert any(int(begin, 16) <= weight.data_ptr() < int(begin, 16) + weight.nbytes + 65536 for begin in ranges)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_quantized_matrices_are_gguf_py_s_numbers(files, kind):
    quants = pytest.importorskip("gguf.quants", reason="pip install gguf would run it")
    from gguf import GGUFReader

    theirs = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(files[kind]).tensors}
    with open_checkpoint(files[kind]) as checkpoint:
        assert {gguf_name(name) for name in checkpoint} == theirs.keys()
        for name, tensor in checkpoint.items():
            expected = theirs[gguf_name(name)] - ("norm" in name)
            np.testing.assert_array_equal(tensor.numpy(), expected, err_msg=name)
            np.testing.assert_array_equal(checkpoint.tensor(name, "np"), expected)
    exact = GemmaForCausalLM.from_pretrained(files[kind], dtype=torch.float32)
    assert not exact.is_quantized
    weight = exact.model.layers[1].mlp.down_proj.weight.detach().numpy()
    np.testing.assert_array_equal(weight, theirs["blk.1.ffn_down.weight"])


@pytest.mark.parametrize(("kind", "bits"), [("Q8_0", 8), ("Q5_0", 5), ("Q4_0", 4)])
def test_kept_blocks_are_exactly_the_file_s(files, kind, bits):
    kept = AutoModelForCausalLM.from_pretrained(files[kind])
    exact = AutoModelForCausalLM.from_pretrained(files[kind], dtype="float32")
    assert kept.is_quantized
    assert kept.dtype == torch.bfloat16
    linear, embedding = kept.model.layers[0].mlp.up_proj, kept.model.embed_tokens
    assert isinstance(linear, QuantizedLinear)
    assert (linear.packed.bits, linear.packed.group_size) == (bits, 32)
    assert torch.equal(linear.dequantized(), exact.model.layers[0].mlp.up_proj.weight)
    assert isinstance(embedding, QuantizedEmbedding)
    assert embedding.packed.bits == (5 if bits == 5 else 8)
    assert torch.equal(embedding.dequantized(), exact.model.embed_tokens.weight)
    assert kept.lm_head.weight.data_ptr() == embedding.weight.data_ptr()
    # bfloat16 activations, 8 bits of mantissa, through two layers.
    difference = (kept(IDS).logits.float() - exact(IDS).logits).abs().max() / exact(IDS).logits.abs().max()
    assert difference < 0.04


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_a_kept_model_is_saved_and_opened_like_any_other(files, tmp_path, kind):
    kept = AutoModelForCausalLM.from_pretrained(files[kind])
    kept.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.quantization_config == kept.quantization_config
    assert torch.equal(again(IDS).logits, kept(IDS).logits)
    again.train()
    assert not any(p.requires_grad for n, p in again.named_parameters() if n.endswith("proj.weight"))


def test_gguf_file_names_a_file_of_a_folder(files, model):
    folder, name = files["BF16"].parent, files["BF16"].name
    expected = model(IDS).logits
    for loader in (AutoModelForCausalLM, GemmaForCausalLM):
        assert torch.equal(loader.from_pretrained(folder, gguf_file=name)(IDS).logits, expected)
        assert torch.equal(loader.from_pretrained(str(folder / name))(IDS).logits, expected)
    loaded = GemmaForCausalLM.from_pretrained(folder, gguf_file=name)
    assert loaded.name_or_path == str(folder / name)
    body = GemmaModel.from_pretrained(folder / name)
    assert torch.equal(body(IDS).last_hidden_state, loaded.model(IDS).last_hidden_state)
    for reader in (AutoConfig, GemmaConfig):
        assert reader.from_pretrained(folder, gguf_file=name).hidden_size == 64
        assert reader.from_pretrained(folder / name, max_position_embeddings=32).max_position_embeddings == 32
    with pytest.raises(CheckpointError, match=r"absent\.gguf"):
        GemmaForCausalLM.from_pretrained(folder, gguf_file="absent.gguf")
    with pytest.raises(CheckpointError, match=r"\.\."):
        GemmaForCausalLM.from_pretrained(folder, gguf_file="../x.gguf")
    with pytest.raises(CheckpointError, match="give one of them"):
        GemmaForCausalLM.from_pretrained(folder / name, gguf_file=name)


def test_the_configuration_comes_back(files, model):
    found = GemmaConfig.from_pretrained(files["BF16"])
    for name in (*CONFIG, "rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "bos_token_id"):
        assert getattr(found, name) == getattr(model.config, name), name
    assert found.eos_token_id == [1, 107]  # and the end of a turn, where llama.cpp stops too
    assert GemmaConfig.from_pretrained(files["Q4_0"]).dtype == "bfloat16"


def test_a_gguf_is_quantized_anew_from_its_numbers(files):
    made = GemmaForCausalLM.from_pretrained(files["F32"], quantization_config="int8")
    assert made.quantization_config.bits == 8
    other = GemmaForCausalLM.from_pretrained(files["Q4_0"], quantization_config="int8")
    assert other.model.layers[0].mlp.up_proj.packed.scale.dtype == torch.float32


def test_dequantizing_says_beforehand_what_memory_it_takes(files, monkeypatch):
    from gemmakit.checkpoint import memory

    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 2000)
    with pytest.raises(NotEnoughMemory):
        GemmaForCausalLM.from_pretrained(files["Q4_0"])
    GemmaForCausalLM.from_pretrained(files["F32"])  # norms alone take memory


# -- what cannot be read ---------------------------------------------------------------------------------------------


def test_foreign_tensors_and_types_are_named(tmp_path):
    path = tmp_path / "x.gguf"
    for bad, expected in (
        (place("rope_freqs.weight", [8], 0, 2**12), "rope_freqs.weight"),
        (place("blk.0.attn_q.bias", [4], 24, 2**12), "type I8"),
        (place("blk.7.attn_q.weight", [256, 1], 10, 2**12), "type Q2_K; gemmakit reads F32, F16"),
    ):
        made = small()
        made.places.append(bad)
        made.data = made.data.ljust(2**13, b"\0")
        path.write_bytes(made.bytes())
        with pytest.raises(CheckpointError, match=expected):
            open_checkpoint(path)


def test_a_head_of_its_own_is_read(tmp_path):
    made = small()
    made.places.append(place("output.weight", [4, 6], 0, len(made.data)))
    made.data += np.arange(24, dtype=np.float32).tobytes() + bytes(32)
    path = tmp_path / "x.gguf"
    path.write_bytes(made.bytes())
    loaded = GemmaForCausalLM.from_pretrained(path)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, torch.arange(24.0).view(6, 4))
    assert not torch.equal(loaded.model.embed_tokens.weight, loaded.lm_head.weight)


def test_layers_that_the_settings_do_not_have_are_named(tmp_path):
    made = small()
    made.places.append(place("blk.1.ffn_norm.weight", [4], 0, 2**12))
    made.data = made.data.ljust(2**13, b"\0")
    path = tmp_path / "x.gguf"
    path.write_bytes(made.bytes())
    with pytest.raises(CheckpointError, match=r"layers\.1\.post_attention"):
        GemmaForCausalLM.from_pretrained(path)


# -- writing -----------------------------------------------------------------------------------------------------------


def test_kinds_of_the_tensors(files):
    kinds = {k: {n: t.kind.name for n, t in read_gguf_header(p).tensors.items()} for k, p in files.items()}
    for kind, found in kinds.items():
        assert {found[name] for name in found if "norm" in name} == {"F32"}
        assert {found[name] for name in found if "norm" not in name and name != "token_embd.weight"} == {kind}
        assert found["token_embd.weight"] == ("Q8_0" if kind == "Q4_0" else kind)


def test_rows_that_are_no_multiple_of_32_are_written_as_f16(tmp_path):
    config = GemmaConfig(**{**CONFIG, "hidden_size": 40, "vocab_size": 2048})
    made = GemmaForCausalLM(config)
    path = write_gguf(tmp_path / "x.gguf", config, tensors_of(made), vocabulary(), "Q4_0")
    kinds = {name: tensor.kind.name for name, tensor in read_gguf_header(path).tensors.items()}
    assert (kinds["blk.0.ffn_up.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q4_0")
    loaded = GemmaForCausalLM.from_pretrained(path)
    assert isinstance(loaded.model.layers[0].mlp.down_proj, QuantizedLinear)
    assert type(loaded.model.layers[0].mlp.up_proj) is not QuantizedLinear
    assert loaded.quantization_config.head_bits is None
    assert "model.layers.0.mlp.up_proj" in loaded.quantization_config.modules_to_not_convert
    loaded.save_pretrained(tmp_path / "saved")
    again = GemmaForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(IDS).logits, loaded(IDS).logits)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_kept_codes_are_copied_and_others_computed(files, tmp_path, kind):
    kept = GemmaForCausalLM.from_pretrained(files[kind])
    same = write_gguf(tmp_path / "same.gguf", kept.config, tensors_of(kept), vocabulary(), kind)
    first, again = read_gguf_header(files[kind]), read_gguf_header(same)
    raw = {k: p.read_bytes() for k, p in (("first", files[kind]), ("again", same))}
    for name, tensor in first.tensors.items():
        other = again.tensors[name]
        assert raw["first"][tensor.begin : tensor.end] == raw["again"][other.begin : other.end], name
    exact = GemmaForCausalLM.from_pretrained(files[kind], dtype=torch.float32)
    plain = write_gguf(tmp_path / "plain.gguf", kept.config, tensors_of(kept), vocabulary(), "F32")
    found = GemmaForCausalLM.from_pretrained(plain)
    weight = found.model.layers[1].self_attn.o_proj.weight
    assert torch.equal(weight, exact.model.layers[1].self_attn.o_proj.weight)


@pytest.mark.parametrize("asked", ["int8", "int6", "int5", "int4", "int4-g128"])
def test_gemmakit_s_own_quantized_weights_are_written_too(model, tmp_path, asked):
    model.save_pretrained(tmp_path / "model")
    ours = GemmaForCausalLM.from_pretrained(tmp_path / "model", quantization_config=asked)
    path = write_gguf(tmp_path / "x.gguf", ours.config, tensors_of(ours), vocabulary(), "F32")
    found = GemmaForCausalLM.from_pretrained(path)
    for layer, other in zip(ours.model.layers, found.model.layers, strict=True):
        assert torch.equal(layer.mlp.gate_proj.dequantized(), other.mlp.gate_proj.weight)
    assert torch.equal(ours.model.embed_tokens.dequantized(), found.model.embed_tokens.weight)


def test_any_kind_of_array_gives_the_same_file(model, files, tmp_path):
    held = tensors_of(model)
    numpy = {name: tensor.float().numpy() for name, tensor in held.items()}
    lazy = [(n, LazyTensor("bfloat16", tuple(t.shape), lambda t=t: t)) for n, t in reversed(held.items())]
    makers = {name: (lambda t=t: t) for name, t in held.items()}
    for given in (numpy, lazy, makers):
        path = write_gguf(tmp_path / "BF16.gguf", model.config, given, vocabulary(), "BF16")
        assert path.read_bytes() == files["BF16"].read_bytes()


def test_bfloat16_is_rounded_to_the_nearest_even(tmp_path):
    torch.manual_seed(1)
    config = GemmaConfig(**{**CONFIG, "vocab_size": 2048})
    made = GemmaForCausalLM(config)
    with torch.no_grad():
        made.model.embed_tokens.weight[0, :4] = torch.tensor([float("nan"), float("inf"), 1 + 2**-8, -1 - 3 * 2**-8])
    path = write_gguf(tmp_path / "x.gguf", config, tensors_of(made), vocabulary(), "BF16")
    with open_checkpoint(path) as checkpoint:
        found = checkpoint.tensor("model.embed_tokens.weight")
    assert torch.equal(found.nan_to_num(7), made.model.embed_tokens.weight.to(torch.bfloat16).nan_to_num(7))


@pytest.mark.parametrize(
    ("change", "error", "expected"),
    [
        (dict(tie_word_embeddings=False), ConfigError, "tie_word_embeddings=False"),
        (dict(attention_bias=True), ConfigError, "attention_bias"),
        (dict(hidden_act="relu"), ConfigError, "'relu'"),
        (dict(rope_scaling={"type": "dynamic", "factor": 2.0}), ConfigError, "'dynamic'"),
        (dict(use_bidirectional_attention=True), ConfigError, "bidirectional"),
        (dict(vocab_size=2000), InputError, "2048 tokens and the model 2000 rows"),
        (dict(num_hidden_layers=3), InputError, "missing, first 'blk.2.attn_norm.weight'"),
        (dict(num_hidden_layers=1), InputError, r"no 'model.layers.1"),
        (dict(intermediate_size=64), InputError, r"shape \(96, 64\)"),
    ],
)
def test_what_llama_cpp_could_not_run_is_refused_and_nothing_written(model, tmp_path, change, error, expected):
    with pytest.raises(error, match=expected):
        write_gguf(tmp_path / "x.gguf", GemmaConfig(**{**CONFIG, **change}), tensors_of(model), vocabulary())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "number"), [("F16", 1e5), ("Q8_0", 1e8), ("Q5_0", 1e7), ("Q4_0", 1e7), ("Q4_0", float("nan"))]
)
def test_numbers_that_a_kind_cannot_hold_are_named(model, tmp_path, kind, number):
    held = {name: tensor.clone() for name, tensor in tensors_of(model).items()}
    held["model.layers.1.mlp.up_proj.weight"][3, 3] = number
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj.*limit"):
        write_gguf(tmp_path / "x.gguf", model.config, held, vocabulary(), kind)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="kind is 'Q2_K'"):
        write_gguf(tmp_path / "x.gguf", model.config, held, vocabulary(), "Q2_K")


def test_linear_scaling_is_written(tmp_path):
    config = GemmaConfig(**CONFIG, rope_theta=5e5, rope_scaling={"type": "linear", "factor": 4.0})
    made = GemmaForCausalLM(config)
    path = write_gguf(tmp_path / "x.gguf", config, tensors_of(made), vocabulary(), "F32")
    assert GemmaConfig.from_pretrained(path).rope_parameters == config.rope_parameters
    assert torch.equal(GemmaForCausalLM.from_pretrained(path)(IDS).logits, made.eval()(IDS).logits)


def test_the_whole_file_is_the_demo_model(tmp_path):
    """Through the command line's loader too: text in, text out, from one file."""
    source = gemmakit.demo_model()
    with open_checkpoint(source) as checkpoint:
        path = write_gguf(
            tmp_path / "demo.gguf", GemmaConfig.from_pretrained(source), dict(checkpoint.items()), vocabulary(), "BF16"
        )
    pipes = [gemmakit.pipeline("text-generation", model, device="cpu") for model in (str(source), str(path))]
    chat = [{"role": "user", "content": "What is 3 + 4?"}]
    said = [pipe(chat, max_new_tokens=12)[0]["generated_text"] for pipe in pipes]
    assert said[0] == said[1]
    assert "7" in str(said[1])


def test_gguf_py_reads_what_we_write(files, model):
    pytest.importorskip("gguf.quants", reason="pip install gguf would run it")
    from gguf import GGUFReader

    reader = GGUFReader(files["F32"])
    assert reader.get_field("general.architecture").contents() == "gemma"
    assert reader.get_field("gemma.attention.head_count_kv").contents() == 2
    assert len(reader.get_field("tokenizer.ggml.tokens").contents()) == model.config.vocab_size
    (norm,) = [t for t in reader.tensors if t.name == "output_norm.weight"]
    np.testing.assert_array_equal(norm.data, 1 + model.model.norm.weight.float().detach().numpy())


def test_opening_twice_and_keeping_nothing(files):
    with Checkpoint([GgufFile(files["Q4_0"], "float16")]) as checkpoint:
        assert checkpoint.tensor("model.embed_tokens.weight").dtype == torch.float16
        assert checkpoint.info("model.embed_tokens.weight").dtype == "float16"
        assert not checkpoint.info("model.embed_tokens.weight").mapped
    with pytest.raises(GemmakitError):
        checkpoint.tensor("lm_head.weight")


def test_a_gguf_s_tensors_are_saved_as_safetensors(files, tmp_path):
    with open_checkpoint(files["Q4_0"]) as checkpoint:
        save_checkpoint({n: (lambda n=n: checkpoint.tensor(n)) for n in checkpoint}, tmp_path)
        with open_checkpoint(tmp_path) as again:
            assert all(torch.equal(again.tensor(name), checkpoint.tensor(name)) for name in checkpoint)
