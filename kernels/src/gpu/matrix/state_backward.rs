//! Stage 2 reversed: the gradient of the state that leaves each chunk, and through the delta rule that of the values.
//!
//! ```text
//! du  = A^T do + (k e^{c_n - c}) dS'      z = T^T Diag(beta) du = dv                     (delta)
//! dS  = e^{c_n} dS' + scale (q e^{c})^T do - (k e^{c})^T z                               (no z without it)
//! ```
//! Cubes hold the same part of the state as in stage 2, and walk the chunks from the last to the first.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, fill, fresh, product, product_at, unit, units};
use super::ahead::{Ahead, Rows, WalkedKeys, fetch_keys, put_keys};
use super::blueprint::{GateKind, WalkBlueprint};
use super::decay::Role;
use super::place::{Place, Sizes, Walk};
use super::state::{Part, decay_rows, load_state, read_state, store_state, take_steps, weigh};
use super::transfer::{fetch_scores, load, put, store};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_backward_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    keys: &WalkedKeys<I, N>,
    g: &[f32],
    beta: &[f32],
    a: &[Vector<E, N>],
    t: &[Vector<E, N>],
    do_: &[Vector<I, N>],
    d_final: &[Vector<f32, N>],
    table: &[u32],
    dv: &mut [Vector<I, N>],
    dstates: &mut [Vector<E, N>],
    d_initial: &mut [Vector<f32, N>],
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
    let (padding, operand) = comptime!((b.padding(), b.operand_padding()));
    let (c, rows) = comptime!((b.chunk, w.rows()));
    let (delta_rows, both) = comptime!((if b.delta { c } else { 1 }, b.delta && w.resident));
    let (by_row, key_wise) = comptime!((b.by_row(), b.gate == GateKind::Key));
    let mut by = Rows::new(w);
    let mut dstate = Tile::<f32>::new(rows, d, padding);
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    // Queries, and keys too unless both are resident.
    let mut queries = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut key_tile = Tile::<E>::new(comptime!(if both { c } else { 1 }), comptime!(w.key_cols()), operand);
    let mut d_out = Tile::<E>::new(c, d, operand);
    // `-z`, and before it what `T` is applied to.
    let mut z = Tile::<E>::new(delta_rows, d, operand);
    let mut du = Tile::<f32>::new(delta_rows, d, padding);
    let mut square = Tile::<E>::new(delta_rows, c, operand);
    load_state::<f32, f32, N>(d_final, part.state(sizes), part.k0, part.v0, sizes, &mut dstate, has_final);

    let walk = Walk::of(sizes, table, part.sequence, b);
    let mut next = Ahead::<I, E, N>::new(w, b.delta);
    let mut here = Here::<I, E, N>::new(w);
    let place = walk.place(sizes, walk.chunks - 1, part.head, b);
    next.ask(keys, do_, a, g, beta, &place, &part, sizes, w, b.delta);
    for step in 0..walk.chunks {
        let place = walk.place(sizes, walk.chunks - 1 - step, part.head, b);
        let key_at = place.walked_keys(sizes, b);
        sync_cube();
        store_state::<E, N>(&dstate, dstates, place.state(sizes), part.k0, part.v0, sizes);
        if comptime!(b.delta) {
            here.ask(keys, t, &place, &part, sizes, w);
        } else {
            fetch_keys::<I, N>(q, &place, &part, sizes, &mut here.queries, w);
        }
        next.begin(&mut by, &mut d_out, &mut square, w);
        if comptime!(b.delta) {
            if comptime!(w.resident) {
                put_keys::<I, E, N>(&next.reading, &mut key_tile, w);
                read_state::<E>(&key_tile, &dstate, 0, &mut narrow, &mut du, Mode::Set, b);
                sync_cube();
            } else {
                fill::<f32>(&mut du, 0.0);
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load::<I, E, N>(&keys.reading, key_at, place.rows, k0, sizes.key_dim, &mut queries);
                    read_state::<E>(&queries, &dstate, k0, &mut narrow, &mut du, Mode::Add, b);
                    sync_cube();
                }
            }
            if comptime!(b.gate == GateKind::Head) {
                weigh::<f32>(&by.decay, &mut du, 1.0, Role::ToEnd, by_row);
                sync_cube();
            }
            product::<E>(&square, &d_out, &mut du, comptime!(Form::atb(c, d, c, Mode::Add)), b.engine);
            sync_cube();
            put::<E, E, N>(&here.inverse, &mut square, comptime!(w.scores()));
            if comptime!(key_wise) {
                put_keys::<I, E, N>(&here.writing, &mut key_tile, w);
            }
            fetch_keys::<I, N>(q, &place, &part, sizes, &mut here.queries, w);
            take_steps::<E>(&du, &by, &mut z, Role::Plain, by_row);
            sync_cube();
            product::<E>(&square, &z, &mut du, comptime!(Form::atb(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32, N>(&du, dv, place.values(sizes), place.rows, part.v0, sizes.value_dim);
            for i in range_stepped(unit(), comptime!(c * d), units()) {
                let (row, col) = (i / d, i % d);
                z.set(row, col, -du.get(row, col) * by.decay.weight(row, 0, Role::FromStart, by_row));
            }
        }
        put_keys::<I, E, N>(&here.queries, &mut queries, w);
        if step + 1 < walk.chunks {
            let place = walk.place(sizes, walk.chunks - 2 - step, part.head, b);
            next.ask(keys, do_, a, g, beta, &place, &part, sizes, w, b.delta);
        }
        sync_cube();
        if comptime!(!key_wise) {
            weigh::<E>(&by.decay, &mut d_out, sizes.scale, Role::FromStart, by_row);
        }
        decay_rows(&mut dstate, &by, b);
        sync_cube();
        let form = comptime!(Form::atb(w.key_cols(), d, c, Mode::Add));
        if comptime!(w.resident) {
            product::<E>(&queries, &d_out, &mut dstate, form, b.engine);
            if comptime!(b.delta) {
                sync_cube();
                product::<E>(&key_tile, &z, &mut dstate, form, b.engine);
            }
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                let k0 = part.k0 + row0;
                load::<I, E, N>(q, key_at, place.rows, k0, sizes.key_dim, &mut queries);
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                product_at::<E, E>(&queries, &d_out, &mut dstate, &corner, form, b.engine);
                sync_cube();
                if comptime!(b.delta) {
                    load::<I, E, N>(&keys.writing, key_at, place.rows, k0, sizes.key_dim, &mut queries);
                    sync_cube();
                    product_at::<E, E>(&queries, &z, &mut dstate, &corner, form, b.engine);
                    sync_cube();
                }
            }
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state::<f32, N>(&dstate, d_initial, part.state(sizes), part.k0, part.v0, sizes);
}

/// What a chunk reads besides, on its way from its own beginning: what is needed late, and the queries, which are needed
/// last, when there are registers for them.
#[derive(CubeType)]
struct Here<I: Float, E: Float, N: Size> {
    /// Under gates per key feature, as the other keys are in their place until then.
    writing: Array<Vector<I, N>>,
    queries: Array<Vector<I, N>>,
    inverse: Array<Vector<E, N>>,
}

#[cube]
impl<I: Float, E: Float, N: Size> Here<I, E, N> {
    fn new(#[comptime] w: WalkBlueprint) -> Self {
        let n = N::value().comptime();
        Here::<I, E, N> {
            writing: Array::new(comptime!(w.keys_ahead(w.chunk.delta && w.chunk.gate == GateKind::Key, n))),
            queries: Array::new(comptime!(w.keys_ahead(true, n))),
            inverse: Array::new(comptime!(if w.chunk.delta { w.scores().vectors(n) } else { 1 })),
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
        fetch_scores::<E, N>(t, place.scores(sizes, b), &mut self.inverse, comptime!(w.scores()));
        if comptime!(b.gate == GateKind::Key) {
            fetch_keys::<I, N>(&keys.writing, place, part, sizes, &mut self.writing, w);
        }
    }
}
