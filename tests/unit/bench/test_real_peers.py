"""The programs of `make peers`, each on the tiny shape: the same fields as ours, in every kind of weights."""

import json
import sys

import compare
import cpu_peers
import peer_models
import peers
import pytest
import rows
import torch
from rounds import run_command

import gemmakit
from gemmakit.bench import timing
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
def test_a_peer_is_measured_as_gemmakit_is(peer, scheme):
    needs(peer)
    chosen = ["--size", "tiny", "--peer", peer, "--context", "0,32", "--prompt", "8", "--new", "3"]
    made = compare.compared(compare.arguments().parse_args([*QUICK, *chosen, *[f"--quantize={scheme}"] * bool(scheme)]))
    (theirs,) = (run_command(side.command) for side in made.peers)
    assert set(theirs) >= FIELDS
    if peer in ("openvino", "onnxruntime"):
        assert theirs["file_gb"] > 0
        assert theirs["head_dtype"] in ({"int8"} if scheme else {"bfloat16", "float16", "float32"})


@pytest.mark.parametrize("peer", ["openvino", "onnxruntime", "llama.cpp"])
def test_a_peer_reads_the_same_weights(peer, tmp_path):
    """It says the demo model's own words: theirs lead by more than any rounding to 16 bits is off."""
    needs(peer)
    path = tmp_path / "r.json"
    assert compare.main([*QUICK, "--peer", peer, "--json", str(path), "--prompt", "8", "--new", "3"]) == 0
    result = json.loads(path.read_text())
    assert not result["failed"], result["failed"]
    theirs = next(side for label, side in result["sides"].items() if label != result["ours"])
    model = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model(), dtype="float32")
    ids = timing.prompt_ids(8, model.config.vocab_size)
    said = model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, eos_token_id=[])[0].tolist()[8:]
    assert theirs["first_ids"] == said


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


def test_a_part_of_the_readme_has_every_peer(tmp_path, monkeypatch):
    for peer in peers.PEERS:
        needs(peer)
    part = cpu_peers.PARTS["int4-g128"]
    asked = [*QUICK, "--size", "tiny", "--out", str(tmp_path), "--part", "int4-g128"]
    monkeypatch.setattr(sys, "argv", ["cpu_peers.py", *asked])
    cpu_peers.main()
    result = json.loads((tmp_path / f"{part['file']}.json").read_text())
    assert not result["failed"], result["failed"]
    assert {label.split()[0].lower() for label in result["sides"]} == {"gemmakit", *(name for name, _ in part["peers"])}
