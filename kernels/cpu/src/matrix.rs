//! The matrix-state recurrences: every model whose state is a `[key_dim, value_dim]` matrix per head.
//!
//! ```text
//! S_t = D_t S_{t-1} + write_t          o_t = scale * q_t^T S_t
//! ```
//! `D_t` multiplies row `k` of the state by `exp(g_t[k])`; [`Gate`] says what `g` is. [`Write`] says what is written:
//!
//! | write | `write_t` | models |
//! |---|---|---|
//! | additive | `k_t v_t^T` | linear attention, RetNet, Lightning Attention, GLA, HGRN2, Mamba-2 |
//! | delta | `k_t (beta_t (v_t - (D_t S_{t-1})^T k_t))^T` | DeltaNet, Gated DeltaNet, KDA |
//! | low rank | `b_t (a_t^T S_{t-1}) + k_t v_t^T` | DPLR, RWKV-7 |
//!
//! Every function takes row-major slices; the chunked algorithm is described in `docs/src/math.md`.

use crate::element::Element;
use crate::error::Error;
use crate::native::matrix as native;
use crate::sequences::Sequences;

/// The sizes of a matrix-state operation.
#[derive(Debug, Clone, PartialEq)]
pub struct MatrixProblem {
    /// Sequences in the batch; 1 when `cu_seqlens` is given.
    pub batch: usize,
    /// Tokens of each sequence, or of all packed sequences together.
    pub time: usize,
    /// Query and key heads.
    pub heads: usize,
    /// Value heads, a multiple of `heads`: value head `h` reads query/key head `h / (value_heads / heads)`.
    pub value_heads: usize,
    /// Features of a query or key.
    pub key_dim: usize,
    /// Features of a value.
    pub value_dim: usize,
    /// Tokens per chunk: the work inside a chunk is quadratic in it, the work on the state inversely proportional.
    pub chunk: usize,
    /// Multiplies the queries; `key_dim^-0.5` by default.
    pub scale: f32,
    /// Boundaries `[0, .., time]` of packed sequences.
    pub cu_seqlens: Option<Vec<usize>>,
}

/// The chunk length that is fastest on the CPUs measured so far.
pub const DEFAULT_CHUNK: usize = 64;

impl MatrixProblem {
    /// One head count for all tensors, chunk 64, scale `key_dim^-0.5`, no packing.
    pub fn new(batch: usize, time: usize, heads: usize, key_dim: usize, value_dim: usize) -> Self {
        let scale = (key_dim.max(1) as f32).powf(-0.5);
        let (value_heads, chunk, cu_seqlens) = (heads, DEFAULT_CHUNK, None);
        Self { batch, time, heads, value_heads, key_dim, value_dim, chunk, scale, cu_seqlens }
    }

    /// Shape of `q` and `k`.
    pub fn key_shape(&self) -> [usize; 4] {
        [self.batch, self.time, self.heads, self.key_dim]
    }

    /// Shape of `v` and `o`.
    pub fn value_shape(&self) -> [usize; 4] {
        [self.batch, self.time, self.value_heads, self.value_dim]
    }

    /// Shape of the initial and final state; the leading size counts sequences.
    pub fn state_shape(&self) -> [usize; 4] {
        let sequences = self.cu_seqlens.as_ref().map_or(self.batch, |c| c.len().saturating_sub(1));
        [sequences, self.value_heads, self.key_dim, self.value_dim]
    }

    /// The same with two tokens for each one, as a GPU computes low-rank writes.
    #[doc(hidden)]
    pub fn twice(&self) -> Self {
        let cu_seqlens = self.cu_seqlens.as_ref().map(|bounds| bounds.iter().map(|bound| 2 * bound).collect());
        Self { time: 2 * self.time, cu_seqlens, ..self.clone() }
    }

    #[doc(hidden)]
    pub fn head_shape(&self) -> [usize; 3] {
        [self.batch, self.time, self.value_heads]
    }
}

/// The natural-log decay `g <= 0` of the state: what it depends on, and the tensor `T` (a slice, a device buffer, a tensor of
/// a framework; `()` where only the kind matters).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Gate<T> {
    /// The state never decays.
    None,
    /// One decay per head for all tokens: `[value_heads]`.
    Constant(T),
    /// One decay per token and head: `[batch, time, value_heads]`.
    Head(T),
    /// One decay per token, head and key feature: `[batch, time, value_heads, key_dim]`.
    Key(T),
}

impl<T> Gate<T> {
    /// The same kind of gate with another tensor.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Gate<U> {
        match self {
            Gate::None => Gate::None,
            Gate::Constant(g) => Gate::Constant(f(g)),
            Gate::Head(g) => Gate::Head(f(g)),
            Gate::Key(g) => Gate::Key(f(g)),
        }
    }

    /// The same kind of gate with a reference to the tensor.
    pub fn as_ref(&self) -> Gate<&T> {
        match self {
            Gate::None => Gate::None,
            Gate::Constant(g) => Gate::Constant(g),
            Gate::Head(g) => Gate::Head(g),
            Gate::Key(g) => Gate::Key(g),
        }
    }

    /// What the gate depends on.
    pub fn kind(&self) -> GateKind {
        self.as_ref().map(|_| ())
    }

    /// The tensor, if there is one.
    pub fn tensor(self) -> Option<T> {
        match self {
            Gate::None => None,
            Gate::Constant(g) | Gate::Head(g) | Gate::Key(g) => Some(g),
        }
    }
}

/// What the gate depends on.
pub type GateKind = Gate<()>;

impl GateKind {
    /// One decay per head for all tokens.
    pub const CONSTANT: Self = Gate::Constant(());
    /// One decay per token and head.
    pub const HEAD: Self = Gate::Head(());
    /// One decay per token, head and key feature.
    pub const KEY: Self = Gate::Key(());
}

/// What a token writes into the state, with the tensors of the write: `B` for step sizes, `L` for low-rank factors, which
/// have the element type of the keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Write<B, L = B> {
    /// `k v^T`.
    Additive,
    /// The delta rule; it decays the state first.
    Delta {
        /// Step size per token and head, `[batch, time, value_heads]`; stable in `[0, 2]` for unit-norm keys.
        beta: B,
    },
    /// `b (a^T S) + k v^T` on the state before its decay. Needs `value_heads == heads`.
    LowRank {
        /// `[batch, time, heads, key_dim]`.
        a: L,
        /// `[batch, time, heads, key_dim]`.
        b: L,
    },
}

impl<B, L> Write<B, L> {
    /// The same kind of write with other tensors.
    pub fn map_each<C, M>(self, beta: impl FnOnce(B) -> C, mut low_rank: impl FnMut(L) -> M) -> Write<C, M> {
        match self {
            Write::Additive => Write::Additive,
            Write::Delta { beta: x } => Write::Delta { beta: beta(x) },
            Write::LowRank { a, b } => Write::LowRank { a: low_rank(a), b: low_rank(b) },
        }
    }

    /// The same kind of write with references to the tensors.
    pub fn as_ref(&self) -> Write<&B, &L> {
        match self {
            Write::Additive => Write::Additive,
            Write::Delta { beta } => Write::Delta { beta },
            Write::LowRank { a, b } => Write::LowRank { a, b },
        }
    }

    /// What is written.
    pub fn kind(&self) -> WriteKind {
        self.as_ref().map_each(|_| (), |_| ())
    }
}

/// What is written.
pub type WriteKind = Write<()>;

impl WriteKind {
    /// The delta rule.
    pub const DELTA: Self = Write::Delta { beta: () };
    /// A low-rank write.
    pub const LOW_RANK: Self = Write::LowRank { a: (), b: () };
}

impl<T> Write<T> {
    /// The same kind of write with other tensors.
    pub fn map<U>(self, mut f: impl FnMut(T) -> U) -> Write<U> {
        match self {
            Write::Additive => Write::Additive,
            Write::Delta { beta } => Write::Delta { beta: f(beta) },
            Write::LowRank { a, b } => Write::LowRank { a: f(a), b: f(b) },
        }
    }
}

/// The tensors that go in.
#[derive(Debug, Clone, Copy)]
pub struct MatrixInputs<'a, E> {
    /// Queries, `[batch, time, heads, key_dim]`.
    pub q: &'a [E],
    /// Keys, `[batch, time, heads, key_dim]`.
    pub k: &'a [E],
    /// Values, `[batch, time, value_heads, value_dim]`.
    pub v: &'a [E],
    /// The decay.
    pub gate: Gate<&'a [f32]>,
    /// The write.
    pub write: Write<&'a [f32], &'a [E]>,
    /// State before the first token, `[sequences, value_heads, key_dim, value_dim]`; zero if absent.
    pub initial_state: Option<&'a [f32]>,
}

/// The tensors that come out.
#[derive(Debug, Clone)]
pub struct MatrixOutputs<E> {
    /// Outputs, `[batch, time, value_heads, value_dim]`.
    pub o: Vec<E>,
    /// State after the last token, `[sequences, value_heads, key_dim, value_dim]`.
    pub final_state: Vec<f32>,
    /// The state before each chunk, if it was asked for: `[chunks, value_heads, key_dim, value_dim]`.
    pub chunk_states: Option<Vec<f32>>,
}

/// Gradients of [`MatrixInputs`], each of the shape of its input; present where the input is.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct MatrixGradients<E> {
    pub dq: Vec<E>,
    pub dk: Vec<E>,
    pub dv: Vec<E>,
    pub dg: Option<Vec<f32>>,
    pub dbeta: Option<Vec<f32>>,
    pub da: Option<Vec<E>>,
    pub db: Option<Vec<E>>,
    pub d_initial_state: Option<Vec<f32>>,
}

/// Whether the forward pass keeps the state before each chunk for the backward pass
/// (`time / chunk * value_heads * key_dim * value_dim` floats), which then need not compute them again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepStates {
    /// Keep nothing.
    No,
    /// Keep them in [`MatrixOutputs::chunk_states`].
    Yes,
}

/// The chunked forward pass.
///
/// # Errors
/// [`Error`] for a zero size, `value_heads` that is no multiple of `heads`, a buffer of the wrong length, boundaries
/// that are no partition, a gate that is positive or NaN. Nothing is computed then.
pub fn forward<E: Element>(
    problem: &MatrixProblem,
    inputs: &MatrixInputs<E>,
    keep: KeepStates,
) -> Result<MatrixOutputs<E>, Error> {
    let sequences = validate(problem, inputs)?;
    Ok(native::forward(problem, &sequences, inputs, keep))
}

/// The chunked backward pass: gradients of `<do, o> + <d_final_state, final_state>`.
///
/// `chunk_states` are those that [`forward`] kept for the same problem and inputs; without them they are computed again.
///
/// # Errors
/// As [`forward`].
pub fn backward<E: Element>(
    problem: &MatrixProblem,
    inputs: &MatrixInputs<E>,
    do_: &[E],
    d_final_state: Option<&[f32]>,
    chunk_states: Option<&[f32]>,
) -> Result<MatrixGradients<E>, Error> {
    let sequences = validate(problem, inputs)?;
    Error::check_len("do", do_.len(), &problem.value_shape())?;
    if let Some(d) = d_final_state {
        Error::check_len("d_final_state", d.len(), &problem.state_shape())?;
    }
    let recomputed;
    let chunk_states = match chunk_states {
        Some(states) => {
            let [_, hv, k, v] = problem.state_shape();
            Error::check_len(
                "chunk_states",
                states.len(),
                &[native::chunk_count(&sequences, problem.chunk), hv, k, v],
            )?;
            states
        }
        None => {
            recomputed = native::forward(problem, &sequences, inputs, KeepStates::Yes).chunk_states.unwrap_or_default();
            &recomputed
        }
    };
    Ok(native::backward(problem, &sequences, inputs, do_, d_final_state, chunk_states))
}

/// One token of `batch` sequences: updates `state` (`[batch, value_heads, key_dim, value_dim]`) in place and returns
/// `o`, `[batch, 1, value_heads, value_dim]`. `problem.time` must be 1; `initial_state` and `cu_seqlens` must be absent.
///
/// # Errors
/// As [`forward`].
pub fn step<E: Element>(problem: &MatrixProblem, inputs: &MatrixInputs<E>, state: &mut [f32]) -> Result<Vec<E>, Error> {
    validate(problem, inputs)?;
    check_step(problem, inputs.initial_state.is_some())?;
    Error::check_len("state", state.len(), &problem.state_shape())?;
    Ok(native::step(problem, inputs, state))
}

/// Checks that a problem is one token of each sequence.
#[doc(hidden)]
pub fn check_step(problem: &MatrixProblem, has_initial_state: bool) -> Result<(), Error> {
    if problem.time != 1 {
        return Err(Error::Value { argument: "time", found: problem.time.to_string(), expected: "1 for a step" });
    }
    if has_initial_state || problem.cu_seqlens.is_some() {
        let found = "present".to_string();
        return Err(Error::Value { argument: "initial_state, cu_seqlens", found, expected: "absent for a step" });
    }
    Ok(())
}

/// Checks everything that is not a tensor.
#[doc(hidden)]
pub fn validate_sizes(p: &MatrixProblem) -> Result<Sequences, Error> {
    let sequences = Sequences::new(p.batch, p.time, p.cu_seqlens.as_deref())?;
    for (argument, size) in
        [("heads", p.heads), ("value_heads", p.value_heads), ("key_dim", p.key_dim), ("value_dim", p.value_dim)]
    {
        Error::check_positive(argument, size)?;
    }
    Error::check_positive("chunk", p.chunk)?;
    if !p.value_heads.is_multiple_of(p.heads) {
        let found = format!("{} for {} heads", p.value_heads, p.heads);
        return Err(Error::Value { argument: "value_heads", found, expected: "a multiple of the query/key heads" });
    }
    if !p.scale.is_finite() {
        return Err(Error::Value { argument: "scale", found: p.scale.to_string(), expected: "a finite number" });
    }
    Ok(sequences)
}

/// Heads that share queries and keys have no low-rank writes of their own.
#[doc(hidden)]
pub fn check_low_rank(p: &MatrixProblem) -> Result<(), Error> {
    if p.value_heads != p.heads {
        let (argument, found) = ("value_heads", p.value_heads.to_string());
        return Err(Error::Value { argument, found, expected: "the number of heads (low-rank write)" });
    }
    Ok(())
}

fn validate<E: Element>(p: &MatrixProblem, x: &MatrixInputs<E>) -> Result<Sequences, Error> {
    let sequences = validate_sizes(p)?;
    Error::check_len("q", x.q.len(), &p.key_shape())?;
    Error::check_len("k", x.k.len(), &p.key_shape())?;
    Error::check_len("v", x.v.len(), &p.value_shape())?;
    if let Some(h) = x.initial_state {
        Error::check_len("initial_state", h.len(), &p.state_shape())?;
    }
    let [b, t, h] = p.head_shape();
    match x.gate {
        Gate::None => {}
        Gate::Constant(g) => Error::check_len("g", g.len(), &[h])?,
        Gate::Head(g) => Error::check_len("g", g.len(), &[b, t, h])?,
        Gate::Key(g) => Error::check_len("g", g.len(), &[b, t, h, p.key_dim])?,
    }
    if let Some(g) = x.gate.tensor() {
        Error::check_log_decay("g", g)?;
    }
    match x.write {
        Write::Additive => {}
        Write::Delta { beta } => {
            Error::check_len("beta", beta.len(), &[b, t, h])?;
            if let Some(position) = beta.iter().position(|x| !x.is_finite()) {
                let found = beta[position];
                return Err(Error::Element { argument: "beta", found, position, expected: "a finite number" });
            }
        }
        Write::LowRank { a, b } => {
            check_low_rank(p)?;
            Error::check_len("a", a.len(), &p.key_shape())?;
            Error::check_len("b", b.len(), &p.key_shape())?;
        }
    }
    Ok(sequences)
}
