//! The native matrix-state kernels on plain slices against the f64 oracle: every gate with every write.

use half::bf16;
use proptest::prelude::*;
use thalweg_kernels::Error;
use thalweg_kernels::matrix::{Gate, KeepStates, MatrixInputs, MatrixProblem, Write, backward, forward, step};
use thalweg_reference::cases::{MatrixCase, Precision};
use thalweg_reference::matrix as oracle;
use thalweg_reference::tolerance::Quantity::{Gradient, Value};
use thalweg_reference::tolerance::{relative_error_f32, tolerance};
use thalweg_tests::{MatrixDraw, Storage, config, matrix_draws, narrow, widen};

#[derive(Debug, Clone, Copy, PartialEq)]
enum Decay {
    None,
    Constant,
    Head,
    Key,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Update {
    Additive,
    Delta,
    LowRank,
}

fn decays() -> impl Strategy<Value = Decay> {
    prop::sample::select(&[Decay::None, Decay::Constant, Decay::Head, Decay::Key][..])
}

fn problem(draw: &MatrixDraw) -> MatrixProblem {
    let p = &draw.problem;
    MatrixProblem {
        batch: p.batch,
        time: p.time,
        heads: p.heads,
        value_heads: p.value_heads,
        key_dim: p.key_dim,
        value_dim: p.value_dim,
        chunk: draw.chunk,
        scale: p.scale as f32,
        cu_seqlens: p.cu_seqlens.clone(),
    }
}

/// The tensors of a case in the engine's element type.
struct Tensors<E> {
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    a: Vec<E>,
    b: Vec<E>,
    d_o: Vec<E>,
    gate: Vec<f32>,
    beta: Vec<f32>,
    initial_state: Vec<f32>,
    d_final_state: Vec<f32>,
}

fn gate_of(case: &MatrixCase, decay: Decay) -> &[f64] {
    match decay {
        Decay::None => &[],
        Decay::Constant => &case.gate_constant,
        Decay::Head => &case.gate_head,
        Decay::Key => &case.gate_key,
    }
}

impl<E: Storage> Tensors<E> {
    fn new(case: &MatrixCase, decay: Decay) -> Self {
        Self {
            q: narrow(&case.q),
            k: narrow(&case.k),
            v: narrow(&case.v),
            a: narrow(&case.a),
            b: narrow(&case.b),
            d_o: narrow(&case.d_o),
            gate: narrow(gate_of(case, decay)),
            beta: narrow(&case.beta),
            initial_state: narrow(&case.initial_state),
            d_final_state: narrow(&case.d_final_state),
        }
    }

    fn inputs(&self, decay: Decay, update: Update, initial_state: bool) -> MatrixInputs<'_, E> {
        MatrixInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            gate: match decay {
                Decay::None => Gate::None,
                Decay::Constant => Gate::Constant(&self.gate),
                Decay::Head => Gate::Head(&self.gate),
                Decay::Key => Gate::Key(&self.gate),
            },
            write: match update {
                Update::Additive => Write::Additive,
                Update::Delta => Write::Delta { beta: &self.beta },
                Update::LowRank => Write::LowRank { a: &self.a, b: &self.b },
            },
            initial_state: initial_state.then_some(&self.initial_state[..]),
        }
    }
}

fn oracle_inputs<'a>(case: &'a MatrixCase, decay: Decay, update: Update, initial_state: bool) -> oracle::Inputs<'a> {
    let gate = gate_of(case, decay);
    oracle::Inputs {
        q: &case.q,
        k: &case.k,
        v: &case.v,
        gate: match decay {
            Decay::None => oracle::Gate::None,
            Decay::Constant => oracle::Gate::Constant(gate),
            Decay::Head => oracle::Gate::Head(gate),
            Decay::Key => oracle::Gate::Key(gate),
        },
        write: match update {
            Update::Additive => oracle::Write::Additive,
            Update::Delta => oracle::Write::Delta { beta: &case.beta },
            Update::LowRank => oracle::Write::LowRank { a: &case.a, b: &case.b },
        },
        initial_state: initial_state.then_some(&case.initial_state[..]),
    }
}

/// Chunked forward and backward (with kept and with recomputed states) against the oracle.
fn chunked<E: Storage>(draw: &MatrixDraw, decay: Decay, update: Update) -> Result<(), TestCaseError> {
    let case = draw.case(E::PRECISION);
    let tensors = Tensors::<E>::new(&case, decay);
    let (problem, inputs) = (problem(draw), tensors.inputs(decay, update, draw.initial_state));
    let out = forward(&problem, &inputs, KeepStates::Yes).unwrap();
    let d_last = Some(&tensors.d_final_state[..]);
    let grad = backward(&problem, &inputs, &tensors.d_o, d_last, out.chunk_states.as_deref()).unwrap();

    let reference = oracle_inputs(&case, decay, update, draw.initial_state);
    let want = oracle::forward(&case.problem, &reference);
    let want_grad = oracle::backward(&case.problem, &reference, &case.d_o, Some(&case.d_final_state));

    let extreme = decay != Decay::None && draw.gates.extreme();
    let mut errors = vec![
        ("o", relative_error_f32(&widen(&out.o), &want.o), Value),
        ("final_state", relative_error_f32(&out.final_state, &want.final_state), Value),
        ("dq", relative_error_f32(&widen(&grad.dq), &want_grad.q), Gradient),
        ("dk", relative_error_f32(&widen(&grad.dk), &want_grad.k), Gradient),
        ("dv", relative_error_f32(&widen(&grad.dv), &want_grad.v), Gradient),
    ];
    let mut optional = |name, found: Option<Vec<f32>>, want: &[f64], present: bool| {
        assert_eq!(found.is_some(), present, "{name}");
        errors.extend(found.map(|found| (name, relative_error_f32(&found, want), Gradient)));
    };
    optional("dbeta", grad.dbeta, &want_grad.beta, update == Update::Delta);
    optional("da", grad.da.map(|x| widen(&x)), &want_grad.a, update == Update::LowRank);
    optional("db", grad.db.map(|x| widen(&x)), &want_grad.b, update == Update::LowRank);
    optional("d_initial_state", grad.d_initial_state, &want_grad.initial_state, draw.initial_state);
    prop_assert_eq!(grad.dg.is_some(), decay != Decay::None);
    if let Some(dg) = &grad.dg {
        // Where the delta rule replaces all that the state holds, dg is a difference of equal terms and has no magnitude
        // of its own; dbeta is of the size of those terms.
        let largest = |x: &[f64]| x.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        let (own, terms) = (largest(&want_grad.gate), largest(&want_grad.beta));
        let error = relative_error_f32(dg, &want_grad.gate);
        errors.push(("dg", if own > 0.0 { error * own / own.max(terms) } else { error / terms.max(1.0) }, Gradient));
    }
    for (name, error, quantity) in errors {
        let allowed = tolerance(E::PRECISION, quantity, extreme);
        prop_assert!(error <= allowed, "{} {}: {:.2e} above {:.0e}", E::NAME, name, error, allowed);
    }

    let recomputed = backward(&problem, &inputs, &tensors.d_o, d_last, None).unwrap();
    prop_assert!(widen(&recomputed.dk) == widen(&grad.dk), "kept and recomputed states must give the same bits");
    Ok(())
}

/// Token by token, `step` gives the oracle's outputs and final state.
fn stepped<E: Storage>(draw: &MatrixDraw, decay: Decay, update: Update) -> Result<(), TestCaseError> {
    let mut draw = draw.clone();
    draw.problem.cu_seqlens = None;
    let case = draw.case(E::PRECISION);
    let reference = oracle_inputs(&case, decay, update, true);
    let want = oracle::forward(&case.problem, &reference);
    let tensors = Tensors::<E>::new(&case, decay);
    let one = MatrixProblem { time: 1, ..problem(&draw) };
    let mut state = tensors.initial_state.clone();
    let (batch, time) = (draw.problem.batch, draw.problem.time);
    let mut o = vec![0.0; want.o.len()];
    for t in 0..time {
        fn token<T: Copy>(x: &[T], batch: usize, time: usize, t: usize) -> Vec<T> {
            let width = x.len() / (batch * time);
            (0..batch).flat_map(|b| x[(b * time + t) * width..][..width].to_vec()).collect()
        }
        let at = |x: &[E]| token(x, batch, time, t);
        let now = Tensors {
            q: at(&tensors.q),
            k: at(&tensors.k),
            v: at(&tensors.v),
            a: at(&tensors.a),
            b: at(&tensors.b),
            gate: match decay {
                Decay::None | Decay::Constant => tensors.gate.clone(),
                Decay::Head | Decay::Key => token(&tensors.gate, batch, time, t),
            },
            beta: token(&tensors.beta, batch, time, t),
            d_o: Vec::new(),
            initial_state: Vec::new(),
            d_final_state: Vec::new(),
        };
        let found = widen(&step(&one, &now.inputs(decay, update, false), &mut state).unwrap());
        let width = found.len() / batch;
        for (b, row) in found.chunks(width).enumerate() {
            o[(b * time + t) * width..][..width].copy_from_slice(row);
        }
    }
    let allowed = tolerance(E::PRECISION, Value, decay != Decay::None && draw.gates.extreme());
    for (name, error) in
        [("o", relative_error_f32(&o, &want.o)), ("state", relative_error_f32(&state, &want.final_state))]
    {
        prop_assert!(error <= allowed, "{} {}: {:.2e} above {:.0e}", E::NAME, name, error, allowed);
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn additive_f32(draw in matrix_draws(3), decay in decays()) {
        chunked::<f32>(&draw, decay, Update::Additive)?;
    }

    #[test]
    fn delta_f32(draw in matrix_draws(3), decay in decays()) {
        chunked::<f32>(&draw, decay, Update::Delta)?;
    }

    #[test]
    fn low_rank_f32(draw in matrix_draws(1), decay in decays()) {
        chunked::<f32>(&draw, decay, Update::LowRank)?;
    }

    #[test]
    fn bf16_in_and_out(draw in matrix_draws(2), decay in decays(), delta in any::<bool>()) {
        chunked::<bf16>(&draw, decay, if delta { Update::Delta } else { Update::Additive })?;
    }

    #[test]
    fn steps(draw in matrix_draws(1), decay in decays(), update in 0..3usize) {
        let update = [Update::Additive, Update::Delta, Update::LowRank][update];
        stepped::<f32>(&draw, decay, update)?;
    }
}

#[test]
fn bad_input_is_named() {
    let draw = MatrixDraw {
        problem: oracle::Problem {
            batch: 1,
            time: 5,
            heads: 1,
            value_heads: 2,
            key_dim: 3,
            value_dim: 2,
            scale: 1.0,
            cu_seqlens: None,
        },
        chunk: 4,
        seed: 1,
        gates: thalweg_reference::cases::Gates::Mean(1.0),
        keys: thalweg_reference::cases::Keys::Random,
        betas: thalweg_reference::cases::Betas::Uniform,
        initial_state: true,
    };
    let case = draw.case(Precision::F32);
    let tensors = Tensors::<f32>::new(&case, Decay::Key);
    let good = problem(&draw);
    let inputs = tensors.inputs(Decay::Key, Update::Delta, true);
    let fails = |problem: MatrixProblem, inputs: MatrixInputs<'_, f32>, text: &str| {
        let error = forward(&problem, &inputs, KeepStates::No).unwrap_err();
        assert!(error.to_string().contains(text), "{error} does not tell of {text}");
        let again = backward(&problem, &inputs, &tensors.d_o, None, None).unwrap_err();
        assert_eq!(error.to_string(), again.to_string(), "forward and backward agree");
    };
    fails(MatrixProblem { chunk: 0, ..good.clone() }, inputs, "`chunk`");
    fails(MatrixProblem { heads: 0, ..good.clone() }, inputs, "`heads`");
    fails(MatrixProblem { value_heads: 3, heads: 2, ..good.clone() }, inputs, "`value_heads`");
    fails(MatrixProblem { scale: f32::NAN, ..good.clone() }, inputs, "`scale`");
    fails(MatrixProblem { time: 6, ..good.clone() }, inputs, "`q` has shape");
    for bounds in [vec![0, 3, 3, 5], vec![0, 4], vec![1, 5], vec![0, 4, 2, 5], vec![]] {
        fails(MatrixProblem { cu_seqlens: Some(bounds), ..good.clone() }, inputs, "`cu_seqlens`");
    }
    for bad in [0.5, f32::NAN, f32::INFINITY] {
        let mut g = tensors.gate.clone();
        g[7] = bad;
        fails(good.clone(), MatrixInputs { gate: Gate::Key(&g), ..inputs }, "at position 7");
    }
    let beta = [f32::NAN; 10];
    fails(good.clone(), MatrixInputs { write: Write::Delta { beta: &beta }, ..inputs }, "`beta`");
    fails(
        good.clone(),
        MatrixInputs { write: Write::LowRank { a: &tensors.a, b: &tensors.b }, ..inputs },
        "`value_heads`",
    );
    fails(good.clone(), MatrixInputs { initial_state: Some(&[0.0; 3]), ..inputs }, "`initial_state`");
    let short = backward(&good, &inputs, &tensors.d_o[1..], None, None).unwrap_err();
    assert!(matches!(short, Error::Shape { argument: "do", .. }));
}
