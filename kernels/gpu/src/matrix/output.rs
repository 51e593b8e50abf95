//! Stage 3, all chunks at once, and its reverse for the values of the additive write:
//!
//! ```text
//! o = scale e^{c} (q S) + A u          dv = e^{c_n - c} (k dS') + A^T do
//! ```
//! One cube computes one chunk, head and block of value features. Under gates per key feature the queries or keys come
//! weighted, and rows have no weight. Where it costs less than to read them ([`ReadBlueprint::scores`]), a cube computes the
//! chunk's scores `A` itself.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind, ReadBlueprint};
use super::decay::{Decay, Role, weigh_sums};
use super::lower::{Between, weigh_lower};
use super::place::{Place, Sizes};
use super::state::store_sums;
use super::transfer::{ask_scores, ask_state};
use crate::tile::{Form, Mode, Sums, Tile, this_cube, unit};
use crate::transfer::Flight;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Forward,
    /// With `k`, `q`, `do` and the states' gradients in the places of `q`, `k`, `x` and the states.
    Backward,
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn output_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    x: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    a: &[Vector<E, N>],
    states: &[Vector<E, N>],
    table: &[u32],
    o: &mut [Vector<I, N>],
    sizes: &Sizes,
    #[comptime] direction: Direction,
    #[comptime] r: ReadBlueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let b = comptime!(r.chunk);
    let (c, d, by_row) = comptime!((b.chunk, r.value_block, b.by_row()));
    let parts = sizes.value_dim.div_ceil(d);
    let (cube, v0) = (CUBE_POS / parts, CUBE_POS % parts * d);
    if cube >= sizes.cut.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let operand = comptime!(b.operand_padding());
    let mut decay = Decay::new(by_row);
    let mut between = Between::new(r.scores, b);
    let mut sum = Sums::new(comptime!(b.spread(c, d)));
    let mut score_sums = Sums::new(comptime!(b.spread(if r.scores { c } else { 0 }, c)));
    let mut queries = Tile::<E>::new(c, b.block, operand);
    let mut keys = Tile::<E>::new(comptime!(if r.scores { c } else { 1 }), b.block, operand);
    let mut state = Tile::<E>::new(b.block, d, operand);
    let mut scores = Tile::<E>::new(c, c, operand);
    let mut u = Tile::<E>::new(c, d, operand);
    sum.clear();
    let mut written = Flight::<I, N>::new(comptime!(b.shape(c, d)), true);
    let mut score_flight = Flight::<E, N>::new(comptime!(b.shape(c, c)), !r.scores);
    written.ask(x, place.values(sizes), place.rows, v0, sizes.value_dim, unit());
    ask_scores(&mut score_flight, a, place.scores(sizes, b), b);
    if comptime!(r.scores) {
        score_sums.clear();
        decay.load(g, &place, sizes, by_row);
        between.load(&decay, b);
    } else {
        decay.load_rows(g, &place, sizes, by_row);
    }
    let weigh = comptime!(b.delta && direction == Direction::Forward);
    put_written::<I, E, N>(&written, beta, &place, sizes, &mut u, weigh);
    score_flight.put_all::<E>(&mut scores);
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        let at = place.walked_keys(sizes, b);
        let mut query_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        let mut key_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), r.scores);
        let mut state_flight = Flight::<E, N>::new(comptime!(b.shape(b.block, d)), true);
        query_flight.ask(q, at, place.rows, k0, sizes.key_dim, unit());
        key_flight.ask(k, at, place.rows, k0, sizes.key_dim, unit());
        ask_state(&mut state_flight, states, place.state(sizes), k0, v0, sizes);
        query_flight.put_all::<E>(&mut queries);
        key_flight.put_all::<E>(&mut keys);
        state_flight.put_all::<E>(&mut state);
        sync_cube();
        sum.product::<E, E>(&queries, &state, comptime!(Form::ab(c, d, b.block, Mode::Add)));
        if comptime!(r.scores) {
            let form = comptime!(Form::abt(c, c, b.block, Mode::Add));
            match comptime!(direction) {
                Direction::Forward => score_sums.product::<E, E>(&queries, &keys, form),
                Direction::Backward => score_sums.product::<E, E>(&keys, &queries, form),
            }
        }
        sync_cube();
    }
    match comptime!(direction) {
        Direction::Forward => weigh_sums(&mut sum, query_scale(sizes, b), &decay, Role::FromStart, by_row),
        Direction::Backward => weigh_sums(&mut sum, f32::new(1.0), &decay, Role::ToEnd, by_row),
    }
    if comptime!(r.scores) {
        // The additive write: there are no scores of keys.
        let mut none = Sums::new(comptime!(b.spread(0, c)));
        weigh_lower(&mut score_sums, sizes.scale, &mut none, 1.0, &decay, &between, b);
        score_sums.put::<E>(&mut scores);
    }
    sync_cube();
    let form = comptime!(match direction {
        Direction::Forward => Form::ab(c, d, c, Mode::Add),
        Direction::Backward => Form::atb(c, d, c, Mode::Add),
    });
    sum.product::<E, E>(&scores, &u, form);
    sync_cube();
    sum.put::<E>(&mut u);
    sync_cube();
    // The place again: kept, it would take the registers of the loop.
    let cube = this_cube();
    let (place, v0) = (Place::of(cube / parts, sizes, table, b), cube % parts * d);
    store_sums::<I, E, N>(&sum, &u, o, place.values(sizes), place.rows, v0, sizes.value_dim);
}

/// What is left to multiply queries with.
#[cube]
pub(crate) fn query_scale(sizes: &Sizes, #[comptime] b: Blueprint) -> f32 {
    let mut scale = f32::new(1.0);
    if comptime!(b.gate != GateKind::KEY) {
        scale = sizes.scale;
    }
    scale
}

/// Puts what the chunk's tokens write along their keys: `u = beta x` if they `weigh` it.
#[cube]
fn put_written<I: Float, E: Float, N: Size>(
    written: &Flight<I, N>,
    beta: &[f32],
    place: &Place,
    sizes: &Sizes,
    tile: &mut Tile<E>,
    #[comptime] weigh: bool,
) {
    if comptime!(weigh) {
        let (at, stride) = place.scalars(sizes);
        #[unroll]
        for j in 0..written.vectors() {
            if written.has(j) {
                let (row, v) = written.place(j);
                let mut step = f32::new(0.0);
                if row < place.rows {
                    step = beta[at + row * stride];
                }
                let values = Vector::<f32, N>::cast_from(written.vector(j)) * Vector::new(step);
                tile.set_many::<f32, N>(row, v, values);
            }
        }
    } else {
        written.put_all::<E>(tile);
    }
}
