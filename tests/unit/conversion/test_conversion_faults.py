"""Bad input is one clear error before anything is written: rows 4 to 8, 10, 17 and 19 of the table of faults."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from conversion_tools import assert_same_bits, google_state, listing, make, state_of, write_google
from killing import PYTHONPATH

import gemmakit
from gemmakit import convert_checkpoint, convert_tokenizer
from gemmakit.errors import (
    CheckpointError,
    ConfigError,
    GemmakitError,
    InputError,
    NotEnoughMemory,
    TokenizerError,
    UnsafeFile,
)


def refused(kind, match, source, out, **options):
    """The error, and nothing written, not even the folder."""
    before = listing(out) if out.exists() else None
    with pytest.raises(kind, match=match) as error:
        convert_checkpoint(source, out, **options)
    assert isinstance(error.value, GemmakitError)
    assert (listing(out) if out.exists() else None) == before
    return str(error.value)


# -- Google's .ckpt ----------------------------------------------------------------------------------------------------

QKV = "model.layers.1.self_attn.qkv_proj.weight"
O = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model.layers.0.mlp.surprise.weight": torch.zeros(2)}, r"holds 'model\.layers\.0\.mlp\.surprise\.weight'"),
        ({"embedder.weight_scaler": torch.zeros(2)}, "quantized"),
        ({"model.layers.1.mlp.up_proj.weight": None}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
        ({"embedder.weight": None}, r"lacks model\.embed_tokens\.weight"),
        ({O: None}, r"lacks 'model\.layers\.0\.self_attn\.o_proj\.weight'"),
        ({QKV: torch.zeros(97, 40)}, r"qkv_proj\.weight has shape \(97, 40\)"),
        ({QKV: torch.zeros(120, 40)}, r"k_proj\.weight has shape \(36, 40\), expected \(24, 40\)"),
        ({QKV: torch.zeros(40)}, r"qkv_proj\.weight has shape \(40,\)"),
        ({"model.norm.weight": torch.zeros(41)}, r"norm\.weight has shape \(41,\), expected \(40,\)"),
        ({"layers.0.input_layernorm.weight": torch.zeros(40)}, "two tensors are called"),
    ],
)
def test_an_unknown_missing_or_misshapen_tensor_of_a_ckpt_is_named(tmp_path, changes, says):
    refused(CheckpointError, says, write_google(make(), tmp_path / "in", **changes), tmp_path / "out")


@pytest.mark.parametrize("content", [[1, 2], {"model_state_dict": [1]}, {"a": 1}, {"model_state_dict": {"a": "b"}}, 7])
def test_a_ckpt_that_is_no_mapping_of_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "model.ckpt")
    refused(CheckpointError, "does not hold a plain mapping", tmp_path / "model.ckpt", tmp_path / "out")


def test_a_truncated_ckpt_is_refused(tmp_path):
    data = write_google(make(), tmp_path / "in").read_bytes()
    path = tmp_path / "in" / "model.ckpt"
    for share in (0.0, 0.01, 0.3, 0.9, 0.999):
        path.write_bytes(data[: int(share * len(data))])
        refused(CheckpointError, r"model\.ckpt", path, tmp_path / "out")


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("whole", [True, False])
def test_a_pickle_that_carries_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    content = {"model_state_dict": {**google_state(make()), "extra": Evil()}}
    if whole:
        torch.save(content, "model.ckpt")
    else:
        Path("model.ckpt").write_bytes(pickle.dumps(content["model_state_dict"]["extra"]))
    refused(UnsafeFile, "more than tensors", tmp_path / "model.ckpt", tmp_path / "out")
    refused(UnsafeFile, "more than tensors", tmp_path / "model.ckpt", tmp_path / "out", allow_pickle=True)
    assert not Path("executed").exists()


@pytest.mark.parametrize("name", ["model.ckpt", "pytorch_model.bin"])
def test_a_pickle_found_in_a_folder_is_read_only_when_asked_for(tmp_path, name):
    model = make()
    path = write_google(model, tmp_path / "in")
    path.rename(path.with_name(name))
    refused(UnsafeFile, "pickle", tmp_path / "in", tmp_path / "out")
    if name.endswith(".ckpt"):
        convert_checkpoint(tmp_path / "in", tmp_path / "out", allow_pickle=True)
        assert_same_bits(state_of(tmp_path / "out"), model.state_dict())
        shutil.copy(path, path.with_name("b.ckpt"))
        refused(CheckpointError, r"2 \.ckpt files", tmp_path / "in", tmp_path / "other", allow_pickle=True)


def test_a_model_of_another_size_than_said_is_refused(tmp_path):
    path = write_google(make(), tmp_path / "in")
    refused(InputError, "a 7B model has", path, tmp_path / "out", model_size="7B")
    refused(InputError, "model_size is '9B'", path, tmp_path / "out", model_size="9B")
    (tmp_path / "in" / "config.json").unlink()
    refused(CheckpointError, r"no released Gemma.*--config", path, tmp_path / "out")
    refused(
        CheckpointError, r"has shape \(130, 40\), expected \(256000, 3072\)", path, tmp_path / "out", model_size="7B"
    )


def hollow_release(size, layers=None):
    """The names and shapes of a released checkpoint; every number is the same one, so the file is small."""
    config = gemmakit.GemmaConfig.preset(size, **({} if layers is None else {"num_hidden_layers": layers}))
    D, F, N, K, H = (config.hidden_size, config.intermediate_size, config.num_attention_heads,
                     config.num_key_value_heads, config.head_dim)  # fmt: skip
    shapes = {"embedder.weight": (config.vocab_size, D), "model.norm.weight": (D,), "freqs_cis": (4, 2)}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}"
        shapes |= {
            f"{at}.self_attn.qkv_proj.weight": ((N + 2 * K) * H, D), f"{at}.self_attn.o_proj.weight": (D, N * H),
            f"{at}.mlp.gate_proj.weight": (F, D), f"{at}.mlp.up_proj.weight": (F, D),
            f"{at}.mlp.down_proj.weight": (D, F), **{f"{at}.{norm}.weight": (D,) for norm in config.kind.norms if norm},
        }  # fmt: skip
        if config.kind.q_norm:
            shapes |= {f"{at}.self_attn.{part}_norm.weight": (H,) for part in ("query", "key")}
    number = torch.zeros((), dtype=torch.bfloat16)
    return {"model_state_dict": {name: number.expand(shape) for name, shape in shapes.items()}}


@pytest.mark.parametrize("size", ["2B", "7B"])
def test_the_released_sizes_are_known_without_a_config_and_checked_against_what_is_said(tmp_path, size):
    from gemmakit.conversion.sources import open_source

    torch.save(hollow_release(size.lower()), tmp_path / "model.ckpt")
    for said in (None, size):
        found = open_source(tmp_path / "model.ckpt", model_size=said)
        assert (found.config.hidden_size, found.kind) == ({"2B": 2048, "7B": 3072}[size], "google")
        assert found.parameters == {"2B": 2_506_172_416, "7B": 8_537_680_896}[size]
        assert "lm_head.weight" not in found.names
    other = {"2B": "7B", "7B": "2B"}[size]
    refused(InputError, f"is a {size} model", tmp_path / "model.ckpt", tmp_path / "out", model_size=other)
    torch.save(hollow_release(size.lower(), layers=5), tmp_path / "model.ckpt")
    refused(CheckpointError, r"lacks model\.layers\.5", tmp_path / "model.ckpt", tmp_path / "out", model_size=size)


@pytest.mark.parametrize("size", ["gemma2-9b", "gemma3-270m", "gemma3-4b"])
def test_released_sizes_of_later_members_are_known_by_norms_and_width(tmp_path, size):
    from gemmakit.conversion.sources import open_source

    torch.save(hollow_release(size), tmp_path / "model.ckpt")
    found = open_source(tmp_path / "model.ckpt").config
    preset = gemmakit.GemmaConfig.preset(size)
    assert [found.layer(i) for i in range(8)] == [preset.layer(i) for i in range(8)]
    assert (found.model_type, found.num_hidden_layers) == (preset.model_type, preset.num_hidden_layers)


# -- msgpack -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def msgpack_folder(tmp_path):
    make().save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "in", to="msgpack")
    return tmp_path / "in"


def test_every_truncation_of_msgpack_is_refused(msgpack_folder, tmp_path):
    path = msgpack_folder / "flax_model.msgpack"
    data = path.read_bytes()
    for size in (*range(60), *range(60, len(data), 977), len(data) - 1):
        path.write_bytes(data[:size])
        refused(CheckpointError, "is no Flax msgpack", msgpack_folder, tmp_path / "out")
    path.write_bytes(data + b"\0")
    refused(CheckpointError, "its tree ends at byte", msgpack_folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\xdf\xff\xff\xff\xff", "truncated"),
        (b"\x81\xdb\xff\xff\xff\xff", "at most 4096"),
        (b"\x81\xa1a\xc9\xff\xff\xff\xff\x01", "truncated"),
        (b"\x81\xa1a" * 40, "levels deep"),
        (b"\x81\xa1a\xc7\x02\x05\x00\x00", "extension of code 5"),
        (b"\x81\xa1a\xc4\x00", "an array expected"),
        (b"\x81\xa1a\x80", "no arrays"),
        (b"\x81\xa1\xff\x80", "not UTF-8"),
        (b"\x90", "a tree of names expected"),
        (b"\x81\xa1a\xc7\x0c\x01\x93\x91\x04\xa7float32\xc4\x00", "truncated|needs 16 bytes"),
        (b"\x81\xa1a\xc7\x15\x01\x93\x91\xcf" + b"\xff" * 8 + b"\xa7float32\xc4\x00", "needs|truncated"),
        (b"\x81\xa1a\xc7\x0a\x01\x93\x90\xa6object\xc4\x00", "unknown dtype 'object'"),
        (b"", "empty"),
    ],
)
def test_hostile_msgpack_is_refused_in_little_memory(msgpack_folder, tmp_path, data, says):
    (msgpack_folder / "flax_model.msgpack").write_bytes(data)
    tracemalloc.start()
    try:
        refused(CheckpointError, says, msgpack_folder, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


def test_a_msgpack_index_that_leaves_its_folder_or_lies_is_refused(tmp_path):
    make().save_pretrained(tmp_path / "a")
    convert_checkpoint(tmp_path / "a", tmp_path / "in", to="msgpack", max_shard_size="9KB")
    index = tmp_path / "in" / "flax_model.msgpack.index.json"
    content = json.loads(index.read_text())
    names = sorted(set(content["weight_map"].values()))

    def pointing(**changed):
        index.write_text(json.dumps({"weight_map": {**content["weight_map"], **changed}}))

    pointing(**{"model/norm/weight": "../flax_model.msgpack"})
    refused(UnsafeFile, "flax_model", tmp_path / "in", tmp_path / "out")
    pointing(**{"model/norm/weight": names[0]})
    refused(CheckpointError, r"holds tensor 'model\.norm\.weight'", tmp_path / "in", tmp_path / "out")
    pointing(**{"model/norm/weight": "weights.pickle"})
    refused(UnsafeFile, "no weights file", tmp_path / "in", tmp_path / "out")
    pointing()
    (tmp_path / "in" / names[-1]).unlink()
    refused(CheckpointError, names[-1], tmp_path / "in", tmp_path / "out")


# -- Orbax -------------------------------------------------------------------------------------------------------------


def test_orbax_without_jax_says_what_to_install(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "_METADATA").write_text("{}")
    code = (
        "import sys; sys.modules['jax'] = sys.modules['orbax'] = None\n"
        "from gemmakit import convert_checkpoint\n"
        "from gemmakit.errors import MissingDependency\n"
        "try: convert_checkpoint(sys.argv[1], sys.argv[2])\n"
        "except MissingDependency as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    assert "pip install 'gemmakit[flax]'" in done.stdout, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_orbax_folder_is_refused(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "_METADATA").write_text("{")
    refused(CheckpointError, "Orbax", tmp_path / "in", tmp_path / "out")


# -- safetensors, configurations, tokenizers ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    make().save_pretrained(tmp_path / "in", max_shard_size="9KB")
    return tmp_path / "in"


def test_truncated_missing_and_straying_shards_are_refused(folder, tmp_path):
    shards = sorted(folder.glob("*.safetensors"))
    data = shards[1].read_bytes()
    shards[1].write_bytes(data[:-5])
    assert "bytes" in refused(CheckpointError, shards[1].name, folder, tmp_path / "out")
    shards[1].unlink()
    refused(CheckpointError, shards[1].name, folder, tmp_path / "out")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "/etc/passwd.safetensors"}}))
    refused(UnsafeFile, "passwd", folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ({"model_type": "llama"}, ConfigError, "llama"),
        ({"head_dim": 0}, ConfigError, "head_dim"),
        ({"num_hidden_layers": 3}, CheckpointError, r"lacks model\.layers\.2"),
        ({"num_hidden_layers": 1}, CheckpointError, r"holds model\.layers\.1"),
        ({"vocab_size": 131}, CheckpointError, r"\(130, 40\), expected \(131, 40\)"),
        ({"tie_word_embeddings": False}, CheckpointError, r"lacks lm_head\.weight"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, values, kind, says):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    refused(kind, says, folder, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_malformed_small_files_are_refused(folder, tmp_path, name):
    (folder / name).write_bytes(b"\xff\xfe[[[")
    if name == "tokenizer_config.json":
        (folder / "tokenizer.model").write_bytes(b"")
    refused((TokenizerError, CheckpointError), "token|pieces|JSON|UTF-8|byte|field", folder, tmp_path / "out")
    if name.startswith("tokenizer."):
        with pytest.raises(TokenizerError):
            convert_tokenizer(folder, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_options_that_contradict_each_other_are_refused(folder, tmp_path):
    for options, says in [
        ({"to": "onnx"}, "to is 'onnx'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"type": "Q9"}, "let it end with .gguf"),
        ({"to": "gguf"}, "let it end with .gguf"),
        ({"to": "msgpack", "type": "F16"}, "only a GGUF file has"),
        ({"max_shard_size": "big"}, "size"),
    ]:
        refused(InputError, says, folder, tmp_path / "out", **options)
    refused(InputError, "folder", folder, tmp_path / "x.gguf", to="safetensors")
    refused(InputError, "type is 'Q9'", folder, tmp_path / "x.gguf", type="Q9")
    refused(InputError, "no tokenizer beside it", folder, tmp_path / "x.gguf")
    refused(CheckpointError, "no checkpoint by its name", folder / "config.json", tmp_path / "out")


# -- the target --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
def test_a_checkpoint_that_is_there_is_replaced_only_when_asked(folder, tmp_path, to):
    out = tmp_path / "out"
    convert_checkpoint(folder, out, to=to)
    make(heads="mha").save_pretrained(tmp_path / "b")
    refused(InputError, "--overwrite", tmp_path / "b", out, to=to)
    convert_checkpoint(tmp_path / "b", out, to=to, overwrite=True, max_shard_size="9KB")
    convert_checkpoint(tmp_path / "b", out, to=to, overwrite=True, max_shard_size="5KB")
    held = {p.name for p in out.iterdir()}
    if to == "msgpack":
        convert_checkpoint(out, tmp_path / "again")
        index = json.loads((out / "flax_model.msgpack.index.json").read_text())
        assert {n for n in held if n.endswith(".msgpack")} == set(index["weight_map"].values())
    found = state_of(tmp_path / "again" if to == "msgpack" else out)
    assert_same_bits(found, state_of(tmp_path / "b"))
    convert_checkpoint(tmp_path / "b", out, to=to, overwrite=True)
    weights = [p.name for p in out.iterdir() if p.suffix in (".msgpack", ".safetensors")]
    assert len(weights) == 1


def test_weights_of_another_kind_in_the_target_are_never_mixed_with(folder, tmp_path):
    convert_checkpoint(folder, tmp_path / "out")
    refused(InputError, "another kind", folder, tmp_path / "out", to="msgpack", overwrite=True)
    (tmp_path / "file").write_text("")
    refused(InputError, "is a file", folder, tmp_path / "file")


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
def test_too_little_disk_is_said_in_bytes_before_anything_is_written(folder, tmp_path, to, monkeypatch):
    out = tmp_path / "out"
    convert_checkpoint(folder, out, to=to)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    says = refused(CheckpointError, "needs", folder, out, to=to, overwrite=True)
    assert "1000 bytes free" in says


def test_a_tensor_that_does_not_fit_memory_is_said_in_bytes_before_anything_is_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gemmakit.checkpoint.memory.free_memory_bytes", lambda: 10_000)
    convert_checkpoint(folder, tmp_path / "mapped")
    says = refused(NotEnoughMemory, "largest tensor", folder, tmp_path / "out", dtype="bfloat16")
    assert "needs 10400 bytes" in says
    assert "10000 bytes" in says
    path = tmp_path / "old.bin"
    torch.save(state_of(folder), path, _use_new_zipfile_serialization=False)
    make().config.save_pretrained(tmp_path)
    refused(NotEnoughMemory, r"old\.bin needs", path, tmp_path / "out")


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
@pytest.mark.parametrize("at", [0, 7, 19])
def test_a_failure_in_the_middle_leaves_the_target_as_it_was(folder, tmp_path, to, at):
    out = tmp_path / "out"
    convert_checkpoint(folder, out, to=to)
    seen = 0

    def stop(done, total):
        nonlocal seen
        seen += 1
        if seen > at:
            raise CheckpointError("the disk is full")

    refused(CheckpointError, "disk is full", folder, out, to=to, overwrite=True, progress=stop, max_shard_size="5KB")


@pytest.mark.parametrize("to", ["safetensors", "msgpack"])
@pytest.mark.parametrize("room", [0, 9_000, 60_000])
def test_a_disk_that_fills_up_leaves_the_target_as_it_was(folder, tmp_path, monkeypatch, to, room):
    from gemmakit.checkpoint import save

    out, written, write = tmp_path / "out", [0], save.write_all
    convert_checkpoint(folder, out, to=to)

    def until_full(file, data):
        written[0] += len(data)
        if written[0] > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(save, "write_all", until_full)
    refused(CheckpointError, "No space left", folder, out, to=to, overwrite=True, max_shard_size="9KB")


KILLED = """
import os, sys
from killing import kill_at
from gemmakit import convert_checkpoint
source, out, to, shard = sys.argv[1:]
from gemmakit.conversion import converting
import gemmakit.text, gemmakit.pytorch.heads
for step in range(1, 200):
    child = os.fork()
    if not child:
        kill_at(step, inside=out)
        convert_checkpoint(source, out, to=to, max_shard_size=shard, overwrite=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(step, flush=True)
    sys.stdin.readline()
    if not os.WIFSIGNALED(status):
        print("done", flush=True)
        break
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="kills processes by POSIX signals")
@pytest.mark.parametrize(("to", "shard"), [("msgpack", "5GB"), ("msgpack", "9KB"), ("safetensors", "9KB")])
def test_sigkill_at_every_file_system_step_leaves_the_old_or_the_new_checkpoint(tmp_path, to, shard):
    old, new = make(), make()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new")
    versions = {"old": old.state_dict(), "new": new.state_dict()}
    out = tmp_path / "out"
    convert_checkpoint(tmp_path / "old", out, to=to, max_shard_size="7KB")
    kept = listing(out)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, tmp_path / "new", out, to, shard],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    outcomes = {"old": 0, "new": 0}
    while (line := process.stdout.readline().strip()) not in ("done", ""):
        if to == "msgpack":
            convert_checkpoint(out, tmp_path / "seen", overwrite=True)
        found = state_of(tmp_path / "seen" if to == "msgpack" else out)
        which = "old" if torch.equal(found["model.norm.weight"], versions["old"]["model.norm.weight"]) else "new"
        assert_same_bits(found, versions[which])
        outcomes[which] += 1
        shutil.rmtree(out)
        out.mkdir()
        for name, data in kept.items():
            (out / name).write_bytes(data)
        process.stdin.write("\n")
        process.stdin.flush()
    assert line == "done"
    assert process.wait(60) == 0
    assert outcomes["old"] > 3
    assert outcomes["new"] >= 1
