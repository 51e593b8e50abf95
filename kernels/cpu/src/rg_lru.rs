//! The real-gated linear recurrent unit of Griffin (De et al. 2024, arXiv:2402.19427, section 2.4), after its gate
//! products: both sigmoids, the decay, the input's factor, the reset and the scan in one pass over memory.
//!
//! ```text
//! log a_t = -8 sigmoid(recurrent_gate_t) softplus(a_param)
//! h_t     = a_t h_{t-1} + sqrt(1 - a_t^2) (sigmoid(input_gate_t) x_t)
//! ```
//!
//! At a reset (the first token of a document) `a` is 0 and the square root is replaced by 1. The derivative of the
//! square root is bounded by 1000, as in the published code: `1 / sqrt(max(4 (1 - a^2), 1000^-2))`.

use crate::{channels::ScanProblem, element::Element, error::Error, native, sequences::Sequences};

/// The arguments of [`forward`].
#[derive(Debug, Clone, Copy)]
pub struct RgLruInputs<'a, E> {
    /// `[batch, time, channels]`.
    pub x: &'a [E],
    /// Logits of the recurrence gate, `[batch, time, channels]`.
    pub recurrent_gate: &'a [E],
    /// Logits of the input gate, `[batch, time, channels]`.
    pub input_gate: &'a [E],
    /// The parameter of the decay, `[channels]`.
    pub a_param: &'a [f32],
    /// Where documents begin, `[batch, time]`; nowhere if absent.
    pub reset: Option<&'a [bool]>,
    /// State before the first token, `[sequences, channels]`; zero where absent.
    pub initial_state: Option<&'a [f32]>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RgLruOutputs<E> {
    /// The state after each token, `[batch, time, channels]`.
    pub o: Vec<E>,
    /// The state after the last token, `[sequences, channels]`.
    pub final_state: Vec<f32>,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RgLruGradients<E> {
    /// Of `x`.
    pub dx: Vec<E>,
    /// Of `recurrent_gate`.
    pub d_recurrent_gate: Vec<E>,
    /// Of `input_gate`.
    pub d_input_gate: Vec<E>,
    /// Of `a_param`.
    pub d_a_param: Vec<f32>,
    /// Of the initial state, `[sequences, channels]`.
    pub d_initial_state: Vec<f32>,
}

fn check<E: Element>(problem: &ScanProblem, inputs: &RgLruInputs<E>) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    problem.check_tokens("x", inputs.x)?;
    problem.check_tokens("recurrent_gate", inputs.recurrent_gate)?;
    problem.check_tokens("input_gate", inputs.input_gate)?;
    Error::check_len("a_param", inputs.a_param.len(), &[problem.channels])?;
    if let Some(position) = inputs.a_param.iter().position(|a| a.is_nan()) {
        let expected = "a number";
        return Err(Error::Element { argument: "a_param", found: f32::NAN, position, expected });
    }
    if let Some(reset) = inputs.reset {
        Error::check_len("reset", reset.len(), &[problem.batch, problem.time])?;
    }
    problem.check_state("initial_state", sequences.count(), inputs.initial_state)?;
    Ok(sequences)
}

/// The error for the first gate that is NaN; looked for only after a kernel has met one.
fn bad_gate<E: Element>(inputs: &RgLruInputs<E>) -> Error {
    let find = |x: &[E]| x.iter().position(|x| x.to_f32().is_nan());
    let (argument, position) = match find(inputs.recurrent_gate) {
        Some(position) => ("recurrent_gate", position),
        None => ("input_gate", find(inputs.input_gate).unwrap_or(0)),
    };
    Error::Element { argument, found: f32::NAN, position, expected: "a number" }
}

/// The unit over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length, bad `cu_seqlens`, and gates or parameters that are NaN.
///
/// # Example
/// ```
/// use thalweg_kernels::{ScanProblem, rg_lru::{self, RgLruInputs}};
/// let inputs = RgLruInputs {
///     x: &[1.0f32, 1.0],
///     recurrent_gate: &[0.0, 0.0],
///     input_gate: &[0.0, 0.0],
///     a_param: &[-3.0],
///     reset: Some(&[true, false]),
///     initial_state: None,
/// };
/// let out = rg_lru::forward(&ScanProblem::new(1, 2, 1), &inputs).unwrap();
/// assert_eq!(out.o[0], 0.5);
/// ```
pub fn forward<E: Element>(problem: &ScanProblem, inputs: &RgLruInputs<E>) -> Result<RgLruOutputs<E>, Error> {
    let sequences = check(problem, inputs)?;
    native::rg_lru::forward(&sequences, problem.channels, inputs).ok_or_else(|| bad_gate(inputs))
}

/// Gradients of everything that [`forward`] takes, given its output `o` and the cotangents of that output
/// (`[batch, time, channels]`) and of the final state (`[sequences, channels]`, zero where absent).
///
/// # Errors
/// As [`forward`]; the gates are not examined again.
pub fn backward<E: Element>(
    problem: &ScanProblem,
    inputs: &RgLruInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
) -> Result<RgLruGradients<E>, Error> {
    let sequences = check(problem, inputs)?;
    problem.check_tokens("o", o)?;
    problem.check_tokens("do", do_)?;
    problem.check_state("d_final_state", sequences.count(), d_final_state)?;
    Ok(native::rg_lru::backward(&sequences, problem.channels, inputs, o, do_, d_final_state))
}

/// One token of `batch` sequences: `x` and the gates are `[batch, channels]`, `reset` is `[batch]`; `state`
/// (`[batch, channels]`) is updated in place, and the result is the new state rounded to `E`.
///
/// # Errors
/// As [`forward`]; `state` is then unchanged.
pub fn step<E: Element>(
    batch: usize,
    x: &[E],
    recurrent_gate: &[E],
    input_gate: &[E],
    a_param: &[f32],
    reset: Option<&[bool]>,
    state: &mut [f32],
) -> Result<Vec<E>, Error> {
    let problem = ScanProblem::new(batch, 1, a_param.len());
    Error::check_len("state", state.len(), &[batch, a_param.len()])?;
    let inputs = RgLruInputs { x, recurrent_gate, input_gate, a_param, reset, initial_state: Some(state) };
    let out = forward(&problem, &inputs)?;
    state.copy_from_slice(&out.final_state);
    Ok(out.o)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, shape_of, wide};
    use half::bf16;
    use thalweg_reference::rg_lru as oracle;

    /// `gate`: the logits are uniform in `[-gate, gate]`; `param`: the range of `a_param`.
    fn check<E: Element>(problem: &ScanProblem, gate: f64, param: [f64; 2], resets: bool, tolerance: f64) {
        let sequences = problem.sequences().unwrap();
        let (tokens, states) = (sequences.tokens(), sequences.count() * problem.channels);
        let n = tokens * problem.channels;
        let mut noise = Noise::new(n as u64);
        let (x, r, i): (Vec<E>, Vec<E>, Vec<E>) =
            (noise.uniform(n, -1.0, 1.0), noise.uniform(n, -gate, gate), noise.uniform(n, -gate, gate));
        let a_param: Vec<f32> = noise.uniform(problem.channels, param[0], param[1]);
        let reset: Option<Vec<bool>> = resets.then(|| (0..tokens).map(|t| t % 23 == 0).collect());
        let (h0, dht): (Vec<f32>, Vec<f32>) = (noise.uniform(states, -1.0, 1.0), noise.uniform(states, -1.0, 1.0));
        let do_: Vec<E> = noise.uniform(n, -1.0, 1.0);
        let inputs = RgLruInputs {
            x: &x,
            recurrent_gate: &r,
            input_gate: &i,
            a_param: &a_param,
            reset: reset.as_deref(),
            initial_state: Some(&h0),
        };
        let out = forward(problem, &inputs).unwrap();
        let grads = backward(problem, &inputs, &out.o, &do_, Some(&dht)).unwrap();

        let (x, r, i, a_param, h0) = (wide(&x), wide(&r), wide(&i), wide(&a_param), wide(&h0));
        let inputs = oracle::Inputs {
            x: &x,
            recurrent_logits: &r,
            input_logits: &i,
            param: &a_param,
            reset: reset.as_deref(),
            initial_state: Some(&h0),
        };
        let (o, ht) = oracle::forward(&shape_of(problem), &inputs);
        let want = oracle::backward(&shape_of(problem), &inputs, &wide(&do_), Some(&wide(&dht)));
        assert_close("o", &out.o, &o, tolerance);
        assert_close("final_state", &out.final_state, &ht, 1e-5);
        assert_close("dx", &grads.dx, &want.x, tolerance);
        assert_close("d_recurrent_gate", &grads.d_recurrent_gate, &want.recurrent_logits, 10.0 * tolerance);
        assert_close("d_input_gate", &grads.d_input_gate, &want.input_logits, 10.0 * tolerance);
        assert_close("d_a_param", &grads.d_a_param, &want.param, 10.0 * tolerance);
        assert_close("d_initial_state", &grads.d_initial_state, &want.initial_state, 1e-4);
    }

    #[test]
    fn equals_the_oracle() {
        // The range that Griffin initialises: a in [0.9, 0.999].
        let usual = [-7.0, -2.0];
        for time in [1, 5, 63, 64, 65, 200] {
            for channels in [1, 24, 130] {
                let problem = ScanProblem::new(2, time, channels);
                check::<f32>(&problem, 3.0, usual, false, 1e-5);
                check::<f32>(&problem, 3.0, usual, true, 1e-5);
                check::<bf16>(&problem, 1.0, usual, true, 1e-2);
            }
        }
        let problem = ScanProblem::new(1, 65, 70);
        // a from 1 - 1e-9 (below the bound of the square root's derivative) to e^-800.
        check::<f32>(&problem, 20.0, [-12.0, -9.0], false, 1e-5);
        check::<f32>(&problem, 20.0, [50.0, 100.0], true, 1e-5);
        check::<f32>(&ScanProblem::packed(70, vec![0, 1, 7, 70, 200]), 3.0, usual, true, 1e-5);
    }

    #[test]
    fn steps_equal_the_scan_and_bad_arguments_are_named() {
        let (time, d) = (6, 3);
        let mut noise = Noise::new(2);
        let mut next = |n| noise.uniform::<f32>(n, -1.0, 1.0);
        let (x, r, i, a_param) = (next(time * d), next(time * d), next(time * d), next(d));
        let reset = [true, false, false, true, false, false];
        let problem = ScanProblem::new(1, time, d);
        let inputs = RgLruInputs {
            x: &x,
            recurrent_gate: &r,
            input_gate: &i,
            a_param: &a_param,
            reset: Some(&reset),
            initial_state: None,
        };
        let whole = forward(&problem, &inputs).unwrap();
        let mut state = vec![0.0; d];
        for t in 0..time {
            let at = t * d..(t + 1) * d;
            let (x, r, i) = (&x[at.clone()], &r[at.clone()], &i[at.clone()]);
            let o = step(1, x, r, i, &a_param, Some(&reset[t..t + 1]), &mut state).unwrap();
            assert_eq!(o, whole.o[at]);
        }
        let name = |inputs: RgLruInputs<f32>| match forward(&problem, &inputs) {
            Err(Error::Element { argument, .. } | Error::Shape { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        let mut bad = r.clone();
        bad[4] = f32::NAN;
        assert_eq!(name(RgLruInputs { recurrent_gate: &bad, ..inputs }), "recurrent_gate");
        assert_eq!(name(RgLruInputs { input_gate: &bad, ..inputs }), "input_gate");
        assert_eq!(name(RgLruInputs { a_param: &[0.0, f32::NAN, 0.0], ..inputs }), "a_param");
        assert_eq!(name(RgLruInputs { reset: Some(&reset[1..]), ..inputs }), "reset");
    }
}
