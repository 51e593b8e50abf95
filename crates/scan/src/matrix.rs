//! The matrix-state recurrences behind one door: checks, element types and the choice of path.

use burn::Tensor;
use burn::tensor::{DType, FloatDType};

use thalweg_kernels::matrix::{DEFAULT_CHUNK, MatrixProblem};

use crate::families::l2_norm;
use crate::native::{self, GateKind, Operation, WriteKind, Written};
use crate::{Error, MatrixOptions, StepOptions, check, portable};

/// What an operation over a matrix state returns.
#[derive(Debug, Clone)]
pub struct Output {
    /// Outputs per token, `[batch, time, value_heads, value_dim]`, in the element type of the inputs.
    pub o: Tensor<4>,
    /// State after the last token of each sequence, `[N, value_heads, key_dim, value_dim]`; f32
    /// (f64 for f64 inputs).
    pub final_state: Tensor<4>,
}

/// How the state forgets before each write; natural logs, at most 0.
#[derive(Debug, Clone)]
pub(crate) enum Decay {
    /// Not at all.
    None,
    /// One constant per value head, `[HV]`.
    Constant(Tensor<1>),
    /// Per token and value head, `[B, T, HV]`.
    Head(Tensor<3>),
    /// Per token, value head and key feature, `[B, T, HV, K]`.
    Key(Tensor<4>),
}

/// How a token writes to the state.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant)] // built once per call
pub(crate) enum Write {
    /// `S += k v^T`
    Additive,
    /// `S += k (beta (v - S^T k))^T`, `beta: [B, T, HV]`
    Delta {
        /// Strength of the write.
        beta: Tensor<3>,
    },
    /// `S = Diag(exp g) S + b (a^T S) + k v^T` with the old `S` in both terms; `a, b: [B, T, HV, K]`
    LowRank {
        /// Reads the old state.
        a: Tensor<4>,
        /// Writes what was read.
        b: Tensor<4>,
    },
}

/// Inputs of a recurrence after the checks.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub q: Tensor<4>,
    pub k: Tensor<4>,
    pub v: Tensor<4>,
    pub decay: Decay,
    pub write: Write,
    pub initial_state: Option<Tensor<4>>,
    pub scale: f64,
    pub chunk: usize,
    pub cu_seqlens: Option<Vec<usize>>,
}

/// Added under the root of the l2 norm of queries and keys.
const L2_EPSILON: f64 = 1e-6;

/// Checks everything that can be checked without reading a tensor, then runs the chosen path.
pub(crate) fn forward(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: Decay,
    write: Write,
    options: MatrixOptions,
) -> Result<Output, Error> {
    let path = options.path;
    let problem = Problem::new(q, k, v, decay, write, options)?;
    if native::available(path, Written::ForCpuAndGpu, &problem.q) {
        // On the CPU a sequence of one token has the bits that it has among longer ones; a step rounds otherwise.
        let packs = problem.q.dims()[1] == 1 && native::available(path, Written::ForCpu, &problem.q);
        return if packs { problem.packed_tokens() } else { problem.native() };
    }
    Ok(portable::matrix::forward(problem))
}

/// One token of a recurrence. The arguments are those of [`forward`] with a time axis of length 1.
pub(crate) fn step(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    decay: Decay,
    write: Write,
    state: Tensor<4>,
    options: StepOptions,
) -> Result<(Tensor<3>, Tensor<4>), Error> {
    let options = MatrixOptions {
        scale: options.scale,
        initial_state: Some(state),
        qk_l2norm: options.qk_l2norm,
        path: options.path,
        ..MatrixOptions::default()
    };
    let path = options.path;
    let problem = Problem::new(q, k, v, decay, write, options)?;
    if native::available(path, Written::ForCpuAndGpu, &problem.q) {
        let Output { o, final_state } = problem.native()?;
        return Ok((o.squeeze_dim(1), final_state));
    }
    Ok(portable::step::step(problem))
}

impl Problem {
    /// Checks the arguments and brings gates and states to the accumulation type.
    fn new(
        q: Tensor<4>,
        k: Tensor<4>,
        v: Tensor<4>,
        decay: Decay,
        write: Write,
        options: MatrixOptions,
    ) -> Result<Self, Error> {
        validate(&q, &k, &v, &decay, &write, &options)?;
        let state = state_type(q.dtype());
        let normalized = |x| if options.qk_l2norm { l2_norm(x, L2_EPSILON, options.path) } else { Ok(x) };
        Ok(Self {
            scale: options.scale.unwrap_or((q.dims()[3] as f64).powf(-0.5)),
            q: normalized(q)?,
            k: normalized(k)?,
            v,
            decay: match decay {
                Decay::None => Decay::None,
                Decay::Constant(g) => Decay::Constant(g.cast(state)),
                Decay::Head(g) => Decay::Head(g.cast(state)),
                Decay::Key(g) => Decay::Key(g.cast(state)),
            },
            write: match write {
                Write::Delta { beta } => Write::Delta { beta: beta.cast(state) },
                other => other,
            },
            initial_state: options.initial_state.map(|s| s.cast(state)),
            chunk: options.chunk.unwrap_or(DEFAULT_CHUNK),
            cu_seqlens: options.cu_seqlens,
        })
    }

    /// Runs sequences of one token each as packed ones.
    fn packed_tokens(self) -> Result<Output, Error> {
        let count = self.q.dims()[0];
        let turn = |x: Tensor<4>| x.swap_dims(0, 1);
        let problem = Self {
            q: turn(self.q),
            k: turn(self.k),
            v: turn(self.v),
            decay: match self.decay {
                Decay::Head(g) => Decay::Head(g.swap_dims(0, 1)),
                Decay::Key(g) => Decay::Key(turn(g)),
                constant => constant,
            },
            write: match self.write {
                Write::Additive => Write::Additive,
                Write::Delta { beta } => Write::Delta { beta: beta.swap_dims(0, 1) },
                Write::LowRank { a, b } => Write::LowRank { a: turn(a), b: turn(b) },
            },
            cu_seqlens: Some((0..=count).collect()),
            ..self
        };
        let Output { o, final_state } = problem.native()?;
        Ok(Output { o: turn(o), final_state })
    }

    /// Runs the kernel.
    fn native(self) -> Result<Output, Error> {
        let [batch, time, heads, key_dim] = self.q.dims();
        let [_, _, value_heads, value_dim] = self.v.dims();
        let problem = MatrixProblem {
            batch,
            time,
            heads,
            value_heads,
            key_dim,
            value_dim,
            chunk: self.chunk,
            scale: self.scale as f32,
            cu_seqlens: self.cu_seqlens,
        };
        let (gate, g) = match self.decay {
            Decay::None => (GateKind::None, None),
            Decay::Constant(g) => (GateKind::Constant, Some(g.into())),
            Decay::Head(g) => (GateKind::Head, Some(g.into())),
            Decay::Key(g) => (GateKind::Key, Some(g.into())),
        };
        let (write, x4, x5) = match self.write {
            Write::Additive => (WriteKind::Additive, None, None),
            Write::Delta { beta } => (WriteKind::Delta, Some(beta.into()), None),
            Write::LowRank { a, b } => (WriteKind::LowRank, Some(a.into()), Some(b.into())),
        };
        let operation = Operation::Matrix { problem, gate, write };
        let state = self.initial_state.map(Into::into);
        let rest = [Some(self.k.into()), Some(self.v.into()), g, x4, x5, state];
        let (o, final_state) = native::run(operation, self.q, rest)?;
        Ok(Output { o, final_state })
    }
}

/// The type of gates, states and sums: f64 for f64 inputs, else f32.
pub(crate) fn state_type(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}

fn validate(
    q: &Tensor<4>,
    k: &Tensor<4>,
    v: &Tensor<4>,
    decay: &Decay,
    write: &Write,
    options: &MatrixOptions,
) -> Result<(), Error> {
    check::not_empty("q", q)?;
    check::not_empty("v", v)?;
    let [batch, time, heads, key_dim] = q.dims();
    let [_, _, value_heads, value_dim] = v.dims();
    check::shape("k", k, [("batch", batch), ("time", time), ("heads", heads), ("key_dim", key_dim)])?;
    check::shape("v", v, [("batch", batch), ("time", time), ("value_heads", value_heads), ("value_dim", value_dim)])?;
    check::grouped("v", v.dims().to_vec(), value_heads, heads)?;
    check::same_type("k", k, "q", q.dtype())?;
    check::same_type("v", v, "q", q.dtype())?;

    let per_head = [("batch", batch), ("time", time), ("value_heads", value_heads)];
    let per_key = [("batch", batch), ("time", time), ("value_heads", value_heads), ("key_dim", key_dim)];
    match decay {
        Decay::None => {}
        Decay::Constant(g) => check::shape("g_gamma", g, [("value_heads", value_heads)])?,
        Decay::Head(g) => check::shape("g", g, per_head)?,
        Decay::Key(g) => check::shape("g", g, per_key)?,
    }
    match write {
        Write::Additive => {}
        Write::Delta { beta } => check::shape("beta", beta, per_head)?,
        Write::LowRank { a, b } => {
            // The low-rank write has no grouped form: a and b belong to a query head.
            check::shape("v", v, [("batch", batch), ("time", time), ("heads", heads), ("value_dim", value_dim)])?;
            check::shape("a", a, per_key)?;
            check::shape("b", b, per_key)?;
            check::same_type("a", a, "q", q.dtype())?;
            check::same_type("b", b, "q", q.dtype())?;
        }
    }
    check::positive("chunk", options.chunk)?;
    let count = check::sequences(options.cu_seqlens.as_deref(), batch, time)?;
    if let Some(state) = &options.initial_state {
        check::shape(
            "initial_state",
            state,
            [("sequences", count), ("value_heads", value_heads), ("key_dim", key_dim), ("value_dim", value_dim)],
        )?;
    }
    Ok(())
}
