"""A model that is split over processes is the model that one process runs, and each of them has its part alone."""

from pathlib import Path

import pytest
import torch
from spread import step, table, training
from tiny_shapes import COMMON, MEMBERS, SHAPES
from together import together

from gemmakit import GemmaConfig, GemmaForCausalLM, GenerationConfig
from gemmakit.compat import MaxTimeCriteria
from gemmakit.errors import InputError
from gemmakit.pytorch.adapters import LoraConfig, add_adapter
from gemmakit.pytorch.decode.stopping import MaxTime
from gemmakit.pytorch.parallel.tensor import TensorPlan

SCRIPT = Path(__file__).with_name("tensor_script.py")
MODEL_SETTINGS = {
    "mqa": SHAPES["mqa"],
    # An odd vocabulary, and biases, of which that of a sum is to be added once.
    "gqa": dict(SHAPES["gqa"], vocab_size=157, attention_bias=True, tie_word_embeddings=False),
    **{name: dict(SHAPES["gqa"], model_type=name, **changes) for name, changes in MEMBERS.items()},
}
MODELS = list(MODEL_SETTINGS)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return together(SCRIPT, tmp_path_factory.mktemp("tensor"))


@pytest.mark.parametrize("name", [*MODELS, "int8", "int4"])
def test_two_processes_compute_what_one_does(found, name):
    for one in found:
        # float32, sums of two halves instead of one; logits of these models are about 1 to 10.
        assert one[name]["apart"] < 1e-4
        assert one[name]["same"] == {"greedy": True, "static": True, "alone": True, "batch": True}
        assert one[name]["drawn"]


@pytest.mark.parametrize("name", MODELS)
def test_a_process_reads_its_part_of_the_file_alone(found, name):
    for one in found:
        # Beside its parameters: scalars of layers, and biases of sums, which one process adds.
        assert one[name]["held"] <= one[name]["read"] < one[name]["held"] * 1.01
        assert one[name]["held"] < one[name]["whole"] * 0.6  # what is whole in each: norms, embeddings of layers


@pytest.mark.parametrize("name", MODELS)
def test_bytes_and_messages_are_those_of_the_arithmetic_on_paper(found, name):
    config = GemmaConfig.from_dict({**COMMON, "num_hidden_layers": 2, **MODEL_SETTINGS[name]})
    on_paper = step(config, 2, rows=3, itemsize=4)
    assert found[0][name]["read"] == on_paper.held_bytes
    assert [tuple(message) for message in found[0][name]["messages"]] == [*on_paper.messages]


def test_one_kv_head_is_in_every_process_and_two_are_shared(found):
    assert [one["mqa"]["heads"] for one in found] == [1, 1]
    assert [one["gqa"]["heads"] for one in found] == [1, 1]
    assert "1 of 1 kv heads" in found[1]["mqa"]["plan"]["tensor"]
    assert "process 1 of 2: 3 of 6 query heads, 1 of 2 kv heads" in found[1]["gqa"]["plan"]["tensor"]
    assert "79 of 157 ids" in found[0]["gqa"]["plan"]["tensor"]
    assert "78 of 157 ids" in found[1]["gqa"]["plan"]["tensor"]


def test_layers_of_a_part_run_fused_but_for_the_sums(found):
    plan = found[0]["gqa"]["plan"]["seams"]
    assert "sum over processes" in plan or "modules" in plan.partition(" ")[0]  # without a compiler there is no form


def test_an_engine_that_others_follow_gives_what_one_alone_does(found):
    said = found[0]["in step"]
    assert (said["same"], said["ends"]) == (True, [[[None, "cancelled"]], [[None, "timeout"]]])


def test_a_request_that_the_first_refuses_changes_what_no_process_draws(found):
    said = found[0]["in step"]["refused"]
    why = ("cache holds 48", "cannot be sent to the others", "max_time is 5.0")
    assert [part for text, part in zip(said, why, strict=True) if part not in text] == [], said
    assert found[0]["in step"]["next"] == found[1]["in step"]["next"]


def test_a_process_goes_on_after_what_all_met_and_ends_of_what_it_met_alone(found):
    assert [one["failing"]["both"] for one in found] == ["closed", "closed"]
    assert [one["failing"]["second"] for one in found] == ["closed", "the first step"]


def test_processes_of_one_machine_listen_to_no_other(found):
    # 127.0.0.1 as Linux writes it, on machines of either byte order.
    assert {address for one in found for address in one["listening"]} <= {"0100007F", "7F000001"}


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_are_quantized_while_parts_are_read(found, bits):
    assert [one[f"loading int{bits}"] for one in found] == [7, 7]


def whole(shape="gqa", **changes):
    return GemmaConfig.from_dict({**COMMON, **SHAPES[shape], "num_hidden_layers": 2, **changes})


@pytest.mark.parametrize(
    ("config", "size", "said"),
    [
        (whole(), 4, "num_attention_heads is 6"),
        (whole("mha"), 3, "num_attention_heads is 4"),
        (whole(num_key_value_heads=3), 2, "num_key_value_heads is 3"),
        (whole(intermediate_size=75), 2, "intermediate_size is 75"),
        (whole("mha", vocab_size=5), 4, "vocab_size is 5"),  # 2 rows each leave the last none
        (whole(pruned_heads={0: [0, 1, 2]}), 2, "pruned_heads"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_its_name(config, size, said):
    with pytest.raises(InputError, match=said):
        TensorPlan(config, 0, size)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.save_pretrained("never"),
        lambda model: model.resize_token_embeddings(300),
        lambda model: model.prune_heads({0: [0]}),
        lambda model: model.dequantize(),
        lambda model: model.untie_weights(),
        lambda model: model.set_input_embeddings(torch.nn.Embedding(5, 4)),
        lambda model: model.set_output_embeddings(torch.nn.Linear(4, 5)),
        lambda model: add_adapter(model, LoraConfig()),
    ],
)
def test_a_part_is_not_changed_as_if_it_were_the_whole(change):
    with pytest.raises(InputError, match=r"part of a model that a tensor plan has split \(process 1 of 2"):
        change(part_of_two())


@pytest.mark.parametrize("clock", [MaxTimeCriteria(1.5), MaxTime(1.5)])
def test_no_criterion_with_a_clock_ends_what_processes_compute_together(clock):
    said = rf"{type(clock).__name__} is 1\.5, but several processes"
    with pytest.raises(InputError, match=said):
        part_of_two().generate(torch.tensor([[5]]), max_new_tokens=2, stopping_criteria=[clock])
    with pytest.raises(InputError, match=said):
        part_of_two().generate_batch([[5]], max_new_tokens=2, stopping_criteria=[clock])


def test_no_clock_ends_what_processes_compute_together():
    part = part_of_two()
    with pytest.raises(InputError, match=r"max_time is 1\.5, but several processes"):
        part.generate(torch.tensor([[5]]), max_time=1.5)
    part.generation_config = GenerationConfig(max_time=2.5)
    with pytest.raises(InputError, match=r"max_time is 2\.5, but several processes"):
        part.generate_batch([[5]])


def part_of_two():
    plan = TensorPlan(whole(), 1, 2)
    model = GemmaForCausalLM(plan.local_config())
    plan.enter(model)
    return model


def test_a_refusal_says_how_many_would_do():
    with pytest.raises(InputError, match=r"4 processes cannot share: take 1, 2, 3, 6 of them"):
        TensorPlan(whole(num_key_value_heads=1), 0, 4)


@pytest.mark.parametrize(("shape", "size"), [("mqa", 2), ("mqa", 4), ("gqa", 2), ("gqa", 6), ("mha", 2), ("mha", 4)])
def test_the_parts_of_all_processes_are_the_whole_and_each_query_finds_its_key(shape, size):
    config = whole(shape, vocab_size=157)
    N, K, H = (getattr(config, n) for n in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    plans = [TensorPlan(config, rank, size) for rank in range(size)]
    for name in ("layers.0.self_attn.q_proj", "layers.1.mlp.down_proj", "layers.1.self_attn.o_proj", "embed_tokens"):
        parts = [plan.part(f"model.{name}.weight") for plan in plans]
        assert [i for p in parts for i in range(p.start, p.start + p.size)] == list(range(parts[0].whole))
    for plan in plans:
        q, k = (plan.part(f"model.layers.0.self_attn.{n}_proj.weight") for n in "qk")
        heads = range(q.start // H, (q.start + q.size) // H)
        assert {n // (N // K) for n in heads} == set(range(k.start // H, (k.start + k.size) // H))
        local = plan.local_config()
        assert (local.num_attention_heads * H, local.num_key_value_heads * H) == (q.size, k.size)


def test_the_tables_of_the_page_are_what_the_arithmetic_says():
    page = (Path(__file__).parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(table()) in page
    assert "\n".join(training()) in page


def test_one_process_needs_no_plan(tmp_path):
    GemmaForCausalLM(whole()).save_pretrained(tmp_path)
    model = GemmaForCausalLM.from_pretrained(tmp_path, tp_plan="auto")
    assert model.tensor_parallel is None
    with pytest.raises(InputError, match="tp_plan is 'colwise'"):
        GemmaForCausalLM.from_pretrained(tmp_path, tp_plan="colwise")
