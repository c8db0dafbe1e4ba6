"""Rows that cannot be trained on are refused by file and line before the first step; others are learnt as promised."""

import asyncio
import copy
import dataclasses
import io
import json
import os
import shutil

import gemma4_form
import pytest
import torch
from tune_tools import chat, write

import gemmakit
from gemmakit.errors import GemmakitError, InputError, NotEnoughMemory
from gemmakit.tune import TuneSettings, tune
from gemmakit.tune.data import find_splits, read
from gemmakit.tune.examples import Encoder
from gemmakit.tune.memory import free_bytes, need
from gemmakit.tune.report import curve
from gemmakit.tune.run import prepare

GOOD = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def tokenizer():
    return gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())


def encoder(tokenizer, **more):
    return Encoder(tokenizer, **{"limit": 64, **more})


def examples(path, tokenizer, **more):
    return encoder(tokenizer, **more).examples(read(path, {}).rows)


def learnt(tokenizer, example):
    return tokenizer.decode([i for i, on in zip(example.ids, example.learnt, strict=True) if on])


BAD = {
    "no JSON": ('{"messages": [', "not valid JSON"),
    "no object": ("[1, 2]", "must be an object"),
    "no field": ('{"question": "a"}', "must hold one of"),
    "two forms": ('{"text": "a", "prompt": "b"}', "must hold one of"),
    "no completion": ('{"prompt": "a"}', "lacks 'completion'"),
    "empty text": ('{"text": ""}', "at least 1 character"),
    "no list": ('{"messages": "Hi"}', "must be a list"),
    "no role": (json.dumps({"messages": [{"content": "Hi"}]}), "with a role"),
    "wrong order": (json.dumps({"messages": [GOOD, GOOD, {"role": "assistant", "content": "a"}]}), "alternate"),
    "empty turn": (json.dumps({"messages": [GOOD, {"role": "assistant", "content": " "}]}), "is empty"),
    "nothing to learn": (json.dumps({"messages": [GOOD]}), "nothing to learn"),
    "no content": (
        json.dumps({"messages": [{"role": "user"}, {"role": "assistant", "content": "a"}]}),
        "lacks 'content'",
    ),
    "too long": (json.dumps({"text": "word " * 100}), "--truncate"),
    "no weight": (json.dumps({"messages": [GOOD, {"role": "assistant", "content": "a", "weight": 2}]}), "weight 2"),
    "two <bos>": (json.dumps({"text": "a<bos>b"}), "<bos>"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_refused_by_its_line(name, tokenizer, tmp_path):
    line, said = BAD[name]
    path = tmp_path / "rows.jsonl"
    good = json.dumps(chat("Hi", "Ho"))
    path.write_text(f"{good}\n\n{line}\n{good}\n")
    with pytest.raises(InputError, match=r"rows\.jsonl:3: ") as error:
        examples(path, tokenizer)
    assert said in str(error.value)
    assert str(error.value).startswith("1 rows")


def test_all_bad_rows_are_told_at_once(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "word " * 100}] * 12)
    with pytest.raises(InputError, match=r"12 rows .*rows\.jsonl:1: .*rows\.jsonl:10: .* and 2 more rows"):
        examples(path, tokenizer)


def test_a_long_row_is_cut_when_asked_unless_nothing_is_left_to_learn(tokenizer, tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "word " * 100}])
    (made,) = examples(path, tokenizer, truncate=True)
    assert len(made.ids) == 64
    path = write(tmp_path / "rows.jsonl", [chat("word " * 100, "yes")])
    with pytest.raises(InputError, match="nothing to learn"):
        examples(path, tokenizer, truncate=True)


def test_what_is_learnt_of_each_form(tokenizer, tmp_path):
    turns = [*chat("2 + 2?", "4")["messages"], *chat("And 3?", "7")["messages"]]
    rows = [
        {"messages": turns},
        {"prompt": "The cat", "completion": " sat"},
        {"prompt": turns[:3], "completion": turns[3:]},
        {"text": "The cat"},
    ]
    made = examples(write(tmp_path / "rows.jsonl", rows), tokenizer)
    told = ["4<end_of_turn>7<end_of_turn>", " sat<eos>", "7<end_of_turn>", "The cat<eos>"]
    assert [learnt(tokenizer, example) for example in made] == told
    asked = examples(tmp_path / "rows.jsonl", tokenizer, everything=True)
    assert [sum(e.learnt) for e in asked] == [len(e.ids) - 1 for e in asked]
    (turned,) = examples(
        write(tmp_path / "rows.jsonl", [{"prompt": "2 + 2?", "completion": "4"}]), tokenizer, chat=True
    )
    assert learnt(tokenizer, turned) == "4<end_of_turn>"
    assert turned.ids == tokenizer.apply_chat_template(chat("2 + 2?", "4")["messages"])["input_ids"]


def test_ids_before_what_is_learnt_are_those_that_are_asked(tokenizer, tmp_path):
    """By the function that the pipelines, the command line and the server encode with."""
    pipe = gemmakit.pipeline("text-generation")
    messages = chat("What is 3 + 4?", "7")["messages"]
    rows = [{"messages": messages}, {"prompt": "def add(", "completion": "a, b)"}]
    for example, asked in zip(
        examples(write(tmp_path / "rows.jsonl", rows), tokenizer), (messages[:1], "def add("), strict=True
    ):
        prompt = pipe.encode(asked)
        assert example.ids[: len(prompt)] == prompt
        assert example.learnt.index(True) == len(prompt)
        assert example.ids.count(tokenizer.bos_token_id) == 1


def test_ids_before_what_is_learnt_are_those_that_a_server_makes_of_the_chat(tokenizer, tmp_path):
    pytest.importorskip("fastapi", reason="the server needs gemmakit[serve]")
    import httpx

    from gemmakit.serve.app import bare_app
    from gemmakit.serve.service import Loading, Service

    turns = [*chat("2 + 2?", "4")["messages"], *chat("And 3?", "7")["messages"]]
    chats = [turns[:2], turns, [{"role": "system", "content": "Be brief."}, *turns]]
    made = examples(write(tmp_path / "rows.jsonl", [{"messages": messages} for messages in chats]), tokenizer)
    service = Service()
    service.load(Loading(str(gemmakit.demo_model()), ("demo",), {"device": "cpu"}, None, {}))

    async def asking():
        transport = httpx.ASGITransport(bare_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            posts = [await client.post("/tokenize", json={"messages": messages[:-1]}) for messages in chats]
            return [answer.json()["tokens"] for answer in posts]

    try:
        asked = asyncio.run(asking())
    finally:
        service.worker.close()
    for example, prompt in zip(made, asked, strict=True):
        assert example.ids[: len(prompt)] == prompt and not example.learnt[len(prompt) - 1]
        assert learnt(tokenizer, example).endswith(tokenizer.decode(example.ids[len(prompt) :]).rstrip())


def test_a_turn_that_is_asked_behind_an_empty_thought_is_learnt_behind_it(tokenizer, tmp_path):
    """Gemma 4's template writes none of a turn that is over."""
    thinker = gemma4_form.equip(copy.deepcopy(tokenizer))
    turns = [*chat("2 + 2?", "4")["messages"], *chat("And 3?", "7")["messages"]]
    for messages in (turns[:2], turns):
        path = write(
            tmp_path / "rows.jsonl", [{"messages": messages}, {"prompt": messages[:-1], "completion": messages[-1:]}]
        )
        prompt = thinker.apply_chat_template(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert thinker.decode(prompt).endswith("<|channel>thought\n<channel|>")
        for example in examples(path, thinker):
            assert example.ids[: len(prompt)] == prompt
            assert thinker.decode(example.ids[len(prompt) :]).rstrip() == f"{messages[-1]['content']}<turn|>"
            assert example.learnt[len(prompt)] and not example.learnt[len(prompt) - 1]


def test_answers_before_the_last_are_learnt_from_their_first_token_where_a_prompt_opens_a_thought(tokenizer, tmp_path):
    thinker = gemma4_form.equip(copy.deepcopy(tokenizer))
    turns = [*chat("2 + 2?", "4 it is")["messages"], *chat("And 3?", "7 it is")["messages"]]
    (made,) = examples(write(tmp_path / "rows.jsonl", [{"prompt": turns[:1], "completion": turns[1:]}]), thinker)
    (whole,) = examples(write(tmp_path / "rows.jsonl", [{"messages": turns}]), thinker)
    assert made == whole and learnt(thinker, made).startswith("4 it is<turn|>")


def test_a_prompt_holds_calls_whose_thoughts_its_template_drops(tokenizer, tmp_path):
    """They are asked as a server asks them; the answer alone is learnt. As turns to be learnt they are refused."""
    thinker = gemma4_form.equip(copy.deepcopy(tokenizer))
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "reasoning": "Let me add.", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "4"},
        {"role": "assistant", "content": "It is 4"},
        *chat("And 3?", "7 it is")["messages"],
    ]
    path = write(tmp_path / "rows.jsonl", [{"prompt": turns[:-1], "completion": turns[-1:]}])
    (made,) = examples(path, thinker, limit=256)
    prompt = thinker.apply_chat_template(turns[:-1], add_generation_prompt=True)["input_ids"]
    assert made.ids[: len(prompt)] == prompt and "Let me add" not in thinker.decode(prompt)
    assert made.learnt.index(True) == len(prompt) and learnt(thinker, made).rstrip() == "7 it is<turn|>"
    path = write(tmp_path / "rows.jsonl", [{"messages": turns}])
    with pytest.raises(InputError, match=r"rows\.jsonl:1: .*writes messages up to 1 otherwise"):
        examples(path, thinker, limit=256)
    quiet = [*({**turn, "weight": 0} for turn in turns[:-1]), turns[-1]]
    assert examples(write(tmp_path / "rows.jsonl", [{"messages": quiet}]), thinker, limit=256) == [made]


def test_a_template_that_asks_with_more_than_it_writes_is_learnt_as_it_writes(tokenizer, tmp_path):
    """Of a form that has no thoughts."""
    other = copy.deepcopy(tokenizer)
    end = "{{- '<start_of_turn>model\\n' -}}\n{%- endif"
    assert end in other.chat_template
    other.chat_template = other.chat_template.replace(end, "{{- '<start_of_turn>model\\nWell, ' -}}\n{%- endif")
    path = write(tmp_path / "rows.jsonl", [chat("2 + 2?", "4")])
    assert examples(path, other) == examples(path, tokenizer)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_the_same_rows_come_from_every_format(tokenizer, tmp_path, kind):
    rows = [chat("Hi", "Ho"), chat('Say, "a"', "b\nc")]
    write(tmp_path / "rows.jsonl", rows)
    if kind == "json":
        (tmp_path / "rows.json").write_text(json.dumps(rows))
    else:
        pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow: pip install 'gemmakit[parquet]'")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    one, other = (examples(tmp_path / f"rows.{suffix}", tokenizer) for suffix in ("jsonl", kind))
    assert [e.ids for e in one] == [e.ids for e in other]


def test_tables_are_read_with_their_columns_mapped_or_refused_by_name(tokenizer, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n"What, is it?",Nothing\n"Two\nlines",Yes\n')
    with pytest.raises(InputError, match=r"rows\.csv:2: .*holds question, answer.*--columns"):
        examples(path, tokenizer)
    rows = read(path, {"prompt": "question", "completion": "answer"}).rows
    assert [row.values["prompt"] for row in rows] == ["What, is it?", "Two\nlines"]
    with pytest.raises(InputError, match=r"--columns prompt=ask: no row .* question, answer"):
        read(path, {"prompt": "ask"})
    path.write_text("prompt,completion\na\n")
    with pytest.raises(InputError, match=r"rows\.csv:2: has not the 2 cells"):
        read(path, {})
    path.write_text(f'messages\n"{json.dumps(chat("Hi", "Ho")["messages"]).replace(chr(34), chr(34) * 2)}"\n')
    assert examples(path, tokenizer)[0].ids


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_cells_that_are_huge_or_no_text_are_refused_by_their_row_or_read_whole(tokenizer, tmp_path, kind):
    rows = [{"prompt": "Hi", "completion": "Ho"}, {"prompt": "word " * 400_000, "completion": "Ho"}]
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_text("prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in rows))
    else:
        pytest.importorskip("pyarrow", reason="Parquet is read with pyarrow: pip install 'gemmakit[parquet]'")
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    place = 3 if kind == "csv" else 2
    assert read(path, {}).rows[1].values == rows[1]
    with pytest.raises(InputError, match=rf"1 rows .*rows\.{kind}:{place}: .*--truncate"):
        examples(path, tokenizer)
    if kind == "csv":
        path.write_text('prompt,completion\nHi,Ho\n"{""a"": 1}",Ho\n')
    else:
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(
                [{"prompt": {"a": None}, "completion": "Ho"}, {"prompt": {"a": 1}, "completion": "Ho"}]
            ),
            path,
        )
    with pytest.raises(InputError, match=rf"rows\.{kind}:{place}: .*prompt"):
        examples(path, tokenizer)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.jsonl", [chat("Hi", "Ho")] * 3)
    other = shutil.copy(path, tmp_path / "other.jsonl")

    def add() -> None:
        with open(path, "ab") as file:
            file.write(b"{}")

    class Changing(io.BufferedReader):
        def read(self, size=-1):
            changes.pop()()
            return super().read(size)

    monkeypatch.setattr(type(path), "open", lambda self, mode: Changing(io.FileIO(self)))
    changes = [lambda: os.truncate(path, 10), lambda: os.replace(other, path), add]
    while changes:
        with pytest.raises(InputError, match="changed while it was read"):
            read(path, {})


@pytest.mark.parametrize("pad", ["eos_token", "bos_token", "unk_token"])
def test_which_token_pads_changes_nothing_that_is_learnt(tiny, chats, tmp_path, pad):
    """Rows of uneven lengths, whose ends are learnt though the same token pads the others."""
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    tokenizer = gemmakit.AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = getattr(tokenizer, pad)
    tokenizer.save_pretrained(other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "pad_token_id": tokenizer.pad_token_id}))
    same = {"data": str(chats), "max_steps": 3, "batch_size": 4, "rank": 2, "packing": False, "dtype": "float32"}
    one, two = (
        tune(TuneSettings(model=str(folder), out=str(tmp_path / f"out{place}"), **same)).records
        for place, folder in enumerate((tiny, other))
    )
    assert curve(one, "loss") == curve(two, "loss")


@pytest.mark.parametrize(("content", "said"), [(b"", "holds no rows"), (b"\xff\xfe\n", "rows.jsonl:1 is not UTF-8")])
def test_files_that_are_no_rows_are_refused(tmp_path, content, said):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=said):
        read(tmp_path / "rows.jsonl", {})


def test_folders_have_a_train_file_and_one_of_each(tmp_path):
    with pytest.raises(InputError, match="neither"):
        find_splits(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="no train file"):
        find_splits(str(tmp_path))
    for name in ("train.jsonl", "valid.csv"):
        (tmp_path / name).touch()
    assert {split: path.name for split, path in find_splits(str(tmp_path)).items()} == {
        "train": "train.jsonl", "valid": "valid.csv"
    }  # fmt: skip
    (tmp_path / "train.json").touch()
    with pytest.raises(InputError, match=r"train\.jsonl and train\.json"):
        find_splits(str(tmp_path))


@pytest.mark.parametrize(("changes", "said"), [
    ({"lr": 0.0}, "lr is 0.0"),
    ({"lr": -1.0}, "lr is -1.0"),
    ({"lr": float("nan")}, "lr is nan"),
    ({"max_steps": 0}, "max_steps is 0"),
    ({"epochs": 0}, "epochs is 0"),
    ({"batch_size": 100}, "--batch-size is 100, but there are"),
    ({"max_length": 4096}, "--max-length is 4096"),
    ({"method": "full", "dtype": "float16"}, "float16 holds no number over 65,504"),
    ({"method": "full", "quantization": "int8"}, "quantization='int8' has no use"),
    ({"method": "full", "rank": 8}, "rank=8 has no use with training all weights"),
    ({"method": "full", "targets": ("q_proj",)}, "targets=.* has no use"),
    ({"freeze": ("layers.0",)}, "freeze=.* has no use with adapters"),
    ({"beta": 0.5}, "beta=0.5 has no use with the loss sft"),
    ({"epochs": 2, "max_steps": 3}, "epochs=2 has no use with max_steps"),
    ({"loss": "dpo", "train_on": "all"}, "train_on='all' has no use with pairs"),
    ({"chat": True}, r"chat=True has no use with .*chats\.jsonl"),
    ({"columns": "prompt"}, "columns is 'prompt'; it must be a map"),
    ({"targets": 5}, "targets is 5; it must be a name or a list"),
    ({"method": "full", "freeze": ("model", "lm_head")}, "leaves nothing to train"),
    ({"loss": "dpo"}, "lacks 'chosen'"),
    ({"loss": "dpo", "packing": True}, "packing=True has no use"),
    ({"targets": ("nothing",)}, "no module is called"),
    ({"model": "nowhere"}, "nowhere"),
])  # fmt: skip
def test_what_cannot_be_is_refused_with_its_range_before_anything_is_written(tiny, chats, tmp_path, changes, said):
    with pytest.raises(GemmakitError, match=said):
        tune(TuneSettings(**{"model": str(tiny), "data": str(chats), "out": str(tmp_path / "out"), **changes}))
    assert not (tmp_path / "out" / "tune.json").exists()


def test_memory_that_is_not_there_is_said_before_the_first_step_with_what_helps(tiny, chats, tmp_path, monkeypatch):
    """Enough for the weights and an adapter, and not for gradients and moments of every weight."""
    settings = dict(model=str(tiny), data=str(chats), batch_size=4, max_steps=1, dtype="float32", loss_chunk=8)
    free = 3 * (tiny / "model.safetensors").stat().st_size
    monkeypatch.setattr("gemmakit.checkpoint.memory.free_memory_bytes", lambda: free)
    assert tune(TuneSettings(**settings, rank=1, out=str(tmp_path / "lora"))).finished
    with pytest.raises(NotEnoughMemory, match=r"training [\d,]+ parameters needs .*adapter instead of --full"):
        tune(TuneSettings(**settings, method="full", out=str(tmp_path / "full")))


@pytest.mark.parametrize("helps", [{"batch_size": 1}, {"checkpointing": True}])
def test_a_pass_that_is_too_large_is_refused_before_the_first_step_with_what_helps(
    tiny, chats, tmp_path, monkeypatch, helps
):
    """Less free than the largest pass takes, and more than it takes once one of the flags that are named is given."""
    settings = dict(model=str(tiny), data=str(chats), out=str(tmp_path / "out"), rank=1, batch_size=12, loss_chunk=1)

    def taken(**changes):
        made = prepare(TuneSettings(**{**settings, **changes}))
        found = need(made.model, made.objective, made.settings)
        return found.state + found.activations + found.logits

    monkeypatch.setattr("gemmakit.checkpoint.memory.free_memory_bytes", lambda: None)
    much, little = taken(), taken(**helps)
    assert little < much
    monkeypatch.setattr("gemmakit.checkpoint.memory.free_memory_bytes", lambda: (much + little) // 2)
    with pytest.raises(NotEnoughMemory, match=r"a pass of \d+ tokens needs .*--checkpointing, a smaller --batch-size"):
        tune(TuneSettings(**settings))
    assert not (tmp_path / "out" / "tune.json").exists()
    prepare(TuneSettings(**{**settings, **helps}))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("more", [{}, {"attention": "eager"}])
def test_what_a_pass_is_said_to_keep_is_less_than_what_it_keeps_and_not_by_far(tiny, chats, method, more):
    """Activations of the largest pass; the weights, which are there anyhow, are not counted."""
    made = prepare(TuneSettings(model=str(tiny), data=str(chats), out="unused", method=method, batch_size=12, **more))
    weights = {p.untyped_storage().data_ptr() for p in made.model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made.objective.loss(made.model.train(), made.objective.batch(range(12)), 1)
    said = need(made.model, made.objective, made.settings)
    assert said.activations <= sum(kept.values()) <= 8 * (said.activations + said.logits)


def test_a_gpus_free_memory_is_what_the_driver_has_and_what_torch_holds_without_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 300)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda device: 100)
    assert free_bytes(torch.device("cuda")) == 1200


def test_a_setting_that_is_named_but_not_read_is_refused_whatever_its_value(tiny, chats):
    """A command line or a file names it; as the value that is usual anyhow, too."""
    asked = {"model": str(tiny), "data": str(chats), "out": "unused"}
    with pytest.raises(InputError, match="rank=16 has no use"):
        TuneSettings.from_dict({**asked, "method": "full", "rank": 16}, "tune.toml")
    made = TuneSettings.from_dict({**asked, "method": "full", "max_steps": 3}, "tune.toml")
    assert not {"rank", "targets", "beta", "epochs"} & made.to_dict().keys()
    assert TuneSettings.from_dict(made.to_dict(), "tune.json") == made


def test_a_run_that_takes_anothers_place_leaves_nothing_of_it(tiny, chats, tmp_path):
    """An adapter beside a whole model would be taken for the model's, and old weights for the new run's."""
    common = dict(model=str(tiny), data=str(chats), out=str(tmp_path / "out"), batch_size=4, max_steps=1)
    tune(TuneSettings(**common, method="full", freeze=("layers",)))
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "tensorboard").mkdir()
    (tmp_path / "out" / "tensorboard" / "events.out.tfevents.1.here.2.3").touch()
    full = {path.name for path in (tmp_path / "out").iterdir()}
    tune(TuneSettings(**common, rank=1), overwrite=True)
    adapter = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in full and "adapter_config.json" not in full
    assert "adapter_config.json" in adapter and "notes.txt" in adapter
    assert not any((tmp_path / "out" / "tensorboard").iterdir())
    assert not adapter & {name for name in full if name.startswith(("model", "tokenizer", "config", "generation"))}
    tune(TuneSettings(**common, method="full", freeze=("layers",)), overwrite=True)
    assert {path.name for path in (tmp_path / "out").iterdir()} == full


def test_a_folder_that_is_not_empty_is_left_alone(tiny, chats, tmp_path):
    settings = TuneSettings(model=str(tiny), data=str(chats), out=str(tmp_path), batch_size=4)
    (tmp_path / "mine").touch()
    with pytest.raises(InputError, match="not empty: name another"):
        tune(settings)
    (tmp_path / "tune.json").write_text("{}")
    with pytest.raises(InputError, match=r"--resume .*--overwrite"):
        tune(settings)
    with pytest.raises(InputError, match="is the folder of the model"):
        tune(TuneSettings(model=str(tiny), data=str(chats), out=str(tiny), batch_size=4), overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        tune(dataclasses.replace(settings, out=str(tmp_path / "file")))
