"""What every script here ends with: say the result, and write it where asked. Only the standard library."""

import json
from pathlib import Path


def finish(result: dict, out: Path | None, show: tuple[str, ...] = ()) -> None:
    """Print the fields `show` (all if none is named); write everything to `out`."""
    print(json.dumps({key: result[key] for key in show} if show else result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")
