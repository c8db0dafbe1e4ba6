"""The environments of the programs that are measured beside: found, named where they are missing, made as listed."""

import subprocess
import sys

import environments
import flax_decode
import peer_models
import peers
import pytest

from gemmakit.errors import InputError, MissingDependency
from gemmakit.quantization import SHORT_NAMES


def test_every_peer_is_listed_with_its_versions():
    listed = environments.listed(peers.ROOT / "benchmarks" / "peers.txt")
    assert set(listed) == set(peers.MODULES) == {*peers.PEERS, *peers.FLAX_PEERS}
    assert flax_decode.PEERS == peers.FLAX_PEERS
    for name, calls in listed.items():
        assert [call[0] for call in calls if any(p.startswith("torch=") for p in call)] in ([], ["torch==2.13.0"]), name
        assert any("==" in package for package in calls[-1]), name


@pytest.mark.parametrize("scheme", [None, *SHORT_NAMES])
def test_every_scheme_of_ours_has_its_like_or_is_refused_by_name(scheme):
    told = SHORT_NAMES[scheme] if scheme else {"bits": 16}
    if told["bits"] in (5, 6):
        with pytest.raises(InputError, match=f"--quantize {scheme} has no peer"):
            peer_models.kind_of(scheme)
        return
    kind = peer_models.kind_of(scheme)
    assert kind in peer_models.GGUF_TYPES and kind in peer_models.ONNXRUNTIME_KINDS
    group = told.get("group_size")
    assert kind == {16: "16", 8: "int8", 4: "int4-g128" if group == 128 else "int4"}[told["bits"]]


def test_an_environment_is_found_once_it_is_whole(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMAKIT_PEERS", str(tmp_path))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    python = tmp_path / "openvino" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    with pytest.raises(MissingDependency, match="make peers PEERS=openvino"):
        peers.interpreter("openvino")
    (tmp_path / "openvino" / "requirements.txt").touch()
    assert peers.interpreter("openvino") == str(python)


def test_what_this_interpreter_has_is_taken_where_there_is_no_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("GEMMAKIT_PEERS", str(tmp_path))
    monkeypatch.setattr(peers, "find_spec", lambda name: name == "llama_cpp" or None)
    assert peers.interpreter("llama.cpp") == sys.executable
    with pytest.raises(MissingDependency):
        peers.interpreter("transformers")


def test_a_newer_python_is_looked_for_where_a_peer_needs_one(monkeypatch):
    monkeypatch.setattr(peers, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(peers.sys, "version_info", (3, 11, 7))
    assert (peers.base("openvino"), peers.base("gemma")) == (sys.executable, "/bin/python3.12")
    monkeypatch.setattr(peers, "which", lambda name: None)
    with pytest.raises(MissingDependency, match=r"gemma needs python3\.12"):
        peers.base("gemma")
    monkeypatch.setattr(peers.sys, "version_info", (3, 12))
    assert peers.base("gemma") == sys.executable


def test_calls_of_pip_are_made_in_order_and_once(monkeypatch, tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("# a comment\na: torch==1 ; b c==2 ; --no-deps d\n")
    called = []

    def run(command, check):
        called.append([*map(str, command)])
        (tmp_path / "a").mkdir(exist_ok=True)

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        environments.environment(tmp_path / "a", environments.listed(file)["a"])
    assert called[0][1:3] == ["-m", "venv"]
    assert [c[c.index("--disable-pip-version-check") + 1 :] for c in called[1:]] == [
        ["torch==1"], ["b", "c==2"], ["--no-deps", "d"],
    ]  # fmt: skip


def test_an_environment_that_failed_is_made_anew(monkeypatch, tmp_path):
    def failing(command, check):
        (tmp_path / "a").mkdir(exist_ok=True)
        if "pip" in command:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", failing)
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            environments.environment(tmp_path / "a", [["b"]])
    assert not (tmp_path / "a" / "requirements.txt").exists()
