#!/usr/bin/env python3
"""Other libraries on a CUDA device beside ours, at the shapes of fla's own benchmark and at long sequences.

usage: gpu_peers.py [--only SUBSTRING] [--shapes 1x8192x16x128,...] [--steps 64x16x128,...] [--seconds 1] [--json FILE]
                    [--ours target/release/thalweg] [--dtype bf16] [--ours-json FILE]

With `--ours`, a `thalweg` built with `--features cuda`, each benchmark of ours with the same name, passes and shape runs first,
on the same device in the same session, and one markdown table of both is printed, by operation, pass, shape and element type.
Theirs are medians of what CUDA events say of runs after a warm-up that compiles and tunes; memory is the most that torch's
allocator had at once, inputs included. Gradients are those of all inputs. Inputs are bf16, gates and beta f32.

The other libraries run on nothing but CUDA. Where there is none, `--ours` still runs on what the build finds, Mesa's software
driver for one, and the table says why the others are missing; `--dtype f32` where that device has no bf16.
"""

import argparse
import importlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version

# fla's benchmarks/ops/registry.py, then one long sequence: batch, time, heads, features of keys and of values.
SHAPES = [
    (1, 8192, 96, 128),
    (2, 16384, 16, 128),
    (4, 2048, 16, 128),
    (4, 4096, 64, 128),
    (8, 2048, 32, 256),
    (8, 1024, 8, 64),
    (1, 8192, 16, 128),
    (1, 32768, 16, 128),
    (1, 65536, 16, 128),
]
# Batch, heads, features of one token on a state.
STEPS = [(1, 16, 128), (8, 16, 128), (64, 16, 128), (256, 16, 128)]

FORWARD, TRAIN, STEP = "forward", "forward+backward", "step"

# Our name of a matrix recurrence; fla's module and function after `chunk_` and `fused_recurrent_`; inputs; and those after q, k
# and v as `fused_recurrent_` calls them.
FAMILY = [
    ("gla", "gla", "gla", ["q", "k", "v", "key"], ["gk"]),
    ("simple_gla", "simple_gla", "simple_gla", ["q", "k", "v", "head"], ["g"]),
    ("gated_delta_rule", "gated_delta_rule", "gated_delta_rule", ["q", "k", "v", "head", "beta"], ["g", "beta"]),
    ("kda", "kda", "kda", ["q", "k", "v", "key", "beta"], ["g", "beta"]),
    ("dplr", "generalized_delta_rule", "dplr_delta_rule", ["q", "k", "v", "a", "b", "key"], ["a", "b", "gk"]),
]
# Ours for which nobody publishes a GPU kernel.
ALONE = ["scan", "complex_scan", "rg_lru"]


def missing():
    """Why the other libraries cannot run, if they cannot."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    if not torch.cuda.is_available():
        return "no CUDA device"
    try:
        import fla  # noqa: F401
    except ImportError:
        return "flash-linear-attention is not installed"
    return None


def tensors(batch, length, heads, dim):
    """q, k of unit length, v, and gates as mild as those of our benchmark."""
    import torch
    import torch.nn.functional as F

    def uniform(*shape):
        return torch.rand(shape, device="cuda")

    shape = (batch, length, heads)
    signed = lambda: 2 * uniform(*shape, dim) - 1
    direction = F.normalize(signed(), dim=-1)
    return {
        "q": signed().bfloat16(),
        "k": F.normalize(signed(), dim=-1).bfloat16(),
        "v": signed().bfloat16(),
        "key": -0.1 * uniform(*shape, dim),
        "head": -0.3 * uniform(*shape),
        "beta": uniform(*shape),
        # What a low-rank write reads, and along what it takes some of that away.
        "a": -direction.bfloat16(),
        "b": (uniform(*shape, 1) * direction).bfloat16(),
    }


def fla_call(module, function, keywords=None):
    """A call of fla's; with `keywords` on one token and a state, which comes first."""
    call = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    if keywords is None:
        return lambda *x: call(*x)[0]
    return lambda state, q, k, v, *rest: call(
        q, k, v, **dict(zip(keywords, rest)), initial_state=state, output_final_state=True)


def mamba(q, k, v, g):
    import torch
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # The gate is dt A: with A = -1 the step size is -g, and what is written is as much smaller.
    a = -torch.ones(v.shape[2], device="cuda")
    return mamba_chunk_scan_combined(v, -g, a, k, q, chunk_size=256)


def hgrn(function, sizes, what):
    """A scan whose gate is a logarithm."""
    import torch

    x = (2 * torch.rand(*sizes, device="cuda") - 1).bfloat16()
    gate = (0.5 + 0.5 * torch.rand_like(x.float())).log().bfloat16()
    return passes(fla_call("hgrn", function), [x, gate])[what]


def attention(q, k, v):
    from torch.nn.functional import scaled_dot_product_attention

    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    return scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)


def passes(f, inputs):
    import torch

    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    cotangent = None

    def forward():
        with torch.no_grad():
            f(*inputs)

    def train():
        nonlocal cotangent
        o = f(*leaves)
        if cotangent is None:
            cotangent = torch.rand_like(o)
        torch.autograd.grad(o, leaves, cotangent, allow_unused=True)

    return {FORWARD: forward, TRAIN: train}


def measure(run, seconds):
    """Milliseconds of each sample, and bytes at the peak of a run."""
    import torch

    for _ in range(2):
        run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    peak, once = torch.cuda.max_memory_allocated(), time.perf_counter() - start
    repeats = max(1, min(64, int(2e-3 / once)))
    samples, begin = [], time.perf_counter()
    while len(samples) < 7 or time.perf_counter() - begin < seconds:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(repeats):
            run()
        last.record()
        torch.cuda.synchronize()
        samples.append(first.elapsed_time(last) / repeats)
    return samples, peak


def on_tensors(call, takes, shape, what):
    inputs = tensors(*shape)
    return passes(call, [inputs[name] for name in takes])[what]


def chunked(module, function, *rest):
    return on_tensors(fla_call(module, function), *rest)


def stepped(module, function, takes, keywords, batch, heads, dim):
    import torch

    inputs = tensors(batch, 1, heads, dim)
    state = torch.rand(batch, heads, dim, dim, device="cuda")
    call = fla_call(module, function, keywords)

    def run():
        with torch.no_grad():
            call(state, *(inputs[name] for name in takes))

    return run


def cases(shapes, steps):
    """`(benchmark, peer, pass, shape, function that makes the run)` of all; no peer and function for what only we have."""
    for shape in shapes:
        batch, length, heads, dim = shape
        matrix, channels = [batch, length, heads, dim, dim], [batch, length, heads * dim]
        for what in (FORWARD, TRAIN):
            for name, module, function, takes, _ in FAMILY:
                yield (name, f"fla chunk_{function}", what, matrix,
                       partial(chunked, module, f"chunk_{function}", takes, shape, what))
            yield ("simple_gla", "mamba-ssm mamba_chunk_scan_combined", what, matrix,
                   partial(on_tensors, mamba, ["q", "k", "v", "head"], shape, what))
            yield "attention", "torch SDPA", what, list(shape), partial(on_tensors, attention, "qkv", shape, what)
            for function in ("chunk_hgrn", "fused_recurrent_hgrn"):
                yield "hgrn", f"fla {function}", what, channels, partial(hgrn, function, channels, what)
            for name in ALONE:
                yield name, None, what, channels, None
    for batch, heads, dim in steps:
        for name, module, function, takes, keywords in FAMILY:
            yield (name, f"fla fused_recurrent_{function}", STEP, [batch, 1, heads, dim, dim],
                   partial(stepped, module, f"fused_recurrent_{function}", takes, keywords, batch, heads, dim))


def label(name, peer, what, shape):
    return f"{name}/{what} {shape} {peer or 'ours alone'}"


def timed(make, seconds):
    """What a row says of a peer's time."""
    import torch

    try:
        samples, peak = measure(make(), seconds)
    except Exception as error:  # A peer that refuses or fails at a shape is a result.
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    finally:
        torch.cuda.empty_cache()
    quartiles = statistics.quantiles(samples, n=4)
    return {"median_ms": statistics.median(samples), "min_ms": min(samples), "iqr_ms": quartiles[2] - quartiles[0],
            "samples": len(samples), "peak_bytes": peak}


def report(chosen, seconds):
    """A row for each peer."""
    import torch
    import triton

    rows = []
    for name, peer, what, shape, make in chosen:
        if peer:
            row = {"part": "ops", "name": name, "pass": what, "shape": shape, "dtype": "bf16", "peer": peer}
            row |= timed(make, seconds)
            said = row.get("error") or f"{row['median_ms']:.4f} ms, {row['peak_bytes'] / 1e9:.2f} GB"
            print(f"{label(name, peer, what, shape)}: {said}", file=sys.stderr)
            rows.append(row)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
               "fla": version("flash-linear-attention")}
    return {"machine": machine, "rows": rows}


def ours(binary, dtype, chosen):
    """What our benchmark reports of the same shapes; each shape in a process of its own."""
    reports, seen = [], set()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ours.json"
        for name, _, what, shape, _ in chosen:
            # A filter that contains "forward" also takes "forward+backward".
            part = f"ops/{name}/{STEP if what == STEP else FORWARD}"
            if (part, *shape) in seen:
                continue
            seen.add((part, *shape))
            sizes = ",".join(map(str, shape))
            command = [binary, "bench", "ops", "--path", "gpu", "--dtype", dtype, "--filter", part, "--shape", sizes]
            path.unlink(missing_ok=True)
            # What is wrong or fails is said on the terminal, and is no row.
            subprocess.run([*command, "--json", str(path)], stdout=sys.stderr, check=False)
            if path.exists():
                reports.append(json.loads(path.read_text()))
    if not reports:
        sys.exit("gpu_peers.py: none of our benchmarks ran")
    return {**reports[0], "rows": [row for report in reports for row in report["rows"]]}


def joined(chosen, theirs, ours):
    """A markdown table of both; what a peer has no row of is left empty."""
    key = lambda row: (row["name"], row["pass"], tuple(row["shape"]))
    mine = {key(row): row for row in ours["rows"]}
    peers = {(row["peer"], *key(row)): row for row in theirs["rows"]}
    versions = [f"thalweg {ours['machine']['commit']} on {ceiling['device']}" for ceiling in ours["ceilings"]]
    versions += [f"{name} {value}" for name, value in theirs["machine"].items()]
    lines = [", ".join(versions), "",
             "| op and shape | pass | ours (ms) | of the ceiling | GB/s | TFLOP/s | memory (GB) | error | peer | peer (ms) "
             "| memory (GB) | ratio |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, peer, what, shape, _ in chosen:
        same = (name, what, tuple(shape))
        our, row = mine.get(same), peers.get((peer, *same), {})
        if our is None:
            continue
        cells = f"{row['median_ms']:.3f} ± {row['iqr_ms']:.3f} | {row['peak_bytes'] / 1e9:.2f} | " \
                f"{row['median_ms'] / our['median_ms']:.2f}x" if "median_ms" in row else f"{row.get('error', '')} | | "
        lines.append(
            f"| {name} {shape} | {what} | {our['median_ms']:.3f} ± {our['iqr_ms']:.3f} "
            f"| {100 * our['fraction']:.0f} % {our['bound']} | {our['gbytes']:.3g} | {our['gflops'] / 1e3:.3g} "
            f"| {our['peak_bytes'] / 1e9:.2f} | {our['error']:.1e} | {peer or ''} | {cells} |")
    return "\n".join(lines)


def sizes(text):
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only what contains this in `name/pass shape peer`")
    parser.add_argument("--shapes", type=sizes, default=SHAPES, metavar="BxTxHxD,...", help="in place of all sequences")
    parser.add_argument("--steps", type=sizes, default=STEPS, metavar="BxHxD,...", help="in place of all single tokens")
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples for each row")
    parser.add_argument("--json", help="writes the report to this file instead of standard output")
    parser.add_argument("--ours", metavar="THALWEG", help="runs our benchmarks too and prints one table of both")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "f32"], help="of our tensors")
    parser.add_argument("--ours-json", metavar="FILE", help="writes our report to this file")
    options = parser.parse_args()
    why_not = missing()
    if why_not and not options.ours:
        sys.exit(f"gpu_peers.py: {why_not}; see benches/peers/requirements-gpu.txt, or run ours alone with --ours")
    if options.dtype != "bf16" and not why_not:
        sys.exit("gpu_peers.py: the other libraries are timed in bf16; --dtype is for devices that they do not run on")
    chosen = [case for case in cases(options.shapes, options.steps) if options.only in label(*case[:4])]
    mine = ours(options.ours, options.dtype, chosen) if options.ours else None
    if options.ours_json and mine:
        pathlib.Path(options.ours_json).write_text(json.dumps(mine, indent=2) + "\n")
    none = {"machine": {"peers": f"not run ({why_not})"}, "rows": []}
    theirs = none if why_not else report(chosen, options.seconds)
    text = json.dumps(theirs, indent=2)
    if options.json:
        pathlib.Path(options.json).write_text(text + "\n")
    elif not mine:
        print(text)
    if mine:
        print(joined(chosen, theirs, mine))


if __name__ == "__main__":
    main()
