"""A step learns the same however its rows are laid out, divided and computed. float32, tiny shapes."""

import math

import pytest
import torch
from tune_tools import WORDS, write

import gemmakit
from gemmakit.errors import NumericalError
from gemmakit.pytorch.loss import row_logprobs
from gemmakit.tune import TuneSettings
from gemmakit.tune.batches import Order, packs
from gemmakit.tune.judge import SPARE_TOKENS, parts
from gemmakit.tune.optimizer import Optimizer, learning_rate, rounded_at_random
from gemmakit.tune.run import prepare
from gemmakit.tune.train import MAX_SKIPPED, Trainer

# float32: the same sums in another order. How far the gradients are apart, as a share of their length.
CLOSE = 1e-6


@pytest.fixture
def pairs(tmp_path):
    rows = [
        {"prompt": f"Say {w}", "chosen": f" {w} {' '.join(WORDS[:i])}", "rejected": " no" * (1 + i % 3)}
        for i, w in enumerate(WORDS)
    ]
    return write(tmp_path / "pairs.jsonl", rows)


def trainer(tiny, data, **changes):
    """With an adapter that is not where it began, or its A would have no gradient."""
    own = {} if changes.get("method") == "full" else {"rank": 4}
    settings = TuneSettings(**{"model": str(tiny), "data": str(data), "out": "unused", **own, **changes})
    made = prepare(settings)
    found = Trainer(made.model, made.objective, settings)
    with torch.no_grad():
        for i, (name, parameter) in enumerate(found.trained.items()):
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(i))
    return found


def gradients(trainer, passes=None):
    loss, _ = trainer.accumulate(trainer.order.step(0) if passes is None else passes)
    return loss, {n: p.grad.clone() for n, p in trainer.trained.items() if p.grad is not None}


def same(ours, theirs, tolerance=CLOSE):
    assert ours[0] == pytest.approx(theirs[0], rel=tolerance)
    assert ours[1].keys() == theirs[1].keys() and ours[1]
    apart = sum(float((ours[1][name] - gradient).double().square().sum()) for name, gradient in theirs[1].items())
    length = sum(float(gradient.double().square().sum()) for gradient in theirs[1].values())
    assert (apart / length) ** 0.5 <= tolerance


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("parts", [1, 2, 5])
def test_uneven_passes_have_the_gradients_of_one_batch(tiny, chats, method, parts):
    whole = trainer(tiny, chats, method=method, batch_size=10)
    units = whole.order.step(0)[0]
    same(gradients(whole, [units[i : i + parts] for i in range(0, 10, parts)]), gradients(whole, [units]))


@pytest.mark.parametrize("loss", ["dpo", "orpo"])
def test_pairs_have_the_gradients_of_one_batch_too(tiny, pairs, loss):
    whole = trainer(tiny, pairs, loss=loss, batch_size=8)
    units = whole.order.step(0)[0]
    same(gradients(whole, [[unit] for unit in units]), gradients(whole, [units]), 1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_rows_learn_what_rows_alone_learn(tiny, chats, attention):
    alone = trainer(tiny, chats, batch_size=12, attention="eager")
    packed = trainer(tiny, chats, batch_size=2, packing=True, attention=attention)
    units = list(range(len(packed.objective)))
    assert len(units) < 12
    same(gradients(packed, [units]), gradients(alone, [[i] for i in range(12)]), 1e-5)


@pytest.mark.parametrize("packing", [False, True])
def test_rows_of_a_pass_that_stand_end_to_end_learn_what_padded_ones_learn(tiny, tmp_path, packing):
    rows = [{"prompt": f"Say {w}", "completion": " ".join(WORDS * (1 + i % 3))} for i, w in enumerate(WORDS)]
    settings = dict(data=write(tmp_path / "long.jsonl", rows), batch_size=4, packing=packing)
    joined, apart = trainer(tiny, **settings), trainer(tiny, **settings)
    apart.objective.joined = 0
    batches = [t.objective.batch(range(2)) for t in (joined, apart)]
    assert [len(batch["input_ids"]) for batch in batches] == [1, 2]
    same(gradients(joined, [[0, 1]]), gradients(apart, [[0, 1]]), 1e-5)


def test_rows_do_not_stand_end_to_end_where_that_would_cost(tiny, chats):
    """A mask over all of them, another length for the noise, or one that a window cuts."""
    assert trainer(tiny, chats).objective.joined == 128
    for changes in ({"attention": "eager"}, {"neftune": 5.0}):
        assert trainer(tiny, chats, **changes).objective.joined == 0
    short = trainer(tiny, chats, batch_size=12)
    short.objective.joined = max(len(example.ids) for example in short.objective.examples) - 1
    assert len(short.objective.batch(range(12))["input_ids"]) == 12


@pytest.mark.parametrize("changes", [{"checkpointing": True}, {"loss_chunk": 3}, {"loss_chunk": 4096}])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_less_memory_is_the_same_step(tiny, chats, changes, method):
    plain = trainer(tiny, chats, method=method, loss_chunk=64)
    same(gradients(trainer(tiny, chats, method=method, **changes)), gradients(plain), 1e-5)


def test_dpo_begins_at_log_two_and_its_gradient_is_of_the_formula(tiny, pairs):
    made = prepare(TuneSettings(model=str(tiny), data=str(pairs), out="unused", loss="dpo", beta=0.3, batch_size=4))
    begun = Trainer(made.model, made.objective, made.settings)
    assert begun.accumulate(begun.order.step(0))[0] == pytest.approx(math.log(2), rel=1e-5)
    moved = trainer(tiny, pairs, loss="dpo", beta=0.3, batch_size=4)
    loss, ours = gradients(moved)
    (units,) = moved.order.step(0)
    moved.optimizer.zero_grad()
    total = 0.0
    for unit in units:
        said = []
        for example in (moved.objective.pairs[unit].chosen, moved.objective.pairs[unit].rejected):
            ids = torch.tensor([example.ids])
            logprobs = moved.model(ids).logits[0, :-1].log_softmax(-1)
            each = logprobs.gather(1, ids[0, 1:, None])[:, 0]
            said.append(each[torch.tensor(example.learnt[1:])].sum())
        reference = moved.objective.reference[unit]
        total = total - torch.nn.functional.logsigmoid(0.3 * (said[0] - said[1] - reference[0] + reference[1]))
    (total / 4).backward()
    same((loss, ours), (float(total.detach() / 4), {n: p.grad for n, p in moved.trained.items()}), 1e-5)


def test_orpo_is_the_formula(tiny, pairs):
    found = trainer(tiny, pairs, loss="orpo", beta=0.5, batch_size=4)
    loss, _ = gradients(found)
    total = 0.0
    for unit in found.order.step(0)[0]:
        means = []
        for example in (found.objective.pairs[unit].chosen, found.objective.pairs[unit].rejected):
            ids = torch.tensor([example.ids])
            each = found.model(ids).logits[0, :-1].double().log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            means.append(each[torch.tensor(example.learnt[1:])].mean())
        odds = [mean - torch.log(1 - mean.exp()) for mean in means]
        total += float((-means[0] - 0.5 * torch.nn.functional.logsigmoid(odds[0] - odds[1])).detach())
    assert loss == pytest.approx(total / 4, rel=1e-5)


@pytest.mark.parametrize("chunk", [2, 100])
def test_log_probabilities_of_rows_are_those_of_all_logits(chunk):
    head, hidden = torch.nn.Linear(8, 11), torch.randn(3, 5, 8, requires_grad=True)
    targets = torch.randint(0, 11, (3, 5)).masked_fill(torch.rand(3, 5) < 0.4, -100)
    each = torch.nn.functional.cross_entropy(head(hidden).mT, targets, reduction="none", ignore_index=-100)
    expected = torch.autograd.grad((-each.sum(1) * torch.arange(3)).sum(), hidden)[0]
    found = row_logprobs(head, hidden, targets, chunk)
    torch.testing.assert_close(found, -each.sum(1))
    torch.testing.assert_close(torch.autograd.grad((found * torch.arange(3)).sum(), hidden)[0], expected)


def test_an_epoch_is_every_unit_once_in_an_order_of_its_own():
    order = Order(units=11, batch_size=2, accumulate=2, seed=3)
    assert order.steps_per_epoch == 3
    epochs = [[u for s in range(3) for part in order.step(e * 3 + s) for u in part] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11)) and epochs[0] != epochs[1]
    assert order.step(4) == order.step(4)
    other = Order(units=11, batch_size=2, accumulate=2, seed=4)
    assert order.step(0) != other.step(0)


def test_packs_hold_every_row_once_and_no_more_than_fits():
    lengths = torch.randint(1, 33, (200,)).tolist()
    made = packs(lengths, 32)
    assert sorted(i for pack in made for i in pack) == list(range(200))
    assert all(sum(lengths[i] for i in pack) <= 32 for pack in made)
    assert len(made) <= 1.25 * sum(lengths) / 32 + 1  # best fit is at most 11/9 of the best, which is at least this


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rates_rise_then_follow_the_schedule_and_are_never_zero(schedule):
    settings = TuneSettings(model="a", data="b", out="c", lr=1.0, schedule=schedule, warmup=0.2)
    rates = [learning_rate(settings, step, 20) for step in range(20)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8]) and rates[4] == 1.0
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_rounding_at_random_is_right_on_average_and_changes_no_bfloat16():
    """100,000 draws: the mean is off by less than five of its standard errors, of a last place over sqrt(12 n)."""
    x = torch.full((100_000,), 1 + 2**-10)
    found = rounded_at_random(x)
    assert set(found.unique().tolist()) == {1.0, 1 + 2**-7}
    assert float(found.double().mean()) == pytest.approx(1 + 2**-10, abs=5 * 2**-7 * 0.5 / 100_000**0.5)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded_at_random(exact.float()), exact)
    assert rounded_at_random(torch.tensor([torch.inf, -torch.inf])).tolist() == [torch.inf, -torch.inf]


def test_bfloat16_weights_learn_steps_that_plain_rounding_loses():
    weight = torch.nn.Parameter(torch.ones(4000, dtype=torch.bfloat16))
    optimizer = Optimizer({"weight": weight}, 0.0)
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        optimizer.step(2**-12)  # a thirty-second of the last place above 1, a sixteenth of that below
    assert float(weight.detach().float().mean()) == pytest.approx(1 - 10 * 2**-12, abs=4e-4)


def test_noise_is_drawn_in_training_alone_and_an_average_follows(tiny, chats):
    shaken = trainer(tiny, chats, neftune=5.0, ema=0.5)
    first, again = gradients(shaken)[0], gradients(shaken)[0]
    assert first != again
    before = {n: p.detach().clone() for n, p in shaken.trained.items()}
    shaken.average = {n: p.clone() for n, p in before.items()}
    shaken.step()
    name = next(n for n in before if n.endswith("lora_B"))
    torch.testing.assert_close(shaken.average[name], (before[name] + shaken.trained[name].detach()) / 2)


def test_a_gradient_that_is_no_number_changes_nothing_and_several_end_the_run_with_the_rows_lines(tiny, chats):
    found = trainer(tiny, chats, batch_size=4)
    with torch.no_grad():
        found.model.get_input_embeddings().weight[5:] = torch.nan
    before = {n: p.detach().clone() for n, p in found.trained.items()}
    for _ in range(MAX_SKIPPED - 1):
        assert found.step().skipped
    with pytest.raises(NumericalError, match=r"of chats\.jsonl:\d+"):
        found.step()
    assert found.skipped == MAX_SKIPPED
    assert all(torch.equal(p, before[n]) for n, p in found.trained.items())


def test_frozen_parameters_stay_and_the_rest_moves(tiny, chats):
    found = trainer(tiny, chats, method="full", freeze=("embed_tokens.weight", "layers.0"), lr=0.1, warmup=0.0)
    before = {n: p.detach().clone() for n, p in found.model.named_parameters()}
    found.step()
    moved = {n for n, p in found.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved == set(found.trained)
    assert not [n for n in moved if "embed_tokens" in n or ".layers.0." in n]
    assert gemmakit.GemmaForCausalLM.from_pretrained(tiny).config.tie_word_embeddings


def test_no_question_shortens_the_answer_to_another():
    prompts, answers = [100, 20, 90, 5, 5], [3, 60, 2, 110, 1]
    asked = list(parts(prompts, answers, 128))
    assert sorted(i for part in asked for i in part) == [0, 1, 2, 3, 4]
    for part in asked:
        widest = max(prompts[i] for i in part) + max(answers[i] for i in part) + SPARE_TOKENS
        assert len(part) == 1 or widest <= 128
    assert len(asked) < len(prompts)
