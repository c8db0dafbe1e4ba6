"""Stand-ins for the processes that are measured."""

import json

LIMITS = {
    "bandwidth_gb_per_s": 10.0,
    "bandwidth_by": "test",
    "matmul_gflop_per_s": {"float32": 100.0, "bfloat16": 50.0},
}
OURS = {
    "side": "gemmakit", "load_s": 0.1, "first_token_s": 1.0, "prefill_tokens_per_s": 20.0, "decode_tokens_per_s": 4.0,
    "decode_tokens_per_s_after_4096": 3.0, "decode_after_4096_over_first": 0.75, "anonymous_gb": 0.1,
    "peak_rss_gb": 2.0, "bytes_a_token": {"0": 2_000_000_000, "4096": 2_500_000_000}, "head_bytes": 1_000_000_000,
    "head_dtype": "bfloat16", "prefill_flops_a_token": 4_000_000_000, "dtype": "bfloat16",
}  # fmt: skip
THEIRS = {"side": "a peer", "first_token_s": 2.0, "prefill_tokens_per_s": 10.0, "decode_tokens_per_s": 2.0}
QUALITY = {"perplexity_ratio": 1.01, "top1_agreement": 0.98, "kl_nats": 0.001}


def spec_of(command):
    return json.loads(command[-1])


def answer(command, *_):
    """What each process would print."""
    spec = spec_of(command)
    if "transformers" in command[1] or "llamacpp" in command[1]:
        return dict(THEIRS)
    return dict({"limits": LIMITS, "quality": QUALITY}.get(spec.get("part"), OURS))
