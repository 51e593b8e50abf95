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
use super::decay::{Decay, Role, head_gate, load_keys, step_size, store};
use super::flight::{fetch, fetch_scores, put};
use super::place::{Place, Sizes, Walk};
use super::state::{Part, decay_rows, load_block, load_state, read_state, store_state, weigh};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_backward_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
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
    let mut decay = Decay::new(b);
    let mut dstate = Tile::<f32>::new(rows, d, padding);
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    // Queries, and keys too unless both are resident.
    let mut keys = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut other_keys = Tile::<E>::new(comptime!(if both { c } else { 1 }), comptime!(w.key_cols()), operand);
    let mut d_out = Tile::<E>::new(c, d, operand);
    // `-z`, and before it what `T` is applied to.
    let mut z = Tile::<E>::new(delta_rows, d, operand);
    let mut du = Tile::<f32>::new(delta_rows, d, padding);
    let mut square = Tile::<E>::new(delta_rows, c, operand);
    let mut steps = Shared::<[f32]>::new_slice(c);
    load_state::<f32, f32, N>(d_final, part.state(sizes), part.k0, part.v0, sizes, &mut dstate, has_final);

    let walk = Walk::of(sizes, table, part.sequence, b);
    let mut next = Next::<I, E, N>::new(w);
    if comptime!(w.resident) {
        next.ask_first(k, do_, a, g, beta, &walk.place(sizes, walk.chunks - 1, part.head, b), &part, sizes, w);
    }
    for step in 0..walk.chunks {
        let part = again(&part, sizes, w);
        let place = walk.place(sizes, walk.chunks - 1 - step, part.head, b);
        sync_cube();
        store_state::<E, N>(&dstate, dstates, place.state(sizes), part.k0, part.v0, sizes);
        if comptime!(w.resident) {
            next.ask_second(q, t, &place, &part, sizes, w);
        } else {
            next.ask_first(k, do_, a, g, beta, &place, &part, sizes, w);
        }
        decay.begin(next.gate, b);
        put::<I, E, N>(&next.d_out, &mut d_out, comptime!(w.values()));
        if comptime!(b.delta) {
            put::<E, E, N>(&next.square, &mut square, comptime!(w.scores()));
            if unit() < c {
                steps[unit()] = next.step;
            }
            if comptime!(w.resident) {
                put::<I, E, N>(&next.keys, &mut other_keys, comptime!(w.keys()));
                read_state::<E>(&other_keys, &dstate, 0, &mut narrow, &mut du, Mode::Set, b);
                sync_cube();
                if comptime!(b.gate != GateKind::None) {
                    weigh::<f32>(&decay, &mut du, 1.0, Role::ToEnd, b);
                    sync_cube();
                }
            } else {
                fill::<f32>(&mut du, 0.0);
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load_block::<I, E, N>(k, g, &place, sizes, k0, 1.0, &mut decay, &mut keys, Role::ToEnd, b);
                    read_state::<E>(&keys, &dstate, k0, &mut narrow, &mut du, Mode::Add, b);
                    sync_cube();
                }
            }
            product::<E>(&square, &d_out, &mut du, comptime!(Form::atb(c, d, c, Mode::Add)), b.engine);
            sync_cube();
            if comptime!(!w.resident) {
                next.ask_second(q, t, &place, &part, sizes, w);
            }
            put::<E, E, N>(&next.inverse, &mut square, comptime!(w.scores()));
            scale_rows::<E>(&du, &steps, &mut z);
            sync_cube();
            product::<E>(&square, &z, &mut du, comptime!(Form::atb(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32, N>(&du, dv, place.values(sizes), place.rows, part.v0, sizes.value_dim);
            for i in range_stepped(unit(), comptime!(c * d), units()) {
                let (row, col) = (i / d, i % d);
                let mut value = -du.get(row, col);
                if comptime!(w.resident) {
                    value *= decay.weight(row, 0, Role::FromStart, b);
                }
                z.set(row, col, value);
            }
        }
        if comptime!(w.resident) {
            put::<I, E, N>(&next.queries, &mut keys, comptime!(w.keys()));
            if step + 1 < walk.chunks {
                let later = walk.place(sizes, walk.chunks - 2 - step, part.head, b);
                next.ask_first(k, do_, a, g, beta, &later, &part, sizes, w);
            }
        }
        let form = comptime!(Form::atb(w.key_cols(), d, c, Mode::Add));
        if comptime!(w.resident) {
            sync_cube();
            weigh::<E>(&decay, &mut d_out, sizes.scale, Role::FromStart, b);
            decay_rows(&mut dstate, 0, &decay, rows, b);
            sync_cube();
            product::<E>(&keys, &d_out, &mut dstate, form, b.engine);
            if comptime!(b.delta) {
                sync_cube();
                product::<E>(&other_keys, &z, &mut dstate, form, b.engine);
            }
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                let k0 = part.k0 + row0;
                let role = comptime!(Role::FromStart);
                load_block::<I, E, N>(q, g, &place, sizes, k0, sizes.scale, &mut decay, &mut keys, role, b);
                decay_rows(&mut dstate, row0, &decay, b.block, b);
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                product_at::<E, E>(&keys, &d_out, &mut dstate, &corner, form, b.engine);
                sync_cube();
                if comptime!(b.delta) {
                    let at = place.keys(sizes);
                    load_keys::<I, E, N>(k, at, place.rows, k0, sizes.key_dim, 1.0, &decay, &mut keys, role, b);
                    sync_cube();
                    product_at::<E, E>(&keys, &z, &mut dstate, &corner, form, b.engine);
                    sync_cube();
                }
            }
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state::<f32, N>(&dstate, d_initial, part.state(sizes), part.k0, part.v0, sizes);
}

/// The part anew for every chunk, without the delta rule: then few registers are in use, the compiler aims at more cubes
/// and would spill it.
#[cube]
fn again(part: &Part, sizes: &Sizes, #[comptime] w: WalkBlueprint) -> Part {
    if comptime!(w.chunk.delta) {
        Part { sequence: part.sequence, head: part.head, v0: part.v0, k0: part.k0 }
    } else {
        Part::of(fresh(CUBE_POS as u32) as usize, sizes, w)
    }
}

/// What a chunk reads, on its way: with resident keys `first` while the chunk after it is computed, and `second` from the
/// beginning of its own. Else there are no registers for that, and memory is waited for.
#[derive(CubeType)]
struct Next<I: Float, E: Float, N: Size> {
    d_out: Array<Vector<I, N>>,
    keys: Array<Vector<I, N>>,
    queries: Array<Vector<I, N>>,
    square: Array<Vector<E, N>>,
    inverse: Array<Vector<E, N>>,
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
            queries: Array::new(keys),
            square: Array::new(squares),
            inverse: Array::new(squares),
            gate: f32::new(0.0),
            step: f32::new(0.0),
        }
    }

    fn ask_first(
        &mut self,
        k: &[Vector<I, N>],
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
        if comptime!(b.delta) {
            fetch_scores::<E, N>(a, place.scores(sizes, b), &mut self.square, comptime!(w.scores()));
            self.step = step_size(beta, place, sizes);
            if comptime!(w.resident) {
                fetch::<I, N>(k, place.keys(sizes), rows, part.k0, sizes.key_dim, &mut self.keys, comptime!(w.keys()));
            }
        }
    }

    fn ask_second(
        &mut self,
        q: &[Vector<I, N>],
        t: &[Vector<E, N>],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
    ) {
        let (at, b) = (place.keys(sizes), comptime!(w.chunk));
        if comptime!(w.resident) {
            fetch::<I, N>(q, at, place.rows, part.k0, sizes.key_dim, &mut self.queries, comptime!(w.keys()));
        }
        if comptime!(b.delta) {
            fetch_scores::<E, N>(t, place.scores(sizes, b), &mut self.inverse, comptime!(w.scores()));
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
