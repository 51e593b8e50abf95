//! The complex diagonal scan `h_t = lambda_t h_{t-1} + b_t` with `lambda = exp(log_a + i theta)`.
//!
//! With constant `lambda` it is the recurrence of LRU (Orvieto et al. 2023, arXiv:2303.06349) and S5, with one per token
//! that of GateLoop (Katsch 2023, arXiv:2311.01927). Real and imaginary parts are separate planes, and count as
//! separate real numbers in gradients: with `u_t = do_t + conj(lambda_{t+1}) u_{t+1}`, `db_t = u_t` and
//! `dlambda_t = u_t conj(h_{t-1})`.

use crate::{channels::ScanProblem, element::Element, error::Error, native, sequences::Sequences};

/// Two planes of one shape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Complex<T> {
    /// Real parts.
    pub re: T,
    /// Imaginary parts.
    pub im: T,
}

impl<T> Complex<Vec<T>> {
    /// The planes as slices.
    pub fn as_slices(&self) -> Complex<&[T]> {
        Complex { re: &self.re, im: &self.im }
    }
}

/// The arguments of [`forward`].
#[derive(Debug, Clone, Copy)]
pub struct ComplexInputs<'a, E> {
    /// Log of the modulus of `lambda`, at most 0: `[channels]`, or `[batch, time, channels]`.
    pub log_a: &'a [E],
    /// Angle of `lambda` in radians, of any size: `[channels]`, or `[batch, time, channels]`.
    pub theta: &'a [E],
    /// What is added, `[batch, time, channels]`.
    pub b: Complex<&'a [E]>,
    /// State before the first token, `[sequences, channels]`; zero where absent.
    pub initial_state: Option<Complex<&'a [f32]>>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ComplexOutputs<E> {
    /// The state after each token, `[batch, time, channels]`.
    pub o: Complex<Vec<E>>,
    /// The state after the last token, `[sequences, channels]`.
    pub final_state: Complex<Vec<f32>>,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ComplexGradients<E> {
    /// Of `log_a`.
    pub dlog_a: Vec<E>,
    /// Of `theta`.
    pub dtheta: Vec<E>,
    /// Of `b`.
    pub db: Complex<Vec<E>>,
    /// Of the initial state, `[sequences, channels]`.
    pub d_initial_state: Complex<Vec<f32>>,
}

fn check<E: Element>(problem: &ScanProblem, inputs: &ComplexInputs<E>) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    for (name, x) in [("log_a", inputs.log_a), ("theta", inputs.theta)] {
        if x.len() != problem.channels {
            problem.check_tokens(name, x)?;
        }
    }
    check_planes(problem, ["b_re", "b_im"], inputs.b)?;
    check_state(problem, &sequences, ["initial_state_re", "initial_state_im"], inputs.initial_state)?;
    Ok(sequences)
}

fn check_planes<E>(p: &ScanProblem, [re, im]: [&'static str; 2], x: Complex<&[E]>) -> Result<(), Error> {
    p.check_tokens(re, x.re)?;
    p.check_tokens(im, x.im)
}

fn check_state(
    p: &ScanProblem,
    sequences: &Sequences,
    [re, im]: [&'static str; 2],
    x: Option<Complex<&[f32]>>,
) -> Result<(), Error> {
    p.check_state(re, sequences.count(), x.map(|x| x.re))?;
    p.check_state(im, sequences.count(), x.map(|x| x.im))
}

/// The error for the first `lambda` that is out of range; looked for only after a kernel has met one.
fn bad_lambda<E: Element>(inputs: &ComplexInputs<E>) -> Error {
    let allowed: [fn(f32) -> bool; 2] = [|x| x <= 0.0, |x| x.is_finite()];
    let expected = ["a natural-log decay, at most 0 and not NaN", "a finite angle"];
    let mut error = None;
    for (i, (argument, x)) in [("log_a", inputs.log_a), ("theta", inputs.theta)].into_iter().enumerate() {
        if let Some(position) = x.iter().position(|x| !allowed[i](x.to_f32())) {
            let found = x[position].to_f32();
            error.get_or_insert(Error::Element { argument, found, position, expected: expected[i] });
        }
    }
    // A kernel reports nothing that this search would not find.
    error.unwrap_or(Error::Value { argument: "lambda", found: "out of range".into(), expected: "|lambda| <= 1" })
}

/// `h_t = lambda_t h_{t-1} + b_t` over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length, bad `cu_seqlens`, a `log_a` that is positive or NaN and a
/// `theta` that is not finite.
///
/// # Example
/// ```
/// use thalweg_kernels::{ScanProblem, complex_scan::{self, Complex, ComplexInputs}};
/// // A quarter turn per token, without decay.
/// let inputs = ComplexInputs {
///     log_a: &[0.0f32],
///     theta: &[std::f32::consts::FRAC_PI_2],
///     b: Complex { re: &[1.0, 0.0, 0.0], im: &[0.0, 0.0, 0.0] },
///     initial_state: None,
/// };
/// let out = complex_scan::forward(&ScanProblem::new(1, 3, 1), &inputs).unwrap();
/// assert!((out.o.im[1] - 1.0).abs() < 1e-6 && (out.o.re[2] + 1.0).abs() < 1e-6);
/// ```
pub fn forward<E: Element>(problem: &ScanProblem, inputs: &ComplexInputs<E>) -> Result<ComplexOutputs<E>, Error> {
    let sequences = check(problem, inputs)?;
    native::complex_scan::forward(&sequences, problem.channels, inputs).ok_or_else(|| bad_lambda(inputs))
}

/// Gradients of everything that [`forward`] takes, given its output `o` and the cotangents of that output
/// (`[batch, time, channels]`) and of the final state (`[sequences, channels]`, zero where absent).
///
/// # Errors
/// [`Error`] for buffers of the wrong length. `lambda` is not examined again.
pub fn backward<E: Element>(
    problem: &ScanProblem,
    inputs: &ComplexInputs<E>,
    o: Complex<&[E]>,
    do_: Complex<&[E]>,
    d_final_state: Option<Complex<&[f32]>>,
) -> Result<ComplexGradients<E>, Error> {
    let sequences = check(problem, inputs)?;
    check_planes(problem, ["o_re", "o_im"], o)?;
    check_planes(problem, ["do_re", "do_im"], do_)?;
    check_state(problem, &sequences, ["d_final_state_re", "d_final_state_im"], d_final_state)?;
    Ok(native::complex_scan::backward(&sequences, problem.channels, inputs, o, do_, d_final_state))
}

/// One token of `batch` sequences: `b` is `[batch, channels]`, `log_a` and `theta` are that or `[channels]`; the state
/// (`[batch, channels]`) is updated in place, and the result is the new state rounded to `E`.
///
/// # Errors
/// As [`forward`]; the state is then unchanged.
pub fn step<E: Element>(
    batch: usize,
    channels: usize,
    log_a: &[E],
    theta: &[E],
    b: Complex<&[E]>,
    state: Complex<&mut [f32]>,
) -> Result<Complex<Vec<E>>, Error> {
    let initial_state = Some(Complex { re: &*state.re, im: &*state.im });
    let out = forward(&ScanProblem::new(batch, 1, channels), &ComplexInputs { log_a, theta, b, initial_state })?;
    state.re.copy_from_slice(&out.final_state.re);
    state.im.copy_from_slice(&out.final_state.im);
    Ok(out.o)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, shape_of, wide};
    use half::bf16;
    use thalweg_reference::elementwise as oracle;

    fn planes<E: Element>(x: &Complex<Vec<E>>) -> oracle::Planes {
        oracle::Planes { re: wide(&x.re), im: wide(&x.im) }
    }

    fn check<E: Element>(problem: &ScanProblem, gated: [bool; 2], log_as: &[f64], angle: f64, tolerance: f64) {
        let sequences = problem.sequences().unwrap();
        let (n, states) = (sequences.tokens() * problem.channels, sequences.count() * problem.channels);
        let mut noise = Noise::new(n as u64);
        let len = |gated| if gated { n } else { problem.channels };
        let log_a: Vec<E> = (0..len(gated[0]))
            .map(|_| E::from_f32(log_as[(noise.next() * log_as.len() as f64) as usize] as f32))
            .collect();
        let theta: Vec<E> = noise.uniform(len(gated[1]), -angle, angle);
        let b = Complex { re: noise.uniform::<E>(n, -1.0, 1.0), im: noise.uniform::<E>(n, -1.0, 1.0) };
        let d = Complex { re: noise.uniform::<E>(n, -1.0, 1.0), im: noise.uniform::<E>(n, -1.0, 1.0) };
        let h0 = Complex { re: noise.uniform::<f32>(states, -1.0, 1.0), im: noise.uniform::<f32>(states, -1.0, 1.0) };
        let dh = Complex { re: noise.uniform::<f32>(states, -1.0, 1.0), im: noise.uniform::<f32>(states, -1.0, 1.0) };
        let initial_state = Some(h0.as_slices());
        let inputs = ComplexInputs { log_a: &log_a, theta: &theta, b: b.as_slices(), initial_state };
        let out = forward(problem, &inputs).unwrap();
        let grads = backward(problem, &inputs, out.o.as_slices(), d.as_slices(), Some(dh.as_slices())).unwrap();

        let (log_a, theta) = (wide(&log_a), wide(&theta));
        let lambda = oracle::Lambda { log_a: &log_a, theta: &theta };
        let (shape, b, h0) = (shape_of(problem), planes(&b), planes(&h0));
        let (o, ht) = oracle::complex_forward(&shape, lambda, &b, Some(&h0));
        let want = oracle::complex_backward(&shape, lambda, &b, Some(&h0), &planes(&d), Some(&planes(&dh)));
        assert_close("o_re", &out.o.re, &o.re, tolerance);
        assert_close("o_im", &out.o.im, &o.im, tolerance);
        assert_close("final_state_re", &out.final_state.re, &ht.re, 1e-5);
        assert_close("final_state_im", &out.final_state.im, &ht.im, 1e-5);
        assert_close("dlog_a", &grads.dlog_a, &want.log_a, 10.0 * tolerance);
        assert_close("dtheta", &grads.dtheta, &want.theta, 10.0 * tolerance);
        assert_close("db_re", &grads.db.re, &want.b.re, tolerance);
        assert_close("db_im", &grads.db.im, &want.b.im, tolerance);
        assert_close("d_initial_state_re", &grads.d_initial_state.re, &want.initial_state.re, 1e-4);
        assert_close("d_initial_state_im", &grads.d_initial_state.im, &want.initial_state.im, 1e-4);
    }

    #[test]
    fn equals_the_oracle() {
        let extreme = [0.0, -1e-4, -0.3, -20.0, -80.0, -1e4, f64::NEG_INFINITY];
        for time in [1, 5, 63, 64, 65, 200] {
            for channels in [1, 9, 130] {
                let problem = ScanProblem::new(2, time, channels);
                for gated in [[true, true], [false, false], [false, true]] {
                    check::<f32>(&problem, gated, &[-0.02, -0.5, -0.1], 3.0, 1e-5);
                }
                check::<f32>(&problem, [true, true], &extreme, 3.0, 1e-5);
            }
        }
        for angle in [1e4, 1e7, 3e8, 3e38] {
            check::<f32>(&ScanProblem::new(1, 65, 20), [true, true], &[-0.1], angle, 1e-5);
            check::<f32>(&ScanProblem::new(1, 65, 20), [false, false], &[-0.1], angle, 1e-5);
        }
        check::<bf16>(&ScanProblem::new(1, 65, 20), [true, true], &[-0.5], 3.0, 1e-2);
        check::<f32>(&ScanProblem::packed(20, vec![0, 1, 7, 70, 200]), [false, false], &[-0.1], 3.0, 1e-5);
    }

    #[test]
    fn no_angle_makes_a_state_grow() {
        let theta = [1.0, 1e4, 10001.0, 1e7, 3e8, -3e8, 1e20, f32::MAX];
        let (n, time) = (theta.len(), 2000);
        let (zeros, ones) = (vec![0.0; time * n], vec![1.0f32; n]);
        let inputs = ComplexInputs {
            log_a: &zeros[..n],
            theta: &theta,
            b: Complex { re: &zeros, im: &zeros },
            initial_state: Some(Complex { re: &ones, im: &zeros[..n] }),
        };
        let out = forward(&ScanProblem::new(1, time, n), &inputs).unwrap();
        for (re, im) in out.o.re.iter().zip(&out.o.im) {
            assert!((re.hypot(*im) - 1.0).abs() < 2e-4, "{re} {im}");
        }
    }

    #[test]
    fn steps_equal_the_scan_and_bad_lambdas_are_named() {
        let (time, d) = (6, 3);
        let mut noise = Noise::new(5);
        let mut next = |n| noise.uniform::<f32>(n, -1.0, 0.0);
        let (log_a, theta, re, im) = (next(d), next(d), next(time * d), next(time * d));
        let problem = ScanProblem::new(1, time, d);
        let b = Complex { re: &re[..], im: &im[..] };
        let inputs = ComplexInputs { log_a: &log_a, theta: &theta, b, initial_state: None };
        let whole = forward(&problem, &inputs).unwrap();
        let (mut re, mut im) = (vec![0.0; d], vec![0.0; d]);
        for t in 0..time {
            let range = t * d..(t + 1) * d;
            let b = Complex { re: &b.re[range.clone()], im: &b.im[range.clone()] };
            let o = step(1, d, &log_a, &theta, b, Complex { re: &mut re, im: &mut im }).unwrap();
            assert_eq!((&o.re[..], &o.im[..]), (&whole.o.re[range.clone()], &whole.o.im[range]));
        }
        let name = |inputs: ComplexInputs<f32>| match forward(&problem, &inputs) {
            Err(Error::Element { argument, position: 1, .. } | Error::Shape { argument, .. }) => argument,
            other => panic!("{other:?}"),
        };
        assert_eq!(name(ComplexInputs { log_a: &[0.0, 0.1, 0.0], ..inputs }), "log_a");
        assert_eq!(name(ComplexInputs { theta: &[0.0, f32::INFINITY, 0.0], ..inputs }), "theta");
        assert_eq!(name(ComplexInputs { theta: &[0.0; 2], ..inputs }), "theta");
    }
}
