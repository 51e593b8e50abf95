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
//! One cube keeps the state of one head and block of value features in f32, in registers where it can; without the delta
//! rule also of only one block of key features, as rows of the state then do not meet. Products read it in the element
//! type of the keys, `narrow`.

use cubecl::prelude::*;

use super::ahead::{Ahead, Rows, WalkedKeys, fetch_keys, put_keys};
use super::blueprint::{Blueprint, GateKind, WalkBlueprint};
use super::decay::{Decay, Role};
use super::place::{Sizes, Walk};
use crate::tile::{Corner, Form, Mode, Sums, Tile, this_cube, unit, units};
use crate::transfer::{Flight, load, store};

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

/// Takes a state, or a block of it; zero where `present` is not.
#[cube]
pub(crate) fn take_state(x: &[f32], part: &Part, sizes: &Sizes, state: &mut Sums, #[comptime] present: bool) {
    let (unit, at) = (unit(), part.state(sizes));
    #[unroll]
    for j in 0..comptime!(state.spread.len()) {
        if state.has(unit, j) {
            let place = state.place(unit, j);
            let (k, v) = (part.k0 + place.0, part.v0 + place.1);
            let mut value = f32::new(0.0);
            if comptime!(present) {
                if k < sizes.key_dim && v < sizes.value_dim {
                    value = x[at + k * sizes.value_dim + v];
                }
            }
            state.set(place, j, value);
        }
    }
}

/// Writes a state, or a block of it.
#[cube]
pub(crate) fn leave_state(state: &Sums, out: &mut [f32], part: &Part, sizes: &Sizes) {
    let (unit, at) = (unit(), part.state(sizes));
    #[unroll]
    for j in 0..comptime!(state.spread.len()) {
        if state.has(unit, j) {
            let place = state.place(unit, j);
            let (k, v) = (part.k0 + place.0, part.v0 + place.1);
            if k < sizes.key_dim && v < sizes.value_dim {
                out[at + k * sizes.value_dim + v] = state.get(place, j);
            }
        }
    }
}

/// The state as products read it.
#[cube]
pub(crate) fn narrow_state<E: Float>(state: &Sums, narrow: &mut Tile<E>, #[comptime] w: WalkBlueprint) {
    if comptime!(w.narrow_rows() > 1) {
        state.put_at::<E>(narrow, 0);
    }
}

/// Writes the state for the launches that read it.
#[cube]
pub(crate) fn store_state<E: Float, N: Size>(
    state: &Sums,
    narrow: &Tile<E>,
    out: &mut [Vector<E, N>],
    at: usize,
    part: &Part,
    sizes: &Sizes,
    #[comptime] w: WalkBlueprint,
) {
    let from = (at + part.k0 * sizes.value_dim, sizes.value_dim);
    let rows = sizes.key_dim - part.k0;
    if comptime!(w.narrow_rows() > 1) {
        store::<E, E, N>(narrow, out, from, rows, part.v0, sizes.value_dim, w.chunk.units);
    } else {
        store::<E, f32, N>(&state.memory, out, from, rows, part.v0, sizes.value_dim, w.chunk.units);
    }
}

/// `state = e^{c_n} state`.
#[cube]
pub(crate) fn decay_rows(state: &mut Sums, by: &Rows, #[comptime] b: Blueprint) {
    if comptime!(b.gate != GateKind::None) {
        let unit = unit();
        #[unroll]
        for j in 0..comptime!(state.spread.len()) {
            if state.has(unit, j) {
                let place = state.place(unit, j);
                let mut factor = by.decay.end(0, b.by_row());
                if comptime!(b.gate == GateKind::KEY) {
                    factor = by.ends[place.0];
                }
                state.set(place, j, state.get(place, j) * factor);
            }
        }
    }
}

/// `out (+)= keys state`, of the state's rows from `row0` on.
#[cube]
pub(crate) fn read_state<E: Float>(
    keys: &Tile<E>,
    state: &Sums,
    narrow: &Tile<E>,
    row0: usize,
    out: &mut Sums,
    #[comptime] mode: Mode,
    #[comptime] w: WalkBlueprint,
) {
    let form = comptime!(Form::ab(w.chunk.chunk, w.value_block, keys.cols, mode));
    let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: row0, out_row: 0usize };
    if comptime!(w.narrow_rows() > 1) {
        out.product_at::<E, E>(keys, narrow, &corner, form);
    } else {
        out.product_at::<E, f32>(keys, &state.memory, &corner, form);
    }
}

/// Writes sums to a tensor: through `stage`, where they have been put, if they are no tile.
#[cube]
pub(crate) fn store_sums<I: Float, E: Float, N: Size>(
    sums: &Sums,
    stage: &Tile<E>,
    out: &mut [Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
) {
    if comptime!(sums.spread.in_memory()) {
        store::<I, f32, N>(&sums.memory, out, at, rows, col0, dim, sums.spread.units);
    } else {
        store::<I, E, N>(stage, out, at, rows, col0, dim, sums.spread.units);
    }
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_kernel<I: Float, E: Float, N: Size>(
    keys: &WalkedKeys<I, N>,
    v: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    t: &[Vector<E, N>],
    initial_state: &[f32],
    table: &[u32],
    x_out: &mut [Vector<I, N>],
    states: &mut [Vector<E, N>],
    final_state: &mut [f32],
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
    let operand = comptime!(b.operand_padding());
    let (c, rows) = comptime!((b.chunk, w.rows()));
    let (by_row, key_wise) = comptime!((b.by_row(), b.gate == GateKind::KEY));
    let mut by = Rows::new(w);
    let mut state = Sums::new(comptime!(w.state()));
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    let mut key_tile = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut u = Tile::<E>::new(c, d, operand);
    let mut x = Sums::new(comptime!(w.written()));
    let mut stage = Tile::<E>::new(comptime!(if b.delta { w.written().stage() } else { 1 }), d, operand);
    let mut inverse = Tile::<E>::new(comptime!(if b.delta { c } else { 1 }), c, operand);
    take_state(initial_state, &part, sizes, &mut state, has_initial);

    let walk = Walk::of(sizes, table, part.sequence, b);
    // With gates per key feature the additive write has no keys that read.
    let reads = comptime!(b.delta || !key_wise);
    let mut next_writing = Flight::<I, N>::new(comptime!(w.keys()), comptime!(w.keys_ahead(key_wise)));
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
        narrow_state::<E>(&state, &mut narrow, w);
        next.begin(&mut by, &mut u, &mut inverse, w);
        if comptime!(reads) {
            put_keys::<I, E, N>(&next.reading, &mut key_tile, w);
        }
        sync_cube();
        store_state::<E, N>(&state, &narrow, states, place.state(sizes), &part, sizes, w);
        if comptime!(b.delta) {
            if comptime!(w.resident) {
                read_state::<E>(&key_tile, &state, &narrow, 0, &mut x, Mode::Set, w);
                x.settle();
            } else {
                x.clear();
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load::<I, E, N>(&keys.reading, key_at, place.rows, k0, sizes.key_dim, &mut key_tile, b.units);
                    sync_cube();
                    read_state::<E>(&key_tile, &state, &narrow, k0, &mut x, Mode::Add, w);
                    sync_cube();
                }
            }
            subtract_read::<E>(&x, &by.decay, &mut u, by_row);
        }
        if comptime!(key_wise) {
            if comptime!(b.delta) {
                sync_cube();
            }
            put_keys::<I, E, N>(&next_writing, &mut key_tile, w);
        }
        if step + 1 < walk.chunks {
            let place = walk.place(sizes, step + 1, part.head, b);
            next.ask(keys, v, t, g, beta, &place, &part, sizes, w, reads);
            if comptime!(key_wise) {
                fetch_keys::<I, N>(&keys.writing, &place, &part, sizes, &mut next_writing, w);
            }
        }
        sync_cube();
        if comptime!(b.delta) {
            x.product::<E, E>(&inverse, &u, comptime!(Form::ab(c, d, c, Mode::Set)));
            sync_cube();
            x.put::<E>(&mut stage);
            take_steps::<E>(&x, &by, &mut u, Role::ToEnd, by_row);
            sync_cube();
            store_sums::<I, E, N>(&x, &stage, x_out, place.values(sizes), place.rows, part.v0, sizes.value_dim);
        } else if comptime!(b.gate == GateKind::HEAD) {
            weigh::<E>(&by.decay, &mut u, 1.0, Role::ToEnd, by_row);
            sync_cube();
        }
        decay_rows(&mut state, &by, b);
        state.settle();
        if comptime!(w.resident) {
            state.product::<E, E>(&key_tile, &u, comptime!(Form::atb(rows, d, c, Mode::Add)));
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                load::<I, E, N>(
                    &keys.writing,
                    key_at,
                    place.rows,
                    part.k0 + row0,
                    sizes.key_dim,
                    &mut key_tile,
                    b.units,
                );
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                state.product_at::<E, E>(&key_tile, &u, &corner, comptime!(Form::atb(b.block, d, c, Mode::Add)));
                sync_cube();
            }
        }
    }
    state.settle();
    let part = Part::of(this_cube(), sizes, w);
    leave_state(&state, final_state, &part, sizes);
}

/// `u -= x`, what the state holds of the values; times the decay where that belongs to rows.
#[cube]
fn subtract_read<E: Float>(x: &Sums, decay: &Decay, u: &mut Tile<E>, #[comptime] b: Blueprint) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(x.spread.len()) {
        if x.has(unit, j) {
            let place = x.place(unit, j);
            let read = x.get(place, j) * decay.weight(place.0, 0, Role::FromStart, b);
            u.set(place.0, place.1, u.get(place.0, place.1) - read);
        }
    }
}

/// `u_i = beta_i x_i` times the weight of the row in a role.
#[cube]
pub(crate) fn take_steps<E: Float>(
    x: &Sums,
    by: &Rows,
    u: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(x.spread.len()) {
        if x.has(unit, j) {
            let place = x.place(unit, j);
            let weight = by.steps[place.0] * by.decay.weight(place.0, 0, role, b);
            u.set(place.0, place.1, weight * x.get(place, j));
        }
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
