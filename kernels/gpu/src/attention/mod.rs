//! Causal softmax attention on a GPU: what [`thalweg_kernels::attention`] computes, on tensors in a device's memory.
//!
//! `forward` is one launch, `backward` three: `do . o` of every query, the gradient of queries, those of keys and values.
//! Scores are only on chip, so memory is linear in the sequence length. Results do not depend on what else is in the batch, nor
//! on the run.

// In a kernel, a condition at compile time must not be merged with one at run time.
#![allow(clippy::collapsible_if)]

mod backward;
mod blueprint;
mod forward;
mod place;
mod repair;
mod softmax;

use crate::Client;
use cubecl::ir::{AddressType, ElemType};

use crate::buffer::{Buffer, Storage};
use crate::chunks::Chunks;
use crate::device::{address_type, grid, vector};
use crate::engine::{launch, operands};
use blueprint::{Blueprint, Blueprints};
use place::SizesLaunch;
use thalweg_kernels::Error;
use thalweg_kernels::Sequences;
use thalweg_kernels::attention::AttentionProblem;

/// The tensors that go in, of one element type.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// Queries, `[batch, time, heads, key_dim]`.
    pub q: &'a Buffer,
    /// Keys, `[batch, kv_time, kv_heads, key_dim]`.
    pub k: &'a Buffer,
    /// Values, `[batch, kv_time, kv_heads, value_dim]`.
    pub v: &'a Buffer,
}

/// The tensors that come out.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Outputs, `[batch, time, heads, value_dim]`.
    pub o: Buffer,
    /// Natural log of the sum of the exponentials of a query's scores, `[batch, heads, time]`, f32.
    pub lse: Buffer,
}

/// Gradients of [`Inputs`], each of the shape of its input.
#[derive(Debug, Clone)]
#[allow(missing_docs)]
pub struct Gradients {
    pub dq: Buffer,
    pub dk: Buffer,
    pub dv: Buffer,
}

/// Whether the device has shared memory enough for heads of these sizes, forward and backward.
pub fn fits(client: &Client, problem: &AttentionProblem, storage: Storage) -> bool {
    Blueprints::select(client, problem, storage).is_some()
}

/// Attention of every sequence to itself (and to what is before it, where `kv_time > time`).
///
/// # Errors
/// As [`thalweg_kernels::attention::forward`]; [`Error::Device`] if the device has too little shared memory ([`fits`]) or not the element
/// type.
pub fn forward(client: &Client, problem: &AttentionProblem, inputs: &Inputs) -> Result<Outputs, Error> {
    let launch = Launch::new(client, problem, inputs)?;
    let p = problem;
    let o = Buffer::output(client, inputs.q.storage, p.batch * p.time * p.heads * p.value_dim);
    let lse = Buffer::output(client, Storage::F32, p.batch * p.heads * p.time);
    let b = launch.b.forward;
    let blocks = launch.query_blocks(&b);
    launch!(
        launch,
        b,
        forward::forward_kernel,
        grid(client, blocks.count * p.heads)?,
        inputs.q.arg(),
        inputs.k.arg(),
        inputs.v.arg(),
        blocks.table.arg(),
        o.arg(),
        lse.arg(),
        launch.sizes(&blocks),
        b,
        launch.types,
    );
    Ok(Outputs { o, lse })
}

/// Gradients of `q`, `k` and `v`, given the outputs of [`forward`] and the cotangent `d_o` of `o`.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    client: &Client,
    problem: &AttentionProblem,
    inputs: &Inputs,
    outputs: &Outputs,
    d_o: &Buffer,
) -> Result<Gradients, Error> {
    let launch = Launch::new(client, problem, inputs)?;
    let (p, storage) = (problem, inputs.q.storage);
    outputs.o.check("o", storage, &[p.batch, p.time, p.heads, p.value_dim])?;
    outputs.lse.check("lse", Storage::F32, &[p.batch, p.heads, p.time])?;
    d_o.check("do", storage, &[p.batch, p.time, p.heads, p.value_dim])?;
    let products = Buffer::output(client, Storage::F32, outputs.lse.len);
    let b = launch.b.backward;
    let blocks = launch.query_blocks(&b);
    launch!(
        launch,
        b,
        backward::products_kernel,
        grid(client, products.len.div_ceil(b.units))?,
        outputs.o.arg(),
        d_o.arg(),
        products.arg(),
        launch.sizes(&blocks),
        launch.types[0],
    );
    let [dq, dk, dv] = [inputs.q, inputs.k, inputs.v].map(|x| Buffer::output(client, storage, x.len));
    launch!(
        launch,
        b,
        backward::queries_kernel,
        grid(client, blocks.count * p.heads)?,
        inputs.q.arg(),
        inputs.k.arg(),
        inputs.v.arg(),
        backward::OutputsLaunch::new(d_o.arg(), outputs.lse.arg(), products.arg()),
        blocks.table.arg(),
        dq.arg(),
        launch.sizes(&blocks),
        b,
        launch.types,
    );
    let blocks = launch.key_blocks(&b);
    launch!(
        launch,
        b,
        backward::keys_kernel,
        grid(client, blocks.count * p.kv_heads)?,
        inputs.q.arg(),
        inputs.k.arg(),
        inputs.v.arg(),
        backward::OutputsLaunch::new(d_o.arg(), outputs.lse.arg(), products.arg()),
        blocks.table.arg(),
        dk.arg(),
        dv.arg(),
        launch.sizes(&blocks),
        b,
        launch.types,
    );
    Ok(Gradients { dq, dk, dv })
}

/// One operation's launches share this.
struct Launch<'a> {
    client: &'a Client,
    p: &'a AttentionProblem,
    /// The sequences as queries, and as keys.
    queries: Sequences,
    keys: Sequences,
    b: Blueprints,
    address: AddressType,
    /// Elements that are read and written at a time.
    vector: usize,
    types: [ElemType; 2],
}

impl<'a> Launch<'a> {
    fn new(client: &'a Client, p: &'a AttentionProblem, x: &Inputs) -> Result<Self, Error> {
        let queries = p.check_sizes()?;
        let keys = Sequences::new(p.batch, p.kv_time, p.cu_seqlens.as_deref())?;
        let storage = x.q.storage;
        x.q.check("q", storage, &[p.batch, p.time, p.heads, p.key_dim])?;
        x.k.check("k", storage, &[p.batch, p.kv_time, p.kv_heads, p.key_dim])?;
        x.v.check("v", storage, &[p.batch, p.kv_time, p.kv_heads, p.value_dim])?;
        let Some(b) = Blueprints::select(client, p, storage) else {
            let room = client.properties().hardware.max_shared_memory_size;
            let reason = format!("{room} bytes of shared memory are too few for `key_dim` {}", p.key_dim);
            return Err(Error::Device { reason });
        };
        let address = address_type(client, storage, [x.q.len, x.k.len, x.v.len])?;
        let types = [storage.elem_type(), operands(b.forward.engine, storage).1];
        let vector = vector(b.forward.operand_size, &[p.key_dim, p.value_dim]);
        Ok(Self { client, p, queries, keys, b, address, vector, types })
    }

    fn query_blocks(&self, b: &Blueprint) -> Chunks {
        Chunks::new(self.client, &self.queries, b.chunk)
    }

    fn key_blocks(&self, b: &Blueprint) -> Chunks {
        Chunks::new(self.client, &self.keys, b.chunk)
    }

    /// Of a launch with these blocks.
    fn sizes(&self, blocks: &Chunks) -> SizesLaunch {
        let p = self.p;
        let window = p.window.unwrap_or(usize::MAX).min(p.kv_time);
        let (cut, ahead) = (blocks.cut(), p.kv_time - p.time);
        let hidden = f32::NEG_INFINITY;
        SizesLaunch::new(cut, ahead, p.time, p.heads, p.kv_heads, p.key_dim, p.value_dim, window, p.scale, hidden)
    }
}
