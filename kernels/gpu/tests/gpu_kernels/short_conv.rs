//! The short convolution against the oracle.

use crate::client;
use crate::scan::{Number, close, close_as, has, shape_of, symmetric, tensor};
use half::f16;
use thalweg_gpu::short_conv::{self, Inputs};
use thalweg_gpu::{Buffer, Client};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::short_conv::{Activation, ConvProblem};
use thalweg_reference::random::Random;
use thalweg_reference::short_conv as oracle;
use thalweg_reference::tolerance::Quantity;

/// `whole`: with bias, a state and a gradient of the new one.
fn check<E: Number>(client: &Client, problem: &ConvProblem, whole: bool) {
    let shape = shape_of(&problem.shape);
    let (tokens, count) = (problem.shape.batch * problem.shape.time, shape.sequences().len());
    let (d, w) = (problem.shape.channels, problem.width);
    let mut random = Random::new((tokens + d + w) as u64);
    let mut sample = |len: usize| symmetric(&mut random, len, 2.0);
    let (x, x64) = tensor::<E>(client, sample(tokens * d));
    let (dy, dy64) = tensor::<E>(client, sample(tokens * d));
    let (weight, weight64) = tensor::<f32>(client, sample(d * w));
    let (bias, bias64) = tensor::<f32>(client, sample(d));
    let (state, state64) = tensor::<f32>(client, sample(count * d * (w - 1)));
    let (ds, ds64) = tensor::<f32>(client, sample(count * d * (w - 1)));
    let (bias, state, ds) = (whole.then_some(&bias), whole.then_some(&state), whole.then_some(&ds));
    let inputs = Inputs { x: &x, weight: &weight, bias, state };
    let out = short_conv::forward(client, problem, &inputs).unwrap();
    let found = short_conv::backward(client, problem, &inputs, &dy, ds).unwrap();

    let silu = problem.activation == Activation::Silu;
    let (bias, state) = (whole.then_some(&bias64[..]), whole.then_some(&state64[..]));
    let inputs = oracle::Inputs { x: &x64, weight: &weight64, bias, silu, state };
    let (y, new_state) = oracle::forward(&shape, &inputs);
    let want = oracle::backward(&shape, &inputs, &dy64, whole.then_some(&ds64[..]));
    let name = |tensor: &str| format!("{problem:?} {tensor}");
    close::<E>(client, &name("y"), &out.y, &y, Quantity::Value);
    close_as::<f32, E>(client, &name("state"), &out.state, &new_state, Quantity::Value);
    close::<E>(client, &name("dx"), &found.dx, &want.x, Quantity::Gradient);
    close::<f32>(client, &name("dweight"), &found.dweight, &want.weight, Quantity::Gradient);
    close::<f32>(client, &name("dbias"), &found.dbias, &want.bias, Quantity::Gradient);
    close::<f32>(client, &name("dstate"), &found.dstate, &want.state, Quantity::Gradient);
}

/// Lengths shorter than the state, and around a segment; packed sequences of one token and of many.
#[test]
fn equals_the_oracle() {
    let Some(client) = client() else { return };
    let silu = |shape, width| ConvProblem { shape, width, activation: Activation::Silu };
    for time in [1, 2, 5, 31, 32, 33, 200] {
        check::<f32>(&client, &silu(ScanProblem::new(2, time, 12), 4), true);
    }
    check::<f32>(&client, &silu(ScanProblem::packed(12, vec![0, 1, 3, 70, 71, 200]), 4), true);
    check::<f32>(&client, &silu(ScanProblem::new(1, 40, 3), 8), true);
    let plain = ConvProblem { activation: Activation::None, ..silu(ScanProblem::new(2, 65, 70), 2) };
    check::<f32>(&client, &plain, false);
}

#[test]
fn half_precision() {
    let Some(client) = client() else { return };
    if has::<f16>(&client) {
        let shape = ScanProblem::new(2, 70, 24);
        check::<f16>(&client, &ConvProblem { shape, width: 4, activation: Activation::Silu }, true);
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let Some(client) = client() else { return };
    let [x, weight] = [4, 6].map(|len| Buffer::from_slice(&client, &vec![0.0f32; len]));
    let problem = |width| ConvProblem { shape: ScanProblem::new(1, 2, 2), width, activation: Activation::None };
    let inputs = Inputs { x: &x, weight: &weight, bias: None, state: None };
    let message =
        |width, inputs: &Inputs| short_conv::forward(&client, &problem(width), inputs).unwrap_err().to_string();
    assert!(message(9, &inputs).starts_with("`width`"));
    assert!(message(4, &inputs).starts_with("`weight`"));
    assert!(message(3, &Inputs { state: Some(&weight), ..inputs }).starts_with("`state`"));
}
