//! Stage 2, walking the chunks of a sequence in order: the state before each chunk.
//!
//! ```text
//! x  = T (v - (k e^{c}) S)      u = Diag(beta) x          (delta;  u = v without it)
//! S' = e^{c_n} S + (k e^{c_n - c})^T u
//! ```
//! Under a scalar gate, or none, the decay belongs to rows, and keys need not meet it: `(k e^{c}) S = e^{c} (k S)`. Then all
//! of a chunk's keys are `resident`, read once.
//!
//! One cube keeps the state of one head and block of value features in shared memory, in f32; without the delta rule
//! also of only one block of key features, as rows of the state then do not meet.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, copy, fill, fresh, product, product_at, unit, units};
use super::blueprint::{Blueprint, GateKind, WalkBlueprint};
use super::decay::{Decay, Role, head_gate, load_keys, read, step_size, store};
use super::flight::{fetch, fetch_scores, put};
use super::place::{Place, Sizes, Walk};

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

/// `state = e^{c_n} state` for `rows` of its rows, the block of key features that begins at `row0`, or all under a scalar
/// gate.
#[cube]
pub(crate) fn decay_rows(
    state: &mut Tile<f32>,
    row0: usize,
    decay: &Decay,
    #[comptime] rows: usize,
    #[comptime] b: Blueprint,
) {
    if comptime!(b.gate != GateKind::None) {
        for i in range_stepped(unit(), comptime!(rows * state.cols), units()) {
            let (k, v) = (i / state.cols, i % state.cols);
            state.set(row0 + k, v, state.get(row0 + k, v) * decay.end(k, b));
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
    k: &[Vector<I, N>],
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
    let mut decay = Decay::new(b);
    let mut state = Tile::<f32>::new(rows, d, padding);
    let mut narrow = Tile::<E>::new(comptime!(w.narrow_rows()), d, operand);
    let mut keys = Tile::<E>::new(c, comptime!(w.key_cols()), operand);
    let mut u = Tile::<E>::new(c, d, operand);
    let mut x = Tile::<f32>::new(comptime!(if b.delta { c } else { 1 }), d, padding);
    let mut inverse = Tile::<E>::new(comptime!(if b.delta { c } else { 1 }), c, operand);
    let mut steps = Shared::<[f32]>::new_slice(c);
    load_state::<f32, f32, N>(initial_state, part.state(sizes), part.k0, part.v0, sizes, &mut state, has_initial);

    let walk = Walk::of(sizes, table, part.sequence, b);
    let mut next = Next::<I, E, N>::new(w);
    next.ask(k, v, t, g, beta, &walk.place(sizes, 0, part.head, b), &part, sizes, w);
    for step in 0..walk.chunks {
        let place = walk.place(sizes, step, part.head, b);
        sync_cube();
        store_state::<E, N>(&state, states, place.state(sizes), part.k0, part.v0, sizes);
        decay.begin(next.gate, b);
        put::<I, E, N>(&next.values, &mut u, comptime!(w.values()));
        if comptime!(w.resident) {
            put::<I, E, N>(&next.keys, &mut keys, comptime!(w.keys()));
        }
        if comptime!(b.delta) {
            put::<E, E, N>(&next.inverse, &mut inverse, comptime!(w.scores()));
            if unit() < c {
                steps[unit()] = next.step;
            }
        }
        if step + 1 < walk.chunks {
            next.ask(k, v, t, g, beta, &walk.place(sizes, step + 1, part.head, b), &part, sizes, w);
        }
        if comptime!(b.delta) {
            if comptime!(w.resident) {
                read_state::<E>(&keys, &state, 0, &mut narrow, &mut x, Mode::Set, b);
                sync_cube();
            } else {
                fill::<f32>(&mut x, 0.0);
                for block in 0..state_blocks {
                    let k0 = block * b.block;
                    load_block::<I, E, N>(k, g, &place, sizes, k0, 1.0, &mut decay, &mut keys, Role::FromStart, b);
                    read_state::<E>(&keys, &state, k0, &mut narrow, &mut x, Mode::Add, b);
                    sync_cube();
                }
            }
            subtract_read::<E>(&x, &decay, &mut u, w);
            sync_cube();
            product::<E>(&inverse, &u, &mut x, comptime!(Form::ab(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32, N>(&x, x_out, place.values(sizes), place.rows, part.v0, sizes.value_dim);
            write_along_keys::<E>(&x, &steps, &decay, &mut u, w);
        } else if comptime!(w.resident && b.gate != GateKind::None) {
            sync_cube();
            weigh::<E>(&decay, &mut u, 1.0, Role::ToEnd, b);
        }
        if comptime!(w.resident) {
            decay_rows(&mut state, 0, &decay, rows, b);
            sync_cube();
            product::<E>(&keys, &u, &mut state, comptime!(Form::atb(rows, d, c, Mode::Add)), b.engine);
        } else {
            for block in 0..state_blocks {
                let row0 = block * b.block;
                load_block::<I, E, N>(k, g, &place, sizes, part.k0 + row0, 1.0, &mut decay, &mut keys, Role::ToEnd, b);
                decay_rows(&mut state, row0, &decay, b.block, b);
                sync_cube();
                let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: row0 };
                let form = comptime!(Form::atb(b.block, d, c, Mode::Add));
                product_at::<E, E>(&keys, &u, &mut state, &corner, form, b.engine);
                sync_cube();
            }
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state::<f32, N>(&state, final_state, part.state(sizes), part.k0, part.v0, sizes);
}

/// What a chunk reads, on its way.
#[derive(CubeType)]
struct Next<I: Float, E: Float, N: Size> {
    keys: Array<Vector<I, N>>,
    values: Array<Vector<I, N>>,
    inverse: Array<Vector<E, N>>,
    /// Of token `unit()`.
    gate: f32,
    step: f32,
}

#[cube]
impl<I: Float, E: Float, N: Size> Next<I, E, N> {
    fn new(#[comptime] w: WalkBlueprint) -> Self {
        let n = N::value().comptime();
        Next::<I, E, N> {
            keys: Array::new(comptime!(if w.resident { w.keys().vectors(n) } else { 1 })),
            values: Array::new(comptime!(w.values().vectors(n))),
            inverse: Array::new(comptime!(if w.chunk.delta { w.scores().vectors(n) } else { 1 })),
            gate: f32::new(0.0),
            step: f32::new(0.0),
        }
    }

    fn ask(
        &mut self,
        k: &[Vector<I, N>],
        v: &[Vector<I, N>],
        t: &[Vector<E, N>],
        g: &[f32],
        beta: &[f32],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        #[comptime] w: WalkBlueprint,
    ) {
        let b = comptime!(w.chunk);
        let (at, rows) = (place.values(sizes), place.rows);
        fetch::<I, N>(v, at, rows, part.v0, sizes.value_dim, &mut self.values, comptime!(w.values()));
        if comptime!(w.resident) {
            fetch::<I, N>(k, place.keys(sizes), rows, part.k0, sizes.key_dim, &mut self.keys, comptime!(w.keys()));
        }
        self.gate = head_gate(g, place, sizes, b);
        if comptime!(b.delta) {
            fetch_scores::<E, N>(t, place.scores(sizes, b), &mut self.inverse, comptime!(w.scores()));
            self.step = step_size(beta, place, sizes);
        }
    }
}

/// Fills the tile with a block of keys that meet the decay. Synchronises before.
#[cube]
pub(crate) fn load_block<I: Float, E: Float, N: Size>(
    k: &[Vector<I, N>],
    g: &[f32],
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    factor: f32,
    decay: &mut Decay,
    keys: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    decay.load_block(g, place, sizes, k0, b);
    decay.prepare(g, place, sizes, k0, role, b);
    load_keys::<I, E, N>(k, place.keys(sizes), place.rows, k0, sizes.key_dim, factor, &*decay, keys, role, b);
}

/// `u -= x`, what the state holds of the values; times the decay if the keys have not met it.
#[cube]
fn subtract_read<E: Float>(x: &Tile<f32>, decay: &Decay, u: &mut Tile<E>, #[comptime] w: WalkBlueprint) {
    for i in range_stepped(unit(), comptime!(u.rows * u.cols), units()) {
        let (row, col) = (i / u.cols, i % u.cols);
        let mut held = x.get(row, col);
        if comptime!(w.resident) {
            held *= decay.weight(row, 0, Role::FromStart, w.chunk);
        }
        u.set(row, col, u.get(row, col) - held);
    }
}

/// `u = beta x`, which is written along the keys; times the decay if they have not met it.
#[cube]
fn write_along_keys<E: Float>(
    x: &Tile<f32>,
    steps: &Shared<[f32]>,
    decay: &Decay,
    u: &mut Tile<E>,
    #[comptime] w: WalkBlueprint,
) {
    for i in range_stepped(unit(), comptime!(u.rows * u.cols), units()) {
        let (row, col) = (i / u.cols, i % u.cols);
        let mut weight = steps[row];
        if comptime!(w.resident) {
            weight *= decay.weight(row, 0, Role::ToEnd, w.chunk);
        }
        u.set(row, col, weight * x.get(row, col));
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
