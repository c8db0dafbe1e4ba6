"""peft and transformers' Trainer on the rows of gemmakit_tune.py, in its order, padded a batch at a time.

Fields of the spec: model, rows (a JSON file of [ids, labels] in the order of the steps), batch_size, rank, lr, steps,
threads, dtype.
"""

from __future__ import annotations

import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import side


def train(spec: dict[str, Any]) -> dict[str, Any]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(spec["threads"])
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=spec["dtype"])
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=names, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    rows = [{"input_ids": ids, "labels": labels} for ids, labels in json.loads(Path(spec["rows"]).read_text())]
    rows = rows[: spec["steps"] * spec["batch_size"]]
    times, losses = list[float](), list[float]()

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

        def on_log(self, *_: Any, logs: Any = None, **__: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in (logs or {}) else [])

    def padded(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(row["input_ids"]) for row in batch)
        found = {name: [row[name] + [fill] * (width - len(row[name])) for row in batch]
                 for name, fill in (("input_ids", 0), ("labels", -100))}  # fmt: skip
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
        return {name: torch.tensor(values) for name, values in {**found, "attention_mask": mask}.items()}

    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            folder, per_device_train_batch_size=spec["batch_size"], num_train_epochs=1, learning_rate=spec["lr"],
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, max_grad_norm=1.0,
        )  # fmt: skip
        InOrder(model, settings, data_collator=padded, train_dataset=rows, callbacks=[Clock()]).train()  # type: ignore[arg-type]
    tokens = sum(len(row["input_ids"]) for row in rows[spec["batch_size"] :])
    seconds = sum(times[1:])
    return {
        "side": f"peft {peft.__version__}, transformers {transformers.__version__}", "torch": torch.__version__,
        "dtype": spec["dtype"], "tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip


side.main({"generate": train})
