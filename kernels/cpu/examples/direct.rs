//! The kernels on plain slices, without Burn: gated linear attention and the element-wise scan, forward and backward,
//! with their speed.
//!
//! `cargo run --release -p thalweg-kernels --example direct`

use std::time::Instant;
use thalweg_kernels::{
    Error, ScanProblem,
    elementwise_scan::{self, ScanGate, ScanGradients, ScanInputs, ScanOutputs},
    matrix::{self, Gate, KeepStates, MatrixInputs, MatrixProblem, Write},
};

/// Reproducible numbers in `[low, high)`.
fn noise(n: usize, low: f32, high: f32) -> Vec<f32> {
    (0..n).map(|i| low + (high - low) * ((i.wrapping_mul(2_654_435_761) >> 3) & 8191) as f32 / 8192.0).collect()
}

/// Runs `f` a few times; returns its last result and prints the shortest time.
fn timed<T>(what: &str, mut f: impl FnMut() -> Result<T, Error>) -> Result<T, Error> {
    let mut shortest = f64::INFINITY;
    for _ in 0..4 {
        let start = Instant::now();
        f()?;
        shortest = shortest.min(start.elapsed().as_secs_f64());
    }
    println!("  {what}: {:.2} ms", shortest * 1e3);
    f()
}

/// `S_t = Diag(exp g_t) S_{t-1} + k_t v_t^T`, `o_t = scale * q_t^T S_t`.
fn gated_linear_attention() -> Result<(), Error> {
    let (time, heads, dim) = (2048, 4, 128);
    let problem = MatrixProblem::new(1, time, heads, dim, dim);
    let n = time * heads * dim;
    let (q, k, v, g) = (noise(n, -1.0, 1.0), noise(n + 1, -1.0, 1.0), noise(n + 2, -1.0, 1.0), noise(n, -0.1, 0.0));
    let inputs = MatrixInputs {
        q: &q,
        k: &k[1..],
        v: &v[2..],
        gate: Gate::Key(&g),
        write: Write::Additive,
        initial_state: None,
    };
    println!("gated linear attention [1, {time}, {heads}, {dim}] f32");
    let out = timed("forward", || matrix::forward(&problem, &inputs, KeepStates::Yes))?;
    let states = out.chunk_states.as_deref();
    let gradients = timed("backward", || matrix::backward(&problem, &inputs, &q, None, states))?;
    println!("  o[0, 0, 0, 0] = {:.5}, dv[0, 0, 0, 0] = {:.5}", out.o[0], gradients.dv[0]);
    Ok(())
}

/// `h_t = exp(g_t) h_{t-1} + x_t`; old outputs are handed in again, so that only the first run pays for fresh memory.
fn scan() -> Result<(), Error> {
    let problem = ScanProblem::new(4, 4096, 1024);
    let n = problem.batch * problem.time * problem.channels;
    let (g, x) = (noise(n, -1.0, 0.0), noise(n, -1.0, 1.0));
    let inputs = ScanInputs { gate: ScanGate::Log(&g), x: &x, initial_state: None };
    println!("element-wise scan [{}, {}, {}] f32", problem.batch, problem.time, problem.channels);
    let (mut out, mut gradients) = (ScanOutputs::default(), ScanGradients::default());
    timed("forward", || {
        out = elementwise_scan::forward_into(&problem, &inputs, std::mem::take(&mut out))?;
        Ok(())
    })?;
    timed("backward", || {
        let reuse = std::mem::take(&mut gradients);
        gradients = elementwise_scan::backward_into(&problem, &inputs, &out.o, &x, None, reuse)?;
        Ok(())
    })?;
    println!("  o[0, 1, 0] = {:.5}, dg[0, 1, 0] = {:.5}", out.o[problem.channels], gradients.dgate[problem.channels]);
    Ok(())
}

fn main() -> Result<(), Error> {
    gated_linear_attention()?;
    scan()
}
