//! The matrix-state recurrences on a GPU: what [`thalweg_kernels::matrix`] computes, on tensors in a device's memory.
//!
//! A sequence is cut into chunks, of at most 64 tokens. `forward` is three launches: `scores` (all chunks at once),
//! `state` (the chunks of a sequence in order, with the state on chip) and `output` (all chunks at once), which on matrix
//! units computes the scores of an additive write under a scalar gate itself, so that they are two; `backward`
//! computes the first two again and reverses them. Besides the tensors they need the state before each chunk
//! (`key_dim value_dim` elements for each chunk and head) and one or two `[chunk, chunk]` matrices of scores.
//!
//! Results do not depend on what else is in the batch, nor on the run. The values of gates are not read back: that they
//! are at most 0 is the caller's to ensure.

// In a kernel, a condition at compile time must not be merged with one at run time.
#![allow(clippy::collapsible_if)]

mod ahead;
mod blueprint;
mod chunk_backward;
mod decay;
mod gather;
mod inverse;
mod launch;
mod low_rank;
mod lower;
mod output;
mod pair_gradients;
mod panel_state;
mod panel_state_backward;
mod panels;
mod place;
mod scores;
mod scores_backward;
mod state;
mod state_backward;
mod step;
mod transfer;

use crate::Client;

use crate::buffer::{Buffer, Storage};
use launch::Launch;
use thalweg_kernels::Error;
pub use thalweg_kernels::matrix::{Gate, Write};
use thalweg_kernels::matrix::{MatrixProblem, check_low_rank, check_step, validate_sizes};

/// The tensors that go in. `q`, `k` and `v` have one element type, all others are f32.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, `[batch, time, heads, key_dim]`.
    pub q: &'a Buffer,
    /// Keys, `[batch, time, heads, key_dim]`.
    pub k: &'a Buffer,
    /// Values, `[batch, time, value_heads, value_dim]`.
    pub v: &'a Buffer,
    /// The decay.
    pub gate: Gate<&'a Buffer>,
    /// The write.
    pub write: Write<&'a Buffer>,
    /// State before the first token, `[sequences, value_heads, key_dim, value_dim]`; zero if absent.
    pub initial_state: Option<&'a Buffer>,
}

/// The tensors that come out.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Outputs, `[batch, time, value_heads, value_dim]`.
    pub o: Buffer,
    /// State after the last token, `[sequences, value_heads, key_dim, value_dim]`, f32.
    pub final_state: Buffer,
}

/// The chunked forward pass. [`MatrixProblem::chunk`] is ignored: the device decides.
///
/// # Errors
/// [`Error`] for a zero size, `value_heads` that is no multiple of `heads`, a tensor of the wrong length or type,
/// boundaries that are no partition; [`Error::Device`] if the device has too little shared memory for `key_dim`.
pub fn forward(client: &Client, problem: &MatrixProblem, inputs: &Inputs) -> Result<Outputs, Error> {
    let sequences = validate(problem, inputs)?;
    match inputs.write {
        Write::LowRank { a, b } => low_rank::forward(client, problem, inputs, a, b),
        _ => Launch::new(client, problem, &sequences, inputs, None)?.forward(),
    }
}

/// Gradients of [`Inputs`], each of the shape of its input; present where the input is.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Gradients {
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
    pub dg: Option<Buffer>,
    pub dbeta: Option<Buffer>,
    pub da: Option<Buffer>,
    pub db: Option<Buffer>,
    pub d_initial_state: Option<Buffer>,
}

/// The chunked backward pass: gradients of `<do, o> + <d_final_state, final_state>`, each zero if absent.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &MatrixProblem,
    inputs: &Inputs,
    d_o: Option<&Buffer>,
    d_final_state: Option<&Buffer>,
) -> Result<Gradients, Error> {
    let sequences = validate(problem, inputs)?;
    if let Some(d) = d_o {
        d.check("do", inputs.q.storage, &problem.value_shape())?;
    }
    if let Some(d) = d_final_state {
        d.check("d_final_state", Storage::F32, &problem.state_shape())?;
    }
    match inputs.write {
        Write::LowRank { a, b } => low_rank::backward(client, problem, inputs, [a, b], d_o, d_final_state),
        _ => Launch::new(client, problem, &sequences, inputs, None)?.backward(d_o, d_final_state),
    }
}

/// One token of `batch` sequences, in one launch: updates `state` (`[batch, value_heads, key_dim, value_dim]`, f32) in
/// place and returns `o`, `[batch, 1, value_heads, value_dim]`. `problem.time` must be 1; `initial_state` and
/// `cu_seqlens` must be absent.
///
/// # Errors
/// As [`forward`].
pub fn step(client: &Client, problem: &MatrixProblem, inputs: &Inputs, state: &Buffer) -> Result<Buffer, Error> {
    validate(problem, inputs)?;
    check_step(problem, inputs.initial_state.is_some())?;
    state.check("state", Storage::F32, &problem.state_shape())?;
    launch::step(client, problem, inputs, state)
}

fn validate(p: &MatrixProblem, x: &Inputs) -> Result<thalweg_kernels::Sequences, Error> {
    let sequences = validate_sizes(p)?;
    let storage = x.q.storage;
    x.q.check("q", storage, &p.key_shape())?;
    x.k.check("k", storage, &p.key_shape())?;
    x.v.check("v", storage, &p.value_shape())?;
    if let Some(h) = x.initial_state {
        h.check("initial_state", Storage::F32, &p.state_shape())?;
    }
    let [b, t, h] = p.head_shape();
    match x.gate {
        Gate::None => {}
        Gate::Constant(g) => g.check("g", Storage::F32, &[h])?,
        Gate::Head(g) => g.check("g", Storage::F32, &[b, t, h])?,
        Gate::Key(g) => g.check("g", Storage::F32, &[b, t, h, p.key_dim])?,
    }
    match x.write {
        Write::Additive => {}
        Write::Delta { beta } => beta.check("beta", Storage::F32, &[b, t, h])?,
        Write::LowRank { a, b } => {
            check_low_rank(p)?;
            a.check("a", storage, &p.key_shape())?;
            b.check("b", storage, &p.key_shape())?;
        }
    }
    Ok(sequences)
}
