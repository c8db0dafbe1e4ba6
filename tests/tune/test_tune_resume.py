"""A run that was killed, at any step and in the middle of a save, has the losses and weights that it would have had."""

import json
import os
import random
import resource
import signal

import pytest
from killing import kill_at
from safetensors.torch import load_file
from tune_tools import WORDS, write

from gemmakit.errors import CheckpointError, InputError
from gemmakit.tune import TuneSettings, resume, tune
from gemmakit.tune import state as states
from gemmakit.tune.report import read_metrics

STEPS = 9


def settings(tiny, data, out, kind):
    kinds = {
        "lora": dict(rank=4, dropout=0.1, neftune=5.0, ema=0.9),
        "full": dict(method="full", lr=1e-3),
        "bfloat16": dict(method="full", dtype="bfloat16", lr=1e-3),
        "dpo": dict(rank=4, loss="dpo"),
    }
    common = dict(batch_size=2, accumulate=2, max_steps=STEPS, save_steps=2, eval_steps=3, lr=1e-2)
    return TuneSettings(model=str(tiny), data=str(data), out=str(out), **{**common, **kinds[kind]})


@pytest.fixture
def data(request, tmp_path):
    """Rows of the kind's form, with some held out."""
    pairs = [
        {"prompt": f"Say {w}", "chosen": f" {w} {w}", "rejected": " no" * (1 + i % 3)} for i, w in enumerate(WORDS)
    ]
    texts = [{"prompt": f"Say {w}", "completion": " ".join(WORDS[: 1 + i])} for i, w in enumerate(WORDS)]
    rows = pairs if request.param == "dpo" else texts
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train.jsonl", rows)
    write(tmp_path / "data" / "valid.jsonl", rows[:3])
    return request.param, tmp_path / "data"


def lines(folder):
    """What was measured, but for the time it took."""
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_metrics(folder)]


def weights(folder):
    name = "adapter_model.safetensors" if (folder / "adapter_config.json").exists() else "model.safetensors"
    return load_file(folder / name)


def equal(folder, whole):
    assert lines(folder) == lines(whole)
    assert len([r for r in lines(folder) if "loss" in r]) == STEPS
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def in_a_process_that_is_killed(run):
    """run() in a copy of this process; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize(("data", "kills"), [
    ("lora", 3), *(pytest.param(kind, 10, marks=pytest.mark.slow) for kind in ("lora", "full", "bfloat16", "dpo")),
], indirect=["data"])  # fmt: skip
def test_a_run_killed_at_random_equals_the_uninterrupted_to_the_bit(tiny, data, kills, tmp_path):
    kind, files = data
    tune(settings(tiny, files, tmp_path / "whole", kind))
    folder, rng, killed = tmp_path / "killed", random.Random(kind), 0
    for attempt in range(kills):

        def run(attempt=attempt):
            if attempt % 2:  # at a file's opening or renaming, in a save more often than not
                kill_at(rng.randint(1, 30), inside=str(folder))
            after = rng.randint(1, 3)

            def tell(step, total):
                nonlocal after
                after -= 1
                if not after and not attempt % 2:
                    os.kill(os.getpid(), signal.SIGKILL)

            go_on(tiny, files, folder, kind, tell)

        killed += in_a_process_that_is_killed(run)
        rng.random()
    assert killed > kills / 2
    go_on(tiny, files, folder, kind, None)
    equal(folder, tmp_path / "whole")


def go_on(tiny, files, folder, kind, tell):
    if (folder / "tune.json").is_file():
        resume(folder, tell=tell)
    else:
        tune(settings(tiny, files, folder, kind), overwrite=True, tell=tell)


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on the size of files, as POSIX has it")
@pytest.mark.parametrize("data", ["lora"], indirect=True)
@pytest.mark.parametrize("what", ["state.safetensors", "metrics.jsonl"])
def test_a_disk_that_fills_up_costs_the_steps_since_the_last_save(tiny, data, what, tmp_path):
    _, files = data
    tune(settings(tiny, files, tmp_path / "whole", "lora"))

    def fill(step, total):
        if step.step == 3:
            limit = (tmp_path / "full" / what).stat().st_size // (2 if what.startswith("state") else 1)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    child = os.fork()
    if child == 0:
        try:
            tune(settings(tiny, files, tmp_path / "full", "lora"), tell=fill)
        except CheckpointError as error:
            os._exit(7 if what in str(error) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert states.load(tmp_path / "full").step == 2
    assert resume(tmp_path / "full").finished
    equal(tmp_path / "full", tmp_path / "whole")


@pytest.mark.parametrize("data", ["lora"], indirect=True)
def test_ctrl_c_saves_the_step_and_the_run_goes_on(tiny, data, tmp_path):
    _, files = data
    tune(settings(tiny, files, tmp_path / "whole", "lora"))
    stopped = tune(
        settings(tiny, files, tmp_path / "stopped", "lora"),
        tell=lambda step, total: signal.raise_signal(signal.SIGINT) if step.step == 3 else None,
    )
    assert not stopped.finished
    assert states.load(tmp_path / "stopped").step == 3
    assert resume(tmp_path / "stopped").finished
    equal(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("data", ["lora"], indirect=True)
def test_a_run_goes_on_with_what_it_began_with_alone(tiny, data, tmp_path):
    _, files = data
    out = tmp_path / "out"
    tune(settings(tiny, files, out, "lora"))
    with pytest.raises(InputError, match=r"lr 0\.01 became 0\.5"):
        resume(out, lr=0.5)
    assert resume(out, save_steps=3).finished  # nothing is left to do
    held = (files / "train.jsonl").read_text()
    (files / "train.jsonl").write_text(held + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(InputError, match="the train data is not what the run began with"):
        resume(out)
    (files / "train.jsonl").write_text(held)
    kept = json.loads((out / "tune.json").read_text())
    (out / "tune.json").write_text(json.dumps({**kept, "model": "0" * 64}))
    with pytest.raises(InputError, match="the model is not what the run began with"):
        resume(out)
    with pytest.raises(InputError, match="no run to go on with"):
        resume(tmp_path)
    with pytest.raises(InputError, match="resume has no setting steps; there are "):
        resume(out, steps=3)


@pytest.mark.parametrize("damage", [{"settings": 3}, {"data": None}, {"data": {"train": {}}}, {"model": None}])
def test_a_damaged_settings_file_is_refused_by_name(tmp_path, damage):
    kept = {"settings": {}, "data": {"train": {"digest": "a", "rows": 1}}, "model": "a", **damage}
    (tmp_path / "tune.json").write_text(json.dumps(kept))
    with pytest.raises(CheckpointError, match=r"tune\.json is not what gemmakit tune wrote.*--overwrite"):
        resume(tmp_path)
