//! What the kernels of a matrix recurrence know when they are compiled, and how it is chosen from the device.

use crate::Client;

use super::decay::Role;
use super::panels::CARRIERS;
use crate::buffer::Storage;
use crate::engine::{SHARED_MEMORY, engine, operands, planes};
use crate::tile::{BLOCK, Engine, Spread, WARP};
use crate::transfer::Shape;
pub(crate) use thalweg_kernels::matrix::GateKind;
use thalweg_kernels::matrix::MatrixProblem;

/// The compile-time key of the kernels. Lengths, batch, head counts and head sizes are not in it: a new sequence
/// length compiles and tunes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Blueprint {
    pub gate: GateKind,
    pub delta: bool,
    /// Whether two tokens are one of a [low-rank write](super::low_rank): `delta` with a gate per key feature, and keys of
    /// their own that read the state before it is decayed.
    pub low_rank: bool,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Key or value features that are in shared memory at a time; at most `chunk`.
    pub block: usize,
    pub units: usize,
    pub engine: Engine,
    /// Bytes of an element of an operand tile: the storage type on matrix units, f32 in registers.
    pub operand_size: usize,
    /// Whether pairs within sub-blocks may be products too where gates per key feature are mild: an operand then holds
    /// what a gate would have to undo, which is in the range of bf16.
    pub inverts: bool,
}

/// The compile-time key of the state passes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct WalkBlueprint {
    pub chunk: Blueprint,
    /// Blocks of key features that a cube holds.
    pub state_blocks: usize,
    /// Value features that it holds.
    pub value_block: usize,
    /// Whether all keys of a chunk that it needs are in shared memory at once.
    pub resident: bool,
    /// Whether planes compute by themselves, as in [`super::panels`].
    pub panels: bool,
}

impl WalkBlueprint {
    /// Key features that a cube holds.
    pub fn rows(&self) -> usize {
        self.state_blocks * self.chunk.block
    }

    /// Key features in the tile of keys.
    pub fn key_cols(&self) -> usize {
        if self.resident { self.rows() } else { self.chunk.block }
    }

    /// The state.
    pub fn state(&self) -> Spread {
        self.chunk.spread(self.rows(), self.value_block)
    }

    /// What is computed of a chunk's values with the delta rule.
    pub fn written(&self) -> Spread {
        self.chunk.spread(self.chunk.if_delta(self.chunk.chunk), self.value_block)
    }

    /// Rows of the state in the element type of the keys; one if it is read as it is.
    pub fn narrow_rows(&self) -> usize {
        let as_it_is = self.state().in_memory() && !(self.chunk.delta && self.chunk.engine.on_matrix_units());
        if as_it_is { 1 } else { self.rows() }
    }

    /// The tile of keys.
    pub fn keys(&self) -> Shape {
        self.tile(self.key_cols())
    }

    /// A tile of values.
    pub fn values(&self) -> Shape {
        self.tile(self.value_block)
    }

    /// A tile of scores.
    pub fn scores(&self) -> Shape {
        self.tile(self.chunk.chunk)
    }

    /// Whether keys are fetched ahead, if any are `wanted`.
    pub fn keys_ahead(&self, wanted: bool) -> bool {
        wanted && self.resident
    }

    /// Factors of the state's rows that a unit fetches.
    pub fn ends(&self) -> usize {
        self.rows().div_ceil(self.chunk.units)
    }

    fn tile(&self, cols: usize) -> Shape {
        self.chunk.shape(self.chunk.chunk, cols)
    }

    /// The most that a state pass by panels needs, in bytes.
    pub fn panel_memory(&self) -> usize {
        let (b, c, rows, d) = (&self.chunk, self.chunk.chunk, self.rows(), self.value_block);
        let key_wise = b.gate == GateKind::KEY;
        // Backwards queries and with the delta rule keys, or both kinds of keys.
        let keys = 1 + b.delta as usize * (1 + key_wise as usize);
        2 * (keys * b.operand(c, rows)
            + 2 * b.operand(b.if_delta(c), c)
            + b.operand(c + b.if_delta(c), d)
            + b.operand(rows, d)
            + (3 * c + rows) * 4)
            + 512
    }

    /// The most that a state pass needs, in bytes.
    pub fn shared_memory(&self) -> usize {
        let (b, c, d) = (&self.chunk, self.chunk.chunk, self.value_block);
        let both = if self.resident && b.delta { c } else { 1 };
        b.sums(self.state())
            + b.sums(self.written())
            + b.operand(self.narrow_rows(), d)
            + b.operand(b.if_delta(self.written().stage()), d)
            + b.operand(c + both, self.key_cols())
            + b.operand(c + b.if_delta(c), d)
            + b.operand(b.if_delta(c), c)
            + (c + self.rows()) * 4
            + b.by_row().common_memory()
    }
}

/// The compile-time key of the launch that reads the states.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct ReadBlueprint {
    pub chunk: Blueprint,
    /// Value features that a cube computes.
    pub value_block: usize,
    /// Whether cubes compute a chunk's scores themselves.
    pub scores: bool,
}

impl ReadBlueprint {
    /// What it needs, in bytes.
    fn shared_memory(&self) -> usize {
        let (b, c, d) = (&self.chunk, self.chunk.chunk, self.value_block);
        let keys = if self.scores { c } else { 1 };
        b.sums(b.spread(c, d))
            + b.sums(b.spread(1, c))
            + b.operand(c + keys, b.block)
            + b.operand(b.block + c, d)
            + b.operand(c, c)
            + b.between()
            + b.by_row().common_memory()
    }
}

/// Key features of a state that a plane has registers for.
const MOST_ROWS: usize = 128;

impl Blueprint {
    /// The largest tiles that the device has room for.
    pub fn select(
        client: &Client,
        p: &MatrixProblem,
        storage: Storage,
        gate: GateKind,
        delta: bool,
        low_rank: bool,
    ) -> Option<Self> {
        let hardware = &client.properties().hardware;
        let engine = engine(client, storage);
        let room = hardware.max_shared_memory_size.min(SHARED_MEMORY);
        let operand_size = operands(engine, storage).0.size();
        let sizes = [(64, 64), (64, 32), (32, 32), (32, 16), (16, 16)];
        let widest = p.key_dim.max(p.value_dim).next_multiple_of(BLOCK);
        sizes
            .into_iter()
            .map(|(chunk, block)| {
                let block = widest.min(block);
                let inverts = gate == GateKind::KEY && engine == Engine::Mma && storage == Storage::Bf16;
                Self { gate, delta, low_rank, chunk, block, units: 0, engine, operand_size, inverts }
                    .with_block(client, block)
            })
            .find(|b| b.shared_memory(p.key_dim) <= room && b.for_gradients(client).is_some())
    }

    /// The same with other blocks of features.
    fn with_block(self, client: &Client, block: usize) -> Self {
        let units = match self.engine {
            Engine::Registers { .. } => (self.chunk * block / 8).min(256),
            Engine::Matrix { plane, .. } => planes(plane, self.chunk, block),
            // As many for narrow blocks, which fit where there is little room: they hide more of what they wait for.
            Engine::Mma => planes(WARP, self.chunk, self.chunk),
        };
        Self { block, units: units.min(client.properties().hardware.max_units_per_cube as usize), ..self }
    }

    /// For the launch that computes the gradients of queries and keys, which has the most in shared memory.
    pub fn for_gradients(&self, client: &Client) -> Option<Self> {
        let room = client.properties().hardware.max_shared_memory_size.min(SHARED_MEMORY);
        // Pairs that are summed one by one under gates per key feature take registers for each element.
        let singly = self.gate == GateKind::KEY && self.engine == Engine::Mma && !self.inverts;
        let widest = if singly { self.block.min(32) } else { self.block };
        let blocks = [widest, 64, 32, 16].into_iter().filter(|block| *block <= widest);
        blocks.map(|block| self.with_block(client, block)).find(|b| b.gradients_memory() <= room)
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
        // Twice the units for keys that would fill many registers while they are on their way.
        let hardware = &client.properties().hardware;
        let registers = self.chunk * state_blocks * self.block * self.operand_size / (4 * self.units);
        let wide = if registers >= 32 { 2 } else { 1 };
        let units = (wide * self.units).min(hardware.max_units_per_cube as usize);
        let panels = [64, 32, 16].into_iter().filter(|block| *block <= p.value_dim.next_multiple_of(BLOCK));
        let mut panels = panels.map(|block| self.panels(state_blocks, block));
        let fits = |walk: &WalkBlueprint| walk.panel_memory() <= hardware.max_shared_memory_size;
        if self.engine == Engine::Mma
            && state_blocks * self.block <= MOST_ROWS
            && let Some(walk) =
                panels.find(|w| (w.value_block == BLOCK || cubes(w.value_block) >= processors) && fits(w))
        {
            return walk;
        }
        let chunk = Self { units, ..*self };
        let walk = WalkBlueprint { chunk, state_blocks, value_block, resident: true, panels: false };
        let fits = walk.shared_memory() <= hardware.max_shared_memory_size;
        WalkBlueprint { resident: fits, ..walk }
    }

    /// How states are read: on matrix units whose sums stay in registers, two blocks of values at a time, and with scores of
    /// one's own where nothing else needs them.
    pub fn read(&self, p: &MatrixProblem) -> ReadBlueprint {
        let narrow = ReadBlueprint { chunk: *self, value_block: self.block, scores: self.scores_in_place() };
        let wide = ReadBlueprint { value_block: 2 * self.block, ..narrow };
        let fits = wide.shared_memory() <= SHARED_MEMORY && p.value_dim > self.block;
        if self.engine == Engine::Mma && fits { wide } else { narrow }
    }

    /// Whether no launch writes a chunk's scores: what reads the state computes them. Only the delta rule needs them
    /// elsewhere, and a gate per key feature makes them costly.
    pub fn scores_in_place(&self) -> bool {
        self.weighs_scores() && !self.delta
    }

    /// A tile that all units fill.
    pub fn shape(&self, rows: usize, cols: usize) -> Shape {
        Shape { rows, cols, units: self.units }
    }

    /// A matrix of sums.
    pub fn spread(&self, rows: usize, cols: usize) -> Spread {
        Spread { rows, cols, units: self.units, engine: self.engine }
    }

    /// Shared memory of sums.
    fn sums(&self, spread: Spread) -> usize {
        if spread.in_memory() { self.float(spread.rows.max(1), spread.cols) } else { self.float(1, 1) }
    }

    fn panels(&self, state_blocks: usize, value_block: usize) -> WalkBlueprint {
        let walk = WalkBlueprint { chunk: *self, state_blocks, value_block, resident: true, panels: true };
        WalkBlueprint { chunk: Self { units: walk.computing() + CARRIERS, ..*self }, ..walk }
    }

    fn float(&self, rows: usize, cols: usize) -> usize {
        rows * (cols + self.padding()) * 4
    }

    fn operand(&self, rows: usize, cols: usize) -> usize {
        rows * (cols + self.operand_padding()) * self.operand_size
    }

    /// Whether scores meet the decay in registers.
    pub fn weighs_scores(&self) -> bool {
        self.engine == Engine::Mma && self.gate != GateKind::KEY
    }

    /// Whether that takes the decay between the tokens of a sub-block.
    pub fn sums_between(&self) -> bool {
        self.weighs_scores() && self.gate == GateKind::HEAD
    }

    /// Shared memory for it.
    fn between(&self) -> usize {
        if self.sums_between() { self.float(self.chunk, BLOCK) } else { self.float(1, 1) }
    }

    /// For launches whose queries and keys have met a gate per key feature already: what is left to weigh are rows.
    pub fn by_row(&self) -> Self {
        let gate = if self.gate == GateKind::KEY { GateKind::None } else { self.gate };
        Self { gate, ..*self }
    }

    /// Whether a token has a step size of its own, whose gradient someone wants.
    pub fn steps(&self) -> bool {
        self.delta && !self.low_rank
    }

    /// For launches to which keys that only read are keys like others.
    pub fn plain(&self) -> Self {
        Self { low_rank: false, ..*self }
    }

    /// How keys that read the state meet the decay.
    pub fn reads_within(&self) -> Role {
        if self.low_rank { Role::WithinBefore } else { Role::Within }
    }

    /// The same from the start of the chunk.
    pub fn reads_from_start(&self) -> Role {
        if self.low_rank { Role::FromStartBefore } else { Role::FromStart }
    }

    /// Rows of a tile that only the delta rule needs: without it there is one, as none cannot be.
    fn if_delta(&self, rows: usize) -> usize {
        if self.delta { rows } else { 1 }
    }

    /// The decay, and what is lost because tiles begin at multiples of 32 bytes.
    fn common_memory(&self) -> usize {
        let (c, d) = (self.chunk, self.block);
        let decay = match self.gate {
            GateKind::KEY => 2 * self.float(c, d) + self.segments() * d * 4 + self.units,
            GateKind::None | GateKind::CONSTANT | GateKind::HEAD => (5 * c + self.segments()) * 4 + self.float(1, 1),
        };
        decay + 512
    }

    /// The most that one of the kernels needs, in bytes; the state passes with a block of keys at a time.
    pub fn shared_memory(&self, key_dim: usize) -> usize {
        let (c, d, delta) = (self.chunk, self.block, self.if_delta(self.chunk));
        let inverse = if self.delta { self.float(c / 2, c / 2) } else { 0 };
        let scores =
            self.float(c + delta, c) + self.operand(2 * c + delta, d) + self.operand(c, c) + inverse + self.between();
        let output = ReadBlueprint { chunk: *self, value_block: d, scores: self.scores_in_place() }.shared_memory();
        let state_blocks = self.state_blocks(key_dim);
        let walk = WalkBlueprint { chunk: *self, state_blocks, value_block: d, resident: false, panels: false };
        (scores + self.common_memory()).max(output).max(walk.shared_memory())
    }

    /// What the gradients of queries and keys need, in bytes.
    fn gradients_memory(&self) -> usize {
        let (c, d, delta) = (self.chunk, self.block, self.if_delta(self.chunk));
        let sums = |rows| self.sums(self.spread(rows, d));
        let left = 1 + self.delta as usize;
        // Under gates per key feature products wait for weights of their own.
        let more = if self.gate == GateKind::KEY { left + 1 } else { 0 };
        self.operand(c + delta, c)
            + (2 + left + more) * sums(c)
            + if self.gate == GateKind::KEY { 0 } else { self.float(c, d) }
            + self.operand(3 * c + 2 * d, d)
            + (2 * c + d + (1 + self.delta as usize) * self.units) * 4
            + if self.low_rank { 3 * c * 4 } else { 0 }
            + if self.gate == GateKind::HEAD { (2 * self.units + d) * 4 } else { 0 }
            + self.common_memory()
    }
}
