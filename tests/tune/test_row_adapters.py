"""Requests choose their adapters: rows with different ones share a pass, and each is answered as if it were alone."""

import asyncio
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gemmakit
from gemmakit.errors import InputError
from gemmakit.pytorch.adapters import (
    LoraConfig,
    adapters_of,
    add_adapter,
    load_adapter,
    load_adapters,
    remove_adapter,
    save_adapter,
)
from gemmakit.pytorch.decode.batch import BatchEngine, Request, generate_batch
from gemmakit.pytorch.decode.drafts import Gain
from gemmakit.pytorch.row_adapters import RowAdaptedLinear, RowAdapters, Update, row_adapters

KINDS = {
    "lora": LoraConfig(r=3, lora_alpha=6),
    "dora": LoraConfig(r=4, lora_alpha=8, use_dora=True),
    "few": LoraConfig(r=8, target_modules=("q_proj", "down_proj")),
}
WEIGHTS = {
    "float32": dict(dtype="float32"),
    "bfloat16": dict(dtype="bfloat16"),
    "int8": dict(dtype="float32", quantization_config="int8"),
}


@pytest.fixture(scope="module")
def folders(tiny, tmp_path_factory):
    """Adapters that are not where they began, by name."""
    made, root = {}, tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for name, config in KINDS.items():
        model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
        add_adapter(model, config)
        with torch.no_grad():
            for adapter in adapters_of(model).values():
                for parameter in adapter.own().values():
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        save_adapter(model, config, root / name, base=tiny)
        made[name] = root / name
    return made


def chosen(tiny, folders, **loading):
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny, **loading)
    load_adapters(model, folders)
    return model


def asked(count, adapters, new=5):
    """Prompts of uneven lengths, some sampled, that take the adapters in turn; with what is told of each token."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        ids = [2, *torch.randint(4, 900, (2 + 5 * (i % 4),), generator=draw).tolist()]
        settings = {"max_new_tokens": new, "eos_token_id": None}
        settings |= {"do_sample": True, "seed": i} if i % 3 == 2 else {"do_sample": False}
        found.append(Request(ids, settings=settings, adapter=adapters[i % len(adapters)], logprobs=2))
    return found


def told(model, requests, **engine):
    """(token, its log probability) of each request's answer."""
    engine = BatchEngine(model, cache_tokens=512, **engine)
    answers = {engine.add(request): [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            answers[event.id].append((event.token, event.logprob, event.top_logprobs))
    return list(answers.values())


def test_a_compiled_model_takes_the_adapters_that_are_chosen_when_it_runs(tiny, folders):
    """Not those that were chosen when it was traced."""
    model = chosen(tiny, folders, dtype="float32")
    compiled, ids = torch.compile(model, backend="eager"), torch.randint(4, 900, (1, 9))
    found = []
    for parts in ([], [("lora", 9)], [("dora", 9)], [("lora", 4), ("few", 5)], [(None, 9)]):
        with torch.no_grad(), row_adapters(model).chosen(parts, ids.device):
            found.append(compiled(ids, use_cache=False).logits)
            torch.testing.assert_close(found[-1], model(ids, use_cache=False).logits)
    assert all(not torch.equal(one, other) for one, other in zip(found[1:], found[:-1], strict=True))
    assert torch.equal(found[0], found[-1])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_rows_with_different_adapters_have_the_bits_of_each_alone(tiny, folders, weights):
    model = chosen(tiny, folders, **WEIGHTS[weights])
    requests = asked(10, [None, "lora", "dora", "lora", "few"])
    alone = [told(model, [request], max_batch_size=1)[0] for request in requests]
    assert told(model, requests, max_batch_size=4, prefill_tokens=16) == alone
    plain = [told(model, [Request(r.prompt, settings=r.settings, logprobs=2)])[0] for r in requests]
    assert [one != other for one, other in zip(alone, plain, strict=True)] == [r.adapter is not None for r in requests]


def test_a_draft_model_proposes_to_rows_with_adapters_and_changes_no_bit(tiny, folders, monkeypatch):
    """It knows nothing of them."""
    model, requests = chosen(tiny, folders, dtype="float32"), asked(6, [None, "lora", "dora"], new=12)
    alone = told(model, requests, speculate=False)
    monkeypatch.setattr(Gain, "count", lambda self, run, most: most)  # the draft is as large as the model
    helper, passes = gemmakit.GemmaForCausalLM.from_pretrained(tiny, dtype="float32"), []
    helper.model.register_forward_hook(lambda *_: passes.append(1))
    assert told(model, requests, max_batch_size=4, assistant_model=helper) == alone
    assert passes


def test_rows_without_an_adapter_are_answered_as_by_the_model_without_any(tiny, folders):
    """Whose layers run fused: the same sums in another order."""
    requests = asked(6, [None])
    plain = told(gemmakit.GemmaForCausalLM.from_pretrained(tiny), requests)
    mixed = told(chosen(tiny, folders), [*requests, *asked(3, ["lora", "dora"])])[:6]
    for answer, expected in zip(mixed, plain, strict=True):
        assert [token for token, _, _ in answer] == [token for token, _, _ in expected]
        assert [p for _, p, _ in answer] == pytest.approx([p for _, p, _ in expected], abs=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_a_row_is_answered_as_by_the_model_with_that_adapter_alone(tiny, folders, name):
    """float32: the same products in another order."""
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    load_adapter(model, folders[name])
    several = chosen(tiny, folders)
    for request, answer in zip(requests := asked(3, [name]), told(several, requests), strict=True):
        ids = torch.tensor([[*request.prompt, *(token for token, _, _ in answer)]])
        with torch.no_grad():
            expected = model(ids).logits[0].log_softmax(-1)
        for place, (token, logprob, _) in enumerate(answer, len(request.prompt) - 1):
            assert logprob == pytest.approx(float(expected[place, token]), abs=1e-4)
    with torch.no_grad():  # where nobody chooses, the model is its own
        plain = gemmakit.GemmaForCausalLM.from_pretrained(tiny)(ids).logits
        torch.testing.assert_close(several(ids).logits, plain)


def test_passes_of_one_model_in_two_threads_choose_apart():
    base, adapters = torch.nn.Linear(4, 3).requires_grad_(False), RowAdapters(["lora"])
    layer = RowAdaptedLinear(base, adapters, {0: Update(torch.randn(2, 4), torch.randn(3, 2))})
    x, opened, left = torch.randn(5, 4), threading.Event(), threading.Event()

    def choosing():
        with adapters.chosen([("lora", 5)], x.device):
            opened.set()
            assert left.wait(60)
            return layer(x)

    with ThreadPoolExecutor(1) as other:
        answer = other.submit(choosing)
        try:
            assert opened.wait(60)
            with adapters.chosen([("lora", 2), (None, 3)], x.device):
                mixed = layer(x)
            plain = layer(x)
        finally:
            left.set()
        adapted = answer.result()
    assert torch.equal(plain, base(x)) and not (adapted == plain).all(1).any()
    assert (mixed == plain).all(1).tolist() == [False, False, True, True, True]


def test_prefixes_are_shared_within_one_adapter_only(tiny, folders):
    engine = BatchEngine(chosen(tiny, folders), page_size=4, cache_tokens=256)
    ids, cached = torch.randint(4, 900, (14,)).tolist(), []
    for adapter, salt in [("lora", ""), ("dora", ""), (None, ""), ("lora", ""), (None, "'lora' ")]:
        engine.add(Request(ids, settings={"max_new_tokens": 2}, adapter=adapter, cache_salt=salt))
        cached += [event.usage.cached_tokens for event in run(engine) if event.usage]
    assert cached == [0, 0, 0, 12, 0]


def run(engine):
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def test_prompts_are_scored_with_the_adapter_too(tiny, folders):
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    load_adapter(model, folders["lora"])
    ids = torch.randint(4, 900, (20,)).tolist()
    engine = BatchEngine(chosen(tiny, folders), prefill_tokens=8, cache_tokens=256)
    for adapter in ("dora", "lora"):
        engine.add(Request(ids, settings={"max_new_tokens": 0}, adapter=adapter, prompt_logprobs=0))
    found = next(event.prompt_logprobs for event in run(engine) if event.id == 1 and event.prompt_logprobs)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    for place, one in enumerate(found[1:]):
        assert one.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-4)


def test_what_requests_cannot_choose_is_refused_and_the_model_is_as_it_was(tiny, folders, tmp_path):
    model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
    modules = [type(module) for module in model.modules()]
    with pytest.raises(InputError, match=r"adapter is 'lora', but the model has none"):
        generate_batch(model, [Request([5, 6], adapter="lora")])
    add_adapter(model, config := LoraConfig(r=2, target_modules=("embed_tokens", "q_proj")))
    save_adapter(model, config, tmp_path / "embedding")
    remove_adapter(model)
    with pytest.raises(InputError, match=r"embed_tokens too.*merge"):
        load_adapters(model, {"lora": folders["lora"], "embedding": tmp_path / "embedding"})
    shutil.copy(folders["few"] / "adapter_model.safetensors", tmp_path / "embedding")
    with pytest.raises(InputError, match="not this model's"):
        load_adapters(model, {"lora": folders["lora"], "embedding": tmp_path / "embedding"})
    assert [type(module) for module in model.modules()] == modules
    load_adapters(model, folders)
    with pytest.raises(InputError, match=r"adapter is 'other', but the model has lora, dora, few"):
        generate_batch(model, [Request([5, 6], adapter="other")])
    with pytest.raises(InputError, match="has an adapter already"):
        load_adapters(model, folders)
    with pytest.raises(InputError, match="merge_adapter"):
        model.save_pretrained(tmp_path / "saved")


def test_a_server_answers_with_the_adapter_that_a_request_names(tiny, folders):
    pytest.importorskip("fastapi", reason="the server needs gemmakit[serve]")
    import httpx

    from gemmakit.serve.app import bare_app
    from gemmakit.serve.service import Loading, Service

    service = Service()
    service.load(Loading(str(tiny), ("tiny",), {"device": "cpu"}, None, {}, folders))
    said = {"prompt": "Say red", "max_tokens": 6, "temperature": 0, "logprobs": 1}

    async def asking():
        transport = httpx.ASGITransport(bare_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            listed = (await client.get("/v1/models")).json()["data"]
            names = ("tiny", *folders, "other")
            posts = (client.post("/v1/completions", json={"model": name, **said}) for name in names)
            return listed, [answer.json() for answer in await asyncio.gather(*posts)]

    pipe = gemmakit.pipeline("text-generation", str(tiny), device="cpu")
    ids = pipe.encode("Say red")
    try:
        listed, (*answers, refused) = asyncio.run(asking())
    finally:
        service.worker.close()
    assert {card["id"]: card["parent"] for card in listed} == {"tiny": None, **dict.fromkeys(folders, "tiny")}
    assert refused["error"]["code"] == "model_not_found"
    assert [answer["model"] for answer in answers] == ["tiny", *folders]
    assert len({tuple(answer["choices"][0]["logprobs"]["token_logprobs"]) for answer in answers}) == 4
    for name, answer in zip((None, *folders), answers, strict=True):
        model = gemmakit.GemmaForCausalLM.from_pretrained(tiny)
        if name is not None:
            load_adapter(model, folders[name])
        new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        assert answer["choices"][0]["text"] == pipe.tokenizer.decode(new, skip_special_tokens=True)
