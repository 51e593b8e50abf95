//! The matrix-state recurrences on both paths against the oracle, over gates that forget nothing or
//! everything and keys that agree.

#[macro_use]
mod common;

use burn::Tensor;
use burn::tensor::DType;
use common::*;
use thalweg_reference::cases::{BETAS, GATES, KEYS, MatrixCase, Precision};
use thalweg_reference::matrix::{self as oracle, Gate, Inputs, Problem, Write};
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};
use thalweg_scan::{self as scan, MatrixOptions, Path};

const F32: DType = DType::F32;

on_each_device!(both_paths_equal_the_oracle,);

#[derive(Debug, Clone, Copy)]
enum Op {
    Gla,
    GatedDelta,
    Kda,
    Dplr,
}

const OPS: [Op; 4] = [Op::Gla, Op::GatedDelta, Op::Kda, Op::Dplr];

fn check(case: &MatrixCase, op: Op, path: Path, extreme: bool) {
    let p = &case.problem;
    let token = |x: &[f64], heads, features| leaf(x.to_vec(), [p.batch, p.time, heads, features], F32);
    let per_head = |x: &[f64]| leaf::<3>(x.to_vec(), [p.batch, p.time, p.value_heads], F32);
    let (q, k) = (token(&case.q, p.heads, p.key_dim), token(&case.k, p.heads, p.key_dim));
    let v = token(&case.v, p.value_heads, p.value_dim);
    let g_key = token(&case.gate_key, p.value_heads, p.key_dim);
    let (g_head, beta) = (per_head(&case.gate_head), per_head(&case.beta));
    let (a, b) = (token(&case.a, p.heads, p.key_dim), token(&case.b, p.heads, p.key_dim));
    let state: Tensor<4> =
        leaf(case.initial_state.clone(), [p.sequences(), p.value_heads, p.key_dim, p.value_dim], F32);

    let mut options = MatrixOptions::new().with_initial_state(state.clone()).with_scale(p.scale).with_path(path);
    options.cu_seqlens = p.cu_seqlens.clone();
    let (tq, tk, tv) = (q.clone(), k.clone(), v.clone());
    let out = match op {
        Op::Gla => scan::gla(tq, tk, tv, g_key.clone(), options),
        Op::GatedDelta => scan::gated_delta_rule(tq, tk, tv, g_head.clone(), beta.clone(), options),
        Op::Kda => scan::kda(tq, tk, tv, g_key.clone(), beta.clone(), options),
        Op::Dplr => scan::dplr(tq, tk, tv, a.clone(), b.clone(), g_key.clone(), options),
    }
    .expect("valid arguments");
    let d_o = token(&case.d_o, p.value_heads, p.value_dim).detach();
    let d_state: Tensor<4> = leaf(case.d_final_state.clone(), state.dims(), F32).detach();
    let gradients = ((out.o.clone() * d_o).sum() + (out.final_state.clone() * d_state).sum()).backward();

    let gate = match op {
        Op::GatedDelta => Gate::Head(&case.gate_head),
        _ => Gate::Key(&case.gate_key),
    };
    let write = match op {
        Op::Gla => Write::Additive,
        Op::GatedDelta | Op::Kda => Write::Delta { beta: &case.beta },
        Op::Dplr => Write::LowRank { a: &case.a, b: &case.b },
    };
    let inputs = Inputs { q: &case.q, k: &case.k, v: &case.v, gate, write, initial_state: Some(&case.initial_state) };
    let want = oracle::forward(p, &inputs);
    let adjoint = oracle::backward(p, &inputs, &case.d_o, Some(&case.d_final_state));
    let close = |what: &str, quantity, found: Vec<f64>, expected: &[f64]| {
        let (error, allowed) = (relative_error(&found, expected), tolerance(Precision::F32, quantity, extreme));
        assert!(error <= allowed, "{op:?} {path:?} {what}: {error:.2e} above {allowed:.0e}");
    };
    close("o", Quantity::Value, values(&out.o), &want.o);
    close("final_state", Quantity::Value, values(&out.final_state), &want.final_state);
    let four = |what, x: &Tensor<4>, want: &[f64]| close(what, Quantity::Gradient, gradient(x, &gradients), want);
    let three = |what, x: &Tensor<3>, want: &[f64]| close(what, Quantity::Gradient, gradient(x, &gradients), want);
    four("dq", &q, &adjoint.q);
    four("dk", &k, &adjoint.k);
    four("dv", &v, &adjoint.v);
    four("d_initial_state", &state, &adjoint.initial_state);
    match op {
        Op::GatedDelta => three("dg", &g_head, &adjoint.gate),
        _ => four("dg", &g_key, &adjoint.gate),
    }
    match op {
        Op::Gla => {}
        Op::GatedDelta | Op::Kda => three("dbeta", &beta, &adjoint.beta),
        Op::Dplr => {
            four("da", &a, &adjoint.a);
            four("db", &b, &adjoint.b);
        }
    }
}

fn both_paths_equal_the_oracle() {
    let shape = |batch, time, cu_seqlens| Problem {
        batch,
        time,
        heads: 2,
        value_heads: 2,
        key_dim: 8,
        value_dim: 6,
        scale: 8f64.powf(-0.5),
        cu_seqlens,
    };
    let problems = [shape(2, 1, None), shape(1, 65, None), shape(1, 70, Some(vec![0, 3, 67, 70]))];
    for (i, problem) in problems.into_iter().enumerate() {
        for gates in GATES {
            // Keys and step sizes vary together: all pairs appear over the gates and shapes.
            for (j, keys) in KEYS.into_iter().enumerate() {
                let betas = BETAS[(i + j) % BETAS.len()];
                let seed = (100 * i + j) as u64;
                let case = MatrixCase::sample(problem.clone(), seed, Precision::F32, gates, keys, betas);
                for op in OPS {
                    for &path in paths() {
                        check(&case, op, path, gates.extreme());
                    }
                }
            }
        }
    }
}
