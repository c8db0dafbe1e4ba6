"""The tables of names against the models themselves, and our msgpack against flax's, byte for byte."""

import numpy as np
import pytest
import torch
from conversion_tools import make

import gemmakit
from gemmakit.checkpoint import open_checkpoint
from gemmakit.checkpoint.formats import msgpack
from gemmakit.checkpoint.inspect import memory
from gemmakit.checkpoint.layout import architecture_of, tensor_shapes

CLASSES = (
    gemmakit.GemmaForCausalLM,
    gemmakit.GemmaForSequenceClassification,
    gemmakit.GemmaForTokenClassification,
    gemmakit.GemmaModel,
)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_layout_is_what_the_model_saves(tmp_path, kind, tied, bias):
    model = make(kind, tie_word_embeddings=tied, attention_bias=bias, num_labels=3)
    model.save_pretrained(tmp_path)
    held = open_checkpoint(tmp_path)
    shapes = {name: tuple(held.info(name).shape) for name in held.names()}
    config = gemmakit.GemmaConfig.from_pretrained(tmp_path)
    assert tensor_shapes(config, kind.__name__) == shapes
    assert architecture_of(config, shapes) == kind.__name__
    if kind is not gemmakit.GemmaForTokenClassification:  # by names alone, where these tell
        assert architecture_of(None, shapes) == kind.__name__


def test_a_flax_path_and_a_pytorch_name_are_each_others_inverse():
    config = gemmakit.GemmaConfig.preset("2b", attention_bias=True, tie_word_embeddings=False)
    for name, shape in tensor_shapes(config).items():
        path, transposed = msgpack.flax_path(name)
        assert msgpack.pytorch_name(path) == (name, transposed)
        assert transposed == (len(shape) == 2 and "embed" not in name), name


def test_weights_in_memory_are_what_the_stored_tensors_take():
    """int4 in groups of 32 with an int8 head: about 1.7 GB for 2B, as PERFORMANCE's table has it."""
    held = memory(gemmakit.GemmaConfig.preset("2b"))
    assert held["bfloat16"]["weights"] == 2 * 2_506_172_416
    assert held["int4 g32"]["weights"] == pytest.approx(1.70e9, rel=0.01)
    assert held["int8"]["weights"] == pytest.approx(2.51e9, rel=0.01)
    assert held["bfloat16"]["kv_per_1000_tokens"] == 2 * 18 * 256 * 2 * 1000


def arrays():
    rng = np.random.default_rng(0)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return {
        "model/layers/0/mlp/up_proj/kernel": rng.normal(size=(3, 200)).astype(np.float32),
        "model/norm/weight": np.arange(3).astype(ml_dtypes.bfloat16),
        "model/embed_tokens/embedding": rng.normal(size=(300, 70)).astype(np.float16),
        "empty/bias": np.zeros((0,), np.float32),
        "one/bias": np.ones((1,), np.int8),
        "number/bias": np.array(7, np.float32),
    } | {f"many/{i}/bias": np.full(2, i, np.float32) for i in range(20)}


def encoded(held):
    def leaf(array):
        return msgpack.Leaf(
            str(array.dtype), array.shape, lambda: np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        )

    return b"".join(bytes(part) for part in msgpack.encode({path: leaf(array) for path, array in held.items()}))


@pytest.mark.parametrize("chunk", [2**30, 1000, 13])
def test_our_msgpack_is_flaxs_byte_for_byte_and_is_read_back(tmp_path, monkeypatch, chunk):
    """Chunks too: in files of released size only the embedding is over the limit of 2**30 bytes."""
    serialization = pytest.importorskip("flax.serialization")
    traverse = pytest.importorskip("flax.traverse_util")
    monkeypatch.setattr(msgpack, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk)
    held = arrays()
    tree = traverse.unflatten_dict({tuple(path.split("/")): array for path, array in held.items()})
    data = encoded(held)
    assert data == serialization.msgpack_serialize(tree)
    (tmp_path / "a.msgpack").write_bytes(data)
    file = msgpack.MsgpackFile(tmp_path / "a.msgpack")
    for path, array in held.items():
        name, transposed = msgpack.pytorch_name(path)
        info = file.tensors[name]
        for found in (file.tensor(name, "np", None), file.tensor(name, "pt", "cpu")):
            assert tuple(found.shape) == info.shape
            again = np.asarray(found.float() if isinstance(found, torch.Tensor) else found, np.float32)
            assert np.array_equal(again.T if transposed else again, np.asarray(array, np.float32))
        assert info.nbytes == array.nbytes


def test_msgpack_is_mapped_not_read(tmp_path):
    """Writing to what is handed out changes neither the file nor the next reader's view."""
    make().save_pretrained(tmp_path / "a")
    gemmakit.convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack")
    before = (tmp_path / "b" / "flax_model.msgpack").read_bytes()
    checkpoint = open_checkpoint(tmp_path / "b")
    checkpoint.tensor("model.norm.weight").zero_()
    assert checkpoint.tensor("model.norm.weight").any()
    assert (tmp_path / "b" / "flax_model.msgpack").read_bytes() == before


def test_opening_msgpack_needs_neither_flax_nor_jax(tmp_path):
    import subprocess
    import sys

    make().save_pretrained(tmp_path / "a")
    gemmakit.convert_checkpoint(tmp_path / "a", tmp_path / "b", to="msgpack")
    code = (
        "import sys; sys.modules['jax'] = sys.modules['flax'] = None\n"
        "from gemmakit.checkpoint import open_checkpoint\n"
        "c = open_checkpoint(sys.argv[1]); print(c.tensor('model.norm.weight').shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "b")], capture_output=True, text=True)
    assert done.stdout == "40\n", done.stderr
