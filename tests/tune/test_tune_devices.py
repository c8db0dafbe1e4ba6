"""Two processes that share weights and rows learn what one learns, and one goes on where two were cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from parallel.together import together
from safetensors.torch import load_file
from tune_tools import WORDS, write

from gemmakit.errors import InputError
from gemmakit.tune import TuneSettings, resume, tune
from gemmakit.tune.report import read_metrics
from gemmakit.tune.state import load as load_state

# float32: gradients summed in another order, and what six steps of Adam make of that.
CLOSE = 1e-5
METHODS = {
    "lora": dict(rank=4, lr=1e-2),
    "full": dict(method="full", lr=1e-3, ema=0.9),
    "dora": dict(method="dora", rank=4, lr=1e-2, checkpointing=True),
    "bfloat16": dict(method="full", dtype="bfloat16", lr=1e-3),
    "int8": dict(quantization="int8", rank=4, lr=1e-2),
    "packed": dict(packing=True, rank=4, lr=1e-2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Seven rows of uneven lengths: a pass of three is split two to one, the last of an epoch one to none."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"Say {w}", "completion": " ".join(WORDS[: 1 + i])} for i, w in enumerate(WORDS[:7])]
    write(folder / "train.jsonl", rows)
    write(folder / "valid.jsonl", rows[:2])
    return folder


def settings(tiny, data, out, method):
    common = dict(model=str(tiny), data=str(data), out=str(out), batch_size=3, max_steps=6, save_steps=2, eval_steps=3)
    return {**common, "accumulate": 1 if method == "packed" else 2, **METHODS[method]}


def cut(step, total):
    if step.step == 3:
        raise KeyboardInterrupt


def numbers(folder, name):
    return [record[name] for record in read_metrics(folder) if name in record]


def weights(folder):
    lora = Path(folder, "adapter_model.safetensors")
    return load_file(lora if lora.exists() else Path(folder, "model.safetensors"))


def same(ours, theirs, tolerance):
    for name in ("loss", "valid_loss", "accuracy", "gradient"):
        assert numbers(ours, name) == pytest.approx(numbers(theirs, name), rel=tolerance), name
    assert numbers(ours, "tokens") and len(numbers(ours, "loss")) == 6
    found, expected = weights(ours), weights(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # steps of Adam are as large as lr, whatever the gradient's rounding
        torch.testing.assert_close(found[name].float(), tensor.float(), rtol=0.0, atol=100 * tolerance, msg=name)


def run(tiny, data, folder, methods):
    asked = {method: settings(tiny, data, folder / method, method) for method in methods}
    for method, values in asked.items():
        one = {**values, "out": str(folder / f"{method}-one-cut")}
        with suppress(KeyboardInterrupt):
            tune(TuneSettings.from_dict(one, "a test"), tell=cut)
    ranks = together(Path(__file__).with_name("devices_script.py"), *map(json.dumps, asked.values()))
    assert ranks == [0, 1]
    for method, values in asked.items():
        whole = folder / f"{method}-one"
        tune(TuneSettings.from_dict({**values, "out": str(whole)}, "a test"))
        # Weights in bfloat16 are rounded at random, by other numbers in each process.
        tolerance = 0.05 if method == "bfloat16" else CLOSE
        same(folder / method, whole, tolerance)
        same(folder / f"{method}-one-cut", whole, tolerance)
        assert not (folder / f"{method}-cut" / "adapter_config.json").exists()
        in_parts(folder / f"{method}-cut")
        assert resume(folder / f"{method}-cut").finished
        same(folder / f"{method}-cut", whole, tolerance)


def in_parts(folder):
    """Each process wrote its own, and nobody the whole."""
    (parts,) = folder.glob("state*")
    assert parts.name == "state-00000002.parts"
    sizes = [path.stat().st_size for path in sorted(parts.glob("*.distcp"))]
    assert len(sizes) == 2 and max(sizes) < 0.75 * sum(sizes)


def test_two_processes_learn_what_one_does_and_go_on_from_one_as_one_from_two(tiny, data, tmp_path):
    run(tiny, data, tmp_path, ["lora"])


@pytest.mark.slow
def test_two_processes_learn_what_one_does_by_the_other_methods(tiny, data, tmp_path):
    run(tiny, data, tmp_path, ["full", "dora", "bfloat16", "int8", "packed"])


def test_other_processes_than_were_asked_for_are_refused(tiny, data, tmp_path):
    asked = settings(tiny, data, tmp_path / "out", "lora")
    with pytest.raises(InputError, match=r"devices is 2, but 1 processes run: .*--devices 2"):
        tune(TuneSettings.from_dict({**asked, "devices": 2}, "a test"))
    with pytest.raises(InputError, match="--loss dpo runs in one process"):
        TuneSettings.from_dict({**asked, "devices": 2, "loss": "dpo"}, "a test")
    assert not (tmp_path / "out").exists()


def started(*arguments):
    """The command, in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "gemmakit.cli", "tune", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a command's processes where Linux lists them")
def test_a_process_that_dies_ends_the_run_and_fewer_go_on(tiny, data, tmp_path):
    out = tmp_path / "out"
    asked = (tiny, data, "--out", out, "--batch-size", 3, "--rank", 4, "--max-steps", 400, "--save-steps", 1)
    run = started(*asked, "--devices", 2)
    end = time.monotonic() + 200
    while not list(out.glob("state-*.parts")) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    assert run.poll() is None, run.communicate()
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    second = next(pid for pid in children if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(int(second), signal.SIGKILL)
    _, told = run.communicate(timeout=60)
    lines = [line for line in told.splitlines() if "step " not in line]
    assert run.returncode == 2 and all(line.startswith("gemmakit: ") for line in lines), told
    assert f"gemmakit tune {out} --resume" in told
    assert f"process 2 of 2 was ended by signal {int(signal.SIGKILL)}" in told
    before = load_state(out).step
    assert 0 < before < 400
    kept = json.loads((out / "tune.json").read_text())
    (out / "tune.json").write_text(json.dumps({**kept, "settings": {**kept["settings"], "max_steps": before + 2}}))
    assert resume(out).finished
    assert load_state(out).step == before + 2
