"""The programs of `make peers`, each on the tiny shape: the same fields as ours, in every kind of weights."""

import json
import sys

import compare
import cpu_peers
import peer_models
import peers
import pytest
import rows

from gemmakit.errors import MissingDependency

pytestmark = pytest.mark.slow
QUICK = ("--quick", "--rounds", "1", "--repeats", "1", "--threads", "1")
FIELDS = {"side", "import_s", "load_s", "first_token_s", "prefill_tokens_per_s", "decode_tokens_per_s",
          "decode_tokens_per_s_after_32", "anonymous_gb", "peak_rss_gb"}  # fmt: skip
SCHEMES = (None, "int8", "int4", "int4-g128")


def needs(peer):
    try:
        peers.interpreter(peer)
    except MissingDependency as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Checkpoints and what is written from them, once for all tests here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMAKIT_BENCH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("peer", peers.PEERS)
def test_a_peer_is_measured_as_gemmakit_is(peer, scheme, tmp_path, capsys):
    needs(peer)
    path = tmp_path / "r.json"
    chosen = ["--size", "tiny", "--peer", peer, "--json", str(path), "--context", "0,32", "--prompt", "8", "--new", "3"]
    assert compare.main([*QUICK, *chosen, *([] if scheme is None else ["--quantize", scheme])]) == 0
    result = json.loads(path.read_text())
    assert not result["failed"], result["failed"]
    ours, theirs = result["sides"].values()
    assert set(theirs) >= FIELDS
    assert f"{result['ours']} / " in capsys.readouterr().out
    if peer in ("openvino", "onnxruntime"):
        assert theirs["file_gb"] > 0
        wanted = {"int8"} if scheme else {"bfloat16", "float16", "float32"}
        assert theirs["head_dtype"] in wanted and (scheme is None or ours["head_dtype"] == "int8")


def test_what_was_written_is_kept(monkeypatch):
    for peer in ("openvino", "onnxruntime"):
        needs(peer)
        written = getattr(peer_models, peer)
        checkpoint = compare.cached_random("tiny")
        folder = written(checkpoint, "int8")
        with monkeypatch.context() as patch:
            patch.setattr(peer_models, "run_command", pytest.fail)
            assert written(checkpoint, "int8") == folder


def test_rows_are_measured_beside_the_batches_of_others(tmp_path, monkeypatch):
    for peer in ("openvino", "llama.cpp"):
        needs(peer)
    path = tmp_path / "rows.json"
    asked = ["--size", "tiny", "--layers", "2", "--rows", "1", "3", "--prompt", "8", "--new", "6", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["rows.py", *asked, "--threads", "1", "--out", str(path)])
    rows.main()
    result = json.loads(path.read_text())
    for kind, theirs in {"bf16": "16 bits", "int8": "int8", "int4": "int4"}.items():
        assert not result[kind]["failed"], result[kind]["failed"]
        for label in ("gemmakit", f"llama.cpp {rows.KINDS[kind][1]}", f"OpenVINO {theirs}"):
            assert set(result[kind][label]["tokens_per_s"]) == {"1", "3"}


def test_the_readme_s_parts_have_every_peer(tmp_path, monkeypatch):
    for peer in peers.PEERS:
        needs(peer)
    parts = ["bf16", "int8", "int4", "int4-g128", "prefill", "prefill-int8", "prefill-int4"]
    asked = [*QUICK, "--size", "tiny", "--out", str(tmp_path), "--part", *parts]
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", *asked])
    cpu_peers.main()
    for part in parts:
        result = json.loads((tmp_path / f"{cpu_peers.PARTS[part]['file']}.json").read_text())
        assert not result["failed"], result["failed"]
        wanted = {program for program, _ in cpu_peers.PARTS[part]["peers"]} - {"transformers"}
        assert {label.split()[0].lower() for label in result["sides"]} >= {"gemmakit", *wanted}
