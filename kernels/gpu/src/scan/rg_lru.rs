//! The real-gated linear recurrent unit of Griffin on a device: both sigmoids, the decay, the input's factor, the reset
//! and the scan in one pass over memory; forward, backward and one step.
//!
//! The mirror of [`thalweg_kernels::rg_lru`], whose problem it shares. Gates are not read back from the device, so a NaN is not
//! refused: it goes through the recurrence. See `engine.rs` for what a cube does.
//!
//! ```text
//! r = sigmoid(recurrent_gate),   i = sigmoid(input_gate),   log a = -8 r softplus(a_param),   -inf at a reset
//! forward    h = a h + sqrt(1 - a^2) i x
//! backward   u = do + c,   c = a u,   dx = u sqrt(1 - a^2) i,   d input_gate = dx x (1 - i)
//!            dlog_a = a (u h_{t-1} - a u i x / sqrt(max(1 - a^2, 1e-6 / 4)))
//!            d recurrent_gate = log_a (1 - r) dlog_a,   d a_param = sum -8 r sigmoid(a_param) dlog_a
//! ```
//!
//! `1 - a^2` is `-m (2 + m)` with `m = a - 1 = expm1(log a)`. Backwards the gates are formed again from their logits. The gradient of `a_param` is
//! summed over a sequence by its cube and then over sequences in order.

use cubecl::prelude::*;

use super::functions::{all, exp, expm1, inverse_root, root, sigmoid, softplus};
use super::map::{ElementMap, Inputs, Outputs, Plan, numbers};
use super::{Buffer, CheckBuffers, Client, Error, Scan, ScanProblem, Sequences, Storage, total};

/// The arguments of [`forward`]. `x` and the gates have one element type.
#[derive(Debug, Clone, Copy)]
pub struct RgLruInputs<'a> {
    /// `[batch, time, channels]`.
    pub x: &'a Buffer,
    /// Logits of the recurrence gate, `[batch, time, channels]`.
    pub recurrent_gate: &'a Buffer,
    /// Logits of the input gate, `[batch, time, channels]`.
    pub input_gate: &'a Buffer,
    /// The parameter of the decay, f32 `[channels]`.
    pub a_param: &'a Buffer,
    /// Where documents begin, f32 `[batch, time]`: 1 there and 0 elsewhere; nowhere if absent.
    pub reset: Option<&'a Buffer>,
    /// State before the first token, f32 `[sequences, channels]`; zero where absent.
    pub initial_state: Option<&'a Buffer>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone)]
pub struct RgLruOutputs {
    /// The state after each token, `[batch, time, channels]`, in the element type of `x`.
    pub o: Buffer,
    /// The state after the last token, f32 `[sequences, channels]`.
    pub final_state: Buffer,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone)]
pub struct RgLruGradients {
    /// Of `x`.
    pub dx: Buffer,
    /// Of `recurrent_gate`.
    pub d_recurrent_gate: Buffer,
    /// Of `input_gate`.
    pub d_input_gate: Buffer,
    /// Of `a_param`, f32.
    pub d_a_param: Buffer,
    /// Of the initial state, f32 `[sequences, channels]`.
    pub d_initial_state: Buffer,
}

fn check(problem: &ScanProblem, inputs: &RgLruInputs) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    let storage = inputs.x.storage;
    problem.check_buffer("x", inputs.x, storage)?;
    problem.check_buffer("recurrent_gate", inputs.recurrent_gate, storage)?;
    problem.check_buffer("input_gate", inputs.input_gate, storage)?;
    inputs.a_param.check("a_param", Storage::F32, &[problem.channels])?;
    if let Some(reset) = inputs.reset {
        reset.check("reset", Storage::F32, &[problem.batch, problem.time])?;
    }
    problem.check_state_buffer("initial_state", sequences.count(), inputs.initial_state)?;
    Ok(sequences)
}

/// The scan of these inputs: backwards, `tokens` are `o` and its cotangent.
fn scan<'a>(inputs: &RgLruInputs<'a>, mut tokens: Vec<&'a Buffer>, backward: bool) -> Scan<'a> {
    tokens.extend([inputs.x, inputs.recurrent_gate, inputs.input_gate]);
    let plan = Plan {
        planes: 1,
        backward,
        tokens: if backward { 4 } else { 8 },
        inputs: tokens.len(),
        kept: if backward { 6 } else { 2 },
        constants: 2,
        sums: backward as usize,
        forgets: inputs.reset.is_some(),
        grows: false,
        flags: [inputs.reset.is_some(), false],
        packed: false,
        units: 0,
    };
    Scan {
        inputs: tokens,
        constants: Vec::new(),
        parameters: vec![inputs.a_param],
        reset: inputs.reset,
        initial: Vec::new(),
        before: Vec::new(),
        outputs: if backward { 3 } else { 1 },
        plan,
    }
}

/// The unit over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length or element type, bad `cu_seqlens`, and more sequences and
/// channels than the device can launch.
pub fn forward(client: &Client, problem: &ScanProblem, inputs: &RgLruInputs) -> Result<RgLruOutputs, Error> {
    let sequences = check(problem, inputs)?;
    let scan = Scan { initial: inputs.initial_state.into_iter().collect(), ..scan(inputs, Vec::new(), false) };
    let mut done = scan.run::<RealGated>(client, problem, &sequences)?;
    Ok(RgLruOutputs { o: done.outputs.remove(0), final_state: done.last.remove(0) })
}

/// Gradients of everything that [`forward`] takes, given its output `o` and the cotangents of that output
/// (`[batch, time, channels]`) and of the final state (f32 `[sequences, channels]`, zero where absent).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &ScanProblem,
    inputs: &RgLruInputs,
    o: &Buffer,
    do_: &Buffer,
    d_final_state: Option<&Buffer>,
) -> Result<RgLruGradients, Error> {
    let sequences = check(problem, inputs)?;
    problem.check_buffer("o", o, inputs.x.storage)?;
    problem.check_buffer("do", do_, inputs.x.storage)?;
    problem.check_state_buffer("d_final_state", sequences.count(), d_final_state)?;
    let scan = Scan {
        initial: d_final_state.into_iter().collect(),
        before: inputs.initial_state.into_iter().collect(),
        ..scan(inputs, vec![o, do_], true)
    };
    let mut done = scan.run::<RealGated>(client, problem, &sequences)?;
    let d_a_param = total(client, &done.sums[0], sequences.count(), problem.channels, Storage::F32)?;
    let (d_input_gate, d_recurrent_gate) = (done.outputs.remove(2), done.outputs.remove(1));
    Ok(RgLruGradients {
        dx: done.outputs.remove(0),
        d_recurrent_gate,
        d_input_gate,
        d_a_param,
        d_initial_state: done.last.remove(0),
    })
}

/// One token of `batch` sequences: `x` and the gates are `[batch, channels]`, `reset` is f32 `[batch]`, `state` is f32
/// `[batch, channels]`. Returns the new state as an output `o` (rounded to the element type of `x`) and in f32.
///
/// # Errors
/// As [`forward`].
pub fn step(
    client: &Client,
    batch: usize,
    x: &Buffer,
    recurrent_gate: &Buffer,
    input_gate: &Buffer,
    a_param: &Buffer,
    reset: Option<&Buffer>,
    state: &Buffer,
) -> Result<RgLruOutputs, Error> {
    let inputs = RgLruInputs { x, recurrent_gate, input_gate, a_param, reset, initial_state: Some(state) };
    forward(client, &ScanProblem::new(batch, 1, a_param.len), &inputs)
}

/// `1 - a^2` from `a` and its logarithm, for tensors of `I`.
#[cube]
fn rest<I: Float, N: Size>(log_a: Vector<f32, N>, a: Vector<f32, N>) -> Vector<f32, N> {
    let size = I::size().comptime();
    let m = expm1::<N>(log_a, a, comptime!(size < 4));
    -m * (all::<N>(2.0) + m)
}

/// Reads `x` and the two logits. `flags[0]`: there are resets. Constants: `-8 softplus(a_param)` and its derivative.
struct RealGated;

#[cube]
impl ElementMap for RealGated {
    fn constants<W: Numeric, I: Float, N: Size>(
        inputs: &Inputs<W, I, N>,
        channel: usize,
        constants: &mut Array<Vector<f32, N>>,
        #[comptime] _plan: Plan,
    ) {
        let a_param = inputs.parameters[0][channel];
        constants[0] = all::<N>(-8.0) * softplus::<N>(a_param);
        constants[1] = all::<N>(-8.0) * sigmoid::<N>(a_param);
    }

    fn prepare<W: Numeric, I: Float, N: Size>(
        raw: &Array<W>,
        resets: &Array<f32>,
        constants: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let (from, to) = comptime!((j * plan.inputs + plan.first(), j * plan.kept));
        let x = numbers::<W, I, N>(raw[from]);
        let r = sigmoid::<N>(numbers::<W, I, N>(raw[from + 1]));
        let gate = sigmoid::<N>(numbers::<W, I, N>(raw[from + 2]));
        let mut log_a = constants[0] * r;
        if comptime!(plan.flags[0]) {
            if resets[j] != f32::new(0.0) {
                // Far below the logarithm of the smallest f32: `a` is 0 and `1 - a^2` is 1, exactly.
                log_a = all::<N>(-1e4);
            }
        }
        let a = exp::<N>(log_a);
        kept[to] = a;
        if comptime!(plan.backward) {
            kept[to + 3] = x;
            kept[to + 4] = r;
            kept[to + 5] = gate;
        } else {
            kept[to + 1] = root::<N>(rest::<I, N>(log_a, a)) * gate * x;
        }
    }

    fn emit<I: Float, N: Size>(
        outputs: &mut Outputs<I, N>,
        at: usize,
        value: &Array<Vector<f32, N>>,
        constants: &Array<Vector<f32, N>>,
        kept: &Array<Vector<f32, N>>,
        sums: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let u = value[0];
        if comptime!(plan.backward) {
            let from = comptime!(j * plan.kept);
            let (a, before, x) = (kept[from], kept[from + 2], kept[from + 3]);
            let (r, gate) = (kept[from + 4], kept[from + 5]);
            let (zero, one) = (all::<N>(0.0), all::<N>(1.0));
            // At a reset, or where the decay has underflowed.
            let cut = a.equal(&zero);
            let rest = select_many(cut, one, rest::<I, N>(constants[0] * r, a));
            let dx = u * root::<N>(rest) * gate;
            // The derivative of the square root is bounded by 1000.
            let square = all::<N>(4.0) * rest;
            let bound = all::<N>(1e-6);
            let slope = inverse_root::<N>(select_many(square.greater_than(&bound), square, bound));
            let d_rest = u * gate * x * slope;
            let d_log_a = select_many(cut, zero, a * (u * before - all::<N>(2.0) * d_rest * a));
            sums[0] += constants[1] * r * d_log_a;
            outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(dx);
            outputs.tokens.index_mut(1usize)[at] = Vector::cast_from(constants[0] * r * (one - r) * d_log_a);
            outputs.tokens.index_mut(2usize)[at] = Vector::cast_from(dx * x * (one - gate));
        } else {
            outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(u);
        }
    }
}
