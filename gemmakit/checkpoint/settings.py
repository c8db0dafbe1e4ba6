"""The settings that go with a checkpoint's weights: the model's configuration and the defaults of generation."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gemmakit.checkpoint.formats.orbax import OrbaxFile, is_orbax
from gemmakit.config import GemmaConfig
from gemmakit.errors import InputError
from gemmakit.generation import GenerationConfig
from gemmakit.hub import HubOptions, Name, find_file

_NONE: Mapping[str, str] = MappingProxyType({})


def config_for(
    name: Name,
    given: GemmaConfig | None,
    hub: HubOptions,
    overrides: Mapping[str, Any],
    instead: Mapping[str, str] = _NONE,
) -> GemmaConfig:
    """A configuration of one's own for a model that is loaded: a copy of the one given, or the checkpoint's.

    An Orbax folder's follows from its shapes where no config.json is there. overrides: fields of it. instead: what
    older code passes -> what says it now. Raises InputError for an override that is no field or that goes with a given
    configuration, and what `GemmaConfig.from_pretrained` does.
    """
    if given is not None:
        if overrides:
            raise InputError(f"config and {', '.join(overrides)} are both given: set the fields in the config.")
        return copy.deepcopy(given)
    if is_orbax(name) and not (Path(name) / "config.json").is_file():
        config = OrbaxFile(Path(name)).config()
        config.update(dict(overrides))
        return config
    config = GemmaConfig.from_pretrained(name, **vars(hub), **overrides)
    unknown = [k for k in overrides if k in config.extra]
    if unknown:
        said = "".join(f" Instead of {k}: {instead[k]}." for k in unknown if k in instead)
        raise InputError(
            f"from_pretrained has no argument {', '.join(unknown)}, nor has GemmaConfig such a field.{said}"
        )
    return config


def generation_for(name: Name, hub: HubOptions) -> GenerationConfig | None:
    """The checkpoint's generation_config.json; None where there is none, or where one file says everything itself."""
    if Path(name).is_file():
        return None
    found = find_file(name, "generation_config.json", hub, optional=True)
    return None if found is None else GenerationConfig.from_pretrained(found.parent)
