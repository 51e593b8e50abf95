//! The kernels on plain slices, without Burn: the element-wise scan, forward and backward, with its speed.
//!
//! `cargo run --release -p thalweg-kernels --example direct`

use std::time::Instant;
use thalweg_kernels::{
    Error, ScanProblem,
    elementwise_scan::{self, ScanGate, ScanGradients, ScanInputs, ScanOutputs},
};

fn main() -> Result<(), Error> {
    let (batch, time, channels) = (4, 4096, 1024);
    let n = batch * time * channels;
    // Log-decays in [-1, 0), inputs in [-1, 1).
    let noise = |i: usize| (i.wrapping_mul(2_654_435_761) % 8192) as f32 / 8192.0;
    let g: Vec<f32> = (0..n).map(|i| noise(i) - 1.0).collect();
    let x: Vec<f32> = (0..n).map(|i| 2.0 * noise(i + 7) - 1.0).collect();
    let problem = ScanProblem::new(batch, time, channels);
    for (name, gate) in [("h = exp(g) h + x", ScanGate::Log(&g[..])), ("h = a h + x", ScanGate::Linear(&g[..]))] {
        let inputs = ScanInputs { gate, x: &x, initial_state: None };
        let (mut out, mut gradients) = (ScanOutputs::default(), ScanGradients::default());
        let (mut forward, mut backward) = (f64::INFINITY, f64::INFINITY);
        // The first round allocates the outputs, the later ones reuse them.
        for _ in 0..8 {
            let start = Instant::now();
            out = elementwise_scan::forward_into(&problem, &inputs, out)?;
            forward = forward.min(start.elapsed().as_secs_f64());
            let start = Instant::now();
            gradients = elementwise_scan::backward_into(&problem, &inputs, &out.o, &x, None, gradients)?;
            backward = backward.min(start.elapsed().as_secs_f64());
        }
        println!(
            "{name}: o[0, {}, 0] = {:.5}, dg[0, 1, 0] = {:.5}",
            time - 1,
            out.o[(time - 1) * channels],
            gradients.dgate[channels]
        );
        for (pass, seconds, bytes) in [("forward", forward, 12), ("backward", backward, 20)] {
            let rate = (n * bytes) as f64 / seconds / 1e9;
            println!("  {pass:8} [{batch}, {time}, {channels}] f32: {:.2} ms, {rate:.1} GB/s", seconds * 1e3);
        }
    }
    Ok(())
}
