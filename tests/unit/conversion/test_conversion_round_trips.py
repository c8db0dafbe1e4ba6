"""What goes in comes out, bit for bit, whatever lies between."""

import json

import numpy as np
import pytest
import torch
from conversion_tools import DTYPES, HEADS, assert_same_bits, make, make_member, state_of, write_google, write_orbax

import gemmakit
from gemmakit import convert_checkpoint
from gemmakit.checkpoint.inspect import inspect
from gemmakit.errors import CheckpointError

HEADED = (gemmakit.GemmaForSequenceClassification, gemmakit.GemmaForTokenClassification, gemmakit.GemmaModel)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_googles_ckpt_becomes_the_model_it_was_made_from(tmp_path, heads, dtype):
    model = make(heads=heads, dtype=dtype)
    written = convert_checkpoint(write_google(model, tmp_path / "google"), tmp_path / "out")
    assert [path.name for path in written] == ["model.safetensors"]
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
    assert gemmakit.GemmaConfig.from_pretrained(tmp_path / "out").dtype == dtype


LATER = ("gemma2", "gemma3_text")
# Beside Gemma 3's text, what it sees images with.
TOWER = {"siglip_vision_model.norm.weight": torch.ones(3), "mm_input_projection.weight": torch.ones(3, 2)}


@pytest.mark.parametrize("member", LATER)
def test_googles_ckpt_of_later_members_becomes_the_model_it_was_made_from(tmp_path, member):
    model = make_member(member)
    tables = {"local_freqs_cis": torch.ones(4, 3), "global_freqs_cis": torch.ones(4, 3)}
    convert_checkpoint(write_google(model, tmp_path / "google", **tables), tmp_path / "out")
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
    ids = torch.arange(9)[None]
    opened = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(opened) is type(model)
    assert torch.equal(opened(ids).logits, model(ids).logits)


def test_googles_ckpt_of_text_and_images_gives_its_text_and_says_so(tmp_path):
    model = make_member("gemma3_text")
    named = {"embedder.weight": None, "text_token_embedder.weight": model.model.embed_tokens.weight.detach()}
    path = write_google(model, tmp_path / "google", **named, **TOWER)
    convert_checkpoint(path, tmp_path / "out")
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
    assert f"{len(TOWER)} tensors that only images need are left out" in inspect(path).notes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shard", ["5GB", "6KB"])
def test_safetensors_to_msgpack_and_back_are_the_same_bits(tmp_path, heads, dtype, shard):
    model = make(heads=heads, dtype=dtype, attention_bias=True, tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "a", max_shard_size=shard)
    written = convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack", max_shard_size=shard)
    assert (len(written) > 2) == (shard == "6KB")
    convert_checkpoint(tmp_path / "b", tmp_path / "c", max_shard_size=shard)
    assert_same_bits(state_of(tmp_path / "c"), model.state_dict())
    again = gemmakit.GemmaConfig.from_pretrained(tmp_path / "c")
    assert again == gemmakit.GemmaConfig.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize("shard", ["5GB", "6KB"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorch_opens_msgpack_as_the_safetensors_it_was_made_from(tmp_path, dtype, shard):
    model = make(dtype=dtype)
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack", max_shard_size=shard)
    opened = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "b")
    assert_same_bits(opened.state_dict(), model.state_dict())
    assert all(parameter.is_contiguous() for parameter in opened.parameters())
    ids = torch.arange(5)[None]
    assert torch.equal(opened(ids).logits, gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "a")(ids).logits)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_msgpack_is_quantized_while_it_is_read_as_safetensors_is(tmp_path, scheme):
    make().save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack")
    load = gemmakit.GemmaForCausalLM.from_pretrained
    states = [load(tmp_path / name, quantization_config=scheme).state_dict() for name in ("a", "b")]
    gemmakit.quantize_checkpoint(tmp_path / "b", tmp_path / "c", scheme)
    states.append(load(tmp_path / "c").state_dict())
    assert_same_bits(states[1], states[0])
    assert_same_bits(states[2], states[0])


def test_pytorch_opens_an_orbax_folder_and_takes_its_configuration_from_the_shapes(tmp_path):
    model = make()
    folder = write_orbax(model, tmp_path / "orbax")
    opened = gemmakit.GemmaForCausalLM.from_pretrained(folder, config=model.config)
    assert_same_bits(opened.state_dict(), model.state_dict())
    found = gemmakit.GemmaForCausalLM.from_pretrained(folder).config
    assert (found.hidden_size, found.num_hidden_layers) == (model.config.hidden_size, model.config.num_hidden_layers)


@pytest.mark.parametrize("kind", HEADED)
def test_every_class_goes_through_msgpack(tmp_path, kind):
    model = make(kind, num_labels=3)
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack")
    convert_checkpoint(tmp_path / "b", tmp_path / "c")
    assert_same_bits(state_of(tmp_path / "c", kind), model.state_dict())
    assert gemmakit.GemmaConfig.from_pretrained(tmp_path / "c").architectures == [kind.__name__]


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt"])
def test_a_pickle_that_is_named_is_read_with_its_names_or_googles(tmp_path, name):
    model = make()
    state = {n: t for n, t in model.state_dict().items() if n != "lm_head.weight"}
    torch.save(state, tmp_path / name)
    model.config.save_pretrained(tmp_path)
    convert_checkpoint(tmp_path / name, tmp_path / "out")
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_rounds_every_number_once(tmp_path, dtype, to):
    model = make()
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to=to, dtype=dtype, max_shard_size="9KB")
    if to == "msgpack":
        convert_checkpoint(tmp_path / "b", tmp_path / "c")
    rounded = {name: tensor.to(getattr(torch, dtype)) for name, tensor in model.state_dict().items()}
    assert_same_bits(state_of(tmp_path / ("c" if to == "msgpack" else "b")), rounded)


def test_a_stored_copy_of_the_tied_head_is_not_written_again(tmp_path):
    from safetensors.torch import load_file, save_file

    model = make()
    model.save_pretrained(tmp_path / "a")
    held = load_file(tmp_path / "a" / "model.safetensors")
    head = held["model.embed_tokens.weight"].clone()
    save_file({**held, "lm_head.weight": head}, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    assert "lm_head.weight" not in load_file(tmp_path / "b" / "model.safetensors")
    save_file({**held, "lm_head.weight": head + 1}, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs"):
        convert_checkpoint(tmp_path / "a", tmp_path / "c")


def test_unknown_keys_and_auto_map_of_a_config_are_kept_as_data(tmp_path, monkeypatch):
    make().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "config.json"
    odd = {"auto_map": {"AutoModel": "evil.Model"}, "somebodys_own": [1, 2]}
    path.write_text(json.dumps({**json.loads(path.read_text()), **odd}))
    (tmp_path / "a" / "evil.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b")
    kept = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {name: kept[name] for name in odd} == odd
    assert not (tmp_path / "b" / "evil.py").exists()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_gives_the_same_logits_of_what_is_converted(tmp_path, heads, dtype):
    transformers = pytest.importorskip("transformers")
    model = make(heads=heads, dtype=dtype)
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(write_google(model, tmp_path / "google"), tmp_path / "b", max_shard_size="9KB")
    ids = torch.randint(4, 130, (2, 9), generator=torch.Generator().manual_seed(0))
    before, after = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").eval() for name in "ab"
    )
    assert after.dtype == getattr(torch, dtype)
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shard", ["5GB", "9KB"])
def test_our_flax_model_and_flax_itself_read_the_msgpack(tmp_path, heads, shard):
    pytest.importorskip("jax")
    serialization = pytest.importorskip("flax.serialization")
    from gemmakit.checkpoint.formats.msgpack import pytorch_name
    from gemmakit.flax import FlaxGemmaForCausalLM
    from gemmakit.flax.weights import flat

    model = make(heads=heads, dtype="bfloat16")
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack", max_shard_size=shard)
    trees = [flat(FlaxGemmaForCausalLM.from_pretrained(tmp_path / "b").params), {}]
    for path in (tmp_path / "b").glob("*.msgpack"):
        trees[1].update(flat(serialization.msgpack_restore(path.read_bytes())))
    expected = model.state_dict()
    for tree in trees:
        assert len(tree) == len(expected) - 1  # the head is tied
        for path, leaf in tree.items():
            name, transposed = pytorch_name(path)
            array = np.asarray(leaf.T if transposed else leaf)
            assert array.dtype == "bfloat16"
            assert np.array_equal(array.astype(np.float32), expected[name].float().numpy()), name


def test_a_checkpoint_is_written_in_other_shards_over_itself_and_found_in_a_subfolder(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "all" / "a")
    convert_checkpoint(tmp_path / "all" / "a", tmp_path / "all" / "a", max_shard_size="9KB", overwrite=True)
    assert len(list((tmp_path / "all" / "a").glob("*.safetensors"))) > 3
    convert_checkpoint(tmp_path / "all", tmp_path / "b", subfolder="a")
    assert_same_bits(state_of(tmp_path / "b"), model.state_dict())


@pytest.mark.parametrize("settings", [dict(bits=8), dict(bits=4), dict(bits=4, group_size=128, head_bits=4)])
def test_quantized_weights_go_into_other_shards_as_they_are_and_nowhere_else(tmp_path, settings):
    from gemmakit.checkpoint import open_checkpoint
    from gemmakit.errors import InputError

    make(dtype="bfloat16").save_pretrained(tmp_path / "plain")
    settings = gemmakit.WeightOnlyConfig(**settings)
    model = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", max_shard_size="5KB")
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    before, after = (dict(open_checkpoint(tmp_path / name).items()) for name in "ab")
    assert_same_bits(after, before)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]["bits"] == settings.bits
    for options in ({"dtype": "float32"}, {"to": "msgpack"}):
        with pytest.raises(InputError, match="gemmakit quantized"):
            convert_checkpoint(tmp_path / "a", tmp_path / "c", **options)
    ids = torch.randint(4, 130, (1, 9), generator=torch.Generator().manual_seed(0))
    again = gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(again(ids).logits, gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / "a")(ids).logits)


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
def test_a_hub_id_is_read_like_a_folder(tmp_path, to):
    """From a snapshot in the Hub's cache; what it lacks is not asked for again."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "cache" / "models--org--name"
    model = make()
    model.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "tokenizer.model").write_bytes((gemmakit.demo_model() / "tokenizer.model").read_bytes())
    with pytest.warns(UserWarning, match="ids, the model 130"):
        convert_checkpoint(tmp_path / "a", cached / "snapshots" / commit, to=to, max_shard_size="9KB")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    where = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    with pytest.warns(UserWarning, match="ids, the model 130"):
        convert_checkpoint("org/name", tmp_path / "b", **where)
    assert_same_bits(state_of(tmp_path / "b"), model.state_dict())
    assert (tmp_path / "b" / "tokenizer.json").is_file()
    gemmakit.convert_tokenizer("org/name", tmp_path / "c", **where)
    assert (tmp_path / "c" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0"])
def test_blocks_of_a_gguf_file_are_kept_bit_for_bit_when_asked(tmp_path, kind):
    from gemmakit.errors import InputError
    from gemmakit.gguf import read_gguf_header

    sizes = dict(hidden_size=64, intermediate_size=96, head_dim=16, vocab_size=2048)
    make(dtype="bfloat16", **sizes).save_pretrained(tmp_path / "plain")
    vocabulary = gemmakit.demo_model() / "tokenizer.model"
    convert_checkpoint(tmp_path / "plain", tmp_path / "a.gguf", type=kind, tokenizer=vocabulary)
    convert_checkpoint(tmp_path / "a.gguf", tmp_path / "b", keep_quantized=True)
    convert_checkpoint(tmp_path / "b", tmp_path / "c.gguf", type=kind, tokenizer=vocabulary)
    blocks = []
    for name in "ac":
        data, header = (tmp_path / f"{name}.gguf").read_bytes(), read_gguf_header(tmp_path / f"{name}.gguf")
        blocks.append({n: (t.kind.name, data[t.begin : t.end]) for n, t in header.tensors.items()})
    assert {found for found, _ in blocks[0].values()} == {"F32", kind, *({"Q8_0"} if kind == "Q4_0" else ())}
    assert blocks[0] == blocks[1]
    ids = torch.randint(4, 130, (1, 9), generator=torch.Generator().manual_seed(0))
    kept, read = (gemmakit.GemmaForCausalLM.from_pretrained(tmp_path / name) for name in ("b", "a.gguf"))
    assert torch.equal(kept(ids).logits, read(ids).logits)
    with pytest.raises(InputError, match="gemmakit quantized"):
        convert_checkpoint(tmp_path / "a.gguf", tmp_path / "d", keep_quantized=True, dtype="float32")
    with pytest.raises(InputError, match="keep_quantized is for GGUF"):
        convert_checkpoint(tmp_path / "plain", tmp_path / "d", keep_quantized=True)


def test_progress_is_told_after_each_tensor_up_to_all_bytes(tmp_path):
    make().save_pretrained(tmp_path / "a")
    told = []
    convert_checkpoint(tmp_path / "a", tmp_path / "b", progress=lambda *told_: told.append(told_))
    assert len(told) == 20
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert {total for _, total in told} == {told[-1][0]}


@pytest.mark.parametrize("heads", ["mqa", "gqa"])
def test_orbax_becomes_the_model_it_was_made_from(tmp_path, heads):
    """With the tokenizer in the folder above, as in Google's releases."""
    model = make(heads=heads, vocab_size=2048)
    folder = write_orbax(model, tmp_path / "release" / "2b")
    (tmp_path / "release" / "tokenizer.model").write_bytes((gemmakit.demo_model() / "tokenizer.model").read_bytes())
    convert_checkpoint(folder, tmp_path / "out")
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize("member", LATER)
def test_orbax_of_later_members_becomes_the_model_and_asks_for_the_configuration_that_it_lacks(tmp_path, member):
    """Norms by their place, of heads too; what only images need is left out. Shapes do not tell a window."""
    model = make_member(member)
    tower = {"vision_encoder": {"norm": {"scale": np.ones(3, np.float32)}}} if member == "gemma3_text" else {}
    folder = write_orbax(model, tmp_path / "in", **tower)
    convert_checkpoint(folder, tmp_path / "out", config=model.config)
    assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
    with pytest.raises(CheckpointError, match=r"Gemma \d of no released size.*--config"):
        convert_checkpoint(folder, tmp_path / "guessed")


@pytest.mark.parametrize("member", LATER)
def test_later_members_go_through_msgpack(tmp_path, member):
    model = make_member(member)
    model.save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack")
    assert_same_bits(state_of(tmp_path / "b"), model.state_dict())
