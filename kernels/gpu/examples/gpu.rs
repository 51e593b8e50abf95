//! Calling the GPU kernels directly, without Burn: a gated delta rule on plain buffers.
//!
//! `cargo run --release -p thalweg-gpu --features wgpu --example gpu`

use thalweg_gpu::{Buffer, Client, matrix};
use thalweg_kernels::matrix::{self as cpu, KeepStates, MatrixProblem};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    if cubecl::Device::enumerate_all().is_empty() {
        return Err("no GPU and no driver".into());
    }
    let client = Client::from(cubecl::Device::default().client());
    let (batch, time, heads, key_dim, value_dim) = (1, 200, 2, 32, 32);
    let problem = MatrixProblem::new(batch, time, heads, key_dim, value_dim);
    let random = |n: usize, seed: f32| (0..n).map(|i| (i as f32 * 0.7311 + seed).sin()).collect::<Vec<f32>>();
    let (q, v) = (random(time * heads * key_dim, 1.0), random(time * heads * value_dim, 3.0));
    let mut k = random(time * heads * key_dim, 2.0);
    for key in k.chunks_mut(key_dim) {
        let norm = key.iter().map(|x| x * x).sum::<f32>().sqrt();
        key.iter_mut().for_each(|x| *x /= norm);
    }
    let g: Vec<f32> = random(time * heads, 4.0).iter().map(|x| -0.1 * x.abs()).collect();
    let beta: Vec<f32> = random(time * heads, 5.0).iter().map(|x| x.abs()).collect();

    // Handles of memory that is on the device already go into a `Buffer` as they are.
    let up = |x: &[f32]| Buffer::from_slice(&client, x);
    let (dq, dk, dv, dg, dbeta) = (up(&q), up(&k), up(&v), up(&g), up(&beta));
    let inputs = matrix::Inputs {
        q: &dq,
        k: &dk,
        v: &dv,
        gate: matrix::Gate::Head(&dg),
        write: matrix::Write::Delta { beta: &dbeta },
        initial_state: None,
    };
    let out = matrix::forward(&client, &problem, &inputs)?;
    let gradients = matrix::backward(&client, &problem, &inputs, Some(&dv), None)?;
    let o = out.o.read::<f32>(&client)?;

    // The same on the CPU.
    let write = cpu::Write::Delta { beta: &beta[..] };
    let inputs = cpu::MatrixInputs { q: &q, k: &k, v: &v, gate: cpu::Gate::Head(&g), write, initial_state: None };
    let want = cpu::forward(&problem, &inputs, KeepStates::No)?;
    let want_gradients = cpu::backward(&problem, &inputs, &v, None, None)?;
    let difference = |x: &[f32], y: &[f32]| x.iter().zip(y).fold(0.0f32, |m, (x, y)| m.max((x - y).abs()));
    println!("{}: largest difference from the CPU: o {:.1e}", client.name(), difference(&o, &want.o));
    let dk = gradients.dk.read::<f32>(&client)?;
    println!("dk {:.1e}", difference(&dk, &want_gradients.dk));
    assert!(difference(&o, &want.o) < 1e-4 && difference(&dk, &want_gradients.dk) < 1e-3);
    Ok(())
}
