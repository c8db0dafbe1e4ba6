"""Where the time of one decoding step goes: device kernels by name, and how much of the step no kernel ran.

    python benchmarks/step_profile.py [--device cuda] [--size 2b] [--quantize int4] [--context 512] [--steps 16]

The step is the recorded one where there is a device to record for, and the same modules one by one on a CPU. Random
weights, made there. "busy" is the sum of the kernels' times over the wall clock of the steps.
"""

import argparse
import time
from pathlib import Path

import torch
from output import finish
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gemmakit.bench import measure, timing
from gemmakit.cli.env import about
from gemmakit.pytorch.decode.capture import captured_steps


def profiled(model, context, steps):
    """(events by name, seconds a step): a generation of `steps` and one of 3 times as many, the difference of both."""
    device = model.device
    ids = torch.tensor([timing.prompt_ids(context, model.config.vocab_size)], device=device)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")

    def run(new):
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, speculate=False)
        measure.synchronize(device)

    def traced(new):
        with profile(activities=activities) as trace:
            run(new)
        on_device = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
        events = [event for event in trace.key_averages() if event.device_type == on_device]
        # A device's kernels nest nothing; a CPU's operators do, so each is counted without what it calls.
        attribute = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        return {event.key: (getattr(event, attribute), event.count) for event in events}

    def clock(new):
        began = time.perf_counter()
        run(new)
        return time.perf_counter() - began

    few, many = steps, 3 * steps
    run(many)  # compiles and records
    seconds = (clock(many) - clock(few)) / (many - few)
    short, long = traced(few), traced(many)
    names = {n: tuple(a - b for a, b in zip(long[n], short.get(n, (0, 0)), strict=True)) for n in long}
    return {n: (us / (many - few), count / (many - few)) for n, (us, count) in names.items() if us > 0}, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="2b")
    parser.add_argument("--quantize")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        model = measure.load(measure.size_config(args.size), device=args.device, quantize=args.quantize)
        events, seconds = profiled(model, args.context, args.steps)
    slowest = sorted(events.items(), key=lambda item: -item[1][0])
    busy = sum(us for us, _ in events.values()) * 1e-6 / seconds
    recorded = len(captured_steps(model).entries)
    print(f"{args.size} {args.quantize or 'bfloat16'} on {args.device}: {seconds * 1e6:.0f} us a step, kernels busy "
          f"{busy:.0%} of it, {sum(n for _, n in events.values()):.0f} a step, {recorded} recorded steps")  # fmt: skip
    for name, (us, count) in slowest[:25]:
        print(f"{us:10.1f} us {count:7.1f} x  {name[:100]}")
    result = {
        "what": "one decoding step, by kernel", **about(args.threads, "triton"), "size": args.size,
        "quantize": args.quantize, "device": args.device, "context": args.context, "step_us": round(seconds * 1e6, 1),
        "busy": round(busy, 3), "recorded_steps": recorded,
        "kernels": {name: {"us": round(us, 2), "count": round(count, 2)} for name, (us, count) in slowest},
    }  # fmt: skip
    finish(result, args.out, ("step_us", "busy"))


if __name__ == "__main__":
    main()
