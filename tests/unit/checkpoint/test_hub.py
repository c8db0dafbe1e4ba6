"""Names to files, against a server that speaks the Hub's protocol: every failure says which it is and what to do."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from safetensors.torch import save

import gemmakit
from gemmakit import hub
from gemmakit.errors import CheckpointError, HubError, UnsafeFile

ROOT = Path(next(iter(gemmakit.__path__))).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {f"model-0000{i}-of-00002.safetensors": save({f"t{i}": torch.full((4,), float(i))}) for i in (1, 2)}
INDEX = json.dumps({"weight_map": {f"t{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}).encode()
BODY = bytes(range(256)) * 400
LARGE = BODY * 200  # 20 MB: huggingface_hub keeps what has arrived in steps of 10 MB
REPOS = {
    "org/good": {"config.json": b"{}", "sub/x.txt": b"x", "model.safetensors.index.json": INDEX, **SHARDS},
    "org/single": {"model.safetensors": save({"w": torch.ones(2)})},
    "org/pickled": {"config.json": b"{}", "pytorch_model.bin": b"never read"},
    "org/resumes": {"big.bin": LARGE},
    "org/cut": {"big.bin": BODY},
    "org/short": {"big.bin": BODY},
    "org/empty": {"config.json": b"{}"},
    "gpt": {"config.json": b"{}"},
}
REFUSALS = {
    "org/gated": (403, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model org/gated is restricted."}),
    "org/gated401": (401, {"X-Error-Code": "GatedRepo"}),
    "org/private": (401, {"X-Error-Code": "RepoNotFound"}),
    "org/missing": (404, {"X-Error-Code": "RepoNotFound"}),
    "org/badtoken": (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
    "org/forbidden": (403, {"X-Error-Message": "no"}),
    "org/disabled": (403, {"X-Error-Message": "Access to this resource is disabled."}),
    "org/down": (503, {}),
    "org/broken": (500, {}),
    "org/busy": (429, {}),
    "org/readonly": (403, {"X-Error-Message": "write token needed"}),
}


class FakeHub(BaseHTTPRequestHandler):
    """Enough of the Hub: /{repo}/resolve/{revision}/{file}, the listings, and an upload by commit."""

    protocol_version = "HTTP/1.1"
    log: list = []  # noqa: RUF012
    uploaded: dict = {}  # noqa: RUF012

    def log_message(self, *_):
        pass

    def answer(self, status=200, headers=None, body=b"", send=None):
        self.send_response(status)
        for key, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if send is None else send)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).lstrip("/")
        self.log.append((self.command, path, self.headers.get("Authorization"), self.headers.get("Range")))
        if path.startswith("api/models/"):
            return self.listing(path.removeprefix("api/models/"))
        repo, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        if repo in REFUSALS:
            return self.answer(*REFUSALS[repo])
        if revision not in ("main", "v1", COMMIT):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if file not in REPOS[repo]:
            return self.answer(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        return self.file(repo, REPOS[repo][file])

    def file(self, repo, body):
        headers = {"ETag": f'"{hash(body) & 0xFFFFFFFF:x}"', "X-Repo-Commit": COMMIT}
        begin = int((self.headers.get("Range") or "bytes=0-").split("=")[1].split("-")[0])
        if self.command == "HEAD":
            return self.answer(headers=headers, body=body)
        if repo == "org/short":
            return self.answer(headers=headers, body=body[:1000])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        part = body[begin:]
        send = {"org/cut": b"" if begin else part[:1000], "org/resumes": part if begin else part[:15_000_000]}.get(repo)
        self.close_connection = send is not None
        return self.answer(206 if begin else 200, headers, part, send)

    def listing(self, path):
        repo = "/".join(path.split("/")[:2])
        if repo in REFUSALS:
            return self.answer(*REFUSALS[repo])
        files = REPOS.get(repo, {})
        if "/tree/" in path:
            content = [{"type": "file", "path": f, "size": len(b), "oid": "0" * 40} for f, b in files.items()]
        else:
            content = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
        return self.answer(headers={"Content-Type": "application/json"}, body=json.dumps(content).encode())

    def do_POST(self):
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.log.append((self.command, path, self.headers.get("Authorization"), None))
        base = f"http://{self.headers['Host']}"
        if "org/readonly" in path or b'"readonly"' in body:
            return self.answer(*REFUSALS["org/readonly"])
        if path == "/api/repos/create":
            asked = json.loads(body)
            content = {"url": f"{base}/{asked['organization']}/{asked['name']}"}
        elif "/preupload/" in path:
            content = {
                "files": [{**f, "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]]
            }
        elif "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            content = {"success": True, "commitOid": COMMIT, "commitUrl": f"{base}/org/new/commit/{COMMIT}"}
        else:
            content = {}
        return self.answer(headers={"Content-Type": "application/json"}, body=json.dumps(content).encode())


CHILD = """
import json, sys, time
from gemmakit import checkpoint, hub
time.sleep = lambda seconds: None
for name, arguments, options in json.load(sys.stdin):
    function = getattr(hub, name, None) or getattr(checkpoint, name)
    try:
        where = [] if name == "push_folder" else [hub.HubOptions.take(options)]
        result = function(*arguments, *where, **options)
        result = result.names() if name == "open_checkpoint" else result
    except Exception as error:
        result = {"kind": type(error).__name__, "says": str(error)}
    print("\\n@" + json.dumps(result, default=str))
"""


def call(calls, **env):
    """Run `calls`, a list of (function, arguments, options), in one fresh process; their results or errors."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps([(name, arguments, options) for name, arguments, options in calls]),
        env={
            **kept,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "NO_PROXY": "127.0.0.1",
            **{k: str(v) for k, v in env.items()},
        },
        capture_output=True,
        text=True,
        timeout=100,
    )
    results = [json.loads(line[1:]) for line in done.stdout.splitlines() if line.startswith("@")]
    assert len(results) == len(calls), done.stderr
    return results


def find(repo, file="config.json", **options):
    return ("find_file", [repo, file], options)


@pytest.fixture(scope="module")
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


REFUSED = {
    "gated": (
        find("org/gated"),
        ["is gated", "Accept its licence at https://huggingface.co/org/gated", "hf auth login"],
    ),
    "gated without a token": (find("org/gated401"), ["is gated", "hf auth login"]),
    "gated, optional": (find("org/gated", optional=True), ["is gated"]),
    "private or misspelt": (find("org/private"), ["no repository 'org/private'", "spelling", "hf auth login"]),
    "missing": (find("org/missing"), ["no repository 'org/missing'", "spelling"]),
    "missing, optional": (find("org/missing", optional=True), ["no repository"]),
    "token rejected": (find("org/badtoken"), ["does not accept the token", "401", "hf auth login"]),
    "token without permission": (find("org/forbidden"), ["forbids access", "403", "settings/tokens"]),
    "disabled": (find("org/disabled"), ["was disabled on the Hub"]),
    "server down": (find("org/down"), ["503", "run again"]),
    "server down, optional": (find("org/down", optional=True), ["503"]),
    "server broken": (find("org/broken"), ["500", "run again"]),
    "rate limit": (find("org/busy"), ["429", "Wait"]),
    "revision": (find("org/good", revision="v9"), ["no revision 'v9'", "/tree/main"]),
    "revision, optional": (find("org/good", revision="v9", optional=True), ["no revision 'v9'"]),
    "file": (find("org/good", "nope.json"), ["no file 'nope.json'", "revision 'main'"]),
    "file in a subfolder": (find("org/good", "nope.json", subfolder="sub"), ["no file 'sub/nope.json'"]),
    "no token": (find("org/good", token=True), ["no token", "hf auth login"]),
    "cut short": (find("org/cut", "big.bin"), ["interrupted", "Run again"]),
    "shorter than announced": (find("org/short", "big.bin"), ["interrupted", "Run again"]),
    "no Hub id": (find("what is this?"), ["neither an existing directory nor a Hub id"]),
    "not cached": (find("org/good", "sub/x.txt", local_files_only=True), ["local_files_only=True", "HF_HOME"]),
    "neither file": (
        ("open_checkpoint", ["org/empty"], {}),
        ["neither model.safetensors nor model.safetensors.index.json", "It holds: config.json."],
    ),
    "no write token": (("push_folder", ["FOLDER", "org/readonly"], {}), ["forbids", "write permission"]),
    "push to a gone repository": (("push_folder", ["FOLDER", "org/readonly"], {"token": "t"}), ["403"]),
}


@pytest.fixture(scope="module")
def refusals(endpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("push")
    calls = [
        (name, [str(folder) if a == "FOLDER" else a for a in args], kw) for (name, args, kw), _ in REFUSED.values()
    ]
    results = call(calls, HF_ENDPOINT=endpoint, HF_HOME=tmp_path_factory.mktemp("home"))
    return dict(zip(REFUSED, results, strict=True))


@pytest.mark.parametrize("case", REFUSED)
def test_each_failure_says_which_it_is_and_the_next_step(refusals, case):
    found = refusals[case]
    assert found["kind"] == "HubError", found
    for words in REFUSED[case][1]:
        assert words in found["says"]
    assert "\n" not in found["says"]


def test_files_come_from_the_hub_once_and_from_the_cache_afterwards(endpoint, tmp_path):
    FakeHub.log.clear()
    config, sub, absent, shards, names, single, short, listed, broken, resumed = call(
        [
            find("org/good", token="secret"),
            find("org/good", "x.txt", subfolder="sub", revision="v1"),
            find("org/good", "generation_config.json", optional=True),
            ("find_files", ["org/good", list(SHARDS)], {}),
            ("open_checkpoint", ["org/good"], {}),
            ("open_checkpoint", ["org/single"], {}),
            find("gpt"),
            ("list_files", ["org/good"], {}),
            find("org/resumes", "big.bin"),
            find("org/resumes", "big.bin"),
        ],
        HF_ENDPOINT=endpoint,
        HF_HOME=tmp_path,
    )
    assert Path(config).read_bytes() == b"{}"
    assert Path(config).is_relative_to(tmp_path)
    assert hub.commit_of(Path(config)) == COMMIT
    assert Path(sub).read_bytes() == b"x"
    assert absent is None
    assert [Path(path).read_bytes() for path in shards] == list(SHARDS.values())
    assert names == ["t1", "t2"]
    assert single == ["w"]
    assert Path(short).is_file()
    assert listed == sorted(REPOS["org/good"])
    # huggingface_hub before 1.x resumes at the next call, later versions within the same one.
    assert broken == resumed or "Run again" in broken["says"]
    assert Path(resumed).read_bytes() == LARGE
    begins = [begin for _, path, _, begin in FakeHub.log if path == "org/resumes/resolve/main/big.bin" and begin]
    assert begins == ["bytes=10485760-"]
    assert ("HEAD", "org/good/resolve/main/config.json", "Bearer secret", None) in FakeHub.log

    FakeHub.log.clear()
    offline = [
        find("org/good"),
        find("org/good", "generation_config.json", optional=True),
        find("org/good", "never_asked.json", optional=True),
        ("open_checkpoint", ["org/good"], {}),
        find("org/good", "never_asked.json"),
        find("org/other", optional=True),
        find("org/good", revision="v9", optional=True),
    ]
    for env in ({"HF_HUB_OFFLINE": 1}, {}):
        calls = [(n, a, kw if env else {**kw, "local_files_only": True}) for n, a, kw in offline]
        again, known, unknown, names, *errors = call(calls, HF_ENDPOINT=endpoint, HF_HOME=tmp_path, **env)
        assert (again, known, unknown, names) == (config, None, None, ["t1", "t2"])
        for error in errors:
            assert error["kind"] == "HubError"
            assert ("HF_HUB_OFFLINE is set" if env else "local_files_only=True") in error["says"]
    assert FakeHub.log == []

    unreachable = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": tmp_path}
    again, known, *errors = call(
        [
            offline[0],
            offline[1],
            offline[2],
            find("org/good", "never_asked.json"),
            find("org/other", optional=True),
            ("list_files", ["org/x"], {}),
        ],
        **unreachable,
    )
    assert (again, known) == (config, None)
    assert all("cannot be reached" in error["says"] and "proxy" in error["says"] for error in errors), errors
    assert "there is no 'org/other' here" in errors[2]["says"]


def test_interrupted_download_leaves_nothing_that_looks_whole_and_the_next_try_succeeds(
    endpoint, tmp_path, monkeypatch
):
    (failed,) = call([find("org/cut", "big.bin")], HF_ENDPOINT=endpoint, HF_HOME=tmp_path)
    assert "interrupted" in failed["says"]
    assert not [path for path in tmp_path.rglob("big.bin") if path.exists()]
    monkeypatch.setitem(REPOS, "org/single", {"big.bin": BODY, **REPOS["org/single"]})
    (found,) = call([find("org/single", "big.bin")], HF_ENDPOINT=endpoint, HF_HOME=tmp_path)
    assert Path(found).read_bytes() == BODY


def test_hub_pickle_is_refused_without_downloading_it(endpoint, tmp_path):
    FakeHub.log.clear()
    (refused,) = call([("open_checkpoint", ["org/pickled"], {})], HF_ENDPOINT=endpoint, HF_HOME=tmp_path)
    assert refused["kind"] == "UnsafeFile"
    assert "allow_pickle=True" in refused["says"]
    assert not [entry for entry in FakeHub.log if "pytorch_model.bin" in entry[1]]


def test_pushed_folder_arrives_without_hidden_files(endpoint, tmp_path):
    folder = tmp_path / "model"
    (folder / ".gemmakit-save-1-2").mkdir(parents=True)
    (folder / ".gemmakit-save-1-2" / "x").write_text("no")
    (folder / "config.json").write_text("{}")
    FakeHub.uploaded.clear()
    (address,) = call(
        [("push_folder", [str(folder), "org/new"], {})], HF_ENDPOINT=endpoint, HF_HOME=tmp_path, HF_TOKEN="t"
    )
    assert str(address).endswith(f"/org/new/commit/{COMMIT}"), address
    assert FakeHub.uploaded == {"config.json": b"{}"}
    with pytest.raises(CheckpointError, match="nothing to upload"):
        hub.push_folder(tmp_path / "none", "org/new")


def test_full_disk_and_unwritable_cache_are_told_apart():
    full = hub._explain(OSError(28, "No space left on device"), "a/b", "x", hub.HubOptions())
    assert isinstance(full, HubError)
    assert "disk filled up" in str(full)
    closed = hub._explain(PermissionError(13, "Permission denied", "/cache"), "a/b", "x", hub.HubOptions())
    assert "cannot be written" in str(closed)
    other = KeyError("bug")
    assert hub._explain(other, "a/b", "x", hub.HubOptions()) is other


UNSAFE = [
    "",
    "/a",
    "../a",
    "a/../b",
    "a//b",
    "./a",
    "a/",
    "..",
    "a\\b",
    "C:/a",
    "c:a",
    "a\0b",
    "\\\\host\\share",
    None,
    3,
]


@pytest.mark.parametrize("name", UNSAFE)
def test_file_name_that_leaves_its_folder_is_refused(tmp_path, name):
    with pytest.raises(UnsafeFile):
        hub.check_relative(name)
    if isinstance(name, str) and name:
        for call_ in (hub.find_file, lambda where, file: hub.find_files(where, ["a", file])):
            with pytest.raises(UnsafeFile):
                call_(tmp_path, name)
    with pytest.raises(UnsafeFile):
        hub.find_file("org/any", "config.json", hub.HubOptions(subfolder="../x"))


@pytest.mark.parametrize("name", ["a", "a.b", "sub/a", "..a", "a..b", "model-00001-of-00002.safetensors", "é"])
def test_plain_relative_name_is_itself(name):
    assert hub.check_relative(name) == name


def test_local_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name" / "sub").mkdir(parents=True)
    (tmp_path / "org/name/sub/config.json").write_text("{}")
    assert hub.find_file("org/name", "config.json", hub.HubOptions(subfolder="sub")) == Path("org/name/sub/config.json")
    assert hub.find_file("org/name", "config.json", optional=True) is None
    assert hub.list_files("org/name") == ["sub/config.json"]
    with pytest.raises(CheckpointError, match=r"no file 'config.json'.*It holds: sub\."):
        hub.find_file("org/name", "config.json")


def test_symlinks_in_a_local_directory_are_followed(tmp_path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").symlink_to("../blob")
    assert hub.find_file(tmp_path / "model", "config.json").read_text() == "{}"


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none-of-this", "a/b/c", "a\\b", "C:x", Path("none")])
def test_path_that_is_not_there_is_no_question_to_the_network(name):
    with pytest.raises(CheckpointError, match="does not exist"):
        hub.find_file(name, "config.json", optional=True)
