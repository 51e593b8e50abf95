//! The tables of `docs/src/gpu-design.md`: launches of the GPU operations and the least time they can take.
//!
//! `cargo run --release -p thalweg-kernels --example gpu_roofline -- TFLOP/S TB/S`

use thalweg_kernels::ScanProblem;
use thalweg_kernels::cost::Pass;
use thalweg_kernels::cost::gpu::{self, Pipeline};
use thalweg_kernels::matrix::{GateKind, MatrixProblem, WriteKind};

/// What the device can do at the most, in GFLOP/s and GB/s.
#[derive(Clone, Copy)]
struct Device {
    gflops: f64,
    gbytes: f64,
}

const HEADS: usize = 16;
const DIM: usize = 128;
/// bf16.
const ELEMENT: usize = 2;

/// An operation's pipeline by batch, time and pass.
type Of = fn(usize, usize, Pass) -> Pipeline;

fn matrix(batch: usize, time: usize, gate: GateKind, write: WriteKind, pass: Pass) -> Pipeline {
    let time = if pass == Pass::Step { 1 } else { time };
    gpu::matrix(&MatrixProblem::new(batch, time, HEADS, DIM, DIM), gate, write, ELEMENT, pass)
}

const OPERATIONS: [(&str, Of); 7] = [
    ("decay, gate per key feature (GLA)", |b, t, pass| matrix(b, t, GateKind::KEY, WriteKind::Additive, pass)),
    ("decay, gate per head (Mamba-2)", |b, t, pass| matrix(b, t, GateKind::HEAD, WriteKind::Additive, pass)),
    ("delta, gate per head (Gated DeltaNet)", |b, t, pass| matrix(b, t, GateKind::HEAD, WriteKind::DELTA, pass)),
    ("delta, gate per key feature (KDA)", |b, t, pass| matrix(b, t, GateKind::KEY, WriteKind::DELTA, pass)),
    ("low rank, gate per key feature (RWKV-7)", |b, t, pass| matrix(b, t, GateKind::KEY, WriteKind::LOW_RANK, pass)),
    ("element-wise scan (HGRN)", |b, t, pass| gpu::scan(&ScanProblem::new(b, t, HEADS * DIM), true, ELEMENT, pass)),
    ("RG-LRU", |b, t, pass| gpu::rg_lru(&ScanProblem::new(b, t, HEADS * DIM), ELEMENT, pass)),
];

fn launches(device: Device) {
    let time = 8192;
    println!("### Launch by launch, batch 1, {time} tokens\n");
    println!("| operation | launch | GFLOP | MB | FLOP/byte | µs | bound by |");
    println!("|---|---|---:|---:|---:|---:|---|");
    for (name, of) in OPERATIONS {
        for (pass, what) in [(Pass::Forward, "forward"), (Pass::Backward, "backward")] {
            for launch in of(1, time, pass).launches {
                let (cost, stage) = (launch.cost, launch.name);
                let floor = cost.floor(device.gflops, device.gbytes);
                let bytes_bind = cost.bytes as f64 / device.gbytes >= cost.flops as f64 / device.gflops;
                println!(
                    "| {name}, {what} | `{stage}` | {:.2} | {:.1} | {:.0} | {:.1} | {} |",
                    cost.flops as f64 / 1e9,
                    cost.bytes as f64 / 1e6,
                    cost.intensity(),
                    floor * 1e6,
                    if bytes_bind { "memory" } else { "products" }
                );
            }
        }
    }
}

fn totals(device: Device) {
    println!("\n### Whole passes\n");
    println!(
        "| operation | batch | tokens | forward ms | forward + backward ms | tensors GB | scratch, forward GB | scratch, backward GB |"
    );
    println!("|---|---:|---:|---:|---:|---:|---:|---:|");
    let shapes =
        [(8, 2048), (8, 4096), (8, 8192), (8, 16384), (8, 32768), (8, 65536), (1, 8192), (1, 32768), (1, 65536)];
    for (name, of) in OPERATIONS {
        for (batch, time) in shapes {
            let [forward, backward] = [Pass::Forward, Pass::Backward].map(|pass| of(batch, time, pass));
            let [there, back] = [&forward, &backward].map(|p| p.floor(device.gflops, device.gbytes) * 1e3);
            println!(
                "| {name} | {batch} | {time} | {there:.3} | {:.3} | {:.2} | {:.2} | {:.2} |",
                there + back,
                backward.tensors as f64 / 1e9,
                forward.scratch as f64 / 1e9,
                backward.scratch as f64 / 1e9,
            );
        }
    }
}

fn steps(device: Device) {
    println!("\n### One step\n");
    println!("| operation | batch | state MB | MB moved | µs |");
    println!("|---|---:|---:|---:|---:|");
    for (name, of) in OPERATIONS {
        for batch in [1, 8, 64, 256] {
            let pipeline = of(batch, 1, Pass::Step);
            let state = if name.contains("gate") { DIM } else { 1 } * batch * HEADS * DIM * 4;
            println!(
                "| {name} | {batch} | {:.2} | {:.2} | {:.2} |",
                state as f64 / 1e6,
                pipeline.tensors as f64 / 1e6,
                pipeline.floor(device.gflops, device.gbytes) * 1e6
            );
        }
    }
}

fn main() {
    let mut numbers = std::env::args().skip(1).map(|x| x.parse::<f64>());
    let (Some(Ok(tflops)), Some(Ok(tbytes))) = (numbers.next(), numbers.next()) else {
        eprintln!("usage: gpu_roofline TFLOP/S TB/S");
        std::process::exit(2);
    };
    println!("A device of {tflops} TFLOP/s in bf16 products and {tbytes:.1} TB/s; {HEADS} heads of {DIM}, bf16.\n");
    let device = Device { gflops: tflops * 1e3, gbytes: tbytes * 1e3 };
    launches(device);
    totals(device);
    steps(device);
}
