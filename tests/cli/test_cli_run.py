"""gemmakit run, as a user meets it."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from cli_process import command_line, environment

import gemmakit as package
from gemmakit.cli import main
from gemmakit.cli.shell import show
from gemmakit.errors import CheckpointError

DEMO = Path(package.__file__).with_name("demo") / "model.safetensors"


def one_line(message: str) -> bool:
    return message.startswith("gemmakit: ") and message.count("\n") == 1 and "Traceback" not in message


def test_text_is_the_same_from_argument_and_stdin_and_is_what_generate_gives(gemmakit, tiny):
    argued = gemmakit("run", "def add(", "--model", tiny, "-n", "12", "--stats")
    piped = gemmakit(
        "run", "--task", "text-generation", "--model", tiny, "--device", "cpu", "-n", "12", stdin="def add(\n"
    )
    pipe = package.pipeline("text-generation", str(tiny))
    expected = pipe("def add(", max_new_tokens=12, return_full_text=False)[0]["generated_text"]
    assert (argued.returncode, piped.returncode) == (0, 0)
    assert argued.stdout == piped.stdout == expected + "\n"
    assert piped.stderr == ""
    assert one_line(argued.stderr)
    assert "12 new tokens at" in argued.stderr
    assert "tokens/s" in argued.stderr


def test_drafts_change_no_word(said, tiny):
    asked = ("run", "def add(", "--model", tiny, "-n", "24", "--dtype", "float32")
    for drawn in ((), ("--seed", "3")):
        plain = said(*asked, *drawn, "--no-speculate")
        assert plain[0] == 0
        assert all(said(*asked, *drawn, *more) == plain for more in (("--draft", tiny), ("--speculate",), ()))


@pytest.mark.parametrize(
    ("more", "names"),
    [
        (("--tensor", "2"), "--draft helps"), (("--backend", "flax"), "--draft helps"),
        (("--server", "http://127.0.0.1:1"), "--draft"), (("--task", "ner"), "--draft"),
    ],
)  # fmt: skip
def test_a_draft_that_would_not_be_asked_is_refused(said, tiny, more, names):
    code, _, beside = said("run", "x", "--draft", tiny, *more)
    assert code == 2 and names in beside and one_line(beside)


@pytest.mark.parametrize("option", ["--speculate", "--no-speculate"])
@pytest.mark.parametrize("more", [("--backend", "flax"), ("--server", "http://127.0.0.1:1"), ("--task", "ner")])
def test_a_wish_about_speculation_that_nobody_would_read_is_refused(said, tiny, option, more):
    code, _, beside = said("run", "x", "--model", tiny, option, *more)
    assert code == 2 and "--speculate" in beside and one_line(beside)
    assert more[0].removeprefix("--") in beside


def test_json_is_one_object_a_prompt(gemmakit, tiny):
    done = gemmakit("run", "--chat", "--json", "--model", tiny, "-n", "5", stdin="hello")
    record = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    assert {k: record[k] for k in ("prompt", "finish_reason", "new_tokens")} == {
        "prompt": "hello", "finish_reason": "length", "new_tokens": 5,
    }  # fmt: skip
    pipe = package.pipeline("text-generation", str(tiny))
    assert record["prompt_tokens"] == len(pipe.encode([{"role": "user", "content": "hello"}]))
    assert record["tokens_per_s"] > 0


def test_ctrl_c_stops_keeps_the_text_and_exits_130(tiny):
    line = command_line("run", "def add(", "--model", tiny, "-n", 4000)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    text = (first + rest).decode()
    assert process.returncode == 130
    assert errors == b""
    assert text.endswith("\n")
    pipe = package.pipeline("text-generation", str(tiny))
    expected = pipe("def add(", max_new_tokens=60, return_full_text=False)[0]["generated_text"]
    assert len(text) > 1
    assert text[:-1].startswith(expected) or expected.startswith(text[:-1])


def test_ctrl_c_that_native_code_turns_into_its_own_error_is_still_ctrl_c(monkeypatch, capsys):
    def mapping_a_file(*_, **__):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("gemmakit.pipeline", mapping_a_file)
    assert main(["run", "x"]) == 130
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("gemmakit.pipeline", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["run", "x"])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_reader_that_leaves_is_no_error(tiny):
    line = command_line("run", "x", "--model", tiny, "-n", 2000)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment())
    assert process.stdout is not None
    assert process.stderr is not None
    os.read(process.stdout.fileno(), 1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141


@pytest.mark.skipif(sys.platform == "win32", reason="closes a file descriptor by the shell")
def test_a_closed_or_full_output_is_one_line(tiny):
    line = subprocess.list2cmdline(command_line("run", "x", "--model", tiny, "-n", 3))
    for redirection in [">&-", *([">/dev/full"] if Path("/dev/full").exists() else [])]:
        done = subprocess.run(f"{line} {redirection}", shell=True, stderr=subprocess.PIPE, text=True, env=environment())
        assert done.returncode == 2
        assert one_line(done.stderr)


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (["run", "--model", "{tiny}"], b"", "standard input is empty"),
        (["run", "--model", "{tiny}"], b"\n", "standard input is empty"),
        (["run", "--model", "{tiny}"], b"\x7fELF\x02\xff\x00", "byte 0xff at offset 5"),
        (["run", "--model", "{tiny}"], "café".encode("latin-1"), "not UTF-8"),
        (["run", "x", "--model", "/no/such/folder"], b"", "does not exist"),
        (["run", "x", "--model", "{empty}"], b"", "config.json"),
        (["run", "x", "--model", "{tiny}", "--temperature", "nan"], b"", "temperature is nan"),
        (["run", "x", "--model", "{tiny}", "--top-p", "1.5"], b"", "top_p is 1.5"),
        (["run", "x", "--model", "{tiny}", "-n", "0"], b"", "max_new_tokens is 0"),
        (["run", "x", "--model", "{tiny}", "-n", "5000"], b"", "context holds 4096"),
        (["run", "x", "--model", "{tiny}", "--dtype", "int8"], b"", "dtype is 'int8'"),
        (["run", "x", "--model", "{tiny}", "--device", "moon"], b"", "moon"),
        (["run", "x", "--model", "{tiny}/model.safetensors"], b"", "Give the folder"),
        (["run", "x", "--model", "{tiny}", "--task", "dance"], b"", "no task 'dance'"),
        (["run", "x", "--model", "{foreign}"], b"", "model_type is 'llama'"),
        (["run", "--input", "{empty}/none.txt"], b"", "cannot be read"),
        (["run", "x", "--modle", "y"], b"", "--modle"),
        (["run", "x", "-n", "many"], b"", "--max-new-tokens"),
        (["chta"], b"", "Did you mean 'chat'?"),
        (["doctor", "./nothing"], b"", "does not exist"),
    ],
)
def test_a_users_error_is_one_line_and_exit_code_2(arguments, stdin, said, tiny, tmp_path, monkeypatch, capsys):
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "llama"}')
    places = {"tiny": tiny, "empty": tmp_path, "foreign": foreign}
    monkeypatch.setattr("sys.stdin", _Stdin(stdin))
    assert main([a.format(**places) for a in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert one_line(err)
    assert said in err


class _Stdin:
    def __init__(self, data: bytes):
        import io

        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


def test_debugging_lets_the_exception_through(monkeypatch):
    monkeypatch.setenv("GEMMAKIT_DEBUG", "1")
    with pytest.raises(CheckpointError, match="does not exist"):
        main(["run", "x", "--model", "/no/such/folder"])


def test_files_of_prompts_become_files_of_results(tiny, tmp_path, capsys):
    texts = ["def add(", "class A:", "x = 1"]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "in.csv").write_text("id,question\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(texts)))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"question": t}) + "\n" for t in texts))
    common = ["--model", str(tiny), "-n", "4"]
    assert main(["run", "--input", str(tmp_path / "in.txt"), *common]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["prompt"] for r in records] == texts
    assert all(r["new_tokens"] == 4 for r in records)
    for source, result in (("in.csv", "out.csv"), ("in.jsonl", "out.json")):
        files = ["--input", str(tmp_path / source), "--output", str(tmp_path / result)]
        assert main(["run", *files, "--column", "question", *common]) == 0
        assert main(["run", *files, "--column", "question", *common]) == 2
        assert "--overwrite" in capsys.readouterr().err
    written = json.loads((tmp_path / "out.json").read_text())
    table = list(csv.DictReader((tmp_path / "out.csv").open(newline="")))
    expected = [r["generated_text"] for r in records]
    assert [r["generated_text"] for r in written] == expected
    assert [r["generated_text"] for r in table] == expected
    assert main(["run", "--input", str(tmp_path / "in.csv"), *common]) == 2
    assert "it has id, question" in capsys.readouterr().err


def test_sampling_settings_sample_and_a_seed_repeats(tiny, capsys):
    def said(*options: str) -> str:
        assert main(["run", "def", "--model", str(tiny), "-n", "12", *options]) == 0
        return capsys.readouterr().out

    greedy = said()
    assert said("--greedy") == greedy
    assert said("--top-k", "1") == greedy
    drawn = said("--seed", "1", "--temperature", "2")
    assert drawn != greedy
    assert said("--seed", "1", "--temperature", "2") == drawn
    assert said("--seed", "1", "--temperature", "2", "--greedy") == greedy


def test_a_stop_text_ends_the_text(tiny, capsys):
    main(["run", "def", "--model", str(tiny), "-n", "20"])
    whole = capsys.readouterr().out.rstrip("\n")
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    assert main(["run", "def", "--model", str(tiny), "-n", "20", "--json", "--stop", stop]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["finish_reason"] == "stop"
    assert stop in record["generated_text"]
    assert whole.startswith(record["generated_text"])


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo model is not here")
def test_the_demo_model_answers_without_being_named(gemmakit):
    done = gemmakit("run", "--chat", "What is 34 + 58?", "--json")
    record = json.loads(done.stdout)
    assert done.returncode == 0
    assert "92" in record["generated_text"]
    assert record["finish_reason"] == "stop"


def test_generated_control_characters_reach_a_file_but_not_a_terminal(monkeypatch, capsys):
    text = "a\x1b[2Jb\x9b\tc\n\x07"
    show(text)
    assert capsys.readouterr().out == text
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    show(text)
    assert capsys.readouterr().out == "a\\x1b[2Jb\\x9b\tc\n\\x07"
