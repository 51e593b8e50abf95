//! HGRN (Qin et al. 2023, arXiv:2311.04823) on a device, from the logits of its gates: the bounded forget gate, what it
//! leaves for the input, the input's SiLU and the scan in one pass over memory; forward, backward and one step.
//!
//! For callers who have the log of the gate already, HGRN is the log form of [`super::elementwise_scan`]. See
//! `engine.rs` for what a cube does.
//!
//! ```text
//! w = (1 - lb) sigmoid(-forget_gate)           (1 - f: exact for gates near 1)
//! forward    f = 1 - w,   h = f h + w silu(x)
//! backward   u = do + c,   c = f u,   dx = u w silu'(x),   dw = u (silu(x) - h_{t-1})
//!            d forget_gate = -dw w sigmoid(forget_gate),   d lb = -sum dw sigmoid(-forget_gate)
//! ```
//!
//! Backwards the gate is formed again from its logits. The gradient of `lb` is summed over a sequence by its cube and
//! then over sequences in order.

use cubecl::prelude::*;

use super::functions::{all, bounded, sigmoid};
use super::map::{ElementMap, Inputs, Outputs, Plan, numbers};
use super::{Buffer, Client, Error, Scan, ScanProblem, Sequences, Storage, total};

/// The arguments of [`forward`]. `x` and the gate have one element type.
#[derive(Debug, Clone, Copy)]
pub struct HgrnInputs<'a> {
    /// The input before its SiLU, `[batch, time, channels]`.
    pub x: &'a Buffer,
    /// Logits of the forget gate, `[batch, time, channels]`.
    pub forget_gate: &'a Buffer,
    /// Lower bound of the forget gate, f32 `[channels]`, from 0 up to but not 1; 0 where absent.
    pub lower_bound: Option<&'a Buffer>,
    /// State before the first token, f32 `[sequences, channels]`; zero where absent.
    pub initial_state: Option<&'a Buffer>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone)]
pub struct HgrnOutputs {
    /// The state after each token, `[batch, time, channels]`, in the element type of `x`.
    pub o: Buffer,
    /// The state after the last token, f32 `[sequences, channels]`.
    pub final_state: Buffer,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone)]
pub struct HgrnGradients {
    /// Of `x`.
    pub dx: Buffer,
    /// Of `forget_gate`.
    pub d_forget_gate: Buffer,
    /// Of `lower_bound`, f32; absent where that is.
    pub d_lower_bound: Option<Buffer>,
    /// Of the initial state, f32 `[sequences, channels]`.
    pub d_initial_state: Buffer,
}

fn check(problem: &ScanProblem, inputs: &HgrnInputs) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    problem.check_buffer("x", inputs.x, inputs.x.storage)?;
    problem.check_buffer("forget_gate", inputs.forget_gate, inputs.x.storage)?;
    if let Some(bound) = inputs.lower_bound {
        bound.check("lower_bound", Storage::F32, &[problem.channels])?;
    }
    problem.check_state_buffer("initial_state", sequences.count(), inputs.initial_state)?;
    Ok(sequences)
}

/// The scan of these inputs: backwards, `tokens` are `o` and its cotangent.
fn scan<'a>(inputs: &HgrnInputs<'a>, mut tokens: Vec<&'a Buffer>, backward: bool) -> Scan<'a> {
    tokens.extend([inputs.x, inputs.forget_gate]);
    let bounded = inputs.lower_bound.is_some();
    let plan = Plan {
        planes: 1,
        backward,
        tokens: if backward { 4 } else { 8 },
        inputs: tokens.len(),
        kept: if backward { 5 } else { 2 },
        constants: 1,
        sums: (backward && bounded) as usize,
        forgets: true,
        flags: [bounded, false],
        packed: false,
        units: 0,
    };
    Scan {
        inputs: tokens,
        constants: Vec::new(),
        parameters: inputs.lower_bound.into_iter().collect(),
        reset: None,
        initial: Vec::new(),
        before: Vec::new(),
        outputs: if backward { 2 } else { 1 },
        plan,
    }
}

/// The layer's recurrence over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length or element type, bad `cu_seqlens`, and more sequences and
/// channels than the device can launch.
pub fn forward(client: &Client, problem: &ScanProblem, inputs: &HgrnInputs) -> Result<HgrnOutputs, Error> {
    let sequences = check(problem, inputs)?;
    let scan = Scan { initial: inputs.initial_state.into_iter().collect(), ..scan(inputs, Vec::new(), false) };
    let mut done = scan.run::<Forget>(client, problem, &sequences)?;
    Ok(HgrnOutputs { o: done.outputs.remove(0), final_state: done.last.remove(0) })
}

/// Gradients of everything that [`forward`] takes, given its output `o` and the cotangents of that output
/// (`[batch, time, channels]`) and of the final state (f32 `[sequences, channels]`, zero where absent).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &ScanProblem,
    inputs: &HgrnInputs,
    o: &Buffer,
    do_: &Buffer,
    d_final_state: Option<&Buffer>,
) -> Result<HgrnGradients, Error> {
    let sequences = check(problem, inputs)?;
    problem.check_buffer("o", o, inputs.x.storage)?;
    problem.check_buffer("do", do_, inputs.x.storage)?;
    problem.check_state_buffer("d_final_state", sequences.count(), d_final_state)?;
    let scan = Scan {
        initial: d_final_state.into_iter().collect(),
        before: inputs.initial_state.into_iter().collect(),
        ..scan(inputs, vec![o, do_], true)
    };
    let mut done = scan.run::<Forget>(client, problem, &sequences)?;
    let sums = done.sums.first();
    let d_lower_bound =
        sums.map(|sums| total(client, sums, sequences.count(), problem.channels, Storage::F32)).transpose()?;
    let (d_forget_gate, dx) = (done.outputs.remove(1), done.outputs.remove(0));
    Ok(HgrnGradients { dx, d_forget_gate, d_lower_bound, d_initial_state: done.last.remove(0) })
}

/// One token of `batch` sequences: `x` and the gate are `[batch, channels]`, `state` is f32 `[batch, channels]`. Returns
/// the new state as an output `o` (rounded to the element type of `x`) and in f32.
///
/// # Errors
/// As [`forward`].
pub fn step(
    client: &Client,
    batch: usize,
    channels: usize,
    x: &Buffer,
    forget_gate: &Buffer,
    lower_bound: Option<&Buffer>,
    state: &Buffer,
) -> Result<HgrnOutputs, Error> {
    let inputs = HgrnInputs { x, forget_gate, lower_bound, initial_state: Some(state) };
    forward(client, &ScanProblem::new(batch, 1, channels), &inputs)
}

/// Reads `x` and the logits. `flags[0]`: there is a lower bound. Constant: `1 - lb`.
struct Forget;

#[cube]
impl ElementMap for Forget {
    fn constants<W: Numeric, I: Float, N: Size>(
        inputs: &Inputs<W, I, N>,
        channel: usize,
        constants: &mut Array<Vector<f32, N>>,
        #[comptime] plan: Plan,
    ) {
        let one = all::<N>(1.0);
        constants[0] = if comptime!(plan.flags[0]) { one - inputs.parameters[0][channel] } else { one };
    }

    fn prepare<W: Numeric, I: Float, N: Size>(
        raw: &Array<W>,
        _resets: &Array<f32>,
        constants: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let (from, to) = comptime!((j * plan.inputs + plan.first(), j * plan.kept));
        let x = numbers::<W, I, N>(raw[from]);
        let logits = numbers::<W, I, N>(raw[from + 1]);
        let rest = constants[0] * sigmoid::<N>(-logits);
        kept[to] = all::<N>(1.0) - rest;
        if comptime!(plan.backward) {
            kept[to + 3] = x;
            kept[to + 4] = logits;
        } else {
            kept[to + 1] = rest * bounded::<N>(x, true, false) * sigmoid::<N>(x);
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
            let (before, x, logits) = (kept[from + 2], kept[from + 3], kept[from + 4]);
            let one = all::<N>(1.0);
            let (gate, left, right) = (sigmoid::<N>(logits), sigmoid::<N>(-logits), sigmoid::<N>(x));
            let rest = constants[0] * left;
            let d_rest = u * (bounded::<N>(x, true, false) * right - before);
            outputs.tokens.index_mut(0usize)[at] =
                Vector::cast_from(u * rest * (right + bounded::<N>(x, true, true) * right * (one - right)));
            outputs.tokens.index_mut(1usize)[at] = Vector::cast_from(-d_rest * rest * gate);
            if comptime!(plan.flags[0]) {
                sums[0] -= d_rest * left;
            }
        } else {
            outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(u);
        }
    }
}
