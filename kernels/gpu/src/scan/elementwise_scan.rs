//! The element-wise linear scan `h_t = a_t h_{t-1} + x_t` on a device: forward, backward and one step.
//!
//! The mirror of [`thalweg_kernels::elementwise_scan`], whose problem it shares; HGRN is its log-gate form. Gates are not read
//! back from the device, so those that are out of range are not refused: a NaN or a positive log-decay goes through the
//! recurrence as it is. See `engine.rs` for what a cube does.
//!
//! ```text
//! forward    a = gate or exp(gate),   h = a h + x
//! backward   u = do + c,   c = a u,   dx = u,   dgate = u h_{t-1} (linear) or c h_{t-1} (log)
//! ```

use cubecl::prelude::*;

use super::map::{ElementMap, Inputs, Outputs, Plan, numbers};
use super::{Buffer, CheckBuffers, Client, Error, Scan, ScanProblem, Sequences};

pub use thalweg_kernels::elementwise_scan::ScanGate;

/// The gate's name in messages, its tensor, and whether it is a logarithm.
fn parts<'a>(gate: &ScanGate<&'a Buffer>) -> (&'static str, &'a Buffer, bool) {
    match *gate {
        ScanGate::Linear(a) => ("a", a, false),
        ScanGate::Log(g) => ("g", g, true),
    }
}

/// The arguments of [`forward`]. The gate has the element type of `x`.
#[derive(Debug, Clone, Copy)]
pub struct ScanInputs<'a> {
    /// Decay, `[batch, time, channels]`.
    pub gate: ScanGate<&'a Buffer>,
    /// What is added, `[batch, time, channels]`.
    pub x: &'a Buffer,
    /// State before the first token, f32 `[sequences, channels]`; zero where absent.
    pub initial_state: Option<&'a Buffer>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone)]
pub struct ScanOutputs {
    /// The state after each token, `[batch, time, channels]`, in the element type of `x`.
    pub o: Buffer,
    /// The state after the last token, f32 `[sequences, channels]`.
    pub final_state: Buffer,
}

/// What [`backward`] returns.
#[derive(Debug, Clone)]
pub struct ScanGradients {
    /// Gradient of the gate as it was given: of `a` or of `g`.
    pub dgate: Buffer,
    /// Gradient of `x`.
    pub dx: Buffer,
    /// Gradient of the initial state, f32 `[sequences, channels]`.
    pub d_initial_state: Buffer,
}

fn check(problem: &ScanProblem, inputs: &ScanInputs) -> Result<Sequences, Error> {
    let sequences = problem.sequences()?;
    let (name, gate, _) = parts(&inputs.gate);
    problem.check_buffer("x", inputs.x, inputs.x.storage)?;
    problem.check_buffer(name, gate, inputs.x.storage)?;
    problem.check_state_buffer("initial_state", sequences.count(), inputs.initial_state)?;
    Ok(sequences)
}

fn plan(backward: bool, log: bool) -> Plan {
    let (tokens, inputs, kept) = if backward { (4, 3, 3) } else { (8, 2, 2) };
    let flags = [log, false];
    Plan {
        planes: 1,
        backward,
        tokens,
        inputs,
        kept,
        constants: 0,
        sums: 0,
        forgets: true,
        grows: !log,
        flags,
        packed: false,
        units: 0,
    }
}

/// `h_t = a_t h_{t-1} + x_t` over every sequence and channel; the state is f32 throughout.
///
/// # Errors
/// [`Error`] for sizes of zero, buffers of the wrong length or element type, bad `cu_seqlens`, and more sequences and
/// channels than the device can launch.
pub fn forward(client: &Client, problem: &ScanProblem, inputs: &ScanInputs) -> Result<ScanOutputs, Error> {
    let sequences = check(problem, inputs)?;
    let (_, gate, log) = parts(&inputs.gate);
    let scan = Scan {
        inputs: vec![gate, inputs.x],
        constants: Vec::new(),
        parameters: Vec::new(),
        reset: None,
        initial: inputs.initial_state.into_iter().collect(),
        before: Vec::new(),
        outputs: 1,
        plan: plan(false, log),
    };
    let mut done = scan.run::<Linear>(client, problem, &sequences)?;
    Ok(ScanOutputs { o: done.outputs.remove(0), final_state: done.last.remove(0) })
}

/// Gradients of everything that [`forward`] takes, given its output `o`, the cotangent `do_` of that output
/// (`[batch, time, channels]`) and the cotangent of the final state (f32 `[sequences, channels]`, zero where absent).
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &ScanProblem,
    inputs: &ScanInputs,
    o: &Buffer,
    do_: &Buffer,
    d_final_state: Option<&Buffer>,
) -> Result<ScanGradients, Error> {
    let sequences = check(problem, inputs)?;
    problem.check_buffer("o", o, inputs.x.storage)?;
    problem.check_buffer("do", do_, inputs.x.storage)?;
    problem.check_state_buffer("d_final_state", sequences.count(), d_final_state)?;
    let (_, gate, log) = parts(&inputs.gate);
    let scan = Scan {
        inputs: vec![o, do_, gate],
        constants: Vec::new(),
        parameters: Vec::new(),
        reset: None,
        initial: d_final_state.into_iter().collect(),
        before: inputs.initial_state.into_iter().collect(),
        outputs: 2,
        plan: plan(true, log),
    };
    let mut done = scan.run::<Linear>(client, problem, &sequences)?;
    let (dx, dgate) = (done.outputs.remove(1), done.outputs.remove(0));
    Ok(ScanGradients { dgate, dx, d_initial_state: done.last.remove(0) })
}

/// One token of `batch` sequences: gate and `x` are `[batch, channels]`, `state` is f32 `[batch, channels]`. Returns the
/// new state as an output `o` (rounded to the element type of `x`) and in f32.
///
/// # Errors
/// As [`forward`].
pub fn step(
    client: &Client,
    batch: usize,
    channels: usize,
    gate: ScanGate<&Buffer>,
    x: &Buffer,
    state: &Buffer,
) -> Result<ScanOutputs, Error> {
    let inputs = ScanInputs { gate, x, initial_state: Some(state) };
    forward(client, &ScanProblem::new(batch, 1, channels), &inputs)
}

/// Forwards it reads the gate and `x`, backwards the gate. `flags[0]`: the gate is a logarithm.
struct Linear;

#[cube]
impl ElementMap for Linear {
    fn constants<W: Numeric, I: Float, N: Size>(
        _inputs: &Inputs<W, I, N>,
        _channel: usize,
        _constants: &mut Array<Vector<f32, N>>,
        #[comptime] _plan: Plan,
    ) {
    }

    fn prepare<W: Numeric, I: Float, N: Size>(
        raw: &Array<W>,
        _resets: &Array<f32>,
        _constants: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        let (from, to) = comptime!((j * plan.inputs + plan.first(), j * plan.kept));
        let gate = numbers::<W, I, N>(raw[from]);
        kept[to] = if comptime!(plan.flags[0]) { gate.exp() } else { gate };
        if comptime!(!plan.backward) {
            kept[to + 1] = numbers::<W, I, N>(raw[from + 1]);
        }
    }

    fn emit<I: Float, N: Size>(
        outputs: &mut Outputs<I, N>,
        at: usize,
        value: &Array<Vector<f32, N>>,
        _constants: &Array<Vector<f32, N>>,
        kept: &Array<Vector<f32, N>>,
        _sums: &mut Array<Vector<f32, N>>,
        #[comptime] j: usize,
        #[comptime] plan: Plan,
    ) {
        if comptime!(plan.backward) {
            let (a, before) = (kept[j * plan.kept], kept[j * plan.kept + 2]);
            let flow = if comptime!(plan.flags[0]) { a * value[0] } else { value[0] };
            outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(flow * before);
            outputs.tokens.index_mut(1usize)[at] = Vector::cast_from(value[0]);
        } else {
            outputs.tokens.index_mut(0usize)[at] = Vector::cast_from(value[0]);
        }
    }
}
