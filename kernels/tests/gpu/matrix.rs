//! The matrix recurrences: every gate with every write, forward and gradients.

use crate::client;
use half::f16;
use thalweg_kernels::Element;
use thalweg_kernels::gpu::{Buffer, Client, matrix};
use thalweg_kernels::matrix::MatrixProblem;
use thalweg_reference::cases::{BETAS, GATES, Gates, KEYS, MatrixCase, Precision};
use thalweg_reference::matrix as oracle;
use thalweg_reference::tolerance::{Quantity, relative_error_f32, tolerance};

struct Sizes {
    time: usize,
    heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    cu_seqlens: Option<Vec<usize>>,
}

fn check<E: Element + bytemuck::Pod>(client: &Client, sizes: &Sizes, precision: Precision, gates: Gates, seed: u64) {
    let batch = if sizes.cu_seqlens.is_some() { 1 } else { 2 };
    let keys = KEYS[seed as usize % KEYS.len()];
    let betas = BETAS[(seed as usize / 3) % BETAS.len()];
    let Sizes { time, heads, value_heads, key_dim, value_dim, .. } = *sizes;
    let problem = oracle::Problem {
        batch,
        time,
        heads,
        value_heads,
        key_dim,
        value_dim,
        scale: 0.25,
        cu_seqlens: sizes.cu_seqlens.clone(),
    };
    let case = MatrixCase::sample(problem.clone(), seed, precision, gates, keys, betas);
    let elements =
        |x: &[f64]| Buffer::from_slice(client, &x.iter().map(|&x| E::from_f32(x as f32)).collect::<Vec<E>>());
    let floats = |x: &[f64]| Buffer::from_slice(client, &x.iter().map(|&x| x as f32).collect::<Vec<f32>>());
    let (q, k, v) = (elements(&case.q), elements(&case.k), elements(&case.v));
    let (key, head, constant) = (floats(&case.gate_key), floats(&case.gate_head), floats(&case.gate_constant));
    let (beta, h0) = (floats(&case.beta), floats(&case.initial_state));
    let p = MatrixProblem {
        value_heads,
        scale: 0.25,
        cu_seqlens: sizes.cu_seqlens.clone(),
        ..MatrixProblem::new(batch, time, heads, key_dim, value_dim)
    };
    let mine =
        [matrix::Gate::None, matrix::Gate::Constant(&constant), matrix::Gate::Head(&head), matrix::Gate::Key(&key)];
    let theirs = [
        oracle::Gate::None,
        oracle::Gate::Constant(&case.gate_constant),
        oracle::Gate::Head(&case.gate_head),
        oracle::Gate::Key(&case.gate_key),
    ];
    let writes = [
        (matrix::Write::Additive, oracle::Write::Additive),
        (matrix::Write::Delta { beta: &beta }, oracle::Write::Delta { beta: &case.beta }),
    ];
    for (gate, their_gate) in mine.into_iter().zip(theirs) {
        for (write, their_write) in writes {
            let (g, w) = (format!("{gate:?}"), format!("{write:?}"));
            let name = |x: &str| x.split(['(', ' ']).next().unwrap().to_string();
            let what = format!("{} gate {gates:?}, {} write, {keys:?} {betas:?}, T {time}", name(&g), name(&w));
            let close = |name: &str, found: Vec<f32>, expected: &[f64], quantity: Quantity| {
                let error = relative_error_f32(&found, expected);
                let allowed = tolerance(precision, quantity, gates.extreme());
                assert!(error <= allowed, "{what}: {name} is off by {error:.2e}, allowed {allowed:.0e}");
            };
            let wide = |x: &Buffer| x.read::<E>(client).unwrap().iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
            let narrow = |x: &Buffer| x.read::<f32>(client).unwrap();
            let inputs = matrix::Inputs { q: &q, k: &k, v: &v, gate, write, initial_state: Some(&h0) };
            let reference = oracle::Inputs {
                q: &case.q,
                k: &case.k,
                v: &case.v,
                gate: their_gate,
                write: their_write,
                initial_state: Some(&case.initial_state),
            };
            let want = oracle::forward(&problem, &reference);
            let got = matrix::forward(client, &p, &inputs).unwrap();
            close("final_state", narrow(&got.final_state), &want.final_state, Quantity::Value);
            close("o", wide(&got.o), &want.o, Quantity::Value);
        }
    }
}

/// Every gate regime at lengths around the chunk, with key and value sizes that are no multiple of a block.
#[test]
fn equals_the_oracle() {
    let Some(client) = client() else { return };
    for (i, time) in [1, 5, 63, 64, 65, 200].into_iter().enumerate() {
        for (j, gates) in GATES.into_iter().enumerate() {
            let sizes = Sizes { time, heads: 2, value_heads: 2, key_dim: 12, value_dim: 20, cu_seqlens: None };
            check::<f32>(&client, &sizes, Precision::F32, gates, (i * GATES.len() + j) as u64);
        }
    }
}
