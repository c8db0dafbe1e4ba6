"""The same rows, masks, losses and steps through JAX: a run by either backend learns the same."""

import pytest
import torch
from safetensors.torch import load_file
from test_tune_laws import gradients, same, trainer
from tune_tools import WORDS, write

from gemmakit.errors import InputError
from gemmakit.tune import TuneSettings, resume, tune

pytest.importorskip("flax", reason="Flax needs gemmakit[flax]")

# float32, sums in XLA's order.
CLOSE = 1e-4


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(dict(batch_size=5), marks=pytest.mark.slow),
        dict(batch_size=2, packing=True),
        dict(batch_size=5, method="full", checkpointing=True),
    ],
)
def test_a_step_has_the_loss_and_gradients_of_pytorch(tiny, chats, changes):
    plain, flax = (trainer(tiny, chats, dtype="float32", backend=name, **changes) for name in ("pytorch", "flax"))
    assert plain.trained.keys() == flax.trained.keys()
    with torch.no_grad():
        for name, parameter in flax.trained.items():
            parameter.copy_(plain.trained[name])
    same(gradients(flax), gradients(plain), CLOSE)


@pytest.mark.slow
def test_a_run_is_that_of_pytorch_and_goes_on_to_the_bit(tiny, tmp_path):
    rows = [{"prompt": f"Say {w}", "completion": w} for w in WORDS]
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", rows), write(tmp_path / "data" / "valid.jsonl", rows[:2])
    common = dict(model=str(tiny), data=str(tmp_path / "data"), rank=4, lr=1e-2, batch_size=4, max_steps=4)
    common |= dict(save_steps=2, dtype="float32")
    theirs = tune(TuneSettings(**common, out=str(tmp_path / "pytorch")))
    ours = tune(TuneSettings(**common, out=str(tmp_path / "flax"), backend="flax"))
    for mine, expected in zip(ours.records, theirs.records, strict=True):
        assert mine.keys() == expected.keys()
        for name in mine.keys() & {"loss", "valid_loss", "accuracy"}:
            assert mine[name] == pytest.approx(expected[name], rel=CLOSE)

    def cut(step, total):
        if step.step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(TuneSettings(**common, out=str(tmp_path / "cut"), backend="flax"), tell=cut)
    resume(tmp_path / "cut")
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("flax", "cut"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


@pytest.mark.parametrize(("changes", "said"), [
    ({"method": "dora"}, "method is 'dora', which --backend flax has not"),
    ({"loss": "dpo"}, "loss is 'dpo'"),
    ({"method": "full", "dtype": "bfloat16"}, "trains all weights in float32"),
    ({"neftune": 5.0}, "neftune=5.0 has no use with the backend flax"),
])  # fmt: skip
def test_what_flax_has_not_is_refused(changes, said):
    with pytest.raises(InputError, match=said):
        TuneSettings(model="a", data="b", out="c", backend="flax", **changes)
