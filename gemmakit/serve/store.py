"""Files and batches on one SQLite file: each change is whole or absent, whenever the process or the disk ends.

Contents are rows of the database too, so no name that a client gives is ever a path. A batch's results are appended as
pieces of its output file, by line, in the transaction that counts them: what is done is what is there.
"""

from __future__ import annotations

import io
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from gemmakit.errors import InputError
from gemmakit.serve.batch_runner import lock

PIECE_BYTES = 1 << 20
FILE, LOCK = "serve.sqlite", "serve.lock"
UNFINISHED = ("validating", "in_progress", "finalizing", "cancelling")
SCHEMA = """
create table if not exists files(id text primary key, owner text, bytes integer, created_at integer, expires_at integer,
    filename text, purpose text, listed integer);
create table if not exists pieces(file text, n integer, data blob, primary key(file, n));
create table if not exists batches(id text primary key, owner text, status text, created_at integer, expires_at integer,
    input text, output text, errors text, total integer default 0, completed integer default 0,
    failed integer default 0, said text);
"""


class Store:
    """The files and batches of a folder; for one process at a time, for all of its threads.

    `owner` stands for whoever asks: nobody is shown another's. Raises InputError for a folder that cannot be used or is
    in use, and a database that is damaged; sqlite3.Error where the disk is full.
    """

    def __init__(self, folder: Path):
        self._turn = threading.RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = (folder / LOCK).open("w")
        except OSError as error:
            raise InputError(f"--state {folder} cannot be written: {error.strerror}.") from None
        try:
            lock(self._lock.fileno(), folder)
            self._db = sqlite3.connect(folder / FILE, check_same_thread=False, isolation_level=None)
            self._db.row_factory = sqlite3.Row
            self._db.executescript("pragma journal_mode = wal; pragma synchronous = normal;" + SCHEMA)
            found = self._db.execute("pragma quick_check").fetchone()[0]
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            self.sweep()
        except sqlite3.Error as error:
            raise InputError(
                f"{folder / FILE} cannot be used ({error}). It was left as it is: "
                "restore a copy, or name another --state."
            ) from None

    def close(self) -> None:
        self._db.close()
        self._lock.close()

    def sweep(self) -> None:
        """Remove what has expired, and what uploads left that never ended."""
        with self._change() as db:
            busy = f"(select input from batches where status in {UNFINISHED})"
            db.execute(f"delete from files where listed and expires_at < ? and id not in {busy}", (_now(),))
            db.execute("delete from pieces where file not in (select id from files)")

    # -- files -----------------------------------------------------------------------------------------------------

    def add_file(
        self, owner: str, filename: str, purpose: str, content: BinaryIO, expires_after: int | None = None
    ) -> dict[str, Any]:
        name, size, n = _name("file-"), 0, 0
        try:
            while piece := content.read(PIECE_BYTES):
                self._run("insert into pieces values(?, ?, ?)", name, n, piece)
                size, n = size + len(piece), n + 1
            now = _now()
            expires = None if expires_after is None else now + expires_after
            values = (name, owner, size, now, expires, filename, purpose)
            self._run("insert into files values(?, ?, ?, ?, ?, ?, ?, 1)", *values)
        except BaseException:
            self._run("delete from pieces where file = ?", name)
            raise
        return cast("dict[str, Any]", self.file(owner, name))

    def file(self, owner: str, name: str) -> dict[str, Any] | None:
        """A file as OpenAI's API tells it; None where the owner has none of that name."""
        found = self._all("select * from files where id = ? and owner = ? and listed", name, owner)
        return _file(found[0]) if found else None

    def files(self, owner: str) -> list[dict[str, Any]]:
        """The newest first."""
        rows = self._all("select * from files where owner = ? and listed order by created_at desc, rowid desc", owner)
        return [_file(row) for row in rows]

    def content(self, name: str) -> Iterator[bytes]:
        """The bytes of a file, in pieces."""
        n = -1
        while found := self._all("select n, data from pieces where file = ? and n > ? order by n limit 1", name, n):
            n = found[0]["n"]
            yield found[0]["data"]

    def delete_file(self, name: str) -> str | None:
        """None; or the id of the unfinished batch that reads it, which keeps it."""
        with self._change() as db:
            busy = db.execute(f"select id from batches where input = ? and status in {UNFINISHED}", (name,)).fetchone()
            if busy:
                return busy["id"]
            db.execute("delete from files where id = ?", (name,))
            db.execute("delete from pieces where file = ?", (name,))
        return None

    # -- batches ---------------------------------------------------------------------------------------------------

    def add_batch(self, owner: str, input_file: str, window_s: int, said: Mapping[str, Any]) -> dict[str, Any]:
        """said: what the client sent and is told again."""
        name, now, files = _name("batch_"), _now(), (_name("file-"), _name("file-"))
        values = (name, owner, now, now + window_s, input_file, *files, json.dumps(said))
        with self._change() as db:
            for file, kind in zip(files, ("output", "error"), strict=True):
                db.execute(
                    "insert into files values(?, ?, 0, ?, null, ?, 'batch_output', 0)",
                    (file, owner, now, f"{name}_{kind}.jsonl"),
                )
            db.execute(
                "insert into batches(id, owner, status, created_at, expires_at, input, output, errors, said) "
                "values(?, ?, 'validating', ?, ?, ?, ?, ?, ?)",
                values,
            )
        return cast("dict[str, Any]", self.batch(owner, name))

    def batch(self, owner: str, name: str) -> dict[str, Any] | None:
        found = self._all("select * from batches where id = ? and owner = ?", name, owner)
        return self._batch(found[0]) if found else None

    def batches(self, owner: str) -> list[dict[str, Any]]:
        """The newest first."""
        rows = self._all("select * from batches where owner = ? order by created_at desc, rowid desc", owner)
        return [self._batch(row) for row in rows]

    def unfinished(self) -> list[dict[str, Any]]:
        """Everybody's batches that have work left, the oldest first, with `owner` and the ids of their files."""
        rows = self._all(f"select * from batches where status in {UNFINISHED} order by created_at, rowid")
        return [
            {**self._batch(row), "owner": row["owner"], "output": row["output"], "errors_file": row["errors"]}
            for row in rows
        ]

    def set_status(self, name: str, status: str, unless: Iterable[str] = (), **said: Any) -> None:
        """Go to a status, with the time of it; nothing where the batch is in one of `unless`."""
        with self._change() as db:
            row = db.execute("select * from batches where id = ?", (name,)).fetchone()
            if row is None or row["status"] in unless:
                return
            told = {**json.loads(row["said"]), f"{status}_at": max(_now(), row["created_at"]), **said}
            total = said.get("total", row["total"])
            values = (status, total, json.dumps(told), name)
            db.execute("update batches set status = ?, total = ?, said = ? where id = ?", values)

    def finish(self, name: str, status: str) -> None:
        """End a batch: its results are a file from now on, and so are its errors, where there are any."""
        with self._change() as db:
            row = db.execute("select * from batches where id = ?", (name,)).fetchone()
            keeps = (json.loads(row["said"]).get("output_expires_after") or {}).get("seconds")
            for file in (row["output"], row["errors"]):
                size = db.execute("select sum(length(data)) from pieces where file = ?", (file,)).fetchone()[0] or 0
                expires = None if keeps is None else _now() + keeps
                db.execute(
                    "update files set bytes = ?, listed = ?, expires_at = ? where id = ?",
                    (size, size > 0, expires, file),
                )
            self.set_status(name, status)

    def keep(self, batch: Mapping[str, Any], line: int, result: bytes, failed: bool) -> None:
        """Append what came of a line, once."""
        counter, file = ("failed", batch["errors_file"]) if failed else ("completed", batch["output"])
        with self._change() as db:
            db.execute("insert into pieces values(?, ?, ?)", (file, line, result))
            db.execute(f"update batches set {counter} = {counter} + 1 where id = ?", (batch["id"],))

    def lines_done(self, batch: Mapping[str, Any]) -> set[int]:
        rows = self._all("select n from pieces where file in (?, ?)", batch["output"], batch["errors_file"])
        return {row["n"] for row in rows}

    # -- inside ----------------------------------------------------------------------------------------------------

    def _batch(self, row: sqlite3.Row) -> dict[str, Any]:
        said = json.loads(row["said"])
        ids = {kind: name for kind in ("output", "errors") if (name := row[kind]) and self._listed(name)}
        times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
        return {
            "id": row["id"],
            "object": "batch",
            "endpoint": said["endpoint"],
            "errors": said.get("errors"),
            "input_file_id": row["input"],
            "completion_window": said["completion_window"],
            "status": row["status"],
            "output_file_id": ids.get("output"),
            "error_file_id": ids.get("errors"),
            "created_at": row["created_at"],
            "expires_at": row["expires_at"],
            **{f"{name}_at": said.get(f"{name}_at") for name in times},
            "request_counts": {name: row[name] for name in ("total", "completed", "failed")},
            "metadata": said.get("metadata"),
        }

    def _listed(self, name: str) -> bool:
        return bool(self._all("select 1 from files where id = ? and listed", name))

    @contextmanager
    def _change(self) -> Generator[sqlite3.Connection, None, None]:
        with self._turn:
            if self._db.in_transaction:
                yield self._db
                return
            self._db.execute("begin immediate")
            try:
                yield self._db
                self._db.execute("commit")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it already
                    self._db.execute("rollback")
                raise

    def _run(self, statement: str, *values: Any) -> None:
        with self._change() as db:
            db.execute(statement, values)

    def _all(self, query: str, *values: Any) -> list[sqlite3.Row]:
        with self._turn:
            return self._db.execute(query, values).fetchall()


class Pieces(io.RawIOBase):
    """Pieces of bytes as a file to read."""

    def __init__(self, pieces: Iterator[bytes]):
        self._pieces, self._left = pieces, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or next(self._pieces, b"")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def _file(row: sqlite3.Row) -> dict[str, Any]:
    told = ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
    return {"object": "file", "status": "processed", **{name: row[name] for name in told}}


def _name(kind: str) -> str:
    return kind + secrets.token_hex(12)


def _now() -> int:
    return int(time.time())
