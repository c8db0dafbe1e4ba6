"""Damaged files of every kind are an error of gemmakit's or load: no crash, no hang, bounded memory.

Each kind is mutated in a process of its own, under a limit of memory and time: a native parser that crashes, loops or
allocates what a file declares ends that process, and the test sees it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conversion_tools import make

import gemmakit
from gemmakit import convert_checkpoint

ROOT = Path(next(iter(gemmakit.__path__))).parent
EXAMPLES = 120
# Above what the process has before the first damaged file; the files have a few hundred kB.
LIMIT_BYTES = 400e6

FUZZ = """
import json, resource, sys, warnings
from pathlib import Path
from hypothesis import HealthCheck, given, settings, strategies as st
from gemmakit.errors import GemmakitError
from gemmakit.checkpoint import open_checkpoint
from gemmakit.text import GemmaTokenizer, GemmaTokenizerFast

warnings.simplefilter("ignore")
kind, source, name, work, count = sys.argv[1], Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])
whole = (source / name).read_bytes()
for file in source.iterdir():
    (work / file.name).write_bytes(file.read_bytes())

def use():
    if kind == "weights":
        held = open_checkpoint(work / name, allow_pickle=True)
        for key in held.names():
            held.tensor(key)
            held.tensor(key, "np")
        return
    for tokenizer in (GemmaTokenizer, GemmaTokenizerFast):
        tokenizer.from_pretrained(str(work))("Hello <bos> 1\\n\\n\\u00e9\\U0001f642")

# Where a mutation is likely to meet something: the structure at the beginning, the seams, anywhere.
place = st.integers(0, min(400, len(whole) - 1)) | st.integers(0, len(whole) - 1) | st.integers(-64, -1)
value = st.binary(min_size=1, max_size=9) | st.sampled_from([
    b"\\xff" * 8, b"\\x00" * 8, b"[" * 40,
    b'{"a":' * 20, b"\\xdf\\xff\\xff\\xff\\xff", b"99999999999999999999", b"-1", b"1e999", b"null",
    b'"', b"}", b"\\x80\\x02c",
])
change = st.tuples(st.sampled_from(["set", "insert", "delete", "cut", "copy", "swap"]), place, place, value)

def damaged(changes):
    data = bytearray(whole)
    for how, a, b, new in changes:
        a, b = a % max(1, len(data)), b % max(1, len(data))
        low, high = min(a, b), max(a, b)
        if how == "set": data[a : a + len(new)] = new
        elif how == "insert": data[a:a] = new
        elif how == "delete": del data[low : min(high, low + 200)]
        elif how == "cut": del data[a:]
        elif how == "copy": data[a:a] = data[b : b + 64]
        else: data[low : low + 32], data[high : high + 32] = data[high : high + 32], data[low : low + 32]
    return bytes(data)

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

use()
before = status("VmHWM")
# What a file declares and nobody touches is no resident memory: past this it is a MemoryError, which no test expects.
resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + 2**31, resource.RLIM_INFINITY))
outcomes = {"loaded": 0, "refused": 0}

@settings(max_examples=count, deadline=20_000, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(change, min_size=1, max_size=2))
def run(changes):
    (work / name).unlink()
    (work / name).write_bytes(damaged(changes))
    try:
        use()
        outcomes["loaded"] += 1
    except GemmakitError:
        outcomes["refused"] += 1

run()
print(json.dumps({**outcomes, "grown": status("VmHWM") - before}))
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The same small model in every kind that is read from one file, each in a folder."""
    import torch
    from conversion_tools import google_state

    folder = tmp_path_factory.mktemp("kinds")
    model = make()
    model.save_pretrained(folder / "model.safetensors")
    convert_checkpoint(folder / "model.safetensors", folder / "flax_model.msgpack", to="msgpack")
    for name in ("model.ckpt", "pytorch_model.bin"):
        (folder / name).mkdir()
        state = google_state(model) if name == "model.ckpt" else model.state_dict()
        torch.save({"model_state_dict": state} if name == "model.ckpt" else dict(state), folder / name / name)
    return folder


def fuzz(kind, source, name, work):
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, kind, source, name, work, str(EXAMPLES)],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-4000:]}"
    import json

    found = json.loads(done.stdout.splitlines()[-1])
    print(name, found)
    return found


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from Linux's /proc"),
]


@pytest.mark.parametrize("name", ["model.safetensors", "flax_model.msgpack", "model.ckpt", "pytorch_model.bin"])
def test_damaged_weights_are_refused_or_read(checkpoints, tmp_path, name):
    found = fuzz("weights", checkpoints / name, name, tmp_path / "work")
    assert found["refused"] > EXAMPLES / 10, found
    assert found["grown"] < LIMIT_BYTES, found


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_damaged_tokenizer_files_are_refused_or_read(tmp_path, name):
    source = Path(gemmakit.demo_model())
    folder = tmp_path / "in"
    folder.mkdir()
    for file in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / file).write_bytes((source / file).read_bytes())
    found = fuzz("tokenizer", folder, name, tmp_path / "work")
    assert found["refused"] > (0 if name == "chat_template.jinja" else EXAMPLES / 10), found
    assert found["grown"] < LIMIT_BYTES, found
