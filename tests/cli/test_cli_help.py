"""What costs nothing: help and versions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from cli_process import environment

from gemmakit.cli import HELP, VERBS, main


@pytest.mark.parametrize("arguments", [[], ["--help"], ["--version"], ["bogus"]])
def test_help_loads_nothing_heavy(arguments):
    code = f"""
import sys
from gemmakit.cli import main
main({arguments!r})
heavy = {{"torch", "numpy", "typer", "rich", "click", "tokenizers", "huggingface_hub"}} & set(sys.modules)
sys.exit(f"loaded {{heavy}}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


def test_help_of_every_command_fits_80_columns_and_loads_no_torch():
    code = f"""
import sys
from gemmakit.cli import main
for verb in {list(VERBS)!r}:
    assert main([verb, "--help"]) == 0
    assert main(["help", verb]) == 0
sys.exit("loaded torch" if "torch" in sys.modules else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(COLUMNS="80"))
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert all(f"Usage: gemmakit {verb}" in done.stdout for verb in VERBS)


def test_top_help_names_every_command_and_fits(capsys):
    assert main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out and line in out for verb, line in VERBS.items())
    assert max(map(len, out.splitlines())) <= 80
    assert out.startswith(HELP[:20])
