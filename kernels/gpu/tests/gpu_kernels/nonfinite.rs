//! What is infinite or NaN reaches only what depends on it, and scores have no lowest.

use crate::client;
use half::f16;
use thalweg_gpu::{Buffer, Client, attention, short_conv};
use thalweg_kernels::attention::AttentionProblem;
use thalweg_kernels::short_conv::{Activation, ConvProblem};
use thalweg_kernels::{Element, ScanProblem};
use thalweg_reference::attention as oracle;
use thalweg_reference::cases::Precision;
use thalweg_reference::random::Random;

/// Finite in the same places as token by token, and equal there.
#[track_caller]
fn same<E: Element + bytemuck::Pod>(client: &Client, what: &str, found: &Buffer, want: &[f64], tolerance: f64) {
    let found = found.read::<E>(client).unwrap();
    assert_eq!(found.len(), want.len(), "{what}");
    let size = want.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (x, w)) in found.iter().map(|x| x.to_f32()).zip(want).enumerate() {
        assert_eq!(x.is_finite(), w.is_finite(), "{what}[{i}]: {x}, token by token {w}");
        assert!(!w.is_finite() || (f64::from(x) - w).abs() < tolerance * size, "{what}[{i}]: {x}, token by token {w}");
    }
}

fn attention_case<E: Element + bytemuck::Pod>(client: &Client, p: &AttentionProblem, spoilt: usize, seed: u64) {
    let mut random = Random::new(seed);
    let precision = if size_of::<E>() == 2 { Precision::Bf16 } else { Precision::F32 };
    let tolerance = if size_of::<E>() == 2 { 3e-2 } else { 2e-4 };
    let mut tensors =
        [(p.heads, p.key_dim), (p.kv_heads, p.key_dim), (p.kv_heads, p.value_dim), (p.heads, p.value_dim)]
            .map(|(heads, dim)| precision.round_all(random.normals(p.batch * p.time * heads * dim)));
    let at = random.below(tensors[spoilt].len());
    tensors[spoilt][at] = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN][seed as usize % 3];
    let buffers = tensors
        .each_ref()
        .map(|x| Buffer::from_slice(client, &x.iter().map(|&x| E::from_f32(x as f32)).collect::<Vec<E>>()));
    let inputs = attention::Inputs { q: &buffers[0], k: &buffers[1], v: &buffers[2] };
    let out = attention::forward(client, p, &inputs).unwrap();
    let grads = attention::backward(client, p, &inputs, &out, &buffers[3]).unwrap();
    let theirs = oracle::Problem {
        batch: p.batch,
        time: p.time,
        heads: p.heads,
        kv_heads: p.kv_heads,
        key_dim: p.key_dim,
        value_dim: p.value_dim,
        scale: f64::from(p.scale),
        window: p.window,
        cu_seqlens: p.cu_seqlens.clone(),
    };
    let what = |x: &str| format!("{} spoilt at {at}, {p:?}: {x}", ["q", "k", "v", "d_o"][spoilt]);
    let [q, k, v, d_o] = &tensors;
    same::<E>(client, &what("o"), &out.o, &oracle::forward(&theirs, q, k, v), tolerance);
    let want = oracle::backward(&theirs, q, k, v, d_o);
    same::<E>(client, &what("dq"), &grads.dq, &want.q, tolerance);
    same::<E>(client, &what("dk"), &grads.dk, &want.k, tolerance);
    same::<E>(client, &what("dv"), &grads.dv, &want.v, tolerance);
}

#[test]
fn softmax_attention() {
    let Some(client) = client() else { return };
    for seed in 0..6 {
        for spoilt in 0..4 {
            let whole = AttentionProblem { kv_heads: 1, value_dim: 20, ..AttentionProblem::new(1, 80, 2, 12) };
            attention_case::<f32>(&client, &whole, spoilt, seed);
            let packed = AttentionProblem { cu_seqlens: Some(vec![0, 7, 30, 80]), ..whole.clone() };
            attention_case::<f32>(&client, &packed, spoilt, seed + 10);
            let window = Some([1, 3, 20][seed as usize % 3]);
            attention_case::<f32>(&client, &AttentionProblem { window, ..whole.clone() }, spoilt, seed + 20);
            attention_case::<f32>(&client, &AttentionProblem { window, ..packed }, spoilt, seed + 30);
            attention_case::<f16>(&client, &AttentionProblem { window, ..whole }, spoilt, seed + 40);
        }
    }
}

/// Scores that a finite stand-in for minus infinity would outbid.
#[test]
fn scores_have_no_lowest() {
    let Some(client) = client() else { return };
    let p = AttentionProblem { scale: 1.0, ..AttentionProblem::new(1, 2, 1, 1) };
    let [q, k, v, d_o] =
        [[-2e30f32, -2e30], [1.0, 2.0], [3.0, 5.0], [1.0, 1.0]].map(|x| Buffer::from_slice(&client, &x));
    let inputs = attention::Inputs { q: &q, k: &k, v: &v };
    let out = attention::forward(&client, &p, &inputs).unwrap();
    assert_eq!(out.o.read::<f32>(&client).unwrap(), [3.0, 3.0]);
    let grads = attention::backward(&client, &p, &inputs, &out, &d_o).unwrap();
    assert_eq!(grads.dv.read::<f32>(&client).unwrap(), [2.0, 0.0]);
    assert_eq!(grads.dk.read::<f32>(&client).unwrap(), [0.0, 0.0]);
}

/// At both ends SiLU and its derivative have their limits.
#[test]
fn a_convolution_of_infinite_numbers() {
    let Some(client) = client() else { return };
    let ends = [f32::NEG_INFINITY, -1e20, -1e3, 1e3, 1e20, f32::INFINITY];
    let p = ConvProblem { shape: ScanProblem::new(1, 1, ends.len()), width: 2, activation: Activation::Silu };
    let buffer = |x: &[f32]| Buffer::from_slice(&client, x);
    let (x, weight, ones) = (buffer(&ends), buffer(&[0.0, 1.0].repeat(ends.len())), buffer(&[1.0; 6]));
    let inputs = short_conv::Inputs { x: &x, weight: &weight, bias: None, state: None };
    let y = short_conv::forward(&client, &p, &inputs).unwrap().y.read::<f32>(&client).unwrap();
    assert_eq!(y, [-0.0, -0.0, -0.0, 1e3, 1e20, f32::INFINITY]);
    let dx = short_conv::backward(&client, &p, &inputs, &ones, None).unwrap().dx.read::<f32>(&client).unwrap();
    assert_eq!(dx, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
}
