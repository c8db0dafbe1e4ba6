"""kill -9 and a full disk, in real processes: the previous checkpoint or the new one is there, whole."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from killing import PYTHONPATH

from gemmakit.checkpoint import open_checkpoint, read_header, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills processes by POSIX signals")

KILL_AT_EVERY_STEP = """
import os, shutil, sys
import numpy as np
from killing import kill_at
from gemmakit.checkpoint import open_checkpoint, read_header, save_checkpoint

root = sys.argv[1]

def tensors(version):
    return {f"t{i}": np.full(50 + version, version, np.float32) for i in range(6)}

def save(folder, version, limit):
    return save_checkpoint(tensors(version), folder, max_shard_size=limit, extra_files={"config.json": "same"})

def version_of(folder):
    checkpoint = open_checkpoint(folder)
    versions = {int(v) for name in checkpoint for v in checkpoint.tensor(name, "np")}
    assert len(versions) == 1 and len(checkpoint) == 6, (versions, len(checkpoint))
    (version,) = versions
    assert all(checkpoint.info(name).shape == (50 + version,) for name in checkpoint)
    for file in os.listdir(folder):
        if file.endswith(".safetensors"):
            read_header(os.path.join(folder, file))
    return version

total = {1: 0, 2: 0}
for old in ("1MB", "400B", "700B"):
    for new in ("1MB", "400B", "700B"):
        for step in range(1, 1000):
            folder = os.path.join(root, f"{old}-{new}-{step}")
            save(folder, 1, old)
            child = os.fork()
            if not child:
                kill_at(step)
                save(folder, 2, new)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            found = version_of(folder)
            if not os.WIFSIGNALED(status):
                assert found == 2
                break
            total[found] += 1
            kept = save(folder, 3, new)
            assert version_of(folder) == 3
            assert sorted(os.listdir(folder)) == sorted(["config.json", *(p.name for p in kept)]), os.listdir(folder)
            shutil.rmtree(folder)
print(total[1], total[2])
"""

SAVE_FOREVER = """
import itertools, sys
import numpy as np
from gemmakit.checkpoint import LazyTensor, save_checkpoint

def tensor(version):
    return LazyTensor("float32", (500_000,), lambda: np.full(500_000, version, np.float32))

for version in itertools.count(int(sys.argv[2])):
    limit = "1GB" if version % 3 == 0 else "7MB"
    save_checkpoint({f"t{i}": tensor(version) for i in range(15)}, sys.argv[1], max_shard_size=limit)
    print(version, flush=True)
"""


def start(code, *arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def version_of(folder):
    checkpoint = open_checkpoint(folder)
    versions = {int(v) for name in checkpoint for v in np.unique(checkpoint.tensor(name, "np"))}
    assert len(versions) == 1
    assert len(checkpoint) == 15
    for file in folder.glob("*.safetensors"):
        read_header(file)
    return versions.pop()


def test_sigkill_at_every_file_system_step_leaves_the_old_or_the_new_checkpoint(tmp_path):
    # In memory where possible: thousands of fsync calls prove nothing here and take a minute on a disk.
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as folder:
        process = start(KILL_AT_EVERY_STEP, folder)
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    old, new = map(int, out.split())
    print(f"{old} kills left the old, {new} the new")
    assert old > 50
    assert new > 20


def test_sigkill_at_random_times_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """30 MB checkpoints saved over each other without pause, nine kills."""
    rng = random.Random()
    last = 0
    for _ in range(9):
        process = start(SAVE_FOREVER, tmp_path, last + 1)
        done = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        done = int((process.communicate()[0].split() or [done])[-1])
        last = version_of(tmp_path)
        assert last in (done, done + 1)
    paths = save_checkpoint({"t": np.zeros(3)}, tmp_path)
    assert sorted(os.listdir(tmp_path)) == [path.name for path in paths]


@pytest.mark.parametrize("limit", ["1GB", "100KB"])
def test_write_that_hits_a_size_limit_leaves_the_old_checkpoint_and_no_rest(tmp_path, limit):
    save_checkpoint({"old": np.arange(10)}, tmp_path, extra_files={"config.json": "1"})
    code = """
import resource, sys
import numpy as np
from gemmakit.checkpoint import save_checkpoint
from gemmakit.errors import CheckpointError
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    tensors = {f"t{i}": np.zeros(20_000) for i in range(3)}
    tensors = {"small": np.zeros(10), **tensors}
    save_checkpoint(tensors, sys.argv[1], max_shard_size=sys.argv[2], extra_files={"config.json": "2"})
except CheckpointError as error:
    print(error)
"""
    out, err = start(code, tmp_path, limit).communicate()
    assert "failed: File too large" in out, err
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert open_checkpoint(tmp_path).names() == ["old"]
    assert (tmp_path / "config.json").read_text() == "1"


FILL_THE_DISK = """
import json, os, sys
import numpy as np
from gemmakit.checkpoint import LazyTensor, open_checkpoint, save_checkpoint
from gemmakit.errors import CheckpointError

folder = os.path.join(sys.argv[1], "model")
save_checkpoint({"old": np.arange(1000)}, folder, max_shard_size=sys.argv[2])
before = sorted(os.listdir(folder))

def fill():
    try:
        with open(os.path.join(sys.argv[1], "ballast"), "wb", buffering=0) as file:
            while file.write(b"x" * 65536):
                pass
    except OSError:
        pass
    return np.zeros(250_000)

small = {f"s{i}": np.ones(1000) for i in range(5)}
messages = []
for last in (LazyTensor("float64", (250_000,), fill), LazyTensor("float64", (250_000_000,), fill)):
    try:
        save_checkpoint({**small, "last": last}, folder, max_shard_size=sys.argv[2])
    except CheckpointError as error:
        messages.append(str(error))
    assert sorted(os.listdir(folder)) == before
    assert open_checkpoint(folder).names() == ["old"]
    os.path.exists(os.path.join(sys.argv[1], "ballast")) and os.remove(os.path.join(sys.argv[1], "ballast"))
save_checkpoint({**small, "last": np.zeros(250_000)}, folder)
print(json.dumps(messages))
"""


@pytest.mark.parametrize("limit", ["1GB", "16KB"])
def test_disk_that_fills_up_while_saving_leaves_the_old_checkpoint_and_no_rest(tmp_path, limit):
    inner = f'mount -t tmpfs -o size=6m none {tmp_path} && exec {sys.executable} -c "$CODE" {tmp_path} {limit}'
    if (
        not shutil.which("unshare")
        or subprocess.run(
            ["unshare", "-Urm", "sh", "-c", f"mount -t tmpfs none {tmp_path}"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a tmpfs in a namespace of its own")
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", inner],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "CODE": FILL_THE_DISK},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    filled, too_big = json.loads(done.stdout)
    assert "No space left on device" in filled
    assert "needs 2000" in too_big


def test_savers_of_the_same_directory_take_turns(tmp_path):
    """All ranks of a job saving to one place: whichever is last, the result is one whole checkpoint without rests."""
    code = SAVE_FOREVER.replace("itertools.count(int(sys.argv[2]))", "range(int(sys.argv[2]), int(sys.argv[2]) + 3)")
    processes = [start(code, tmp_path, 10 * rank) for rank in range(1, 4)]
    errors = [process.communicate()[1] for process in processes]
    assert errors == ["", "", ""]
    assert version_of(tmp_path) in (12, 22, 32)
    live = {path.name for path in open_checkpoint(tmp_path).files}
    assert {name for name in os.listdir(tmp_path) if not name.endswith(".json")} == live
