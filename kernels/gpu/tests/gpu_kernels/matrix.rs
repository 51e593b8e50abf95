//! The matrix recurrences: every gate with every write, forward and gradients.

use crate::client;
use crate::matrix_check::{Form, KERNELS, Sizes, check};
use half::f16;
use thalweg_gpu::{Buffer, matrix};
use thalweg_kernels::matrix::MatrixProblem;
use thalweg_reference::cases::{GATES, Gates, Precision};

/// All forms: also those whose gates are written out for each key feature first. The gradient of such a gate is a sum over
/// them, whose terms cancel forty-fold: in 8 bits there would be nothing to test.
fn forms() -> impl Iterator<Item = Form> {
    KERNELS.into_iter().chain([(0, 2), (1, 2), (2, 2)])
}

/// Every gate with every write in every regime, at lengths around the chunk, with key and value sizes that are no
/// multiple of a block.
#[test]
fn equals_the_oracle() {
    let Some(client) = client() else { return };
    for (i, gates) in GATES.into_iter().enumerate() {
        for (j, form) in forms().enumerate() {
            let seed = i * forms().count() + j;
            let time = [1, 5, 63, 64, 65, 200][(i + j) % 6];
            let sizes = Sizes { time, heads: 2, value_heads: 2, key_dim: 12, value_dim: 20, cu_seqlens: None };
            check::<f32>(&client, &sizes, form, Precision::F32, gates, seed as u64);
        }
    }
}

/// Gates that leave nothing of the state after one token, and nothing of an f32 after two.
#[test]
fn gates_beyond_the_grid() {
    let Some(client) = client() else { return };
    for (i, gates) in [Gates::Mean(20.0), Gates::Mean(1e4)].into_iter().enumerate() {
        for (j, form) in [(1, 0), (2, 1), (3, 0), (3, 1)].into_iter().enumerate() {
            let sizes = Sizes { time: 200, heads: 2, value_heads: 2, key_dim: 12, value_dim: 20, cu_seqlens: None };
            check::<f32>(&client, &sizes, form, Precision::F32, gates, (i * 4 + j) as u64);
        }
    }
}

/// Several blocks of features, sequences that end anywhere, value heads that share queries and keys.
#[test]
fn grouped_heads_packed_sequences_and_many_blocks() {
    let Some(client) = client() else { return };
    for (i, form) in forms().enumerate() {
        let cu_seqlens = Some(vec![0, 1, 17, 40, 120]);
        let sizes = Sizes { time: 120, heads: 1, value_heads: 3, key_dim: 40, value_dim: 72, cu_seqlens };
        check::<f32>(&client, &sizes, form, Precision::F32, [Gates::Mean(0.05), Gates::Mixed][i / 2 % 2], i as u64);
    }
}

/// One token at a time: all forms, several blocks of features, grouped heads.
#[test]
fn steps() {
    let Some(client) = client() else { return };
    for (i, form) in forms().enumerate() {
        let sizes = Sizes { time: 1, heads: 1, value_heads: 2, key_dim: 40, value_dim: 72, cu_seqlens: None };
        check::<f32>(&client, &sizes, form, Precision::F32, GATES[i % GATES.len()], i as u64);
    }
}

/// Keys that are too many to be in 32 KiB of shared memory all at once.
#[test]
fn wide_keys() {
    let Some(client) = client() else { return };
    let sizes = Sizes { time: 70, heads: 1, value_heads: 1, key_dim: 256, value_dim: 16, cu_seqlens: None };
    check::<f32>(&client, &sizes, (2, 1), Precision::F32, Gates::Mean(0.05), 0);
}

/// And once sizes that are read one element at a time.
#[test]
fn half_precision() {
    let Some(client) = client() else { return };
    for (i, (form, key_dim, value_dim)) in [((2, 0), 32, 16), ((2, 1), 7, 5), ((3, 1), 32, 16)].into_iter().enumerate()
    {
        let sizes = Sizes { time: 70, heads: 2, value_heads: 2, key_dim, value_dim, cu_seqlens: None };
        // Tensors of 8 significant bits are exact in f16; so are the tolerances meant.
        check::<f16>(&client, &sizes, form, Precision::Bf16, Gates::Mean(0.05), i as u64);
    }
}

/// A sequence gives the same bits alone, in a batch and packed; so do its gradients.
#[test]
fn bits_do_not_depend_on_the_batch() {
    let Some(client) = client() else { return };
    let (time, heads, k, v) = (70, 2, 12, 20);
    let random = |n: usize, seed: f32| (0..n).map(|i| (i as f32 * 0.7311 + seed).sin()).collect::<Vec<f32>>();
    let run = |batch: usize, cu_seqlens: Option<Vec<usize>>, from: usize, count: usize| {
        let tokens = |width: usize, seed: f32| {
            random(3 * time * width, seed)[from * time * width..][..count * time * width].to_vec()
        };
        let up = |x: Vec<f32>| Buffer::from_slice(&client, &x);
        let (q, kk, vv) = (up(tokens(heads * k, 1.0)), up(tokens(heads * k, 2.0)), up(tokens(heads * v, 3.0)));
        let g = up(tokens(heads, 4.0).iter().map(|x| -x.abs()).collect());
        let beta = up(tokens(heads, 5.0).iter().map(|x| x.abs()).collect());
        let total = if cu_seqlens.is_some() { count * time } else { time };
        let p = MatrixProblem { cu_seqlens, ..MatrixProblem::new(batch, total, heads, k, v) };
        let (gate, write) = (matrix::Gate::Head(&g), matrix::Write::Delta { beta: &beta });
        let inputs = matrix::Inputs { q: &q, k: &kk, v: &vv, gate, write, initial_state: None };
        let o = matrix::forward(&client, &p, &inputs).unwrap().o;
        let d = matrix::backward(&client, &p, &inputs, Some(&vv), None).unwrap();
        [o, d.dq, d.dk, d.dv, d.dg.unwrap(), d.dbeta.unwrap()].map(|x| x.read::<f32>(&client).unwrap())
    };
    let all = run(3, None, 0, 3);
    let packed = run(1, Some(vec![0, time, 2 * time, 3 * time]), 0, 3);
    for n in 0..3 {
        let alone = run(1, None, n, 1);
        for ((one, all), packed) in alone.iter().zip(&all).zip(&packed) {
            let range = n * one.len()..(n + 1) * one.len();
            assert!(one.iter().zip(&all[range.clone()]).all(|(x, y)| x.to_bits() == y.to_bits()));
            assert!(one.iter().zip(&packed[range]).all(|(x, y)| x.to_bits() == y.to_bits()));
        }
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let Some(client) = client() else { return };
    let p = MatrixProblem::new(1, 4, 2, 8, 8);
    let x = Buffer::from_slice(&client, &[0.0f32; 64]);
    let short = Buffer::from_slice(&client, &[0.0f32; 63]);
    let half = Buffer::from_slice(&client, &[f16::ZERO; 64]);
    let (gate, write) = (matrix::Gate::None, matrix::Write::Additive);
    let good = matrix::Inputs { q: &x, k: &x, v: &x, gate, write, initial_state: None };
    let message = |x: &matrix::Inputs| matrix::forward(&client, &p, x).unwrap_err().to_string();
    assert_eq!(message(&matrix::Inputs { k: &short, ..good }), "`k` has shape [63], expected [1, 4, 2, 8]");
    assert_eq!(message(&matrix::Inputs { v: &half, ..good }), "`v` is a F16 tensor, expected f32");
    assert!(message(&matrix::Inputs { gate: matrix::Gate::Head(&x), ..good }).starts_with("`g` has shape [64]"));
}
