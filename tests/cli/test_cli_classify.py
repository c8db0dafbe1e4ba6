"""gemmakit run --task for classification, and the ways in and out that all tasks share."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from tiny_checkpoint import tiny_config, write_vocabulary

import gemmakit as package
from gemmakit.cli import main

TEXTS = ["def add(self, other):", "Zoë went to München", "x"]
LABELS = {0: "O", 1: "B-PER", 2: "I-PER", 3: "LOC"}


def make(folder, kind, **fields) -> str:
    write_vocabulary(folder)
    torch.manual_seed(3)
    model = getattr(package, f"GemmaFor{kind}Classification")(tiny_config(**fields))
    with torch.no_grad():
        model.score.weight.normal_(0, 0.7)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def labelling(tmp_path_factory) -> str:
    return make(tmp_path_factory.mktemp("s"), "Sequence", id2label={0: "bad", 1: "good"})


@pytest.fixture(scope="module")
def tagging(tmp_path_factory) -> str:
    return make(tmp_path_factory.mktemp("t"), "Token", id2label=LABELS)


def run(capsys, *arguments) -> str:
    assert main(["run", *map(str, arguments)]) == 0
    return capsys.readouterr().out


class _Stdin:
    def __init__(self, text: str):
        self.buffer = io.BytesIO(text.encode())

    def isatty(self) -> bool:
        return False


def test_a_label_a_line_through_the_real_command(gemmakit, labelling):
    found = package.pipeline("text-classification", labelling)(TEXTS)
    done = gemmakit(
        "run", "--task", "sentiment-analysis", "--model", labelling, "--format", "pipe", stdin="\n".join(TEXTS) + "\n"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{r['label']}\t{r['score']:.4f}" for r in found]


def test_a_label_of_an_argument_plain_and_as_json(labelling, capsys):
    found = package.pipeline("text-classification", labelling)(TEXTS[0])[0]
    common = (TEXTS[0], "--task", "text-classification", "--model", labelling)
    assert run(capsys, *common) == f"{found['label']}\t{found['score']:.4f}\n"
    assert json.loads(run(capsys, *common, "--json")) == {"text": TEXTS[0], **found}


@pytest.mark.parametrize("how", ["none", "simple", "average"])
def test_entities_one_a_line_and_as_json(tagging, capsys, how):
    text = TEXTS[1] + "\n\tand more"
    found = package.pipeline("ner", tagging, aggregation_strategy=how)(text)
    common = (text, "--task", "ner", "--model", tagging, "--aggregation", how)
    lines = run(capsys, *common).splitlines()
    key = "entity" if how == "none" else "entity_group"
    assert [line.split("\t")[:4] for line in lines] == [
        [e[key], f"{e['score']:.4f}", str(e["start"]), str(e["end"])] for e in found
    ]
    assert any("\\n" in line.split("\t")[4] for line in lines)
    assert json.loads(run(capsys, *common, "--json")) == {"text": text, "entities": found}


def test_entities_of_several_texts_are_parted_by_an_empty_line(tagging, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    found = package.pipeline("ner", tagging, aggregation_strategy="simple")(TEXTS)
    out = run(capsys, "--task", "ner", "--model", tagging, "--input", tmp_path / "in.txt")
    blocks = out.split("\n\n") if found[-1] else out[:-1].split("\n\n")
    assert [len(b.splitlines()) for b in blocks if b][: len(TEXTS)] == [len(f) for f in found if f]
    assert out.endswith("\n\n")


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_files_become_files(labelling, tagging, tmp_path, capsys, task):
    model = labelling if task == "text-classification" else tagging
    (tmp_path / "in.csv").write_text("id,said\n" + "".join(f'{i},"{t}"\n' for i, t in enumerate(TEXTS)))
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    common = ["--task", task, "--model", model]
    printed = [json.loads(x) for x in run(capsys, *common, "--input", tmp_path / "in.jsonl", "--json").splitlines()]
    assert [r["text"] for r in printed] == TEXTS
    files = ["--input", tmp_path / "in.csv", "--column", "said"]
    for name in ("out.json", "out.jsonl", "out.csv"):
        assert run(capsys, *common, *files, "--output", tmp_path / name) == ""
    assert json.loads((tmp_path / "out.json").read_text()) == printed
    assert [json.loads(x) for x in (tmp_path / "out.jsonl").read_text().splitlines()] == printed
    rows = list(csv.DictReader((tmp_path / "out.csv").open(newline="", encoding="utf-8")))
    key = "score" if task == "text-classification" else "entities"
    assert [json.loads(row[key]) for row in rows] == [r[key] for r in printed]
    again = ["run", *map(str, [*common, *files, "--output", tmp_path / "out.csv"])]
    assert main(again) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*again, "--overwrite"]) == 0


@pytest.mark.parametrize("kind", ["text", "json", "jsonl", "csv"])
def test_standard_input_can_hold_every_kind(labelling, capsys, monkeypatch, kind):
    items = [{"text": t} for t in TEXTS]
    whole = {
        "text": "\n".join(TEXTS),
        "json": json.dumps(items),
        "jsonl": "\n".join(map(json.dumps, items)),
        "csv": "text\n" + "\n".join(f'"{t}"' for t in TEXTS),
    }[kind]
    monkeypatch.setattr("sys.stdin", _Stdin(whole))
    out = run(capsys, "--task", "text-classification", "--model", labelling, "--format", kind, "--json")
    assert [json.loads(line)["text"] for line in out.splitlines()] == TEXTS


def test_piped_prompts_are_answered_in_a_line_each_before_the_next_is_read(tiny, capsys, monkeypatch):
    read = []

    class Lines:
        buffer = (read.append(t) or t.encode() + b"\r\n" for t in TEXTS)

    monkeypatch.setattr("sys.stdin", Lines)
    from gemmakit.cli import run as module

    answered = []
    put = module._Screen.put
    monkeypatch.setattr(module._Screen, "put", lambda *a: (answered.append(len(read)), put(*a)))
    records = [json.loads(x) for x in run(capsys, "--model", tiny, "-n", "3", "--format", "pipe").splitlines()]
    assert [r["prompt"] for r in records] == TEXTS
    assert answered == [1, 2, 3]


GENERATING = [
    ["--chat"], ["-n", "3"], ["--stop", "x"], ["--sample"], ["--greedy"], ["--temperature", "0.5"], ["--top-k", "2"],
    ["--top-p", "0.5"], ["--min-p", "0.1"], ["--repetition-penalty", "1.1"], ["--seed", "0"], ["--stats"],
]  # fmt: skip


@pytest.mark.parametrize("option", GENERATING, ids=lambda o: o[0])
def test_what_only_generation_has_is_refused_by_name(labelling, capsys, option):
    assert main(["run", "x", "--task", "ner", "--model", labelling, *option]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert ("--max-new-tokens" if option[0] == "-n" else option[0]) in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["x", "--task", "ner"], "token-classification needs model="),
        (["x", "--aggregation", "max"], "--aggregation is of"),
        (["x", "--task", "sentiment-analysis", "--aggregation", "max"], "--aggregation is of"),
        (["x", "--task", "ner", "--model", "{tagging}", "--aggregation", "best"], "aggregation_strategy is 'best'"),
        (["x", "--format", "yaml"], "--format is 'yaml'"),
        (["x", "--format", "pipe"], "'x' and --format pipe are both given"),
        (["x", "--input", "file.txt"], "'x' and --input are both given"),
        (["--format", "pipe", "--input", "file.txt"], "leave --input out"),
    ],
)
def test_arguments_that_make_no_sense_are_one_line_and_exit_code_2(tagging, capsys, arguments, said):
    assert main(["run", *(a.format(tagging=tagging) for a in arguments)]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
