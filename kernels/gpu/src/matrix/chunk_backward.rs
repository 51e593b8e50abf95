//! Stages 1 and 3 reversed, all chunks at once: the gradients of what a chunk reads, from those of its outputs, of the
//! state that leaves it and (delta) of its values, `z`.
//!
//! ```text
//! P = scale do x^T (i >= j)    R = -z x^T (i > j)         u = Diag(beta) x
//! queries   left:  e^{c} (scale do S^T)  + P's pairs with beta k
//! keys      left:  e^{c} (-z S^T)        + R's pairs with beta k          (delta)
//! keys      right: P's pairs with q + R's pairs with k      end: e^{c_n - c} (x dS'^T)
//! dq = left     dk = beta (right + end) + left     dbeta = <k, right + end>
//! ```
//! With [low-rank writes](super::low_rank) the second row and R's pairs on the right are those of the keys that only read,
//! with `e^{c_{i-1}}` on the left, and `left` is their gradient in the place of a part of `dk`.
//!
//! One cube computes one chunk of one head, block by block of key features. A tensor meets the decay on the left, times
//! `e^{c_i}`, or on the right, times `e^{-c_j}`; so the gradient of `c` is `left (.) dleft - right (.) dright`, and `dg_t`
//! its sum from `t` on. Pairs with `i = j` do not meet the decay and are kept apart (with low-rank writes also the others
//! between which there is no gate), as is what a key leaves to the end of
//! the chunk (it goes to the gates after it, summed forwards): under strong gates either would drown the rest.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, weigh_sums};
use super::gather::{Wanted, add_reads, gather, sum_features};
use super::pair_gradients::{key_pairs, scalar_pairs};
use super::place::{Place, Sizes};
use super::transfer::{ask_scores, ask_state};
use crate::tile::{Form, Mode, Sums, Tile, this_cube, unit, units};
use crate::transfer::{Flight, store};

/// What the chunk reads.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Operands<I: Float, E: Float, N: Size> {
    pub q: Box<[Vector<I, N>]>,
    pub k: Box<[Vector<I, N>]>,
    /// Keys that only read.
    pub reads: Box<[Vector<I, N>]>,
    pub g: Box<[f32]>,
    pub beta: Box<[f32]>,
    /// `v` without the delta rule.
    pub x: Box<[Vector<I, N>]>,
    pub states: Box<[Vector<E, N>]>,
}

/// The gradients that leave it.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Gradients<O: Float, N: Size> {
    /// `[tokens, value_heads, key_dim]`.
    pub dq: Box<[Vector<O, N>]>,
    pub dk: Box<[Vector<O, N>]>,
    pub dreads: Box<[Vector<O, N>]>,
    /// `[tokens, value_heads]` or `[tokens, value_heads, key_dim]`.
    pub dg: Box<[f32]>,
    pub dbeta: Box<[f32]>,
}

/// Sums over key features, by token.
#[derive(CubeType)]
pub(crate) struct ByToken {
    /// `P_ii`.
    pub diagonal: Shared<[f32]>,
    /// With low-rank writes `P_{i, i-1}` of second tokens, then `R_{i, i-1}` and `R_{i, i-2}` of first ones.
    near: Shared<[f32]>,
    pub beta: Shared<[f32]>,
    /// By key feature of the block, the gradient of `c_n` that the state gives.
    pub carry: Shared<[f32]>,
    /// By unit, a share of a sum that several units make.
    pub shares: Shared<[f32]>,
    /// By unit, shares of a token's sums over all key features: `dbeta`, the gradient of `c_i`, and what the end of the
    /// chunk says of the gates after the token. In registers they would be there all the time.
    pub d_beta: Shared<[f32]>,
    pub dc: Shared<[f32]>,
    pub ending: Shared<[f32]>,
    /// Sums of `carry` over the blocks.
    pub total: Shared<[f32]>,
}

#[cube]
impl ByToken {
    /// The `n`-th of these of a token.
    pub fn near<N: Size>(&self, #[comptime] n: usize, row: usize, #[comptime] b: Blueprint) -> Vector<f32, N> {
        Vector::new(self.near[comptime!(n * b.chunk) + row])
    }

    /// Takes what does not meet the decay out of the pairs.
    fn keep_apart<E: Float>(&mut self, pairs: &mut Pairs<E>, #[comptime] b: Blueprint) {
        let c = comptime!(b.chunk);
        for i in range_stepped(unit(), c, units()) {
            self.diagonal[i] = pairs.p.get(i, i);
            pairs.p.set(i, i, 0.0);
            if comptime!(b.low_rank) {
                if i % 2 == 1 {
                    self.near[i] = pairs.p.get(i, i - 1);
                    pairs.p.set(i, i - 1, 0.0);
                } else if i > 0 {
                    self.near[c + i] = pairs.r.get(i, i - 1);
                    pairs.r.set(i, i - 1, 0.0);
                    self.near[2 * c + i] = pairs.r.get(i, i - 2);
                    pairs.r.set(i, i - 2, 0.0);
                }
            }
        }
    }
}

impl ByToken {
    /// Units of a token, each with a share of the key features. The units of a cube are a multiple of the tokens.
    pub fn shares(b: Blueprint) -> usize {
        b.units / b.chunk
    }
}

/// Gradients of the chunk's tensors for one block of key features, by role, `[chunk, block]`.
#[derive(CubeType)]
pub(crate) struct Roles {
    pub q_left: Sums,
    pub k_left: Sums,
    pub k_right: Sums,
    pub k_end: Sums,
}

/// The gradients of the pairs, as operands, and tiles of features.
#[derive(CubeType)]
pub(crate) struct Pairs<E: Float> {
    pub p: Tile<E>,
    pub r: Tile<E>,
    pub keys: Tile<E>,
    pub queries: Tile<E>,
    pub other: Tile<E>,
    pub state: Tile<E>,
    pub dstate: Tile<E>,
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn chunk_backward_kernel<I: Float, E: Float, O: Float, N: Size>(
    x: &Operands<I, E, N>,
    p: &[Vector<E, N>],
    r: &[Vector<E, N>],
    do_: &[Vector<I, N>],
    z: &[Vector<I, N>],
    dstates: &[Vector<E, N>],
    table: &[u32],
    out: &mut Gradients<O, N>,
    sizes: &Sizes,
    #[comptime] b: Blueprint,
    #[define(I, E, O)] _types: [ElemType; 3],
) {
    let cube = CUBE_POS;
    if cube >= sizes.cut.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let operand = comptime!(b.operand_padding());
    let (c, delta_rows) = comptime!((b.chunk, if b.delta { b.chunk } else { 1 }));
    let head = comptime!(b.gate == GateKind::HEAD);
    let mut decay = Decay::new(b);
    let mut pairs = Pairs::<E> {
        p: Tile::<E>::new(c, c, operand),
        r: Tile::<E>::new(delta_rows, c, operand),
        keys: Tile::<E>::new(c, b.block, operand),
        queries: Tile::<E>::new(c, b.block, operand),
        other: Tile::<E>::new(c, b.block, operand),
        state: Tile::<E>::new(b.block, b.block, operand),
        dstate: Tile::<E>::new(b.block, b.block, operand),
    };
    let mut roles = Roles {
        q_left: Sums::new(comptime!(b.spread(c, b.block))),
        k_left: Sums::new(comptime!(b.spread(if b.delta { c } else { 0 }, b.block))),
        k_right: Sums::new(comptime!(b.spread(c, b.block))),
        k_end: Sums::new(comptime!(b.spread(c, b.block))),
    };
    // Weights are not needed any more when this is.
    let mut scratch = if comptime!(b.gate == GateKind::KEY) {
        decay.after.alias()
    } else {
        Tile::<f32>::new(c, b.block, comptime!(b.padding()))
    };
    let mut tokens = ByToken {
        diagonal: Shared::new_slice(c),
        near: Shared::new_slice(comptime!(if b.low_rank { 3 * c } else { 1 })),
        beta: Shared::new_slice(c),
        carry: Shared::new_slice(b.block),
        shares: Shared::new_slice(b.units),
        d_beta: Shared::new_slice(comptime!(if b.steps() { b.units } else { 1 })),
        dc: Shared::new_slice(comptime!(if head { b.units } else { 1 })),
        ending: Shared::new_slice(comptime!(if head { b.units } else { 1 })),
        total: Shared::new_slice(comptime!(if head { b.block } else { 1 })),
    };
    if comptime!(b.steps()) {
        tokens.d_beta[unit()] = f32::new(0.0);
    }
    if comptime!(head) {
        tokens.dc[unit()] = f32::new(0.0);
        tokens.ending[unit()] = f32::new(0.0);
        if unit() < b.block {
            tokens.total[unit()] = f32::new(0.0);
        }
    }
    let (scalar_at, stride) = place.scalars(sizes);
    for i in range_stepped(unit(), c, units()) {
        let mut step = f32::new(1.0);
        if comptime!(b.delta) {
            step = 0.0;
            if i < place.rows {
                step = x.beta[scalar_at + i * stride];
            }
        }
        tokens.beta[i] = step;
    }
    decay.load_rows(&x.g, &place, sizes, b);
    let squares = place.scores(sizes, b);
    let mut p_flight = Flight::<E, N>::new(comptime!(b.shape(c, c)), true);
    let mut r_flight = Flight::<E, N>::new(comptime!(b.shape(c, c)), b.delta);
    ask_scores(&mut p_flight, p, squares, b);
    ask_scores(&mut r_flight, r, squares, b);
    p_flight.put_all::<E>(&mut pairs.p);
    r_flight.put_all::<E>(&mut pairs.r);
    sync_cube();
    tokens.keep_apart::<E>(&mut pairs, b);
    sync_cube();

    let to = place.key_gates(sizes);
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        decay.load_block(&x.g, &place, sizes, k0, b);
        through_state::<I, E, N>(
            x,
            do_,
            z,
            dstates,
            &place,
            sizes,
            k0,
            &mut decay,
            &mut pairs,
            &mut roles,
            &mut tokens,
            b,
        );
        if comptime!(b.gate == GateKind::KEY) {
            key_pairs::<I, E, N>(x, &place, sizes, k0, &mut decay, &mut pairs, &mut roles, &tokens, b);
        } else {
            scalar_pairs::<I, E, N>(x, &place, sizes, k0, &decay, &mut pairs, &mut roles, &tokens, b);
        }
        roles.q_left.settle();
        gather::<E>(&pairs, &roles, &tokens, &mut scratch, Wanted::Dq, b);
        store::<O, f32, N>(&scratch, &mut out.dq, to, place.rows, k0, sizes.key_dim, b.units);
        gather::<E>(&pairs, &roles, &tokens, &mut scratch, Wanted::Dk, b);
        store::<O, f32, N>(&scratch, &mut out.dk, to, place.rows, k0, sizes.key_dim, b.units);
        if comptime!(b.low_rank) {
            gather::<E>(&pairs, &roles, &tokens, &mut scratch, Wanted::Dreads, b);
            store::<O, f32, N>(&scratch, &mut out.dreads, to, place.rows, k0, sizes.key_dim, b.units);
        }
        sum_features::<E>(&pairs, &roles, &mut tokens, &mut scratch, b);
        if comptime!(b.gate == GateKind::KEY) {
            gather::<E>(&pairs, &roles, &tokens, &mut scratch, Wanted::Ending, b);
            sum_over_rows(&mut scratch, &mut tokens, false, b);
            // What was at the end of the chunk has been read; each unit reads what it sets.
            roles.k_end.take(&scratch, 0);
            gather::<E>(&pairs, &roles, &tokens, &mut scratch, Wanted::Dc, b);
            if comptime!(b.low_rank) {
                add_reads::<E>(&pairs, &roles, &mut scratch);
            }
            sum_over_rows(&mut scratch, &mut tokens, true, b);
            add(&roles.k_end, &mut scratch);
            sync_cube();
            for i in range_stepped(unit(), comptime!(c * b.block), units()) {
                let (row, d) = (i / b.block, i % b.block);
                if row < place.rows && k0 + d < sizes.key_dim {
                    out.dg[to.0 + row * to.1 + k0 + d] = scratch.get(row, d);
                }
            }
        }
        sync_cube();
    }
    let place = Place::of(this_cube(), sizes, table, b);
    let (scalar_at, stride) = place.scalars(sizes);
    if comptime!(b.steps()) {
        let d_beta = over_shares(&tokens.d_beta, b);
        if unit() < place.rows {
            out.dbeta[scalar_at + unit() * stride] = d_beta;
        }
    }
    if comptime!(head) {
        let (ending, dc) = (over_shares(&tokens.ending, b), over_shares(&tokens.dc, b));
        // Once more by token, as every unit reads all of them; the steps are not needed any more.
        let i = unit();
        if i < c {
            tokens.diagonal[i] = ending;
            tokens.beta[i] = dc;
        }
        sync_cube();
        if i < place.rows {
            let mut sum = f32::new(0.0);
            // From the last token on, as gates that are strong make the later terms the smaller ones.
            let mut later = f32::new(0.0);
            for k in 0..b.block {
                later += tokens.total[k];
            }
            for j in 0..c {
                let back = comptime!(c - 1).runtime() - j;
                sum += select(j < i, tokens.diagonal[j], f32::new(0.0));
                later += select(back >= i, tokens.beta[back], f32::new(0.0));
            }
            out.dg[scalar_at + i * stride] = sum + later;
        }
    }
}

/// The sum over the shares of token `unit()`, in order; of no use to units beyond the tokens.
#[cube]
fn over_shares(by_unit: &Shared<[f32]>, #[comptime] b: Blueprint) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for share in 0..comptime!(ByToken::shares(b)) {
        sum += by_unit[unit() % b.chunk + share * b.chunk];
    }
    sum
}

/// Sums of each column in place: of the rows before, or if `back` of the row, those after it and the carry.
/// Synchronises.
#[cube]
fn sum_over_rows(tile: &mut Tile<f32>, tokens: &mut ByToken, #[comptime] back: bool, #[comptime] b: Blueprint) {
    // Units of a column have neighbouring rows each.
    let parts = comptime!((b.units / b.block).min(b.chunk));
    let rows = comptime!(b.chunk / parts);
    let (col, part) = (unit() % b.block, unit() / b.block);
    let mut sum = f32::new(0.0);
    if part < parts {
        for i in 0..rows {
            sum += tile.get(part * rows + i, col);
        }
        tokens.shares[unit()] = sum;
    }
    sync_cube();
    if part < parts {
        let mut sum = f32::new(0.0);
        if comptime!(back) {
            sum = tokens.carry[col];
        }
        for i in 0..parts {
            let other = if comptime!(back) { parts.runtime() - 1 - i } else { i };
            let counts = if comptime!(back) { other > part } else { other < part };
            sum += select(counts, tokens.shares[other * b.block + col], f32::new(0.0));
        }
        for i in 0..rows {
            let row = part * rows + if comptime!(back) { comptime!(rows - 1).runtime() - i } else { i };
            let value = tile.get(row, col);
            if comptime!(back) {
                sum += value;
                tile.set(row, col, sum);
            } else {
                tile.set(row, col, sum);
                sum += value;
            }
        }
    }
    sync_cube();
}

/// `tile += sums`
#[cube]
fn add(sums: &Sums, tile: &mut Tile<f32>) {
    let unit = unit();
    #[unroll]
    for j in 0..comptime!(sums.spread.len()) {
        if sums.has(unit, j) {
            let place = sums.place(unit, j);
            tile.set(place.0, place.1, tile.get(place.0, place.1) + sums.get(place, j));
        }
    }
}

/// Elements of two states that a unit multiplies at a time.
const CARRIED: usize = 4;

/// Starts the gradients by role with what comes through the states before and after the chunk. Synchronises.
#[cube]
fn through_state<I: Float, E: Float, N: Size>(
    x: &Operands<I, E, N>,
    do_: &[Vector<I, N>],
    z: &[Vector<I, N>],
    dstates: &[Vector<E, N>],
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    decay: &mut Decay,
    pairs: &mut Pairs<E>,
    roles: &mut Roles,
    tokens: &mut ByToken,
    #[comptime] b: Blueprint,
) {
    let (at, state_at) = (place.values(sizes), place.state(sizes));
    let form = comptime!(Form::abt(b.chunk, b.block, b.block, Mode::Add));
    roles.q_left.clear();
    roles.k_left.clear();
    roles.k_right.clear();
    roles.k_end.clear();
    // `sum_v S dS'`, in f32: neighbouring units share a row.
    let columns = comptime!(b.units / b.block);
    let (carry_row, column) = (unit() / columns, unit() % columns);
    let mut carry = f32::new(0.0);
    for part in 0..sizes.value_blocks {
        let v0 = part * b.block;
        let (rows, states) = comptime!((b.shape(b.chunk, b.block), b.shape(b.block, b.block)));
        let mut do_flight = Flight::<I, N>::new(rows, true);
        let mut z_flight = Flight::<I, N>::new(rows, b.delta);
        let mut x_flight = Flight::<I, N>::new(rows, true);
        let mut state_flight = Flight::<E, N>::new(states, true);
        let mut dstate_flight = Flight::<E, N>::new(states, true);
        do_flight.ask(do_, at, place.rows, v0, sizes.value_dim, unit());
        z_flight.ask(z, at, place.rows, v0, sizes.value_dim, unit());
        x_flight.ask(&x.x, at, place.rows, v0, sizes.value_dim, unit());
        ask_state(&mut state_flight, &x.states, state_at, k0, v0, sizes);
        ask_state(&mut dstate_flight, dstates, state_at, k0, v0, sizes);
        do_flight.put_all::<E>(&mut pairs.queries);
        z_flight.put_all::<E>(&mut pairs.other);
        x_flight.put_all::<E>(&mut pairs.keys);
        state_flight.put_all::<E>(&mut pairs.state);
        dstate_flight.put_all::<E>(&mut pairs.dstate);
        sync_cube();
        roles.q_left.product::<E, E>(&pairs.queries, &pairs.state, form);
        if comptime!(b.delta) {
            roles.k_left.product::<E, E>(&pairs.other, &pairs.state, form);
        }
        roles.k_end.product::<E, E>(&pairs.keys, &pairs.dstate, form);
        if comptime!(b.gate != GateKind::None) {
            if carry_row < b.block {
                #[unroll(!b.engine.in_software())]
                for i in 0..comptime!((b.block / columns).div_ceil(CARRIED)) {
                    let v = (column + i * columns) * CARRIED;
                    if comptime!(b.block.is_multiple_of(columns * CARRIED)) || v < b.block {
                        let state = pairs.state.get_many::<Const<CARRIED>>(carry_row, v);
                        let product = state * pairs.dstate.get_many::<Const<CARRIED>>(carry_row, v);
                        #[unroll]
                        for j in 0..CARRIED {
                            carry += product.extract(j);
                        }
                    }
                }
            }
        }
        sync_cube();
    }
    if comptime!(b.gate != GateKind::None) {
        tokens.shares[unit()] = carry;
        sync_cube();
        for k in range_stepped(unit(), b.block, units()) {
            let mut sum = f32::new(0.0);
            for column in 0..columns {
                sum += tokens.shares[k * columns + column];
            }
            tokens.carry[k] = sum * decay.end(k, b);
        }
    }
    weigh_sums(&mut roles.q_left, sizes.scale, &*decay, Role::FromStart, b);
    if comptime!(b.delta) {
        weigh_sums(&mut roles.k_left, -1.0, &*decay, comptime!(b.reads_from_start()), b);
    }
    weigh_sums(&mut roles.k_end, 1.0, &*decay, Role::ToEnd, b);
    sync_cube();
}
