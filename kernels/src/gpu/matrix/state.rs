//! Stage 2, walking the chunks of a sequence in order: the state before each chunk.
//!
//! ```text
//! x  = T (v - (k e^{c}) S)      u = Diag(beta) x          (delta;  u = v without it)
//! S' = e^{c_n} S + (k e^{c_n - c})^T u
//! ```
//! The keys come from the scores' launch with the decay of a gate per key feature. A scalar decay belongs to rows and is
//! left to them, `(k e^{c}) S = e^{c} (k S)`; then both keys are `k`. Where shared memory has room, all keys of a chunk are
//! in it at once.
//!
//! One cube keeps the state of one head and block of value features in shared memory, in f32; without the delta rule
//! also of only one block of key features, as rows of the state then do not meet.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, copy, fill, fresh, product, product_at, unit, units};
use super::ahead::{Ahead, Rows, WalkedKeys, fetch_keys, put_keys};
use super::blueprint::{Blueprint, GateKind, WalkBlueprint};
use super::decay::{Decay, Role};
use super::place::{Sizes, Walk};
use super::transfer::{load, read, store};

/// The part of the state that a cube holds.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Part {
    pub sequence: usize,
    pub head: usize,
    /// Its first value and key feature.
    pub v0: usize,
    pub k0: usize,
}

#[cube]
impl Part {
    pub fn of(cube: usize, sizes: &Sizes, #[comptime] w: WalkBlueprint) -> Part {
        let key_parts = sizes.key_blocks / w.state_blocks;
        let parts = key_parts * sizes.value_dim.div_ceil(w.value_block);
        let (walk, part) = (cube / parts, cube % parts);
        Part {
            sequence: walk / sizes.value_heads,
            head: walk % sizes.value_heads,
            v0: (part / key_parts) * w.value_block,
            k0: (part % key_parts) * comptime!(w.state_blocks * w.chunk.block),
        }
    }

    /// Where the head's state is in `[sequences, value_heads, key_dim, value_dim]`.
    pub fn state(&self, sizes: &Sizes) -> usize {
        (self.sequence * sizes.value_heads + self.head) * (sizes.key_dim * sizes.value_dim)
    }
}

/// Reads a state, or a block of it, from `[key_dim, value_dim]` at `at`; zero where `present` is not.
#[cube]
pub(crate) fn load_state<A: Float, E: Float, N: Size>(
    x: &[Vector<A, N>],
    at: usize,
    k0: usize,
    v0: usize,
    sizes: &Sizes,
    tile: &mut Tile<E>,
    #[comptime] present: bool,
) {
    let n = N::value().comptime();
    let cols = comptime!(tile.cols / n);
    for i in range_stepped(unit(), comptime!(tile.rows * cols), units()) {
        let (row, col) = (i / cols, i % cols * n);
        let mut values = Vector::<A, N>::new(A::new(0.0));
        if comptime!(present) {
            values = read::<A, N>(x, (at, sizes.value_dim), sizes.key_dim, k0 + row, v0 + col, sizes.value_dim);
        }
        tile.set_many::<A, N>(row, col, values);
    }
}

/// Writes a state, or a block of it.
#[cube]
pub(crate) fn store_state<A: Float, N: Size>(
    tile: &Tile<f32>,
    out: &mut [Vector<A, N>],
    at: usize,
    k0: usize,
    v0: usize,
    sizes: &Sizes,
) {
    let from = (at + k0 * sizes.value_dim, sizes.value_dim);
    store::<A, f32, N>(tile, out, from, sizes.key_dim - k0, v0, sizes.value_dim);
}

/// `state = e^{c_n} state`.
#[cube]
pub(crate) fn decay_rows(state: &mut Tile<f32>, by: &Rows, #[comptime] b: Blueprint) {
    if comptime!(b.gate != GateKind::None) {
        for i in range_stepped(unit(), comptime!(state.rows * state.cols), units()) {
            let (k, v) = (i / state.cols, i % state.cols);
            let mut factor = by.decay.end(0, b.by_row());
            if comptime!(b.gate == GateKind::Key) {
                factor = by.ends[k];
            }
            state.set(k, v, state.get(k, v) * factor);
        }
    }
}

/// `out = keys state`, or `+=`. Matrix units want the state in the element type of the keys: `narrow`, which is filled.
/// Synchronises before the product.
#[cube]
pub(crate) fn read_state<E: Float>(
    keys: &Tile<E>,
    state: &Tile<f32>,
    row0: usize,
    narrow: &mut Tile<E>,
    out: &mut Tile<f32>,
    #[comptime] mode: Mode,
    #[comptime] b: Blueprint,
) {
    let form = comptime!(Form::ab(b.chunk, state.cols, keys.cols, mode));
    if comptime!(b.engine.on_matrix_units()) {
        copy::<f32, E>(state, row0, narrow);
        sync_cube();
        product::<E>(keys, &*narrow, out, form, b.engine);
    } else {
        sync_cube();
        let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: row0, out_row: 0usize };
        product_at::<E, f32>(keys, state, out, &corner, form, b.engine);
    }
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_kernel<I: Float, E: Float, N: Size>(
    keys: &WalkedKeys<I, N>,
    v: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    t: &[Vector<E, N>],
    initial_state: &[Vector<f32, N>],
    table: &[u32],
    x_out: &mut [Vector<I, N>],
    states: &mut [Vector<E, N>],
    final_state: &mut [Vector<f32, N>],
    sizes: &Sizes,
    #[comptime] has_initial: bool,
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
    let (by_row, key_wise) = comptime!((b.by_row(), b.gate == GateKind::Key));
    let mut by = Rows::new(w);
    let mut state = Tile::<f32>::new(rows, d, padding);
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    let mut key_tile = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut u = Tile::<E>::new(c, d, operand);
    let mut x = Tile::<f32>::new(comptime!(if b.delta { c } else { 1 }), d, padding);
    let mut inverse = Tile::<E>::new(comptime!(if b.delta { c } else { 1 }), c, operand);
    load_state::<f32, f32, N>(initial_state, part.state(sizes), part.k0, part.v0, sizes, &mut state, has_initial);

    let n = N::value().comptime();
    let walk = Walk::of(sizes, table, part.sequence, b);
    // With gates per key feature the additive write has no keys that read.
    let reads = comptime!(b.delta || !key_wise);
    let mut next_writing = Array::<Vector<I, N>>::new(comptime!(w.keys_ahead(key_wise, n)));
    let mut next = Ahead::<I, E, N>::new(w, reads);
    let place = walk.place(sizes, 0, part.head, b);
    next.ask(keys, v, t, g, beta, &place, &part, sizes, w, reads);
    if comptime!(key_wise) {
        fetch_keys::<I, N>(&keys.writing, &place, &part, sizes, &mut next_writing, w);
    }
    for step in 0..walk.chunks {
        let place = walk.place(sizes, step, part.head, b);
        let key_at = place.walked_keys(sizes, b);
        sync_cube();
        store_state::<E, N>(&state, states, place.state(sizes), part.k0, part.v0, sizes);
        next.begin(&mut by, &mut u, &mut inverse, w);
        if comptime!(reads) {
            put_keys::<I, E, N>(&next.reading, &mut key_tile, w);
        }
        if comptime!(b.delta) {
            if comptime!(w.resident) {
                read_state::<E>(&key_tile, &state, 0, &mut narrow, &mut x, Mode::Set, b);
                sync_cube();
            } else {
                fill::<f32>(&mut x, 0.0);
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load::<I, E, N>(&keys.reading, key_at, place.rows, k0, sizes.key_dim, &mut key_tile);
                    read_state::<E>(&key_tile, &state, k0, &mut narrow, &mut x, Mode::Add, b);
                    sync_cube();
                }
            }
            subtract_read::<E>(&x, &by.decay, &mut u, by_row);
        }
        if comptime!(key_wise) {
            put_keys::<I, E, N>(&next_writing, &mut key_tile, w);
        }
        if step + 1 < walk.chunks {
            let place = walk.place(sizes, step + 1, part.head, b);
            next.ask(keys, v, t, g, beta, &place, &part, sizes, w, reads);
            if comptime!(key_wise) {
                fetch_keys::<I, N>(&keys.writing, &place, &part, sizes, &mut next_writing, w);
            }
        }
        if comptime!(b.delta) {
            sync_cube();
            product::<E>(&inverse, &u, &mut x, comptime!(Form::ab(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32, N>(&x, x_out, place.values(sizes), place.rows, part.v0, sizes.value_dim);
            take_steps::<E>(&x, &by, &mut u, Role::ToEnd, by_row);
        } else if comptime!(b.gate == GateKind::Head) {
            sync_cube();
            weigh::<E>(&by.decay, &mut u, 1.0, Role::ToEnd, by_row);
        } else {
            sync_cube();
        }
        decay_rows(&mut state, &by, b);
        sync_cube();
        if comptime!(w.resident) {
            product::<E>(&key_tile, &u, &mut state, comptime!(Form::atb(rows, d, c, Mode::Add)), b.engine);
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                load::<I, E, N>(&keys.writing, key_at, place.rows, part.k0 + row0, sizes.key_dim, &mut key_tile);
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                let form = comptime!(Form::atb(b.block, d, c, Mode::Add));
                product_at::<E, E>(&key_tile, &u, &mut state, &corner, form, b.engine);
                sync_cube();
            }
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state::<f32, N>(&state, final_state, part.state(sizes), part.k0, part.v0, sizes);
}

/// `u -= x`, what the state holds of the values; times the decay where that belongs to rows.
#[cube]
fn subtract_read<E: Float>(x: &Tile<f32>, decay: &Decay, u: &mut Tile<E>, #[comptime] b: Blueprint) {
    for i in range_stepped(unit(), comptime!(u.rows * u.cols), units()) {
        let (row, col) = (i / u.cols, i % u.cols);
        u.set(row, col, u.get(row, col) - x.get(row, col) * decay.weight(row, 0, Role::FromStart, b));
    }
}

/// `u_i = beta_i x_i` times the weight of the row in a role.
#[cube]
pub(crate) fn take_steps<E: Float>(
    x: &Tile<f32>,
    by: &Rows,
    u: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    for i in range_stepped(unit(), comptime!(u.rows * u.cols), units()) {
        let (row, col) = (i / u.cols, i % u.cols);
        u.set(row, col, by.steps[row] * by.decay.weight(row, 0, role, b) * x.get(row, col));
    }
}

/// `u *= factor` and the weight of its row in a role.
#[cube]
pub(crate) fn weigh<E: Float>(
    decay: &Decay,
    u: &mut Tile<E>,
    factor: f32,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    for i in range_stepped(unit(), comptime!(u.rows * u.cols), units()) {
        let (row, col) = (i / u.cols, i % u.cols);
        u.set(row, col, u.get(row, col) * factor * decay.weight(row, 0, role, b));
    }
}
