//! Stage 1, all chunks at once: the scores of the queries, and for the delta rule the inverse of its system.
//!
//! ```text
//! A_ij = scale sum_d q_i[d] k_j[d] e^{c_i[d] - c_j[d]}   (i >= j)
//! M_ij =       sum_d k_i[d] k_j[d] e^{c_i[d] - c_j[d]}   (i >  j)      T = (I + M Diag(beta))^-1
//! ```
//! With [low-rank writes](super::low_rank) `M` has `r_i e^{c_{i-1} - c_j}` in the place of `k_i`, the keys that only read.
//! One cube computes one chunk of one head. With key-wise gates the exponential sits inside the sum: between sub-blocks of
//! 16 tokens it is split at the start of the later one, so that both factors are at most 1 and a product remains; inside
//! a sub-block the pairs are summed one by one, a key decaying from row to row. `T` is found as [`super::inverse`] says.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, put_weighted, step_size};
use super::inverse::invert;
use super::lower::{Between, multiply_lower, weigh_lower};
use super::place::{Place, Sizes};
use super::transfer::{ask_keys, reading_keys, store_scores, store_square};
use crate::tile::{BLOCK, Corner, Form, Mode, Sums, Tile, product_at, this_cube, unit, units, zero};
use crate::transfer::Flight;

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
    reads: &[Vector<I, N>],
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
    if cube >= sizes.cut.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let mut decay = Decay::new(b);
    let c = comptime!(b.chunk);
    // Summed in registers where gates are scalars, then tiles.
    let mut query_sums = Sums::new(comptime!(b.spread(c, c)));
    let mut key_sums = Sums::new(comptime!(b.spread(if b.delta { c } else { 0 }, c)));
    let weighs = comptime!(b.weighs_scores());
    let (mut a, mut m) = (query_sums.whole(b.delta || !weighs), key_sums.whole(b.delta));
    if comptime!(b.gate == GateKind::KEY) {
        zero(&mut a, b.units);
        zero(&mut m, b.units);
    } else {
        query_sums.clear();
        key_sums.clear();
    }
    let mut steps = Shared::<[f32]>::new_slice(c);
    if comptime!(b.delta) {
        if unit() < c {
            steps[unit()] = step_size(beta, &place, sizes);
        }
    }
    decay.load(g, &place, sizes, b);
    let mut between = Between::new(true, b);
    between.load(&decay, b);

    let mut q_left = Tile::<E>::new(c, b.block, comptime!(b.operand_padding()));
    let weighted_keys = comptime!(b.delta && b.gate == GateKind::KEY);
    let mut k_left =
        Tile::<E>::new(comptime!(if weighted_keys { c } else { 1 }), b.block, comptime!(b.operand_padding()));
    let mut right = Tile::<E>::new(c, b.block, comptime!(b.operand_padding()));
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        let mut q_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        let mut k_flight = Flight::<I, N>::new(comptime!(b.shape(c, b.block)), true);
        ask_keys(&mut q_flight, q, &place, sizes, k0);
        ask_keys(&mut k_flight, k, &place, sizes, k0);
        let read_flight = reading_keys::<I, N>(reads, &k_flight, &place, sizes, k0, b);
        decay.load_block(g, &place, sizes, k0, b);
        if comptime!(b.gate == GateKind::KEY) {
            put_weighted::<I, E, N>(&q_flight, 1.0, &decay, &mut q_left, Role::Within, b);
            if comptime!(b.delta) {
                put_weighted::<I, E, N>(&read_flight, 1.0, &decay, &mut k_left, comptime!(b.reads_within()), b);
            }
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
                    &read_flight,
                    &place,
                    sizes,
                    k0,
                    1.0,
                    &decay,
                    &mut weighted.k_start,
                    comptime!(b.reads_from_start()),
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
                if comptime!(b.low_rank) {
                    read_flight.put_all::<E>(&mut k_left);
                }
                sync_cube();
                pairs::<E>(&q_left, &k_left, &right, &decay, &mut a, &mut m, b);
            }
        } else {
            // Both meet the decay in the sums.
            q_flight.put_all::<E>(&mut q_left);
            k_flight.put_all::<E>(&mut right);
            sync_cube();
            let form = comptime!(Form::abt(b.chunk, b.chunk, b.block, Mode::Add));
            query_sums.product::<E, E>(&q_left, &right, form);
            if comptime!(b.delta) {
                key_sums.product::<E, E>(&right, &right, form);
            }
        }
        sync_cube();
    }
    let place = Place::of(this_cube(), sizes, table, b);
    let out = place.scores(sizes, b);
    if comptime!(weighs) {
        let mut stage = if comptime!(b.block == c) {
            // Nothing reads it any more.
            q_left.alias()
        } else {
            Tile::<E>::new(c, c, comptime!(b.operand_padding()))
        };
        weigh_lower(&mut query_sums, sizes.scale, &mut key_sums, 1.0, &decay, &between, b);
        query_sums.put::<E>(&mut stage);
        if comptime!(b.delta) {
            take_steps(&mut key_sums, &steps);
            key_sums.put::<f32>(&mut m);
        }
        sync_cube();
        store_square::<E, N>(&stage, a_out, out, b);
    } else {
        if comptime!(b.gate != GateKind::KEY) {
            query_sums.put::<f32>(&mut a);
            if comptime!(b.delta) {
                key_sums.put::<f32>(&mut m);
            }
            sync_cube();
        }
        if comptime!(b.gate != GateKind::KEY || b.inverts) {
            // At least what is above the diagonal of sub-blocks.
            multiply_lower(&mut a, &mut m, &decay, b);
            sync_cube();
        }
        store_scores::<E, N>(&a, a_out, out, sizes.scale, b);
        if comptime!(b.delta) {
            // `L = M Diag(beta)`
            for i in range_stepped(unit(), comptime!(c * c), units()) {
                let (row, col) = (i / c, i % c);
                m.set(row, col, m.get(row, col) * steps[col]);
            }
            sync_cube();
        }
    }
    if comptime!(b.delta) {
        // In the place of `A`.
        invert(&m, &mut a, b);
        store_scores::<E, N>(&a, t_out, out, 1.0, b);
    }
}

/// `sums_ij *= beta_j`
#[cube]
fn take_steps(sums: &mut Sums, steps: &Shared<[f32]>) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(sums.spread.len()) {
        if sums.has(unit, j) {
            let place = sums.place(unit, j);
            sums.set(place, j, sums.get(place, j) * steps[place.1]);
        }
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

/// Adds the pairs within sub-blocks, over one block of key features, of plain tensors (`reads` with low-rank writes). Units take a token `j` and a share of the features
/// each; the shares are added in turn. The units of a plane, at neighbouring `j`, read the same rows `i`.
#[cube]
fn pairs<E: Float>(
    q: &Tile<E>,
    reads: &Tile<E>,
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
                    if comptime!(b.low_rank) {
                        sum_k[i] += key * reads.get(row, d);
                    }
                    key *= decay.factor(row, d);
                }
                if row >= j {
                    sum_q[i] += key * q.get(row, d);
                    if comptime!(b.delta && !b.low_rank) {
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
