//! Stage 1, all chunks at once: the scores of the queries, and for the delta rule the inverse of its system.
//!
//! ```text
//! A_ij = scale sum_d q_i[d] k_j[d] e^{c_i[d] - c_j[d]}   (i >= j)
//! M_ij =       sum_d k_i[d] k_j[d] e^{c_i[d] - c_j[d]}   (i >  j)      T = (I + M Diag(beta))^-1
//! ```
//! One cube computes one chunk of one head. With key-wise gates the exponential sits inside the sum: between sub-blocks of
//! 16 tokens it is split at the start of the later one, so that both factors are at most 1 and a product remains; inside
//! a sub-block the pairs are summed one by one, a key decaying from row to row. `T` is found by forward substitution,
//! which stays accurate when keys are nearly equal, in sub-blocks, which are merged by products in f32.

use cubecl::prelude::*;

use super::super::tile::{BLOCK, Corner, Form, Mode, Sums, Tile, fill, product_at, this_cube, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, put_weighted};
use super::place::{Place, Sizes};
use super::transfer::{Flight, store_scores};

/// With gates per key feature, queries and keys that have met the decay, for the launches that need no more of it.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Weighted<I: Float, N: Size> {
    /// `scale q e^{c}`, `k e^{c}` (delta) and `k e^{c_n - c}`, each `[tokens, value_heads, key_dim]`.
    pub q_start: Box<[Vector<I, N>]>,
    pub k_start: Box<[Vector<I, N>]>,
    pub k_end: Box<[Vector<I, N>]>,
    /// `e^{c_n}`, `[chunks, value_heads, key_dim]`.
    pub ends: Box<[f32]>,
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn scores_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    table: &[u32],
    a_out: &mut [Vector<E, N>],
    t_out: &mut [Vector<E, N>],
    weighted: &mut Weighted<I, N>,
    sizes: &Sizes,
    #[comptime] b: Blueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let cube = CUBE_POS;
    if cube >= sizes.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let mut decay = Decay::new(b);
    let c = comptime!(b.chunk);
    // Summed in registers where gates are scalars, then tiles.
    let mut query_sums = Sums::new(comptime!(b.spread(c, c)));
    let mut key_sums = Sums::new(comptime!(b.spread(if b.delta { c } else { 0 }, c)));
    let (mut a, mut m) = (query_sums.whole(), key_sums.whole());
    if comptime!(b.gate == GateKind::Key) {
        fill::<f32>(&mut a, 0.0);
        fill::<f32>(&mut m, 0.0);
    } else {
        query_sums.clear();
        key_sums.clear();
    }
    decay.load(g, &place, sizes, b);

    let mut q_left = Tile::<E>::new(c, b.block, comptime!(b.operand_padding()));
    let mut k_left = Tile::<E>::new(comptime!(if b.delta { c } else { 1 }), b.block, comptime!(b.operand_padding()));
    let mut right = Tile::<E>::new(c, b.block, comptime!(b.operand_padding()));
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        let mut q_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        let mut k_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        q_flight.ask_keys(q, &place, sizes, k0);
        k_flight.ask_keys(k, &place, sizes, k0);
        decay.load_block(g, &place, sizes, k0, b);
        put_weighted::<I, E, N>(&q_flight, 1.0, &decay, &mut q_left, Role::Within, b);
        if comptime!(b.delta) {
            put_weighted::<I, E, N>(&k_flight, 1.0, &decay, &mut k_left, Role::Within, b);
        }
        if comptime!(b.gate == GateKind::Key) {
            // Pairs within sub-blocks are products too if gates are mild.
            let mild = if comptime!(b.inverts) { decay.mild(b) } else { false.runtime() };
            #[unroll]
            for later in comptime!(if b.inverts { 0 } else { 1 })..comptime!(b.segments()) {
                sync_cube();
                put_weighted::<I, E, N>(&k_flight, 1.0, &decay, &mut right, comptime!(Role::Toward(later)), b);
                sync_cube();
                let row = comptime!(later * BLOCK).runtime();
                let corner = Corner { a_row: row, a_col: 0usize, b_row: 0usize, out_row: row };
                if mild {
                    let form = comptime!(Form::abt(BLOCK, (later + 1) * BLOCK, b.block, Mode::Add));
                    product_at::<E, E>(&q_left, &right, &mut a, &corner, form, b.units, b.engine);
                    if comptime!(b.delta) {
                        product_at::<E, E>(&k_left, &right, &mut m, &corner, form, b.units, b.engine);
                    }
                } else if comptime!(later > 0) {
                    let form = comptime!(Form::abt(BLOCK, later * BLOCK, b.block, Mode::Add));
                    product_at::<E, E>(&q_left, &right, &mut a, &corner, form, b.units, b.engine);
                    if comptime!(b.delta) {
                        product_at::<E, E>(&k_left, &right, &mut m, &corner, form, b.units, b.engine);
                    }
                }
            }
            sync_cube();
            weigh_rows::<I, N>(
                &q_flight,
                &place,
                sizes,
                k0,
                sizes.scale,
                &decay,
                &mut weighted.q_start,
                Role::FromStart,
                b,
            );
            if comptime!(b.delta) {
                weigh_rows::<I, N>(
                    &k_flight,
                    &place,
                    sizes,
                    k0,
                    1.0,
                    &decay,
                    &mut weighted.k_start,
                    Role::FromStart,
                    b,
                );
            }
            weigh_rows::<I, N>(&k_flight, &place, sizes, k0, 1.0, &decay, &mut weighted.k_end, Role::ToEnd, b);
            for i in range_stepped(unit(), b.block, units()) {
                if k0 + i < sizes.key_dim {
                    weighted.ends[place.ends(sizes) + k0 + i] = decay.end(i, b);
                }
            }
            if !mild {
                sync_cube();
                decay.factors(g, &place, sizes, k0, b);
                q_flight.put_all::<E>(&mut q_left);
                k_flight.put_all::<E>(&mut right);
                sync_cube();
                pairs::<E>(&q_left, &right, &decay, &mut a, &mut m, b);
            }
        } else {
            k_flight.put_all::<E>(&mut right);
            sync_cube();
            let form = comptime!(Form::abt(b.chunk, b.chunk, b.block, Mode::Add));
            query_sums.product::<E, E>(&q_left, &right, form);
            if comptime!(b.delta) {
                key_sums.product::<E, E>(&k_left, &right, form);
            }
        }
        sync_cube();
    }
    if comptime!(b.gate != GateKind::Key) {
        query_sums.put::<f32>(&mut a);
        if comptime!(b.delta) {
            key_sums.put::<f32>(&mut m);
        }
        sync_cube();
        decay.multiply_lower(&mut a, &mut m, b);
        sync_cube();
    } else if comptime!(b.inverts) {
        // What is above the diagonal of sub-blocks.
        decay.multiply_lower(&mut a, &mut m, b);
        sync_cube();
    }

    let place = Place::of(this_cube(), sizes, table, b);
    let out = place.scores(sizes, b);
    store_scores::<E, N>(&a, a_out, out, sizes.scale, b);
    if comptime!(b.delta) {
        // `L = M Diag(beta)`, then its inverse in the place of `A`.
        let (at, stride) = place.scalars(sizes);
        for i in range_stepped(unit(), comptime!(c * c), units()) {
            let (row, col) = (i / c, i % c);
            let mut value = f32::new(0.0);
            if col < place.rows {
                value = m.get(row, col) * beta[at + col * stride];
            }
            m.set(row, col, value);
        }
        sync_cube();
        fill::<f32>(&mut a, 0.0);
        sync_cube();
        invert(&m, &mut a, b);
        store_scores::<E, N>(&a, t_out, out, 1.0, b);
    }
}

/// Writes a block of queries or keys times their weight in a role.
#[cube]
fn weigh_rows<I: Float, N: Size>(
    x: &Flight<I, N>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    factor: f32,
    decay: &Decay,
    out: &mut [Vector<I, N>],
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    let n = N::value().comptime();
    let to = place.key_gates(sizes);
    #[unroll]
    for j in 0..x.vectors() {
        let (row, k) = x.place(j);
        if row < place.rows && k0 + k < sizes.key_dim {
            let values = Vector::<f32, N>::cast_from(x.vector(j));
            let weights = decay.weights::<N>(row, k, role, b) * Vector::new(factor);
            out[(to.0 + row * to.1 + k0 + k) / n] = Vector::<I, N>::cast_from(values * weights);
        }
    }
}

/// Adds the pairs within sub-blocks, over one block of key features. Units take a token `j` and a share of the features
/// each; the shares are added in turn. The units of a plane, at neighbouring `j`, read the same rows `i`.
#[cube]
fn pairs<E: Float>(
    q: &Tile<E>,
    k: &Tile<E>,
    decay: &Decay,
    a: &mut Tile<f32>,
    m: &mut Tile<f32>,
    #[comptime] b: Blueprint,
) {
    // The units of a cube are a multiple of the tokens of a chunk.
    let shares = comptime!((b.units / b.chunk).min(b.block));
    let (j, share) = (unit() % b.chunk, unit() / b.chunk);
    let first = (j / BLOCK) * BLOCK;
    let mut sum_q = Array::<f32>::new(BLOCK);
    let mut sum_k = Array::<f32>::new(BLOCK);
    #[unroll]
    for i in 0..BLOCK {
        sum_q[i] = f32::new(0.0);
        sum_k[i] = f32::new(0.0);
    }
    if share < shares {
        for d in range_stepped(share, b.block, shares) {
            // `k_j` decayed to the row.
            let mut key = k.get(j, d);
            #[unroll]
            for i in 0..BLOCK {
                let row = first + i;
                if row > j {
                    key *= decay.factor(row, d);
                }
                if row >= j {
                    sum_q[i] += key * q.get(row, d);
                    if comptime!(b.delta) {
                        sum_k[i] += key * k.get(row, d);
                    }
                }
            }
        }
    }
    for turn in 0..shares {
        if share == turn {
            #[unroll]
            for i in 0..BLOCK {
                let row = first + i;
                if row >= j {
                    a.set(row, j, a.get(row, j) + sum_q[i]);
                }
                if comptime!(b.delta) {
                    if row > j {
                        m.set(row, j, m.get(row, j) + sum_k[i]);
                    }
                }
            }
        }
        sync_cube();
    }
}

/// `t = (I + l)^-1` for strictly lower-triangular `l`; `t` is zero before. Synchronises.
#[cube]
fn invert(l: &Tile<f32>, t: &mut Tile<f32>, #[comptime] b: Blueprint) {
    // The sub-blocks on the diagonal, a column per unit.
    for j in range_stepped(unit(), b.chunk, units()) {
        let first = (j / BLOCK) * BLOCK;
        let mut x = Array::<f32>::new(BLOCK);
        #[unroll]
        for i in 0..BLOCK {
            let mut sum = f32::new(0.0);
            #[unroll]
            for earlier in 0..i {
                sum += l.get(first + i, first + earlier) * x[earlier];
            }
            x[i] = -sum;
            if first + i < j {
                x[i] = f32::new(0.0);
            }
            if first + i == j {
                x[i] = f32::new(1.0);
            }
            t.set(first + i, j, x[i]);
        }
    }
    sync_cube();
    // Two solved blocks side by side make one of twice the size: below the diagonal `-T_11 (L_10 T_00)`.
    let side = comptime!((b.chunk / 2).max(1));
    let mut w = Tile::<f32>::new(side, side, comptime!(b.padding()));
    #[unroll]
    for level in 0..comptime!(b.segments().ilog2()) {
        let half = comptime!(BLOCK << level);
        let columns = comptime!(half / COLUMNS);
        let items = comptime!(b.chunk / 2 * columns);
        for item in range_stepped(unit(), items, units()) {
            let (row, col) = (item / columns, item % columns * COLUMNS);
            let first = row / half * (2 * half);
            let mut sum = Vector::<f32, Const<COLUMNS>>::new(f32::new(0.0));
            for k in 0..half {
                let factor = l.get(first + half + row % half, first + k);
                sum += Vector::new(factor) * t.get_many::<Const<COLUMNS>>(first + k, first + col);
            }
            // The blocks of a level lie below each other, so that they fit.
            w.set_many::<f32, Const<COLUMNS>>(row, col, sum);
        }
        sync_cube();
        for item in range_stepped(unit(), items, units()) {
            let (row, col) = (item / columns, item % columns * COLUMNS);
            let (block, first) = (row / half * half, row / half * (2 * half));
            let mut sum = Vector::<f32, Const<COLUMNS>>::new(f32::new(0.0));
            for k in 0..half {
                let factor = -t.get(first + half + row % half, first + half + k);
                sum += Vector::new(factor) * w.get_many::<Const<COLUMNS>>(block + k, col);
            }
            t.set_many::<f32, Const<COLUMNS>>(first + half + row % half, first + col, sum);
        }
        sync_cube();
    }
}

/// Columns of a product that a unit computes at a time.
const COLUMNS: usize = 4;
