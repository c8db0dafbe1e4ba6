"""What every model can do besides its forward pass: embeddings, heads, copies, dtypes, training switches."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch import nn

from gemmakit import GemmaConfig, GemmaForCausalLM, GemmaModel, StaticCache
from gemmakit.errors import CheckpointError, ConfigError, InputError, TokenOutOfRange
from gemmakit.pytorch import methods
from gemmakit.pytorch.heads import GemmaForSequenceClassification, GemmaForTokenClassification
from gemmakit.pytorch.layers import GemmaScaledEmbedding

CLASSES = [GemmaModel, GemmaForCausalLM, GemmaForSequenceClassification, GemmaForTokenClassification]
CLOSE = dict(atol=1e-5, rtol=1e-4)  # float32 sums in another order


def tiny(cls=GemmaForCausalLM, **more):
    torch.manual_seed(0)
    settings = dict(vocab_size=40, hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=6,
                    num_key_value_heads=3, head_dim=8, max_position_embeddings=64, initializer_range=0.2)  # fmt: skip
    return cls(GemmaConfig(**{**settings, **more})).eval()


@pytest.fixture
def ids():
    return torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def first(out):
    return out[0]


# -- embeddings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_growing_the_vocabulary_keeps_every_old_token(cls, tied, ids, tmp_path):
    model = tiny(cls, tie_word_embeddings=tied)
    before = first(model(ids))
    old = model.get_input_embeddings().weight.clone()
    returned = model.resize_token_embeddings(45)
    assert returned is model.get_input_embeddings()
    assert returned.weight.shape == (45, 20) and returned.num_embeddings == model.config.vocab_size == 45
    assert torch.equal(returned.weight[:40], old)
    torch.testing.assert_close(returned.weight[40:], old.mean(0).expand(5, -1))
    after = first(model(ids))
    torch.testing.assert_close(after[..., :40] if cls is GemmaForCausalLM else after, before, **CLOSE)
    model(torch.tensor([[44]]))
    with pytest.raises(TokenOutOfRange, match=r"45 .*45 ids"):
        model(torch.tensor([[45]]))
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path)
    torch.testing.assert_close(first(again(ids)), after)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_grows_with_the_embedding_and_stays_tied_or_apart(tied):
    model = tiny(tie_word_embeddings=tied)
    mean = model.lm_head.weight.mean(0)
    model.resize_token_embeddings(pad_to_multiple_of=32)
    assert model.config.vocab_size == model.vocab_size == model.lm_head.out_features == 64
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    torch.testing.assert_close(model.lm_head.weight[50], mean)
    labels = torch.full((1, 3), 63)
    model(labels, labels=labels).loss.backward()
    assert model.get_input_embeddings().weight.grad.shape == (64, 20)


def test_fresh_rows_can_be_drawn_instead():
    model = tiny()
    model.resize_token_embeddings(4000, mean_resizing=False)
    assert model.get_input_embeddings().weight[40:].std().item() == pytest.approx(0.2, rel=0.05)


@torch.no_grad()
def test_shrinking_cuts_and_a_lost_special_token_is_refused(ids):
    model = tiny(pad_token_id=0, bos_token_id=2, eos_token_id=[1, 30])
    with pytest.raises(InputError, match=r"25 token ids leave out 30.*at least 31"):
        model.resize_token_embeddings(25)
    assert model.config.vocab_size == 40
    model.resize_token_embeddings(31)
    small = ids % 31
    assert model(small).logits.shape[-1] == 31


@pytest.mark.parametrize("size", [0, -3, 2.5, "8", True])
def test_sizes_that_are_none_are_refused(size):
    with pytest.raises(InputError, match="must be a whole number >= 1"):
        tiny().resize_token_embeddings(size)
    with pytest.raises(InputError, match="pad_to_multiple_of"):
        tiny().resize_token_embeddings(50, pad_to_multiple_of=size)


def test_embeddings_can_be_read_and_replaced():
    model = tiny()
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    other = GemmaScaledEmbedding(50, 20)
    model.set_input_embeddings(other)
    assert model.model.embed_tokens is other and model.lm_head.weight is other.weight
    assert model.config.vocab_size == model.lm_head.out_features == 50
    base = tiny(GemmaModel)
    assert base.get_output_embeddings() is None
    with pytest.raises(InputError, match="no language modelling head"):
        base.set_output_embeddings(nn.Linear(20, 40))


# -- ties ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_untied_head_is_saved_and_loaded_apart(ids, tmp_path):
    model = tiny()
    before = model(ids).logits
    model.untie_weights()
    torch.testing.assert_close(model(ids).logits, before)
    model.lm_head.weight.mul_(2)
    torch.testing.assert_close(model(ids).logits, before * 2)
    model.save_pretrained(tmp_path)
    again = GemmaForCausalLM.from_pretrained(tmp_path)
    assert again.config.tie_word_embeddings is False
    torch.testing.assert_close(again(ids).logits, before * 2)
    again.config.tie_word_embeddings = True
    again.tie_weights()
    torch.testing.assert_close(again(ids).logits, before)


@torch.no_grad()
def test_a_head_of_ones_own_unties(ids, tmp_path):
    model = tiny()
    model.set_output_embeddings(nn.Linear(20, 40, bias=False))
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GemmaForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_saving_never_drops_a_head_that_was_changed_behind_the_tie(tmp_path):
    model = tiny()
    model.lm_head.weight = nn.Parameter(torch.zeros(40, 20))
    with pytest.raises(InputError, match=r"lm_head\.weight differs .*untie_weights\(\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Coded(torch.Tensor):
    """Stands for numbers that it does not hold, as torchao's tensors do: no operation but detach is there."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    def dequantize(self):
        return self.codes.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        assert func is torch.ops.aten.detach.default, func
        return cls(args[0].codes, args[0].scale)


def coded(weight):
    scale = weight.detach().abs().amax(1, keepdim=True) / 127
    return nn.Parameter(Coded((weight.detach() / scale).round().to(torch.int8), scale), requires_grad=False)


def test_weights_of_another_library_are_stored_as_the_numbers_they_stand_for(tmp_path):
    model = tiny()
    query = model.model.layers[0].self_attn.q_proj
    query.weight = coded(query.weight)
    model.model.embed_tokens.weight = coded(model.model.embed_tokens.weight)
    model.tie_weights()
    with pytest.warns(UserWarning, match=r"2 weights are Coded of another library.*stored as the numbers"):
        model.save_pretrained(tmp_path)
    again = GemmaForCausalLM.from_pretrained(tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name].dequantize())
    model.lm_head.weight = coded(torch.ones_like(again.lm_head.weight))
    with pytest.raises(InputError, match=r"lm_head\.weight differs"):
        model.save_pretrained(tmp_path)


# -- pruning ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((6, 3), {0: [2, 3], 1: [0, 1, 4, 5]}),  # whole groups
        ((6, 3), {1: [0, 2, 5]}),  # one of each group
        ((6, 1), {0: [1, 4, 5]}),  # multi-query: any
        ((6, 6), {0: [0], 1: [1, 2, 3, 4, 5]}),  # multi-head: any
        ((6, 3), {0: [0, 1, 2, 4]}),  # a whole group, and one of each other
    ],
)
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_pruned_head_is_one_whose_output_nobody_reads(shape, heads, bias, ids, tmp_path):
    model = tiny(num_attention_heads=shape[0], num_key_value_heads=shape[1], attention_bias=bias)
    for p in model.parameters():
        p.normal_(0, 0.2)
    silenced = copy.deepcopy(model)
    for layer, gone in heads.items():
        for n in gone:
            silenced.model.layers[layer].self_attn.o_proj.weight[:, n * 8 : n * 8 + 8] = 0
    model.prune_heads(heads)
    out = model(ids, output_attentions=True)
    torch.testing.assert_close(out.logits, silenced(ids).logits, **CLOSE)
    for layer, weights in enumerate(out.attentions):
        assert weights.shape[1] == shape[0] - len(heads.get(layer, ()))
    assert model.num_parameters() < silenced.num_parameters()
    steps = [model(ids[:, :5], past_key_values=(cache := StaticCache(model.config, 2, 16, dtype=torch.float32))).logits]
    steps.append(model(ids[:, 5:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(steps, 1), out.logits, **CLOSE)

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pruned_heads"] == {str(k): v for k, v in heads.items()}
    again = GemmaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, out.logits)


@torch.no_grad()
def test_pruning_goes_on_in_the_old_numbers(ids):
    model, at_once = tiny(num_key_value_heads=6), tiny(num_key_value_heads=6)
    model.prune_heads({0: [1]})
    model.prune_heads({0: [1, 4]})
    at_once.prune_heads({0: [1, 4]})
    torch.testing.assert_close(model(ids).logits, at_once(ids).logits)
    assert model.config.pruned_heads == {0: [1, 4]}


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({0: [0]}, r"heads \[0\].*serve 1, 2, 2 query heads: take whole groups of 2"),
        ({1: range(6)}, "all 6 heads of layer 1"),
        ({0: [6]}, "head 6 of layer 0 does not exist"),
        ({2: [0, 1]}, "layer 2 does not exist"),
        ({0: [0, 1], 1: [-1]}, "head -1 of layer 1"),
    ],
)
def test_a_pruning_that_attention_cannot_compute_changes_nothing(heads, message):
    model = tiny()
    with pytest.raises(ConfigError, match=message):
        model.prune_heads(heads)
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (48, 20)
    assert model.config.pruned_heads == {}
    assert "pruned_heads" not in model.config.to_dict()


def test_a_nonsense_record_of_pruned_heads_is_refused():
    for record in ([1, 2], {"a": [1]}, {0: 3}):
        with pytest.raises(ConfigError, match="pruned_heads is"):
            tiny(pruned_heads=record)
    assert tiny(pruned_heads={}).model.layers[0].self_attn.q_proj.weight.shape == (48, 20)


def test_weights_of_other_shapes_than_the_record_are_refused(tmp_path):
    model = tiny()
    model.prune_heads({0: [0, 1]})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["pruned_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight has shape \(32, 20\).*\(48, 20\)"):
        GemmaForCausalLM.from_pretrained(tmp_path)


# -- training switches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("arguments", [None, {"use_reentrant": True}], ids=["default", "reentrant"])
def test_gradient_checkpointing_recomputes_and_changes_no_gradient(cls, arguments, ids):
    model, seen = tiny(cls, attention_dropout=0.0, classifier_dropout=0.0).train(), []
    model.base_model.layers[0].input_layernorm.register_forward_hook(lambda *_: seen.append(1))

    def gradients():
        model.zero_grad()
        seen.clear()
        first(model(ids)).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters()}, len(seen)

    plain, once = gradients()
    model.gradient_checkpointing_enable(arguments)
    if arguments:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    again, twice = gradients()
    assert (once, twice) == (1, 2)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=lambda m, n=name: f"{n}: {m}")
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing and gradients()[1] == 1


@pytest.mark.parametrize("name", ["gradient_checkpointing_enable", "activation_checkpointing_enable"])
def test_every_nth_layer_may_be_recomputed(name, ids):
    model, seen = tiny(num_hidden_layers=5).train(), []
    for i, layer in enumerate(model.base_model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: seen.append(i))
    getattr(model, name)(None, every_n_layers=2, offload=False)  # as transformers' Trainer calls it
    model(ids, labels=ids).loss.backward()
    assert sorted(seen) == [0, 0, 1, 2, 2, 3, 4, 4]
    for wrong in (dict(every_n_layers=0), dict(offload=True)):
        with pytest.raises(InputError, match=next(iter(wrong))):
            getattr(model, name)(**wrong)


def test_frozen_embeddings_let_gradients_through_when_asked(ids):
    model = tiny()
    model.requires_grad_(False)
    model.enable_input_require_grads()
    assert model(ids).logits.requires_grad
    model.disable_input_require_grads()
    assert not model(ids).logits.requires_grad


def test_attention_dropout_works_in_training_only(ids):
    model = tiny(attention_dropout=0.5)
    torch.testing.assert_close(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.allclose(model(ids).logits, model(ids).logits)


def test_attention_bias_is_there_when_configured_and_starts_at_zero():
    model = tiny(attention_bias=True)
    names = {n for n, _ in model.named_parameters() if n.endswith(".bias")}
    assert names == {f"model.layers.{i}.self_attn.{p}_proj.bias" for i in range(2) for p in "qkvo"}
    assert all(torch.equal(model.get_parameter(n), torch.zeros_like(model.get_parameter(n))) for n in names)
    assert not [n for n, _ in tiny().named_parameters() if n.endswith(".bias")]


@pytest.mark.parametrize("std", [0.02, 0.5])
@pytest.mark.parametrize("cls", CLASSES)
def test_fresh_weights_have_the_configured_deviation(cls, std):
    model = tiny(cls, initializer_range=std, hidden_size=64, intermediate_size=96)
    for name, p in model.named_parameters():
        if name.endswith(("norm.weight", "bias")):
            assert torch.equal(p, torch.zeros_like(p)), name
        elif p.numel() > 1000:
            assert p.std().item() == pytest.approx(std, rel=0.15), name
    assert torch.equal(model.get_input_embeddings().weight[0], torch.zeros(64)), "the padding row"


# -- copies, dtypes, counts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@torch.no_grad()
def test_copies_are_equal_independent_and_tied_like_the_original(cls, copied, ids):
    model = tiny(cls)
    twin = copied(model)
    before = first(model(ids))
    assert torch.equal(first(twin(ids)), before)
    twin.get_input_embeddings().weight.zero_()
    assert torch.equal(first(model(ids)), before)
    if cls is GemmaForCausalLM:
        assert twin.lm_head.weight is twin.get_input_embeddings().weight
    twin.set_attn_implementation("eager")
    assert model.config.attn_implementation == "sdpa"


ROTARY = {
    "default": {},
    "linear": dict(factor=2.0),
    "dynamic": dict(factor=2.0),
    "yarn": dict(factor=2.0),
    "llama3": dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=4096),
    "longrope": dict(short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 2.1, 2.2, 2.3],
                     original_max_position_embeddings=4096),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTARY)
@pytest.mark.parametrize("convert", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
@torch.no_grad()
def test_half_formats_keep_exact_rotary_tables(convert, kind, ids):
    model = tiny(max_position_embeddings=9000, rope_parameters={"rope_type": kind, **ROTARY[kind]})
    exact, _ = model.model.rotary_emb(torch.tensor([[8191]]), torch.float32)
    inverse = model.model.rotary_emb.inv_freq.clone()
    convert(model)
    assert model.dtype in (torch.float16, torch.bfloat16) and model(ids).logits.dtype == model.dtype
    assert torch.equal(model.model.rotary_emb.inv_freq, inverse)
    assert torch.equal(model.model.rotary_emb(torch.tensor([[8191]]), torch.float32)[0], exact)
    assert torch.equal(model.float().model.rotary_emb.inv_freq, inverse)


def test_parameters_are_counted_once():
    model = tiny()
    assert model.num_parameters() == sum(p.numel() for p in set(model.parameters()))
    assert model.num_parameters() - model.num_parameters(exclude_embeddings=True) == 40 * 20
    model.model.embed_tokens.requires_grad_(False)
    assert model.num_parameters(only_trainable=True) == model.num_parameters() - 40 * 20


def test_push_to_hub_uploads_what_save_pretrained_writes(monkeypatch, ids):
    uploads = []

    def push(folder, repo_id, **kwargs):
        uploads.append((repo_id, kwargs, GemmaForCausalLM.from_pretrained(folder)(ids).logits))
        return "https://hub/commit"

    monkeypatch.setattr(methods, "push_folder", push)
    model = tiny()
    assert model.push_to_hub("me/tiny", private=True) == "https://hub/commit"
    ((repo, kwargs, logits),) = uploads
    assert (repo, kwargs) == ("me/tiny", {"private": True})
    torch.testing.assert_close(logits, model(ids).logits)


def test_the_memory_footprint_is_that_of_the_weights_as_they_are_held():
    model = tiny()
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    tables = sum(table.numel() * table.element_size() for table in model.buffers())
    assert model.get_memory_footprint() == 4 * model.num_parameters() + tables
    assert model.half().get_memory_footprint(return_buffers=False) == 2 * model.num_parameters()
