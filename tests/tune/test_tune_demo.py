"""The demo model learns by LoRA what it cannot do and keeps what it could: docs/training.md shows this run."""

import pytest
import tune_demo

from gemmakit.tune import TuneSettings, tune
from gemmakit.tune.report import curve

# No old task may lose more: of 800 questions each, three times what chance does to a difference.
LOST = 0.02


@pytest.mark.slow
def test_the_demo_model_learns_a_task_and_keeps_the_others(tmp_path):
    tune_demo.write_data(tmp_path / "data")
    settings = TuneSettings(
        model="demo", data=str(tmp_path / "data"), out=str(tmp_path / "out"), dtype="float32", rank=8, lr=1.2e-3,
        schedule="cosine", max_steps=340, batch_size=16, eval_steps=400,
    )  # fmt: skip
    before, after = curve(tune(settings).records, "accuracy")[1]
    assert before < 0.3 and after > 0.9
    had, has = tune_demo.measure(None), tune_demo.measure(str(tmp_path / "out"))
    lost = {task: had[task] - has[task] for task in had}
    assert max(lost.values()) <= LOST, lost
