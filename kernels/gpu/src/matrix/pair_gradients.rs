//! What the gradients of the scores give the tokens on either side.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::chunk_backward::{ByToken, Operands, Pairs, Roles};
use super::decay::{Decay, Role, put_weighted};
use super::place::{Place, Sizes};
use super::transfer::{ask_keys, reading_keys};
use crate::tile::{BLOCK, Corner, Form, Mode, Sums, Tile, unit};
use crate::transfer::Flight;

/// Adds the pairs, whose decay is in `p` and `r` already. Leaves plain queries and keys.
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
    let (left, right) =
        comptime!((Form::ab(b.chunk, b.block, b.chunk, Mode::Add), Form::atb(b.chunk, b.block, b.chunk, Mode::Add)));
    let both = Both::<I, N>::ask(x, place, sizes, k0, b);
    both.put_stepped::<E>(decay, tokens, &mut pairs.other, Role::Plain, b);
    both.put_plain::<E>(pairs);
    sync_cube();
    roles.q_left.product::<E, E>(&pairs.p, &pairs.other, left);
    roles.k_right.product::<E, E>(&pairs.p, &pairs.queries, right);
    if comptime!(b.delta) {
        roles.k_left.product::<E, E>(&pairs.r, &pairs.other, left);
        roles.k_right.settle();
        roles.k_right.product::<E, E>(&pairs.r, &pairs.keys, right);
    }
}

/// A block of queries and keys.
#[derive(CubeType)]
struct Both<I: Float, N: Size> {
    queries: Flight<I, N>,
    keys: Flight<I, N>,
}

#[cube]
impl<I: Float, N: Size> Both<I, N> {
    fn ask<E: Float>(x: &Operands<I, E, N>, place: &Place, sizes: &Sizes, k0: usize, #[comptime] b: Blueprint) -> Self {
        let shape = comptime!(b.shape(b.chunk, b.block));
        let (mut queries, mut keys) = (Flight::<I, N>::new(shape, true), Flight::<I, N>::new(shape, true));
        ask_keys(&mut queries, &x.q, place, sizes, k0);
        ask_keys(&mut keys, &x.k, place, sizes, k0);
        Both::<I, N> { queries, keys }
    }

    /// Fills the tiles of queries and keys as they are.
    fn put_plain<E: Float>(&self, pairs: &mut Pairs<E>) {
        self.queries.put_all::<E>(&mut pairs.queries);
        self.keys.put_all::<E>(&mut pairs.keys);
    }

    /// Fills a tile with `beta k`, weighted.
    fn put_stepped<E: Float>(
        &self,
        decay: &Decay,
        tokens: &ByToken,
        tile: &mut Tile<E>,
        #[comptime] role: Role,
        #[comptime] b: Blueprint,
    ) {
        #[unroll]
        for j in 0..self.keys.vectors() {
            if self.keys.has(j) {
                let (row, col) = self.keys.place(j);
                let weights = decay.weights::<N>(row, col, role, b) * Vector::new(tokens.beta[row]);
                tile.set_many::<f32, N>(row, col, Vector::<f32, N>::cast_from(self.keys.vector(j)) * weights);
            }
        }
    }
}

/// Adds the pairs under a key-wise gate: those of a later and an earlier sub-block as products that are split at the start
/// of the later one, those within a sub-block one by one. Leaves plain queries and keys, with low-rank writes in `other` the
/// keys that only read.
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
    // Left, of the later sub-block's queries and keys, not yet weighted; right, of the earlier keys, the same.
    let mut q_pairs = Sums::new(comptime!(roles.q_left.spread));
    let mut k_pairs = Sums::new(comptime!(roles.k_left.spread));
    let mut earlier = Sums::new(comptime!(roles.q_left.spread));
    q_pairs.clear();
    k_pairs.clear();
    let both = Both::<I, N>::ask(x, place, sizes, k0, b);
    // Pairs within sub-blocks are products too if gates are mild.
    let mild = if comptime!(b.inverts) { decay.mild(b) } else { false.runtime() };
    let reading = reading_keys::<I, N>(&x.reads, &both.keys, place, sizes, k0, b);
    put_weighted::<I, E, N>(&both.queries, 1.0, &*decay, &mut pairs.queries, Role::Within, b);
    put_weighted::<I, E, N>(&reading, 1.0, &*decay, &mut pairs.keys, comptime!(b.reads_within()), b);
    #[unroll]
    for later in comptime!(if b.inverts { 0 } else { 1 })..comptime!(b.segments()) {
        let toward = comptime!(Role::Toward(later));
        let row = comptime!(later * BLOCK).runtime();
        both.put_stepped::<E>(&*decay, tokens, &mut pairs.other, toward, b);
        sync_cube();
        if mild {
            let n = comptime!((later + 1) * BLOCK);
            left_pairs::<E>(&*pairs, &mut q_pairs, &mut k_pairs, row, n, b);
            right_pairs::<E>(&*pairs, &mut earlier, row, n, b);
        } else if comptime!(later > 0) {
            let n = comptime!(later * BLOCK);
            left_pairs::<E>(&*pairs, &mut q_pairs, &mut k_pairs, row, n, b);
            right_pairs::<E>(&*pairs, &mut earlier, row, n, b);
        }
        sync_cube();
        if mild {
            add_weighted(&earlier, &mut roles.k_right, &*decay, toward, comptime!((later + 1) * BLOCK), b);
        } else if comptime!(later > 0) {
            add_weighted(&earlier, &mut roles.k_right, &*decay, toward, comptime!(later * BLOCK), b);
        }
    }
    add_weighted(&q_pairs, &mut roles.q_left, &*decay, Role::Within, b.chunk, b);
    if comptime!(b.delta) {
        add_weighted(&k_pairs, &mut roles.k_left, &*decay, comptime!(b.reads_within()), b.chunk, b);
    }
    sync_cube();
    decay.factors(&x.g, place, sizes, k0, b);
    both.put_plain::<E>(pairs);
    if comptime!(b.low_rank) {
        // Read again: kept, they would take registers of all that is between.
        reading_keys::<I, N>(&x.reads, &both.keys, place, sizes, k0, b).put_all::<E>(&mut pairs.other);
    }
    sync_cube();
    if !mild {
        within_segments::<E>(&*decay, &*pairs, roles, tokens, b);
    }
}

/// Adds the pairs of the sub-block from `row` on, on the left, with the first `n` tokens.
#[cube]
fn left_pairs<E: Float>(
    pairs: &Pairs<E>,
    q_pairs: &mut Sums,
    k_pairs: &mut Sums,
    row: usize,
    #[comptime] n: usize,
    #[comptime] b: Blueprint,
) {
    let form = comptime!(Form::ab(BLOCK, b.block, n, Mode::Add));
    let corner = Corner { a_row: row, a_col: 0usize, b_row: 0usize, out_row: row };
    q_pairs.product_at::<E, E>(&pairs.p, &pairs.other, &corner, form);
    if comptime!(b.delta) {
        k_pairs.product_at::<E, E>(&pairs.r, &pairs.other, &corner, form);
    }
}

/// Sets the first `n` rows to the pairs of these tokens, on the right, with the sub-block from `row` on.
#[cube]
fn right_pairs<E: Float>(
    pairs: &Pairs<E>,
    earlier: &mut Sums,
    row: usize,
    #[comptime] n: usize,
    #[comptime] b: Blueprint,
) {
    let form = comptime!(Form::atb(n, b.block, BLOCK, Mode::Set));
    let corner = Corner { a_row: row, a_col: 0usize, b_row: row, out_row: 0usize };
    earlier.product_at::<E, E>(&pairs.p, &pairs.queries, &corner, form);
    if comptime!(b.delta) {
        earlier.settle();
        let add = comptime!(Form { mode: Mode::Add, ..form });
        earlier.product_at::<E, E>(&pairs.r, &pairs.keys, &corner, add);
    }
}

/// Adds the first `rows` rows, times their weight in a role.
#[cube]
fn add_weighted(
    from: &Sums,
    to: &mut Sums,
    decay: &Decay,
    #[comptime] role: Role,
    #[comptime] rows: usize,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(to.spread.len()) {
        if to.has(unit, j) {
            let place = to.place(unit, j);
            if place.0 < rows {
                let value = decay.weight(place.0, place.1, role, b) * from.get(place, j);
                to.set(place, j, to.get(place, j) + value);
            }
        }
    }
}

/// Pairs within sub-blocks.
#[cube]
fn within_segments<E: Float>(
    decay: &Decay,
    pairs: &Pairs<E>,
    roles: &mut Roles,
    tokens: &ByToken,
    #[comptime] b: Blueprint,
) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(roles.q_left.spread.len()) {
        if roles.q_left.has(unit, j) {
            let place = roles.q_left.place(unit, j);
            let (t, d) = place;
            let first = (t / BLOCK) * BLOCK;
            // The token on the left, with those before it.
            let (mut q_left, mut k_left, mut weight) = (f32::new(0.0), f32::new(0.0), f32::new(1.0));
            // The same without the token's own gate, for keys that read before it.
            let mut before = f32::new(1.0);
            for back in 1..t - first + 1 {
                let i = t - back;
                let gate = decay.factor(i + 1, d);
                weight *= gate;
                let key = pairs.keys.get(i, d) * tokens.beta[i];
                q_left += pairs.p.get(t, i) * (key * weight);
                if comptime!(b.low_rank) {
                    before *= select(back == 1, f32::new(1.0), gate);
                    k_left += pairs.r.get(t, i) * (key * before);
                } else if comptime!(b.delta) {
                    k_left += pairs.r.get(t, i) * (key * weight);
                }
            }
            roles.q_left.set(place, j, roles.q_left.get(place, j) + q_left);
            if comptime!(b.delta) {
                roles.k_left.set(place, j, roles.k_left.get(place, j) + k_left);
            }
            // The token on the right, with those after it.
            let (mut right, mut weight) = (f32::new(0.0), f32::new(1.0));
            for i in t + 1..first + BLOCK {
                if comptime!(b.low_rank) {
                    right += pairs.r.get(i, t) * pairs.other.get(i, d) * weight;
                }
                weight *= decay.factor(i, d);
                let mut value = pairs.p.get(i, t) * pairs.queries.get(i, d);
                if comptime!(b.delta && !b.low_rank) {
                    value += pairs.r.get(i, t) * pairs.keys.get(i, d);
                }
                right += value * weight;
            }
            roles.k_right.set(place, j, roles.k_right.get(place, j) + right);
        }
    }
}
