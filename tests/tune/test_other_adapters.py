"""peft's methods on plain weights and on codes: each says what it says on the numbers, or it is refused in words."""

import warnings

import peft
import pytest
import torch

import gemmakit
from gemmakit.errors import InputError
from gemmakit.pytorch.adapters import LoraConfig, add_adapter, merge_adapter
from gemmakit.pytorch.quantize import QuantizedLinear

TINY = dict(vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=32, max_position_embeddings=32, initializer_range=0.2)  # fmt: skip
IDS = torch.tensor([[2, 5, 6, 7, 30]])
ON = dict(target_modules=["q_proj", "down_proj"])
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, **ON),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **ON),
    "AdaLoRA": lambda: peft.AdaLoraConfig(r=4, total_step=10, **ON),
    "IA3": lambda: peft.IA3Config(feedforward_modules=["down_proj"], **ON),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=2, **ON),
    "LoKr": lambda: peft.LoKrConfig(r=2, **ON),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, **ON),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **ON),
    "HRA": lambda: peft.HRAConfig(r=4, **ON),
}
CODES = [None, "int8", "int6", "int4"]
# What reads the shape of a weight off its codes, of which several lie in a byte.
SHAPED = ("LoHa", "LoKr", "HRA")
# The last is peft's own, of 8 and 4 bits.
REFUSED = r"call dequantize\(\) of the model first|Cannot merge ia3 layers when the model is loaded in \d-bit mode"
# Open: these compute with what `weight.data` of codes gives, as whoever reads codes by hand may. Forward gets other
# numbers of the first; merging meets torch's error about shapes, and nothing is changed.
SILENT = [("HRA", "int8")]
SHAPES = [(kind, codes) for kind in ("OFT", "BOFT", "HRA", "LoKr") for codes in ("int6", "int4")]
OPEN = "a refusal by the codes' own data would run it"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    gemmakit.GemmaForCausalLM(gemmakit.GemmaConfig(**TINY)).save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(folder):
    """A model with an adapter that changes what it says."""

    def make(kind, codes, plainly=False):
        model = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=codes)
        model = model.dequantize() if codes and plainly else model
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = peft.get_peft_model(model, KINDS[kind]()).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.05)
        return made

    return make


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_adapter_on_codes_says_what_it_says_on_their_numbers_or_is_refused(kind, codes, adapted):
    if (kind, codes) in SILENT:
        pytest.skip(OPEN)
    made = adapted(kind, codes)
    if kind in SHAPED and codes in ("int6", "int4"):
        with pytest.raises(InputError) as caught:
            made(IDS)
        for part in ("self_attn.q_proj of layer 0: peft.tuners.", f"{codes[3:]}-bit codes", "(64, 64)", "dequantize()"):
            assert part in str(caught.value)
        return
    said = made(IDS).logits
    plain = adapted(kind, codes, plainly=True)(IDS).logits
    # Kernels of codes round what goes into a layer, those of some processors more than others.
    assert float((said - plain).abs().max() / plain.abs().max()) < 0.05


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_merging_says_the_same_or_is_refused(kind, codes, adapted):
    made = adapted(kind, codes)
    if codes is None:
        said = made(IDS).logits
        torch.testing.assert_close(made.merge_and_unload()(IDS).logits, said, atol=1e-4, rtol=1e-4)
        return
    if (kind, codes) in SHAPES:
        pytest.skip(OPEN)
    before = [p.clone() for p in made.parameters()]
    with pytest.raises(ValueError, match=REFUSED):
        made.merge_and_unload()
    assert all(torch.equal(a, b) for a, b in zip(before, made.parameters(), strict=True))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("dora", [False, True])
@torch.no_grad()
def test_our_own_adapters_say_the_same_or_are_refused(dora, codes, folder):
    model = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=codes)
    add_adapter(model, LoraConfig(r=4, use_dora=dora, **{k: tuple(v) for k, v in ON.items()}))
    said = model(IDS).logits
    if codes is None:
        merge_adapter(model)
        torch.testing.assert_close(model(IDS).logits, said, atol=1e-4, rtol=1e-4)
    else:
        with pytest.raises(InputError, match="holds codes of a quantized weight"):
            merge_adapter(model)


@torch.no_grad()
def test_an_error_of_the_codes_themselves_stays_what_it_is(adapted, monkeypatch):
    made = adapted("LoRA", "int4")

    def forward(self, input):
        raise RuntimeError("beneath")

    monkeypatch.setattr(QuantizedLinear, "forward", forward)
    with pytest.raises(RuntimeError, match=r"^beneath$"):
        made(IDS)
