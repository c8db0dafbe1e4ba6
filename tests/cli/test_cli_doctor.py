"""gemmakit doctor and env."""

from __future__ import annotations

import json

import gemmakit
from gemmakit.cli import main
from gemmakit.cli.doctor import BYTES


def test_doctor_gives_the_bytes_a_model_takes(tiny, capsys):
    assert main(["doctor", str(tiny), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    config = model.config
    assert found["model"]["parameters"] == model.num_parameters()
    for dtype, size in BYTES.items():
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        assert found["model"]["bytes"][dtype] == {
            "weights": size * model.num_parameters(), "kv_per_1000_tokens": 1000 * kv,
        }  # fmt: skip
    assert found["cpu"]["threads"] >= 1
    assert found["versions"]["gemmakit"] == gemmakit.__version__
    assert found["paths"]["attention"] == "sdpa"
    names = sorted(name for names in found["paths"]["cpu_step"].values() for name in names)
    assert names == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"])


def test_doctor_prints_a_page_that_fits_80_columns(tiny, capsys, monkeypatch):
    monkeypatch.setattr("gemmakit.cli.machine.cpu_name", lambda: "A CPU")
    assert main(["doctor", str(tiny)]) == 0
    out = capsys.readouterr().out
    body = [line for line in out.splitlines() if str(tiny) not in line]
    assert max(map(len, body)) <= 80
    assert "float32" in out
    assert "free" in out


def test_doctor_names_the_command_that_installs_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("gemmakit.cli.machine.missing_extras", lambda: {"flax": ["jax", "flax"]})
    assert main(["doctor"]) == 0
    assert "pip install 'gemmakit[flax]'" in capsys.readouterr().out


def test_env_lists_versions(capsys):
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"gemmakit", "python", "system", "torch", "tokenizers"} <= set(found)
    assert main(["env"]) == 0
    assert all(name in capsys.readouterr().out for name in ("torch",))
