//! What the gradients of the scores give the tokens on either side.

use cubecl::prelude::*;

use super::super::tile::Tile;
use super::super::tile::{BLOCK, Corner, Form, Mode, product, product_at, unit, units};
use super::blueprint::Blueprint;
use super::chunk_backward::{ByToken, Operands, Pairs, Roles};
use super::decay::{Decay, Role, load_keys};
use super::place::{Place, Sizes};
use super::transfer::read;

/// Adds the pairs, whose decay is in `p` and `r` already. Synchronises.
#[cube]
pub(crate) fn scalar_pairs<I: Float, E: Float, N: Size>(
    x: &Operands<I, E, N>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    decay: &Decay,
    pairs: &mut Pairs<E>,
    roles: &mut Roles,
    tokens: &ByToken,
    #[comptime] b: Blueprint,
) {
    let at = place.keys(sizes);
    let (left, right) =
        comptime!((Form::ab(b.chunk, b.block, b.chunk, Mode::Add), Form::atb(b.chunk, b.block, b.chunk, Mode::Add)));
    load_stepped::<I, E, N>(&x.k, place, sizes, k0, decay, tokens, &mut pairs.one, Role::Plain, b);
    load_keys::<I, E, N>(&x.q, at, place.rows, k0, sizes.key_dim, 1.0, decay, &mut pairs.two, Role::Plain, b);
    sync_cube();
    product::<E>(&pairs.p, &pairs.one, &mut roles.q_left, left, b.units, b.engine);
    product::<E>(&pairs.p, &pairs.two, &mut roles.k_right, right, b.units, b.engine);
    if comptime!(b.delta) {
        product::<E>(&pairs.r, &pairs.one, &mut roles.k_left, left, b.units, b.engine);
        sync_cube();
        load_keys::<I, E, N>(&x.k, at, place.rows, k0, sizes.key_dim, 1.0, decay, &mut pairs.one, Role::Plain, b);
        sync_cube();
        product::<E>(&pairs.r, &pairs.one, &mut roles.k_right, right, b.units, b.engine);
    }
    sync_cube();
}

/// Fills a tile with `beta k`, weighted.
#[cube]
fn load_stepped<I: Float, E: Float, N: Size>(
    k: &[Vector<I, N>],
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    decay: &Decay,
    tokens: &ByToken,
    tile: &mut Tile<E>,
    #[comptime] role: Role,
    #[comptime] b: Blueprint,
) {
    let n = N::value().comptime();
    let at = place.keys(sizes);
    let cols = comptime!(b.block / n);
    for i in range_stepped(unit(), comptime!(b.chunk * cols), units()) {
        let (row, col) = (i / cols, i % cols * n);
        let values = Vector::<f32, N>::cast_from(read::<I, N>(k, at, place.rows, row, k0 + col, sizes.key_dim));
        let weights = decay.weights::<N>(row, col, role, b) * Vector::new(tokens.beta[row]);
        tile.set_many::<f32, N>(row, col, values * weights);
    }
}

/// Adds the pairs under a key-wise gate: those of a later and an earlier sub-block as products that are split at the start
/// of the later one, those within a sub-block one by one. Synchronises.
#[cube]
pub(crate) fn key_pairs<I: Float, E: Float, N: Size>(
    x: &Operands<I, E, N>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    decay: &mut Decay,
    pairs: &mut Pairs<E>,
    roles: &mut Roles,
    tokens: &ByToken,
    #[comptime] b: Blueprint,
) {
    let at = place.keys(sizes);
    #[unroll]
    for later in 1..comptime!(b.segments()) {
        let (toward, n) = comptime!((Role::Toward(later), later * BLOCK));
        let row = comptime!(later * BLOCK).runtime();
        let left = comptime!(Form::ab(BLOCK, b.block, n, Mode::Set));
        let right = comptime!(Form::atb(n, b.block, BLOCK, Mode::Set));
        // Left: of the later sub-block's queries and keys, in the first rows of the scratch.
        decay.prepare(&x.g, place, sizes, k0, toward, b);
        load_stepped::<I, E, N>(&x.k, place, sizes, k0, &*decay, tokens, &mut pairs.one, toward, b);
        sync_cube();
        let corner = Corner { a_row: row, a_col: 0usize, b_row: 0usize, out_row: 0usize };
        product_at::<E, E>(&pairs.p, &pairs.one, &mut pairs.square, &corner, left, b.units, b.engine);
        if comptime!(b.delta) {
            let corner = Corner { a_row: row, a_col: 0usize, b_row: 0usize, out_row: comptime!(BLOCK).runtime() };
            product_at::<E, E>(&pairs.r, &pairs.one, &mut pairs.square, &corner, left, b.units, b.engine);
        }
        sync_cube();
        decay.prepare(&x.g, place, sizes, k0, Role::Within, b);
        for i in range_stepped(unit(), comptime!(BLOCK * b.block), units()) {
            let (i, k) = (i / b.block, i % b.block);
            let weight = decay.weight(row + i, k, Role::Within, b);
            roles.q_left.set(row + i, k, roles.q_left.get(row + i, k) + weight * pairs.square.get(i, k));
            if comptime!(b.delta) {
                roles.k_left.set(row + i, k, roles.k_left.get(row + i, k) + weight * pairs.square.get(BLOCK + i, k));
            }
        }
        load_keys::<I, E, N>(&x.q, at, place.rows, k0, sizes.key_dim, 1.0, &*decay, &mut pairs.two, Role::Within, b);
        if comptime!(b.delta) {
            load_keys::<I, E, N>(
                &x.k,
                at,
                place.rows,
                k0,
                sizes.key_dim,
                1.0,
                &*decay,
                &mut pairs.one,
                Role::Within,
                b,
            );
        }
        sync_cube();
        // Right: of the earlier keys.
        let corner = Corner { a_row: row, a_col: 0usize, b_row: row, out_row: 0usize };
        product_at::<E, E>(&pairs.p, &pairs.two, &mut pairs.square, &corner, right, b.units, b.engine);
        if comptime!(b.delta) {
            sync_cube();
            let add = comptime!(Form { mode: Mode::Add, ..right });
            product_at::<E, E>(&pairs.r, &pairs.one, &mut pairs.square, &corner, add, b.units, b.engine);
        }
        sync_cube();
        decay.prepare(&x.g, place, sizes, k0, toward, b);
        for i in range_stepped(unit(), comptime!(n * b.block), units()) {
            let (j, k) = (i / b.block, i % b.block);
            let value = decay.weight(j, k, toward, b) * pairs.square.get(j, k);
            roles.k_right.set(j, k, roles.k_right.get(j, k) + value);
        }
        sync_cube();
    }
    decay.factors(&x.g, place, sizes, k0, b);
    load_keys::<I, E, N>(&x.k, at, place.rows, k0, sizes.key_dim, 1.0, &*decay, &mut pairs.one, Role::Plain, b);
    load_keys::<I, E, N>(&x.q, at, place.rows, k0, sizes.key_dim, 1.0, &*decay, &mut pairs.two, Role::Plain, b);
    sync_cube();
    within_segments::<E>(&*decay, &*pairs, roles, tokens, b);
    sync_cube();
}

/// Pairs within sub-blocks, the keys in `pairs.one` and the queries in `pairs.two`.
#[cube]
fn within_segments<E: Float>(
    decay: &Decay,
    pairs: &Pairs<E>,
    roles: &mut Roles,
    tokens: &ByToken,
    #[comptime] b: Blueprint,
) {
    for item in range_stepped(unit(), comptime!(b.chunk * b.block), units()) {
        let (t, d) = (item / b.block, item % b.block);
        let first = (t / BLOCK) * BLOCK;
        // The token on the left, with those before it.
        let (mut q_left, mut k_left, mut weight) = (f32::new(0.0), f32::new(0.0), f32::new(1.0));
        for back in 1..t - first + 1 {
            let j = t - back;
            weight *= decay.factor(j + 1, d);
            let key = pairs.one.get(j, d) * tokens.beta[j] * weight;
            q_left += pairs.p.get(t, j) * key;
            if comptime!(b.delta) {
                k_left += pairs.r.get(t, j) * key;
            }
        }
        roles.q_left.set(t, d, roles.q_left.get(t, d) + q_left);
        if comptime!(b.delta) {
            roles.k_left.set(t, d, roles.k_left.get(t, d) + k_left);
        }
        // The token on the right, with those after it.
        let (mut right, mut weight) = (f32::new(0.0), f32::new(1.0));
        for i in t + 1..first + BLOCK {
            weight *= decay.factor(i, d);
            let mut value = pairs.p.get(i, t) * pairs.two.get(i, d);
            if comptime!(b.delta) {
                value += pairs.r.get(i, t) * pairs.one.get(i, d);
            }
            right += value * weight;
        }
        roles.k_right.set(t, d, roles.k_right.get(t, d) + right);
    }
}
