//! Host side of the stages: which memory a launch reads and writes.

use cubecl::client::Client;
use cubecl::ir::{AddressType, ElemType};
use cubecl::prelude::{BufferArg, CubeCount, CubeDim};

use super::super::buffer::{Buffer, Storage};
use super::super::reduce::{sum_all_rows, sum_rows};
use super::super::tile::Engine;
use super::blueprint::{Blueprint, GateKind};
use super::place::Layout;
use super::{Inputs, validate};
use crate::error::Error;
use crate::matrix::MatrixProblem;

use super::{Gradients, chunk_backward, output, scores, state, state_backward};

/// Stage 2 reversed.
pub(crate) struct WalkBack {
    /// Gradient of the values, for the delta rule.
    pub z: Buffer,
    /// Of the state that leaves each chunk.
    pub dstates: Buffer,
    pub d_initial_state: Buffer,
}

/// One operation's launches share this.
pub(crate) struct Launch<'a> {
    client: &'a Client,
    pub p: &'a MatrixProblem,
    x: &'a Inputs<'a>,
    b: Blueprint,
    layout: Layout,
    table: Buffer,
    /// Stands for tensors that are absent.
    nothing: Buffer,
    address: AddressType,
    types: [ElemType; 2],
}

/// Stage 1.
pub(crate) struct Scores {
    pub a: Buffer,
    pub t: Buffer,
}

/// Stage 2.
pub(crate) struct Walk {
    /// What the tokens want to write: `v`, or for the delta rule what of it is new.
    pub x: Buffer,
    pub states: Buffer,
    pub final_state: Buffer,
}

impl<'a> Launch<'a> {
    pub fn new(client: &'a Client, p: &'a MatrixProblem, x: &'a Inputs<'a>) -> Result<Self, Error> {
        let sequences = validate(p, x)?;
        let storage = x.q.storage;
        let delta = x.write.beta().is_some();
        let Some(b) = Blueprint::select(client, p, storage, x.gate.kind(), delta) else {
            let room = client.properties().hardware.max_shared_memory_size;
            let reason = format!("{room} bytes of shared memory are too few for `key_dim` {}", p.key_dim);
            return Err(Error::Device { reason });
        };
        let layout = Layout::new(p, &sequences, b.chunk);
        let table = Buffer::table(client, &layout.table);
        let nothing = Buffer::from_slice(client, &[0.0f32]);
        let operand = if b.engine == Engine::Registers { Storage::F32 } else { storage };
        let largest = (layout.all_chunks * p.value_heads * p.key_dim * p.value_dim)
            .max(x.q.len)
            .max(x.v.len)
            .max(x.gate.tensor().map_or(0, |g| g.len))
            .max(layout.all_chunks * p.value_heads * b.chunk * b.chunk);
        let address = if largest > i32::MAX as usize { AddressType::U64 } else { AddressType::U32 };
        let types = [storage.elem_type(), operand.elem_type()];
        Ok(Self { client, p, x, b, layout, table, nothing, address, types })
    }

    fn operand(&self) -> Storage {
        if self.b.engine == Engine::Registers { Storage::F32 } else { self.x.q.storage }
    }

    /// An output that only exists if `wanted`.
    fn output_if(&self, wanted: bool, storage: Storage, len: usize) -> Buffer {
        Buffer::output(self.client, storage, if wanted { len } else { 1 })
    }

    fn tensor(&self, optional: Option<&Buffer>) -> BufferArg {
        optional.unwrap_or(&self.nothing).arg()
    }

    /// `count` cubes, in as many dimensions as the device wants.
    fn cubes(&self, count: usize) -> CubeCount {
        let max = self.client.properties().hardware.max_cube_count.0 as usize;
        let x = count.min(max);
        CubeCount::Static(x as u32, count.div_ceil(x) as u32, 1)
    }

    fn units(&self) -> CubeDim {
        CubeDim::new_1d(self.b.units as u32)
    }

    fn walks(&self) -> CubeCount {
        let parts = self.b.key_blocks() / self.b.state_key_blocks() * self.b.value_blocks();
        self.cubes(self.layout.sequences * self.p.value_heads * parts)
    }

    fn chunk_heads(&self) -> usize {
        self.layout.all_chunks * self.p.value_heads
    }

    pub fn scores(&self) -> Scores {
        let squares = self.chunk_heads() * self.b.chunk * self.b.chunk;
        let a = Buffer::output(self.client, self.operand(), squares);
        let t = self.output_if(self.b.delta, self.operand(), squares);
        scores::scores_kernel::launch(
            self.client,
            self.cubes(self.chunk_heads()),
            self.units(),
            self.address,
            self.x.q.arg(),
            self.x.k.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(self.x.write.beta()),
            self.table.arg(),
            a.arg(),
            t.arg(),
            self.layout.sizes(),
            self.b,
            self.types,
        );
        Scores { a, t }
    }

    pub fn state(&self, scores: &Scores) -> Walk {
        let storage = self.x.q.storage;
        let x = self.output_if(self.b.delta, storage, self.x.v.len);
        let states = Buffer::output(self.client, Storage::F32, self.chunk_heads() * self.p.key_dim * self.p.value_dim);
        let final_state = Buffer::output(self.client, Storage::F32, self.p.state_shape().iter().product());
        state::state_kernel::launch(
            self.client,
            self.walks(),
            self.units(),
            self.address,
            self.x.k.arg(),
            self.x.v.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(self.x.write.beta()),
            scores.t.arg(),
            self.tensor(self.x.initial_state),
            self.table.arg(),
            x.arg(),
            states.arg(),
            final_state.arg(),
            self.layout.sizes(),
            self.layout.sequences,
            self.x.initial_state.is_some(),
            self.b,
            self.types,
        );
        let x = if self.b.delta { x } else { self.x.v.clone() };
        Walk { x, states, final_state }
    }

    pub fn output(&self, scores: &Scores, walk: &Walk) -> Buffer {
        let o = Buffer::output(self.client, self.x.q.storage, self.x.v.len);
        output::output_kernel::launch(
            self.client,
            self.cubes(self.chunk_heads() * self.b.value_blocks()),
            self.units(),
            self.address,
            self.x.q.arg(),
            walk.x.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(self.x.write.beta()),
            scores.a.arg(),
            walk.states.arg(),
            self.table.arg(),
            o.arg(),
            self.layout.sizes(),
            self.b,
            self.types,
        );
        o
    }

    pub fn state_backward(&self, scores: &Scores, d_o: &Buffer, d_final_state: Option<&Buffer>) -> WalkBack {
        let storage = self.x.q.storage;
        let z = self.output_if(self.b.delta, storage, self.x.v.len);
        let dstates = Buffer::output(self.client, Storage::F32, self.chunk_heads() * self.p.key_dim * self.p.value_dim);
        let d_initial_state = Buffer::output(self.client, Storage::F32, self.p.state_shape().iter().product());
        state_backward::state_backward_kernel::launch(
            self.client,
            self.walks(),
            self.units(),
            self.address,
            self.x.q.arg(),
            self.x.k.arg(),
            self.tensor(self.x.gate.tensor()),
            self.tensor(self.x.write.beta()),
            scores.a.arg(),
            scores.t.arg(),
            d_o.arg(),
            self.tensor(d_final_state),
            self.table.arg(),
            z.arg(),
            dstates.arg(),
            d_initial_state.arg(),
            self.layout.sizes(),
            self.layout.sequences,
            d_final_state.is_some(),
            self.b,
            self.types,
        );
        WalkBack { z, dstates, d_initial_state }
    }

    pub fn chunk_backward(&self, scores: &Scores, walk: &Walk, back: WalkBack, d_o: &Buffer) -> Gradients {
        let (storage, p, tokens) = (self.x.q.storage, self.p, self.p.batch * self.p.time);
        let (delta, gate) = (self.b.delta, self.b.gate);
        let group = p.value_heads / p.heads;
        // Heads that share queries and keys leave their parts side by side, in f32.
        let part = if group > 1 { Storage::F32 } else { storage };
        let by_key = tokens * p.value_heads * p.key_dim;
        let by_head = tokens * p.value_heads;
        let dq = Buffer::output(self.client, part, by_key);
        let dk = Buffer::output(self.client, part, by_key);
        let dv = self.output_if(!delta, storage, self.x.v.len);
        let dg_len = if gate == GateKind::Key { by_key } else { by_head };
        let dg = self.output_if(gate != GateKind::None, Storage::F32, dg_len);
        let dbeta = self.output_if(delta, Storage::F32, by_head);
        chunk_backward::chunk_backward_kernel::launch(
            self.client,
            self.cubes(self.chunk_heads()),
            self.units(),
            self.address,
            chunk_backward::OperandsLaunch::new(
                self.x.q.arg(),
                self.x.k.arg(),
                self.tensor(self.x.gate.tensor()),
                self.tensor(self.x.write.beta()),
                walk.x.arg(),
                scores.a.arg(),
                walk.states.arg(),
            ),
            d_o.arg(),
            back.z.arg(),
            back.dstates.arg(),
            self.table.arg(),
            chunk_backward::GradientsLaunch::new(dq.arg(), dk.arg(), dv.arg(), dg.arg(), dbeta.arg()),
            self.layout.sizes(),
            self.b,
            [self.types[0], self.types[1], part.elem_type()],
        );
        let ungroup = |x: Buffer| if group > 1 { sum_rows(self.client, &x, group, p.key_dim, storage) } else { x };
        let dg = match gate {
            GateKind::None => None,
            GateKind::Constant => Some(sum_all_rows(self.client, dg, p.value_heads)),
            GateKind::Head | GateKind::Key => Some(dg),
        };
        Gradients {
            dq: ungroup(dq),
            dk: ungroup(dk),
            dv: if delta { back.z } else { dv },
            dg,
            dbeta: delta.then_some(dbeta),
            d_initial_state: self.x.initial_state.map(|_| back.d_initial_state),
        }
    }

    /// A tensor of zeros for a gradient that does not exist.
    pub fn zeros(&self, like: &Buffer) -> Buffer {
        let handle = self.client.create_from_slice(&vec![0; like.len * like.storage.size()]);
        Buffer { handle, ..*like }
    }
}
