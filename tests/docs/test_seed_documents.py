"""The examples of the documents that gemmakit follows, taken from the documents themselves, with the package renamed.

What is replaced besides the name: model ids by the demo model, and the accelerator by the device at hand.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEEDS = ROOT.parent / "shared" / "seeds"
DEMO = ROOT / "gemmakit" / "demo"

pytestmark = pytest.mark.skipif(not SEEDS.is_dir(), reason="runs where the documents lie beside the checkout")

FENCE = re.compile(r"^```(py|python|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROMPTED = re.compile(r"(?:^>>> .*\n?(?:^\s*\n)?)+", re.MULTILINE)
# In the page that was saved as plain text the next heading is glued to an example's last line.
GLUED = re.compile(r"(\.config|\.last_hidden_state)(?:Flax)?Gemma\w+$", re.MULTILINE)


def examples():
    """(where, language, code) of every example."""
    for path in sorted(SEEDS.glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        for number, (language, code) in enumerate(FENCE.findall(text)):
            code = "\n".join(prompted(code)) if ">>>" in code else code
            yield f"{path.name[:3]}-fence-{number}", language, code
        for number, block in enumerate(PROMPTED.findall(FENCE.sub("", text))):
            yield f"{path.name[:3]}-prompt-{number}", "python", "\n".join(prompted(GLUED.sub(r"\1", block)))


def prompted(block):
    """The statements of an interpreter session, without its answers."""
    return [line.removeprefix(">>> ") for line in block.splitlines() if line.startswith(">>> ")]


def renamed(code, device):
    code = code.replace("transformers", "gemmakit")
    code = re.sub(r'(["\' ])(google/gemma-[27]b|hf-internal-testing/dummy-gemma)\b', rf"\g<1>{DEMO}", code)
    return code.replace('"cuda"', f'"{device}"').replace("--device 0", f"--device {device}")


@pytest.fixture(scope="module")
def device():
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


ALL = list(examples()) if SEEDS.is_dir() else []


def test_the_documents_examples_are_found():
    languages = [language for _, language, _ in ALL]
    assert len(ALL) == 13
    assert languages.count("bash") == 1


@pytest.mark.parametrize(("where", "language", "code"), ALL, ids=[where for where, _, _ in ALL])
def test_the_example_runs_with_the_package_renamed(where, language, code, device, tmp_path):
    code = renamed(code, device)
    if "GemmaModel(configuration)" in code:
        # 8.5 billion float32 parameters take 31 GiB, more than the machines this runs on have: the structure is built,
        # its memory is not taken.
        code = "import torch; torch.set_default_device('meta')\n" + code
    command = ["bash", "-c", code] if language == "bash" else [sys.executable, "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, f"{done.stderr}\n--- in\n{code}"
    if language == "bash":
        assert done.stdout.strip(), "no continuation was printed"
