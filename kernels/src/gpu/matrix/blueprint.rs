//! What the kernels of a matrix recurrence know when they are compiled, and how it is chosen from the device.

use cubecl::client::Client;
use cubecl::ir::features::MmaConfig;

use super::super::buffer::Storage;
use super::super::tile::{BLOCK, Engine};
use crate::matrix::MatrixProblem;

/// What the decay depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GateKind {
    None,
    /// One per head, for each token or for all.
    Head,
    Key,
}

/// The compile-time key of the kernels. Lengths, batch, head counts and head sizes are not in it: a new sequence
/// length compiles and tunes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub gate: GateKind,
    pub delta: bool,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Key or value features that are in shared memory at a time; at most `chunk`.
    pub block: usize,
    pub units: usize,
    pub engine: Engine,
    /// Bytes of an element of an operand tile: the storage type on matrix units, f32 in registers.
    pub operand_size: usize,
}

/// The compile-time key of the state passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct WalkBlueprint {
    pub chunk: Blueprint,
    /// Blocks of key features that a cube holds.
    pub state_blocks: usize,
    /// Value features that it holds.
    pub value_block: usize,
}

/// Shared memory that a cube asks for at most: two or more cubes fit one multiprocessor of the larger devices.
const SHARED_MEMORY: usize = 100 << 10;

impl Blueprint {
    /// The largest tiles that the device has room for.
    pub fn select(client: &Client, p: &MatrixProblem, storage: Storage, gate: GateKind, delta: bool) -> Option<Self> {
        let hardware = &client.properties().hardware;
        let engine = engine(client, storage);
        let room = hardware.max_shared_memory_size.min(SHARED_MEMORY);
        let operand_size = if engine.on_matrix_units() { storage.size() } else { 4 };
        let sizes = [(64, 64), (64, 32), (32, 32), (32, 16), (16, 16)];
        let widest = p.key_dim.max(p.value_dim).next_multiple_of(BLOCK);
        sizes
            .into_iter()
            .map(|(chunk, block)| {
                let block = widest.min(block);
                let units = match engine {
                    Engine::Registers { .. } => (chunk * block / 8).min(256),
                    Engine::Matrix { plane } => plane * (chunk * block / (2 * BLOCK * BLOCK)).clamp(1, 8),
                };
                let units = units.min(hardware.max_units_per_cube as usize);
                Self { gate, delta, chunk, block, units, engine, operand_size }
            })
            .find(|blueprint| blueprint.shared_memory(p.key_dim) <= room)
    }

    /// Sub-blocks of a chunk.
    pub const fn segments(&self) -> usize {
        self.chunk / BLOCK
    }

    /// Padding of f32 tiles.
    pub fn padding(&self) -> usize {
        self.engine.padding(4)
    }

    /// Padding of operand tiles.
    pub fn operand_padding(&self) -> usize {
        self.engine.padding(self.operand_size)
    }

    /// Side of a unit's blocks in products that are f32 on every device.
    pub fn side(&self) -> usize {
        if let Engine::Registers { side } = self.engine { side } else { 4 }
    }

    /// Blocks of key features that one cube of a state pass holds: all of them if the write reads the state, else one,
    /// so that more cubes can work.
    pub fn state_blocks(&self, key_dim: usize) -> usize {
        if self.delta { key_dim.div_ceil(self.block) } else { 1 }
    }

    /// How the state passes cut the state: their cubes are few and walk a whole sequence, so value features are cut finer
    /// where that lets more of the device work.
    pub fn walk(&self, client: &Client, p: &MatrixProblem, sequences: usize) -> WalkBlueprint {
        let processors = client.properties().hardware.num_streaming_multiprocessors.unwrap_or(0) as usize;
        let state_blocks = self.state_blocks(p.key_dim);
        let key_parts = p.key_dim.div_ceil(self.block) / state_blocks;
        let cubes = |value_block: usize| sequences * p.value_heads * key_parts * p.value_dim.div_ceil(value_block);
        let mut value_block = self.block;
        while value_block.is_multiple_of(2 * BLOCK) && cubes(value_block) < processors {
            value_block /= 2;
        }
        WalkBlueprint { chunk: *self, state_blocks, value_block }
    }

    /// The most that one of the kernels needs, in bytes.
    pub fn shared_memory(&self, key_dim: usize) -> usize {
        let float = |rows: usize, cols: usize| rows * (cols + self.padding()) * 4;
        let operand = |rows: usize, cols: usize| rows * (cols + self.operand_padding()) * self.operand_size;
        let (c, d, only_delta) = (self.chunk, self.block, self.delta as usize);
        let scores = 2 * float(c, c) + float(BLOCK, c) + 3 * operand(c, d);
        let state = float(self.state_blocks(key_dim) * d, d)
            + 2 * operand(c, d)
            + only_delta * (float(c, d) + operand(c, d) + operand(d, d) + operand(c, c));
        let output = float(c, d) + 2 * operand(c, d) + operand(d, d) + operand(c, c);
        let key_wise = (self.gate == GateKind::Key) as usize;
        let backward = (1 + only_delta) * operand(c, c)
            + (3 + only_delta + key_wise) * float(c, d)
            + 2 * operand(c, d)
            + operand(d, d);
        let decay = if self.gate == GateKind::Key { float(c, d) + self.segments() * d * 4 } else { 3 * c * 4 };
        // Gradients by token, and the carry by key feature.
        let small = (5 * c + 2 * d) * 4;
        scores.max(state).max(output).max(backward) + decay + small
    }
}

/// Matrix units compute with operands of 16 bits; f32 tensors keep their precision in registers.
fn engine(client: &Client, storage: Storage) -> Engine {
    let properties = client.properties();
    let wanted = MmaConfig {
        a_type: storage.elem_type(),
        b_type: storage.elem_type(),
        cd_type: Storage::F32.elem_type(),
        m: BLOCK as u32,
        n: BLOCK as u32,
        k: BLOCK as u32,
    };
    let (plane_min, plane) = (properties.hardware.plane_size_min, properties.hardware.plane_size_max);
    if storage != Storage::F32 && plane_min == plane && properties.features.matmul.cmma.contains(&wanted) {
        Engine::Matrix { plane: plane as usize }
    } else {
        // Planes of 8 are the vectors of a CPU, whose compiler takes minutes over unrolled blocks.
        Engine::Registers { side: if plane > 8 { 4 } else { 1 } }
    }
}
