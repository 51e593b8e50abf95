//! Stage 2 reversed: the gradient of the state that leaves each chunk, and through the delta rule that of the values.
//!
//! ```text
//! du  = A^T do + (k e^{c_n - c}) dS'      z = T^T Diag(beta) du = dv                     (delta)
//! dS  = e^{c_n} dS' + scale (q e^{c})^T do - (k e^{c})^T z                               (no z without it)
//! ```
//! Cubes hold the same part of the state as in stage 2, and walk the chunks from the last to the first.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, fill, fresh, product, product_at, unit, units};
use super::blueprint::{GateKind, WalkBlueprint};
use super::decay::{Decay, Role, head_gate, step_size};
use super::place::{Place, Sizes, Walk};
use super::state::{Part, WalkedKeys, decay_rows, fetch_ends, load_state, put_ends, read_state, store_state, weigh};
use super::transfer::{fetch, fetch_scores, load, put, store};

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
    let mut decay = Decay::new(by_row);
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
    let mut steps = Shared::<[f32]>::new_slice(c);
    let mut ends = Shared::<[f32]>::new_slice(rows);
    load_state::<f32, f32, N>(d_final, part.state(sizes), part.k0, part.v0, sizes, &mut dstate, has_final);

    let walk = Walk::of(sizes, table, part.sequence, b);
    let mut next = Next::<I, E, N>::new(w);
    next.ask_first(keys, do_, a, g, beta, &walk.place(sizes, walk.chunks - 1, part.head, b), &part, sizes, w);
    for step in 0..walk.chunks {
        let place = walk.place(sizes, walk.chunks - 1 - step, part.head, b);
        let key_at = place.walked_keys(sizes, b);
        sync_cube();
        store_state::<E, N>(&dstate, dstates, place.state(sizes), part.k0, part.v0, sizes);
        if comptime!(b.delta) {
            next.ask_second(keys, t, &place, &part, sizes, w);
        } else {
            next.ask_queries(q, &place, &part, sizes, w);
        }
        decay.begin(next.gate, by_row);
        put::<I, E, N>(&next.d_out, &mut d_out, comptime!(w.values()));
        put_ends(&next.ends, &mut ends, w);
        if comptime!(b.delta) {
            put::<E, E, N>(&next.square, &mut square, comptime!(w.scores()));
            if unit() < c {
                steps[unit()] = next.step;
            }
            if comptime!(w.resident) {
                put::<I, E, N>(&next.keys, &mut key_tile, comptime!(w.keys()));
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
                weigh::<f32>(&decay, &mut du, 1.0, Role::ToEnd, by_row);
                sync_cube();
            }
            product::<E>(&square, &d_out, &mut du, comptime!(Form::atb(c, d, c, Mode::Add)), b.engine);
            sync_cube();
            put::<E, E, N>(&next.inverse, &mut square, comptime!(w.scores()));
            if comptime!(w.resident && key_wise) {
                put::<I, E, N>(&next.late_keys, &mut key_tile, comptime!(w.keys()));
            }
            next.ask_queries(q, &place, &part, sizes, w);
            scale_rows::<E>(&du, &steps, &mut z);
            sync_cube();
            product::<E>(&square, &z, &mut du, comptime!(Form::atb(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32, N>(&du, dv, place.values(sizes), place.rows, part.v0, sizes.value_dim);
            for i in range_stepped(unit(), comptime!(c * d), units()) {
                let (row, col) = (i / d, i % d);
                z.set(row, col, -du.get(row, col) * decay.weight(row, 0, Role::FromStart, by_row));
            }
        }
        if comptime!(w.resident) {
            put::<I, E, N>(&next.queries, &mut queries, comptime!(w.keys()));
        }
        if step + 1 < walk.chunks {
            let later = walk.place(sizes, walk.chunks - 2 - step, part.head, b);
            next.ask_first(keys, do_, a, g, beta, &later, &part, sizes, w);
        }
        sync_cube();
        if comptime!(!key_wise) {
            weigh::<E>(&decay, &mut d_out, sizes.scale, Role::FromStart, by_row);
        }
        decay_rows(&mut dstate, &decay, &ends, b);
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

/// What a chunk reads, on its way: `first` while the chunk after it is computed, `second` from the beginning of its own,
/// and the queries, which are needed last, when there are registers for them.
#[derive(CubeType)]
struct Next<I: Float, E: Float, N: Size> {
    d_out: Array<Vector<I, N>>,
    keys: Array<Vector<I, N>>,
    /// For the second product with keys, under gates per key feature.
    late_keys: Array<Vector<I, N>>,
    queries: Array<Vector<I, N>>,
    square: Array<Vector<E, N>>,
    inverse: Array<Vector<E, N>>,
    ends: Array<f32>,
    /// Of token `unit()`.
    gate: f32,
    step: f32,
}

#[cube]
impl<I: Float, E: Float, N: Size> Next<I, E, N> {
    fn new(#[comptime] w: WalkBlueprint) -> Self {
        let n = N::value().comptime();
        let (keys, squares) = comptime!((
            if w.resident { w.keys().vectors(n) } else { 1 },
            if w.chunk.delta { w.scores().vectors(n) } else { 1 },
        ));
        Next::<I, E, N> {
            d_out: Array::new(comptime!(w.values().vectors(n))),
            keys: Array::new(comptime!(if w.chunk.delta { keys } else { 1 })),
            late_keys: Array::new(comptime!(if w.chunk.delta && w.chunk.gate == GateKind::Key { keys } else { 1 })),
            queries: Array::new(keys),
            square: Array::new(squares),
            inverse: Array::new(squares),
            ends: Array::new(comptime!(w.ends())),
            gate: f32::new(0.0),
            step: f32::new(0.0),
        }
    }

    fn ask_first(
        &mut self,
        keys: &WalkedKeys<I, N>,
        do_: &[Vector<I, N>],
        a: &[Vector<E, N>],
        g: &[f32],
        beta: &[f32],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
    ) {
        let b = comptime!(w.chunk);
        let (at, rows) = (place.values(sizes), place.rows);
        fetch::<I, N>(do_, at, rows, part.v0, sizes.value_dim, &mut self.d_out, comptime!(w.values()));
        self.gate = head_gate(g, place, sizes, b);
        fetch_ends(&keys.ends, place, part, sizes, &mut self.ends, w);
        if comptime!(b.delta) {
            fetch_scores::<E, N>(a, place.scores(sizes, b), &mut self.square, comptime!(w.scores()));
            self.step = step_size(beta, place, sizes);
            if comptime!(w.resident) {
                let (at, shape) = (place.walked_keys(sizes, b), comptime!(w.keys()));
                fetch::<I, N>(&keys.reading, at, rows, part.k0, sizes.key_dim, &mut self.keys, shape);
            }
        }
    }

    fn ask_second(
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
        if comptime!(w.resident && b.gate == GateKind::Key) {
            let (at, shape) = (place.walked_keys(sizes, b), comptime!(w.keys()));
            fetch::<I, N>(&keys.writing, at, place.rows, part.k0, sizes.key_dim, &mut self.late_keys, shape);
        }
    }

    fn ask_queries(
        &mut self,
        q: &[Vector<I, N>],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
    ) {
        if comptime!(w.resident) {
            let (at, shape) = (place.walked_keys(sizes, w.chunk), comptime!(w.keys()));
            fetch::<I, N>(q, at, place.rows, part.k0, sizes.key_dim, &mut self.queries, shape);
        }
    }
}

/// `to_i = beta_i from_i`.
#[cube]
fn scale_rows<E: Float>(from: &Tile<f32>, steps: &Shared<[f32]>, to: &mut Tile<E>) {
    for i in range_stepped(unit(), comptime!(to.rows * to.cols), units()) {
        let (row, col) = (i / to.cols, i % to.cols);
        to.set(row, col, steps[row] * from.get(row, col));
    }
}
