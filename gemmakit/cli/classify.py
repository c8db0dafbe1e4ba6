"""gemmakit run for the classification tasks: labels and entities, one a line or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import tee
from typing import Any

from gemmakit.cli.shell import show
from gemmakit.errors import InputError

# A line is a line, whatever the text has in it.
_ESCAPED = str.maketrans({"\t": "\\t", "\n": "\\n", "\r": "\\r"})


@dataclass(frozen=True)
class Found:
    """What is in a text: its label {"label", "score"}, or a list of its entities."""

    what: Any

    def record(self, text: str) -> dict[str, Any]:
        return {"text": text, **(self.what if isinstance(self.what, dict) else {"entities": self.what})}

    def lines(self) -> Iterator[str]:
        """Label and score, tab between; of an entity also where it starts and ends, and what it says."""
        if isinstance(self.what, dict):
            yield f"{self.what['label']}\t{self.what['score']:.4f}"
            return
        for e in self.what:
            name = e["entity_group"] if "entity_group" in e else e["entity"]
            yield f"{name}\t{e['score']:.4f}\t{e['start']}\t{e['end']}\t{e['word'].translate(_ESCAPED)}"


class Screen:
    """Standard output: lines, or a JSON object a text. Where several texts may come, an empty line ends the entities of
    each, or nobody could tell whose they are.
    """

    def __init__(self, plain: bool, several: bool):
        self.plain, self.several = plain, several

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass

    def put(self, text: str, said: Found) -> None:
        if not self.plain:
            print(json.dumps(said.record(text), ensure_ascii=False), flush=True)
            return
        ended = [""] if self.several and isinstance(said.what, list) else []
        show("".join(f"{line}\n" for line in (*said.lines(), *ended)))


def refuse_generation_options(task: str, options: Mapping[str, Any]) -> None:
    """Raises InputError naming the options that were given and mean nothing for `task`."""
    given = [name for name, value in options.items() if value is not None and value is not False and value != []]
    if given:
        raise InputError(f"{', '.join(given)}: of text-generation only; --task {task} has no use for it.")


def classify(pipe: Any, texts: Iterable[str], sink: Any, batch_size: int, **options: Any) -> None:
    """Put what `pipe` finds in each text into `sink`, in order, as soon as it is there."""
    fed, named = tee(texts)
    for text, what in zip(named, pipe(fed, batch_size=batch_size, **options), strict=False):
        sink.put(text, Found(what))
