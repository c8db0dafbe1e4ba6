"""What generate() costs beside the model: python benchmarks/loop_overhead.py [--rounds 15] [--new 100] [--out FILE]

Greedy decoding of the demo model by generate(), in turn with a bare loop (forward, argmax, append) over the same cache,
and sampling, plain and with prompt lookup, of text that gives it nothing to copy. Medians of the ratios, one thread.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from output import finish

import gemmakit
from gemmakit.cli.env import about


def bare(model: gemmakit.GemmaForCausalLM, ids: torch.Tensor, new: int) -> torch.Tensor:
    """The least that decoding can do."""
    cache, tokens = gemmakit.DynamicCache(), []
    token = ids
    for _ in range(new):
        logits = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
    return torch.cat((ids, *tokens), dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--new", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    model = gemmakit.GemmaForCausalLM.from_pretrained(gemmakit.demo_model())
    ids = torch.randint(473, 2048, (1, 32), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = 2
    n = args.new
    # Hot enough that nothing repeats on purpose: every token that lookup proposes costs and hardly any is right.
    wild = dict(max_new_tokens=n, eos_token_id=[], do_sample=True, temperature=3.0, top_k=0, seed=0)
    runs = {
        "bare loop": lambda: bare(model, ids, n),
        "generate": lambda: model.generate(ids, max_new_tokens=n, eos_token_id=[], speculate=False),
        "sampled": lambda: model.generate(ids, **wild, speculate=False),
        "sampled, prompt lookup": lambda: model.generate(ids, **wild, prompt_lookup_num_tokens=10),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - started)

    def ratio(over: str, under: str) -> float:
        return round(statistics.median(a / b for a, b in zip(times[over], times[under], strict=True)), 4)

    result = {
        "what": "decoding with the demo model, seconds for the whole run; medians of the rounds' ratios",
        **about(1),
        "new_tokens": n,
        "rounds": args.rounds,
        "tokens_per_s": {name: round(n / statistics.median(values), 1) for name, values in times.items()},
        "generate_over_bare": ratio("generate", "bare loop"),
        "lookup_over_sampled": ratio("sampled, prompt lookup", "sampled"),
    }
    finish(result, args.out)


if __name__ == "__main__":
    main()
