"""The Flax backend beside other programs: what is timed, that all are of one shape, who is left out."""

import json
import sys
from argparse import Namespace

import flax_decode
import peers
import pytest
from checkpoints import write_random
from rounds import Rounds, run_command

from gemmakit.bench.measure import size_config
from gemmakit.errors import MissingDependency

TINY3 = dict(num_hidden_layers=6, vocab_size=2048, hidden_size=64, intermediate_size=96, num_attention_heads=2,
             head_dim=32)  # fmt: skip
SHAPES = {"gemma": ("tiny", {}), "gemma3_text": ("gemma3-270m", TINY3)}
FOUND = dict(side="x", parameters=10, load_s=1.0, compile_s=1.0, prefill_tokens_per_s=8.0, tokens_per_s=4.0)


def settings(**changes):
    given = dict(side="flax", sides=flax_decode.SIDES, old_python=None, checkpoint=None, dtype="float32", threads=1,
                 prompt=8, few=1, many=5, repeats=1, rounds=1)  # fmt: skip
    return Namespace(**given | changes)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = tmp_path_factory.mktemp("shapes")
    return {kind: write_random(made / kind, size_config(size, **more)) for kind, (size, more) in SHAPES.items()}


@pytest.mark.parametrize(("few", "many"), [(1, 5), (3, 9)])
def test_prefill_is_the_time_to_a_token_and_decode_the_difference_of_two_lengths(monkeypatch, few, many):
    """A prompt takes 4 s, a new token 0.5 s, a place of the array that a prompt is read in 100 s; compiling 20 s."""
    now, seen = [0.0], set()

    def run(new, room):
        now[0] += 4 + 0.5 * new + 100 * (room - 1) + 20 * ((new, room) not in seen)
        seen.add((new, room))

    monkeypatch.setattr(flax_decode.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(flax_decode.RUNNERS, "flax", lambda args: flax_decode.Runner(run, "x", 10))
    found = flax_decode.measure(settings(few=few, many=many))
    assert found["tokens_per_s"] == 2.0
    assert found["prefill_tokens_per_s"] == round(8 / 4.5, 2)
    assert found["compile_s"] == 60


def test_models_of_two_shapes_are_not_compared(monkeypatch, folders):
    done = Rounds([{"flax": FOUND, "gemma": {**FOUND, "parameters": 11}}])
    monkeypatch.setattr("rounds.interleave", lambda *a, **k: done)
    with pytest.raises(SystemExit, match=r"not of one shape.*10.*11"):
        flax_decode.compare(settings(sides=["flax"], checkpoint=folders["gemma"]))


def test_a_program_that_is_not_installed_is_left_out_with_a_word(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("GEMMAKIT_PEERS", str(tmp_path))
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    kept = [command.label for command in flax_decode.sides_of(settings(checkpoint=tmp_path))]
    assert kept == ["flax", "pytorch"]
    said = capsys.readouterr().err
    assert all(f"make peers PEERS={peer}" in said for peer in peers.FLAX_PEERS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", flax_decode.WIDTHS)
@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("side", ["flax", "pytorch", *peers.FLAX_PEERS])
def test_every_side_is_measured_on_the_same_shape(side, kind, dtype, folders):
    args = settings(checkpoint=folders[kind], dtype=dtype)
    try:
        command = flax_decode.command_of(args, side)
    except MissingDependency as error:
        pytest.skip(str(error))
    found = run_command(command)
    assert found["parameters"] == parameters(folders[kind])
    # How fast a tiny model decodes is a difference of two times, which what else runs can turn round.
    assert found["tokens_per_s"] and found["prefill_tokens_per_s"] > 0
    assert set(found) == set(FOUND)


def parameters(folder):
    from safetensors import safe_open

    (file,) = folder.glob("*.safetensors")
    with safe_open(file, "numpy") as opened:
        return sum(int(_size(opened.get_slice(name).get_shape())) for name in opened.keys())  # noqa: SIM118


def _size(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def test_what_is_measured_is_written(monkeypatch, folders, tmp_path):
    done = Rounds([{"flax": FOUND, "gemma": {**FOUND, "tokens_per_s": 2.0}}])
    monkeypatch.setattr("rounds.interleave", lambda *a, **k: done)
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["flax_decode.py", str(folders["gemma"]), "--sides", "flax", "--out", str(out)])
    flax_decode.main()
    result = json.loads(out.read_text())
    assert result["median_ratio"] == {"flax over gemma": 2.0} and result["prefill_ratio"] == {"flax over gemma": 1.0}
    assert result["model"]["parameters"] == 10 and result["rounds"] == done.rounds
