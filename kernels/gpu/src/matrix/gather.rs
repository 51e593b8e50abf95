//! What follows from the gradients by role, by token and key feature and summed over the features.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::chunk_backward::{ByToken, Pairs, Roles};
use crate::tile::{Engine, Tile, unit};

/// A term by token and key feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Wanted {
    Dq,
    Dk,
    /// The gradient of keys that only read.
    Dreads,
    /// Terms of `dbeta`.
    Dbeta,
    /// The gradient of `c`.
    Dc,
    /// What goes to the gates after the token.
    Ending,
}

type Pair = Const<2>;
type Single = Const<1>;

/// Everything of a token and `N` features from which terms are made.
#[derive(CubeType)]
struct Terms<N: Size> {
    query: Vector<f32, N>,
    key: Vector<f32, N>,
    q_left: Vector<f32, N>,
    k_left: Vector<f32, N>,
    /// In its place, of keys that only read.
    read_left: Vector<f32, N>,
    k_right: Vector<f32, N>,
    k_end: Vector<f32, N>,
    beta: Vector<f32, N>,
    apart: Apart<N>,
}

/// What pairs give that do not meet the decay: a query, with respect to `beta k` on the right, a key that only reads.
#[derive(CubeType)]
struct Apart<N: Size> {
    query: Vector<f32, N>,
    right: Vector<f32, N>,
    read: Vector<f32, N>,
}

#[cube]
impl<N: Size> Apart<N> {
    /// Of a token and `N` features.
    fn of<E: Float>(pairs: &Pairs<E>, tokens: &ByToken, row: usize, d: usize, #[comptime] b: Blueprint) -> Self {
        let (diagonal, beta) = (Vector::new(tokens.diagonal[row]), Vector::new(tokens.beta[row]));
        let mut query = diagonal * beta * pairs.keys.get_many::<N>(row, d);
        let mut right = diagonal * pairs.queries.get_many::<N>(row, d);
        let mut read = Vector::<f32, N>::new(f32::new(0.0));
        if comptime!(b.low_rank) {
            if row % 2 == 1 {
                query += tokens.near::<N>(0usize, row, b) * pairs.keys.get_many::<N>(row - 1, d);
                if row + 1 < b.chunk {
                    right += tokens.near::<N>(1usize, row + 1, b) * pairs.other.get_many::<N>(row + 1, d);
                }
            } else {
                right += tokens.near::<N>(0usize, row + 1, b) * pairs.queries.get_many::<N>(row + 1, d);
                if row + 2 < b.chunk {
                    right += tokens.near::<N>(2usize, row + 2, b) * pairs.other.get_many::<N>(row + 2, d);
                }
                if row > 0 {
                    read = tokens.near::<N>(1usize, row, b) * pairs.keys.get_many::<N>(row - 1, d);
                    read += tokens.near::<N>(2usize, row, b) * pairs.keys.get_many::<N>(row - 2, d);
                }
            }
        }
        Apart::<N> { query, right, read }
    }
}

#[cube]
impl<N: Size> Terms<N> {
    fn get(&self, #[comptime] wanted: Wanted) -> Vector<f32, N> {
        // With respect to `beta k`.
        let stepped = self.k_right + self.k_end + self.apart.right;
        match comptime!(wanted) {
            Wanted::Dq => self.q_left + self.apart.query,
            Wanted::Dk => self.beta * stepped + self.k_left,
            Wanted::Dreads => self.read_left + self.apart.read,
            Wanted::Dbeta => self.key * stepped,
            Wanted::Dc => self.query * self.q_left - self.beta * self.key * self.k_right + self.key * self.k_left,
            Wanted::Ending => self.beta * self.key * self.k_end,
        }
    }
}

/// Of the `i`-th pair of a unit, on [`Engine::Mma`].
#[cube]
fn pair_terms<E: Float>(
    pairs: &Pairs<E>,
    roles: &Roles,
    tokens: &ByToken,
    #[comptime] i: usize,
    #[comptime] b: Blueprint,
) -> Terms<Pair> {
    let (row, d) = roles.q_left.place(unit(), comptime!(2 * i));
    Terms::<Pair> {
        query: pairs.queries.get_many::<Const<2>>(row, d),
        key: pairs.keys.get_many::<Const<2>>(row, d),
        q_left: roles.q_left.pair(i),
        k_left: if comptime!(b.delta && !b.low_rank) { roles.k_left.pair(i) } else { Vector::new(f32::new(0.0)) },
        read_left: if comptime!(b.low_rank) { roles.k_left.pair(i) } else { Vector::new(f32::new(0.0)) },
        k_right: roles.k_right.pair(i),
        k_end: roles.k_end.pair(i),
        beta: Vector::new(tokens.beta[row]),
        apart: Apart::of::<E>(pairs, tokens, row, d, b),
    }
}

/// Of the `j`-th element of a unit, which is at `place`.
#[cube]
fn single_terms<E: Float>(
    pairs: &Pairs<E>,
    roles: &Roles,
    tokens: &ByToken,
    place: (usize, usize),
    #[comptime] j: usize,
    #[comptime] b: Blueprint,
) -> Terms<Single> {
    let (row, d) = place;
    let (mut k_left, mut read_left) = (f32::new(0.0), f32::new(0.0));
    if comptime!(b.low_rank) {
        read_left = roles.k_left.get(place, j);
    } else if comptime!(b.delta) {
        k_left = roles.k_left.get(place, j);
    }
    Terms::<Single> {
        query: Vector::new(pairs.queries.get(row, d)),
        key: Vector::new(pairs.keys.get(row, d)),
        q_left: Vector::new(roles.q_left.get(place, j)),
        k_left: Vector::new(k_left),
        read_left: Vector::new(read_left),
        k_right: Vector::new(roles.k_right.get(place, j)),
        k_end: Vector::new(roles.k_end.get(place, j)),
        beta: Vector::new(tokens.beta[row]),
        apart: Apart::of::<E>(pairs, tokens, row, d, b),
    }
}

/// Terms in a tile, with plain queries and keys in `pairs`. Synchronises before and after.
#[cube]
pub(super) fn gather<E: Float>(
    pairs: &Pairs<E>,
    roles: &Roles,
    tokens: &ByToken,
    out: &mut Tile<f32>,
    #[comptime] wanted: Wanted,
    #[comptime] b: Blueprint,
) {
    sync_cube();
    let (unit, len) = (unit(), comptime!(roles.q_left.spread.len()));
    if comptime!(b.engine == Engine::Mma) {
        comptime!(assert!(roles.q_left.spread.even(), "each unit has as many elements of a role"));
        #[unroll]
        for i in 0..comptime!(len / 2) {
            let (row, d) = roles.q_left.place(unit, comptime!(2 * i));
            let terms = pair_terms::<E>(pairs, roles, tokens, i, b);
            out.set_many::<f32, Const<2>>(row, d, terms.get(wanted));
        }
    } else {
        #[unroll]
        for j in 0..len {
            if roles.q_left.has(unit, j) {
                let place = roles.q_left.place(unit, j);
                let terms = single_terms::<E>(pairs, roles, tokens, place, j, b);
                out.set(place.0, place.1, terms.get(wanted).extract(0usize));
            }
        }
    }
    sync_cube();
}

/// Adds to the gradient of `c` in a tile what keys give that read before their token's decay: to the token before, and the
/// first one's to none of the chunk. Synchronises after.
#[cube]
pub(super) fn add_reads<E: Float>(pairs: &Pairs<E>, roles: &Roles, out: &mut Tile<f32>) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(roles.k_left.spread.len()) {
        if roles.k_left.has(unit, j) {
            let place = roles.k_left.place(unit, j);
            let (row, d) = place;
            if row > 0 {
                let term = pairs.other.get(row, d) * roles.k_left.get(place, j);
                out.set(row - 1, d, out.get(row - 1, d) + term);
            }
        }
    }
    sync_cube();
}

/// Adds to a token's sums what the features of a block give: by unit, shares of `dbeta`, and under a gate per head of the
/// gradient of `c` and of what goes to later gates.
#[cube]
pub(super) fn sum_features<E: Float>(
    pairs: &Pairs<E>,
    roles: &Roles,
    tokens: &mut ByToken,
    scratch: &mut Tile<f32>,
    #[comptime] b: Blueprint,
) {
    let head = comptime!(b.gate == GateKind::HEAD);
    if comptime!(b.engine == Engine::Mma) {
        if comptime!(b.steps() || head) {
            sum_in_registers::<E>(pairs, roles, tokens, b);
        }
    } else {
        if comptime!(b.steps()) {
            gather::<E>(pairs, roles, &*tokens, scratch, Wanted::Dbeta, b);
            tokens.d_beta[unit()] += sum_row(&*scratch, b);
        }
        if comptime!(head) {
            gather::<E>(pairs, roles, &*tokens, scratch, Wanted::Dc, b);
            tokens.dc[unit()] += sum_row(&*scratch, b);
            gather::<E>(pairs, roles, &*tokens, scratch, Wanted::Ending, b);
            tokens.ending[unit()] += sum_row(&*scratch, b);
        }
    }
    if comptime!(head) {
        if unit() < b.block {
            tokens.total[unit()] += tokens.carry[unit()];
        }
    }
}

/// This unit's share of the sum of a row: unit `i + share * chunk` has row `i`.
#[cube]
fn sum_row(tile: &Tile<f32>, #[comptime] b: Blueprint) -> f32 {
    let mut sum = f32::new(0.0);
    for k in range_stepped(unit() / b.chunk, tile.cols, comptime!(ByToken::shares(b))) {
        sum += tile.get(unit() % b.chunk, k);
    }
    sum
}

/// On [`Engine::Mma`] a row of a block lies in four units, and there are as many shares of a token as blocks side by side.
#[cube]
fn sum_in_registers<E: Float>(pairs: &Pairs<E>, roles: &Roles, tokens: &mut ByToken, #[comptime] b: Blueprint) {
    let of = &roles.q_left;
    let mut d_beta = Array::<f32>::new(comptime!(of.spread.parts() * 2));
    let mut dc = Array::<f32>::new(comptime!(of.spread.parts() * 2));
    let mut ending = Array::<f32>::new(comptime!(of.spread.parts() * 2));
    #[unroll]
    for row in 0..of.rows() {
        d_beta[row] = f32::new(0.0);
        dc[row] = f32::new(0.0);
        ending[row] = f32::new(0.0);
    }
    #[unroll]
    for i in 0..comptime!(of.spread.len() / 2) {
        let terms = pair_terms::<E>(pairs, roles, &*tokens, i, b);
        let row = of.row_of(i);
        if comptime!(b.steps()) {
            let pair = terms.get(Wanted::Dbeta);
            d_beta[row] += pair.extract(0usize) + pair.extract(1usize);
        }
        if comptime!(b.gate == GateKind::HEAD) {
            let (pair, last) = (terms.get(Wanted::Dc), terms.get(Wanted::Ending));
            dc[row] += pair.extract(0usize) + pair.extract(1usize);
            ending[row] += last.extract(0usize) + last.extract(1usize);
        }
    }
    #[unroll]
    for n in 0..of.rows() {
        let (row, col) = of.first_of_row(unit(), n);
        let at = col / comptime!(of.spread.cols / of.spread.across()) * b.chunk + row;
        let first = unit() % 4 < 1;
        if comptime!(b.steps()) {
            let sum = of.over_row(d_beta[n]);
            if first {
                tokens.d_beta[at] += sum;
            }
        }
        if comptime!(b.gate == GateKind::HEAD) {
            let (sum, last) = (of.over_row(dc[n]), of.over_row(ending[n]));
            if first {
                tokens.dc[at] += sum;
                tokens.ending[at] += last;
            }
        }
    }
}
