//! What is infinite or NaN reaches only what depends on it: on both paths, outputs and gradients are finite where those of the
//! token-by-token oracle are, and equal to them there; elsewhere they are not finite.

#[macro_use]
mod common;

use burn::Tensor;
use burn::tensor::DType;
use common::*;
use thalweg_reference::attention as attention_oracle;
use thalweg_reference::cases::{BETAS, Gates as Regime, KEYS, MatrixCase, Precision};
use thalweg_reference::matrix::{self as oracle, Gate, Inputs, Problem, Write};
use thalweg_scan::{self as scan, AttentionOptions, MatrixOptions, Path};

const F32: DType = DType::F32;

on_each_device!(softmax_attention,);

/// One element becomes infinite or NaN.
fn spoil(random: &mut Random, x: &mut [f64]) {
    let at = random.uniform(0.0, x.len() as f64) as usize;
    x[at] = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN][random.uniform(0.0, 3.0) as usize];
}

#[track_caller]
fn same(what: &str, found: &[f64], want: &[f64]) {
    assert_eq!(found.len(), want.len(), "{what}");
    let size = want.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (x, w)) in found.iter().zip(want).enumerate() {
        assert_eq!(x.is_finite(), w.is_finite(), "{what}[{i}]: {x}, token by token {w}");
        assert!(!w.is_finite() || (x - w).abs() < 3e-4 * size, "{what}[{i}]: {x}, token by token {w}");
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Linear,
    Gla,
    GatedDelta,
    Kda,
    Dplr,
}

fn matrix_case(seed: u64, spoilt: usize, op: Op, path: Path) {
    let p = Problem {
        batch: 1,
        time: 45,
        heads: 2,
        value_heads: 2,
        key_dim: 6,
        value_dim: 5,
        scale: 0.4,
        cu_seqlens: seed.is_multiple_of(2).then(|| vec![0, 5, 45]),
    };
    let (keys, betas) = (KEYS[seed as usize % KEYS.len()], BETAS[seed as usize % BETAS.len()]);
    let mut case = MatrixCase::sample(p.clone(), seed, Precision::F32, Regime::Mean(0.05), keys, betas);
    let mut random = Random::new(seed);
    let MatrixCase { q, k, v, a, b, d_o, d_final_state, .. } = &mut case;
    spoil(&mut random, [q, k, v, d_o, d_final_state, a, b][spoilt]);

    let token = |x: &[f64], features| leaf::<4>(x.to_vec(), [p.batch, p.time, p.heads, features], F32);
    let per_head = |x: &[f64]| leaf::<3>(x.to_vec(), [p.batch, p.time, p.heads], F32);
    let (q, k, v) = (token(&case.q, p.key_dim), token(&case.k, p.key_dim), token(&case.v, p.value_dim));
    let (a, b, g_key) = (token(&case.a, p.key_dim), token(&case.b, p.key_dim), token(&case.gate_key, p.key_dim));
    let (g_head, beta) = (per_head(&case.gate_head), per_head(&case.beta));
    let state: Tensor<4> = leaf(case.initial_state.clone(), [p.sequences(), p.heads, p.key_dim, p.value_dim], F32);
    let mut options = MatrixOptions::new().with_initial_state(state.clone()).with_scale(p.scale).with_path(path);
    options.cu_seqlens = p.cu_seqlens.clone();
    let (tq, tk, tv) = (q.clone(), k.clone(), v.clone());
    let out = match op {
        Op::Linear => scan::linear_attention(tq, tk, tv, options),
        Op::Gla => scan::gla(tq, tk, tv, g_key.clone(), options),
        Op::GatedDelta => scan::gated_delta_rule(tq, tk, tv, g_head.clone(), beta.clone(), options),
        Op::Kda => scan::kda(tq, tk, tv, g_key.clone(), beta.clone(), options),
        Op::Dplr => scan::dplr(tq, tk, tv, a.clone(), b.clone(), g_key.clone(), options),
    }
    .expect("valid arguments");
    let d_o = token(&case.d_o, p.value_dim).detach();
    let d_state: Tensor<4> = leaf(case.d_final_state.clone(), state.dims(), F32).detach();
    let grads = ((out.o.clone() * d_o).sum() + (out.final_state.clone() * d_state).sum()).backward();

    let inputs = Inputs {
        q: &case.q,
        k: &case.k,
        v: &case.v,
        gate: match op {
            Op::Linear => Gate::None,
            Op::GatedDelta => Gate::Head(&case.gate_head),
            _ => Gate::Key(&case.gate_key),
        },
        write: match op {
            Op::Linear | Op::Gla => Write::Additive,
            Op::Dplr => Write::LowRank { a: &case.a, b: &case.b },
            _ => Write::Delta { beta: &case.beta },
        },
        initial_state: Some(&case.initial_state),
    };
    let name = ["q", "k", "v", "d_o", "d_final_state", "a", "b"][spoilt];
    let what = |tensor: &str| format!("{op:?} {path:?}, {name} spoilt, seed {seed}: {tensor}");
    let want = oracle::forward(&p, &inputs);
    same(&what("o"), &values(&out.o), &want.o);
    same(&what("final_state"), &values(&out.final_state), &want.final_state);
    let want = oracle::backward(&p, &inputs, &case.d_o, Some(&case.d_final_state));
    same(&what("dq"), &gradient(&q, &grads), &want.q);
    same(&what("dk"), &gradient(&k, &grads), &want.k);
    same(&what("dv"), &gradient(&v, &grads), &want.v);
    same(&what("d_initial_state"), &gradient(&state, &grads), &want.initial_state);
    match op {
        Op::Linear => {}
        Op::GatedDelta => same(&what("dg"), &gradient(&g_head, &grads), &want.gate),
        _ => same(&what("dg"), &gradient(&g_key, &grads), &want.gate),
    }
    if op == Op::Dplr {
        same(&what("da"), &gradient(&a, &grads), &want.a);
        same(&what("db"), &gradient(&b, &grads), &want.b);
    }
    if op == Op::Kda || op == Op::GatedDelta {
        same(&what("dbeta"), &gradient(&beta, &grads), &want.beta);
    }
}

#[test]
fn matrix_recurrences() {
    for op in [Op::Linear, Op::Gla, Op::GatedDelta, Op::Kda, Op::Dplr] {
        for spoilt in 0..if op == Op::Dplr { 7 } else { 5 } {
            for path in [Path::Auto, Path::Portable] {
                (0..3).for_each(|seed| matrix_case(7 * seed + spoilt as u64, spoilt, op, path));
            }
        }
    }
}

fn attention_case(seed: u64, spoilt: usize, time: usize, window: Option<usize>, packed: bool, path: Path) {
    let p = attention_oracle::Problem {
        batch: 1,
        time,
        heads: 2,
        kv_heads: 1,
        key_dim: 8,
        value_dim: 5,
        scale: 0.35,
        window,
        cu_seqlens: packed.then(|| vec![0, 3, time / 2, time]),
    };
    let mut random = Random::new(seed);
    let mut tensors = [(p.heads, 8), (1, 8), (1, 5), (p.heads, 5)].map(|(heads, d)| {
        (0..time * heads * d).map(|_| f64::from(random.uniform(-1.0, 1.0) as f32)).collect::<Vec<_>>()
    });
    (0..1 + seed % 2).for_each(|_| spoil(&mut random, &mut tensors[spoilt]));
    let [q, k, v, d_o] = &tensors;
    let token = |x: &[f64], heads, d| leaf::<4>(x.to_vec(), [1, time, heads, d], F32);
    let (tq, tk, tv) = (token(q, 2, 8), token(k, 1, 8), token(v, 1, 5));
    let options = AttentionOptions { scale: Some(p.scale), window, cu_seqlens: p.cu_seqlens.clone(), path };
    let o = scan::attention(tq.clone(), tk.clone(), tv.clone(), options).expect("valid arguments");
    let grads = (o.clone() * token(d_o, 2, 5).detach()).sum().backward();
    let name = ["q", "k", "v", "d_o"][spoilt];
    let what =
        |x: &str| format!("{path:?}, {name} spoilt, seed {seed}, T {time}, window {window:?}, packed {packed}: {x}");
    same(&what("o"), &values(&o), &attention_oracle::forward(&p, q, k, v));
    let want = attention_oracle::backward(&p, q, k, v, d_o);
    same(&what("dq"), &gradient(&tq, &grads), &want.q);
    same(&what("dk"), &gradient(&tk, &grads), &want.k);
    same(&what("dv"), &gradient(&tv, &grads), &want.v);
}

fn softmax_attention() {
    for &path in paths() {
        for spoilt in 0..4 {
            for (seed, window) in [None, Some(1), Some(3), Some(20), Some(60)].into_iter().enumerate() {
                attention_case(seed as u64, spoilt, 70, window, false, path);
                attention_case(seed as u64 + 9, spoilt, 70, window, true, path);
            }
        }
        if !is_gpu() {
            for window in [None, Some(260), Some(300), Some(70)] {
                attention_case(3, 2, 530, window, false, path);
                attention_case(4, 3, 530, window, false, path);
            }
        }
    }
}

/// A score below any finite stand-in for minus infinity.
#[test]
fn scores_have_no_lowest() {
    for path in [Path::Auto, Path::Portable] {
        let [q, k, v] = [[-2e30, -2e30], [1.0, 2.0], [3.0, 5.0]].map(|x| leaf::<4>(x.to_vec(), [1, 2, 1, 1], F32));
        let options = AttentionOptions { scale: Some(1.0), path, ..AttentionOptions::default() };
        let o = scan::attention(q, k, v, options).expect("valid arguments");
        assert_eq!(values(&o), [3.0, 3.0], "{path:?}");
    }
}
