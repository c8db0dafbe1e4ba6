"""Run by test_sharded.py in two processes: each prints what it finds as one line of JSON."""

import json
import sys
import warnings
from pathlib import Path

import torch
from tiny_shapes import COMMON, MEMBERS, SHAPES

from gemmakit import GemmaConfig, GemmaForCausalLM
from gemmakit.errors import CheckpointError, InputError
from gemmakit.pytorch.parallel import processes
from gemmakit.pytorch.parallel.sharded import load_sharded, save_sharded, shard_model

warnings.simplefilter("ignore")


def config(shape, **changes):
    return GemmaConfig.from_dict({**COMMON, **SHAPES[shape], "num_hidden_layers": 2, **changes})


def trained(model, steps=2, optimizer=None):
    """The same rows in every process, so that summed gradients are those of one."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(24).view(2, 12) % 150 + 5
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def local_numbers(model):
    return sum(p.to_local().numel() for p in model.parameters())


def same(one, other):
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def apart(one, other):
    a, b = one.state_dict(), other.state_dict()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def said(call):
    try:
        call()
    except (CheckpointError, InputError) as error:
        return str(error)
    return "nothing"


def main():
    folder = Path(sys.argv[1])
    processes.join()
    found = {}
    for name, settings in {
        "gemma": dict(shape="gqa"),
        "gemma4": dict(shape="mha", model_type="gemma4_text", **MEMBERS["gemma4_text"]),
    }.items():
        torch.manual_seed(0)
        one = GemmaForCausalLM(config(**settings))
        if processes.rank() == 0:
            one.save_pretrained(folder / name)
        processes.wait()
        whole = sum(p.numel() for p in one.parameters())
        many = shard_model(GemmaForCausalLM.from_pretrained(folder / name))
        part = local_numbers(many) / whole
        many.train(), one.train()
        trained(one)
        optimizer = trained(many)
        many.save_pretrained(folder / f"{name}-out", max_shard_size="10KB", is_main_process=processes.rank() == 0)
        again = GemmaForCausalLM.from_pretrained(folder / f"{name}-out")
        save_sharded(folder / f"{name}-parts", many, optimizer, {"step": 2})
        # Into other processes' parts, and on from there: as if nothing had happened in between.
        torch.manual_seed(1)
        other = shard_model(GemmaForCausalLM(config(**settings)).train())
        other_optimizer = torch.optim.AdamW(other.parameters(), lr=0.01)
        extra = load_sharded(folder / f"{name}-parts", other, other_optimizer, {"step": 0})
        trained(other, 1, other_optimizer), trained(many, 1, optimizer)
        other.save_pretrained(folder / f"{name}-other"), many.save_pretrained(folder / f"{name}-many")
        found[name] = {
            "part": part,
            "apart": apart(again, one),
            "tied": again.lm_head.weight is again.model.embed_tokens.weight,
            "went_on": same(*[GemmaForCausalLM.from_pretrained(folder / f"{name}-{n}") for n in ("other", "many")]),
            "extra": extra,
        }
    # What one process had saved, optimizer and all.
    torch.manual_seed(1)
    taken = shard_model(GemmaForCausalLM(config("gqa")).train())
    optimizer = torch.optim.AdamW(taken.parameters(), lr=0.01)
    found["from one"] = load_sharded(folder / "one-parts", taken, optimizer, {"step": 0})
    trained(taken, 1, optimizer)
    taken.save_pretrained(folder / "from-one")
    (folder / "file").write_text("")
    found["full"] = said(lambda: many.save_pretrained(folder / "file"))
    found["there"] = said(lambda: save_sharded(folder / "gemma-parts", many))
    found["none"] = said(lambda: load_sharded(folder / "nothing", many))
    print(json.dumps(found))
    processes.leave()


if __name__ == "__main__":
    main()
