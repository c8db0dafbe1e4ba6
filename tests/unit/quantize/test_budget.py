"""A budget of bits: never exceeded, used up, spent where the loss is, written down and read back."""

import json
import random

import pytest
import torch
from demo_texts import divergence, texts

import gemmakit
from gemmakit.errors import CheckpointError, ConfigError, InputError
from gemmakit.pytorch.quantize import QuantizedWeight, budget
from gemmakit.quantization import FORMATS

BITS = [4.3, 4.5, 5.0, 6.0, 7.5]


@pytest.fixture(scope="module")
def ids():
    return texts(gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model()))


def packed(model):
    """Each quantized weight once."""
    found = {id(m.weight): m for m in model.modules() if isinstance(m, QuantizedWeight)}
    return [module.packed for module in found.values()]


def bits_a_weight(model):
    held = packed(model)
    return 8 * sum(p.nbytes for p in held) / sum(p.shape[0] * p.shape[1] for p in held)


def costs_of(errors):
    """Modules of 1000 weights, by name their error in the cheapest format; each wider one has a tenth of it."""
    sizes = (500, 600, 700, 820, 1000, 1100)
    return {
        name: {k: budget.Cost(s, e / 10**i) for i, (k, s) in enumerate(zip(FORMATS, sizes, strict=True))}
        for name, e in errors.items()
    }


@pytest.mark.parametrize(("bits", "calibrated"), [*((b, False) for b in BITS), (5.0, True)])
def test_a_budget_is_never_exceeded_and_used_to_within_one_module(bits, calibrated, ids, tmp_path):
    demo = gemmakit.demo_model()
    out = gemmakit.quantize_checkpoint(demo, tmp_path / "out", bits=bits, calibration_ids=ids if calibrated else None)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(out)
    held = packed(model)
    weights = sum(p.shape[0] * p.shape[1] for p in held)
    left = bits * weights / 8 - sum(p.nbytes for p in held)
    assert left >= 0
    # No weight that could be wider would fit: the least step is that from groups of 128 to groups of 32.
    steps = [p.shape[0] * p.shape[1] * 0.5 / 8 for p in held if p.bits == 4]
    assert not steps or left < max(p.shape[0] * p.shape[1] for p in held) / 2


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_of_all(seed):
    draw = random.Random(seed)
    found = costs_of({f"m{i}": draw.random() ** 3 for i in range(5)})
    bits = draw.uniform(4.0, 8.8)

    def total(chosen):
        held = [found[name][kind] for name, kind in chosen.items()]
        return sum(c.bytes for c in held), sum(c.error for c in held)

    size, error = total(budget.choose(found, 5000, bits))
    every = [{}]
    for name in found:
        every = [{**chosen, name: kind} for chosen in every for kind in FORMATS]
    best = min(e for s, e in map(total, every) if s <= bits * 5000 / 8)
    assert size <= bits * 5000 / 8 and error == pytest.approx(best)


def test_a_model_in_mixed_bits_loads_to_the_same_bits(tmp_path):
    out = gemmakit.quantize_checkpoint(gemmakit.demo_model(), tmp_path / "out", bits=5)
    model = gemmakit.AutoModelForCausalLM.from_pretrained(out)
    chosen = json.loads((out / "config.json").read_text())["quantization_config"]["module_formats"]
    for kind, names in chosen.items():
        for name in names:
            held = model.get_submodule(f"model.{name}").packed
            group = None if held.group_size == held.in_features and held.bits == 8 else held.group_size
            assert (held.bits, group) == FORMATS[kind]
    assert len({p.bits for p in packed(model)}) > 1
    model.save_pretrained(tmp_path / "again")
    again = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    piece = torch.arange(5, 40)[None]
    with torch.no_grad():
        assert torch.equal(model(piece).logits, again(piece).logits)
    # Rounding while it is loaded gives the same, from what config.json says alone.
    settings = again.quantization_config.to_dict()
    rounded = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model(), quantization_config=settings)
    with torch.no_grad():
        assert torch.equal(rounded(piece).logits, model(piece).logits)
    bare = gemmakit.AutoModel.from_pretrained(out)  # whose modules have shorter names
    assert bits_a_weight(bare) == bits_a_weight(model)


@pytest.mark.parametrize("calibrated", [False, True], ids=["weights", "text"])
def test_mixed_bits_lose_no_more_than_the_same_bits_for_all(calibrated, tmp_path):
    demo = gemmakit.demo_model()
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(demo)
    seen, unseen = texts(tokenizer, 16).split(8)
    given = {"calibration_ids": seen} if calibrated else {}
    exact = gemmakit.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    lost = {}
    for name, how in {"mixed": {"bits": 4.75}, "alike": {"quantization_config": {"bits": 4, "head_bits": 4}}}.items():
        out = gemmakit.quantize_checkpoint(demo, tmp_path / name, **how, **given)
        model = gemmakit.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        lost[name] = divergence(exact, model, unseen), bits_a_weight(model)
    assert lost["mixed"][1] <= 4.75 and lost["alike"][1] == pytest.approx(4.75, abs=0.02)
    assert lost["mixed"][0] <= lost["alike"][0]


def test_the_estimate_is_near_what_rounding_one_module_does(ids):
    """Within a factor of two for each of the widest projections: it takes errors for small and independent."""
    demo = gemmakit.demo_model()
    exact = gemmakit.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
    reach = budget.effects(exact, ids, lambda name: name.endswith("down_proj"))
    found = {name: budget.costs(exact.get_submodule(name).weight, e)["int4-g128"].error for name, e in reach.items()}
    assert len(found) == exact.config.num_hidden_layers
    for name, estimate in found.items():
        other = gemmakit.AutoModelForCausalLM.from_pretrained(demo, dtype=torch.float32)
        module = other.get_submodule(name)
        module.weight.data = budget._rounded(module.weight.data, "int4-g128", name)
        assert 0.4 < estimate / divergence(exact, other, ids) < 2.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module_formats": {"int5": ["q_proj"]}}, "module_formats is"),
        ({"module_formats": {"int8": "q_proj"}}, "module_formats is"),
        ({"module_formats": {"int8": ["q_proj"], "int4-g32": ["model.layers.0"]}}, "name it once"),
        ({"module_formats": {"int8": ["nowhere_proj"]}}, "names no weight"),
    ],
)
def test_formats_that_fit_no_model_are_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        gemmakit.AutoModelForCausalLM.from_pretrained(
            gemmakit.demo_model(), quantization_config={"bits": 4, **settings}
        )
    with pytest.raises(ConfigError, match=message):
        gemmakit.quantize_checkpoint(gemmakit.demo_model(), tmp_path / "out", {"bits": 4, **settings})
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_not_hold_what_its_formats_say_is_refused(tmp_path):
    out = gemmakit.quantize_checkpoint(gemmakit.demo_model(), tmp_path / "out", bits=4.5)
    config = json.loads((out / "config.json").read_text())
    chosen = config["quantization_config"]["module_formats"]
    chosen["int8"], chosen["int4-g32"] = chosen.get("int4-g32", []), chosen.get("int8", [])
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"by its config\.json"):
        gemmakit.AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("bits", [4.1, 9, "5", True])
def test_bits_that_no_formats_have_are_refused(bits, tmp_path):
    with pytest.raises(ConfigError, match="bits is"):
        gemmakit.quantize_checkpoint(gemmakit.demo_model(), tmp_path / "out", bits=bits)


def test_a_budget_beside_formats_is_refused(tmp_path):
    with pytest.raises(InputError, match="group_size of quantization_config is 128"):
        gemmakit.quantize_checkpoint(gemmakit.demo_model(), tmp_path / "out", "int4-g128", bits=5)
