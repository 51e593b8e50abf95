//! What a walk reads of a chunk, asked for while it computes the chunk before.

use cubecl::prelude::*;

use super::blueprint::{GateKind, WalkBlueprint};
use super::decay::{Decay, RowGates, step_size};
use super::place::{Place, Sizes};
use super::state::Part;
use crate::tile::{Tile, unit};
use crate::transfer::Flight;

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
    pub reading: Flight<I, N>,
    values: Flight<I, N>,
    /// A chunk's scores, for the delta rule.
    square: Flight<E, N>,
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
        Ahead::<I, E, N> {
            reading: Flight::new(comptime!(w.keys()), comptime!(w.keys_ahead(keys))),
            values: Flight::new(comptime!(w.values()), true),
            square: Flight::new(comptime!(w.scores()), w.chunk.delta),
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
        self.values.ask(values, at, place.rows, part.v0, sizes.value_dim, unit());
        if comptime!(with_keys) {
            fetch_keys::<I, N>(&keys.reading, place, part, sizes, &mut self.reading, w);
        }
        fetch_ends(&keys.ends, place, part, sizes, &mut self.ends, w);
        self.gates.ask(g, place, sizes, comptime!(b.by_row()));
        if comptime!(b.delta) {
            let side = comptime!(b.chunk).runtime();
            self.square.ask(square, (place.scores(sizes, b), side), side, 0, side, unit());
            self.step = step_size(beta, place, sizes);
        }
    }

    /// Puts all but the keys, and begins the chunk's decay. What is put can be read after the next barrier.
    pub fn begin(&self, rows: &mut Rows, values: &mut Tile<E>, square: &mut Tile<E>, #[comptime] w: WalkBlueprint) {
        let b = comptime!(w.chunk);
        rows.decay.begin_rows(&self.gates, comptime!(b.by_row()));
        self.values.put::<E>(values, 0, unit());
        put_ends(&self.ends, &mut rows.ends, w);
        if comptime!(b.delta) {
            self.square.put::<E>(square, 0, unit());
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
    flight: &mut Flight<I, N>,
    #[comptime] w: WalkBlueprint,
) {
    if comptime!(w.resident) {
        flight.ask(x, place.walked_keys(sizes, w.chunk), place.rows, part.k0, sizes.key_dim, unit());
    }
}

/// Puts what [`fetch_keys`] has fetched.
#[cube]
pub(crate) fn put_keys<I: Float, E: Float, N: Size>(
    flight: &Flight<I, N>,
    tile: &mut Tile<E>,
    #[comptime] w: WalkBlueprint,
) {
    if comptime!(w.resident) {
        flight.put::<E>(tile, 0, unit());
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
    if comptime!(w.chunk.gate == GateKind::KEY) {
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
    if comptime!(w.chunk.gate == GateKind::KEY) {
        #[unroll]
        for j in 0..comptime!(w.ends()) {
            let row = unit() + j * w.chunk.units;
            if row < w.rows() {
                ends[row] = flight[j];
            }
        }
    }
}
