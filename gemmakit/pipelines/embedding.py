"""Texts to vectors: a Gemma without a head, the mean over its tokens, dense layers. EmbeddingGemma is such a folder.

The folder's layout is sentence-transformers': modules.json names the steps and where each has its settings and weights.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from gemmakit.auto import AutoTokenizer
from gemmakit.checkpoint import open_checkpoint, save_checkpoint
from gemmakit.checks import Whole, check
from gemmakit.errors import CheckpointError, InputError, NumericalError
from gemmakit.files import read_json_list, read_json_object, write_text
from gemmakit.hub import HubOptions, check_relative, find_file
from gemmakit.pipelines.base import padded
from gemmakit.pytorch.model import GemmaModel

MODULES, SETTINGS, LIMITS = "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json"
# By the names in files: nothing else is ever looked up.
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    f"{made.__module__}.{made.__name__}": made for made in (nn.Identity, nn.Tanh, nn.ReLU, nn.GELU, nn.SiLU, nn.Sigmoid)
}
SIMILARITIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda a, b: normalize(a, dim=-1) @ normalize(b, dim=-1).T,
    "dot": lambda a, b: a @ b.T,
    "euclidean": lambda a, b: -torch.cdist(a, b),
    "manhattan": lambda a, b: -torch.cdist(a, b, p=1.0),
}
# What the prompt of a document is called, the first that a model has.
DOCUMENT_PROMPTS = ("document", "passage", "corpus")


class Normalize(nn.Module):
    """Rows of Euclidean length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=-1)


class EmbeddingModel(nn.Module):
    """A text is its vector: `from_pretrained` a folder as sentence-transformers writes it, then `encode`.

    Named for what it is: `model` (a GemmaModel), `tokenizer`, and `stages`, which follow the mean over the tokens.
    `prompts` {name: text} stand before what is encoded; `default_prompt_name` where a call names none;
    `max_seq_length` tokens are read of a text; `similarity_fn_name` is that of `similarity`.
    """

    def __init__(self, model: GemmaModel, tokenizer: Any, stages: Sequence[nn.Module], files: dict[str, Any]):
        super().__init__()
        self.model, self.tokenizer, self.stages = model, tokenizer, nn.ModuleList(stages)
        self.files = files
        settings = files[SETTINGS]
        self.prompts: dict[str, str] = settings.get("prompts") or {}
        self.default_prompt_name: str | None = settings.get("default_prompt_name")
        self.similarity_fn_name: str = settings.get("similarity_fn_name") or "cosine"
        limits = (files[LIMITS].get("max_seq_length"), tokenizer.model_max_length, model.config.max_position_embeddings)
        self.max_seq_length = int(min(limit for limit in limits if limit is not None))
        self.include_prompt = bool(files[f"{_path(files[MODULES][1])}/config.json"].get("include_prompt", True))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> EmbeddingModel:
        """Load a folder or Hub id; arguments are those of `GemmaModel.from_pretrained` (dtype, device_map, revision).

        `dtype` is the Gemma's; the mean and the dense layers are computed in float32.
        Raises CheckpointError (no such folder, a step, pooling or activation that is unknown, weights of other shapes),
        UnsafeFile (a path that leaves the folder), and what `GemmaModel.from_pretrained` raises.
        """
        name, hub = pretrained_model_name_or_path, HubOptions.take({**kwargs})

        def read(file: str) -> dict[str, Any]:
            found = find_file(name, file, hub, optional=True)
            return {} if found is None else read_json_object(found)

        listed = find_file(name, MODULES, hub, optional=True)
        if listed is None:
            raise CheckpointError(
                f"{str(name)!r} has no {MODULES}: EmbeddingModel reads folders as sentence-transformers writes them. "
                "For hidden states of another checkpoint use AutoModel."
            )
        modules = read_json_list(listed)
        kinds = [_kind(module, listed) for module in modules]
        if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
            raise CheckpointError(
                f"{listed} has the steps {', '.join(kinds) or 'none'}; they must be Transformer, Pooling, then Dense "
                "and Normalize. Use sentence-transformers for another order."
            )
        first = _path(modules[0])
        kwargs["subfolder"] = _joined(hub.subfolder, first)
        files: dict[str, Any] = {MODULES: modules, SETTINGS: read(SETTINGS), LIMITS: read(_joined(first, LIMITS))}
        files |= {f"{_path(m)}/config.json": read(f"{_path(m)}/config.json") for m in modules[1:]}
        _check_settings(files[SETTINGS], files[LIMITS], files[f"{_path(modules[1])}/config.json"], listed.parent)
        model = GemmaModel.from_pretrained(name, **kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, **vars(replace(hub, subfolder=kwargs["subfolder"])))
        stages, width = list[nn.Module](), model.config.hidden_size
        for module, kind in zip(modules[2:], kinds[2:], strict=True):
            if kind == "Dense":
                where = replace(hub, subfolder=_joined(hub.subfolder, _path(module)))
                stage, width = _dense(files[f"{_path(module)}/config.json"], name, where, width)
            else:
                stage = Normalize()
            stages.append(stage.to(model.device))
        return cls(model, tokenizer, stages, files).eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, skipped: int = 0) -> Tensor:
        """(B, E) vectors of (B, S) ids padded on the right; the first `skipped` tokens are not in the mean."""
        hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False, return_dict=True)[0].float()
        counted = attention_mask.to(hidden.device, hidden.dtype)[..., None].clone()
        counted[:, :skipped] = 0
        x = (hidden * counted).sum(1) / counted.sum(1).clamp(min=1)
        for stage in self.stages:
            x = stage(x)
        return x

    @torch.no_grad()
    def encode(
        self,
        sentences: str | Sequence[str],
        prompt_name: str | None = None,
        prompt: str | None = None,
        batch_size: int = 32,
        *,
        truncate_dim: int | None = None,
        normalize_embeddings: bool = True,
        convert_to_numpy: bool = True,
    ) -> Any:
        """float32 vectors: (E,) of one text, (n, E) of a list. What is longer than `max_seq_length` is cut.

        Args:
            prompt_name: of `prompts`; or `prompt`, the words themselves, which win; else the model's default.
            batch_size: texts a pass, of about the same length; a text's vector does not depend on the others.
            truncate_dim: keep so many of the numbers, the first.
            normalize_embeddings: give every vector length 1, after it was truncated.
            convert_to_numpy: a numpy array; else a tensor on the model's device.

        Raises InputError for what is no text, an unknown prompt or a dimension that the vectors do not have.
        """
        check("batch_size", batch_size, Whole(1), InputError)
        if truncate_dim is not None:
            check("truncate_dim", truncate_dim, Whole(1, self.dimension), InputError)
        before = self._prompt(prompt_name, prompt)
        rows = self._rows([sentences] if isinstance(sentences, str) else sentences, before)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        skipped = 0 if self.include_prompt or not before else self._length(before)
        out = torch.empty(len(rows), self.dimension, device=self.model.device)
        for start in range(0, len(rows), batch_size):
            places = order[start : start + batch_size]
            pad = self.tokenizer.pad_token_id or 0
            batch = padded([rows[i] for i in places], pad, self.model.device, "right")
            out[places] = self(*batch, skipped).to(out)
        if not bool(out.isfinite().all()):
            raise NumericalError("the embeddings are not finite. Try dtype=torch.float32.")
        out = out[:, :truncate_dim]
        out = normalize(out, dim=-1) if normalize_embeddings else out
        out = out[0] if isinstance(sentences, str) else out
        return out.cpu().numpy() if convert_to_numpy else out

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "query", where the model has one and the call names no other."""
        return self._encode_as(("query",), sentences, options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """`encode` with the prompt "document" (or "passage", "corpus"), likewise."""
        return self._encode_as(DOCUMENT_PROMPTS, sentences, options)

    def similarity(self, a: Any, b: Any) -> Tensor:
        """(A, B) of how near vectors (A, E) or (E,) are to others, by `similarity_fn_name`: larger is nearer."""
        rows = [torch.atleast_2d(torch.as_tensor(x)).float() for x in (a, b)]
        return SIMILARITIES[self.similarity_fn_name](*rows)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write the folder, for `from_pretrained` here and for sentence-transformers."""
        folder, modules = Path(save_directory), self.files[MODULES]
        first = _path(modules[0])
        self.model.save_pretrained(folder / first)
        self.tokenizer.save_pretrained(folder / first)
        for module, stage in zip(modules[2:], self.stages, strict=True):
            if weights := stage.state_dict():
                save_checkpoint(weights, folder / _path(module))
        for file, values in sorted(self.files.items(), key=lambda item: item[0] == MODULES):  # which makes it one, last
            path = folder / first / file if file == LIMITS else folder / file
            write_text(path, json.dumps(values, indent=2, ensure_ascii=False))

    @property
    def dimension(self) -> int:
        """E, the numbers of a vector that is not truncated."""
        dense = [stage.get_submodule("linear") for stage in self.stages if isinstance(stage, nn.Sequential)]
        return cast("nn.Linear", dense[-1]).out_features if dense else self.model.config.hidden_size

    def _encode_as(self, names: Sequence[str], sentences: str | Sequence[str], options: dict[str, Any]) -> Any:
        if options.get("prompt_name") is None and options.get("prompt") is None:
            options["prompt_name"] = next((name for name in names if name in self.prompts), None)
        return self.encode(sentences, **options)

    def _prompt(self, name: str | None, prompt: str | None) -> str:
        name = self.default_prompt_name if name is None else name
        if prompt is not None or name is None:
            return prompt or ""
        if name not in self.prompts:
            raise InputError(
                f"prompt_name is {name!r}; this model has {', '.join(map(repr, self.prompts)) or 'none'}. "
                "Pass prompt= with the words themselves."
            )
        return self.prompts[name]

    def _rows(self, texts: Sequence[str], before: str) -> list[list[int]]:
        for place, text in enumerate(texts):
            if not isinstance(text, str):  # pyright: ignore[reportUnnecessaryIsInstance]  (callers may be untyped)
                raise InputError(f"encode takes a text or a list of texts; item {place} is a {type(text).__name__}.")
        full = [before + text for text in texts]
        options: dict[str, Any] = dict(truncation=True, max_length=self.max_seq_length, verbose=False)
        return self.tokenizer(full, **options)["input_ids"] if full else []

    def _length(self, before: str) -> int:
        """Tokens of a prompt: <bos> counts, the <eos> that follows it alone does not."""
        ids = self.tokenizer(before)["input_ids"]
        return len(ids) - (ids[-1] in self.tokenizer.all_special_ids)


def _path(module: Mapping[str, Any]) -> str:
    return module["path"]


def _joined(folder: str, inner: str) -> str:
    return "/".join(part for part in (folder.rstrip("/"), inner) if part)


def _kind(module: Any, where: Path) -> str:
    """The last part of a step's class name, which is never imported; its path is checked."""
    kind, path = (module.get("type"), module.get("path")) if isinstance(module, dict) else (None, None)
    if not isinstance(kind, str) or not isinstance(path, str):
        raise CheckpointError(f"{where} has the entry {module!r:.80}; it must have a type and a path, both text.")
    kind = kind.rpartition(".")[2]
    if path or kind != "Transformer":
        check_relative(path)
    return kind


def _check_settings(settings: Mapping[str, Any], limits: Mapping[str, Any], pooling: Any, where: Path) -> None:
    prompts = settings.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
        raise CheckpointError(f"{where / SETTINGS}: prompts is {prompts!r:.80}; it must be an object of texts.")
    similarity = settings.get("similarity_fn_name") or "cosine"
    if similarity not in SIMILARITIES:
        raise CheckpointError(
            f"{where / SETTINGS}: similarity_fn_name is {similarity!r}; it must be {', '.join(SIMILARITIES)}."
        )
    if (limit := limits.get("max_seq_length")) is not None:
        check("max_seq_length", limit, Whole(1), CheckpointError)
    old = [key.removeprefix("pooling_mode_") for key, on in pooling.items() if key.startswith("pooling_mode_") and on]
    modes = pooling.get("pooling_mode", old)
    if modes not in ("mean", ["mean"], ["mean_tokens"]):
        raise CheckpointError(f"{where}: the pooling is {modes!r}; gemmakit has the mean over a text's tokens only.")


def _dense(config: Mapping[str, Any], name: Any, hub: HubOptions, width: int) -> tuple[nn.Module, int]:
    """A dense layer with its weights, in float32, and how wide its output is."""
    where = f"{name}, {hub.subfolder}"
    for key in ("in_features", "out_features"):
        check(f"{where}: {key}", config.get(key), Whole(1, 2**20), CheckpointError)
    activation = config.get("activation_function", f"{nn.Tanh.__module__}.{nn.Tanh.__name__}")
    if activation not in ACTIVATIONS or config.get("use_residual"):
        found = f"activation_function {activation!r}" if activation not in ACTIVATIONS else "use_residual"
        raise CheckpointError(f"{where} has {found}; gemmakit has {', '.join(ACTIVATIONS)}, without residual.")
    if config["in_features"] != width:
        raise CheckpointError(f"{where}: in_features is {config['in_features']}, but it is given {width} numbers.")
    with torch.device("meta"):
        linear = nn.Linear(width, config["out_features"], bias=bool(config.get("bias", True)))
    layer = nn.Sequential(OrderedDict(linear=linear, activation_function=ACTIVATIONS[activation]()))
    with open_checkpoint(name, hub) as checkpoint:
        wanted, found = {n: tuple(p.shape) for n, p in layer.state_dict().items()}, checkpoint.shapes()
        if wanted != found:
            raise CheckpointError(f"{where} holds {found}; its config.json asks for {wanted}.")
        layer.load_state_dict({n: checkpoint.tensor(n).float() for n in wanted}, assign=True)
    return layer, linear.out_features
