"""TRL trains a gemmakit model (SFT, DPO, GRPO) with the losses of transformers' one, resumes, and loads the best."""

import pytest
import torch
import transformers
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import gemmakit

pytestmark = pytest.mark.usefixtures("registered")
COMMON = dict(
    max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3, logging_steps=1,
    lr_scheduler_type="constant", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, seed=0, save_steps=2,
)  # fmt: skip
CHATS = [
    [{"role": "user", "content": f"What is {a} + {b}?"}, {"role": "assistant", "content": f"{a} + {b} = {a + b}"}]
    for a in range(1, 5)
    for b in (2, 31)
]
SFT = Dataset.from_dict({"messages": CHATS})
COMPLETIONS = Dataset.from_dict({"prompt": [c[:1] for c in CHATS], "completion": [c[1:] for c in CHATS]})
PREFERENCES = Dataset.from_dict(
    {
        "prompt": [c[:1] for c in CHATS],
        "chosen": [c[1:] for c in CHATS],
        "rejected": [[{"role": "assistant", "content": "I do not know"}] for _ in CHATS],
    }
)
QUESTIONS = Dataset.from_dict({"prompt": [c[:1] for c in CHATS]})


def every_other(completions, **_):
    """A reward that differs within each group, whatever was said."""
    return [float(i % 2) for i in range(len(completions))]


def sft(library, name, folder, data=SFT, **given):
    args = SFTConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **given})
    more = {"eval_dataset": data} if given.get("eval_steps") else {}
    return SFTTrainer(
        model=loaded(library, name), args=args, train_dataset=data, processing_class=of(library, name), **more
    )


def dpo(library, name, folder, **given):
    args = DPOConfig(output_dir=str(folder), **{**COMMON, "max_length": 64, **given})
    return DPOTrainer(
        model=loaded(library, name), args=args, train_dataset=PREFERENCES, processing_class=of(library, name)
    )


def grpo(library, name, folder, **given):
    args = GRPOConfig(
        output_dir=str(folder),
        **{**COMMON, "num_generations": 2, "max_completion_length": 6, "temperature": 3.0, **given},
    )
    return GRPOTrainer(
        model=loaded(library, name), args=args, train_dataset=QUESTIONS, processing_class=of(library, name),
        reward_funcs=every_other,
    )  # fmt: skip


def loaded(library, name):
    return library.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def of(library, name):
    return library.AutoTokenizer.from_pretrained(name)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def same_weights(one, other):
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=0, atol=0)


TRAININGS = {
    "chats": (sft, {}),
    "completions": (sft, {"data": COMPLETIONS}),
    "packed": (sft, {"packing": True, "max_length": 48}),
    "recomputed": (sft, {"gradient_checkpointing": True}),
    "preferences": (dpo, {}),
}


@pytest.mark.parametrize("kind", TRAININGS)
def test_losses_are_those_of_transformers_model(kind, name, tmp_path):
    make, given = TRAININGS[kind]
    found = []
    for library in (gemmakit, transformers):
        trainer = make(library, name, tmp_path / library.__name__, **given)
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert len(found[0]) == 4
    assert found[0] == pytest.approx(found[1], rel=2e-3)  # sums in another order, over four steps


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_a_saved_run_is_resumed_and_opens_in_both_libraries(make, name, tmp_path):
    make(gemmakit, name, tmp_path, max_steps=2).train()
    trainer = make(gemmakit, name, tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    for library in (gemmakit, transformers):
        same_weights(library.AutoModelForCausalLM.from_pretrained(f"{tmp_path}/checkpoint-4"), trainer.model)
    if make is not grpo:  # which samples: a resumed run draws on
        whole = make(gemmakit, name, tmp_path / "whole")
        whole.train()
        same_weights(trainer.model, whole.model)


def test_the_best_model_is_loaded_at_the_end(name, tmp_path):
    given = dict(eval_steps=1, save_steps=1, eval_strategy="steps", load_best_model_at_end=True, learning_rate=0.3)
    trainer = sft(gemmakit, name, tmp_path, **given)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{losses.index(min(losses)) + 1}")
    same_weights(gemmakit.GemmaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint), trainer.model)


def test_grpo_learns_from_what_the_model_says(name, tmp_path):
    trainer = grpo(gemmakit, name, tmp_path)
    before = trainer.model.model.norm.weight.clone()
    trainer.train()
    rewards = logged(trainer, "reward")
    assert rewards == [0.5] * 4
    assert not torch.equal(trainer.model.model.norm.weight, before)


def test_an_adapter_is_trained_in_place_of_the_model(name, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    found = []
    for library in (gemmakit, transformers):
        args = SFTConfig(output_dir=str(tmp_path / library.__name__), **COMMON, max_length=64)
        trainer = SFTTrainer(
            model=loaded(library, name),
            args=args,
            train_dataset=SFT,
            processing_class=of(library, name),
            peft_config=adapter,
        )
        trainer.train()
        found.append(logged(trainer, "loss"))
    assert found[0] == pytest.approx(found[1], rel=2e-3)
