//! The chunked matrix-state recurrence on the CPU: one task per sequence and value head walks the chunks in order.
//!
//! With `c` the gate sums of a chunk (see `decay.rs`), `S` the state that enters it, and the pairs `(key, value)` that it
//! writes: `(k, v)` for an additive write, `(k, u)` for the delta rule, `(k, v)` and `(b, u)` for a low-rank write,
//!
//! ```text
//! o = (q e^c) S + sum over writes of tril(P_q,key) value
//! S = Diag(e^{c_n}) S + sum over writes of (key e^{c_n - c})^T value
//! delta:     (I + diag(beta) P_k,k) u = beta (v - (k e^c) S)
//! low rank:  (I - P_a,b) u = (a e^{c-}) S + P_a,k v
//! ```

mod backward;
mod chunk;
mod decay;
mod forward;
mod head_decay;
mod key_decay;
mod key_gradient;
mod lower;
pub(super) mod rows;
mod step;

use crate::element::Element;
use crate::matrix::{Gate, KeepStates, MatrixGradients, MatrixInputs, MatrixOutputs, MatrixProblem};
use crate::sequences::Sequences;
use head_decay::{HeadDecay, HeadGate};
use key_decay::KeyDecay;
pub(crate) use step::step;

/// How many chunks all sequences have together.
pub(crate) fn chunk_count(sequences: &Sequences, chunk: usize) -> usize {
    chunks_before(sequences, sequences.count(), chunk)
}

/// How many chunks the sequences before `n` have: the index of the first of sequence `n`.
fn chunks_before(sequences: &Sequences, n: usize, chunk: usize) -> usize {
    (0..n).map(|m| sequences.range(m).len().div_ceil(chunk)).sum()
}

/// Calls `$body` with `$decay` bound to the gate's implementation of [`decay::Decay`].
macro_rules! with_decay {
    ($problem:expr, $inputs:expr, $decay:ident => $body:expr) => {{
        let value_heads = $problem.value_heads;
        let head = |gate| HeadDecay { gate, value_heads };
        match $inputs.gate {
            Gate::None => {
                let $decay = &head(HeadGate::None);
                $body
            }
            Gate::Constant(g) => {
                let $decay = &head(HeadGate::Constant(g));
                $body
            }
            Gate::Head(g) => {
                let $decay = &head(HeadGate::Token(g));
                $body
            }
            Gate::Key(g) => {
                let $decay = &KeyDecay { g, value_heads };
                $body
            }
        }
    }};
}

pub(crate) fn forward<E: Element>(
    problem: &MatrixProblem,
    sequences: &Sequences,
    inputs: &MatrixInputs<E>,
    keep: KeepStates,
) -> MatrixOutputs<E> {
    with_decay!(problem, inputs, decay => forward::forward(problem, sequences, inputs, decay, keep))
}

pub(crate) fn backward<E: Element>(
    problem: &MatrixProblem,
    sequences: &Sequences,
    inputs: &MatrixInputs<E>,
    do_: &[E],
    d_final_state: Option<&[f32]>,
    chunk_states: &[f32],
) -> MatrixGradients<E> {
    let cotangents = backward::Cotangents { o: do_, final_state: d_final_state };
    with_decay!(problem, inputs, decay => backward::backward(problem, sequences, inputs, decay, cotangents, chunk_states))
}
