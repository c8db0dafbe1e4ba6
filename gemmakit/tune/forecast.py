"""What a run will take, said before it: rows, steps, memory, and time by two steps that are thrown away."""

from __future__ import annotations

from collections.abc import Iterator

from gemmakit.tune.memory import need
from gemmakit.tune.run import prepare
from gemmakit.tune.settings import TuneSettings
from gemmakit.tune.train import Trainer


def forecast(settings: TuneSettings) -> Iterator[str]:
    """Lines for a person. Raises what `prepare` raises: every row is looked at."""
    made = prepare(settings)
    trainer = Trainer(made.model, made.objective, settings)
    trained, weights = sum(p.numel() for p in trainer.trained.values()), made.model.get_memory_footprint()
    lengths = [made.objective.length(unit) for unit in range(len(made.objective))]
    for split, examples in made.examples.items():
        yield f"{split}: {len(examples)} rows"
    yield f"{len(lengths)} units of {min(lengths)} to {max(lengths)} tokens, {sum(lengths):,} in all"
    yield f"{trainer.total} steps of {settings.batch_size} x {settings.accumulate} units"
    yield f"{trained:,} parameters are trained of {made.model.num_parameters():,}"
    wanted = need(made.model, made.objective, settings)
    yield f"memory: {weights / 1e6:.1f} MB of weights, {wanted.state / 1e6:.1f} MB of gradients and moments,"
    pass_ = (wanted.activations + wanted.logits) / 1e6
    yield f"    at least {pass_:.1f} MB of activations and logits in the largest pass, of {wanted.tokens:,} tokens"
    longest = sorted(range(len(lengths)), key=lambda unit: -lengths[unit])[: settings.batch_size]
    tokens, seconds = 0, 0.0
    for _ in range(2):  # the first also pays for what is set up once
        step = trainer.step()
        tokens, seconds = step.tokens, step.seconds
    rate = f"{tokens / seconds:.0f} tokens/s"
    yield f"time: a step took {seconds:.2f} s ({rate}), {seconds * trainer.total:.0f} s for all"
    yield f"the longest batch holds {sum(lengths[unit] for unit in longest):,} tokens without padding"
