"""A conversion holds about one tensor: anonymous memory stays under 1.3 times the largest file written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import gemmakit

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from Linux's /proc"),
]
ROOT = Path(next(iter(gemmakit.__path__))).parent

# 16 kB pieces for what flax cuts at 1 GiB, so that the embedding lies in chunks as in files of released size.
CONVERT = """
import json, sys, threading, time
from pathlib import Path
import torch
import gemmakit
from gemmakit import convert_checkpoint
from gemmakit.checkpoint.formats import msgpack
import gemmakit.text, gemmakit.checkpoint.formats.gguf_writing, gemmakit.text.gguf
source, out, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
msgpack.CHUNK_BYTES = 2**24
torch.set_num_threads(1)
torch.zeros(10, dtype=torch.float32).to(torch.bfloat16)

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

before = peak = anonymous()
running = True
def watch():
    global peak
    while running:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
paths = convert_checkpoint(source, out, **options)
running = False
thread.join()
print(peak - before, max(path.stat().st_size for path in paths))
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """400 MB of float32 in every kind; the embedding alone has 164 MB."""
    import torch
    from conversion_tools import google_state, make

    folder = tmp_path_factory.mktemp("sources")
    model = make(vocab_size=40_000, hidden_size=1024, intermediate_size=8192, num_hidden_layers=2, head_dim=64)
    model.save_pretrained(folder / "safetensors")
    model.config.save_pretrained(folder)
    torch.save({"model_state_dict": google_state(model)}, folder / "model.ckpt")
    yield folder
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()


@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        ("model.ckpt", "a", {}),
        ("model.ckpt", "b", {"dtype": "bfloat16", "max_shard_size": "60MB"}),
        ("safetensors", "msgpack", {"to": "msgpack", "max_shard_size": "60MB"}),
        ("safetensors", "d", {"to": "msgpack", "dtype": "float16", "max_shard_size": "60MB"}),
        ("msgpack", "e", {"max_shard_size": "60MB"}),
        ("msgpack", "f", {"dtype": "bfloat16", "max_shard_size": "60MB"}),
    ],
)
def test_peak_memory_is_below_1_3_times_the_largest_shard(sources, source, target, options):
    import json

    done = subprocess.run(
        [sys.executable, "-c", CONVERT, sources / source, sources / target, json.dumps(options)],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    grown, largest = map(int, done.stdout.split())
    assert grown < 1.3 * largest, f"{grown / 1e6:.0f} MB beside a shard of {largest / 1e6:.0f} MB"
    print(f"{source} -> {target}: {grown / 1e6:.0f} MB, largest shard {largest / 1e6:.0f} MB")
