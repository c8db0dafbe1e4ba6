"""transformers' Trainer on a gemmakit model: its losses, its checkpoints, its resumed runs, its best model.

Registered with transformers (`gemmakit.integrations`), so that it saves models and not bare dictionaries.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers

import gemmakit
from gemmakit.integrations import register_transformers, unregister_transformers

pytestmark = pytest.mark.filterwarnings("ignore")
TEXTS = ["If the file is there", "Return the first", "What", "A list of words and numbers", "The end", "Open it",
         "Why?", "It may be that"]  # fmt: skip
STEPS = 4


@pytest.fixture(autouse=True)
def registered():
    register_transformers()
    yield
    unregister_transformers()


def trainer(library, folder, name=None, **given):
    """Rows of uneven length, two to a batch, two batches to a step."""
    name = name or gemmakit.demo_model()
    # On the left, transformers asks the padding for each row's first token, and counts it.
    tokenizer = library.AutoTokenizer.from_pretrained(str(gemmakit.demo_model()), padding_side="right")
    rows = [dict(tokenizer(text)) for text in TEXTS]
    args = transformers.TrainingArguments(**{
        **dict(output_dir=folder, max_steps=STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2,
               logging_steps=1, save_steps=2, eval_steps=2, eval_strategy="steps", learning_rate=1e-3, use_cpu=True,
               report_to=[], disable_tqdm=True, seed=0, lr_scheduler_type="constant"),
        **given,
    })  # fmt: skip
    return transformers.Trainer(
        model=library.AutoModelForCausalLM.from_pretrained(str(name), dtype=torch.float32),
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:2],
        processing_class=tokenizer,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )


def logged(made, key):
    return [entry[key] for entry in made.state.log_history if key in entry]


def same_weights(one, other, tolerance=0.0):
    names = one.state_dict().keys()
    assert names == other.state_dict().keys()
    for name in names:
        torch.testing.assert_close(one.state_dict()[name], other.state_dict()[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    register_transformers()
    made = trainer(gemmakit, tmp_path_factory.mktemp("whole"))
    made.train()
    unregister_transformers()
    return made


def test_its_losses_are_those_of_transformers_model(whole, tmp_path):
    """Gradients are accumulated over uneven rows: the loss counts targets, not batches."""
    theirs = trainer(transformers, tmp_path)
    theirs.train()
    for key in ("loss", "eval_loss", "grad_norm"):
        ours = logged(whole, key)
        assert len(ours) >= STEPS // 2
        # float32 sums in another order, over four steps of Adam
        assert ours == pytest.approx(logged(theirs, key), rel=2e-3), key


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path):
    trainer(gemmakit, tmp_path, max_steps=2).train()
    again = trainer(gemmakit, tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS
    same_weights(again.model, whole.model)


def test_what_it_saves_opens_in_both_libraries(whole):
    folder = f"{whole.args.output_dir}/checkpoint-{STEPS}"
    config = json.loads((Path(folder) / "config.json").read_text())
    assert config["architectures"] == ["GemmaForCausalLM"]
    for library in (gemmakit, transformers):
        model = library.AutoModelForCausalLM.from_pretrained(folder)
        same_weights(model, whole.model)
        assert (
            library.AutoTokenizer.from_pretrained(folder)("If the file").input_ids
            == whole.processing_class("If the file")["input_ids"]
        )


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    """A learning rate under which the later steps are worse than the first ones."""
    made = trainer(gemmakit, tmp_path, load_best_model_at_end=True, learning_rate=0.3, save_steps=1, eval_steps=1,
                   save_strategy="steps")  # fmt: skip
    made.train()
    losses = logged(made, "eval_loss")
    best = losses.index(min(losses)) + 1
    assert made.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    same_weights(made.model, gemmakit.GemmaForCausalLM.from_pretrained(made.state.best_model_checkpoint))
    assert made.model.lm_head.weight is made.model.model.embed_tokens.weight
