"""lm-eval's local-completions and local-chat-completions against a server, and the same scores in this process.

python lm_eval_client.py URL LM_EVAL: the command `lm_eval` of an environment that has lm-eval[api] and transformers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gemmakit

SUMS = [(a, b) for a in (7, 20, 34, 41) for b in (5, 9, 58)]
CHOICES = {
    "task": "sums_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "What is {{a}} + {{b}}? It is",
    "doc_to_choice": ["{{a + b}}", "{{a + b + 1}}", "{{a}}"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc"}],
}
GENERATED = {
    "task": "sums_generated",
    "output_type": "generate_until",
    "doc_to_text": "What is {{a}} + {{b}}?",
    "doc_to_target": "{{a}} + {{b}} = {{a + b}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}


def evaluate(
    command: str, kind: str, url: str, task: str, folder: Path, *more: str
) -> tuple[dict[str, Any], list[Any]]:
    """Results and samples of a run of lm-eval."""
    path = "chat/completions" if "chat" in kind else "completions"
    arguments = {"model": "gemmakit-demo", "base_url": f"{url}/v1/{path}", "num_concurrent": 4, "max_length": 512}
    arguments |= {"tokenizer": gemmakit.demo_model(), "tokenizer_backend": "huggingface", "max_retries": 1}
    line = [command, "run", "--model", kind, "--tasks", task, "--include_path", str(folder), "--log_samples", *more]
    line += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
    out = folder / kind
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "none",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "c"),
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [*line, "--output_path", str(out)], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    (results,) = out.rglob("results_*.json")
    (samples,) = out.rglob("samples_*.jsonl")
    return json.loads(results.read_text())["results"][task], [
        json.loads(one) for one in samples.read_text().splitlines()
    ]


def alone(engine: gemmakit.BatchEngine, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Log likelihood of a continuation and whether it is the likeliest, by the engine without a server."""
    whole = tokenizer(context + continuation, add_special_tokens=False).input_ids
    begins = len(tokenizer(context, add_special_tokens=False).input_ids)
    engine.add(gemmakit.Request(whole, settings={"max_new_tokens": 1}, prompt_logprobs=1))
    scores: list[Any] = []
    while engine.has_work:
        for event in engine.step():
            scores += event.prompt_logprobs or ()
    told = scores[begins:]
    return sum(one.logprob for one in told), all(one.top_logprobs[0][0] == one.token for one in told)


def main(url: str, command: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "sums.jsonl"
        data.write_text("".join(json.dumps({"a": a, "b": b}) + "\n" for a, b in SUMS))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        for task in (CHOICES, GENERATED):
            (folder / f"{task['task']}.yaml").write_text(json.dumps({**source, **task}))
        found, samples = evaluate(command, "local-completions", url, "sums_choice", folder)
        print("local-completions:", {k: v for k, v in found.items() if isinstance(v, float)})
        model = gemmakit.AutoModelForCausalLM.from_pretrained(gemmakit.demo_model())
        tokenizer = gemmakit.AutoTokenizer.from_pretrained(gemmakit.demo_model())
        engine = gemmakit.BatchEngine(model)
        worst, compared = 0.0, 0
        for sample in samples:
            for asked, told in zip(sample["arguments"].values(), sample["resps"], strict=True):
                score, greedy = alone(engine, tokenizer, asked["arg_0"], asked["arg_1"])
                worst, compared = max(worst, abs(score - float(told[0][0]))), compared + 1
                assert greedy == (str(told[0][1]) == "True"), (asked, told)
        print(f"{compared} scores, at most {worst:.1e} from those in this process")
        assert compared == 3 * len(SUMS) and worst <= 1e-6
        found, samples = evaluate(
            command, "local-chat-completions", url, "sums_generated", folder, "--apply_chat_template"
        )
        print("local-chat-completions:", {k: v for k, v in found.items() if isinstance(v, float)})
        pipe = gemmakit.pipeline("text-generation", device="cpu")
        for sample in samples:
            chat = [{"role": "user", "content": f"What is {sample['doc']['a']} + {sample['doc']['b']}?"}]
            said = pipe(chat, max_new_tokens=20, **pipe.turn_ends())[0]["generated_text"][-1]["content"]
            assert sample["resps"][0][0] == said.split("\n")[0], (sample["resps"], said)
        print(f"{len(samples)} answers, each that of this process")


main(*sys.argv[1:])
