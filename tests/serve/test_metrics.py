"""/metrics: what is counted is what was done, and the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from running_server import NAME, Running

from gemmakit.serve.settings import ServeSettings

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
# The names that dashboards made for vLLM read.
NAMES = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:num_preemptions_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_queue_time_seconds_bucket",
}


def measured(server: Running) -> dict[str, float]:
    """Sums by name, and by name and reason or field where there is one."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            assert sample.labels["model_name"] == NAME
            more = sample.labels.get("finished_reason") or sample.labels.get("field")
            for name in {sample.name, f"{sample.name} {more}"}:
                found[name] = found.get(name, 0) + sample.value
    return found


@pytest.fixture
def server(serve) -> Running:
    return serve(ServeSettings(), max_batch_size=2)


def test_every_count_is_what_was_done(server):
    ask = {"prompt": "If the file is small, the file", "max_tokens": 5, "ignore_eos": True, "made_up": 1}
    said = [server.post("/v1/completions", **ask).json()["usage"] for _ in range(3)]
    two = server.post("/v1/completions", **{**ask, "n": 2}).json()["usage"]
    found = measured(server)
    assert found["vllm:prompt_tokens_total"] == sum(usage["prompt_tokens"] for usage in (*said, two))
    assert found["vllm:generation_tokens_total"] == 5 * 5
    assert found["vllm:request_success_total length"] == 5
    assert found["gemmakit:unknown_fields_total made_up"] == 4
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency", "request_queue_time"):
        assert found[f"vllm:{name}_seconds_count"] == 5
    assert 0 < found["vllm:time_to_first_token_seconds_sum"] <= found["vllm:e2e_request_latency_seconds_sum"]
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


def test_requests_under_way_are_told_and_who_leaves_is_an_abort(server):
    asked = {"prompt": "x", "max_tokens": 480, "ignore_eos": True, "stream": True, "n": 4}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked) as answer:
        lines = answer.iter_lines()  # kept: an iterator that goes closes the stream
        next(lines)
        found = measured(server)
        assert (found["vllm:num_requests_running"], found["vllm:num_requests_waiting"]) == (2, 2)
        assert found["vllm:kv_cache_usage_perc"] > 0
    until = time.monotonic() + 10
    while not (found := measured(server)).get("vllm:request_success_total abort"):
        assert time.monotonic() < until
    assert found["vllm:num_requests_running"] == found["vllm:num_requests_waiting"] == 0


def test_dashboard_asks_only_for_what_is_told_and_for_all_that_vllm_s_ask_for(server):
    server.post("/v1/completions", prompt="x", max_tokens=2, ignore_eos=True, made_up=1)
    told = measured(server)
    board = json.loads(DASHBOARD.read_text())
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries += [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    asked = [re.findall(r"\b(?:vllm|gemmakit):\w+", query) for query in queries]
    assert all(asked), "a query without a metric"
    assert {name for names in asked for name in names} <= set(told)
    assert set(told) >= NAMES


def test_metrics_need_the_key(serve):
    url = serve(ServeSettings(api_keys=("k",))).url
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/metrics", headers={"x-api-key": "k"}).status_code == 200
