"""Opening a checkpoint: layouts, cross-checks, refusals, and what a tensor costs."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gemmakit
from gemmakit.checkpoint import open_checkpoint
from gemmakit.errors import CheckpointError, UnsafeFile
from gemmakit.hub import HubOptions

ROOT = Path(next(iter(gemmakit.__path__))).parent
TENSORS = {
    "model.norm.weight": torch.randn(16),
    "model.embed.weight": torch.randn(10, 16).bfloat16(),
    "scalar": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False, True]),
}


def write_shards(folder, placed, held=None, suffix="safetensors"):
    """Shards by hand: `placed` is what the index says, `held` (the same if None) what the shards hold."""
    for shard in sorted(set(placed.values())):
        names = [n for n, s in (held or placed).items() if s == shard]
        save_file({n: TENSORS[n] for n in names}, folder / shard)
    (folder / f"model.{suffix}.index.json").write_text(
        json.dumps({"metadata": {"total_size": 1}, "weight_map": placed})
    )
    return folder


def placed():
    return {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(TENSORS)}


def assert_same(checkpoint):
    assert sorted(checkpoint) == sorted(TENSORS)
    for name in checkpoint.names():
        found = checkpoint.tensor(name)
        assert found.dtype == TENSORS[name].dtype
        assert torch.equal(found, TENSORS[name])
        info = checkpoint.info(name)
        assert (f"torch.{info.dtype}", info.shape, info.nbytes) == (str(found.dtype), found.shape, found.nbytes)
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in TENSORS.values())


def test_single_file_opens_by_directory_and_by_its_own_path(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in (tmp_path, str(tmp_path), tmp_path / "model.safetensors"):
        with open_checkpoint(name) as checkpoint:
            assert_same(checkpoint)
            assert checkpoint.metadata == {"format": "pt"}
            assert checkpoint.files == [tmp_path / "model.safetensors"]
    with pytest.raises(CheckpointError, match="No tensor 'nope'"):
        checkpoint.tensor("nope")


def test_shards_open_by_directory_subfolder_and_index(tmp_path):
    (tmp_path / "sub").mkdir()
    write_shards(tmp_path / "sub", placed())
    for name, subfolder in (
        (tmp_path / "sub", ""),
        (tmp_path, "sub"),
        (tmp_path / "sub/model.safetensors.index.json", ""),
    ):
        checkpoint = open_checkpoint(name, HubOptions(subfolder=subfolder))
        assert_same(checkpoint)
        assert len(checkpoint.files) == 2


def test_variant_names_its_own_files(tmp_path):
    save_file(TENSORS, tmp_path / "model.fp16.safetensors")
    assert_same(open_checkpoint(tmp_path, variant="fp16"))
    with pytest.raises(CheckpointError, match=r"neither model.safetensors nor"):
        open_checkpoint(tmp_path)
    with pytest.raises(UnsafeFile):
        open_checkpoint(tmp_path, variant="../x")


def test_single_file_wins_over_an_index(tmp_path):
    write_shards(tmp_path, placed())
    save_file({"only": torch.ones(1)}, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).names() == ["only"]


def test_missing_shard_is_named(tmp_path):
    write_shards(tmp_path, placed())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no file 'model-00002-of-00002.safetensors'"):
        open_checkpoint(tmp_path)


def test_truncated_shard_gives_file_tensor_and_bytes(tmp_path):
    write_shards(tmp_path, placed())
    shard = tmp_path / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    with pytest.raises(
        CheckpointError, match=rf"00002-of-00002.*tensor '.*' needs bytes \d+ to {size}.*has {size - 1}"
    ):
        open_checkpoint(tmp_path)


def test_index_naming_a_tensor_that_its_shard_lacks_is_refused(tmp_path):
    held = {name: shard for name, shard in placed().items() if name != "scalar"}
    write_shards(tmp_path, placed(), held)
    with pytest.raises(CheckpointError, match=r"00001-of-00002.safetensors holds tensor 'scalar'"):
        open_checkpoint(tmp_path)


def test_shard_holding_a_tensor_that_the_index_does_not_name_is_refused(tmp_path):
    names = {name: shard for name, shard in placed().items() if name != "scalar"}
    write_shards(tmp_path, names, placed())
    with pytest.raises(CheckpointError, match=r"holds 1 tensors that .* does not place there, first 'scalar'"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "shard", ["../x.safetensors", "/etc/passwd", "a/../../b.safetensors", "c:x", "a\\b", "", "a\0b"]
)
def test_shard_name_that_leaves_the_folder_is_refused_before_any_read(tmp_path, shard):
    write_shards(tmp_path, placed())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {**placed(), "scalar": shard}}))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(UnsafeFile):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map":{}}', '{"weight_map":{"a":1}}', '{"weight_map":[1]}', "[" * 100_000, "\0"]
)
def test_malformed_index_is_a_checkpoint_error(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_pickle_is_refused_unless_asked_for_and_then_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    torch.save(TENSORS, tmp_path / "pytorch_model.bin")
    for name in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(UnsafeFile, match="allow_pickle=True"):
            open_checkpoint(name)
        assert_same(open_checkpoint(name, allow_pickle=True))
    torch.save({"w": torch.ones(1), "x": Bomb()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match="more than tensors"):
        open_checkpoint(tmp_path, allow_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_pickled_shards_with_an_index_are_read_when_asked_for(tmp_path):
    names = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(TENSORS)}
    for shard in set(names.values()):
        torch.save({n: TENSORS[n] for n, s in names.items() if s == shard}, tmp_path / shard)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert_same(open_checkpoint(tmp_path, allow_pickle=True))
    with pytest.raises(UnsafeFile):
        open_checkpoint(tmp_path)


def test_safetensors_index_cannot_bring_in_a_pickle(tmp_path):
    torch.save(TENSORS, tmp_path / "weights.bin")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "weights.bin")}))
    with pytest.raises(UnsafeFile, match="pickle"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("content", [[1], {"a": 1}, {1: torch.ones(1)}, b"", b"PK\3\4junk"])
def test_pickle_that_is_no_mapping_of_tensors_is_refused(tmp_path, content):
    path = tmp_path / "x.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(CheckpointError):
        open_checkpoint(path, allow_pickle=True)


def test_numpy_view_equals_the_tensor_and_writing_leaves_the_file_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({k: v for k, v in TENSORS.items() if v.dtype != torch.bfloat16}, path)
    before = path.read_bytes()
    checkpoint = open_checkpoint(path)
    for name in checkpoint:
        array = checkpoint.tensor(name, "np")
        assert np.array_equal(array, TENSORS[name].numpy())
        array[...] = 0
        checkpoint.tensor(name).zero_()
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="framework"):
        checkpoint.tensor("scalar", "tf")


def test_bfloat16_is_exact_in_numpy_or_says_what_to_install(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    try:
        array = checkpoint.tensor("model.embed.weight", "np")
    except ImportError as error:
        assert "ml_dtypes" in str(error)  # noqa: PT017
    else:
        assert np.array_equal(array.astype(np.float32), TENSORS["model.embed.weight"].float().numpy())


def test_tensors_outlive_the_checkpoint(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        kept = dict(checkpoint.items())
    del checkpoint
    (tmp_path / "model.safetensors").unlink()
    assert all(torch.equal(kept[name], tensor) for name, tensor in TENSORS.items())


def in_subprocess(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, text=True
    )


def test_importing_and_opening_load_neither_torch_nor_numpy_nor_the_hub(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    code = (
        "import sys, gemmakit.hub, gemmakit.checkpoint as c\n"
        f"assert len(c.open_checkpoint({str(tmp_path)!r}).names()) == {len(TENSORS)}\n"
        "print([m for m in ('torch', 'numpy', 'huggingface_hub', 'safetensors', 'transformers') if m in sys.modules])"
    )
    assert in_subprocess(code).stdout.strip() == "[]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_weights_take_no_anonymous_memory(tmp_path):
    """400 MB read to the last byte: less than 8 MB of anonymous memory, until one tensor is written to."""
    code = f"""
import torch
from gemmakit.checkpoint import LazyTensor, open_checkpoint, save_checkpoint
def anonymous_bytes():
    return [int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon")][0]
shape = (5000, 5000)
make = lambda i: lambda: torch.full(shape, i, dtype=torch.bfloat16)
save_checkpoint({{f"w{{i}}": LazyTensor("bfloat16", shape, make(i)) for i in range(8)}}, {str(tmp_path)!r})
torch.ones(shape, dtype=torch.bfloat16).view(torch.int16).max()
before = anonymous_bytes()
kept = dict(open_checkpoint({str(tmp_path)!r}).items())
assert [int(t.view(torch.int16).max() == t.view(torch.int16).min()) for t in kept.values()] == [1] * 8
read = anonymous_bytes()
kept["w3"].add_(1)
print(read - before, anonymous_bytes() - read, open_checkpoint({str(tmp_path)!r}).tensor("w3")[0, 0].item())
"""
    done = in_subprocess(code)
    assert done.returncode == 0, done.stderr
    reading, writing, stored = map(float, done.stdout.split())
    assert reading < 8e6
    assert 48e6 < writing < 60e6
    assert stored == 3.0
