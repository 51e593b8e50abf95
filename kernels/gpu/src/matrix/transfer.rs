//! What the launches read and write of a chunk: queries and keys, scores, states.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::place::{Place, Sizes};
use crate::tile::{Tile, unit, units};
use crate::transfer::{Flight, store};

/// Asks for the features `k0..` of a chunk's queries or keys, as one of all units.
#[cube]
pub(crate) fn ask_keys<I: Float, N: Size>(
    flight: &mut Flight<I, N>,
    x: &[Vector<I, N>],
    place: &Place,
    sizes: &Sizes,
    k0: usize,
) {
    flight.ask(x, place.keys(sizes), place.rows, k0, sizes.key_dim, unit());
}

/// A block of the keys that read the state.
#[cube]
pub(crate) fn reading_keys<I: Float, N: Size>(
    reads: &[Vector<I, N>],
    keys: &Flight<I, N>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    #[comptime] b: Blueprint,
) -> Flight<I, N> {
    if comptime!(b.low_rank) {
        let mut flight = Flight::<I, N>::new(comptime!(b.shape(b.chunk, b.block)), true);
        ask_keys(&mut flight, reads, place, sizes, k0);
        flight
    } else {
        keys.alias()
    }
}

/// Asks for a chunk's scores, `[chunk, chunk]` at `at`, as one of all units.
#[cube]
pub(crate) fn ask_scores<E: Float, N: Size>(
    flight: &mut Flight<E, N>,
    x: &[Vector<E, N>],
    at: usize,
    #[comptime] b: Blueprint,
) {
    let side = comptime!(b.chunk).runtime();
    flight.ask(x, (at, side), side, 0, side, unit());
}

/// Asks for a block of a state, `[key_dim, value_dim]` at `at`, as one of all units.
#[cube]
pub(crate) fn ask_state<E: Float, N: Size>(
    flight: &mut Flight<E, N>,
    x: &[Vector<E, N>],
    at: usize,
    k0: usize,
    v0: usize,
    sizes: &Sizes,
) {
    let from = (at + k0 * sizes.value_dim, sizes.value_dim);
    flight.ask(x, from, sizes.key_dim - k0, v0, sizes.value_dim, unit());
}

/// Writes `[chunk, chunk]` scores times `factor`.
#[cube]
pub(crate) fn store_scores<E: Float, N: Size>(
    tile: &Tile<f32>,
    out: &mut [Vector<E, N>],
    at: usize,
    factor: f32,
    #[comptime] b: Blueprint,
) {
    let n = N::value().comptime();
    let cols = comptime!(b.chunk / n);
    for i in range_stepped(unit(), comptime!(b.chunk * cols), units()) {
        let values = tile.get_many::<N>(i / cols, i % cols * n) * Vector::new(factor);
        out[at / n + i] = Vector::<E, N>::cast_from(values);
    }
}

/// Writes `[chunk, chunk]` scores as they are.
#[cube]
pub(crate) fn store_square<E: Float, N: Size>(
    tile: &Tile<E>,
    out: &mut [Vector<E, N>],
    at: usize,
    #[comptime] b: Blueprint,
) {
    let side = comptime!(b.chunk).runtime();
    store::<E, E, N>(tile, out, (at, side), side, 0, side, b.units);
}
