"""What a model thinks in a chat: dim at a terminal, no part of what a pipe or the next question gets."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from gemma4_form import make
from test_cli_chat import Terminal

import gemmakit as package

pytest.importorskip("llguidance", reason="the model is made to think by gemmakit[constrained]")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that thinks "Hm." and says "Yes", whatever it is asked."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    return make(folder, says=r'start: <|channel> "thought\nHm.\n" <channel|> "Yes"')


def test_a_pipe_gets_the_answer_and_json_the_thought_beside_it(gemmakit, thinker: Path, tmp_path: Path) -> None:
    options = ("--model", thinker, "--chat", "--device", "cpu")
    assert gemmakit("run", *options, "Well?").stdout == "Yes\n"
    said = json.loads(gemmakit("run", *options, "--json", "--think", "Well?").stdout)
    assert said["generated_text"] == "Yes" and said["reasoning"] == "Hm."
    pipe = package.pipeline("text-generation", thinker, device_map="cpu")
    prompt = pipe.encode([{"role": "user", "content": "Well?"}], chat_template_kwargs={"enable_thinking": True})
    assert said["prompt_tokens"] == len(prompt)
    file = tmp_path / "talk.json"
    talk = gemmakit("chat", "--model", thinker, "--device", "cpu", stdin=f"Well?\nSure?\n/save {file}\n")
    assert talk.stdout == "Yes\n\nYes\n\n", talk.stderr
    said = [message["content"] for message in json.loads(file.read_text())["messages"]]
    assert said == ["Well?", "Yes", "Sure?", "Yes"]


def test_thinking_is_of_chats(gemmakit, thinker: Path) -> None:
    refused = gemmakit("run", "--model", thinker, "--think", "x")
    assert refused.returncode == 2 and "--chat" in refused.stderr
    refused = gemmakit("run", "--chat", "--think", "x")
    assert refused.returncode == 2 and "knows no thinking" in refused.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_terminal_thoughts_are_dim(thinker: Path) -> None:
    terminal = Terminal("chat", "--model", thinker, "--device", "cpu", term="xterm")
    try:
        terminal.until("> ")
        terminal.type("Well?\n")
        terminal.until("Yes\r\n")
        terminal.until("\r\n> ")
        terminal.type("\x04")
    finally:
        terminal.end()
    shown = terminal.seen
    assert "\x1b[2mHm." in shown.replace("\x1b[22m\x1b[2m", "") and "\x1b[22mYes" in shown
