"""Steps of gemmakit tune, timed one by one. Fields of the spec: settings (of TuneSettings), steps, threads."""

from __future__ import annotations

import resource
from typing import Any

import side


def train(spec: dict[str, Any]) -> dict[str, Any]:
    import torch

    import gemmakit
    from gemmakit.tune import TuneSettings
    from gemmakit.tune.batches import targets
    from gemmakit.tune.run import prepare
    from gemmakit.tune.train import Trainer

    torch.set_num_threads(spec["threads"])
    made = prepare(TuneSettings(**spec["settings"], out="unused"))
    trainer = Trainer(made.model, made.objective, made.settings)
    tokens, seconds, losses = 0, 0.0, list[float]()
    for number in range(spec["steps"]):
        units = [unit for part in trainer.order.step(number) for unit in part]
        told = trainer.step()
        losses.append(told.loss)
        if number:  # the first also pays for what is set up once
            tokens += sum(made.objective.length(unit) for unit in units)
            seconds += told.seconds
    return {
        "side": f"gemmakit {gemmakit.__version__}", "torch": torch.__version__, "tokens": tokens, "seconds": seconds,
        "tokens_per_s": tokens / seconds, "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "trained": sum(p.numel() for p in trainer.trained.values()), "first_loss": losses[0], "last_loss": losses[-1],
        "learnt": int((targets(made.objective.batch([0])) != -100).sum()),
    }  # fmt: skip


side.main({"generate": train})
