//! Gated linear attention on Burn tensors, forward and backward.
//!
//! Run with `cargo run --release -p thalweg-scan --example gla_from_burn`.

use burn::Tensor;
use burn::tensor::activation::log_sigmoid;
use burn::tensor::{Device, Distribution};
use thalweg_scan::{Error, MatrixOptions, Path, gla};

fn main() -> Result<(), Error> {
    let device = Device::default().autodiff();
    let [batch, time, heads, key_dim, value_dim] = [2, 300, 4, 32, 64];
    let normal = Distribution::Normal(0.0, 1.0);
    let q = Tensor::<4>::random([batch, time, heads, key_dim], normal, &device).require_grad();
    let k = Tensor::<4>::random([batch, time, heads, key_dim], normal, &device).require_grad();
    let v = Tensor::<4>::random([batch, time, heads, value_dim], normal, &device).require_grad();
    let x = Tensor::<4>::random([batch, time, heads, key_dim], normal, &device).require_grad();

    let run = |path| {
        // A learned decay between 0 and 1, as its natural logarithm; the temperature is GLA's.
        let g = log_sigmoid(x.clone()).div_scalar(16.0);
        let out = gla(q.clone(), k.clone(), v.clone(), g, MatrixOptions::new().with_path(path))?;
        let loss = out.o.powi_scalar(2).mean() + out.final_state.powi_scalar(2).mean();
        let gradients = loss.backward();
        let dx = x.grad(&gradients).map(|dx| dx.abs().sum().into_scalar::<f32>());
        Ok::<_, Error>((loss.into_scalar::<f32>(), dx.unwrap_or(f32::NAN)))
    };
    let (loss, dx) = run(Path::Auto)?;
    println!("native kernel:     loss {loss:.5}, |d loss / d gate| {dx:.5}");
    let (expected_loss, expected_dx) = run(Path::Portable)?;
    println!("tensor operations: loss {expected_loss:.5}, |d loss / d gate| {expected_dx:.5}");
    assert!((loss - expected_loss).abs() <= 1e-5 * expected_loss.abs());
    assert!((dx - expected_dx).abs() <= 1e-4 * expected_dx.abs());
    Ok(())
}
