//! What the kernels of attention know when they are compiled, and how it is chosen from the device.

use crate::Client;

use crate::buffer::Storage;
use crate::engine::{SHARED_MEMORY, engine, operands, planes, registers};
use crate::tile::{BLOCK, Engine, Spread, WARP};
use crate::transfer::Shape;
use thalweg_kernels::attention::AttentionProblem;

/// The compile-time key of the kernels. Lengths, batch and heads are not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    /// Queries, and keys, of a block.
    pub chunk: usize,
    /// Features of queries and of values, up to a multiple of 16.
    pub key_cols: usize,
    pub value_cols: usize,
    pub units: usize,
    pub engine: Engine,
    /// Bytes of an element of an operand tile.
    pub operand_size: usize,
}

/// What the launches of one problem are compiled with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blueprints {
    pub forward: Blueprint,
    /// Both launches of the backward pass.
    pub backward: Blueprint,
}

impl Blueprints {
    /// The largest blocks that the device has room for; none if it has too little for the heads.
    pub fn select(client: &Client, p: &AttentionProblem, storage: Storage) -> Option<Self> {
        let preferred = engine(client, storage);
        // Registers take f32, but blocks of fewer rows than matrix units have.
        let engines = [preferred, registers(client)];
        engines.into_iter().find_map(|engine| {
            let choose = |forward| Blueprint::largest(client, p, storage, engine, forward);
            Some(Self { forward: choose(true)?, backward: choose(false)? })
        })
    }
}

impl Blueprint {
    /// The largest blocks for which there is room.
    fn largest(client: &Client, p: &AttentionProblem, storage: Storage, engine: Engine, forward: bool) -> Option<Self> {
        let hardware = &client.properties().hardware;
        let room = hardware.max_shared_memory_size.min(SHARED_MEMORY);
        let most = hardware.max_units_per_cube as usize;
        let [key_cols, value_cols] = [p.key_dim, p.value_dim].map(|dim| dim.next_multiple_of(BLOCK));
        let operand_size = operands(engine, storage).0.size();
        // Sums of outputs and gradients should not take more registers than a unit has.
        let widest = key_cols.max(value_cols);
        let chunks = [64, 32, 16, 8].into_iter().filter(|chunk| *chunk >= BLOCK || !engine.on_matrix_units());
        chunks
            .map(|chunk| {
                let units = match engine {
                    Engine::Registers { side: 1 } => 2 * chunk,
                    Engine::Registers { .. } => (chunk * widest / 32).next_multiple_of(chunk).clamp(2 * WARP, 256),
                    Engine::Matrix { plane, .. } => planes(plane, chunk, widest),
                    Engine::Mma if forward && value_cols <= 128 => WARP * (chunk / BLOCK).max(2),
                    Engine::Mma => planes(WARP, chunk, widest),
                };
                Self { chunk, key_cols, value_cols, units, engine, operand_size }
            })
            .find(|b| b.units <= most && b.shared_memory(forward) <= room)
    }

    /// Padding of f32 tiles.
    pub fn padding(&self) -> usize {
        self.engine.padding(4)
    }

    /// Padding of operand tiles.
    pub fn operand_padding(&self) -> usize {
        self.engine.padding(self.operand_size)
    }

    /// A matrix of sums.
    pub fn spread(&self, cols: usize) -> Spread {
        Spread { rows: self.chunk, cols, units: self.units, engine: self.engine }
    }

    /// A tile that all units fill.
    pub fn shape(&self, cols: usize) -> Shape {
        Shape { rows: self.chunk, cols, units: self.units }
    }

    /// Units of a row, where rows of scores are summed through shared memory.
    pub fn shares(&self) -> usize {
        self.units / self.chunk
    }

    /// Whether a row of scores is in the registers of four neighbours, and a row of outputs in those of the same.
    pub fn by_plane(&self) -> bool {
        let [scores, outputs] = [self.chunk, self.value_cols].map(|cols| self.spread(cols));
        self.engine == Engine::Mma && scores.across() == 1 && outputs.across() == 1 && scores.even() && outputs.even()
    }

    fn float(&self, cols: usize) -> usize {
        self.chunk * (cols + self.padding()) * 4
    }

    fn operand(&self, cols: usize) -> usize {
        self.chunk * (cols + self.operand_padding()) * self.operand_size
    }

    fn sums(&self, cols: usize) -> usize {
        if self.spread(cols).in_memory() { self.float(cols) } else { 64 }
    }

    /// What the forward pass, or the launch for keys and values, which of the backward pass has the most, needs in bytes.
    fn shared_memory(&self, forward: bool) -> usize {
        let (c, k, v) = (self.chunk, self.key_cols, self.value_cols);
        let tiles = if forward {
            let scores = if self.by_plane() { 0 } else { self.float(c) };
            2 * self.operand(k) + self.operand(v) + self.operand(c) + scores + self.sums(v)
        } else {
            2 * (self.operand(k) + self.operand(v) + self.operand(c) + self.sums(c)) + self.sums(k) + self.sums(v)
        };
        // And what is lost because tiles begin at multiples of 32 bytes.
        tiles + (3 * c + self.units) * 4 + 512
    }
}
