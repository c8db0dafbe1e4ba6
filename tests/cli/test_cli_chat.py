"""gemmakit chat: what is remembered, what is dropped, and what Ctrl-C leaves."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time

import pytest
from cli_process import command_line, environment

import gemmakit as package
from gemmakit.cli import main
from gemmakit.cli.answer import Answer
from gemmakit.cli.conversation import Conversation
from gemmakit.errors import PromptTooLong


def ignore(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def pipe(tiny):
    return package.pipeline("text-generation", str(tiny))


def answered(pipe, messages, n) -> str:
    ids = pipe.encode(messages)
    out = pipe._generate([ids], {"max_new_tokens": n})[0][0]
    return pipe.tokenizer.decode(out, skip_special_tokens=True)


def test_a_piped_conversation_is_remembered_saved_and_reset(gemmakit, tiny, pipe, tmp_path):
    file = tmp_path / "talk.json"
    lines = [
        "hello",
        "",
        "/system be brief",
        "how are\\",
        "you",
        f"/save {file}",
        "/reset",
        "hello",
        "/bogus",
        "/quit",
        "x",
    ]
    done = gemmakit("chat", "--model", tiny, "-n", "6", stdin="\n".join(lines) + "\n")
    assert done.returncode == 0
    saved = json.loads(file.read_text())["messages"]
    assert [m["role"] for m in saved] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in saved if m["role"] == "user"] == ["hello", "how are\nyou"]
    assert saved[2]["content"] == answered(pipe, [{"role": "user", "content": "hello"}], 6)
    assert saved[4]["content"] == answered(pipe, saved[:4], 6)
    assert saved[2]["content"] in done.stdout
    assert saved[4]["content"] in done.stdout
    assert "no command /bogus" in done.stderr
    assert done.stderr.count("cut off after 6 tokens") == 3


def test_the_kept_cache_changes_no_answer(pipe):
    talk = Conversation(pipe, {"max_new_tokens": 8})
    for question in ("one", "two", "three"):
        said = talk.ask(question, ignore)
        history = talk.messages[:-1]
        assert said.text == answered(pipe, history, 8)
    talk.reset()
    assert talk.ask("three", ignore).text == answered(pipe, [{"role": "user", "content": "three"}], 8)


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so(pipe, tiny, monkeypatch, capsys):
    monkeypatch.setattr(pipe.model.config, "max_position_embeddings", 120)
    talk = Conversation(pipe, {"max_new_tokens": 30})
    while not talk.forgotten:
        before = len(talk.messages)
        talk.ask("a question of several words", ignore)
        assert len(talk.messages) == before + 2
    assert len(talk.messages) > talk.forgotten >= 2
    with pytest.raises(PromptTooLong, match="context holds 120"):
        talk.ask("word " * 200, ignore)
    assert len(talk.messages) == before + 2


def test_an_interrupted_answer_keeps_its_text_and_an_empty_one_its_question_out(pipe, monkeypatch):
    talk = Conversation(pipe, {"max_new_tokens": 50})
    shown: list[str] = []

    def interrupt_later(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    said = talk.ask("hello", interrupt_later)
    assert said.finish_reason == "interrupted"
    assert talk.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": said.text}]
    assert said.text.startswith("".join(shown))
    after = talk.ask("and then?", ignore)
    assert after.text == answered(pipe, talk.messages[:-1], 50)
    nothing = Answer(text="", finish_reason="interrupted", prompt_tokens=1, new_tokens=0, first_s=0.0, rest_s=0.0)
    monkeypatch.setattr("gemmakit.cli.conversation.answer", lambda *_, **__: nothing)
    talk.ask("never mind", ignore)
    assert len(talk.messages) == 4


class Terminal:
    """A command at a pseudo-terminal, with what it has shown so far."""

    def __init__(self, *arguments: object, term: str = "dumb"):
        import pty

        self.pid, self.file = pty.fork()
        if self.pid == 0:
            line = command_line(*arguments)
            os.execve(line[0], line, environment(TERM=term))
        self.seen, self.place = "", 0

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())

    def until(self, text: str, seconds: float = 60) -> None:
        """Wait for `text` after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen[self.place :]:
            assert time.monotonic() < end, f"{text!r} did not come after {self.seen!r}"
            if select.select([self.file], [], [], 0.1)[0]:
                try:
                    self.seen += os.read(self.file, 4096).decode(errors="replace")
                except OSError:
                    raise AssertionError(f"the command ended before {text!r}: {self.seen!r}") from None
        self.place = self.seen.index(text, self.place) + len(text)

    def until_more(self, seconds: float = 60) -> None:
        """Wait for anything at all."""
        if self.place == len(self.seen):
            assert select.select([self.file], [], [], seconds)[0], f"nothing came after {self.seen!r}"

    def end(self, seconds: float = 60) -> int:
        """The exit code; a command that does not end is killed."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if select.select([self.file], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.file, 4096).decode(errors="replace")
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
        os.kill(self.pid, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_at_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(tiny, tmp_path):
    file = tmp_path / "talk.json"
    terminal = Terminal("chat", "--model", tiny, "-n", 3000)
    try:
        terminal.until("context of 4096 tokens")
        terminal.until("> ")
        terminal.type("hello\n")
        terminal.until("hello\r\n")
        terminal.until_more()
        terminal.type("\x03")
        terminal.until("\r\n> ")
        terminal.type(f"/save {file}\n")
        terminal.until("saved 2 messages")
        terminal.until("\r\n> ")  # before the prompt is there, Ctrl-D would be the terminal's own end of file
        terminal.type("\x04")
    finally:
        code = terminal.end()
    assert code == 0, terminal.seen
    question, answer = json.loads(file.read_text())["messages"]
    assert question == {"role": "user", "content": "hello"}
    assert answer["content"]


def test_no_messages_is_no_error(tiny, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", None)
    assert main(["chat", "--model", str(tiny)]) == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
