//! One case of a matrix recurrence on a device against the oracle.

use thalweg_gpu::{Buffer, Client, matrix};
use thalweg_kernels::Element;
use thalweg_kernels::matrix::MatrixProblem;
use thalweg_reference::cases::{BETAS, Gates, KEYS, MatrixCase, Precision};
use thalweg_reference::matrix as oracle;
use thalweg_reference::tolerance::{Quantity, relative_error_f32, tolerance};

pub(crate) struct Sizes {
    pub time: usize,
    pub heads: usize,
    pub value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    pub cu_seqlens: Option<Vec<usize>>,
}

/// Gate and write by number: none, constant, head, key; additive, delta, low rank.
pub(crate) type Form = (usize, usize);

/// Those that have kernels of their own.
pub(crate) const KERNELS: [Form; 9] = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)];

/// The kernels against the oracle: forward, backward, and a step where there is one token.
pub(crate) fn check<E: Element + bytemuck::Pod>(
    client: &Client,
    sizes: &Sizes,
    (gate, write): Form,
    precision: Precision,
    gates: Gates,
    seed: u64,
) {
    let batch = if sizes.cu_seqlens.is_some() { 1 } else { 2 };
    let keys = KEYS[seed as usize % KEYS.len()];
    let betas = BETAS[(seed as usize / 3) % BETAS.len()];
    let Sizes { time, heads, key_dim, value_dim, .. } = *sizes;
    // Low-rank writes belong to the heads of keys.
    let value_heads = if write == 2 { heads } else { sizes.value_heads };
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
    let (d_o, dht) = (elements(&case.d_o), floats(&case.d_final_state));
    let (key, head, constant) = (floats(&case.gate_key), floats(&case.gate_head), floats(&case.gate_constant));
    let (beta, h0) = (floats(&case.beta), floats(&case.initial_state));
    let (a, b) = (elements(&case.a), elements(&case.b));
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
        (matrix::Write::LowRank { a: &a, b: &b }, oracle::Write::LowRank { a: &case.a, b: &case.b }),
    ];
    let (gate_name, write_name) = (["no", "constant", "head", "key"][gate], ["additive", "delta", "low-rank"][write]);
    let what = format!("{gate_name} gate {gates:?}, {write_name} write, {keys:?} {betas:?}, T {time}");
    let (gate, their_gate) = (mine[gate], theirs[gate]);
    let (write, their_write) = writes[write];
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
    if time == 1 && sizes.cu_seqlens.is_none() {
        let state = floats(&case.initial_state);
        let o = matrix::step(client, &p, &matrix::Inputs { initial_state: None, ..inputs }, &state).unwrap();
        close("step o", wide(&o), &want.o, Quantity::Value);
        close("step state", narrow(&state), &want.final_state, Quantity::Value);
    }
    let want = oracle::backward(&problem, &reference, &case.d_o, Some(&case.d_final_state));
    let got = matrix::backward(client, &p, &inputs, Some(&d_o), Some(&dht)).unwrap();
    close("dq", wide(&got.dq), &want.q, Quantity::Gradient);
    close("dk", wide(&got.dk), &want.k, Quantity::Gradient);
    close("dv", wide(&got.dv), &want.v, Quantity::Gradient);
    close("d_initial_state", narrow(&got.d_initial_state.unwrap()), &want.initial_state, Quantity::Gradient);
    for (name, found, expected, there) in [
        ("dg", got.dg.map(|x| narrow(&x)), &want.gate, gate_name != "no"),
        ("dbeta", got.dbeta.map(|x| narrow(&x)), &want.beta, write_name == "delta"),
        ("da", got.da.map(|x| wide(&x)), &want.a, write_name == "low-rank"),
        ("db", got.db.map(|x| wide(&x)), &want.b, write_name == "low-rank"),
    ] {
        assert_eq!(found.is_some(), there, "{what}: {name}");
        if let Some(found) = found {
            close(name, found, expected, Quantity::Gradient);
        }
    }
}
