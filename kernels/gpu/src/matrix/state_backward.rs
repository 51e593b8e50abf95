//! Stage 2 reversed: the gradient of the state that leaves each chunk, and through the delta rule that of the values.
//!
//! ```text
//! du  = A^T do + (k e^{c_n - c}) dS'      z = T^T Diag(beta) du = dv                     (delta)
//! dS  = e^{c_n} dS' + scale (q e^{c})^T do - (k e^{c})^T z                               (no z without it)
//! ```
//! Cubes hold the same part of the state as in stage 2, and walk the chunks from the last to the first.

use cubecl::prelude::*;

use super::ahead::{Ahead, Rows, WalkedKeys, fetch_keys, put_keys};
use super::blueprint::{GateKind, WalkBlueprint};
use super::decay::{Role, weigh_sums};
use super::place::{Place, Sizes, Walk};
use super::state::{
    Part, decay_rows, leave_state, narrow_state, read_state, store_state, store_sums, take_state, take_steps, weigh,
};
use crate::tile::{Corner, Form, Mode, Sums, Tile, this_cube, unit};
use crate::transfer::{Flight, load};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_backward_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    keys: &WalkedKeys<I, N>,
    g: &[f32],
    beta: &[f32],
    a: &[Vector<E, N>],
    t: &[Vector<E, N>],
    do_: &[Vector<I, N>],
    d_final: &[f32],
    table: &[u32],
    dv: &mut [Vector<I, N>],
    dstates: &mut [Vector<E, N>],
    d_initial: &mut [f32],
    sizes: &Sizes,
    #[comptime] has_final: bool,
    #[comptime] w: WalkBlueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let b = comptime!(w.chunk);
    let (state_blocks, d) = comptime!((w.state_blocks, w.value_block));
    let cube = CUBE_POS;
    let parts = sizes.key_blocks / state_blocks * sizes.value_dim.div_ceil(d);
    if cube >= sizes.sequences * sizes.value_heads * parts {
        terminate!();
    }
    let part = Part::of(cube, sizes, w);
    let operand = comptime!(b.operand_padding());
    let c = comptime!(b.chunk);
    let (delta_rows, both) = comptime!((if b.delta { c } else { 1 }, b.delta && w.resident));
    let (by_row, key_wise) = comptime!((b.by_row(), b.gate == GateKind::KEY));
    let mut by = Rows::new(w);
    let mut dstate = Sums::new(comptime!(w.state()));
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    // Queries, and keys too unless both are resident.
    let mut queries = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut key_tile = Tile::<E>::new(comptime!(if both { c } else { 1 }), comptime!(w.key_cols()), operand);
    let mut d_out = Tile::<E>::new(c, d, operand);
    // `-z`, and before it what `T` is applied to.
    let mut z = Tile::<E>::new(delta_rows, d, operand);
    let mut du = Sums::new(comptime!(w.written()));
    let mut stage = Tile::<E>::new(comptime!(if b.delta { w.written().stage() } else { 1 }), d, operand);
    let mut square = Tile::<E>::new(delta_rows, c, operand);
    take_state(d_final, &part, sizes, &mut dstate, has_final);

    let walk = Walk::of(sizes, table, part.sequence, b);
    let mut next = Ahead::<I, E, N>::new(w, b.delta);
    let mut here = Here::<I, E, N>::new(w);
    let place = walk.place(sizes, walk.chunks - 1, part.head, b);
    next.ask(keys, do_, a, g, beta, &place, &part, sizes, w, b.delta);
    for step in 0..walk.chunks {
        let place = walk.place(sizes, walk.chunks - 1 - step, part.head, b);
        let key_at = place.walked_keys(sizes, b);
        sync_cube();
        narrow_state::<E>(&dstate, &mut narrow, w);
        if comptime!(b.delta) {
            here.ask(keys, t, &place, &part, sizes, w);
        } else {
            fetch_keys::<I, N>(q, &place, &part, sizes, &mut here.queries, w);
        }
        next.begin(&mut by, &mut d_out, &mut square, w);
        if comptime!(b.delta) {
            put_keys::<I, E, N>(&next.reading, &mut key_tile, w);
        }
        sync_cube();
        store_state::<E, N>(&dstate, &narrow, dstates, place.state(sizes), &part, sizes, w);
        if comptime!(b.delta) {
            if comptime!(w.resident) {
                read_state::<E>(&key_tile, &dstate, &narrow, 0, &mut du, Mode::Set, w);
                du.settle();
            } else {
                du.clear();
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load::<I, E, N>(&keys.reading, key_at, place.rows, k0, sizes.key_dim, &mut queries, b.units);
                    sync_cube();
                    read_state::<E>(&queries, &dstate, &narrow, k0, &mut du, Mode::Add, w);
                    sync_cube();
                }
            }
            if comptime!(b.gate == GateKind::HEAD) {
                weigh_sums(&mut du, 1.0, &by.decay, Role::ToEnd, by_row);
                du.settle();
            }
            du.product::<E, E>(&square, &d_out, comptime!(Form::atb(c, d, c, Mode::Add)));
            sync_cube();
            here.inverse.put::<E>(&mut square, 0, unit());
            if comptime!(key_wise) {
                put_keys::<I, E, N>(&here.writing, &mut key_tile, w);
            }
            fetch_keys::<I, N>(q, &place, &part, sizes, &mut here.queries, w);
            take_steps::<E>(&du, &by, &mut z, Role::Plain, by_row);
            sync_cube();
            du.product::<E, E>(&square, &z, comptime!(Form::atb(c, d, c, Mode::Set)));
            sync_cube();
            du.put::<E>(&mut stage);
            let unit = unit();
            #[unroll]
            for j in 0..comptime!(du.spread.len()) {
                if du.has(unit, j) {
                    let place = du.place(unit, j);
                    let weight = by.decay.weight(place.0, 0, Role::FromStart, by_row);
                    z.set(place.0, place.1, -du.get(place, j) * weight);
                }
            }
        }
        put_keys::<I, E, N>(&here.queries, &mut queries, w);
        if step + 1 < walk.chunks {
            let place = walk.place(sizes, walk.chunks - 2 - step, part.head, b);
            next.ask(keys, do_, a, g, beta, &place, &part, sizes, w, b.delta);
        }
        sync_cube();
        if comptime!(b.delta) {
            store_sums::<I, E, N>(&du, &stage, dv, place.values(sizes), place.rows, part.v0, sizes.value_dim);
        }
        if comptime!(!key_wise) {
            weigh::<E>(&by.decay, &mut d_out, sizes.scale, Role::FromStart, by_row);
        }
        decay_rows(&mut dstate, &by, b);
        sync_cube();
        let form = comptime!(Form::atb(w.key_cols(), d, c, Mode::Add));
        if comptime!(w.resident) {
            dstate.product::<E, E>(&queries, &d_out, form);
            if comptime!(b.delta) {
                dstate.settle();
                dstate.product::<E, E>(&key_tile, &z, form);
            }
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                let k0 = part.k0 + row0;
                load::<I, E, N>(q, key_at, place.rows, k0, sizes.key_dim, &mut queries, b.units);
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                dstate.product_at::<E, E>(&queries, &d_out, &corner, form);
                sync_cube();
                if comptime!(b.delta) {
                    load::<I, E, N>(&keys.writing, key_at, place.rows, k0, sizes.key_dim, &mut queries, b.units);
                    sync_cube();
                    dstate.product_at::<E, E>(&queries, &z, &corner, form);
                    sync_cube();
                }
            }
        }
    }
    dstate.settle();
    let part = Part::of(this_cube(), sizes, w);
    leave_state(&dstate, d_initial, &part, sizes);
}

/// What a chunk reads besides, on its way from its own beginning: what is needed late, and the queries, which are needed
/// last, when there are registers for them.
#[derive(CubeType)]
struct Here<I: Float, E: Float, N: Size> {
    /// Under gates per key feature, as the other keys are in their place until then.
    writing: Flight<I, N>,
    queries: Flight<I, N>,
    inverse: Flight<E, N>,
}

#[cube]
impl<I: Float, E: Float, N: Size> Here<I, E, N> {
    fn new(#[comptime] w: WalkBlueprint) -> Self {
        let key_wise = comptime!(w.chunk.delta && w.chunk.gate == GateKind::KEY);
        Here::<I, E, N> {
            writing: Flight::new(comptime!(w.keys()), comptime!(w.keys_ahead(key_wise))),
            queries: Flight::new(comptime!(w.keys()), comptime!(w.keys_ahead(true))),
            inverse: Flight::new(comptime!(w.scores()), w.chunk.delta),
        }
    }

    fn ask(
        &mut self,
        keys: &WalkedKeys<I, N>,
        t: &[Vector<E, N>],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
    ) {
        let b = comptime!(w.chunk);
        let side = comptime!(b.chunk).runtime();
        self.inverse.ask(t, (place.scores(sizes, b), side), side, 0, side, unit());
        if comptime!(b.gate == GateKind::KEY) {
            fetch_keys::<I, N>(&keys.writing, place, part, sizes, &mut self.writing, w);
        }
    }
}
