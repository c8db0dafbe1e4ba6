"""Tensors reach a device whole, whatever runs beside them; bytes are read ahead, never more than there is room for."""

from __future__ import annotations

import mmap
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_gemma import prompts, tiny

import gemmakit
from gemmakit.checkpoint import open_checkpoint, readahead
from gemmakit.pytorch import loading, pretrained


class Moment(threading.Event):
    pass


class SlowBus:
    """Copies that happen a while after they were started, reading whatever the buffer holds by then."""

    def __init__(self, device):
        self.device = device

    def buffer(self, nbytes):
        self.device.buffers += 1
        return torch.empty(nbytes, dtype=torch.uint8)

    def begin(self, moment):
        moment.wait()

    def copy(self, target, source):
        if self.device.fails_after is not None:
            self.device.fails_after -= 1
            if self.device.fails_after < 0:
                raise MemoryError("the bus is gone")
        moment = Moment()

        def later():
            target.copy_(source)
            moment.set()

        threading.Timer(0.003, later).start()
        return moment

    def wait(self, moment):
        moment.wait()


class SlowDevice:
    """An accelerator in host memory: fresh memory is full of other things until a copy is over."""

    def __init__(self, fails_after=None):
        self.fails_after, self.buffers, self.live, self.peak = fails_after, 0, 0, 0

    def empty(self, shape, dtype):
        out = torch.empty(tuple(shape), dtype=dtype)
        if out.numel():
            out.view(-1).view(torch.uint8).fill_(77)
        self.live += out.nbytes
        self.peak = max(self.peak, self.live)
        return out

    def now(self):
        moment = Moment()
        moment.set()
        return moment

    def join(self, moment):
        moment.wait()

    def bus(self):
        return SlowBus(self)


def tensors():
    generator = torch.Generator().manual_seed(1)
    made = {
        "floats": torch.randn(300, 7, generator=generator),
        "one": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "halves": torch.randn(1025, generator=generator).bfloat16(),
        "codes": torch.randint(-128, 127, (33, 3), generator=generator, dtype=torch.int8),
        "large": torch.randn(5000, generator=generator),
    }
    return {f"{name}.{i}": tensor + i for i in range(3) for name, tensor in made.items()}


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("buffer_bytes", [64, 1000, 1 << 20])
def test_bytes_arrive_whole_through_few_buffers(readers, buffer_bytes):
    device, sources = SlowDevice(), tensors()
    sources = {n: t for n, t in sources.items() if buffer_bytes > 64 or t.nbytes < 3000}
    with loading.Copier(device, readers, buffer_bytes) as copier:
        sent = {name: copier.send(tensor) for name, tensor in sources.items()}
        for name, arrival in sent.items():
            got = copier.receive(arrival)
            assert (got.dtype, got.shape) == (sources[name].dtype, sources[name].shape)
            assert torch.equal(got, sources[name]), name
    assert device.buffers <= 2 * readers


def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("gemmakit reader")]


def test_threads_end_with_the_copier_even_when_nobody_waits_for_what_was_sent():
    with loading.Copier(SlowDevice(), 2, 64) as copier:
        for _ in range(5):
            copier.send(torch.zeros(4000))
        assert threads()
    assert not threads()


def test_what_a_reader_raises_is_raised_where_the_tensor_is_awaited():
    with loading.Copier(SlowDevice(fails_after=3), 2, 64) as copier:
        arrival = copier.send(torch.zeros(200))
        with pytest.raises(MemoryError, match="the bus is gone"):
            copier.receive(arrival)
    assert not threads()


@pytest.fixture
def checkpoint(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as opened:
        yield opened


def test_tensors_are_taken_in_order_and_those_that_nobody_wants_are_left_out(checkpoint):
    names, expected = list(tensors()), tensors()
    with loading.Weights(checkpoint, names, SlowDevice()) as weights:
        for name in names[::2]:
            assert torch.equal(weights.take(name), expected[name])


def test_what_was_not_announced_comes_mapped(checkpoint):
    device = SlowDevice()
    with loading.Weights(checkpoint, ["one.0"], device) as weights:
        assert torch.equal(weights.take("floats.1"), tensors()["floats.1"])
        assert device.live == 0
        assert torch.equal(weights.take("one.0"), tensors()["one.0"])


def test_no_more_is_on_its_way_than_may_be(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "AHEAD_BYTES", 9000)
    device, names = SlowDevice(), list(tensors())
    with loading.Weights(checkpoint, names, device) as weights:
        for name in names:
            device.live -= weights.take(name).nbytes
    assert 9000 < device.peak <= 9000 + 2 * 20_000  # one tensor beyond the limit, and the one that was just taken


@pytest.fixture
def saved(tmp_path):
    tiny(tie_word_embeddings=False).bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


@pytest.mark.parametrize("given", [{}, {"dtype": "float32"}, {"quantization_config": "int8"},
                                   {"quantization_config": "int4"}])  # fmt: skip
def test_a_model_loaded_through_the_copies_is_the_model(saved, given, monkeypatch):
    expected = gemmakit.GemmaForCausalLM.from_pretrained(saved, **given)
    device = SlowDevice()
    monkeypatch.setattr(pretrained, "weights", lambda c, names, _: loading.Weights(c, names, device))
    ours = gemmakit.GemmaForCausalLM.from_pretrained(saved, **given)
    assert device.live > 0
    a, b = ours.state_dict(), expected.state_dict()
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    assert torch.equal(ours(prompts()).logits, expected(prompts()).logits)


@pytest.mark.filterwarnings("ignore:.*lm_head.weight not used")
def test_a_head_of_another_shape_is_left_out_on_the_way_too(saved, monkeypatch):
    monkeypatch.setattr(pretrained, "weights", lambda c, names, _: loading.Weights(c, names, SlowDevice()))
    config = gemmakit.GemmaConfig.from_pretrained(saved)
    kind = gemmakit.GemmaForSequenceClassification
    config.num_labels = 3
    with pytest.warns(UserWarning, match=r"score\.weight not in the checkpoint"):
        kind.from_pretrained(saved, config=config).save_pretrained(saved / "classifier")
    config = gemmakit.GemmaConfig.from_pretrained(saved / "classifier")
    config.num_labels = 5
    with pytest.warns(UserWarning, match=r"score\.weight"):
        model = kind.from_pretrained(saved / "classifier", config=config, ignore_mismatched_sizes=True)
    assert model.score.weight.shape[0] == 5
    assert torch.equal(model.model.norm.weight, kind.from_pretrained(saved / "classifier").model.norm.weight)


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
    monkeypatch.setattr(loading, "fault_in", lambda pieces, keep: entered.extend(pieces))
    model = gemmakit.GemmaForCausalLM.from_pretrained(saved)
    assert sum(size for _, size in entered) == sum(p.nbytes for p in model.parameters())
    entered.clear()
    gemmakit.GemmaForCausalLM.from_pretrained(saved, dtype="float32")
    assert not entered


@on_linux
def test_loading_returns_while_bytes_are_still_read(saved, monkeypatch):
    monkeypatch.setattr(readahead, "_asked", {})
    monkeypatch.setattr(readahead, "_advise", lambda files: time.sleep(0.5))
    start = time.monotonic()
    assert readahead.read_ahead(readahead.weights_at(saved)) is not None
    assert time.monotonic() - start < 0.4
