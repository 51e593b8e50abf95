//! The matrix-state recurrences behind one door: checks, element types and the choice of path.

use burn::Tensor;
use burn::backend::DispatchTensor;
use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{self as gpu, Buffer, Client, Storage};
use thalweg_kernels::matrix::{self as kernel, DEFAULT_CHUNK, Gate, KeepStates, MatrixInputs, MatrixProblem};

use crate::binding::cpu::{Number, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
use crate::op::l2_norm;
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
    let operation = Matrix(problem.sizes());
    if binding::available(&operation, path, &problem.q) {
        let [o, final_state] = binding::run(operation, problem.operands())?.map(Tensor::from_dispatch);
        return Ok(Output { o, final_state });
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
    let operation = MatrixStep(problem.sizes());
    if binding::available(&operation, path, &problem.q) {
        let [o, state] = binding::run(operation, problem.operands())?;
        return Ok((Tensor::from_dispatch(o), Tensor::from_dispatch(state)));
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
        let state = check::state_type(q.dtype());
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

    /// The sizes and options, as the kernels know them.
    fn sizes(&self) -> MatrixProblem {
        let [batch, time, heads, key_dim] = self.q.dims();
        let [_, _, value_heads, value_dim] = self.v.dims();
        let (chunk, scale) = (self.chunk, self.scale as f32);
        let cu_seqlens = self.cu_seqlens.clone();
        MatrixProblem { batch, time, heads, value_heads, key_dim, value_dim, chunk, scale, cu_seqlens }
    }

    /// The tensors, with their ranks forgotten.
    fn operands(self) -> Operands<DispatchTensor> {
        Operands {
            q: self.q.into_dispatch(),
            k: self.k.into_dispatch(),
            v: self.v.into_dispatch(),
            gate: match self.decay {
                Decay::None => Gate::None,
                Decay::Constant(g) => Gate::Constant(g.into_dispatch()),
                Decay::Head(g) => Gate::Head(g.into_dispatch()),
                Decay::Key(g) => Gate::Key(g.into_dispatch()),
            },
            write: match self.write {
                Write::Additive => KernelWrite::Additive,
                Write::Delta { beta } => KernelWrite::Delta { beta: beta.into_dispatch() },
                Write::LowRank { a, b } => KernelWrite::LowRank { a: a.into_dispatch(), b: b.into_dispatch() },
            },
            initial_state: self.initial_state.map(Tensor::into_dispatch),
        }
    }
}

/// A write whose tensors are all of one kind.
type KernelWrite<T> = kernel::Write<T>;

operands! {
    /// The tensors of a matrix-state recurrence.
    struct Operands { q, k, v; gate: Gate, write: KernelWrite, initial_state: Option }
}

/// All tokens of a matrix-state recurrence.
#[derive(Debug, Clone)]
struct Matrix(MatrixProblem);

/// One token of each sequence, which advances the state in place if nobody else holds it.
#[derive(Debug, Clone)]
struct MatrixStep(MatrixProblem);

impl Operation for Matrix {
    type Operands = Operands<()>;

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.q
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.0.value_shape()), OutputSpec::f32(self.0.state_shape())]
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, keep: bool) -> KernelResult<Forward<FlexTensor>> {
        let keep = if keep { KeepStates::Yes } else { KeepStates::No };
        let out = kernel::forward::<E>(&self.0, &cpu_inputs(&x, x.initial_state.as_ref()), keep)?;
        let kept = out.chunk_states.map(values).into_iter().collect();
        Ok(Forward { outputs: vec![values(out.o), values(out.final_state)], kept })
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let (d_o, d_state) = (slice::<E>(&d[0]), slice(&d[1]));
        let inputs = cpu_inputs::<E>(&x, x.initial_state.as_ref());
        let states = saved.first().map(slice);
        let grads = kernel::backward(&self.0, &inputs, d_o, Some(d_state), states)?;
        let [dg, dbeta, d_state] = [grads.dg, grads.dbeta, grads.d_initial_state].map(|d| d.map(values));
        let [da, db] = [grads.da, grads.db].map(|d| d.map(values));
        Ok(Operands {
            q: Some(values(grads.dq)),
            k: Some(values(grads.dk)),
            v: Some(values(grads.dv)),
            gate: x.gate.map(|_| dg),
            write: write_gradients(&x.write, dbeta, [da, db]),
            initial_state: x.initial_state.map(|_| d_state),
        })
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let out = gpu::matrix::forward(client, &self.0, &gpu_inputs(x, x.initial_state.as_ref()))?;
        Ok(vec![out.o, out.final_state])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        _: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        let inputs = gpu_inputs(x, x.initial_state.as_ref());
        let grads = gpu::matrix::backward(client, &self.0, &inputs, Some(&d[0]), Some(&d[1]))?;
        Ok(Operands {
            q: Some(grads.dq),
            k: Some(grads.dk),
            v: Some(grads.dv),
            gate: x.gate.as_ref().map(|_| grads.dg),
            write: write_gradients(&x.write, grads.dbeta, [grads.da, grads.db]),
            initial_state: x.initial_state.as_ref().map(|_| grads.d_initial_state),
        })
    }
}

impl Operation for MatrixStep {
    type Operands = Operands<()>;

    const IN_PLACE: Option<&'static str> = Some("initial_state");

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.q
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        let p = &self.0;
        vec![OutputSpec::typed([p.batch, p.value_heads, p.value_dim]), OutputSpec::f32(p.state_shape())]
    }

    fn cpu_forward<E: Number>(&self, mut x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let length: usize = self.0.state_shape().iter().product();
        let mut state = match x.initial_state.take() {
            // A part of a larger buffer is copied: its memory is not the state alone.
            Some(state) if state.bytes().len() == length * size_of::<f32>() => state,
            Some(state) => values(slice::<f32>(&state).to_vec()),
            None => values(vec![0f32; length]),
        };
        let o = kernel::step(&self.0, &cpu_inputs::<E>(&x, None), state.storage_mut::<f32>())?;
        Ok(Forward::of([values(o), state]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        Matrix(self.0.clone()).cpu_backward::<E>(x, saved, d)
    }

    #[cfg(feature = "cube")]
    fn on_gpu(&self, _: &Client, _: Storage) -> bool {
        true
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, client: &Client, x: &Operands<Buffer>) -> KernelResult<Vec<Buffer>> {
        let Some(state) = &x.initial_state else {
            return Matrix(self.0.clone()).gpu_forward(client, x);
        };
        let o = gpu::matrix::step(client, &self.0, &gpu_inputs(x, None), state)?;
        Ok(vec![o, state.clone()])
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        client: &Client,
        x: &Operands<Buffer>,
        saved: &[Buffer],
        d: &[Buffer],
    ) -> KernelResult<Operands<Option<Buffer>>> {
        Matrix(self.0.clone()).gpu_backward(client, x, saved, d)
    }
}

fn cpu_inputs<'a, E: Number>(x: &'a Operands<FlexTensor>, state: Option<&'a FlexTensor>) -> MatrixInputs<'a, E> {
    MatrixInputs {
        q: slice(&x.q),
        k: slice(&x.k),
        v: slice(&x.v),
        gate: x.gate.as_ref().map(slice),
        write: x.write.as_ref().map_each(slice, slice),
        initial_state: state.map(slice),
    }
}

#[cfg(feature = "cube")]
fn gpu_inputs<'a>(x: &'a Operands<Buffer>, initial_state: Option<&'a Buffer>) -> gpu::matrix::Inputs<'a> {
    let (gate, write) = (x.gate.as_ref(), x.write.as_ref());
    gpu::matrix::Inputs { q: &x.q, k: &x.k, v: &x.v, gate, write, initial_state }
}

/// The gradients of a write's tensors, in the place of the tensors.
fn write_gradients<T, G>(write: &KernelWrite<T>, beta: Option<G>, [a, b]: [Option<G>; 2]) -> KernelWrite<Option<G>> {
    match write {
        KernelWrite::Additive => KernelWrite::Additive,
        KernelWrite::Delta { .. } => KernelWrite::Delta { beta },
        KernelWrite::LowRank { .. } => KernelWrite::LowRank { a, b },
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
