"""What quantization costs the demo model, each scheme against float32 and against its peers on the same weights.

    python benchmarks/quantized_quality.py [--tasks N] [--only NAME ...] [--llama-python PATH] [--output FILE]

Held-out perplexity of whole windows (prefill) and of a cache filled one token at a time (a decoding step), the mean
Kullback-Leibler divergence from float32, how often the likeliest token is float32's, accuracy on held-out questions,
and bytes of weights on disk. Rows of bitsandbytes need `pip install 'gemmakit[quantization]'`; those of transformers
that package; those of llama.cpp a Python that has llama-cpp-python, given by --llama-python.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import gemmakit
from gemmakit.errors import GemmakitError
from gemmakit.pytorch.quantize.modules import QuantizedWeight

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import demo_corpus  # noqa: E402 - scripts of this repository, not packages
import demo_tasks  # noqa: E402

DEMO = ROOT / "gemmakit" / "demo"
BOS = 2
STEPPED = 6  # windows whose tokens also go in one at a time
NEW_TOKENS = 48


# -- the text ----------------------------------------------------------------------------------------------------------


def windows(tokenizer: Any) -> list[list[int]]:
    """The held-out text, a <bos> before each piece, as `demo_tasks.perplexity` cuts it."""
    text = (ROOT / "benchmarks" / "data" / "held_out.txt").read_text(encoding="utf-8")
    ids, step = tokenizer(text, add_special_tokens=False)["input_ids"], demo_tasks.WINDOW - 1
    return [[BOS, *ids[i : i + step]] for i in range(0, len(ids), step)]


def calibration_ids(tokenizer: Any, rows: int = 96, width: int = 256) -> Tensor:
    """(rows, width) of what the demo model was trained on: two thirds Python's documentation, one third chats."""
    held = (ROOT / "benchmarks" / "data" / "held_out.txt").read_text(encoding="utf-8")
    draw = random.Random(0)
    prose = "\n\n".join(draw.sample(demo_corpus.training_texts(demo_corpus.documents(), held), 800))
    chats = []
    for _ in range(400):
        turns = demo_tasks.training_chat(draw)
        said = [*demo_tasks.messages(turns), {"role": "assistant", "content": turns[-1].answer}]
        chats.append(tokenizer.apply_chat_template(said, tokenize=False))
    a, b = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prose, "".join(chats)))
    pieces = [[BOS, *a[i * (width - 1) : (i + 1) * (width - 1)]] for i in range(rows * 2 // 3)]
    pieces += [b[i * width : (i + 1) * width] for i in range(rows - len(pieces))]
    return torch.tensor(pieces)


# -- what is measured --------------------------------------------------------------------------------------------------


class Side:
    """A model of gemmakit or transformers."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model = model.eval()
        self.generate = demo_tasks.greedy(model, tokenizer, max_new_tokens=NEW_TOKENS)

    @torch.inference_mode()
    def whole(self, piece: list[int]) -> Tensor:
        """Logits (S, V), all positions at once."""
        return self.model(input_ids=torch.tensor([piece]), use_cache=False).logits[0].float()

    @torch.inference_mode()
    def stepped(self, piece: list[int]) -> Tensor:
        """The same through a cache, a token at a time."""
        cache, out = None, []
        for token in piece:
            step = self.model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)
            cache = step.past_key_values
            out.append(step.logits[0, -1].float())
        return torch.stack(out)

    def nbytes(self) -> int:
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


class Unrounded(Side):
    """The same without the rounding of activations to 8 bits that passes over many tokens may do."""

    def whole(self, piece: list[int]) -> Tensor:
        weights = [m for m in self.model.modules() if isinstance(m, QuantizedWeight)]
        for module in weights:
            module.activation_bits = 16
        try:
            return super().whole(piece)
        finally:
            for module in weights:
                module.activation_bits = 8


class Llama:
    """llama.cpp, in another Python."""

    def __init__(self, python: str, gguf: Path, tokenizer: Any, pieces: list[list[int]]):
        self.tokenizer, self.gguf, self.pieces = tokenizer, gguf, pieces
        self.asked = {"gguf": str(gguf), "pieces": pieces, "stepped": STEPPED, "out": str(gguf.with_suffix(""))}
        self.python = python
        self._ask(prompts=[])
        self.logits = {kind: np.load(f"{self.asked['out']}.{kind}.npy", mmap_mode="r") for kind in ("whole", "stepped")}
        self.begins = np.cumsum([0, *map(len, pieces)])

    def _ask(self, prompts: list[list[int]]) -> Any:
        worker = Path(__file__).with_name("quality_llama.py")
        asked = {**self.asked, "prompts": prompts, "new_tokens": NEW_TOKENS, "pieces": [] if prompts else self.pieces}
        done = subprocess.run([self.python, worker], input=json.dumps(asked), capture_output=True, text=True)
        if done.returncode:
            raise GemmakitError(f"llama.cpp failed: {done.stderr[-300:]}")
        return json.loads(done.stdout)

    def _piece(self, kind: str, piece: list[int]) -> Tensor:
        begin = self.begins[self.pieces.index(piece)]
        return torch.from_numpy(np.array(self.logits[kind][begin : begin + len(piece)]))

    def whole(self, piece: list[int]) -> Tensor:
        return self._piece("whole", piece)

    def stepped(self, piece: list[int]) -> Tensor:
        return self._piece("stepped", piece)

    def generate(self, chats: list[list[dict[str, str]]]) -> list[str]:
        text = self.tokenizer.apply_chat_template
        prompts = [text(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        ids = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        said = self._ask(prompts=ids)["said"]
        return [self.tokenizer.decode(new, skip_special_tokens=True) for new in said]

    def nbytes(self) -> int:
        return self.gguf.stat().st_size


@dataclass
class Reference:
    """float32's log-probabilities, (tokens, V), of every way of running."""

    whole: Tensor
    stepped: Tensor


def compare(logits: Iterator[Tensor], pieces: list[list[int]], exact: Tensor | None) -> tuple[dict[str, float], Tensor]:
    """perplexity, mean divergence (nats) from `exact` and share of equal likeliest tokens; the log-probabilities."""
    found = torch.cat([piece[:-1].log_softmax(-1) for piece in logits])
    targets = torch.tensor([t for piece in pieces for t in piece[1:]])
    out = {"perplexity": float((-found.gather(1, targets[:, None]).double().mean()).exp())}
    if exact is not None:
        pairs = zip(exact.split(4096), found.split(4096), strict=True)
        out["kl"] = sum(float((p.exp() * (p - q)).sum().double()) for p, q in pairs) / len(found)
        out["same_token"] = float((exact.argmax(1) == found.argmax(1)).float().mean())
    return out, found


def measure(side: Any, pieces: list[list[int]], tasks: int, reference: Reference | None) -> tuple[dict, Reference]:
    few = pieces[:STEPPED]
    whole, a = compare(map(side.whole, pieces), pieces, reference and reference.whole)
    stepped, b = compare(map(side.stepped, few), few, reference and reference.stepped)
    shares = [demo_tasks.accuracy(side.generate, demo_tasks.held_out(t, tasks)) for t in demo_tasks.TASKS]
    row = {**whole, **{f"step_{k}": v for k, v in stepped.items()}, "accuracy": sum(shares) / len(shares)}
    return {**row, "bytes": side.nbytes()}, Reference(a, b)


# -- the rows ----------------------------------------------------------------------------------------------------------

Maker = Callable[[], Any]


def four(library: Any, kind: str, double: bool = False) -> Any:
    """4 bits of bitsandbytes, multiplied in float32, so that only the weights differ."""
    return library.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip


def rows(tokenizer: Any, pieces: list[list[int]], folder: Path, llama_python: str | None) -> dict[str, Maker]:
    """name -> what makes the side. Multiplied in float32 unless the name says otherwise."""

    def ours(path: Path = DEMO, dtype: torch.dtype = torch.float32, how: Any = None, side: Any = Side) -> Maker:
        load = gemmakit.GemmaForCausalLM.from_pretrained
        return lambda: side(load(path, dtype=dtype, quantization_config=how), tokenizer)

    def calibrated(how: str) -> Maker:
        def make() -> Side:
            out, ids = folder / how, calibration_ids(tokenizer)
            gemmakit.quantize_checkpoint(DEMO, out, how, calibration_ids=ids, overwrite=True)
            return ours(out)()

        return make

    def gguf(kind: str, head: str | None = None) -> Path:
        """The demo as a file of this kind; head: another kind for the embedding than gemmakit would choose."""
        path = folder / f"{kind}-{head}.gguf"
        if not path.exists():
            from gemmakit.checkpoint import open_checkpoint
            from gemmakit.checkpoint.formats import gguf_writing as writing
            from gemmakit.text.gguf import vocabulary_of

            usual = writing._kind_for

            def chosen(name: str, *shape: Any) -> str:
                return head if head and name == writing.EMBEDDING else usual(name, *shape)

            config = gemmakit.GemmaConfig.from_pretrained(DEMO)
            vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(DEMO))
            with open_checkpoint(DEMO) as checkpoint, mock.patch.object(writing, "_kind_for", chosen):
                writing.write_gguf(path, config, dict(checkpoint.items()), vocabulary, kind)
        return path

    def kept(kind: str) -> Maker:
        load = gemmakit.GemmaForCausalLM.from_pretrained
        return lambda: Side(load(gguf(kind)), tokenizer)

    def theirs(settings: Callable[[Any], Any] | None) -> Maker:
        def make() -> Side:
            import transformers

            transformers.logging.set_verbosity_error()
            config = {} if settings is None else {"quantization_config": settings(transformers)}
            load = transformers.GemmaForCausalLM.from_pretrained
            return Side(load(DEMO, dtype=torch.float32, **config), tokenizer)

        return make

    half = torch.bfloat16
    out = {
        "float32": ours(),
        "bfloat16": ours(dtype=half),
        "int8": ours(how="int8"),
        "int8, in bfloat16": ours(how="int8", dtype=half),
        "int8, activations unrounded": ours(how="int8", side=Unrounded),
        "int8, calibrated": calibrated("int8"),
        "int4 g32": ours(how="int4"),
        "int4 g32, in bfloat16": ours(how="int4", dtype=half),
        "int4 g32, activations unrounded": ours(how="int4", side=Unrounded),
        "int4 g32, steps too in 8 bits": ours(how="int4-a8"),
        "int4 g32, head int4": ours(how={"bits": 4, "group_size": 32, "head_bits": 4}),
        "int4 g32, calibrated": calibrated("int4"),
        "int4 g128": ours(how="int4-g128"),
        "int4 g128, head int4": ours(how={"bits": 4, "group_size": 128, "head_bits": 4}),
        "int4 g128, calibrated": calibrated("int4-g128"),
        "Q8_0": kept("Q8_0"),
        "Q4_0": kept("Q4_0"),
        "bitsandbytes int8": ours(how={"load_in_8bit": True}),
        "nf4": ours(how=four(gemmakit, "nf4")),
        "nf4, double": ours(how=four(gemmakit, "nf4", double=True)),
        "fp4": ours(how=four(gemmakit, "fp4")),
        "transformers float32": theirs(None),
        "transformers bitsandbytes int8": theirs(lambda t: t.BitsAndBytesConfig(load_in_8bit=True)),
        "transformers nf4": theirs(lambda t: four(t, "nf4")),
        "transformers fp4": theirs(lambda t: four(t, "fp4")),
    }
    if llama_python is not None:
        for kind in ("F16", "Q8_0", "Q4_0"):
            out[f"llama.cpp {kind}"] = lambda kind=kind: Llama(llama_python, gguf(kind), tokenizer, pieces)
        every = "llama.cpp Q4_0, head too"
        out[every] = lambda: Llama(llama_python, gguf("Q4_0", head="Q4_0"), tokenizer, pieces)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=50, help="questions a task")
    parser.add_argument("--only", nargs="+", help="rows to measure; float32 is always one")
    parser.add_argument("--llama-python", help="a Python that has llama-cpp-python")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = gemmakit.GemmaTokenizer.from_pretrained(DEMO)
    pieces = windows(tokenizer)
    about = {
        "model": "gemmakit/demo",
        "tokens": sum(len(p) - 1 for p in pieces),
        "tokens_stepped": sum(len(p) - 1 for p in pieces[:STEPPED]),
        "questions": options.tasks * len(demo_tasks.TASKS),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions(options.llama_python),
    }
    found: dict[str, Any] = {}
    reference: Reference | None = None
    print(f"{'weights':30} {'ratio':>8} {'by step':>8} {'KL':>8} {'same':>7} {'accuracy':>8} {'MB':>6}")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in rows(tokenizer, pieces, Path(folder), options.llama_python).items():
            if options.only and name not in ("float32", *options.only):
                continue
            start = time.perf_counter()
            try:
                row, logs = measure(make(), pieces, options.tasks, reference)
            except (GemmakitError, ImportError) as e:
                print(f"{name:30} {e}")
                continue
            reference = reference or logs
            found[name] = row
            for key in ("", "step_"):
                row[f"{key}ratio"] = row[f"{key}perplexity"] / found["float32"][f"{key}perplexity"]
            print(
                f"{name:30} {row['ratio']:8.4f} {row['step_ratio']:8.4f} {row.get('kl', 0):8.5f} "
                f"{row.get('same_token', 1):7.2%} {row['accuracy']:8.1%} {row['bytes'] / 1e6:6.2f}"
                f"   {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if options.output is not None:
                options.output.write_text(json.dumps({"about": about, "rows": found}, indent=2) + "\n")


def versions(llama_python: str | None) -> dict[str, str]:
    from importlib.metadata import version
    from importlib.util import find_spec

    out = {package: version(package) for package in ("bitsandbytes", "transformers") if find_spec(package)}
    if llama_python is not None:
        code = "import llama_cpp; print(llama_cpp.__version__)"
        done = subprocess.run([llama_python, "-c", code], capture_output=True, text=True, check=True)
        out["llama-cpp-python"] = done.stdout.strip()
    return out


if __name__ == "__main__":
    main()
