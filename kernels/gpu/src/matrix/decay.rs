//! The decay inside a chunk, and the loads that apply it.
//!
//! `c_i` is the sum of the log-decays up to and including token `i`. Tensors meet the decay in one of the [`Role`]s, each
//! an exponential of a sum over just the tokens between two places. No two sums are ever subtracted, so every exponent is
//! at most 0 and a gate of -1e4 costs no digits later in the chunk. A scalar gate has one weight per token; a key-wise
//! gate has one per token and feature, made for one block of features at a time of exponentials of sums within sub-blocks
//! of 16 tokens and over them; a product of numbers of at most 1 only vanishes where it should.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::place::{Place, Sizes};
use crate::tile::{BLOCK, Engine, Sums, Tile, WARP, exponential, reciprocal, unit, units};
use crate::transfer::Flight;

/// Where the decay of a row ends or begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// No decay.
    Plain,
    /// `e^{c_i}`: from the chunk's start through the token.
    FromStart,
    /// `e^{c_n - c_i}`: after the token through the chunk's end.
    ToEnd,
    /// From the start of the token's own sub-block through the token. Key-wise gates only.
    Within,
    /// The same two, but through the token before: of what reads the state before a token decays it. Key-wise gates only.
    FromStartBefore,
    WithinBefore,
    /// After the token to the start of a later sub-block; for tokens of that one, where [`Blueprint::inverts`], what undoes
    /// the decay since. Key-wise gates only.
    Toward(usize),
}

/// The decay of one chunk and head.
#[derive(CubeType)]
pub(crate) struct Decay {
    /// Scalar gates: by token the gate, its sums over the sub-block through the token and over the later ones, and the
    /// weights of `FromStart` and `ToEnd`.
    pub(super) g: Shared<[f32]>,
    pub(super) so_far: Shared<[f32]>,
    pub(super) later: Shared<[f32]>,
    from_start: Shared<[f32]>,
    to_end: Shared<[f32]>,
    /// Sums over the sub-blocks, `[segments]`; with key-wise gates their exponentials, `[segments, block]`.
    pub(super) totals: Shared<[f32]>,
    /// Key-wise gates: the decay from the start of a token's sub-block through it, and after it to the end of that,
    /// `[chunk, block]`. All weights are products of these and the totals.
    within: Tile<f32>,
    pub after: Tile<f32>,
    /// By plane, the least of the totals, where it is asked for ([`Blueprint::inverts`]).
    strongest: Shared<[f32]>,
}

/// Sums of gates over a sub-block down to which an operand may hold what undoes them.
const MILD: f32 = -30.0;

#[cube]
impl Decay {
    pub fn new(#[comptime] b: Blueprint) -> Decay {
        let tokens = comptime!(if b.gate == GateKind::HEAD { b.chunk } else { 1 });
        let (totals, rows, cols) = comptime!(match b.gate {
            GateKind::KEY => (b.segments() * b.block, b.chunk, b.block),
            _ => (b.segments(), 1, 1),
        });
        Decay {
            g: Shared::new_slice(tokens),
            so_far: Shared::new_slice(tokens),
            later: Shared::new_slice(tokens),
            from_start: Shared::new_slice(tokens),
            to_end: Shared::new_slice(tokens),
            totals: Shared::new_slice(totals),
            within: Tile::<f32>::new(rows, cols, comptime!(b.padding())),
            after: Tile::<f32>::new(rows, cols, comptime!(b.padding())),
            strongest: Shared::new_slice(comptime!(if b.inverts { b.units / WARP } else { 1 })),
        }
    }

    /// Begins a chunk: reads scalar gates. Synchronises.
    pub fn load(&mut self, g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) {
        self.begin(head_gate(g, place, sizes, b), b);
    }

    /// Begins a chunk from what [`head_gate`] has read. Synchronises.
    pub fn begin(&mut self, gate: f32, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::HEAD) {
            if unit() < b.chunk {
                self.g[unit()] = gate * comptime!(b.engine.log_scale());
            }
            sync_cube();
            // Within sub-blocks, then over them: every unit reads 16 gates and a few sums, side by side.
            for i in range_stepped(unit(), b.chunk, units()) {
                let first = (i / BLOCK) * BLOCK;
                let (mut before, mut after) = (f32::new(0.0), f32::new(0.0));
                for j in 0..BLOCK {
                    let gate = self.g[first + j];
                    before += select(first + j <= i, gate, f32::new(0.0));
                    after += select(first + j > i, gate, f32::new(0.0));
                }
                self.so_far[i] = before;
                self.later[i] = after;
                if i + 1 == first + BLOCK {
                    self.totals[i / BLOCK] = before;
                }
            }
            sync_cube();
            for i in range_stepped(unit(), b.chunk, units()) {
                let segment = i / BLOCK;
                let (mut before, mut after) = (f32::new(0.0), f32::new(0.0));
                for s in 0..comptime!(b.segments()) {
                    before += select(s < segment, self.totals[s], f32::new(0.0));
                    after += select(s > segment, self.totals[s], f32::new(0.0));
                }
                self.from_start[i] = exponential(self.so_far[i] + before, b.engine);
                self.to_end[i] = exponential(self.later[i] + after, b.engine);
            }
            sync_cube();
        }
    }

    /// Begins a chunk of whose scalar gates only the weights of rows are wanted, from what [`RowGates`] has read. They are
    /// there after the next barrier.
    pub fn begin_rows(&mut self, gates: &RowGates, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::HEAD) {
            if comptime!(b.engine == Engine::Mma) {
                if unit() / WARP < comptime!(b.chunk.div_ceil(WARP)) {
                    let (from_start, to_end) = gates.weights(unit() / WARP, b);
                    if unit() < b.chunk {
                        self.from_start[unit()] = from_start;
                        self.to_end[unit()] = to_end;
                    }
                }
            } else {
                self.begin(gates.gates[0], b);
            }
        }
    }

    /// Reads and begins a chunk of whose scalar gates only the weights of rows are wanted. Synchronises.
    pub fn load_rows(&mut self, g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) {
        let mut gates = RowGates::new(b);
        gates.ask(g, place, sizes, b);
        self.begin_rows(&gates, b);
        if comptime!(b.gate == GateKind::HEAD) {
            sync_cube();
        }
    }

    /// Begins a block of key features. Synchronises.
    pub fn load_block(&mut self, g: &[f32], place: &Place, sizes: &Sizes, k0: usize, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::KEY) {
            let mut least = f32::new(0.0);
            for item in range_stepped(unit(), comptime!(b.segments() * b.block), units()) {
                let (segment, k) = (item / b.block, item % b.block);
                let first = segment * BLOCK;
                let mut gates = Array::<f32>::new(BLOCK);
                #[unroll]
                for i in 0..BLOCK {
                    gates[i] = key_gate(g, place, sizes, first + i, k0 + k) * comptime!(b.engine.log_scale());
                }
                let mut sum = f32::new(0.0);
                #[unroll]
                for i in 0..BLOCK {
                    let through = sum + gates[i];
                    self.within.set(first + i, k, exponential(through, b.engine));
                    sum = through;
                }
                self.totals[item] = self.within.get(first + comptime!(BLOCK - 1), k);
                least = least.min(sum);
                let mut sum = f32::new(0.0);
                self.after.set(first + comptime!(BLOCK - 1), k, 1.0);
                #[unroll]
                for i in 1..BLOCK {
                    let back = comptime!(BLOCK - 1 - i);
                    let later = sum + gates[comptime!(back + 1)];
                    self.after.set(first + back, k, exponential(later, b.engine));
                    sum = later;
                }
            }
            if comptime!(b.inverts) {
                let (least, lane) = (plane_min(least), unit() % WARP);
                if lane == 0 {
                    self.strongest[unit() / WARP] = least;
                }
            }
            sync_cube();
        }
    }

    /// Whether the block of key features that began last has only mild gates.
    pub fn mild(&self, #[comptime] b: Blueprint) -> bool {
        let mut least = f32::new(0.0);
        #[unroll]
        for plane in 0..comptime!(b.units / WARP) {
            least = least.min(self.strongest[plane]);
        }
        least >= comptime!(MILD * b.engine.log_scale())
    }

    /// Leaves `e^g` of each token and feature of the block in the place of what [`Role::Within`] and those made of it need.
    /// Key-wise gates only.
    pub fn factors(&mut self, g: &[f32], place: &Place, sizes: &Sizes, k0: usize, #[comptime] b: Blueprint) {
        for i in range_stepped(unit(), comptime!(b.chunk * b.block), units()) {
            let (row, k) = (i / b.block, i % b.block);
            let gate = key_gate(g, place, sizes, row, k0 + k) * comptime!(b.engine.log_scale());
            self.within.set(row, k, exponential(gate, b.engine));
        }
    }

    /// `e^g` of a token and feature, after [`Decay::factors`].
    pub fn factor(&self, row: usize, k: usize) -> f32 {
        self.within.get(row, k)
    }

    /// The weight of a row and feature (counted from the block's first) in a role.
    pub fn weight(&self, row: usize, k: usize, #[comptime] role: Role, #[comptime] b: Blueprint) -> f32 {
        self.weights::<Const<1>>(row, k, role, b).extract(0usize)
    }

    /// The weights of `N` features of a row.
    pub fn weights<N: Size>(
        &self,
        row: usize,
        k: usize,
        #[comptime] role: Role,
        #[comptime] b: Blueprint,
    ) -> Vector<f32, N> {
        let mut weight = Vector::<f32, N>::new(f32::new(1.0));
        if comptime!(b.gate == GateKind::HEAD && role == Role::FromStart) {
            weight = Vector::new(self.from_start[row]);
        }
        if comptime!(b.gate == GateKind::HEAD && role == Role::ToEnd) {
            weight = Vector::new(self.to_end[row]);
        }
        if comptime!(b.gate == GateKind::KEY) {
            let segment = row / BLOCK;
            match comptime!(role) {
                Role::Plain => {}
                Role::Within => weight = self.within.get_many::<N>(row, k),
                Role::WithinBefore => weight = self.within_before::<N>(row, k),
                Role::FromStart | Role::FromStartBefore => {
                    if comptime!(role == Role::FromStart) {
                        weight = self.within.get_many::<N>(row, k);
                    } else {
                        weight = self.within_before::<N>(row, k);
                    }
                    #[unroll]
                    for s in 0..comptime!(b.segments() - 1) {
                        weight *= self.total::<N>(s, k, s.runtime() < segment, b);
                    }
                }
                Role::ToEnd => {
                    weight = self.after.get_many::<N>(row, k);
                    #[unroll]
                    for s in 1..comptime!(b.segments()) {
                        weight *= self.total::<N>(s, k, s.runtime() > segment, b);
                    }
                }
                Role::Toward(later) => {
                    weight = self.after.get_many::<N>(row, k);
                    #[unroll]
                    for s in 1..later {
                        weight *= self.total::<N>(s, k, s.runtime() > segment, b);
                    }
                    if comptime!(b.inverts) {
                        if segment == later {
                            weight = reciprocal::<N>(self.within.get_many::<N>(row, k));
                        }
                    }
                }
            }
        }
        weight
    }

    /// From the start of the token's sub-block through the token before.
    fn within_before<N: Size>(&self, row: usize, k: usize) -> Vector<f32, N> {
        let first = row % BLOCK < 1;
        let before = self.within.get_many::<N>(row - select(first, 0usize.runtime(), 1usize.runtime()), k);
        let mut weight = Vector::<f32, N>::new(f32::new(1.0));
        #[unroll]
        for j in 0..N::value().comptime() {
            weight.insert(j, select(first, f32::new(1.0), before.extract(j)));
        }
        weight
    }

    /// The decay over a sub-block if it `counts`, else 1.
    fn total<N: Size>(&self, segment: usize, k: usize, counts: bool, #[comptime] b: Blueprint) -> Vector<f32, N> {
        let mut total = Vector::<f32, N>::new(f32::new(1.0));
        #[unroll]
        for j in 0..N::value().comptime() {
            total.insert(j, select(counts, self.totals[segment * b.block + k + j], f32::new(1.0)));
        }
        total
    }

    /// `e^{c_n}`, the decay of a row of the state over the whole chunk.
    pub fn end(&self, k: usize, #[comptime] b: Blueprint) -> f32 {
        let mut weight = f32::new(1.0);
        if comptime!(b.gate == GateKind::HEAD) {
            weight = self.from_start[comptime!(b.chunk - 1)];
        }
        if comptime!(b.gate == GateKind::KEY) {
            for s in 0..comptime!(b.segments()) {
                weight *= self.totals[s * b.block + k];
            }
        }
        weight
    }
}

/// The scalar gates of a chunk on their way to [`Decay::begin_rows`]: of token `unit()`, or with planes that sum of tokens
/// `lane`, `lane + 32` and so on.
#[derive(CubeType)]
pub(crate) struct RowGates {
    gates: Array<f32>,
}

#[cube]
impl RowGates {
    pub fn new(#[comptime] b: Blueprint) -> RowGates {
        RowGates { gates: Array::new(comptime!(if b.engine == Engine::Mma { b.chunk.div_ceil(WARP) } else { 1 })) }
    }

    /// Asks for the gates of a chunk.
    pub fn ask(&mut self, g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::HEAD && b.engine == Engine::Mma) {
            if unit() < comptime!(b.chunk.next_multiple_of(WARP)) {
                self.ask_all(g, place, sizes, b);
            }
        } else {
            self.gates[0] = head_gate(g, place, sizes, b);
        }
    }

    /// The same, on planes that all take part.
    pub fn ask_all(&mut self, g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::HEAD) {
            #[unroll]
            for j in 0..comptime!(b.chunk.div_ceil(WARP)) {
                let token = unit() % WARP + comptime!(j * WARP);
                self.gates[j] = f32::new(0.0);
                if token < place.rows {
                    self.gates[j] = g[(place.token + token) * sizes.gate_stride + place.head];
                }
            }
        }
    }

    /// The weights of token `part * 32 + lane`, from the chunk's start and to its end.
    pub fn weights(&self, part: usize, #[comptime] b: Blueprint) -> (f32, f32) {
        let lane = unit() % WARP;
        // Of these tokens; of all before them; of all after them.
        let (mut own, mut before, mut after) = (f32::new(0.0), f32::new(0.0), f32::new(0.0));
        #[unroll]
        for j in 0..comptime!(b.chunk.div_ceil(WARP)) {
            let gate = self.gates[j];
            let total = plane_sum(gate);
            own = select(j.runtime() == part, gate, own);
            before += select(j.runtime() < part, total, f32::new(0.0));
            after += select(j.runtime() > part, total, f32::new(0.0));
        }
        let last = comptime!(WARP - 1).runtime();
        let reversed = plane_shuffle(own, (last - lane) as u32);
        let from_end = plane_inclusive_sum(reversed);
        let later = plane_shuffle(from_end, select(lane == last, 0usize.runtime(), last - 1 - lane) as u32);
        let from_start = plane_inclusive_sum(own) + before;
        (from_start.exp(), (select(lane == last, f32::new(0.0), later) + after).exp())
    }
}

/// The scalar gate of token `unit()` of the chunk; 0 beyond. A cube has as many units as a chunk tokens, or more.
#[cube]
pub(crate) fn head_gate(g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) -> f32 {
    let mut gate = f32::new(0.0);
    if comptime!(b.gate == GateKind::HEAD) {
        if unit() < place.rows {
            gate = g[(place.token + unit()) * sizes.gate_stride + place.head];
        }
    }
    gate
}

/// The step size of token `unit()`; 0 beyond.
#[cube]
pub(crate) fn step_size(beta: &[f32], place: &Place, sizes: &Sizes) -> f32 {
    let (at, stride) = place.scalars(sizes);
    let mut step = f32::new(0.0);
    if unit() < place.rows {
        step = beta[at + unit() * stride];
    }
    step
}

/// The log-decay of a token and key feature; 0 outside of the tensor.
#[cube]
pub(crate) fn key_gate(g: &[f32], place: &Place, sizes: &Sizes, row: usize, k: usize) -> f32 {
    // No branch: it reads some element of the tensor in any case.
    let (at, stride) = place.key_gates(sizes);
    let inside = row < place.rows && k < sizes.key_dim;
    select(inside, g[select(inside, at + row * stride + k, at)], f32::new(0.0))
}

/// Puts a block of queries or keys into a tile, times their weight in a role, times `factor`.
#[cube]
pub(crate) fn put_weighted<I: Float, E: Float, N: Size>(
    flight: &Flight<I, N>,
    factor: f32,
    decay: &Decay,
    tile: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    #[unroll]
    for j in 0..flight.vectors() {
        if flight.has(j) {
            let (row, k) = flight.place(j);
            let weights = decay.weights::<N>(row, k, role, b) * Vector::new(factor);
            tile.set_many::<f32, N>(row, k, Vector::<f32, N>::cast_from(flight.vector(j)) * weights);
        }
    }
}

/// `sums *= factor` and the weight of their row and feature in a role.
#[cube]
pub(crate) fn weigh_sums(
    sums: &mut Sums,
    factor: f32,
    decay: &Decay,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(sums.spread.len()) {
        if sums.has(unit, j) {
            let place = sums.place(unit, j);
            sums.set(place, j, sums.get(place, j) * factor * decay.weight(place.0, place.1, role, b));
        }
    }
}
