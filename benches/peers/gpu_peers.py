#!/usr/bin/env python3
"""flash-linear-attention and Mamba-2 on a CUDA device, at the shapes of fla's own benchmark and at long sequences.

usage: gpu_peers.py [--only SUBSTRING] [--shapes 1x8192x16x128,...] [--seconds 1] [--json FILE]
                    [--ours target/release/thalweg] [--ours-json FILE]

With `--ours`, a `thalweg` built with `--features cuda`, each benchmark of ours with the same name, passes and shape runs first,
on the same device in the same session, and one markdown table of both is printed, by operation, pass, shape and element type.
Theirs are medians of what CUDA events say of runs after a warm-up that compiles and tunes; memory is the most that torch's
allocator had at once, inputs included. Gradients are those of all inputs. Inputs are bf16, gates and beta f32.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

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


def need_device():
    try:
        import torch
    except ImportError:
        sys.exit("gpu_peers.py: torch is not installed; pip install -r benches/peers/requirements-gpu.txt")
    if not torch.cuda.is_available():
        sys.exit("gpu_peers.py: no CUDA device; these peers run on nothing else")
    try:
        import fla  # noqa: F401
    except ImportError:
        sys.exit("gpu_peers.py: flash-linear-attention is not installed; pip install -r benches/peers/requirements-gpu.txt")


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


def operations():
    """Name in our benchmark, name of the peer, its inputs, the chunked call, and the call on a token with a state."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.generalized_delta_rule import chunk_dplr_delta_rule, fused_recurrent_dplr_delta_rule
    from fla.ops.gla import chunk_gla, fused_recurrent_gla
    from fla.ops.kda import chunk_kda, fused_recurrent_kda
    from fla.ops.simple_gla import chunk_simple_gla, fused_recurrent_simple_gla

    keep = lambda state: dict(initial_state=state, output_final_state=True)
    found = [
        ("gla", "fla chunk_gla", ["q", "k", "v", "key"], lambda q, k, v, g: chunk_gla(q, k, v, g)[0],
         lambda s, q, k, v, g: fused_recurrent_gla(q, k, v, gk=g, **keep(s))),
        ("simple_gla", "fla chunk_simple_gla", ["q", "k", "v", "head"], lambda q, k, v, g: chunk_simple_gla(q, k, v, g)[0],
         lambda s, q, k, v, g: fused_recurrent_simple_gla(q, k, v, g=g, **keep(s))),
        ("gated_delta_rule", "fla chunk_gated_delta_rule", ["q", "k", "v", "head", "beta"],
         lambda q, k, v, g, b: chunk_gated_delta_rule(q, k, v, g, b)[0],
         lambda s, q, k, v, g, b: fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=b, **keep(s))),
        ("kda", "fla chunk_kda", ["q", "k", "v", "key", "beta"], lambda q, k, v, g, b: chunk_kda(q, k, v, g, b)[0],
         lambda s, q, k, v, g, b: fused_recurrent_kda(q, k, v, g, b, **keep(s))),
        ("dplr", "fla chunk_dplr_delta_rule", ["q", "k", "v", "a", "b", "key"],
         lambda q, k, v, a, b, g: chunk_dplr_delta_rule(q, k, v, a, b, g)[0],
         lambda s, q, k, v, a, b, g: fused_recurrent_dplr_delta_rule(q, k, v, a, b, g, **keep(s))),
    ]
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    except ImportError:
        print("mamba-ssm is not installed and not timed", file=sys.stderr)
        return found

    def mamba(q, k, v, g):
        import torch

        # The gate is dt A: with A = -1 the step size is -g, and what is written is as much smaller.
        a = -torch.ones(v.shape[2], device="cuda")
        return mamba_chunk_scan_combined(v, -g, a, k, q, chunk_size=256)

    return found + [("simple_gla", "mamba-ssm mamba_chunk_scan_combined", ["q", "k", "v", "head"], mamba, None)]


def hgrn(batch, length, channels):
    """Scans whose gate is a logarithm, by name of the peer, and their inputs."""
    import torch
    from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

    x = (2 * torch.rand(batch, length, channels, device="cuda") - 1).bfloat16()
    gate = (0.5 + 0.5 * torch.rand_like(x.float())).log().bfloat16()
    return {"fla chunk_hgrn": lambda x, g: chunk_hgrn(x, g)[0],
            "fla fused_recurrent_hgrn": lambda x, g: fused_recurrent_hgrn(x, g)[0]}, [x, gate]


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


def cases(shapes):
    """`(benchmark, peer, pass, shape, function that makes the run)` of all."""
    import torch

    found = operations()
    for shape in shapes:
        batch, length, heads, dim = shape
        for name, peer, takes, chunked, _ in found:
            for what in (FORWARD, TRAIN):
                def make(takes=takes, chunked=chunked, shape=shape, what=what):
                    inputs = tensors(*shape)
                    return passes(chunked, [inputs[name] for name in takes])[what]
                yield name, peer, what, [batch, length, heads, dim, dim], make
        for what in (FORWARD, TRAIN):
            def make(shape=shape, what=what):
                inputs = tensors(*shape)
                return passes(attention, [inputs[name] for name in "qkv"])[what]
            yield "attention", "torch SDPA", what, list(shape), make
        for peer in ("fla chunk_hgrn", "fla fused_recurrent_hgrn"):
            for what in (FORWARD, TRAIN):
                def make(peer=peer, what=what, sizes=(batch, length, heads * dim)):
                    calls, inputs = hgrn(*sizes)
                    return passes(calls[peer], inputs)[what]
                yield "hgrn", peer, what, [batch, length, heads * dim], make
    for batch, heads, dim in STEPS:
        for name, peer, takes, _, recurrent in found:
            if recurrent is None:
                continue

            def make(takes=takes, recurrent=recurrent, sizes=(batch, heads, dim)):
                batch, heads, dim = sizes
                inputs = tensors(batch, 1, heads, dim)
                state = torch.rand(batch, heads, dim, dim, device="cuda")

                def run():
                    with torch.no_grad():
                        recurrent(state, *(inputs[name] for name in takes))

                return run

            yield name, peer.replace("chunk_", "fused_recurrent_"), STEP, [batch, 1, heads, dim, dim], make


def report(options):
    import torch
    import triton
    from importlib.metadata import version

    rows = []
    for name, peer, what, shape, make in cases(options.shapes):
        label = f"{name}/{what} {shape} {peer}"
        if options.only not in label:
            continue
        row = {"part": "ops", "name": name, "pass": what, "shape": shape, "dtype": "bf16", "peer": peer}
        try:
            samples, peak = measure(make(), options.seconds)
        except Exception as error:  # A peer that refuses or fails at a shape is a result.
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"{label}: {row['error']}", file=sys.stderr)
        else:
            quartiles = statistics.quantiles(samples, n=4)
            row |= {"median_ms": statistics.median(samples), "min_ms": min(samples), "iqr_ms": quartiles[2] - quartiles[0],
                    "samples": len(samples), "peak_bytes": peak}
            print(f"{label}: {row['median_ms']:.4f} ms, {peak / 1e9:.2f} GB", file=sys.stderr)
        rows.append(row)
        torch.cuda.empty_cache()
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__,
               "fla": version("flash-linear-attention")}
    return {"machine": machine, "rows": rows}


def ours(binary, only, shapes):
    """The rows of our benchmark at the same shapes; each shape in a process of its own."""
    rows, seen = [], set()
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "ours.json"
        for name, peer, what, shape, _ in cases(shapes):
            # A filter that contains "forward" also takes "forward+backward".
            part = f"ops/{name}/{STEP if what == STEP else FORWARD}"
            if only not in f"{name}/{what} {shape} {peer}" or (part, *shape) in seen:
                continue
            seen.add((part, *shape))
            sizes = ",".join(map(str, shape))
            command = [binary, "bench", "ops", "--path", "gpu", "--dtype", "bf16", "--filter", part, "--shape", sizes]
            path.unlink(missing_ok=True)
            # What is wrong or fails is said on the terminal, and is no row.
            subprocess.run([*command, "--json", str(path)], stdout=sys.stderr, check=False)
            if path.exists():
                rows += json.loads(path.read_text())["rows"]
    return {"rows": rows}


def joined(theirs, ours):
    """A markdown table of both."""
    same = lambda row: (row["name"], row["pass"], tuple(row["shape"]), row["dtype"])
    mine = {same(row): row for row in ours["rows"] if row["path"] == "gpu"}
    versions = ", ".join(f"{name} {value}" for name, value in theirs["machine"].items())
    lines = [versions, "",
             "| op and shape | pass | ours (ms) | of the ceiling | GB/s | TFLOP/s | memory (GB) | error | peer | peer (ms) "
             "| memory (GB) | ratio |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in theirs["rows"]:
        our = mine.get(same(row))
        if our is None:
            continue
        peer = f"{row['median_ms']:.3f} ± {row['iqr_ms']:.3f} | {row['peak_bytes'] / 1e9:.2f} | " \
               f"{row['median_ms'] / our['median_ms']:.2f}x" if "median_ms" in row else f"{row['error']} | | "
        lines.append(
            f"| {row['name']} {row['shape']} | {row['pass']} | {our['median_ms']:.3f} ± {our['iqr_ms']:.3f} "
            f"| {100 * our['fraction']:.0f} % {our['bound']} | {our['gbytes']:.0f} | {our['gflops'] / 1e3:.1f} "
            f"| {our['peak_bytes'] / 1e9:.2f} | {our['error']:.1e} | {row['peer']} | {peer} |")
    return "\n".join(lines)


def sizes(text):
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only what contains this in `name/pass shape peer`")
    parser.add_argument("--shapes", type=sizes, default=SHAPES, metavar="BxTxHxD,...", help="in place of all sequences")
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples for each row")
    parser.add_argument("--json", help="writes the report to this file instead of standard output")
    parser.add_argument("--ours", metavar="THALWEG", help="runs our benchmarks too and prints one table of both")
    parser.add_argument("--ours-json", metavar="FILE", help="writes our rows to this file")
    options = parser.parse_args()
    need_device()
    mine = ours(options.ours, options.only, options.shapes) if options.ours else None
    if options.ours_json and mine:
        pathlib.Path(options.ours_json).write_text(json.dumps(mine, indent=2) + "\n")
    theirs = report(options)
    text = json.dumps(theirs, indent=2)
    if options.json:
        pathlib.Path(options.json).write_text(text + "\n")
    elif not mine:
        print(text)
    if mine:
        print(joined(theirs, mine))


if __name__ == "__main__":
    main()
