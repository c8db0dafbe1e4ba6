"""gemmakit env: versions for bug reports."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option

from gemmakit.cli import machine


def env(json_: Annotated[bool, Option("--json", help="As a JSON object.")] = False) -> int:
    """List versions, for bug reports."""
    found = machine.versions()
    if json_:
        print(json.dumps(found, indent=2))
        return 0
    width = max(map(len, found))
    for name, version in found.items():
        print(f"{name:<{width}}  {version}")
    return 0
