# ruff: noqa: E402 - the flags must be set before jax is imported
"""Tiny models of both backends with the same weights. Compiling is what takes time here, so it is done quickly."""

import os
from importlib import metadata


def _quick_flags():
    """A third of the compile time; the numbers of these sizes are the same. XLA aborts on a flag it does not know."""
    try:
        known = metadata.version("jaxlib").startswith("0.10.")
    except metadata.PackageNotFoundError:
        known = False
    return "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * known


os.environ.setdefault("XLA_FLAGS", _quick_flags())  # a run that sets them keeps its own

import pytest

pytest.importorskip("jax", reason="the Flax backend needs jax: pip install 'gemmakit[flax]'")

import jax
from flax_tools import Both, make_torch
from tiny_shapes import SHAPES

from gemmakit.flax import FlaxGemmaForCausalLM


@pytest.fixture(scope="module", autouse=True)
def _forgets_programs():
    """Compiled programs hold memory maps, of which Linux gives a process 65,530: XLA ends it where they run out."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """(shape, fields) -> the same weights in PyTorch and, through a checkpoint that PyTorch saved, in Flax."""
    made = {}

    def make(shape="gqa", **fields):
        key = (shape, repr(sorted(fields.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(shape)
            model = make_torch(**SHAPES[shape], **fields)
            model.save_pretrained(folder)
            made[key] = Both(FlaxGemmaForCausalLM.from_pretrained(folder), model, folder)
        return made[key]

    return make
