//! Stage 3, all chunks at once, and its reverse for the values of the additive write:
//!
//! ```text
//! o = scale (q e^{c}) S + A u          dv = (k e^{c_n - c}) dS' + A^T do
//! ```
//! One cube computes one chunk, head and block of value features. Under gates per key feature the queries or keys come
//! weighted.

use cubecl::prelude::*;

use super::super::tile::{Form, Mode, Sums, Tile, this_cube, unit};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, put_weighted};
use super::place::{Place, Sizes};
use super::state::store_sums;
use super::transfer::Flight;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Direction {
    Forward,
    /// With `k`, `do` and the states' gradients in the places of `q`, `x` and the states.
    Backward,
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn output_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    x: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    a: &[Vector<E, N>],
    states: &[Vector<E, N>],
    table: &[u32],
    o: &mut [Vector<I, N>],
    sizes: &Sizes,
    #[comptime] direction: Direction,
    #[comptime] b: Blueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let (cube, v0) = (CUBE_POS / sizes.value_blocks, CUBE_POS % sizes.value_blocks * b.block);
    if cube >= sizes.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let (c, operand) = comptime!((b.chunk, b.operand_padding()));
    let by_row = comptime!(b.by_row());
    let mut decay = Decay::new(by_row);
    let mut sum = Sums::new(comptime!(b.spread(c, b.block)));
    let mut queries = Tile::<E>::new(c, b.block, operand);
    let mut state = Tile::<E>::new(b.block, b.block, operand);
    let mut scores = Tile::<E>::new(c, c, operand);
    let mut u = Tile::<E>::new(c, b.block, operand);
    sum.clear();
    decay.load_rows(g, &place, sizes, by_row);
    let (role, factor, weigh) = match comptime!(direction) {
        Direction::Forward => (comptime!(Role::FromStart), query_scale(sizes, b), comptime!(true)),
        Direction::Backward => (comptime!(Role::ToEnd), f32::new(1.0), comptime!(false)),
    };
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        let at = place.walked_keys(sizes, b);
        let mut query_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        let mut state_flight = Flight::<E, N>::new(comptime!(b.shape(b.block, b.block)), true);
        query_flight.ask(q, at, place.rows, k0, sizes.key_dim, unit());
        state_flight.ask_state(states, place.state(sizes), k0, v0, sizes);
        put_weighted::<I, E, N>(&query_flight, factor, &decay, &mut queries, role, by_row);
        state_flight.put_all::<E>(&mut state);
        sync_cube();
        sum.product::<E, E>(&queries, &state, comptime!(Form::ab(c, b.block, b.block, Mode::Add)));
        sync_cube();
    }
    // The place again: kept, it would take the registers of the loop.
    let cube = this_cube();
    let (place, v0) = (Place::of(cube / sizes.value_blocks, sizes, table, b), cube % sizes.value_blocks * b.block);
    let mut score_flight = Flight::<E, N>::new(comptime!(b.shape(c, c)), true);
    let mut written = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
    score_flight.ask_scores(a, place.scores(sizes, b));
    written.ask(x, place.values(sizes), place.rows, v0, sizes.value_dim, unit());
    score_flight.put_all::<E>(&mut scores);
    put_written::<I, E, N>(&written, beta, &place, sizes, &mut u, weigh, b);
    sync_cube();
    sum.product::<E, E>(&scores, &u, comptime!(scores_form(direction, b)));
    // The queries are not needed any more.
    sum.put::<E>(&mut queries);
    sync_cube();
    store_sums::<I, E, N>(&sum, &queries, o, place.values(sizes), place.rows, v0, sizes.value_dim);
}

fn scores_form(direction: Direction, b: Blueprint) -> Form {
    match direction {
        Direction::Forward => Form::ab(b.chunk, b.block, b.chunk, Mode::Add),
        Direction::Backward => Form::atb(b.chunk, b.block, b.chunk, Mode::Add),
    }
}

/// What is left to multiply queries with.
#[cube]
pub(crate) fn query_scale(sizes: &Sizes, #[comptime] b: Blueprint) -> f32 {
    let mut scale = f32::new(1.0);
    if comptime!(b.gate != GateKind::Key) {
        scale = sizes.scale;
    }
    scale
}

/// Puts what the chunk's tokens write along their keys: `u = beta x`, or `v` without the delta rule.
#[cube]
fn put_written<I: Float, E: Float, N: Size>(
    written: &Flight<I, N>,
    beta: &[f32],
    place: &Place,
    sizes: &Sizes,
    tile: &mut Tile<E>,
    #[comptime] weigh: bool,
    #[comptime] b: Blueprint,
) {
    if comptime!(b.delta && weigh) {
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
