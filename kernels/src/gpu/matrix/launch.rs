//! Host side of the stages: which memory a launch reads and writes.

use cubecl::client::Client;
use cubecl::ir::{AddressType, ElemType};
use cubecl::prelude::{BufferArg, CubeCount, CubeDim};

use super::super::buffer::{Buffer, Storage};
use super::super::tile::Engine;
use super::blueprint::Blueprint;
use super::place::Layout;
use super::{Inputs, validate};
use crate::error::Error;
use crate::matrix::MatrixProblem;

use super::{output, scores, state};

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
}
