//! What a walk reads of a chunk, asked for while it computes the chunk before.

use cubecl::prelude::*;

use super::super::tile::{Tile, unit};
use super::blueprint::{GateKind, WalkBlueprint};
use super::decay::{Decay, RowGates, step_size};
use super::place::{Place, Sizes};
use super::state::Part;
use super::transfer::{fetch, fetch_scores, put};

/// The keys of a walk. Under a scalar gate, or none, both are the keys as they are, and rows have the weights.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct WalkedKeys<I: Float, N: Size> {
    /// They read the state; delta only.
    pub reading: Box<[Vector<I, N>]>,
    /// Along them it is written.
    pub writing: Box<[Vector<I, N>]>,
    /// `e^{c_n}` of a gate per key feature.
    pub ends: Box<[f32]>,
}

/// On its way. Tiles of keys only if `keys` and they are resident.
#[derive(CubeType)]
pub(crate) struct Ahead<I: Float, E: Float, N: Size> {
    pub reading: Array<Vector<I, N>>,
    values: Array<Vector<I, N>>,
    /// A chunk's scores, for the delta rule.
    square: Array<Vector<E, N>>,
    ends: Array<f32>,
    gates: RowGates,
    /// Of token `unit()`.
    step: f32,
}

/// The small tensors of a chunk, once they are there.
#[derive(CubeType)]
pub(crate) struct Rows {
    pub decay: Decay,
    /// Step sizes by token, and under gates per key feature `e^{c_n}` by row of the state.
    pub steps: Shared<[f32]>,
    pub ends: Shared<[f32]>,
}

#[cube]
impl Rows {
    pub fn new(#[comptime] w: WalkBlueprint) -> Rows {
        Rows {
            decay: Decay::new(comptime!(w.chunk.by_row())),
            steps: Shared::new_slice(w.chunk.chunk),
            ends: Shared::new_slice(comptime!(w.rows())),
        }
    }
}

#[cube]
impl<I: Float, E: Float, N: Size> Ahead<I, E, N> {
    pub fn new(#[comptime] w: WalkBlueprint, #[comptime] keys: bool) -> Self {
        let n = N::value().comptime();
        Ahead::<I, E, N> {
            reading: Array::new(comptime!(w.keys_ahead(keys, n))),
            values: Array::new(comptime!(w.values().vectors(n))),
            square: Array::new(comptime!(if w.chunk.delta { w.scores().vectors(n) } else { 1 })),
            ends: Array::new(comptime!(w.ends())),
            gates: RowGates::new(comptime!(w.chunk.by_row())),
            step: f32::new(0.0),
        }
    }

    /// Asks for the chunk at `place`.
    pub fn ask(
        &mut self,
        keys: &WalkedKeys<I, N>,
        values: &[Vector<I, N>],
        square: &[Vector<E, N>],
        g: &[f32],
        beta: &[f32],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
        #[comptime] with_keys: bool,
    ) {
        let b = comptime!(w.chunk);
        let at = place.values(sizes);
        fetch::<I, N>(values, at, place.rows, part.v0, sizes.value_dim, &mut self.values, comptime!(w.values()));
        if comptime!(with_keys) {
            fetch_keys::<I, N>(&keys.reading, place, part, sizes, &mut self.reading, w);
        }
        fetch_ends(&keys.ends, place, part, sizes, &mut self.ends, w);
        self.gates.ask(g, place, sizes, comptime!(b.by_row()));
        if comptime!(b.delta) {
            fetch_scores::<E, N>(square, place.scores(sizes, b), &mut self.square, comptime!(w.scores()));
            self.step = step_size(beta, place, sizes);
        }
    }

    /// Puts all but the keys, and begins the chunk's decay. What is put can be read after the next barrier.
    pub fn begin(&self, rows: &mut Rows, values: &mut Tile<E>, square: &mut Tile<E>, #[comptime] w: WalkBlueprint) {
        let b = comptime!(w.chunk);
        rows.decay.begin_rows(&self.gates, comptime!(b.by_row()));
        put::<I, E, N>(&self.values, values, comptime!(w.values()));
        put_ends(&self.ends, &mut rows.ends, w);
        if comptime!(b.delta) {
            put::<E, E, N>(&self.square, square, comptime!(w.scores()));
            if unit() < b.chunk {
                rows.steps[unit()] = self.step;
            }
        }
    }
}

/// Asks for all keys or queries of a chunk, if they are to be resident.
#[cube]
pub(crate) fn fetch_keys<I: Float, N: Size>(
    x: &[Vector<I, N>],
    place: &Place,
    part: &Part,
    sizes: &Sizes,
    flight: &mut Array<Vector<I, N>>,
    #[comptime] w: WalkBlueprint,
) {
    if comptime!(w.resident) {
        let (at, shape) = (place.walked_keys(sizes, w.chunk), comptime!(w.keys()));
        fetch::<I, N>(x, at, place.rows, part.k0, sizes.key_dim, flight, shape);
    }
}

/// Puts what [`fetch_keys`] has fetched.
#[cube]
pub(crate) fn put_keys<I: Float, E: Float, N: Size>(
    flight: &Array<Vector<I, N>>,
    tile: &mut Tile<E>,
    #[comptime] w: WalkBlueprint,
) {
    if comptime!(w.resident) {
        put::<I, E, N>(flight, tile, comptime!(w.keys()));
    }
}

/// Asks for the decays of the state's rows over a chunk, under a gate per key feature.
#[cube]
fn fetch_ends(
    ends: &[f32],
    place: &Place,
    part: &Part,
    sizes: &Sizes,
    flight: &mut Array<f32>,
    #[comptime] w: WalkBlueprint,
) {
    if comptime!(w.chunk.gate == GateKind::Key) {
        #[unroll]
        for j in 0..comptime!(w.ends()) {
            let k = part.k0 + unit() + j * w.chunk.units;
            flight[j] = f32::new(0.0);
            if k < sizes.key_dim {
                flight[j] = ends[place.ends(sizes) + k];
            }
        }
    }
}

/// Puts what [`fetch_ends`] has fetched.
#[cube]
fn put_ends(flight: &Array<f32>, ends: &mut Shared<[f32]>, #[comptime] w: WalkBlueprint) {
    if comptime!(w.chunk.gate == GateKind::Key) {
        #[unroll]
        for j in 0..comptime!(w.ends()) {
            let row = unit() + j * w.chunk.units;
            if row < w.rows() {
                ends[row] = flight[j];
            }
        }
    }
}
