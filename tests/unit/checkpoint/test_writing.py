"""Saving: what is written, in which files, and what is refused before anything is touched."""

import json
import os
import random
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gemmakit.checkpoint import (
    LazyTensor,
    open_checkpoint,
    parse_size,
    read_header,
    save,
    save_checkpoint,
)
from gemmakit.checkpoint.formats.msgpack import Leaf
from gemmakit.errors import CheckpointError, InputError, UnsafeFile

TENSORS = {
    "byte": torch.arange(3, dtype=torch.uint8),
    "half": torch.randn(11, 5).bfloat16(),
    "transposed": torch.randn(4, 6).t(),
    "view": torch.randn(10, 10)[2:5, 1::2],
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "flags": torch.tensor([True, False]),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    'é "quoted"': torch.ones(1),
}


def assert_holds(directory, tensors):
    checkpoint = open_checkpoint(directory)
    assert sorted(checkpoint) == sorted(tensors)
    for name, expected in tensors.items():
        found = checkpoint.tensor(name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert bytes_of(found) == bytes_of(expected)


def bytes_of(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def held(directory):
    return sorted(os.listdir(directory))


def test_saved_file_is_read_by_safetensors_with_its_metadata(tmp_path):
    assert save_checkpoint(TENSORS, tmp_path / "new" / "dir") == [tmp_path / "new" / "dir" / "model.safetensors"]
    assert_holds(tmp_path / "new" / "dir", TENSORS)
    loaded = load_file(tmp_path / "new" / "dir" / "model.safetensors")
    assert all(bytes_of(loaded[name]) == bytes_of(tensor) for name, tensor in TENSORS.items())
    assert open_checkpoint(tmp_path / "new" / "dir").metadata == {"format": "pt"}


def test_data_is_aligned_to_64_bytes_and_each_tensor_to_its_elements(tmp_path):
    save_checkpoint(TENSORS, tmp_path)
    table = read_header(tmp_path / "model.safetensors")
    assert min(info.begin for info in table.values()) % 64 == 0
    assert all(info.begin % TENSORS[name].element_size() == 0 for name, info in table.items())


def test_shards_hold_at_most_the_limit_in_the_given_order(tmp_path):
    tensors = {f"t{i:02d}": torch.full((i + 1, 100), i, dtype=torch.float16) for i in range(12)}
    paths = save_checkpoint(tensors, tmp_path, max_shard_size="3KB")
    assert_holds(tmp_path, tensors)
    *shards, index = paths
    count = len(shards)
    assert [p.name for p in shards] == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    content = json.loads(index.read_text())
    assert content["metadata"] == {"total_size": 15600, "total_parameters": 7800}
    assert list(content["weight_map"]) == list(tensors)
    for shard in shards:
        table = read_header(shard)
        assert len(table) == 1 or sum(info.nbytes for info in table.values()) <= 3000
        assert all(content["weight_map"][name] == shard.name for name in table)


def test_callables_lazy_tensors_and_numpy_arrays_save_as_their_tensors(tmp_path):
    tensor = torch.randn(7, 3)
    given_ = {
        "torch": tensor,
        "callable": lambda: tensor,
        "lazy": LazyTensor("float32", (7, 3), lambda: tensor),
        "numpy": tensor.numpy(),
        "fortran": np.asfortranarray(tensor.numpy()),
        "parameter": torch.nn.Parameter(tensor),
        "callable lazy": lambda: LazyTensor("float32", (7, 3), lambda: tensor.numpy()),
    }
    save_checkpoint(iter(given_.items()), tmp_path)
    assert_holds(tmp_path, dict.fromkeys(given_, tensor))


def test_lazy_tensors_are_held_one_at_a_time(tmp_path):
    alive, most = [], []

    class Counted(np.ndarray):
        def __del__(self):
            if alive:
                alive.pop()

    def make():
        alive.append(1)
        most.append(len(alive))
        return np.zeros(1000, np.float32).view(Counted)

    save_checkpoint({f"t{i}": LazyTensor("float32", (1000,), make) for i in range(5)}, tmp_path, max_shard_size="8KB")
    assert len(most) == 5
    assert max(most) == 1


def test_lazy_tensor_that_is_not_what_it_announced_leaves_everything_as_it_was(tmp_path):
    save_checkpoint(TENSORS, tmp_path)
    before = held(tmp_path)
    with pytest.raises(InputError, match="announced"):
        save_checkpoint({"a": LazyTensor("float16", (2,), lambda: torch.ones(2, dtype=torch.bfloat16))}, tmp_path)
    assert held(tmp_path) == before
    assert_holds(tmp_path, TENSORS)


@pytest.mark.parametrize("first", ["1KB", "1GB"])
@pytest.mark.parametrize("second", ["1KB", "300B", "1GB"])
def test_saving_over_a_checkpoint_leaves_only_the_new_one(tmp_path, first, second):
    foreign = {"tokenizer.json": "{}", "other.safetensors": "not ours", "pytorch_model.bin": "x"}
    for name, text in foreign.items():
        (tmp_path / name).write_text(text)
    old = {f"old{i}": torch.full((100,), float(i)) for i in range(9)}
    new = {f"new{i}": torch.full((50,), -float(i)) for i in range(9)}
    save_checkpoint(old, tmp_path, max_shard_size=first, extra_files={"config.json": '{"v": 1}'})
    assert_holds(tmp_path, old)
    paths = save_checkpoint(new, tmp_path, max_shard_size=second, extra_files={"config.json": b'{"v": 2}'})
    assert_holds(tmp_path, new)
    assert held(tmp_path) == sorted([*(path.name for path in paths), "config.json", *foreign])
    assert json.loads((tmp_path / "config.json").read_text()) == {"v": 2}


def test_single_file_beside_a_stale_index_is_replaced_together_with_the_stale_shards(tmp_path):
    old = {f"old{i}": torch.ones(100) for i in range(4)}
    save_checkpoint(old, tmp_path, max_shard_size="1KB")
    shards = {name: (tmp_path / name).read_bytes() for name in held(tmp_path)}
    save_checkpoint({"x": torch.ones(1)}, tmp_path)
    for name, data in shards.items():
        (tmp_path / name).write_bytes(data)
    assert open_checkpoint(tmp_path).names() == ["x"]
    paths = save_checkpoint(TENSORS, tmp_path, max_shard_size="200B")
    assert held(tmp_path) == sorted(path.name for path in paths)
    assert_holds(tmp_path, TENSORS)


def test_a_checkpoint_can_be_saved_over_the_files_it_is_mapped_from(tmp_path):
    tensors = {f"t{i}": torch.randn(300) for i in range(6)}
    for limit in ("1GB", "2KB", "2KB", "1GB", "1GB"):
        save_checkpoint(tensors, tmp_path, max_shard_size=limit)
        mapped = dict(open_checkpoint(tmp_path).items())
        save_checkpoint(mapped, tmp_path, max_shard_size=limit)
        assert_holds(tmp_path, tensors)
        assert all(torch.equal(mapped[name], tensor) for name, tensor in tensors.items())


def test_unchanged_extra_files_are_not_touched(tmp_path):
    save_checkpoint(TENSORS, tmp_path, extra_files={"config.json": "{}"})
    before = (tmp_path / "config.json").stat()
    save_checkpoint(TENSORS, tmp_path, extra_files={"config.json": "{}"})
    after = (tmp_path / "config.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_too_little_disk_is_said_in_bytes_before_anything_is_written(tmp_path):
    save_checkpoint(TENSORS, tmp_path)
    called = []
    huge = LazyTensor("float32", (2**50,), lambda: called.append(1))
    with pytest.raises(CheckpointError, match=r"needs \d{16} bytes, but the disk has \d+ bytes free"):
        save_checkpoint({"huge": huge}, tmp_path)
    assert not called
    assert held(tmp_path) == ["model.safetensors"]
    assert_holds(tmp_path, TENSORS)


def test_exception_while_a_tensor_is_made_leaves_the_previous_checkpoint_alone(tmp_path):
    save_checkpoint(TENSORS, tmp_path, max_shard_size="200B")
    before = {name: (tmp_path / name).read_bytes() for name in held(tmp_path)}

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"a": torch.ones(4), "b": LazyTensor("float32", (1,), stop)}, tmp_path, max_shard_size=8)
    assert {name: (tmp_path / name).read_bytes() for name in held(tmp_path)} == before


def test_left_overs_of_a_killed_save_are_removed_and_nothing_else(tmp_path):
    save_checkpoint(TENSORS, tmp_path, max_shard_size="200B", extra_files={"config.json": "{}"})
    live = held(tmp_path)
    staging = tmp_path / ".gemmakit-save-1-00000000"
    staging.mkdir()
    for name in ("model-0badc0de-00001-of-00002.safetensors", "mine.safetensors", "notes.txt"):
        (tmp_path / name).write_text("x")
    outside = tmp_path.parent / f"{tmp_path.name}.safetensors"
    outside.write_text("x")
    named = ["model-0badc0de-00001-of-00002.safetensors", "notes.txt", f"../{outside.name}", str(outside), 7, *live]
    (staging / "journal.json").write_text(json.dumps(named))
    save_checkpoint(TENSORS, tmp_path, max_shard_size="1GB", extra_files={"config.json": "{}"})
    assert held(tmp_path) == ["config.json", "mine.safetensors", "model.safetensors", "notes.txt"]
    assert outside.exists()


@pytest.mark.parametrize("name", ["../config.json", "/etc/x", "a\\b", ""])
def test_extra_file_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(UnsafeFile):
        save_checkpoint(TENSORS, tmp_path, extra_files={name: "x"})
    assert held(tmp_path) == []


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "a/config.json"])
def test_extra_file_named_like_weights_is_refused(tmp_path, name):
    with pytest.raises(InputError):
        save_checkpoint(TENSORS, tmp_path, extra_files={name: "x"})


def test_names_and_dtypes_that_no_file_can_hold_are_refused(tmp_path):
    one = torch.ones(1)
    for bad in (
        {"__metadata__": one},
        [("a", one), ("a", one)],
        {1: one},
        {"a": torch.ones(1, dtype=torch.complex128)},
    ):
        with pytest.raises(InputError):
            save_checkpoint(bad, tmp_path)
    assert held(tmp_path) == []


def test_directory_that_cannot_be_made_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="failed"):
        save_checkpoint(TENSORS, tmp_path / "file" / "sub")


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("1GiB", 2**30), ("1.5 kb", 1500), ("7", 7), (7, 7), ("3B", 3)],
)
def test_sizes_are_decimal_unless_they_say_i(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", 0, -3, True, None, "5 apples", "1e9", 2.5])
def test_anything_else_is_no_size(text):
    with pytest.raises(InputError, match="size"):
        parse_size(text)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(1, 400))
def test_any_tensors_come_back_as_they_were(tmp_path, seed, count, limit):
    rng = random.Random(seed)
    dtypes = [torch.bfloat16, torch.float16, torch.float32, torch.int8, torch.int64, torch.bool]
    tensors = {
        f"t{i}": torch.randint(0, 2, [rng.randrange(4) for _ in range(rng.randrange(4))]).to(rng.choice(dtypes))
        for i in range(count)
    }
    save_checkpoint(tensors, tmp_path, max_shard_size=limit)
    assert_holds(tmp_path, tensors)


def test_parts_that_the_system_takes_piecemeal_are_written_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_CHUNK_BYTES", 1000)
    tensors = {"t": torch.arange(5000)}
    save_checkpoint(tensors, tmp_path)
    assert_holds(tmp_path, tensors)
    assert Path(tmp_path / "model.safetensors").stat().st_size == read_header(tmp_path / "model.safetensors")["t"].end


@pytest.mark.parametrize("layout", [save.SAFETENSORS, save.MSGPACK], ids=lambda layout: layout.suffix)
@pytest.mark.parametrize("step", range(5))
def test_a_save_clears_away_what_a_killed_one_left(tmp_path, monkeypatch, layout, step):
    def saved(limit, text):
        arrays = {f"t{i}": Leaf("int8", (100,), text) for i in range(3)}
        return save.save_shards(tmp_path, layout, arrays, encode, limit, {"config.json": text})

    def encode(leaves):
        return [leaf.load for leaf in leaves.values()]

    class Killed(BaseException):
        """Nothing catches it; and as after kill -9, nothing is cleaned."""

    moved = 0

    def replace(*paths):
        nonlocal moved
        moved += 1
        if moved > step:
            raise Killed
        move(*paths)

    saved(100, b"1" * 100)
    move = os.replace
    with monkeypatch.context() as patched, suppress(Killed):
        patched.setattr(os, "replace", replace)
        patched.setattr(save, "clean", lambda staging: None)
        saved(200, b"2" * 100)
    kept = saved(150, b"3" * 100)
    assert held(tmp_path) == sorted(["config.json", *(path.name for path in kept)])
    assert all(path.read_bytes() == b"3" * 100 for path in kept[:-1])
