"""The build hook: when it compiles and when the library that is there will do."""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

import every_isa
import pytest

ROOT = Path(every_isa.ROOT)
# Tells its version, and instead of compiling writes down what it was told.
COMPILER = """#!/bin/sh
case "$*" in
--version) echo {version} ;;
*)  out=; for one; do [ "$out" = next ] && out=$one; [ "$one" = -o ] && out=next; done
    echo "$*" | tee -a {log} > "$out"
    case "$*" in *-shared*) cat "$(dirname "$(echo "$*" | grep -o '[^ ]*dispatch.o')")/dispatch.o" >> "$out" ;; esac ;;
esac
"""


@pytest.fixture
def build(tmp_path: Path):
    """A tree of its own with a compiler that counts: (hatch_build.py as a module, how often it was called since)."""
    tree = tmp_path / "tree"
    shutil.copytree(ROOT / every_isa.NATIVE, tree / every_isa.NATIVE, ignore=shutil.ignore_patterns("*.so"))
    shutil.copy(ROOT / "hatch_build.py", tree)
    compiler, log = tmp_path / "c++", tmp_path / "log"

    def install(version: str = "one", sets: int | None = None) -> int:
        compiler.write_text(COMPILER.format(version=version, log=log))
        compiler.chmod(0o755)
        log.write_text("")
        module = every_isa.build_module(tree)
        module.COMPILER = str(compiler)
        known = module.INSTRUCTION_SETS[platform.machine()]
        module.INSTRUCTION_SETS[platform.machine()] = dict(list(known.items())[:sets])
        assert module.is_made(tree) or module.compile_library(tree)
        return len(log.read_text().splitlines())

    return tree, install


def test_an_install_after_another_compiles_nothing(build):
    _, install = build
    assert install() > 0
    assert install() == 0


@pytest.mark.parametrize("what", ["sources", "numbers", "hook", "compiler", "library", "set"])
def test_whatever_the_library_comes_from_compiles_it_again(build, what: str):
    tree, install = build
    native = tree / every_isa.NATIVE
    install()
    changed = {"sources": native / "native.h", "numbers": native / "ids.py", "hook": tree / "hatch_build.py"}
    if what in changed:
        changed[what].write_text(changed[what].read_text() + "\n")
    elif what == "library":
        (native / "native.so").unlink()
    then = {"compiler": {"version": "two"}, "set": {"sets": 1}}.get(what, {})
    assert install(**then) > 0
    assert install(**then) == 0
