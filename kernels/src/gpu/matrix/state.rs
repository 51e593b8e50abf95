//! Stage 2, walking the chunks of a sequence in order: the state before each chunk.
//!
//! ```text
//! x  = T (v - (k e^{c}) S)      u = Diag(beta) x          (delta;  u = v without it)
//! S' = e^{c_n} S + (k e^{c_n - c})^T u
//! ```
//! One cube keeps the state of one head and block of value features in shared memory, in f32; without the delta rule
//! also of only one block of key features, as rows of the state then do not meet.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, copy, fresh, product, product_at, unit, units};
use super::blueprint::{Blueprint, GateKind, WalkBlueprint};
use super::decay::{Decay, Role, load, load_keys, read, store};
use super::place::{Sizes, Walk};

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
pub(crate) fn load_state<E: Float>(
    x: &[f32],
    at: usize,
    k0: usize,
    v0: usize,
    sizes: &Sizes,
    tile: &mut Tile<E>,
    #[comptime] present: bool,
) {
    let (rows, cols) = comptime!((tile.rows, tile.cols));
    for i in range_stepped(unit(), rows * cols, units()) {
        let mut value = f32::new(0.0);
        if comptime!(present) {
            value = read::<f32>(x, (at, sizes.value_dim), sizes.key_dim, k0 + i / cols, v0 + i % cols, sizes.value_dim);
        }
        tile.set(i / cols, i % cols, value);
    }
}

/// Writes a state, or a block of it.
#[cube]
pub(crate) fn store_state(tile: &Tile<f32>, out: &mut [f32], at: usize, k0: usize, v0: usize, sizes: &Sizes) {
    let (rows, cols) = comptime!((tile.rows, tile.cols));
    for i in range_stepped(unit(), rows * cols, units()) {
        let (k, v) = (k0 + i / cols, v0 + i % cols);
        if k < sizes.key_dim && v < sizes.value_dim {
            out[at + k * sizes.value_dim + v] = tile.get(i / cols, i % cols);
        }
    }
}

/// `state = e^{c_n} state` for one block of its rows.
#[cube]
pub(crate) fn decay_rows(state: &mut Tile<f32>, row0: usize, decay: &Decay, #[comptime] b: Blueprint) {
    if comptime!(b.gate != GateKind::None) {
        for i in range_stepped(unit(), comptime!(b.block * state.cols), units()) {
            let (k, v) = (i / state.cols, i % state.cols);
            state.set(row0 + k, v, state.get(row0 + k, v) * decay.end(k, b));
        }
    }
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_kernel<I: Float, E: Float>(
    k: &[I],
    v: &[I],
    g: &[f32],
    beta: &[f32],
    t: &[E],
    initial_state: &[f32],
    table: &[u32],
    x_out: &mut [I],
    states: &mut [f32],
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
    let (padding, operand) = comptime!((b.padding(), b.operand_padding()));
    let c = comptime!(b.chunk);
    let mut decay = Decay::new(b);
    let mut state = Tile::<f32>::new(comptime!(state_blocks * b.block), d, padding);
    let mut keys = Tile::<E>::new(c, b.block, operand);
    let mut u = Tile::<E>::new(c, d, operand);
    load_state::<f32>(initial_state, part.state(sizes), part.k0, part.v0, sizes, &mut state, has_initial);

    let walk = Walk::of(sizes, table, part.sequence, b);
    for n in 0..walk.chunks {
        let place = walk.place(sizes, n, part.head, b);
        sync_cube();
        store_state(&state, states, place.state(sizes), part.k0, part.v0, sizes);
        decay.load(g, &place, sizes, b);
        let (key_at, value_at) = (place.keys(sizes), place.values(sizes));
        if comptime!(b.delta) {
            let mut x = Tile::<f32>::new(c, d, padding);
            let mut state_block = Tile::<E>::new(b.block, d, operand);
            let mut inverse = Tile::<E>::new(c, c, operand);
            load::<I, f32>(v, value_at, place.rows, part.v0, sizes.value_dim, &mut x);
            for block in 0..state_blocks {
                let k0 = block * b.block;
                decay.load_block(g, &place, sizes, k0, b);
                decay.prepare(g, &place, sizes, k0, Role::FromStart, b);
                load_keys::<I, E>(
                    k,
                    key_at,
                    place.rows,
                    k0,
                    sizes.key_dim,
                    -1.0,
                    &decay,
                    &mut keys,
                    Role::FromStart,
                    b,
                );
                copy::<f32, E>(&state, k0, &mut state_block);
                sync_cube();
                product::<E>(&keys, &state_block, &mut x, comptime!(Form::ab(c, d, b.block, Mode::Add)), b.engine);
                sync_cube();
            }
            copy::<f32, E>(&x, 0, &mut u);
            load::<E, E>(t, (place.scores(sizes, b), c.runtime()), c.runtime(), 0, c.runtime(), &mut inverse);
            sync_cube();
            product::<E>(&inverse, &u, &mut x, comptime!(Form::ab(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32>(&x, x_out, value_at, place.rows, part.v0, sizes.value_dim);
            scale_rows::<E>(&x, beta, place.scalars(sizes), place.rows, &mut u);
        } else {
            load::<I, E>(v, value_at, place.rows, part.v0, sizes.value_dim, &mut u);
        }
        for block in 0..state_blocks {
            let k0 = part.k0 + block * b.block;
            decay.load_block(g, &place, sizes, k0, b);
            decay.prepare(g, &place, sizes, k0, Role::ToEnd, b);
            load_keys::<I, E>(k, key_at, place.rows, k0, sizes.key_dim, 1.0, &decay, &mut keys, Role::ToEnd, b);
            decay_rows(&mut state, block * b.block, &decay, b);
            sync_cube();
            let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: block * b.block };
            product_at::<E>(&keys, &u, &mut state, &corner, comptime!(Form::atb(b.block, d, c, Mode::Add)), b.engine);
            sync_cube();
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state(&state, final_state, part.state(sizes), part.k0, part.v0, sizes);
}

/// `to_i = beta_i from_i`; rows beyond the sequence become zero.
#[cube]
pub(crate) fn scale_rows<E: Float>(from: &Tile<f32>, beta: &[f32], at: (usize, usize), rows: usize, to: &mut Tile<E>) {
    let (tile_rows, cols) = comptime!((to.rows, to.cols));
    for i in range_stepped(unit(), tile_rows * cols, units()) {
        let mut value = f32::new(0.0);
        if i / cols < rows {
            value = beta[at.0 + (i / cols) * at.1] * from.get(i / cols, i % cols);
        }
        to.set(i / cols, i % cols, value);
    }
}
