//! What is infinite or NaN reaches only what depends on it, on the CPU: where the token-by-token oracle is finite so is every
//! output and gradient, and equal to it; where it is not, neither are they.

use thalweg_kernels::ScanProblem;
use thalweg_kernels::attention::{self, AttentionProblem, StepProblem};
use thalweg_kernels::matrix::{self, Gate, KeepStates, MatrixInputs, MatrixProblem, Write};
use thalweg_kernels::short_conv::{self, Activation, ConvInputs, ConvProblem};
use thalweg_reference::cases::{BETAS, Gates, KEYS, MatrixCase, Precision};
use thalweg_reference::{attention as attention_oracle, matrix as oracle};

/// A reproducible sequence of numbers.
struct Noise(u64);

impl Noise {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn numbers(&mut self, n: usize) -> Vec<f64> {
        (0..n).map(|_| (self.below(2001) as f32 / 1000.0 - 1.0) as f64).collect()
    }

    /// One element becomes infinite or NaN.
    fn spoil(&mut self, x: &mut [f64]) {
        let at = self.below(x.len());
        x[at] = [f64::INFINITY, f64::NEG_INFINITY, f64::NAN][self.below(3)];
    }
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

/// Finite in the same places, and equal there.
#[track_caller]
fn same(what: &str, found: &[f32], want: &[f64]) {
    assert_eq!(found.len(), want.len(), "{what}");
    let size = want.iter().filter(|x| x.is_finite()).fold(1.0f64, |m, x| m.max(x.abs()));
    for (i, (&x, &w)) in found.iter().zip(want).enumerate() {
        assert_eq!(x.is_finite(), w.is_finite(), "{what}[{i}]: {x}, token by token {w}");
        assert!(!w.is_finite() || (f64::from(x) - w).abs() < 2e-4 * size, "{what}[{i}]: {x}, token by token {w}");
    }
}

#[test]
fn the_issue() {
    let x = [1.0f32; 4];
    let v = [1.0, 1.0, f32::INFINITY, 1.0];
    let p = MatrixProblem { scale: 1.0, ..MatrixProblem::new(1, 4, 1, 1, 1) };
    for gate in [Gate::None, Gate::Head(&[0.0; 4][..]), Gate::Key(&[0.0; 4][..])] {
        let inputs = MatrixInputs { q: &x, k: &x, v: &v, gate, write: Write::Additive, initial_state: None };
        let o = matrix::forward(&p, &inputs, KeepStates::No).unwrap().o;
        assert_eq!(o, [1.0, 2.0, f32::INFINITY, f32::INFINITY]);
    }
    let p = AttentionProblem { window: Some(1), ..AttentionProblem::new(1, 4, 1, 1) };
    assert_eq!(attention::forward(&p, &x, &x, &v).unwrap().o, v);
}

/// Scores that a finite stand-in for minus infinity would outbid.
#[test]
fn scores_have_no_lowest() {
    let p = AttentionProblem { scale: 1.0, ..AttentionProblem::new(1, 2, 1, 1) };
    let (q, k, v) = ([-2e30f32, -2e30], [1.0, 2.0], [3.0, 5.0]);
    let out = attention::forward(&p, &q, &k, &v).unwrap();
    assert_eq!(out.o, [3.0, 3.0]);
    let grads = attention::backward(&p, &q, &k, &v, &out, &[1.0, 1.0]).unwrap();
    assert_eq!((grads.dv, grads.dk, grads.dq), (vec![2.0, 0.0], vec![0.0; 2], vec![0.0; 2]));
    let step = StepProblem { batch: 1, capacity: 2, heads: 1, kv_heads: 1, key_dim: 1, value_dim: 1, scale: 1.0 };
    assert_eq!(attention::step(&step, &q[1..], &k, &v, &[2]).unwrap(), [3.0]);
}

/// Which tensors of a matrix recurrence get something that is not finite.
const SPOILT: [&str; 7] = ["q", "k", "v", "a", "b", "d_o", "d_final_state"];

fn matrix_case(seed: u64, spoilt: &str) {
    let cu_seqlens = seed.is_multiple_of(3).then(|| vec![0, 5, 40, 90]);
    let problem = oracle::Problem {
        batch: if cu_seqlens.is_some() { 1 } else { 2 },
        time: 90,
        heads: 2,
        value_heads: 2,
        key_dim: 6,
        value_dim: 5,
        scale: 0.4,
        cu_seqlens: cu_seqlens.clone(),
    };
    let (keys, betas) = (KEYS[seed as usize % KEYS.len()], BETAS[seed as usize % BETAS.len()]);
    let gates = if seed.is_multiple_of(2) { Gates::Mean(0.05) } else { Gates::Mixed };
    let mut case = MatrixCase::sample(problem.clone(), seed, Precision::F32, gates, keys, betas);
    let mut noise = Noise(seed);
    for _ in 0..1 + seed % 2 {
        noise.spoil(match spoilt {
            "q" => &mut case.q,
            "k" => &mut case.k,
            "v" => &mut case.v,
            "a" => &mut case.a,
            "b" => &mut case.b,
            "d_o" => &mut case.d_o,
            _ => &mut case.d_final_state,
        });
    }
    let [q, k, v, a, b, d_o, h0, dht] =
        [&case.q, &case.k, &case.v, &case.a, &case.b, &case.d_o, &case.initial_state, &case.d_final_state]
            .map(|x| narrow(x));
    let [constant, head, key, beta] =
        [&case.gate_constant, &case.gate_head, &case.gate_key, &case.beta].map(|x| narrow(x));
    let p = MatrixProblem {
        chunk: [64, 32, 7][seed as usize % 3],
        scale: 0.4,
        cu_seqlens,
        ..MatrixProblem::new(problem.batch, 90, 2, 6, 5)
    };
    let gates = [
        (Gate::None, oracle::Gate::None),
        (Gate::Constant(&constant[..]), oracle::Gate::Constant(&case.gate_constant)),
        (Gate::Head(&head[..]), oracle::Gate::Head(&case.gate_head)),
        (Gate::Key(&key[..]), oracle::Gate::Key(&case.gate_key)),
    ];
    let writes = [
        (Write::Additive, oracle::Write::Additive),
        (Write::Delta { beta: &beta[..] }, oracle::Write::Delta { beta: &case.beta }),
        (Write::LowRank { a: &a[..], b: &b[..] }, oracle::Write::LowRank { a: &case.a, b: &case.b }),
    ];
    for (g, (gate, their_gate)) in gates.into_iter().enumerate() {
        for (w, (write, their_write)) in writes.into_iter().enumerate() {
            let what = |name: &str| format!("{spoilt} spoilt, seed {seed}, gate {g}, write {w}: {name}");
            let inputs = MatrixInputs { q: &q, k: &k, v: &v, gate, write, initial_state: Some(&h0) };
            let theirs = oracle::Inputs {
                q: &case.q,
                k: &case.k,
                v: &case.v,
                gate: their_gate,
                write: their_write,
                initial_state: Some(&case.initial_state),
            };
            let (got, want) =
                (matrix::forward(&p, &inputs, KeepStates::Yes).unwrap(), oracle::forward(&problem, &theirs));
            same(&what("o"), &got.o, &want.o);
            same(&what("final_state"), &got.final_state, &want.final_state);
            let got = matrix::backward(&p, &inputs, &d_o, Some(&dht), got.chunk_states.as_deref()).unwrap();
            let want = oracle::backward(&problem, &theirs, &case.d_o, Some(&case.d_final_state));
            same(&what("dq"), &got.dq, &want.q);
            same(&what("dk"), &got.dk, &want.k);
            same(&what("dv"), &got.dv, &want.v);
            same(&what("d_initial_state"), &got.d_initial_state.unwrap(), &want.initial_state);
            for (name, got, want) in [
                ("dg", got.dg, &want.gate),
                ("dbeta", got.dbeta, &want.beta),
                ("da", got.da, &want.a),
                ("db", got.db, &want.b),
            ] {
                if let Some(got) = got {
                    same(&what(name), &got, want);
                }
            }
        }
    }
}

#[test]
fn matrix_recurrences() {
    for (i, spoilt) in SPOILT.into_iter().enumerate() {
        (0..4).for_each(|n| matrix_case((10 * i + n) as u64, spoilt));
    }
}

/// Finite numbers whose products are not.
#[test]
fn products_that_overflow() {
    let p = MatrixProblem { scale: 1.0, ..MatrixProblem::new(1, 6, 1, 1, 1) };
    let (x, big) = ([1.0f32; 6], [1.0, 1.0, 1.0, 3e38, 1.0, 1.0]);
    let inputs =
        MatrixInputs { q: &x, k: &big, v: &big, gate: Gate::None, write: Write::Additive, initial_state: None };
    let o = matrix::forward(&p, &inputs, KeepStates::No).unwrap().o;
    assert_eq!(o[..3], [1.0, 2.0, 3.0]);
    let inputs = MatrixInputs { write: Write::Delta { beta: &[1.0; 6] }, ..inputs };
    let o = matrix::forward(&p, &inputs, KeepStates::No).unwrap().o;
    assert_eq!(o[..3], [1.0, 1.0, 1.0]);
}

fn attention_case(p: &AttentionProblem, seed: u64, spoilt: usize) {
    let mut noise = Noise(seed);
    let tokens = p.batch * p.time;
    let mut tensors = [
        noise.numbers(tokens * p.heads * p.key_dim),
        noise.numbers(tokens * p.kv_heads * p.key_dim),
        noise.numbers(tokens * p.kv_heads * p.value_dim),
        noise.numbers(tokens * p.heads * p.value_dim),
    ];
    (0..1 + seed % 2).for_each(|_| noise.spoil(&mut tensors[spoilt]));
    let [q, k, v, d_o] = &tensors;
    let theirs = attention_oracle::Problem {
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
    let what = |name: &str| format!("{} spoilt, seed {seed}, {p:?}: {name}", ["q", "k", "v", "d_o"][spoilt]);
    let [nq, nk, nv, ndo] = [q, k, v, d_o].map(|x| narrow(x));
    let got = attention::forward(p, &nq, &nk, &nv).unwrap();
    same(&what("o"), &got.o, &attention_oracle::forward(&theirs, q, k, v));
    let got = attention::backward(p, &nq, &nk, &nv, &got, &ndo).unwrap();
    let want = attention_oracle::backward(&theirs, q, k, v, d_o);
    same(&what("dq"), &got.dq, &want.q);
    same(&what("dk"), &got.dk, &want.k);
    same(&what("dv"), &got.dv, &want.v);
}

#[test]
fn softmax_attention() {
    for seed in 0..6u64 {
        for spoilt in 0..4 {
            let whole = AttentionProblem { kv_heads: 1, value_dim: 5, ..AttentionProblem::new(1, 150, 2, 8) };
            let packed = AttentionProblem { cu_seqlens: Some(vec![0, 3, 70, 150]), ..whole.clone() };
            let window = Some([1, 3, 20, 140][seed as usize % 4]);
            attention_case(&whole, seed, spoilt);
            attention_case(&packed, seed, spoilt);
            attention_case(&AttentionProblem { window, ..whole }, seed, spoilt);
            attention_case(&AttentionProblem { window, ..packed }, seed, spoilt);
        }
    }
}

/// Each input of a short convolution reaches its own and the next three outputs of its channel, each cotangent its own and
/// the three inputs before.
#[test]
fn short_convolution() {
    for activation in [Activation::None, Activation::Silu] {
        let (time, channels, bad) = (30, 3, 12);
        let shape = ScanProblem { cu_seqlens: Some(vec![0, 14, 30]), ..ScanProblem::new(1, time, channels) };
        let p = ConvProblem { shape, width: 4, activation };
        let (mut x, weight) = (vec![0.5f32; time * channels], [0.3f32; 12]);
        let mut dy = x.clone();
        x[bad * channels + 1] = f32::NAN;
        let inputs = ConvInputs { x: &x, weight: &weight, bias: None, state: None };
        let y = short_conv::forward(&p, &inputs).unwrap().y;
        for (i, y) in y.iter().enumerate() {
            assert_eq!(y.is_finite(), i % channels != 1 || !(bad..14).contains(&(i / channels)), "y[{i}] {y}");
        }
        x[bad * channels + 1] = 0.5;
        dy[bad * channels + 1] = f32::INFINITY;
        let inputs = ConvInputs { x: &x, weight: &weight, bias: None, state: None };
        let dx = short_conv::backward(&p, &inputs, &dy, None).unwrap().dx;
        for (i, dx) in dx.iter().enumerate() {
            assert_eq!(dx.is_finite(), i % channels != 1 || !(bad - 3..=bad).contains(&(i / channels)), "dx[{i}] {dx}");
        }
    }
}
