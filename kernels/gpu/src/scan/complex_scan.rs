//! The complex diagonal scan `h_t = lambda_t h_{t-1} + b_t` on a device, with `lambda = exp(log_a + i theta)`: forward,
//! backward and one step.
//!
//! The mirror of [`thalweg_kernels::complex_scan`], whose problem and planes it shares. `lambda` is not read back from the device,
//! so one that is out of range is not refused: it goes through the recurrence as it is. See `engine.rs` for what a cube
//! does.
//!
//! ```text
//! forward    h = lambda h + b
//! backward   u = do + c,   c = conj(lambda) u,   db = u,   dlambda = u conj(h_{t-1})
//!            dlog_a = Re(conj(dlambda) lambda),   dtheta = Re(conj(dlambda) i lambda)
//! ```
//!
//! `lambda` is formed from its logarithm on the way, backwards once more. Gradients of parameters that all tokens share
//! are summed over a sequence by its cube and then over sequences in order.

use cubecl::prelude::*;

use super::functions::{all, sin_cos};
use super::map::{ElementMap, Inputs, Outputs, Plan, numbers};
use super::{Buffer, CheckBuffers, Client, Error, Scan, ScanProblem, Sequences, total};
use thalweg_kernels::complex_scan::Complex;

/// The arguments of [`forward`]. All but the state have one element type.
#[derive(Debug, Clone, Copy)]
pub struct ComplexInputs<'a> {
    /// Log of the modulus of `lambda`, at most 0: `[channels]`, or `[batch, time, channels]`.
    pub log_a: &'a Buffer,
    /// Angle of `lambda` in radians, of any size: `[channels]`, or `[batch, time, channels]`.
    pub theta: &'a Buffer,
    /// What is added, `[batch, time, channels]`.
    pub b: Complex<&'a Buffer>,
    /// State before the first token, f32 `[sequences, channels]`; zero where absent.
    pub initial_state: Option<Complex<&'a Buffer>>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone)]
pub struct ComplexOutputs {
    /// The state after each token, `[batch, time, channels]`.
    pub o: Complex<Buffer>,
    /// The state after the last token, f32 `[sequences, channels]`.
    pub final_state: Complex<Buffer>,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone)]
pub struct ComplexGradients {
    /// Of `log_a`.
    pub dlog_a: Buffer,
    /// Of `theta`.
    pub dtheta: Buffer,
    /// Of `b`.
    pub db: Complex<Buffer>,
    /// Of the initial state, f32 `[sequences, channels]`.
    pub d_initial_state: Complex<Buffer>,
}

fn check(problem: &ScanProblem, inputs: &ComplexInputs) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    let storage = inputs.b.re.storage;
    for (name, x) in [("log_a", inputs.log_a), ("theta", inputs.theta)] {
        match x.len == problem.channels {
            true => x.check(name, storage, &[problem.channels])?,
            false => problem.check_buffer(name, x, storage)?,
        }
    }
    problem.check_buffer("b_re", inputs.b.re, storage)?;
    problem.check_buffer("b_im", inputs.b.im, storage)?;
    check_state(problem, &sequences, ["initial_state_re", "initial_state_im"], inputs.initial_state)?;
    Ok(sequences)
}

fn check_state(
    problem: &ScanProblem,
    sequences: &Sequences,
    [re, im]: [&'static str; 2],
    x: Option<Complex<&Buffer>>,
) -> Result<(), Error> {
    problem.check_state_buffer(re, sequences.count(), x.map(|x| x.re))?;
    problem.check_state_buffer(im, sequences.count(), x.map(|x| x.im))
}

fn planes(x: Option<Complex<&Buffer>>) -> Vec<&Buffer> {
    x.map_or(Vec::new(), |x| vec![x.re, x.im])
}

fn complex(mut x: Vec<Buffer>) -> Complex<Buffer> {
    let (im, re) = (x.remove(1), x.remove(0));
    Complex { re, im }
}

/// The scan of these inputs: forwards `inputs` are the planes of `b`, backwards those of `o` and of its cotangent.
fn scan<'a>(inputs: &ComplexInputs<'a>, tokens: Vec<&'a Buffer>, channels: usize, backward: bool) -> Scan<'a> {
    let mut tokens = tokens;
    let parameters = [inputs.log_a, inputs.theta];
    let constant = parameters.map(|x| x.len == channels && inputs.b.re.len != channels);
    let pick = |want: bool| (0..2).filter(move |&i| constant[i] == want).map(move |i| parameters[i]);
    tokens.extend(pick(false));
    let plan = Plan {
        planes: 2,
        backward,
        tokens: if backward { 4 } else { 8 },
        inputs: tokens.len(),
        kept: if backward { 6 } else { 4 },
        constants: 2,
        sums: if backward { pick(true).count() } else { 0 },
        forgets: false,
        grows: false,
        flags: constant,
        packed: false,
        units: 0,
    };
    Scan {
        inputs: tokens,
        constants: pick(true).collect(),
        parameters: Vec::new(),
        reset: None,
        initial: Vec::new(),
        before: Vec::new(),
        outputs: if backward { 2 + pick(false).count() } else { 2 },
        plan,
    }
}

/// `h_t = lambda_t h_{t-1} + b_t` over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length or element type, bad `cu_seqlens`, and more sequences and
/// channels than the device can launch.
pub fn forward(client: &Client, problem: &ScanProblem, inputs: &ComplexInputs) -> Result<ComplexOutputs, Error> {
    let sequences = check(problem, inputs)?;
    let scan = Scan {
        initial: planes(inputs.initial_state),
        ..scan(inputs, vec![inputs.b.re, inputs.b.im], problem.channels, false)
    };
    let done = scan.run::<Rotation>(client, problem, &sequences)?;
    Ok(ComplexOutputs { o: complex(done.outputs), final_state: complex(done.last) })
}

/// Gradients of everything that [`forward`] takes, given its output `o` and the cotangents of that output
/// (`[batch, time, channels]`) and of the final state (f32 `[sequences, channels]`, zero where absent).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &ScanProblem,
    inputs: &ComplexInputs,
    o: Complex<&Buffer>,
    do_: Complex<&Buffer>,
    d_final_state: Option<Complex<&Buffer>>,
) -> Result<ComplexGradients, Error> {
    let sequences = check(problem, inputs)?;
    let storage = inputs.b.re.storage;
    for (name, x) in [("o_re", o.re), ("o_im", o.im), ("do_re", do_.re), ("do_im", do_.im)] {
        problem.check_buffer(name, x, storage)?;
    }
    check_state(problem, &sequences, ["d_final_state_re", "d_final_state_im"], d_final_state)?;
    let scan = Scan {
        initial: planes(d_final_state),
        before: planes(inputs.initial_state),
        ..scan(inputs, vec![o.re, o.im, do_.re, do_.im], problem.channels, true)
    };
    let constant = scan.plan.flags;
    let mut done = scan.run::<Rotation>(client, problem, &sequences)?;
    let mut parameters = Vec::new();
    let mut rows = done.outputs.split_off(2).into_iter();
    let mut sums = done.sums.iter();
    for constant in constant {
        let next = if constant { sums.next() } else { None };
        parameters.extend(match next {
            Some(sums) => Some(total(client, sums, sequences.count(), problem.channels, storage)?),
            None => rows.next(),
        });
    }
    let parameters = complex(parameters);
    Ok(ComplexGradients {
        dlog_a: parameters.re,
        dtheta: parameters.im,
        db: complex(done.outputs),
        d_initial_state: complex(done.last),
    })
}

/// One token of `batch` sequences: `b` is `[batch, channels]`, `log_a` and `theta` are that or `[channels]`, the state is
/// f32 `[batch, channels]`. Returns the new state as an output `o` (rounded to the element type of `b`) and in f32.
///
/// # Errors
/// As [`forward`].
pub fn step(
    client: &Client,
    batch: usize,
    channels: usize,
    log_a: &Buffer,
    theta: &Buffer,
    b: Complex<&Buffer>,
    state: Complex<&Buffer>,
) -> Result<ComplexOutputs, Error> {
    let inputs = ComplexInputs { log_a, theta, b, initial_state: Some(state) };
    forward(client, &ScanProblem::new(batch, 1, channels), &inputs)
}

/// Reads the planes of `b` (forwards), then of `log_a` and `theta` those that have a row for each token.
/// `flags`: which of the two are constants. Constants: the parts of `lambda` as far as it is constant, and the modulus alone
/// where the angle is not.
struct Rotation;

#[cube]
impl ElementMap for Rotation {
    fn constants<W: Numeric, I: Float, N: Size>(
        inputs: &Inputs<W, I, N>,
        channel: usize,
        constants: &mut Array<Vector<f32, N>>,
        #[comptime] plan: Plan,
    ) {
        let mut modulus = all::<N>(1.0);
        if comptime!(plan.flags[0]) {
            modulus = Vector::<f32, N>::cast_from(inputs.constants[0][channel]).exp();
            constants[0] = modulus;
        }
        if comptime!(plan.flags[1]) {
            let theta = Vector::cast_from(inputs.constants[comptime!(plan.flags[0] as usize)][channel]);
            let (sin, cos) = sin_cos::<N>(theta);
            constants[0] = modulus * cos;
            constants[1] = modulus * sin;
        }
    }

    fn prepare<W: Numeric, I: Float, N: Size>(
        raw: &Array<W>,
        _resets: &Array<f32>,
        constants: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let (from, to) = comptime!((j * plan.inputs, j * plan.kept));
        // Backwards the two planes of the cotangent end where forwards those of `b` do, two rows later.
        let log_row = comptime!(from + if plan.backward { 4 } else { 2 });
        let angle_row = comptime!(log_row + !plan.flags[0] as usize);
        let (im, re) = if comptime!(plan.flags[1]) {
            (constants[1], constants[0])
        } else {
            sin_cos::<N>(numbers::<W, I, N>(raw[angle_row]))
        };
        let constant = comptime!(plan.flags[0] && plan.flags[1]);
        let modulus = if comptime!(plan.flags[0]) { constants[0] } else { numbers::<W, I, N>(raw[log_row]).exp() };
        let im = if comptime!(constant) { im } else { modulus * im };
        kept[to] = if comptime!(constant) { re } else { modulus * re };
        if comptime!(plan.backward) {
            kept[to + 1] = -im;
        } else {
            kept[to + 1] = im;
            kept[to + 2] = numbers::<W, I, N>(raw[from]);
            kept[to + 3] = numbers::<W, I, N>(raw[from + 1]);
        }
    }

    fn emit<I: Float, N: Size>(
        outputs: &mut Outputs<I, N>,
        at: usize,
        value: &Array<Vector<f32, N>>,
        _constants: &Array<Vector<f32, N>>,
        kept: &Array<Vector<f32, N>>,
        sums: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let (u, w) = (value[0], value[1]);
        outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(u);
        outputs.tokens.index_mut(1usize)[at] = Vector::cast_from(w);
        if comptime!(plan.backward) {
            let from = comptime!(j * plan.kept);
            let (re, im) = (kept[from], -kept[from + 1]);
            let (x, y) = (kept[from + 4], kept[from + 5]);
            let (d_re, d_im) = (u * x + w * y, w * x - u * y);
            let dlog_a = d_re * re + d_im * im;
            let dtheta = d_im * re - d_re * im;
            if comptime!(plan.flags[0]) {
                sums[0] += dlog_a;
            } else {
                outputs.tokens.index_mut(2usize)[at] = Vector::cast_from(dlog_a);
            }
            if comptime!(plan.flags[1]) {
                sums[comptime!(plan.flags[0] as usize)] += dtheta;
            } else {
                outputs.tokens.index_mut(comptime!(2 + !plan.flags[0] as usize))[at] = Vector::cast_from(dtheta);
            }
        }
    }
}
