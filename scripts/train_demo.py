"""Make the demo model that gemmakit carries: vocabulary, tokenizer, training, measurement, model card.

    python scripts/train_demo.py --out gemmakit/demo

Everything is drawn from `--seed`: on one machine, with one number of threads, the same command makes the same model.
`--state FOLDER` saves the training there regularly and goes on from it when started again.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

import demo_card
import demo_corpus
import demo_tasks
import demo_vocabulary

ROOT = Path(__file__).parent.parent
HELD_OUT_FILE = ROOT / "benchmarks" / "data" / "held_out.txt"

BOS, EOS, TURN, END_OF_TURN, NEWLINE = 2, 1, 106, 107, 108
IGNORED = -100


@dataclass(frozen=True)
class Recipe:
    """The sizes of the model and of its training."""

    vocab_size: int = 2048
    hidden_size: int = 192
    intermediate_size: int = 640
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    context: int = 512  # tokens in the longest rows; also max_position_embeddings
    short: int = 256  # tokens in most rows: attention costs less
    batch: int = 4096  # tokens in a batch
    matrix_rate: float = 0.01  # peak learning rate of the layers' matrices (Muon)
    other_rate: float = 0.004  # peak learning rate of the embedding and the norms (AdamW)
    weight_decay: float = 0.1
    warmup: int = 100  # steps
    fall_from: float = 0.38276  # share of the steps after which the rates fall as a square does,
    fall_over: float = 0.65172  # as if to zero over this share of the steps,
    floor: float = 0.28  # but no lower than this share of the peak,
    cooldown: float = 0.12  # until the last share of the steps, over which they fall to zero


@dataclass(frozen=True)
class Stage:
    """What the batches hold from the share `start` of the steps on: shares of rows; the rest of them are chats."""

    start: float
    text: float  # documentation
    sums: float  # bare sums and differences: few tokens each, so thousands of them
    weights: Mapping[str, int]
    ranges: demo_tasks.Ranges
    long_every: int = 0  # every so many steps the rows have `context` tokens


STAGES = (
    Stage(0.0, 0.375, 0.0, demo_tasks.WEIGHTS, demo_tasks.WIDE),
    Stage(0.38276, 0.1875, 0.0, demo_tasks.WEIGHTS, demo_tasks.WIDE),
    Stage(0.51724, 0.125, 0.25, demo_tasks.WEIGHTS_BESIDE_SUMS, demo_tasks.WIDE),
    Stage(0.68966, 0.0625, 0.125, demo_tasks.WEIGHTS_SHORT, demo_tasks.CLAIMED, long_every=8),
    Stage(0.7931, 0.0625, 0.125, demo_tasks.WEIGHTS_WITH_NUMBERING, demo_tasks.CLAIMED, long_every=8),
)


# -- data: every example is (token ids, labels), labels IGNORED where nothing is to be learned ---------------------

Example = tuple[list[int], list[int]]


def encode_chat(turns: list[demo_tasks.Turn], encode: Any) -> Example:
    """A chat in Gemma's turns; only answers and their <end_of_turn> are learned."""
    ids, labels = [BOS], [IGNORED]
    for turn in turns:
        asked = [TURN, *encode("user\n" + turn.question), END_OF_TURN, NEWLINE, TURN, *encode("model\n")]
        answer = [*encode(turn.answer), END_OF_TURN]
        ids += [*asked, *answer, NEWLINE]
        labels += [IGNORED] * len(asked) + answer + [IGNORED]
    return ids, labels


def text_examples(documents: list[list[int]], length: int, seed: int) -> Iterator[Example]:
    """The documents for ever, shuffled anew each time round, long ones cut at other places each time."""
    for epoch in itertools.count():
        rng = random.Random(f"{seed} text {epoch}")
        pieces = []
        for tokens in documents:
            first = length if len(tokens) <= length else rng.randint(length // 4, length)
            pieces += demo_corpus.pieces(tokens, length - 1, first)
        rng.shuffle(pieces)
        for piece in pieces:
            # The <bos> itself is never predicted: what stands before it is another document.
            yield [BOS, *piece], [IGNORED, *piece]


def chat_examples(encode: Any, most: int, stage: Stage, seed: int, step: int) -> Iterator[Example]:
    rng = random.Random(f"{seed} chat {step}")
    while True:
        yield encode_chat(demo_tasks.training_chat(rng, most, stage.weights, stage.ranges), encode)


def sum_examples(encode: Any, seed: int, step: int) -> Iterator[Example]:
    """Lines as "34 + 58 = 92", up to ten in an example; only what follows the equals sign is learned."""
    rng = random.Random(f"{seed} drill {step}")
    while True:
        ids, labels = [BOS], [IGNORED]
        for _ in range(rng.randint(1, 10)):
            turn = demo_tasks.draw(rng.choice(("sum", "difference")), rng, held=False)
            left, right = turn.answer.split(" = ")
            asked, answer = encode(f"{left} ="), [*encode(f" {right}"), NEWLINE]
            ids += asked + answer
            labels += [IGNORED] * len(asked) + answer
        yield ids, labels


def pack(examples: Iterator[Example], rows: int, length: int) -> list[torch.Tensor]:
    """Fill `rows` rows of `length` tokens: ids, labels, positions (restarting at each example), each (rows, length).

    What does not fit at the end of a row is dropped.
    """
    out: list[list[list[int]]] = [[], [], []]
    for _ in range(rows):
        row: list[list[int]] = [[], [], []]
        while len(row[0]) < length:
            ids, labels = next(examples)
            for column, values in zip(row, (ids, labels, range(len(ids))), strict=True):
                column.extend(values)
        for column, values in zip(out, row, strict=True):
            column.append(values[:length])
    return [torch.tensor(column, dtype=torch.long).view(rows, length) for column in out]


def batches(
    documents: list[list[int]], encode: Any, recipe: Recipe, seed: int, steps: range, last: int
) -> Iterator[list[torch.Tensor]]:
    """(token ids, labels, positions), each (rows, length), for each of `steps`, in a training of `last` steps."""
    text = {n: text_examples(documents, n, seed + i) for i, n in enumerate((recipe.short, recipe.context))}
    for step in range(steps.stop):
        stage = next(s for s in reversed(STAGES) if step >= round(s.start * last))
        long = stage.long_every and step % stage.long_every == 0
        length = recipe.context if long else recipe.short
        rows = recipe.batch // length
        text_rows, sum_rows = round(rows * stage.text), round(rows * stage.sums)
        packed = [pack(text[length], text_rows, length)]
        # A training that goes on draws the text it has seen, so that it sees the same from here on.
        if step in steps:
            packed.append(pack(sum_examples(encode, seed, step), sum_rows, length))
            chats = chat_examples(encode, 8 if long else 3, stage, seed, step)
            packed.append(pack(chats, rows - text_rows - sum_rows, length))
            yield [torch.cat(columns) for columns in zip(*packed, strict=True)]


# -- training ----------------------------------------------------------------------------------------------------------


def build(recipe: Recipe) -> Any:
    from gemmakit import GemmaConfig, GemmaForCausalLM

    return GemmaForCausalLM(
        GemmaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.intermediate_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            head_dim=recipe.head_dim,
            max_position_embeddings=recipe.context,
            # At rows this short plain matrix products train faster on a CPU than the fused kernel.
            attn_implementation="eager",
        )
    )


def optimizers(model: Any, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, which learns the tasks in fewer steps than AdamW; AdamW for what is left."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.matrix_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=recipe.other_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, steps: int, recipe: Recipe) -> float:
    """Share of the peak learning rate: rising, level, falling to a lower level, falling to zero."""
    start, span = round(steps * recipe.fall_from), round(steps * recipe.fall_over)
    level = max(recipe.floor, (max(0, start + span - step) / span) ** 2)
    return min(1.0, (step + 1) / recipe.warmup, level) * min(1.0, (steps - step) / (steps * recipe.cooldown))


def train(
    model: Any, data: Iterator[list[torch.Tensor]], recipe: Recipe, left: range, state: Path, saved: dict | None,
    compiled: bool,
) -> float:  # fmt: skip
    """Train in place for the steps in `left`. Returns the minutes of training, those of earlier runs included."""
    opts = optimizers(model, recipe)
    peaks = [opt.param_groups[0]["lr"] for opt in opts]
    earlier = 0.0
    if saved is not None:
        model.load_state_dict(saved["model"])
        for opt, values in zip(opts, saved["optimizers"], strict=True):
            opt.load_state_dict(values)
        earlier = saved["minutes"]
    forward = torch.compile(model, dynamic=False) if compiled else model
    report, started = demo_card.Progress(left.stop, recipe.batch), time.monotonic()
    model.train()
    for step, (ids, labels, positions) in zip(left, data, strict=True):
        for opt, peak in zip(opts, peaks, strict=True):
            opt.param_groups[0]["lr"] = peak * rate(step, left.stop, recipe)
        # On CPUs with bfloat16 units twice as fast; the weights themselves stay in float32.
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=ids, position_ids=positions, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
        model.zero_grad(set_to_none=True)
        report(step + 1, loss)
        minutes = earlier + (time.monotonic() - started) / 60
        if (step + 1) % 200 == 0 or step + 1 == left.stop:
            save_state(state, dict(model=model.state_dict(), optimizers=[o.state_dict() for o in opts], step=step + 1,
                                   minutes=minutes))  # fmt: skip
    return earlier + (time.monotonic() - started) / 60


def save_state(path: Path, values: dict) -> None:
    staged = path.with_suffix(".new")
    torch.save(values, staged)
    staged.replace(path)


# -- the whole ---------------------------------------------------------------------------------------------------------


def prepare(folder: Path, recipe: Recipe, seed: int) -> tuple[Any, list[list[int]]]:
    """Train the vocabulary, save the tokenizer in `folder`; returns it and the training documents as token ids."""
    from gemmakit import GemmaTokenizer

    documents = demo_corpus.documents()
    if not HELD_OUT_FILE.exists():
        HELD_OUT_FILE.parent.mkdir(parents=True, exist_ok=True)
        HELD_OUT_FILE.write_text(demo_corpus.held_out_text(documents), encoding="utf-8")
    texts = demo_corpus.training_texts(documents, HELD_OUT_FILE.read_text(encoding="utf-8"))
    rng = random.Random(f"{seed} vocabulary")
    spoken = [
        line
        for _ in range(10_000)
        for t in demo_tasks.training_chat(rng, ranges=demo_tasks.WIDE)
        for line in (t.question, t.answer)
    ]
    vocabulary = demo_vocabulary.train([*texts, *spoken], folder, vocab_size=recipe.vocab_size, seed=seed)
    tokenizer = GemmaTokenizer(str(vocabulary))
    tokenizer.save_pretrained(folder)
    return tokenizer, [[*tokenizer.encode(text, add_special_tokens=False), EOS] for text in texts]


def check_chat_encoding(tokenizer: Any, encode: Any) -> None:
    """Refuse to train on chats that look different from what the chat template will make of them."""
    rng = random.Random(0)
    for _ in range(20):
        turns = demo_tasks.training_chat(rng)
        said = [*demo_tasks.messages(turns), {"role": "assistant", "content": turns[-1].answer}]
        wanted = tokenizer.encode(tokenizer.apply_chat_template(said, tokenize=False), add_special_tokens=False)
        if encode_chat(turns, encode)[0] != wanted:
            raise SystemExit(f"the chat template and the training data differ on {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "gemmakit" / "demo")
    parser.add_argument("--steps", type=int, default=5800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="torch.compile: faster where a C++ compiler is")
    parser.add_argument("--questions", type=int, default=400, help="held-out questions a task in the measurement")
    parser.add_argument("--state", type=Path, help="folder to save the training in and to go on from")
    parser.add_argument("--note", default="", help="a sentence for the model card")
    options = parser.parse_args()

    recipe = Recipe()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    folder = options.state or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "training.pt"
    saved = torch.load(state) if state.exists() else None

    tokenizer, documents = prepare(options.out, recipe, options.seed)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    check_chat_encoding(tokenizer, encode)
    model = build(recipe)
    print(f"{model.num_parameters():,} parameters, {sum(map(len, documents)):,} tokens of text", flush=True)
    left = range(saved["step"] if saved else 0, options.steps)
    data = batches(documents, encode, recipe, options.seed, left, options.steps)
    minutes = train(model, data, recipe, left, state, saved, options.compile)
    save(model, options.out)
    stored, wide = (demo_card.measure(options.out, HELD_OUT_FILE, options.questions, d) for d in ("auto", "float32"))
    settings = dict(asdict(recipe), steps=options.steps, seed=options.seed, threads=options.threads,
                    compiled=options.compile, tokens=options.steps * recipe.batch, minutes=minutes)  # fmt: skip
    command = f"python scripts/train_demo.py --steps {options.steps} --seed {options.seed} --threads {options.threads}"
    demo_card.write_card(options.out, stored, wide, settings, command + " --compile" * options.compile, options.note)


def save(model: Any, folder: Path) -> None:
    """Write the model in bfloat16, to end its answers at <eos> or at the end of its turn."""
    from gemmakit import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0, bos_token_id=BOS, eos_token_id=[EOS, END_OF_TURN])
    model.to(torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
