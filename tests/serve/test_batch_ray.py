"""gemmakit batch --ray: a cluster's nodes die, and every row is answered once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from gemmakit.cli import main

ray = pytest.importorskip("ray", reason="pip install 'gemmakit[ray]' runs it")


@pytest.fixture(autouse=True)
def busy_machine(monkeypatch):
    """Ray's own niceness, with which actors do not get round to loading a model beside other work, and its 30 s."""
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "240")


def batch(*arguments, **environ):
    line = [sys.executable, "-m", "gemmakit.cli", "batch", *map(str, arguments)]
    told = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environ}
    return subprocess.Popen(line, env=told, stderr=subprocess.PIPE, text=True)


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


def test_without_a_cluster_it_says_how_to_start_one(tmp_path, monkeypatch, capfd):
    """On a machine that has one too: Ray looks among the processes and in its own folder, and here finds none."""
    monkeypatch.setattr("ray._private.services._find_address_from_flag", lambda flag: set())
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    assert main(["batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--ray"]) == 2
    assert "ray start --head" in capfd.readouterr().err


@pytest.mark.slow  # a cluster of three nodes on this machine, each with a model
def test_a_node_that_dies_twice_loses_no_row_and_doubles_none(tmp_path):
    from ray.cluster_utils import Cluster

    rows = [{"prompt": f"If the file {i}", "custom_id": f"id {i}", "max_tokens": 16 + i % 9} for i in range(400)]
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = batch(source, tmp_path / "alone.jsonl")
    assert alone.wait(600) == 0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        started = batch(source, tmp_path / "out.jsonl", "--ray", "--actors", 2, RAY_ADDRESS=cluster.address)
        for done in (40, 160):
            while len(lines(tmp_path / "out.jsonl")) < done:
                assert started.poll() is None, started.communicate()[1]
                time.sleep(0.05)
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
        assert started.wait(600) == 0, started.communicate()[1]
    finally:
        cluster.shutdown()
    said, want = ([json.loads(line) for line in lines(tmp_path / name)] for name in ("out.jsonl", "alone.jsonl"))
    assert sorted(line["custom_id"] for line in said) == sorted(row["custom_id"] for row in rows)
    assert {line["custom_id"]: line["text"] for line in said} == {line["custom_id"]: line["text"] for line in want}
