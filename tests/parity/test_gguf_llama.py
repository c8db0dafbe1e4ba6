"""llama.cpp reads our GGUF files: the same ids, the same greedy continuations."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from pathlib import Path

import pytest
import torch

import gemmakit
from gemmakit import AutoModelForCausalLM, AutoTokenizer, GemmaConfig
from gemmakit.checkpoint import open_checkpoint
from gemmakit.checkpoint.formats.gguf_writing import write_gguf
from gemmakit.pytorch.adapters import LoraConfig, adapter_to_gguf, add_adapter, save_adapter
from gemmakit.text.gguf import vocabulary_of

PYTHON = os.environ.get("GEMMAKIT_LLAMA_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="GEMMAKIT_LLAMA_PYTHON=a Python that has llama-cpp-python would run it"),
]
NEW_TOKENS = 40
# llama.cpp rounds activations to 16 bits before it multiplies F16 and BF16 weights; of logits up to about 20 that
# leaves this. After the end of a turn the demo model says anything, and there two tokens can be as close.
NEAR = 0.02


def job(gguf: Path, **asked) -> dict:
    asked = {"gguf": str(gguf), "texts": [], "special": True, "prompts": [], "new_tokens": NEW_TOKENS, **asked}
    worker = Path(__file__).with_name("llama_worker.py")
    done = subprocess.run([str(PYTHON), str(worker)], input=json.dumps(asked), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo model in every kind that is written."""
    folder = tmp_path_factory.mktemp("gguf")
    source = gemmakit.demo_model()
    config = GemmaConfig.from_pretrained(source)
    vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(source))
    for kind in ("F32", "F16", "BF16", "Q8_0", "Q5_0", "Q4_0"):
        with open_checkpoint(source) as checkpoint:
            write_gguf(folder / f"{kind}.gguf", config, dict(checkpoint.items()), vocabulary, kind)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(gemmakit.demo_model())


def thousand_strings() -> list[str]:
    """Words, code, runs of blanks, Unicode, bytes without pieces, special tokens spelled out; without U+2581."""
    draw = random.Random(6)
    words = re.findall(
        r"\S+",
        "the a Paris letter number list seven counts of Which What is quick brown fox jumped over lazy dogs gemma-2b "
        "don't it's 3.14159 1,000,000 x86_64 https://example.org/a?b=c&d=%20 user@example.org",
    )
    code = ["def f(x):", "return x + 1", "if (a != b) {", "}", "#include <stdio.h>", "SELECT * FROM t;", "i++", "=>"]
    blanks = [" ", "  ", "   ", " " * 7, " " * 40, "\t", "\t\t", "\n", "\n\n", "\n" * 5, "\n" * 40, "\r\n", "\u00a0"]
    unicode = [
        "é",
        "e\u0301",
        "ß",
        "漢字",
        "日本語",
        "Ελλάδα",
        "русский",
        "עברית",
        "हिन्दी",
        "ﬁ",
        "½",
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
    ]
    rare = ["\x00", "\x01", "\x7f", "\u200b", "\ufeff", "\ufffd", "𓀀", "\U0010ffff", "☃", "†", "·"]
    special = ["<start_of_turn>", "<end_of_turn>", "<eos>", "<pad>", "<unk>", "<mask>", "<unused7>", "[@BOS@]"]
    tags = ["<b>", "</b>", "<h1>", "<table>", "</td>", "<0x41>", "<start_of_turn", "<unused99>", "<<b>>"]
    kinds = [words, code, blanks, unicode, rare, special, tags]

    def one() -> str:
        parts = []
        for _ in range(draw.randint(1, 14)):
            kind = draw.choices(kinds, weights=(6, 3, 4, 3, 1, 1, 1))[0]
            parts.append(draw.choice(kind))
            parts.append(draw.choice(["", " ", " ", "\n"]))
        return "".join(parts)

    every = [item for kind in kinds for item in kind]
    runs = [blank * n for blank in (" ", "\n", "\t") for n in range(1, 34)]
    pages = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))
    lines = [line for page in pages for line in page.read_text(encoding="utf-8").splitlines() if line]
    prose = draw.sample([line for line in lines if "\u2581" not in line], 300)
    return (every + runs + prose + ["", *(one() for _ in range(1000))])[:1000]


def test_a_thousand_strings_get_the_same_ids(folder, tokenizer):
    texts = thousand_strings()
    assert len(texts) == 1000
    assert len(set(texts)) > 900
    found = job(folder / "F16.gguf", texts=texts)["ids"]
    ours = [[tokenizer.bos_token_id, *ids] for ids in tokenizer(texts, add_special_tokens=False).input_ids]
    assert [text for text, a, b in zip(texts, ours, found, strict=True) if a != b] == []
    assert len({id for ids in ours for id in ids}) > 500  # pieces of every kind were met


def prompts(tokenizer) -> list[list[int]]:
    chats = [
        "What is 3 + 4?", "What is 12 - 5?", "Which is larger, 8 or 3?", "Reverse the word: stone",
        "Sort the numbers: 5 2 9 1", "How many letters has the word apple?", "Write the word tree in capital letters.",
        "What comes after Tuesday?", "Repeat the word moon three times.", "Hello!",
    ]  # fmt: skip
    texts = [
        "The", "Once upon a time", "1 2 3 4", "A, B, C,", "Question: What is 2 + 2?\nAnswer:", "def add(a, b):\n    ",
        "In the morning", "The number seven", "Monday, Tuesday,", "Sort: 3 1 2\n",
    ]  # fmt: skip
    asked = [tokenizer.apply_chat_template([{"role": "user", "content": c}], add_generation_prompt=True) for c in chats]
    asked = [list(ids["input_ids"] if hasattr(ids, "keys") else ids) for ids in asked]
    return [*asked, *(tokenizer(text).input_ids for text in texts)]


@pytest.mark.parametrize("kind", ["F16", "F32", "BF16"])
def test_twenty_prompts_continue_the_same(folder, tokenizer, kind):
    asked = prompts(tokenizer)
    assert len(asked) == 20
    model = AutoModelForCausalLM.from_pretrained(folder / f"{kind}.gguf", dtype=torch.float32)
    found = job(folder / f"{kind}.gguf", prompts=asked)
    parted = []
    for row, (ids, tokens, gaps) in enumerate(zip(asked, found["continuations"], found["gaps"], strict=True)):
        # Every step after what llama.cpp said so far: one difference does not hide the next.
        logits = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :]
        ours = logits.argmax(-1).tolist()
        end = next((i for i, token in enumerate(tokens) if token in model.config.eos_token_ids), NEW_TOKENS)
        parted += [(row, i, i > end, gaps[i]) for i in range(NEW_TOKENS) if tokens[i] != ours[i]]
    steps = NEW_TOKENS * len(asked)
    print(f"{kind}: {steps - len(parted)} of {steps} steps alike; others (prompt, step, after the end, gap): {parted}")
    assert [where for where in parted if not where[2]] == []
    assert all(gap < NEAR for *_, gap in parted)


def test_an_adapter_in_gguf_changes_what_llama_cpp_says_as_it_does_here(folder, tokenizer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / "F32.gguf", dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8)
    add_adapter(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
    save_adapter(model, config, tmp_path)
    adapter_to_gguf(tmp_path, tmp_path / "adapter.gguf", model.config)
    asked = prompts(tokenizer)[:10]
    plain = job(folder / "F32.gguf", prompts=asked)["continuations"]
    found = job(folder / "F32.gguf", prompts=asked, lora=str(tmp_path / "adapter.gguf"))
    assert found["continuations"] != plain
    parted = 0
    for ids, tokens, gaps in zip(asked, found["continuations"], found["gaps"], strict=True):
        ours = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
        wrong = [i for i in range(NEW_TOKENS) if tokens[i] != ours[i]]
        assert all(gaps[i] < NEAR for i in wrong)
        parted += len(wrong)
    assert parted < 0.02 * NEW_TOKENS * len(asked)


@pytest.mark.parametrize(("kind", "share"), [("Q8_0", 0.97), ("Q5_0", 0.95), ("Q4_0", 0.9)])
def test_quantized_files_continue_as_ours_do(folder, tokenizer, kind, share):
    """llama.cpp rounds activations to 8 bits where it multiplies blocks, so few steps may part."""
    asked = prompts(tokenizer)
    found = job(folder / f"{kind}.gguf", prompts=asked)
    model = AutoModelForCausalLM.from_pretrained(folder / f"{kind}.gguf")
    assert model.is_quantized
    same = []
    for ids, tokens in zip(asked, found["continuations"], strict=True):
        ours = model(torch.tensor([[*ids, *tokens[:-1]]])).logits[0, len(ids) - 1 :].argmax(-1).tolist()
        same += [a == b for a, b in zip(ours, tokens, strict=True)]
    print(f"{kind}: {sum(same)} of {len(same)} steps alike")
    assert sum(same) >= share * len(same)
    first = tokenizer.decode(found["continuations"][0])
    assert "7" in first.split("<end_of_turn>")[0]  # 3 + 4


def test_llama_cpp_sees_the_settings_of_the_model(folder, tokenizer):
    found = job(folder / "F16.gguf")
    assert (found["n_vocab"], found["eos"]) == (2048, tokenizer.eos_token_id)
    assert found["template"] == tokenizer.get_chat_template()


def test_blocks_that_llama_cpp_makes_are_read(folder, tmp_path):
    """K-quants need rows of 256: a model of that width, quantized by llama.cpp, against its own numbers."""
    config = GemmaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    made = gemmakit.GemmaForCausalLM(config)
    made.eval()
    source = tmp_path / "f32.gguf"
    tensors = {name: t for name, t in made.state_dict().items() if name != "lm_head.weight"}
    vocabulary = vocabulary_of(gemmakit.GemmaTokenizer.from_pretrained(gemmakit.demo_model()))
    write_gguf(source, config, tensors, vocabulary, "F32")
    ids = torch.arange(200, 240)[None]
    reference = made(ids).logits
    script = (
        "import sys, llama_cpp as l; p = l.llama_model_quantize_default_params(); p.ftype = int(sys.argv[3]);"
        "sys.exit(l.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), p))"
    )
    # llama_ftype: MOSTLY_Q4_0 2, Q4_1 3, Q8_0 7, Q5_0 8, Q5_1 9, Q4_K_M 15, Q5_K_M 17, Q6_K 18
    errors = {}
    for name, number in {
        "Q4_0": 2,
        "Q4_1": 3,
        "Q8_0": 7,
        "Q5_0": 8,
        "Q5_1": 9,
        "Q4_K": 15,
        "Q5_K": 17,
        "Q6_K": 18,
    }.items():
        path = tmp_path / f"{name}.gguf"
        subprocess.run(
            [str(PYTHON), "-c", script, str(source), str(path), str(number)], check=True, capture_output=True
        )
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        errors[name] = ((model(ids).logits - reference).norm() / reference.norm()).item()
        kept = AutoModelForCausalLM.from_pretrained(path)
        assert kept.is_quantized == (name in ("Q4_0", "Q5_0", "Q8_0"))
        assert kept.generate(ids, max_new_tokens=3, eos_token_id=None).shape == (1, 43)
    print(errors)
    # The noise of 4, 5, 6 and 8 bits on random weights; a wrong field of a block gives about 1.
    limits = {"Q4": 0.1, "Q5": 0.08, "Q6": 0.08, "Q8": 0.02}
    assert all(0 < error < limits[name[:2]] for name, error in errors.items())
