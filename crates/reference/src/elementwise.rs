//! `h_t = a_t * h_{t-1} + b_t`, element by element: real and complex.

use crate::{Shape, or_zeros};

/// The factor of the previous state, `[batch, time, channels]`.
#[derive(Debug, Clone, Copy)]
pub enum Gate<'a> {
    /// `a` itself.
    Linear(&'a [f64]),
    /// `g` with `a = exp(g)`.
    Log(&'a [f64]),
}

impl Gate<'_> {
    fn factor(&self, at: usize) -> f64 {
        match self {
            Gate::Linear(a) => a[at],
            Gate::Log(g) => g[at].exp(),
        }
    }
}

/// All states and the last one of every sequence.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// `[batch, time, channels]`.
    pub h: Vec<f64>,
    /// `[sequences, channels]`.
    pub final_state: Vec<f64>,
}

/// Gradients of [`scan_forward`]'s inputs, shaped like them.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// Of `a` or of `g`, whichever was given.
    pub gate: Vec<f64>,
    /// Of `b`.
    pub b: Vec<f64>,
    /// `[sequences, channels]`, also when no initial state was given.
    pub initial_state: Vec<f64>,
}

/// The real scan from `initial_state` (zeros if absent).
pub fn scan_forward(shape: &Shape, gate: Gate<'_>, b: &[f64], initial_state: Option<&[f64]>) -> Outputs {
    let channels = shape.channels;
    let mut state = or_zeros(initial_state, shape.sequences().len() * channels);
    let mut h = vec![0.0; b.len()];
    for (n, tokens) in shape.sequences().into_iter().enumerate() {
        let state = &mut state[n * channels..][..channels];
        for t in tokens {
            for (d, state) in state.iter_mut().enumerate() {
                let at = t * channels + d;
                *state = gate.factor(at) * *state + b[at];
                h[at] = *state;
            }
        }
    }
    Outputs { h, final_state: state }
}

/// Adjoint of [`scan_forward`]: `delta_t = dh_t + a_{t+1} delta_{t+1}`, `db = delta`, `da_t = delta_t h_{t-1}`.
pub fn scan_backward(
    shape: &Shape,
    gate: Gate<'_>,
    b: &[f64],
    initial_state: Option<&[f64]>,
    dh: &[f64],
    d_final_state: Option<&[f64]>,
) -> Gradients {
    let channels = shape.channels;
    let sequences = shape.sequences();
    let first = or_zeros(initial_state, sequences.len() * channels);
    let h = scan_forward(shape, gate, b, initial_state).h;
    let mut delta = or_zeros(d_final_state, sequences.len() * channels);
    let (mut d_gate, mut db) = (vec![0.0; b.len()], vec![0.0; b.len()]);
    for (n, tokens) in sequences.into_iter().enumerate() {
        for d in 0..channels {
            let delta = &mut delta[n * channels + d];
            for t in tokens.clone().rev() {
                let at = t * channels + d;
                let before = if t == tokens.start { first[n * channels + d] } else { h[at - channels] };
                *delta += dh[at];
                db[at] = *delta;
                d_gate[at] = match gate {
                    Gate::Linear(_) => *delta * before,
                    Gate::Log(_) => *delta * before * gate.factor(at),
                };
                *delta *= gate.factor(at);
            }
        }
    }
    Gradients { gate: d_gate, b: db, initial_state: delta }
}

/// A complex tensor as two real planes of one shape.
#[derive(Debug, Clone, PartialEq)]
pub struct Planes {
    /// Real parts.
    pub re: Vec<f64>,
    /// Imaginary parts.
    pub im: Vec<f64>,
}

impl Planes {
    /// All zeros.
    pub fn zeros(len: usize) -> Self {
        Self { re: vec![0.0; len], im: vec![0.0; len] }
    }
}

/// `lambda = exp(log_a + i theta)`, each `[channels]` (constant over time) or `[batch, time, channels]`.
#[derive(Debug, Clone, Copy)]
pub struct Lambda<'a> {
    /// Log of the modulus.
    pub log_a: &'a [f64],
    /// Angle, in radians.
    pub theta: &'a [f64],
}

impl Lambda<'_> {
    fn at(&self, at: usize) -> (f64, f64) {
        let modulus = self.log_a[at % self.log_a.len()].exp();
        let (sin, cos) = self.theta[at % self.theta.len()].sin_cos();
        (modulus * cos, modulus * sin)
    }
}

/// Gradients of [`complex_forward`]'s inputs; real and imaginary parts count as separate real numbers.
#[derive(Debug, Clone)]
pub struct ComplexGradients {
    /// Shaped like `log_a`.
    pub log_a: Vec<f64>,
    /// Shaped like `theta`.
    pub theta: Vec<f64>,
    /// Shaped like `b`.
    pub b: Planes,
    /// `[sequences, channels]`.
    pub initial_state: Planes,
}

/// `h_t = lambda_t h_{t-1} + b_t`; returns all states and the final one, `[sequences, channels]`.
pub fn complex_forward(
    shape: &Shape,
    lambda: Lambda<'_>,
    b: &Planes,
    initial_state: Option<&Planes>,
) -> (Planes, Planes) {
    let channels = shape.channels;
    let sequences = shape.sequences();
    let mut state = initial_state.cloned().unwrap_or_else(|| Planes::zeros(sequences.len() * channels));
    let mut h = Planes::zeros(b.re.len());
    for (n, tokens) in sequences.into_iter().enumerate() {
        for t in tokens {
            for d in 0..channels {
                let (at, s) = (t * channels + d, n * channels + d);
                let (re, im) = lambda.at(at);
                let (x, y) = (state.re[s], state.im[s]);
                state.re[s] = re * x - im * y + b.re[at];
                state.im[s] = re * y + im * x + b.im[at];
                (h.re[at], h.im[at]) = (state.re[s], state.im[s]);
            }
        }
    }
    (h, state)
}

/// Adjoint of [`complex_forward`]: the state's cotangent is carried back by `conj(lambda)`.
pub fn complex_backward(
    shape: &Shape,
    lambda: Lambda<'_>,
    b: &Planes,
    initial_state: Option<&Planes>,
    dh: &Planes,
    d_final_state: Option<&Planes>,
) -> ComplexGradients {
    let channels = shape.channels;
    let sequences = shape.sequences();
    let zeros = || Planes::zeros(sequences.len() * channels);
    let first = initial_state.cloned().unwrap_or_else(zeros);
    let mut delta = d_final_state.cloned().unwrap_or_else(zeros);
    let (h, _) = complex_forward(shape, lambda, b, initial_state);
    let mut d_log_a = vec![0.0; lambda.log_a.len()];
    let mut d_theta = vec![0.0; lambda.theta.len()];
    let mut db = Planes::zeros(b.re.len());
    for (n, tokens) in sequences.iter().enumerate() {
        for t in tokens.clone().rev() {
            for d in 0..channels {
                let (at, s) = (t * channels + d, n * channels + d);
                let (x, y) = if t == tokens.start {
                    (first.re[s], first.im[s])
                } else {
                    (h.re[at - channels], h.im[at - channels])
                };
                let (u, w) = (delta.re[s] + dh.re[at], delta.im[s] + dh.im[at]);
                (db.re[at], db.im[at]) = (u, w);
                let (re, im) = lambda.at(at);
                // d lambda = delta conj(h_{t-1}), pulled back through d lambda / d log_a = lambda, / d theta = i lambda.
                let (d_re, d_im) = (u * x + w * y, w * x - u * y);
                d_log_a[at % lambda.log_a.len()] += d_re * re + d_im * im;
                d_theta[at % lambda.theta.len()] += d_im * re - d_re * im;
                (delta.re[s], delta.im[s]) = (re * u + im * w, re * w - im * u);
            }
        }
    }
    ComplexGradients { log_a: d_log_a, theta: d_theta, b: db, initial_state: delta }
}
