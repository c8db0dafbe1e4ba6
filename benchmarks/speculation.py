"""What proposing tokens to oneself gains, by kind of text: python benchmarks/speculation.py [--out FILE]

generate() as it is by default, in turn with speculate=False, of the demo model and of the real Gemma 3 270M (`make
real`, in the form of its file): greedy and sampled. Rates are medians of the rounds, gains medians of the rounds'
ratios; by cpu: of the thread's processor time, which other work on the machine disturbs less. "wrong": every proposal
is, on purpose. "equal" says that tokens are those of single steps.
"""

import argparse
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
from output import finish

import gemmakit
from gemmakit.cli.env import about
from gemmakit.hub import models_folder
from gemmakit.pytorch.decode.drafts import Gain, Repeats

CODE = '''\
def read(path, mode="r"):
    """Give the lines of a file."""
    with open(path, mode) as file:
        lines = [line.rstrip() for line in file]
    return [line for line in lines if line]


def count(path):
    """Count the words of a file."""
    words = {}
    for line in read(path):
        for word in line.split():
            words[word] = words.get(word, 0) + 1
    return words
'''
STORY = """\
The lighthouse at Carn Head was built in 1861, after the wreck of the brig Marigold. Its lamp burnt oil until 1926, when
the keeper, Ellen Tregear, had it replaced by an electric one. She wrote to the harbour board that the new lamp could be
seen from eighteen miles away, and that it needed no trimming. The lighthouse was closed in 1988 and is a museum today.
"""
RECORDS = """\
[
  {"name": "Ada", "city": "London", "year": 1815, "field": "mathematics"},
  {"name": "Grace", "city": "New York", "year": 1906, "field": "computing"},
  {"name": "Emmy", "city": "Erlangen", "year": 1882, "field": "mathematics"},
"""
EDIT = f"Original:\n\n```python\n{CODE}```\n\nThe same, with `path` renamed to `name`:\n\n```python\ndef read(name"
KINDS = {
    "code edit": EDIT,
    "summary that quotes": f"{STORY}\nThe passage again, word for word:\n\nThe lighthouse at Carn Head was",
    "JSON": f'{RECORDS}  {{"name": "',
    "free text": "It was late in the evening when the train finally",
}
SAMPLED = dict(do_sample=True, seed=0, temperature=1.0, top_k=64, top_p=0.95)


class Counts:
    """What passes proposed and got."""

    def __init__(self) -> None:
        self.passes = self.proposed = self.accepted = 0

    def counting(self):
        enter = Gain.enter

        def counted(gain, proposed, accepted, seconds=None):
            self.passes, self.proposed = self.passes + 1, self.proposed + proposed
            self.accepted += accepted
            enter(gain, proposed, accepted, seconds)

        return mock.patch.object(Gain, "enter", counted)


def wrong(repeats: Repeats, count: int, own=Repeats.continuation) -> list[int]:
    """Tokens that never come: of what is proposed, the ids next to it."""
    return [token ^ 1 for token in own(repeats, count)]


def measured(model, ids, new: int, rounds: int, **how) -> dict:
    seconds: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    tokens, counts = {}, Counts()
    for number in range(rounds + 1):
        for speculate in (True, False) if number % 2 else (False, True):
            began, cpu = time.perf_counter(), time.thread_time()
            out = model.generate(ids, max_new_tokens=new, eos_token_id=[], speculate=speculate, **how)
            took = time.perf_counter() - began, time.thread_time() - cpu
            tokens[speculate] = out
            if number:  # the first round warms up
                seconds[speculate].append(took)
    with counts.counting():
        model.generate(ids, max_new_tokens=new, eos_token_id=[], **how)

    def ratio(clock: int) -> float:
        pairs = zip(seconds[False], seconds[True], strict=True)
        return round(statistics.median(plain[clock] / own[clock] for plain, own in pairs), 3)

    def rate(speculate: bool) -> float:
        return round(new / statistics.median(took for took, _ in seconds[speculate]), 1)

    return {
        "equal": torch.equal(tokens[True], tokens[False]),
        "tokens_a_pass": round(new / (1 + counts.passes), 2),
        "proposed": counts.proposed,
        "accepted": round(counts.accepted / max(1, counts.proposed), 3),
        "tokens_per_s": rate(True),
        "tokens_per_s_by_single_steps": rate(False),
        "gain": ratio(0),
        "gain_by_cpu": ratio(1),
    }


def rows_of(model, tokenizer, new: int, rounds: int) -> dict[str, dict]:
    found = {}
    for kind, text in KINDS.items():
        ids = tokenizer(text, return_tensors="pt").input_ids
        for name, how in (("greedy", {}), ("sampled", SAMPLED)):
            found[f"{kind}, {name}"] = measured(model, ids, new, rounds, **how)
    ids = tokenizer(EDIT, return_tensors="pt").input_ids
    with mock.patch.object(Repeats, "continuation", wrong):
        found["code edit, greedy, wrong"] = measured(model, ids, new, rounds)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["demo", "gemma3-270m"], help="one of the models")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {"demo": gemmakit.demo_model(), "gemma3-270m": models_folder() / "gemma3-270m.gguf"}
    result = {
        "what": __doc__.split(":")[0],
        **about(args.threads),
        "new_tokens": args.new,
        "rounds": args.rounds,
        "models": {},
    }
    for name, path in models.items():
        if args.only not in (None, name):
            continue
        if not Path(path).exists():
            print(f"{name} is not here: `make real` brings it")
            continue
        model = gemmakit.AutoModelForCausalLM.from_pretrained(path)
        tokenizer = gemmakit.AutoTokenizer.from_pretrained(path)
        result["models"][name] = rows_of(model, tokenizer, args.new, args.rounds)
        for kind, row in result["models"][name].items():
            print(f"{name:12} {kind:32}", *(f"{key} {value}" for key, value in row.items()), flush=True)
    finish(result, args.out, ("date", "machine") if args.out else ("date",))


if __name__ == "__main__":
    main()
