"""accelerate offloads a gemmakit model to memory and to disk, which then says what it said; and prepares it."""

import accelerate
import pytest
import torch


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_an_offloaded_model_generates_the_same(where, how, model, ids, tmp_path):
    expected = model.generate(ids, max_new_tokens=6, **how)
    if where == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert all(p.is_meta for p in model.model.layers.parameters())
    assert model.generate(ids, max_new_tokens=6, **how).tolist() == expected.tolist()


def test_a_prepared_model_trains_and_is_saved_by_the_usual_idiom(model, ids, name, tmp_path):
    import gemmakit

    runner = accelerate.Accelerator(cpu=True)
    prepared, optimizer = runner.prepare(model.train(), torch.optim.SGD(model.parameters(), lr=0.1))
    runner.backward(prepared(ids, labels=ids).loss)
    optimizer.step()
    runner.unwrap_model(prepared).save_pretrained(
        tmp_path, is_main_process=runner.is_main_process, save_function=runner.save,
        state_dict=runner.get_state_dict(prepared),
    )  # fmt: skip
    again = gemmakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
