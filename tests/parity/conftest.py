"""Tiny random checkpoints, written by one library and read by both; transformers is the oracle."""

import pytest
import torch
import transformers
from parity_tools import COMMON, LIBRARIES, Pair, randomise
from tiny_shapes import SHAPES

import gemmakit


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(shape, author, fields) -> a folder with a float32 checkpoint that `author` saved."""
    made = {}

    def make(shape="gqa", author="transformers", **fields):
        key = (shape, author, repr(sorted(fields.items())))
        if key not in made:
            library = LIBRARIES[author]
            model = library.GemmaForCausalLM(library.GemmaConfig(**COMMON, **SHAPES[shape], **fields))
            randomise(model)
            made[key] = tmp_path_factory.mktemp(shape)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def pair(checkpoint):
    def make(shape="gqa", author="transformers", dtype=torch.float32, attn="eager", **fields):
        folder = checkpoint(shape, author, **fields)
        theirs = transformers.GemmaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn).eval()
        ours = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
        return Pair(ours, theirs, folder)

    return make
