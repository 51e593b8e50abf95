//! The element-wise linear scan `h_t = a_t * h_{t-1} + x_t`, forward, backward and one step at a time.
//!
//! It is the recurrence of HGRN (Qin et al. 2023, arXiv:2311.04823), RG-LRU, QRNN, SRU and minGRU; the output is the
//! state itself. Its adjoint is the same scan reversed: with `u_t = do_t + a_{t+1} u_{t+1}`, `dx_t = u_t`,
//! `da_t = u_t h_{t-1}` and `dg_t = a_t da_t`.
//!
//! Bound by memory: 12 bytes per f32 element forward, 20 backward. Where a batch has too few sequences and channels to
//! occupy the threads, time is cut into segments; rounding then depends on the number of threads.

use crate::{channels::ScanProblem, element::Element, error::Error, native};

/// The decay of the state, `[batch, time, channels]`, with the tensor `T`: a slice, a device buffer.
#[derive(Debug, Clone, Copy)]
pub enum ScanGate<T> {
    /// The factor `a` itself, any number that is not NaN.
    Linear(T),
    /// Its natural logarithm: `a = exp(g)`, `g <= 0`, `-inf` allowed.
    Log(T),
}

impl<'a, E> ScanGate<&'a [E]> {
    pub(crate) fn values(&self) -> &'a [E] {
        match *self {
            ScanGate::Linear(x) | ScanGate::Log(x) => x,
        }
    }
}

/// The arguments of [`forward`].
#[derive(Debug, Clone, Copy)]
pub struct ScanInputs<'a, E> {
    /// Decay, `[batch, time, channels]`.
    pub gate: ScanGate<&'a [E]>,
    /// What is added, `[batch, time, channels]`.
    pub x: &'a [E],
    /// State before the first token, `[sequences, channels]`; zero where absent.
    pub initial_state: Option<&'a [f32]>,
}

/// What [`forward`] returns. [`forward_into`] reuses the memory of an old one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScanOutputs<E> {
    /// The state after each token, `[batch, time, channels]`.
    pub o: Vec<E>,
    /// The state after the last token, `[sequences, channels]`, not rounded to `E`.
    pub final_state: Vec<f32>,
}

/// What [`backward`] returns. [`backward_into`] reuses the memory of an old one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ScanGradients<E> {
    /// Gradient of the gate as it was given: of `a` or of `g`.
    pub dgate: Vec<E>,
    /// Gradient of `x`.
    pub dx: Vec<E>,
    /// Gradient of the initial state, `[sequences, channels]`.
    pub d_initial_state: Vec<f32>,
}

fn check<E: Element>(problem: &ScanProblem, inputs: &ScanInputs<E>) -> Result<crate::Sequences, Error> {
    let sequences = problem.sequences()?;
    problem.check_tokens(gate_name(&inputs.gate), inputs.gate.values())?;
    problem.check_tokens("x", inputs.x)?;
    problem.check_state("initial_state", sequences.count(), inputs.initial_state)?;
    Ok(sequences)
}

fn gate_name<T>(gate: &ScanGate<T>) -> &'static str {
    match gate {
        ScanGate::Linear(_) => "a",
        ScanGate::Log(_) => "g",
    }
}

/// The error for the first gate that is out of range; looked for only after a kernel has met one.
fn bad_gate<E: Element>(gate: &ScanGate<&[E]>) -> Error {
    let (allowed, expected): (fn(f32) -> bool, _) = match gate {
        ScanGate::Linear(_) => (|a| !a.is_nan(), "a decay factor, not NaN"),
        ScanGate::Log(_) => (|g| g <= 0.0, "a natural-log decay, at most 0 and not NaN"),
    };
    let values = gate.values();
    let position = values.iter().position(|&x| !allowed(x.to_f32())).unwrap_or(0);
    Error::Element { argument: gate_name(gate), found: values[position].to_f32(), position, expected }
}

/// `h_t = a_t * h_{t-1} + x_t` over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length, bad `cu_seqlens`, and gates that are NaN or, as
/// logarithms, positive.
///
/// # Example
/// ```
/// use thalweg_kernels::{ScanProblem, elementwise_scan::{self, ScanGate, ScanInputs}};
/// let problem = ScanProblem::new(1, 3, 1);
/// let inputs = ScanInputs { gate: ScanGate::Linear(&[0.5f32, 0.5, 0.5]), x: &[1.0, 0.0, 2.0], initial_state: None };
/// let out = elementwise_scan::forward(&problem, &inputs).unwrap();
/// assert_eq!(out.o, [1.0, 0.5, 2.25]);
/// ```
pub fn forward<E: Element>(problem: &ScanProblem, inputs: &ScanInputs<E>) -> Result<ScanOutputs<E>, Error> {
    forward_into(problem, inputs, ScanOutputs::default())
}

/// [`forward`] into the memory of `reuse`, whose content is dropped. Fresh memory for a large output costs more than
/// the scan itself.
///
/// # Errors
/// As [`forward`].
pub fn forward_into<E: Element>(
    problem: &ScanProblem,
    inputs: &ScanInputs<E>,
    reuse: ScanOutputs<E>,
) -> Result<ScanOutputs<E>, Error> {
    let sequences = check(problem, inputs)?;
    native::elementwise_scan::forward(&sequences, problem.channels, inputs, reuse).ok_or_else(|| bad_gate(&inputs.gate))
}

/// Gradients of everything that [`forward`] takes, given its output `o`, the cotangent `do_` of that output
/// (`[batch, time, channels]`) and the cotangent of the final state (`[sequences, channels]`, zero where absent).
///
/// # Errors
/// [`Error`] for buffers of the wrong length. Gates are not examined again.
pub fn backward<E: Element>(
    problem: &ScanProblem,
    inputs: &ScanInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
) -> Result<ScanGradients<E>, Error> {
    backward_into(problem, inputs, o, do_, d_final_state, ScanGradients::default())
}

/// [`backward`] into the memory of `reuse`, whose content is dropped.
///
/// # Errors
/// As [`backward`].
pub fn backward_into<E: Element>(
    problem: &ScanProblem,
    inputs: &ScanInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
    reuse: ScanGradients<E>,
) -> Result<ScanGradients<E>, Error> {
    let sequences = check(problem, inputs)?;
    problem.check_tokens("o", o)?;
    problem.check_tokens("do", do_)?;
    problem.check_state("d_final_state", sequences.count(), d_final_state)?;
    Ok(native::elementwise_scan::backward(&sequences, problem.channels, inputs, o, do_, d_final_state, reuse))
}

/// One token of `batch` sequences: gate and `x` are `[batch, channels]`, `state` (`[batch, channels]`) is updated in
/// place, and the result is the new state rounded to `E`.
///
/// # Errors
/// As [`forward`]; `state` is then unchanged.
pub fn step<E: Element>(
    batch: usize,
    channels: usize,
    gate: ScanGate<&[E]>,
    x: &[E],
    state: &mut [f32],
) -> Result<Vec<E>, Error> {
    Error::check_len("state", state.len(), &[batch, channels])?;
    let problem = ScanProblem::new(batch, 1, channels);
    let out = forward(&problem, &ScanInputs { gate, x, initial_state: Some(state) })?;
    state.copy_from_slice(&out.final_state);
    Ok(out.o)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, shape_of, wide};
    use half::{bf16, f16};
    use thalweg_reference::elementwise;

    /// One case: random everything, compared with the oracle.
    fn check<E: Element>(problem: &ScanProblem, log: bool, gates: &[f64], tolerance: f64) {
        let sequences = problem.sequences().unwrap();
        let (d, tokens) = (problem.channels, sequences.tokens());
        let mut noise = Noise::new(tokens as u64 + d as u64);
        let gate: Vec<E> = (0..tokens * d)
            .map(|_| {
                let g = gates[(noise.next() * gates.len() as f64) as usize];
                E::from_f32(if g == 1.0 { -noise.next() as f32 } else { g as f32 })
            })
            .collect();
        let x: Vec<E> = noise.uniform(tokens * d, -1.0, 1.0);
        let do_: Vec<E> = noise.uniform(tokens * d, -1.0, 1.0);
        let h0: Vec<f32> = noise.uniform(sequences.count() * d, -1.0, 1.0);
        let dht: Vec<f32> = noise.uniform(sequences.count() * d, -1.0, 1.0);
        let kind = if log { ScanGate::Log(&gate[..]) } else { ScanGate::Linear(&gate[..]) };
        let inputs = ScanInputs { gate: kind, x: &x, initial_state: Some(&h0) };
        let out = forward(problem, &inputs).unwrap();
        let grads = backward(problem, &inputs, &out.o, &do_, Some(&dht)).unwrap();

        let shape = shape_of(problem);
        let gate = wide(&gate);
        let gate = if log { elementwise::Gate::Log(&gate) } else { elementwise::Gate::Linear(&gate) };
        let (x, h0) = (wide(&x), wide(&h0));
        let want = elementwise::scan_forward(&shape, gate, &x, Some(&h0));
        let adjoint = elementwise::scan_backward(&shape, gate, &x, Some(&h0), &wide(&do_), Some(&wide(&dht)));
        assert_close("o", &out.o, &want.h, tolerance);
        assert_close("final_state", &out.final_state, &want.final_state, 1e-5);
        assert_close("dgate", &grads.dgate, &adjoint.gate, tolerance);
        assert_close("dx", &grads.dx, &adjoint.b, tolerance);
        assert_close("d_initial_state", &grads.d_initial_state, &adjoint.initial_state, 1e-5);
    }

    #[test]
    fn equals_the_recurrence() {
        // 1.0 stands for a random gate in (-1, 0].
        let extreme = [1.0, 0.0, -1e-4, -20.0, -80.0, -1e4, f64::NEG_INFINITY];
        for time in [1, 5, 63, 64, 65, 200] {
            for channels in [1, 24, 130] {
                let problem = ScanProblem::new(2, time, channels);
                check::<f32>(&problem, true, &[1.0], 1e-5);
                check::<f32>(&problem, true, &extreme, 1e-5);
                check::<f32>(&problem, false, &[1.0, 0.0, 0.99, -0.9], 1e-5);
                check::<bf16>(&problem, true, &[1.0], 1e-2);
                check::<f16>(&problem, false, &[1.0], 2e-3);
            }
        }
        check::<f32>(&ScanProblem::packed(20, vec![0, 1, 7, 70, 200]), true, &extreme, 1e-5);
        // Few channels and much time: cut in time. Large enough to be streamed past the caches.
        check::<f32>(&ScanProblem::new(1, 3000, 3), true, &extreme, 1e-5);
        check::<f32>(&ScanProblem::packed(700, vec![0, 600, 1600]), true, &[1.0], 1e-5);
    }

    /// Runs on each of some numbers of threads, which cut the time into as many segments.
    fn on_threads(run: impl Fn(usize) + Sync) {
        for threads in [1, 2, 4] {
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| run(threads));
        }
    }

    /// One channel whose state, forwards, and whose gradient, with time reversed, is `want`.
    fn check_cuts(name: &str, a: &[f32], x: &[f32], h0: f32, want: impl Fn(usize) -> f64 + Sync) {
        let problem = ScanProblem::new(1, a.len(), 1);
        // The gradient passes through the gate after its token.
        let mut reversed: Vec<f32> = a.iter().rev().copied().collect();
        reversed.rotate_right(1);
        let cotangent: Vec<f32> = x.iter().rev().copied().collect();
        on_threads(|threads| {
            let inputs = ScanInputs { gate: ScanGate::Linear(a), x, initial_state: Some(&[h0]) };
            let out = forward(&problem, &inputs).unwrap();
            let inputs = ScanInputs { gate: ScanGate::Linear(&reversed), ..inputs };
            // The first gate of all takes the initial state to the first output.
            let last = [a[0] * h0];
            let grads = backward(&problem, &inputs, &vec![0.0; a.len()], &cotangent, Some(&last)).unwrap();
            for (t, (h, u)) in out.o.iter().zip(grads.dx.iter().rev()).enumerate() {
                for x in [*h, *u].map(f64::from) {
                    let close = (x - want(t)).abs() <= 1e-5 * want(t).abs();
                    assert!(close, "{name}, {threads} threads: {h} and {u} at {t}, want {}", want(t));
                }
            }
            assert_eq!(out.final_state, out.o[a.len() - 1..]);
        });
    }

    #[test]
    fn a_cut_in_time_does_not_show_where_factors_grow() {
        let step = |t: usize, at: usize| if t < at { 0.0 } else { 1.0 };
        let two = |n: usize, at: usize, first: f32, then: f32| -> Vec<f32> {
            (0..n).map(|t| if t < at { first } else { then }).collect()
        };
        let x: Vec<f32> = (0..1024).map(|t| step(t, 600)).collect();
        let sum = |a: f64, n: usize| (1.0 - a.powi(n as i32)) / (1.0 - a);
        let settles = |a: f64, at: usize| move |t: usize| if t < at { 0.0 } else { sum(a, t + 1 - at) };
        check_cuts("from 0", &two(1024, 600, 1.2, 0.9), &x, 0.0, settles(f64::from(0.9f32), 600));
        let x: Vec<f32> = (0..4000).map(|t| step(t, 600)).collect();
        check_cuts("beyond f32", &two(4000, 600, 2.0, 0.5), &x, 0.0, settles(0.5, 600));
        // What comes in cancels what the tokens add, where both are beyond f32 and where they are not.
        check_cuts("cancels", &[2.0; 2100], &[-1.0; 2100], 1.0, |_| 1.0);
        check_cuts("cancels in digits", &two(2100, 40, 2.0, 1.0), &two(2100, 40, -1.0, 0.0), 1.0, |_| 1.0);
        // The other way around: the product of a state that is large underflows, and grows from there.
        let part = |t: usize| [0.5, 2.0, 1.0][(t % 512 / 200).min(2)];
        let want = |t: usize| match t % 512 {
            t if t < 200 => 2f64.powi(99 - t as i32),
            t if t < 400 => 2f64.powi(t as i32 - 299),
            _ => 2f64.powi(100),
        };
        let a: Vec<f32> = (0..2048).map(part).collect();
        check_cuts("underflows", &a, &[0.0; 2048], 2f32.powi(100), want);
    }

    #[test]
    fn factors_up_to_2_equal_the_recurrence_on_any_threads() {
        let near = [1.0, 0.0, 2.0, -2.0, 0.5, 1.3, -0.7, 0.1];
        on_threads(|_| {
            check::<f32>(&ScanProblem::new(1, 2100, 3), false, &near, 1e-5);
            check::<f32>(&ScanProblem::packed(2, vec![0, 5, 1500]), false, &near, 1e-5);
        });
    }

    #[test]
    fn a_factor_of_0_forgets_what_is_not_finite() {
        let a: Vec<f32> = (0..400).map(|t| if t == 200 { 0.0 } else { 2.0 }).collect();
        let x: Vec<f32> = (0..400).map(|t| if t > 250 { 0.0 } else { 1.0 }).collect();
        let problem = ScanProblem::new(1, 400, 1);
        let inputs = ScanInputs { gate: ScanGate::Linear(&a), x: &x, initial_state: None };
        let out = forward(&problem, &inputs).unwrap();
        assert_eq!((out.o[199], out.o[200], out.o[201]), (f32::INFINITY, 1.0, 3.0));
        let grads = backward(&problem, &inputs, &out.o, &x, None).unwrap();
        assert_eq!((grads.dx[200], grads.dx[199], grads.dx[198]), (2f32.powi(51) - 1.0, 1.0, 3.0));
    }

    #[test]
    fn steps_equal_the_scan() {
        let (batch, time, d) = (2, 9, 5);
        let mut noise = Noise::new(3);
        let g: Vec<f32> = noise.uniform(batch * time * d, -2.0, 0.0);
        let x: Vec<f32> = noise.uniform(batch * time * d, -1.0, 1.0);
        let problem = ScanProblem::new(batch, time, d);
        let inputs = ScanInputs { gate: ScanGate::Log(&g), x: &x, initial_state: None };
        let out = forward(&problem, &inputs).unwrap();
        let mut state = vec![0.0; batch * d];
        let at = |x: &[f32], t: usize| -> Vec<f32> {
            (0..batch).flat_map(|b| x[(b * time + t) * d..][..d].to_vec()).collect()
        };
        for t in 0..time {
            let o = step(batch, d, ScanGate::Log(&at(&g, t)), &at(&x, t), &mut state).unwrap();
            assert_eq!(o, at(&out.o, t));
        }
        assert_eq!(state, out.final_state);
    }

    #[test]
    fn names_the_bad_argument() {
        let problem = ScanProblem::new(1, 4, 2);
        let (g, x) = (vec![-0.5f32; 8], vec![1.0f32; 8]);
        let bad_x = ScanInputs { gate: ScanGate::Log(&g), x: &x[1..], initial_state: None };
        assert!(matches!(forward(&problem, &bad_x), Err(Error::Shape { argument: "x", .. })));
        let bad_state = ScanInputs { gate: ScanGate::Log(&g), x: &x, initial_state: Some(&[0.0; 3]) };
        assert!(matches!(forward(&problem, &bad_state), Err(Error::Shape { argument: "initial_state", .. })));
        for (found, log) in [(0.5, true), (f32::NAN, true), (f32::NAN, false)] {
            let mut g = g.clone();
            g[5] = found;
            let gate = if log { ScanGate::Log(&g[..]) } else { ScanGate::Linear(&g[..]) };
            let error = forward(&problem, &ScanInputs { gate, x: &x, initial_state: None }).unwrap_err();
            assert!(matches!(error, Error::Element { position: 5, .. }), "{error}");
        }
        let mut state = [0.25];
        assert!(step(1, 1, ScanGate::Log(&[1.0f32]), &[1.0], &mut state).is_err());
        assert_eq!(state, [0.25]);
        assert!(matches!(forward(&ScanProblem::packed(2, vec![0, 3, 3, 4]), &bad_x), Err(Error::Sequences { .. })));
    }
}
