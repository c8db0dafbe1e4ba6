"""Bytes are read ahead of time, never more than there is room for; mapped weights are entered before use."""

from __future__ import annotations

import mmap
import sys
import threading
from pathlib import Path

import pytest
import torch
from tiny_gemma import tiny

import gemmakit
from gemmakit.checkpoint import readahead
from gemmakit.pytorch import pretrained


@pytest.fixture
def saved(tmp_path):
    tiny(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


# -- ahead of time ---------------------------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads ahead on Linux only; run there")


@pytest.fixture
def asked(monkeypatch):
    """The files that the system was asked for, and nothing remembered from other tests."""
    names = []
    monkeypatch.setattr(readahead, "_asked", {})
    monkeypatch.setattr(readahead, "_advise", lambda files: names.extend(path.name for path, _ in files))
    return names


def file(folder, name, size=5000):
    (folder / name).write_bytes(bytes(size))
    return folder / name


@on_linux
def test_each_file_is_asked_for_once_until_it_changes(tmp_path, asked):
    a, b = file(tmp_path, "a"), file(tmp_path, "b")
    readahead.read_ahead([a]).join()
    readahead.read_ahead([a, b, tmp_path / "missing"]).join()
    assert readahead.read_ahead([a, b]) is None
    file(tmp_path, "a", 6000)
    readahead.read_ahead([a]).join()
    assert asked == ["a", "b", "a"]


@on_linux
def test_no_more_is_read_ahead_than_memory_is_free(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(readahead, "free_memory_bytes", lambda: 8000)
    readahead.read_ahead([file(tmp_path, "a"), file(tmp_path, "b"), file(tmp_path, "c", 3000)]).join()
    assert asked == ["a", "c"]
    assert readahead.fault_in([(0, 8001)], None) is None
    monkeypatch.setattr(readahead, "free_memory_bytes", lambda: None)
    assert readahead.read_ahead([file(tmp_path, "d")]) is None


@on_linux
def test_a_file_that_goes_away_meanwhile_is_nobodys_trouble_here(tmp_path, monkeypatch):
    monkeypatch.setattr(readahead, "_asked", {})
    a = file(tmp_path, "a")
    stamp = readahead._stamp
    monkeypatch.setattr(readahead, "_stamp", lambda path: (stamp(path), path.unlink())[0])
    thread = readahead.read_ahead([a])
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.parametrize("held", [["model.safetensors"], ["model-00001-of-00002.safetensors",
                                                          "model-00002-of-00002.safetensors"]])  # fmt: skip
def test_the_weights_of_a_folder_are_those_that_are_loaded(tmp_path, held):
    for name in [*held, "other.safetensors", "config.json"]:
        file(tmp_path, name)
    assert [p.name for p in readahead.weights_at(tmp_path)] == held
    assert readahead.weights_at(tmp_path.parent, tmp_path.name) == [tmp_path / n for n in held]
    assert readahead.weights_at(tmp_path / held[0]) == [tmp_path / held[0]]


@pytest.mark.parametrize("name", ["google/gemma-2b", "no such folder", "a\0b", 5, None])
def test_names_that_are_no_folder_have_no_files_and_raise_nothing_here(name):
    assert readahead.weights_at(name) == []


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@on_linux
def test_mapped_weights_are_entered_before_they_are_touched(tmp_path):
    size = 64 << 20
    with (tmp_path / "weights").open("wb") as out:
        out.write(bytes(size))
    mapped = torch.UntypedStorage.from_file(str(tmp_path / "weights"), False, size)
    before = resident_bytes()
    thread = readahead.fault_in([(mapped.data_ptr() + 100, size - 200)], mapped)
    if thread is None:
        pytest.skip("this system has no madvise or says nothing of its memory; run where it does")
    thread.join()
    grown = resident_bytes() - before
    if not grown:
        pytest.skip("the kernel has no MADV_POPULATE_READ; run on Linux 5.14 or later")
    assert grown > 0.9 * size


@on_linux
def test_only_what_the_model_keeps_mapped_is_entered(saved, monkeypatch):
    entered = []
    monkeypatch.setattr(pretrained, "fault_in", lambda pieces, keep: entered.extend(pieces))
    model = gemmakit.GemmaForCausalLM.from_pretrained(saved)
    assert sum(size for _, size in entered) == sum(p.nbytes for p in model.parameters())
    entered.clear()
    gemmakit.GemmaForCausalLM.from_pretrained(saved, dtype="float32")
    assert not entered


@on_linux
def test_loading_returns_while_bytes_are_still_read(saved, monkeypatch):
    monkeypatch.setattr(readahead, "_asked", {})
    gate, read = threading.Event(), threading.Event()

    def reading(files):
        gate.wait(60)
        read.set()

    monkeypatch.setattr(readahead, "_advise", reading)
    assert readahead.read_ahead(readahead.weights_at(saved)) is not None
    assert not read.is_set()
    gate.set()
    assert read.wait(60)
