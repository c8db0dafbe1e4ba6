"""Tiny random checkpoints, written by one library and read by both; transformers is the oracle."""

import pytest
import torch
import transformers
from parity_tools import COMMON, LIBRARIES, Pair, randomise
from tiny_shapes import MEMBERS, SHAPES

import gemmakit
from gemmakit.family import KINDS


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """(shape, author, member, fields) -> a folder with a float32 checkpoint that `author` saved."""
    made = {}

    def make(shape="gqa", author="transformers", member="gemma", **fields):
        key = (shape, author, member, repr(sorted(fields.items())))
        if key not in made:
            library, classes = LIBRARIES[author], KINDS[member].classes
            sizes = {**COMMON, **SHAPES[shape], **MEMBERS.get(member, {}), **fields}
            model = getattr(library, classes["causal_lm"])(getattr(library, classes["config"])(**sizes))
            randomise(model)
            made[key] = tmp_path_factory.mktemp(shape)
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def pair(checkpoint):
    def make(shape="gqa", author="transformers", member="gemma", dtype=torch.float32, attn="eager", **fields):
        folder = checkpoint(shape, author, member, **fields)
        kind, capped = getattr(transformers, KINDS[member].classes["causal_lm"]), KINDS[member].capped
        theirs = kind.from_pretrained(folder, dtype=dtype, attn_implementation="eager" if capped else attn).eval()
        ours = gemmakit.GemmaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attn)
        return Pair(ours, theirs, folder)

    return make
