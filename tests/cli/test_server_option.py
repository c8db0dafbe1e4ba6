"""--server: the same commands against a running server, with the answers that a model loaded here gives."""

from __future__ import annotations

import json
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server takes gemmakit[serve]")

from cli_process import command_line, environment

import gemmakit as package

KEY = "a secret"
HERE = ("--device", "cpu", "--dtype", "float32")
DEMO = package.demo_model()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo model behind the real command, on a free port; its key is KEY.

    In float32: in bfloat16 rounding decides between tokens that are nearly as likely, otherwise in a batch than alone.
    """
    log = tmp_path_factory.mktemp("server") / "log"
    arguments = command_line("serve", "--port", 0, "--device", "cpu", "--dtype", "float32", "--api-key", KEY)
    with log.open("wb") as out, subprocess.Popen(arguments, stderr=out, env=environment()) as process:
        until = time.monotonic() + 60
        while " on http" not in log.read_text() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        assert " on http" in log.read_text(), log.read_text()
        yield log.read_text().split(" on ")[1].split()[0]
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--greedy", "-n", "40", "If the file"),
        ("--chat", "What is 34 + 58?"),
        ("--greedy", "--repetition-penalty", "1.3", "-n", "30", "for i in"),
    ],
    ids=lambda options: options[0],
)
def test_a_text_is_that_of_the_model_loaded_here(gemmakit, url: str, options: tuple[str, ...]):
    here = gemmakit("run", *HERE, "--json", *options)
    there = gemmakit("run", "--server", url, "--json", *options, GEMMAKIT_API_KEY=f"{KEY},another")
    assert (here.returncode, there.returncode) == (0, 0), there.stderr
    ours, theirs = json.loads(here.stdout), json.loads(there.stdout)
    del ours["tokens_per_s"], theirs["tokens_per_s"]
    assert theirs == ours


def test_a_drawn_text_is_its_seeds_and_ends_before_its_stop(gemmakit, url: str):
    drawn = ("--temperature", "0.9", "--top-p", "0.95", "--json", "Return the")
    options = ("--server", url, "--api-key", KEY, *drawn)
    texts = [json.loads(gemmakit("run", *options, "--seed", seed).stdout)["generated_text"] for seed in (3, 4)]
    assert texts[0] != texts[1]
    assert json.loads(gemmakit("run", *HERE, *drawn, "--seed", 3).stdout)["generated_text"] == texts[0]
    cut = json.loads(gemmakit("run", *options, "--seed", 3, "--stop", texts[0][5:9]).stdout)
    assert cut["generated_text"] == texts[0][: texts[0].index(texts[0][5:9])]
    assert cut["finish_reason"] == "stop"
    free = [gemmakit("run", "--server", url, "--api-key", KEY, "--sample", "Return the").stdout for _ in range(3)]
    assert len(set(free)) > 1


def test_a_conversation_is_that_of_the_model_loaded_here(gemmakit, url: str, tmp_path: Path):
    files = tmp_path / "here.json", tmp_path / "there.json"
    for file, options in zip(files, (HERE, ("--server", f"{url}/v1", "--api-key", KEY)), strict=True):
        lines = ["What is 34 + 58?", "Sort 41, 7, 23", f"/save {file}", "/reset", "Sort 9, 2", "/bogus"]
        done = gemmakit("chat", "--greedy", "-n", "12", "--stats", *options, stdin="\n".join(lines))
        assert done.returncode == 0, done.stderr
        assert "no command /bogus" in done.stderr
        assert done.stderr.count("new tokens at") == 3
    here, there = (json.loads(file.read_text())["messages"] for file in files)
    assert there == here
    assert here[1]["content"] == "34 + 58 = 92"


def test_a_file_of_prompts_goes_to_the_server(gemmakit, url: str, tmp_path: Path):
    (tmp_path / "in.txt").write_text("If the\nReturn the\n")
    out = tmp_path / "out.jsonl"
    arguments = ("--server", url, "--api-key", KEY, "--input", tmp_path / "in.txt", "--output", out, "-n", 5)
    assert gemmakit("run", *arguments).returncode == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(r["prompt"], r["new_tokens"]) for r in records] == [("If the", 5), ("Return the", 5)]


def test_torch_is_not_loaded(url: str):
    script = (
        "import sys; from gemmakit.cli import main;"
        f"code = main(['run', '--server', {url!r}, '--api-key', {KEY!r}, '--chat', 'What is 34 + 58?']);"
        "sys.exit(code or 'torch' in sys.modules or 'httpx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment(), timeout=60, text=True)
    assert (done.returncode, done.stdout) == (0, "34 + 58 = 92\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--server", "http://127.0.0.1:1", "x"), "does not answer: Connection refused. Is it running?"),
        (("--server", "ftp://here", "x"), "it must be an address such as http://127.0.0.1:8000"),
        (("--server", "URL", "x"), "refuses (401): the key is missing or wrong"),
        (("--server", "URL", "--api-key", "no", "x"), "refuses (401): the key is missing or wrong"),
        (("--server", "URL", "--api-key", KEY, "--model", "gpt", "x"), "refuses (404)"),
        (("--server", "URL", "--api-key", KEY, "--top-p", "3", "x"), "refuses (400)"),
        (("--server", "URL", "--api-key", KEY, "x " * 5000), "tokens, but the context holds"),
        (
            ("--server", "URL", "--device", "cpu", "--revision", "a", "x"),
            "--device, --revision: of a model that is",
        ),
        (("--server", "URL", "--task", "text-classification", "x"), "--task: of a model that is loaded here"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(gemmakit, url: str, options: tuple[str, ...], said: str):
    done = gemmakit("run", *(url if option == "URL" else option for option in options))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    assert KEY not in done.stderr
    assert done.stdout == ""


class Halting(BaseHTTPRequestHandler):
    """Speaks the protocol and then does not go on: silent, or gone, in the middle of an answer. left: who hung up."""

    left: threading.Event
    gone = False
    protocol_version = "HTTP/1.0"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, text: str) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def do_GET(self) -> None:
        self.reply('{"data": [{"id": "halting", "max_model_len": 4096}]}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/tokenize":
            self.reply('{"count": 3}')
            return
        self.reply('data: {"choices": [{"text": "Half of", "finish_reason": null}]}\n\n: alive\n\n')
        if not self.gone:
            self.connection.settimeout(30)
            if self.connection.recv(1) == b"":
                self.left.set()


@pytest.fixture
def halting() -> Iterator[type[Halting]]:
    kind = type("kind", (Halting,), {"left": threading.Event()})
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        kind.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield kind
        server.shutdown()


def test_ctrl_c_keeps_the_text_and_hangs_up(halting):
    arguments = command_line("run", "--server", halting.url, "--stats", "x")
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert select.select([process.stdout], [], [], 60)[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stdout.read() == b"Half of\n"
        assert b"3 prompt tokens" in process.stderr.read()
    assert halting.left.wait(10)


def test_an_answer_that_breaks_off_is_an_error(gemmakit, halting):
    halting.gone = True
    done = gemmakit("run", "--server", halting.url, "x")
    assert (done.returncode, done.stdout) == (2, "Half of")
    assert "ended in the middle of the answer" in done.stderr
