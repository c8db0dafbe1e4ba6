"""A mesh of eight devices: the same numbers and tokens as one. In a process of its own, for the flag it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flax_tools import MEMBERS

SCRIPT = Path(__file__).with_name("on_eight_devices.py")


@pytest.fixture(scope="module")
def report(both, tmp_path_factory):
    folders = [str(both(shape, max_position_embeddings=256).folder) for shape in ("mqa", "mha")]
    folders.append(str(both("mha", **MEMBERS["gemma3"]).folder))
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *folders],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_are_there(report):
    assert report["devices"] == 8


@pytest.mark.parametrize("shape", ["mqa", "mha", "gemma3"])
def test_logits_and_tokens_on_eight_devices_are_those_on_one(report, shape):
    found = report[shape]
    assert found["logits_apart"] < 1e-5
    assert found["same_tokens"] is True


def test_parameters_batch_and_cache_lie_as_the_rules_say(report):
    mqa, mha = report["mqa"]["specs"], report["mha"]["specs"]
    assert mqa["q_proj"] == mha["q_proj"] == [None, "tensor"]
    assert mha["k_proj"] == [None, "tensor"]
    assert mqa["k_proj"] == []  # multi-query: its one kv head is on every device
    assert mqa["o_proj"] == ["tensor"]
    assert mqa["embedding"] == ["tensor"]
    assert mqa["norm"] == []
    assert mha["cache"] == ["data", "tensor"]
    assert mqa["cache"] == ["data"]
    assert mqa["logits"][0] == "data"


def test_a_checkpoint_is_read_part_by_part(report):
    assert report["loaded_like_sharded"] is True
    assert report["hidden_over_data"] == ["data", "tensor"]


def test_pmap_runs_a_part_of_the_batch_on_each_device(report):
    assert report["pmap_apart"] < 1e-5


def test_a_training_step_on_the_mesh_is_the_step_on_one_device(report):
    assert report["step_apart"] < 1e-4
