#!/usr/bin/env python3
"""thalweg beside other libraries: the same computations at the same shapes, by turns, in one session.

usage: side_by_side.py [--only SUBSTRING] [--threads 2,1] [--rounds 5] [--avx2] [--json FILE] [--markdown FILE]

Build first: `cargo build --release`. Ours runs in a child process (`thalweg bench serve`), which compares its results with
the f64 oracle before it times anything; theirs runs here. A round times one after the other; figures are medians over
the samples of all rounds. Prints a markdown table. Run it on a machine that does nothing else.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# What keeps each side from AVX-512.
AVX2 = {"THALWEG_SIMD": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"}

F, FB, STEP = "forward", "forward+backward", "step"

# Label, our benchmark, sizes, our paths (the first is compared), dtypes besides f32, their name and builder, ratios to reach.
ROWS = [
    ("scan", "ops/scan", [4, 4096, 1024], ["native", "burn"], ["bf16"], "torch.compile(associative_scan)",
     "associative_scan", {F: 2.5, FB: 3}),
    ("GLA", "ops/gla", [1, 2048, 4, 128, 128], ["native", "burn"], ["bf16"], "torch, chunks of 64 (mild gates only)",
     "gla", {F: 2.5, FB: 2.5}),
    ("gated delta rule", "ops/gated_delta_rule", [1, 2048, 4, 128, 128], ["native", "burn"], ["bf16"],
     "transformers torch_chunk_gated_delta_rule", "gated_delta_rule", {F: 3, FB: 5}),
    ("RG-LRU with gates", "ops/rg_lru_block", [1, 2048, 2560, 10], ["burn"], [], "transformers RecurrentGemmaRglru",
     "rg_lru", {F: 3, FB: 50}),
    ("attention", "ops/attention", [1, 2048, 4, 128], ["native", "burn"], ["bf16"], "torch SDPA", "attention",
     {F: 1, FB: 1}),
    ("attention", "ops/attention", [1, 8192, 4, 128], ["native"], [], "torch SDPA", "attention", {F: 1, FB: 1}),
    ("gated delta decode", "ops/gated_delta_rule", [1, 1, 4, 128, 128], ["native", "burn"], [],
     "transformers torch_recurrent_gated_delta_rule", "gated_delta_step", {STEP: 4}),
    ("gated delta decode", "ops/gated_delta_rule", [8, 1, 4, 128, 128], ["native", "burn"], [],
     "transformers torch_recurrent_gated_delta_rule", "gated_delta_step", {STEP: 4}),
    ("10 M hybrid, training step", "models/gated_delta_net-3:1", [4, 512], ["burn"], [], "transformers Qwen3-Next",
     "qwen3_next", {FB: 2}),
    ("10 M hybrid, greedy decoding", "models/gated_delta_net-3:1", [1, 16], ["burn"], [], "transformers Qwen3-Next",
     "qwen3_next", {STEP: 5}),
]

# A sample is at least this long, and a computation that takes longer than SLOW is timed once.
SHORTEST, SLOW = 1e-3, 4.0


class Ours:
    """The child process."""

    def __init__(self, binary, threads):
        environment = dict(os.environ, RAYON_NUM_THREADS=str(threads))
        self.child = subprocess.Popen(
            [binary, "bench", "serve", "--threads", str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )

    def time(self, case, seconds, samples):
        request = dict(case, seconds=seconds, samples=samples)
        self.child.stdin.write(json.dumps(request) + "\n")
        self.child.stdin.flush()
        line = self.child.stdout.readline()
        if not line:
            raise RuntimeError("thalweg bench serve ended")
        answer = json.loads(line)
        if "error" in answer and "wall_ms" not in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self):
        self.child.stdin.close()
        self.child.wait(timeout=60)


def theirs(run, seconds, samples):
    """Milliseconds per call, by the rule that ours follows: an untimed run, then at least `samples` samples."""
    calls = getattr(run, "calls", 1)
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    if once > SLOW:
        samples = 1
    elif once < 0.2:
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
    repeats = max(1, -int(-SHORTEST // max(once, 1e-9)))
    taken, begin = [], time.perf_counter()
    while len(taken) < samples or (once <= SLOW and time.perf_counter() - begin < seconds):
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        taken.append((time.perf_counter() - start) / repeats / calls * 1e3)
    return taken


def spread(samples):
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [0, 0, 0]
    return quartiles[2] - quartiles[0]


def measure(row, threads, options, ours):
    """All passes of one row: results as dictionaries."""
    import peers

    label, name, shape, paths, dtypes, their_name, builder, goals = row
    part, name = name.split("/")
    goals = {p: goal for p, goal in goals.items() if options.only in f"{label} {name} {p} {shape}"}
    if not goals:
        return
    build = getattr(peers, builder)
    runs = build(*shape) if builder != "qwen3_next" else build(shape[0], max(shape[1], 16))
    for pass_, goal in goals.items():
        chunk = 64 if part == "ops" and len(shape) == 5 and pass_ != STEP else None
        case = {"part": part, "name": name, "pass": pass_, "shape": shape, "chunk": chunk}
        variants = [("f32", path) for path in paths] + [(dtype, paths[0]) for dtype in dtypes]
        mine = {variant: [] for variant in variants}
        rates, peer, failed = {}, [], {}
        rounds, slow = options.rounds, False
        for turn in range(options.rounds):
            if turn >= rounds:
                break
            start = time.perf_counter()
            for dtype, path in variants:
                if (dtype, path) in failed:
                    continue
                try:
                    answer = ours.time(dict(case, dtype=dtype, path=path), options.seconds, 3 if not slow else 2)
                    mine[dtype, path] += answer["wall_ms"]
                    rates[dtype, path] = answer
                except RuntimeError as error:
                    failed[dtype, path] = str(error)
                    print(f"FAILED {label} {pass_} {dtype} {path}: {error}", file=sys.stderr)
            time.sleep(0.05)
            peer += theirs(runs[pass_], options.seconds, 3 if not slow else 2)
            time.sleep(0.05)
            took = time.perf_counter() - start
            slow = took > 4
            # What takes long is steady enough to be seen less often.
            rounds = 1 if took > 30 else 3 if slow else options.rounds
        first = variants[0]
        result = {
            "row": label, "benchmark": f"{part}/{name}", "pass": pass_, "shape": shape, "threads": threads,
            "peer": their_name, "goal": goal, "peer_ms": statistics.median(peer), "peer_min_ms": min(peer),
            "peer_spread_ms": spread(peer), "ours": [],
        }
        for variant in variants:
            if samples := mine[variant]:
                dtype, path = variant
                result["ours"].append({
                    "dtype": dtype, "path": path, "ms": statistics.median(samples), "min_ms": min(samples),
                    "spread_ms": spread(samples), "fraction_of_ceiling": rates[variant]["fraction"],
                    "bound": rates[variant]["bound"], "error": rates[variant]["error"],
                    "ratio": result["peer_ms"] / statistics.median(samples),
                })
        if failed:
            result["failed"] = {" ".join(variant): error for variant, error in failed.items()}
        print(line(result), file=sys.stderr, flush=True)
        yield result


def line(result):
    ours = ", ".join(f"{o['dtype']} {o['path']} {o['ms']:.3f} ms ({o['ratio']:.2f}x)" for o in result["ours"])
    return f"{result['row']} {result['shape']} {result['pass']}, {result['threads']} threads: {ours}; peer {result['peer_ms']:.3f} ms"


def table(report):
    """The markdown table, and what it was measured with."""
    machine = report["machine"]
    lines = [
        f"{machine['cpu']}, {machine['processors']} processors{machine['instructions']}; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; commit {machine['commit']}; load before the start {machine['load']:.1f}. Medians of "
        "samples taken by turns, with the interquartile range; *kernel* is called on slices, *Burn* on tensors.",
        "",
        "| op and shape | pass | threads | ours, kernel (ms) | ours, Burn (ms) | ours, bf16 kernel (ms) | of the ceiling "
        "| peer | peer (ms) | ratio | to reach |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        def cell(dtype, path):
            found = [o for o in r["ours"] if o["dtype"] == dtype and o["path"] == path]
            return f"{found[0]['ms']:.3f} ± {found[0]['spread_ms']:.3f}" if found else ""
        best = r["ours"][0] if r["ours"] else None
        ratio = f"**{best['ratio']:.2f}x**" if best and best["ratio"] >= r["goal"] else f"{best['ratio']:.2f}x" if best else "failed"
        ceiling = f"{100 * best['fraction_of_ceiling']:.0f} % {best['bound']}" if best else ""
        lines.append(
            f"| {r['row']} {r['shape']} | {r['pass']} | {r['threads']} | {cell('f32', 'native')} | {cell('f32', 'burn')} "
            f"| {cell('bf16', 'native')} | {ceiling} | {r['peer']} | {r['peer_ms']:.3f} ± {r['peer_spread_ms']:.3f} "
            f"| {ratio} | {r['goal']}x |"
        )
    return "\n".join(lines) + "\n"


def processor():
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    field = lambda name: next((l.split(":", 1)[1].strip() for l in text.splitlines() if l.split(":")[0].strip() == name), "")
    return f"{field('model name')} (family {field('cpu family')}, model {field('model')})"


def one_thread_count(threads, options):
    """In a process of its own: torch's compiled code is made for a number of threads."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    ours = Ours(options.binary, threads)
    rows = [result for row in ROWS for result in measure(row, threads, options, ours)]
    ours.close()
    return {"torch": torch.__version__, "transformers": transformers.__version__, "rows": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose label, name, pass or shape contains this")
    parser.add_argument("--threads", default="2,1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="of each side in each round")
    parser.add_argument("--binary", default=str(ROOT / "target" / "release" / "thalweg"))
    parser.add_argument("--avx2", action="store_true", help="neither side uses AVX-512")
    parser.add_argument("--json", help="writes all figures to this file")
    parser.add_argument("--markdown", help="writes the table to this file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not Path(options.binary).exists():
        parser.error(f"{options.binary} is missing; `cargo build --release` makes it")
    if options.child:
        part = one_thread_count(int(options.threads), options)
        Path(options.child).write_text(json.dumps(part))
        return
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
    if load > 0.5:
        print(f"the load is {load:.1f}: the figures will not be those of a quiet machine", file=sys.stderr)
    git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    machine = {"cpu": processor(), "processors": os.cpu_count(), "load": load, "commit": git.stdout.strip(),
               "instructions": ", AVX2 instructions alone on both sides" if options.avx2 else "",
               "python": platform.python_version()}
    report = {"machine": machine, "rows": []}
    import tempfile
    for threads in options.threads.split(","):
        with tempfile.TemporaryDirectory() as folder:
            answer = Path(folder) / "rows.json"
            command = [sys.executable, __file__, *sys.argv[1:], "--threads", threads, "--child", str(answer)]
            environment = dict(os.environ, OMP_NUM_THREADS=threads, PYTHONPATH=str(Path(__file__).parent))
            environment |= AVX2 if options.avx2 else {}
            subprocess.run(command, check=True, env=environment)
            part = json.loads(answer.read_text())
        report["rows"] += part.pop("rows")
        machine.update(part)
    # Rows of both thread counts side by side.
    order = {(r["row"], str(r["shape"]), r["pass"]): i for i, r in reversed(list(enumerate(report["rows"])))}
    report["rows"].sort(key=lambda r: order[r["row"], str(r["shape"]), r["pass"]])
    print(table(report))
    if options.markdown:
        Path(options.markdown).write_text(table(report))
    if options.json:
        Path(options.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
