//! The low-rank write, as the delta rule of two tokens for each one, whose reading keys are tensors of their own:
//!
//! ```text
//! S_t = Diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T
//!
//!               gate   reads with   writes along   value   query
//! token 2t      g_t      - a_t          b_t          0       0
//! token 2t + 1   0         0            k_t         v_t     q_t
//! ```
//! What a token of the delta rule writes is its value less what it reads, here `a_t^T S_{t-1}` from the state before any gate
//! of `t`, and then `v_t`. Step sizes are 1. A gate of another kind is written out for each key feature, the one kind for
//! which keys that read have kernels.

use crate::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use super::launch::Launch;
use super::{Gate, Gradients, Inputs, Outputs, Write, validate};
use crate::buffer::{Buffer, Storage};
use crate::device::{address_type, grid, vector};
use crate::reduce::{sum_all_rows, sum_rows};
use thalweg_kernels::Error;
use thalweg_kernels::matrix::MatrixProblem;

const UNITS: usize = 256;

/// `out[2 t] = factor even[t]` and `out[2 t + 1] = odd[t]`, rows of `width` vectors; zero where a tensor is not `there`.
#[cube(launch, address_type = "dynamic")]
fn interleave_kernel<I: Float, N: Size>(
    even: &[Vector<I, N>],
    odd: &[Vector<I, N>],
    out: &mut [Vector<I, N>],
    width: usize,
    factor: f32,
    #[comptime] there: [bool; 2],
    #[define(I)] _storage: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= out.len() {
        terminate!();
    }
    let (row, col) = (at / width, at % width);
    let from = row / 2 * width + col;
    let mut value = Vector::<I, N>::new(I::new(0.0));
    if row % 2 < 1 {
        if comptime!(there[0]) {
            value = even[from] * Vector::new(I::cast_from(factor));
        }
    } else if comptime!(there[1]) {
        value = odd[from];
    }
    out[at] = value;
}

/// `out[t] = factor x[2 t + odd]`, rows of `width` vectors.
#[cube(launch, address_type = "dynamic")]
fn every_other_kernel<I: Float, N: Size>(
    x: &[Vector<I, N>],
    out: &mut [Vector<I, N>],
    width: usize,
    factor: f32,
    odd: usize,
    #[define(I)] _storage: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= out.len() {
        terminate!();
    }
    let (row, col) = (at / width, at % width);
    out[at] = x[(2 * row + odd) * width + col] * Vector::new(I::cast_from(factor));
}

/// The gates of the first of two tokens, written out for `repeats` elements each, in the rows of `width` elements; 0 for
/// the second. `beta` is 1.
#[cube(launch, address_type = "dynamic")]
fn gates_kernel(g: &[f32], out: &mut [f32], beta: &mut [f32], width: usize, repeats: usize, #[comptime] there: bool) {
    let at = ABSOLUTE_POS;
    if at >= out.len() {
        terminate!();
    }
    if at < beta.len() {
        beta[at] = 1.0;
    }
    let (row, col) = (at / width, at % width);
    let mut gate = f32::new(0.0);
    if comptime!(there) {
        if row % 2 < 1 {
            // Of one token after the other, or of all tokens.
            gate = g[(row / 2 * width + col) / repeats % g.len()];
        }
    }
    out[at] = gate;
}

/// Which of the two tokens.
#[derive(Clone, Copy)]
enum Half {
    Even,
    Odd,
}

/// The tensors of twice the tokens.
struct Pairs<'a> {
    client: &'a Client,
    /// That of the caller, and the one of twice the tokens.
    p: &'a MatrixProblem,
    problem: MatrixProblem,
    q: Buffer,
    k: Buffer,
    v: Buffer,
    g: Buffer,
    beta: Buffer,
    reads: Buffer,
}

impl<'a> Pairs<'a> {
    /// Of inputs that have been checked.
    fn new(client: &'a Client, p: &'a MatrixProblem, x: &Inputs, a: &Buffer, b: &Buffer) -> Result<Self, Error> {
        let problem = p.twice();
        let (keys, values) = (p.heads * p.key_dim, p.value_heads * p.value_dim);
        let tokens = problem.batch * problem.time;
        let g = Buffer::output(client, Storage::F32, tokens * keys);
        let beta = Buffer::output(client, Storage::F32, tokens * p.heads);
        let repeats = if let Gate::Key(_) = x.gate { 1 } else { p.key_dim };
        gates_kernel::launch(
            client,
            grid(client, g.len.div_ceil(UNITS))?,
            CubeDim::new_1d(UNITS as u32),
            address_type(client, Storage::F32, [g.len])?,
            x.gate.tensor().unwrap_or(&Buffer::absent(client)).arg(),
            g.arg(),
            beta.arg(),
            keys,
            repeats,
            x.gate.tensor().is_some(),
        );
        Ok(Self {
            q: interleave(client, Rows::Second(x.q), keys, 1.0)?,
            k: interleave(client, Rows::Both(b, x.k), keys, 1.0)?,
            v: interleave(client, Rows::Second(x.v), values, 1.0)?,
            reads: interleave(client, Rows::First(a), keys, -1.0)?,
            client,
            p,
            problem,
            g,
            beta,
        })
    }

    fn inputs<'b>(&'b self, initial_state: Option<&'b Buffer>) -> Inputs<'b> {
        let (gate, write) = (Gate::Key(&self.g), Write::Delta { beta: &self.beta });
        Inputs { q: &self.q, k: &self.k, v: &self.v, gate, write, initial_state }
    }

    fn keys(&self, x: &Buffer, half: Half, factor: f32) -> Result<Buffer, Error> {
        every_other(self.client, x, self.p.heads * self.p.key_dim, half, factor)
    }

    fn values(&self, x: &Buffer) -> Result<Buffer, Error> {
        every_other(self.client, x, self.p.value_heads * self.p.value_dim, Half::Odd, 1.0)
    }

    /// The gradient of gates of the caller's kind.
    fn gates(&self, gate: Gate<&Buffer>, dg: &Buffer) -> Result<Option<Buffer>, Error> {
        if let Gate::None = gate {
            return Ok(None);
        }
        let by_key = self.keys(dg, Half::Even, 1.0)?;
        if let Gate::Key(_) = gate {
            return Ok(Some(by_key));
        }
        let by_head = sum_rows(self.client, &by_key, self.p.key_dim, 1, Storage::F32)?;
        match gate {
            Gate::Constant(_) => sum_all_rows(self.client, by_head, self.p.heads).map(Some),
            _ => Ok(Some(by_head)),
        }
    }
}

/// [`super::forward`] of a write along `b` of what `a` reads.
pub(crate) fn forward(
    client: &Client,
    p: &MatrixProblem,
    x: &Inputs,
    a: &Buffer,
    b: &Buffer,
) -> Result<Outputs, Error> {
    let pairs = Pairs::new(client, p, x, a, b)?;
    let inputs = pairs.inputs(x.initial_state);
    let sequences = validate(&pairs.problem, &inputs)?;
    let out = Launch::new(client, &pairs.problem, &sequences, &inputs, Some(&pairs.reads))?.forward()?;
    Ok(Outputs { o: pairs.values(&out.o)?, ..out })
}

/// [`super::backward`] of the same.
pub(crate) fn backward(
    client: &Client,
    p: &MatrixProblem,
    x: &Inputs,
    [a, b]: [&Buffer; 2],
    d_o: Option<&Buffer>,
    d_final_state: Option<&Buffer>,
) -> Result<Gradients, Error> {
    let pairs = Pairs::new(client, p, x, a, b)?;
    let inputs = pairs.inputs(x.initial_state);
    let d_o = d_o.map(|d_o| interleave(client, Rows::Second(d_o), p.value_heads * p.value_dim, 1.0)).transpose()?;
    let sequences = validate(&pairs.problem, &inputs)?;
    let launch = Launch::new(client, &pairs.problem, &sequences, &inputs, Some(&pairs.reads))?;
    let d = launch.backward(d_o.as_ref(), d_final_state)?;
    Ok(Gradients {
        dq: pairs.keys(&d.dq, Half::Odd, 1.0)?,
        dk: pairs.keys(&d.dk, Half::Odd, 1.0)?,
        dv: pairs.values(&d.dv)?,
        dg: d.dg.map(|dg| pairs.gates(x.gate, &dg)).transpose()?.flatten(),
        dbeta: None,
        da: d.da.map(|d_reads| pairs.keys(&d_reads, Half::Even, -1.0)).transpose()?,
        db: Some(pairs.keys(&d.dk, Half::Even, 1.0)?),
        d_initial_state: d.d_initial_state,
    })
}

/// What becomes rows of the first and of the second of two tokens.
enum Rows<'a> {
    First(&'a Buffer),
    Second(&'a Buffer),
    Both(&'a Buffer, &'a Buffer),
}

fn interleave(client: &Client, rows: Rows, width: usize, factor: f32) -> Result<Buffer, Error> {
    let (even, odd, there) = match rows {
        Rows::First(x) => (x, x, [true, false]),
        Rows::Second(x) => (x, x, [false, true]),
        Rows::Both(even, odd) => (even, odd, [true, true]),
    };
    let n = vector(even.storage.size(), &[width]);
    let out = Buffer::output(client, even.storage, 2 * even.len);
    interleave_kernel::launch(
        client,
        grid(client, (out.len / n).div_ceil(UNITS))?,
        CubeDim::new_1d(UNITS as u32),
        address_type(client, out.storage, [out.len])?,
        n,
        even.arg(),
        odd.arg(),
        out.arg(),
        width / n,
        factor,
        there,
        out.storage.elem_type(),
    );
    Ok(out)
}

fn every_other(client: &Client, x: &Buffer, width: usize, half: Half, factor: f32) -> Result<Buffer, Error> {
    let n = vector(x.storage.size(), &[width]);
    let out = Buffer::output(client, x.storage, x.len / 2);
    every_other_kernel::launch(
        client,
        grid(client, (out.len / n).div_ceil(UNITS))?,
        CubeDim::new_1d(UNITS as u32),
        address_type(client, x.storage, [x.len])?,
        n,
        x.arg(),
        out.arg(),
        width / n,
        factor,
        half as usize,
        x.storage.elem_type(),
    );
    Ok(out)
}
