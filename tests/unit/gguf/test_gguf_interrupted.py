"""kill -9, a full disk and other failures while a GGUF is written: the old file or the new one is there, whole."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from gguf_models import CONFIG, tensors_of, vocabulary
from killing import PYTHONPATH

import gemmakit
from gemmakit.checkpoint import LazyTensor
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.errors import CheckpointError, InputError

KILL_AT_EVERY_STEP = """
import os, sys
import numpy as np
from killing import kill_at
from gemmakit import GemmaConfig
from gemmakit.checkpoint.layout import tensor_shapes
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.gguf import read_gguf_header
from gemmakit.gguf_settings import Entry, Vocabulary

folder = sys.argv[1]
path = os.path.join(folder, "x.gguf")
config = GemmaConfig(vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, head_dim=32)
words = Vocabulary([Entry("<unk>", 0.0, 2), Entry("<bos>", 0.0, 3), Entry("<eos>", 0.0, 3)])

def write(version):
    tensors = {n: np.full(s, version, np.float32) for n, s in tensor_shapes(config).items()}
    write_gguf(path, config, tensors, words, "F32", name=f"version {version}")

def version():
    header = read_gguf_header(path)
    (last,) = [t for n, t in header.tensors.items() if n == "output_norm.weight"]
    with open(path, "rb") as file:
        file.seek(last.begin)
        number = int(np.frombuffer(file.read(4), np.float32)[0]) - 1
    assert header.metadata["general.name"] == f"version {number}"
    return number

write(1)
write(1)  # everything that is imported late is imported now
counts = {1: 0, 2: 0}
for step in range(1, 1000):
    child = os.fork()
    if not child:
        kill_at(step)
        write(2)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = version()
    counts[found] += 1
    if not os.WIFSIGNALED(status):
        assert found == 2
        break
    write(1)
    assert os.listdir(folder) == ["x.gguf"], os.listdir(folder)
print(counts[1], counts[2])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="kills processes by POSIX signals")
def test_sigkill_at_every_file_system_step_leaves_the_old_or_the_new_file(tmp_path):
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    old, new = map(int, done.stdout.split())
    print(f"{old} kills left the old file, {new} the new one")
    assert old >= 5
    assert new >= 1


def test_too_small_a_disk_is_known_before_anything_is_written(model, files, tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    shutil.copy(files["F32"], path)
    before = path.read_bytes()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs \d+ bytes.*1000 bytes free"):
        write_gguf(path, model.config, tensors_of(model), vocabulary(), "F32")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.skipif(sys.platform == "win32", reason="limits of file sizes are POSIX's")
def test_a_disk_that_fills_up_on_the_way_leaves_the_old_file(model, files, tmp_path):
    path = tmp_path / "x.gguf"
    shutil.copy(files["Q4_0"], path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    try:
        with pytest.raises(CheckpointError, match="failed: File too large"):
            write_gguf(path, model.config, tensors_of(model), vocabulary(), "F32")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_an_error_in_a_tensor_leaves_the_old_file(model, files, tmp_path):
    path = tmp_path / "x.gguf"
    shutil.copy(files["F32"], path)
    before = path.read_bytes()

    def broken():
        raise RuntimeError("cannot be made")

    held = {**tensors_of(model), "model.norm.weight": LazyTensor("float32", (64,), broken)}
    with pytest.raises(RuntimeError, match="cannot be made"):
        write_gguf(path, model.config, held, vocabulary(), "F32")
    shorter = {**held, "model.norm.weight": LazyTensor("float32", (64,), lambda: np.zeros(63, np.float32))}
    with pytest.raises(InputError, match="252 bytes, and 256 were announced"):
        write_gguf(path, model.config, shorter, vocabulary(), "F32")
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]


def test_a_file_is_written_over_the_one_its_tensors_are_mapped_from(model, files, tmp_path):
    path = tmp_path / "x.gguf"
    shutil.copy(files["BF16"], path)
    loaded = gemmakit.GemmaForCausalLM.from_pretrained(path)
    write_gguf(path, loaded.config, tensors_of(loaded), vocabulary(), "BF16", name="BF16")
    assert path.read_bytes() == files["BF16"].read_bytes()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"])
def test_writing_takes_a_few_megabytes_beside_the_tensors(tmp_path, kind):
    """Matrices of 64 MB each, mapped from a file."""
    config = gemmakit.GemmaConfig(**{**CONFIG, "hidden_size": 512, "vocab_size": 32768, "intermediate_size": 32768})
    zeros = tmp_path / "zeros"
    with zeros.open("wb") as file:
        file.truncate(2**26)

    def mapped(shape):
        return lambda: np.memmap(zeros, np.float32, "r", shape=shape)

    held = {name: LazyTensor("float32", shape, mapped(shape)) for name, shape in tensor_shapes(config).items()}
    vocabulary()
    tracemalloc.start()
    write_gguf(tmp_path / "x.gguf", config, held, vocabulary(), kind)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000  # a million numbers in a few widths, and the words of the header
