//! The decay inside a chunk, and the loads that apply it.
//!
//! `c_i` is the sum of the log-decays up to and including token `i`. Tensors meet the decay in one of the [`Role`]s, each
//! an exponential of a sum over just the tokens between two places. No two sums are ever subtracted, so every exponent is
//! at most 0 and a gate of -1e4 costs no digits later in the chunk. A scalar gate has one weight per token; a key-wise
//! gate has one per token and feature, prepared for one block of features at a time: units walk the sub-blocks of 16
//! tokens side by side, from the sums of the sub-blocks between (`totals`).

use cubecl::prelude::*;

use super::super::tile::{BLOCK, Tile, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::place::{Place, Sizes};

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
    /// After the token to the start of a later sub-block. Key-wise gates only.
    Toward(usize),
}

/// The decay of one chunk and head.
#[derive(CubeType)]
pub(crate) struct Decay {
    /// Scalar gates: by token the gate, and the weights of `FromStart` and `ToEnd`.
    pub g: Shared<[f32]>,
    from_start: Shared<[f32]>,
    to_end: Shared<[f32]>,
    /// Key-wise gates: sums of the sub-blocks, `[segments, block]`, and the weights prepared last, `[chunk, block]`.
    totals: Shared<[f32]>,
    weights: Tile<f32>,
}

#[cube]
impl Decay {
    pub fn new(#[comptime] b: Blueprint) -> Decay {
        let tokens = comptime!(if b.gate == GateKind::Head { b.chunk } else { 1 });
        let (totals, rows, cols) =
            comptime!(if b.gate == GateKind::Key { (b.segments() * b.block, b.chunk, b.block) } else { (1, 1, 1) });
        Decay {
            g: Shared::new_slice(tokens),
            from_start: Shared::new_slice(tokens),
            to_end: Shared::new_slice(tokens),
            totals: Shared::new_slice(totals),
            weights: Tile::<f32>::new(rows, cols, comptime!(b.padding())),
        }
    }

    /// Begins a chunk: reads scalar gates. Synchronises.
    pub fn load(&mut self, g: &[f32], place: &Place, sizes: &Sizes, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::Head) {
            for i in range_stepped(unit(), b.chunk, units()) {
                let mut gate = f32::new(0.0);
                if i < place.rows {
                    gate = g[(place.token + i) * sizes.gate_stride + place.head];
                }
                self.g[i] = gate;
            }
            sync_cube();
            for i in range_stepped(unit(), b.chunk, units()) {
                let (mut before, mut after) = (f32::new(0.0), f32::new(0.0));
                for j in 0..i + 1 {
                    before += self.g[j];
                }
                for j in i + 1..b.chunk {
                    after += self.g[j];
                }
                self.from_start[i] = before.exp();
                self.to_end[i] = after.exp();
            }
            sync_cube();
        }
    }

    /// Begins a block of key features. Synchronises.
    pub fn load_block(&mut self, g: &[f32], place: &Place, sizes: &Sizes, k0: usize, #[comptime] b: Blueprint) {
        if comptime!(b.gate == GateKind::Key) {
            for item in range_stepped(unit(), comptime!(b.segments() * b.block), units()) {
                let (segment, k) = (item / b.block, item % b.block);
                let mut sum = f32::new(0.0);
                for row in segment * BLOCK..(segment + 1) * BLOCK {
                    sum += key_gate(g, place, sizes, row, k0 + k);
                }
                self.totals[item] = sum;
            }
            sync_cube();
        }
    }

    /// Prepares the weights of a role for the block of key features that began last. Synchronises.
    pub fn prepare(
        &mut self,
        g: &[f32],
        place: &Place,
        sizes: &Sizes,
        k0: usize,
        #[comptime] role: Role,
        #[comptime] b: Blueprint,
    ) {
        if comptime!(b.gate == GateKind::Key && role != Role::Plain) {
            let (segments, forward) = comptime!(match role {
                Role::Toward(later) => (later, false),
                Role::ToEnd => (b.segments(), false),
                _ => (b.segments(), true),
            });
            for item in range_stepped(unit(), segments * b.block, units()) {
                let (segment, k) = (item / b.block, item % b.block);
                let mut sum = f32::new(0.0);
                if comptime!(role == Role::FromStart) {
                    for s in 0..segment {
                        sum += self.totals[s * b.block + k];
                    }
                }
                if comptime!(!forward) {
                    for s in segment + 1..segments {
                        sum += self.totals[s * b.block + k];
                    }
                }
                for i in 0..BLOCK {
                    if comptime!(forward) {
                        let row = segment * BLOCK + i;
                        sum += key_gate(g, place, sizes, row, k0 + k);
                        self.weights.set(row, k, sum.exp());
                    } else {
                        let row = (segment + 1) * BLOCK - 1 - i;
                        self.weights.set(row, k, sum.exp());
                        sum += key_gate(g, place, sizes, row, k0 + k);
                    }
                }
            }
            sync_cube();
        }
    }

    /// The weight of a row and feature (counted from the block's first) in a role that is prepared.
    pub fn weight(&self, row: usize, k: usize, #[comptime] role: Role, #[comptime] b: Blueprint) -> f32 {
        let mut weight = f32::new(1.0);
        if comptime!(b.gate == GateKind::Key && role != Role::Plain) {
            weight = self.weights.get(row, k);
        }
        if comptime!(b.gate == GateKind::Head && role == Role::FromStart) {
            weight = self.from_start[row];
        }
        if comptime!(b.gate == GateKind::Head && role == Role::ToEnd) {
            weight = self.to_end[row];
        }
        weight
    }

    /// `e^{c_n}`, the decay of a row of the state over the whole chunk.
    pub fn end(&self, k: usize, #[comptime] b: Blueprint) -> f32 {
        let mut weight = f32::new(1.0);
        if comptime!(b.gate == GateKind::Head) {
            weight = self.from_start[comptime!(b.chunk - 1)];
        }
        if comptime!(b.gate == GateKind::Key) {
            let mut sum = f32::new(0.0);
            for s in 0..comptime!(b.segments()) {
                sum += self.totals[s * b.block + k];
            }
            weight = sum.exp();
        }
        weight
    }

    /// `p_ij *= e^{c_i - c_j}` for `i >= j`, and zero above the diagonal, or from it on if `strict`. Scalar gates, or
    /// none.
    pub fn multiply_lower(&self, p: &mut Tile<f32>, #[comptime] strict: bool, #[comptime] b: Blueprint) {
        for item in range_stepped(unit(), comptime!(b.segments() * b.chunk), units()) {
            let (segment, j) = (item / b.chunk, item % b.chunk);
            let first = segment * BLOCK;
            let mut sum = f32::new(0.0);
            if comptime!(b.gate == GateKind::Head) {
                for i in j + 1..first {
                    sum += self.g[i];
                }
            }
            for i in first..first + BLOCK {
                let mut value = f32::new(0.0);
                if comptime!(b.gate == GateKind::Head) {
                    if i > j {
                        sum += self.g[i];
                    }
                }
                if i > j {
                    value = p.get(i, j) * sum.exp();
                }
                if comptime!(!strict) {
                    if i == j {
                        value = p.get(i, j);
                    }
                }
                p.set(i, j, value);
            }
        }
    }
}

/// The log-decay of a token and key feature; 0 outside of the tensor.
#[cube]
pub(crate) fn key_gate(g: &[f32], place: &Place, sizes: &Sizes, row: usize, k: usize) -> f32 {
    read::<f32>(g, place.key_gates(sizes), place.rows, row, k, sizes.key_dim)
}

/// An element of a row of a tensor, `at` being its first row and the distance of rows; 0 outside of the tensor.
#[cube]
pub(crate) fn read<I: Float>(x: &[I], at: (usize, usize), rows: usize, row: usize, col: usize, dim: usize) -> f32 {
    // No branch: it reads some element of the tensor in any case.
    let inside = row < rows && col < dim;
    let value = f32::cast_from(x[select(inside, at.0 + row * at.1 + col, at.0)]);
    select(inside, value, f32::new(0.0))
}

/// Fills a tile from the features `col0..` of a tensor.
#[cube]
pub(crate) fn load<I: Float, E: Float>(
    x: &[I],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    tile: &mut Tile<E>,
) {
    let (tile_rows, cols) = comptime!((tile.rows, tile.cols));
    for i in range_stepped(unit(), tile_rows * cols, units()) {
        tile.set(i / cols, i % cols, read::<I>(x, at, rows, i / cols, col0 + i % cols, dim));
    }
}

/// Fills a tile from a block of queries or keys, times their weight in a role that is prepared, times `factor`.
#[cube]
pub(crate) fn load_keys<I: Float, E: Float>(
    x: &[I],
    at: (usize, usize),
    rows: usize,
    k0: usize,
    dim: usize,
    factor: f32,
    decay: &Decay,
    tile: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    for i in range_stepped(unit(), comptime!(b.chunk * b.block), units()) {
        let (row, k) = (i / b.block, i % b.block);
        let value = read::<I>(x, at, rows, row, k0 + k, dim) * factor;
        tile.set(row, k, value * decay.weight(row, k, role, b));
    }
}

/// `tile *= weight * factor`.
#[cube]
pub(crate) fn scale(
    tile: &mut Tile<f32>,
    factor: f32,
    decay: &Decay,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    for i in range_stepped(unit(), comptime!(b.chunk * b.block), units()) {
        let (row, k) = (i / b.block, i % b.block);
        tile.set(row, k, tile.get(row, k) * factor * decay.weight(row, k, role, b));
    }
}

/// Writes the rows of a tile to a tensor.
#[cube]
pub(crate) fn store<I: Float, E: Float>(
    tile: &Tile<E>,
    out: &mut [I],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
) {
    let (tile_rows, cols) = comptime!((tile.rows, tile.cols));
    for i in range_stepped(unit(), tile_rows * cols, units()) {
        let (row, col) = (i / cols, col0 + i % cols);
        if row < rows && col < dim {
            out[at.0 + row * at.1 + col] = I::cast_from(tile.get(row, i % cols));
        }
    }
}
