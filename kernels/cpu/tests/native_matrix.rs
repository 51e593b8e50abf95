//! The native matrix-state kernels against the f64 oracle: every gate with every write, forward, backward and step.

use half::bf16;
use thalweg_kernels::Element;
use thalweg_kernels::matrix::{self, Gate, KeepStates, MatrixInputs, MatrixProblem, Write};
use thalweg_reference::cases::{BETAS, GATES, Gates, KEYS, MatrixCase, Precision};
use thalweg_reference::matrix as oracle;
use thalweg_reference::tolerance::{Quantity, relative_error_f32, tolerance};

const GATE_NAMES: [&str; 4] = ["none", "constant", "head", "key"];
const WRITE_NAMES: [&str; 3] = ["additive", "delta", "low rank"];

struct Sizes {
    time: usize,
    heads: usize,
    value_heads: usize,
    key_dim: usize,
    value_dim: usize,
    chunk: usize,
    cu_seqlens: Option<Vec<usize>>,
}

fn check<E: Element>(sizes: &Sizes, precision: Precision, gates: Gates, seed: u64) {
    let batch = if sizes.cu_seqlens.is_some() { 1 } else { 2 };
    let keys = KEYS[seed as usize % KEYS.len()];
    let betas = BETAS[(seed as usize / 3) % BETAS.len()];
    let problem = oracle::Problem {
        batch,
        time: sizes.time,
        heads: sizes.heads,
        value_heads: sizes.value_heads,
        key_dim: sizes.key_dim,
        value_dim: sizes.value_dim,
        scale: 0.25,
        cu_seqlens: sizes.cu_seqlens.clone(),
    };
    let case = MatrixCase::sample(problem.clone(), seed, precision, gates, keys, betas);
    let elements = |x: &[f64]| x.iter().map(|&x| E::from_f32(x as f32)).collect::<Vec<E>>();
    let floats = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let (q, k, v, a, b, d_o) = (
        elements(&case.q),
        elements(&case.k),
        elements(&case.v),
        elements(&case.a),
        elements(&case.b),
        elements(&case.d_o),
    );
    let (key, head, constant) = (floats(&case.gate_key), floats(&case.gate_head), floats(&case.gate_constant));
    let (beta, h0, dht) = (floats(&case.beta), floats(&case.initial_state), floats(&case.d_final_state));
    let p = MatrixProblem {
        batch,
        time: sizes.time,
        heads: sizes.heads,
        value_heads: sizes.value_heads,
        key_dim: sizes.key_dim,
        value_dim: sizes.value_dim,
        chunk: sizes.chunk,
        scale: 0.25,
        cu_seqlens: sizes.cu_seqlens.clone(),
    };
    let mine = [Gate::None, Gate::Constant(&constant[..]), Gate::Head(&head[..]), Gate::Key(&key[..])];
    let theirs = [
        oracle::Gate::None,
        oracle::Gate::Constant(&case.gate_constant),
        oracle::Gate::Head(&case.gate_head),
        oracle::Gate::Key(&case.gate_key),
    ];
    let writes = [Write::Additive, Write::Delta { beta: &beta[..] }, Write::LowRank { a: &a[..], b: &b[..] }];
    let their_writes = [
        oracle::Write::Additive,
        oracle::Write::Delta { beta: &case.beta },
        oracle::Write::LowRank { a: &case.a, b: &case.b },
    ];
    for (gi, (gate, their_gate)) in mine.into_iter().zip(theirs).enumerate() {
        for (wi, (write, their_write)) in writes.into_iter().zip(their_writes).enumerate() {
            if wi == 2 && sizes.heads != sizes.value_heads {
                continue;
            }
            let what = format!(
                "{} gate {gates:?}, {} write, {keys:?} {betas:?}, T {}",
                GATE_NAMES[gi], WRITE_NAMES[wi], sizes.time
            );
            let close = |name: &str, found: &[f32], expected: &[f64], quantity: Quantity| {
                let error = relative_error_f32(found, expected);
                let allowed = tolerance(precision, quantity, gates.extreme());
                assert!(error <= allowed, "{what}: {name} is off by {error:.2e}, allowed {allowed:.0e}");
            };
            let wide = |x: &[E]| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
            let inputs = MatrixInputs { q: &q, k: &k, v: &v, gate, write, initial_state: Some(&h0) };
            let reference = oracle::Inputs {
                q: &case.q,
                k: &case.k,
                v: &case.v,
                gate: their_gate,
                write: their_write,
                initial_state: Some(&case.initial_state),
            };
            let want = oracle::forward(&problem, &reference);
            let got = matrix::forward(&p, &inputs, KeepStates::Yes).unwrap();
            close("o", &wide(&got.o), &want.o, Quantity::Value);
            close("final_state", &got.final_state, &want.final_state, Quantity::Value);
            if sizes.time == 1 {
                let mut state = h0.clone();
                let step = MatrixInputs { initial_state: None, ..inputs };
                let o = matrix::step(&p, &step, &mut state).unwrap();
                close("step o", &wide(&o), &want.o, Quantity::Value);
                close("step state", &state, &want.final_state, Quantity::Value);
            }
            let want = oracle::backward(&problem, &reference, &case.d_o, Some(&case.d_final_state));
            let got = matrix::backward(&p, &inputs, &d_o, Some(&dht), got.chunk_states.as_deref()).unwrap();
            close("dq", &wide(&got.dq), &want.q, Quantity::Gradient);
            close("dk", &wide(&got.dk), &want.k, Quantity::Gradient);
            close("dv", &wide(&got.dv), &want.v, Quantity::Gradient);
            close("d_initial_state", &got.d_initial_state.unwrap(), &want.initial_state, Quantity::Gradient);
            for (name, found, expected) in [("dg", got.dg, &want.gate), ("dbeta", got.dbeta, &want.beta)] {
                if let Some(found) = found {
                    close(name, &found, expected, Quantity::Gradient);
                }
            }
            for (name, found, expected) in [("da", got.da, &want.a), ("db", got.db, &want.b)] {
                if let Some(found) = found {
                    close(name, &wide(&found), expected, Quantity::Gradient);
                }
            }
        }
    }
}

/// Every gate regime at lengths around the chunk, with key and value sizes that are no multiple of a vector.
#[test]
fn equals_the_oracle() {
    for (i, time) in [1, 5, 63, 64, 65, 130].into_iter().enumerate() {
        for (j, gates) in GATES.into_iter().enumerate() {
            let sizes =
                Sizes { time, heads: 2, value_heads: 2, key_dim: 12, value_dim: 20, chunk: 64, cu_seqlens: None };
            check::<f32>(&sizes, Precision::F32, gates, (i * GATES.len() + j) as u64);
        }
    }
}

#[test]
fn grouped_heads_packed_sequences_and_odd_chunks() {
    for (i, chunk) in [1, 7, 16, 64].into_iter().enumerate() {
        for (j, gates) in [Gates::Mean(0.05), Gates::Mixed].into_iter().enumerate() {
            let cu_seqlens = Some(vec![0, 1, 17, 40, 90]);
            let sizes = Sizes { time: 90, heads: 1, value_heads: 3, key_dim: 8, value_dim: 5, chunk, cu_seqlens };
            check::<f32>(&sizes, Precision::F32, gates, (i * 2 + j) as u64);
        }
    }
}

/// One head on many threads: the value features are cut into blocks, with an uneven last chunk and grouped heads.
#[test]
fn fewer_heads_than_threads() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(12).build().unwrap();
    for (i, value_heads) in [1, 2].into_iter().enumerate() {
        let cu_seqlens = Some(vec![0, 70]);
        let sizes = Sizes { time: 70, heads: 1, value_heads, key_dim: 12, value_dim: 64, chunk: 32, cu_seqlens };
        pool.install(|| check::<f32>(&sizes, Precision::F32, Gates::Mean(0.05), i as u64));
    }
}

#[test]
fn bf16_storage() {
    for (i, gates) in [Gates::Mean(0.05), Gates::Mean(1.0), Gates::Mixed].into_iter().enumerate() {
        let sizes =
            Sizes { time: 70, heads: 2, value_heads: 2, key_dim: 32, value_dim: 16, chunk: 32, cu_seqlens: None };
        check::<bf16>(&sizes, Precision::Bf16, gates, i as u64);
    }
}

/// `-inf` forgets everything; nothing becomes NaN, and tokens after it do not see those before.
#[test]
fn infinite_decay_separates_sequences() {
    let p = MatrixProblem::new(1, 70, 1, 16, 16);
    let x: Vec<f32> = (0..70 * 16).map(|i| (i as f32 * 0.7).sin()).collect();
    let beta = vec![0.9; 70];
    for cut in [0, 3, 64, 69] {
        let mut g = vec![-0.1; 70 * 16];
        g[cut * 16..(cut + 1) * 16].fill(f32::NEG_INFINITY);
        for write in [Write::Additive, Write::Delta { beta: &beta[..] }] {
            let inputs = MatrixInputs { q: &x, k: &x, v: &x, gate: Gate::Key(&g), write, initial_state: None };
            let whole = matrix::forward(&p, &inputs, KeepStates::No).unwrap();
            let tail = MatrixProblem { time: 70 - cut, ..p.clone() };
            let rest = |x: &[f32], width: usize| x[cut * width..].to_vec();
            let (xt, gt, bt) = (rest(&x, 16), rest(&g, 16), rest(&beta, 1));
            let write = if let Write::Delta { .. } = write { Write::Delta { beta: &bt[..] } } else { Write::Additive };
            let inputs_tail = MatrixInputs { q: &xt, k: &xt, v: &xt, gate: Gate::Key(&gt), write, initial_state: None };
            let alone = matrix::forward(&tail, &inputs_tail, KeepStates::No).unwrap();
            let alone_o: Vec<f64> = alone.o.iter().map(|&x| x as f64).collect();
            assert!(relative_error_f32(&whole.o[cut * 16..], &alone_o) < 1e-5);
            let grads = matrix::backward(&p, &inputs, &x, None, None).unwrap();
            assert!(grads.dg.unwrap().iter().chain(&grads.dk).all(|x| x.is_finite()));
        }
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let p = MatrixProblem::new(1, 4, 2, 8, 8);
    let x = vec![0.0f32; 64];
    let good = MatrixInputs { q: &x, k: &x, v: &x, gate: Gate::None, write: Write::Additive, initial_state: None };
    let message =
        |p: &MatrixProblem, x: &MatrixInputs<f32>| matrix::forward(p, x, KeepStates::No).unwrap_err().to_string();
    assert!(matrix::forward(&p, &good, KeepStates::No).is_ok());
    assert_eq!(message(&p, &MatrixInputs { k: &x[1..], ..good }), "`k` has shape [63], expected [1, 4, 2, 8]");
    assert_eq!(message(&MatrixProblem { chunk: 0, ..p.clone() }, &good), "`chunk` is 0, expected at least 1");
    let mut g = vec![-1.0; 8];
    for bad in [0.5, f32::NAN] {
        g[5] = bad;
        assert!(message(&p, &MatrixInputs { gate: Gate::Head(&g), ..good }).starts_with("`g` holds"));
    }
    let packed = MatrixProblem { cu_seqlens: Some(vec![0, 3, 2, 4]), ..p };
    assert_eq!(message(&packed, &good), "`cu_seqlens` must increase, but entry 2 is 2 after 3");
}
