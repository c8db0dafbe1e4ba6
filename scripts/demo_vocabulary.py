"""Train a small SentencePiece vocabulary in Gemma's own layout, for tests, demonstrations and documentation.

    python scripts/demo_vocabulary.py out/tokenizer.model --vocab-size 2048 README.md docs/*.md

The first 473 ids are those of the released vocabulary (special tokens, unused tokens, turns, newline and space runs,
tags, bytes); what follows is learned from the texts. The same texts and settings always give the same bytes.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Iterable
from pathlib import Path

from gemmakit.text.vocabulary_files import BYTE, CONTROL, UNKNOWN, USER_DEFINED, ModelFile, Piece, _fields

_BLOCK_TAGS = ("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td")
_HEADING_TAGS = ("h1", "h2", "h3", "h4", "h5", "h6", "blockquote")
_INLINE_TAGS = ("strong", "em", "b", "i", "u", "s", "sub", "sup", "code")

# Some learned pieces turn out to be reserved ones ("▁▁"); the trainer learns this many more to make up for them.
_SPARE = 64
_USER_DEFINED_SYMBOLS = 31  # field of TrainerSpec


def reserved_pieces() -> list[Piece]:
    """Ids 0 to 472 of Gemma's vocabulary."""
    special = [
        Piece("<pad>", 0, CONTROL),
        Piece("<eos>", 0, CONTROL),
        Piece("<bos>", 0, CONTROL),
        Piece("<unk>", 0, UNKNOWN),
    ]
    texts = ["<mask>", "<2mass>", "[@BOS@]"]
    texts += [f"<unused{index}>" for index in range(99)]
    texts += ["<start_of_turn>", "<end_of_turn>"]
    texts += ["\n" * count for count in range(1, 32)]
    texts += ["▁" * count for count in range(2, 32)]
    for tags in (_BLOCK_TAGS, _HEADING_TAGS, _INLINE_TAGS):
        texts += [f"<{tag}>" for tag in tags] + [f"</{tag}>" for tag in tags]
    return [
        *special,
        *(Piece(text, 0, USER_DEFINED) for text in texts),
        *(Piece(f"<0x{value:02X}>", 0, BYTE) for value in range(256)),
    ]


def train(
    texts: Iterable[str], out: Path, vocab_size: int = 2048, seed: int = 0, character_coverage: float = 0.9995
) -> Path:
    """Train on `texts` and write the model to `out` (a `.model` file, or a folder for its `tokenizer.model`).

    `vocab_size` counts every id, the 473 reserved ones included; SentencePiece stops earlier if the texts hold fewer
    distinct pieces. `seed` only rotates the order of the lines (training is deterministic). Returns the file's path.
    """
    import sentencepiece

    out = Path(out)
    path = out if out.suffix == ".model" else out / "tokenizer.model"
    lines = sorted({line for text in texts for line in text.split("\n") if line and len(line.encode()) < 4000})
    if not lines:
        raise ValueError("no text to train on: every line is empty or longer than 4000 bytes.")
    turn = seed % len(lines)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines[turn:] + lines[:turn]),
        model_writer=buffer,
        model_type="bpe",
        vocab_size=vocab_size + _SPARE,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        # Stand-ins: the trainer's list cannot hold line ends. They keep the ids free; the real pieces replace them.
        user_defined_symbols=[f"<reserved{index}>" for index in range(4, 217)],
        character_coverage=character_coverage,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    model = ModelFile.parse(buffer.getvalue())
    reserved = reserved_pieces()
    model.pieces = reserved + _keep_best(model.pieces[len(reserved) :], reserved, vocab_size - len(reserved))
    # The pieces no longer hold all of that list.
    kept = (raw for field, _, _, raw in _fields(model.trainer_spec) if field != _USER_DEFINED_SYMBOLS)
    model.trainer_spec = b"".join(kept)
    model.validate()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.to_bytes())
    return path


def _keep_best(learned: list[Piece], reserved: list[Piece], room: int) -> list[Piece]:
    """At most `room` learned pieces, none of them reserved: all characters, and the best-scored longer pieces."""
    taken = {piece.text for piece in reserved}
    new = [piece for piece in learned if piece.text not in taken]
    characters = sum(len(piece.text) == 1 for piece in new)
    if characters > room:
        raise ValueError(f"{characters} characters do not fit beside {len(reserved)} reserved ids: raise vocab_size.")
    longer = [piece for piece in new if len(piece.text) > 1][: room - characters]
    return longer + [piece for piece in new if len(piece.text) == 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    texts = [path.read_text(encoding="utf-8") for path in options.texts]
    print(train(texts, options.out, vocab_size=options.vocab_size, seed=options.seed))


if __name__ == "__main__":
    main()
