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
//! One cube computes one chunk of one head, block by block of key features. A tensor meets the decay on the left, times
//! `e^{c_i}`, or on the right, times `e^{-c_j}`; so the gradient of `c` is `left (.) dleft - right (.) dright`, and `dg_t`
//! its sum from `t` on. Pairs with `i = j` do not meet the decay and are kept apart, as is what a key leaves to the end of
//! the chunk (it goes to the gates after it, summed forwards): under strong gates either would drown the rest.

use cubecl::prelude::*;

use super::super::tile::{Form, Mode, Tile, fill, product, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, Role, scale};
use super::pair_gradients::{key_pairs, scalar_pairs};
use super::place::{Place, Sizes};
use super::state::load_state;
use super::transfer::{load, load_scores, read};

/// What the chunk reads.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Operands<I: Float, E: Float, N: Size> {
    pub q: Box<[Vector<I, N>]>,
    pub k: Box<[Vector<I, N>]>,
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
    /// `[tokens, value_heads]` or `[tokens, value_heads, key_dim]`.
    pub dg: Box<[f32]>,
    pub dbeta: Box<[f32]>,
}

/// Sums over key features, by token.
#[derive(CubeType)]
pub(crate) struct ByToken {
    /// `P_ii`.
    pub diagonal: Shared<[f32]>,
    pub beta: Shared<[f32]>,
    /// By key feature of the block, the gradient of `c_n` that the state gives.
    pub carry: Shared<[f32]>,
    /// By unit, a share of a token's sums: of `dbeta`, of the gradient of `c_i`, and of what the end of the chunk says of
    /// the gates after token `i` (scalar gates).
    pub d_beta: Shared<[f32]>,
    pub dc: Shared<[f32]>,
    pub ending: Shared<[f32]>,
    /// By unit, a share of the carry.
    pub carries: Shared<[f32]>,
}

/// Gradients of the chunk's tensors for one block of key features, by role, `[chunk, block]`.
#[derive(CubeType)]
pub(crate) struct Roles {
    pub q_left: Tile<f32>,
    pub k_left: Tile<f32>,
    pub k_right: Tile<f32>,
    pub k_end: Tile<f32>,
}

/// The gradients of the pairs, as operands, and scratch.
#[derive(CubeType)]
pub(crate) struct Pairs<E: Float> {
    pub p: Tile<E>,
    pub r: Tile<E>,
    pub square: Tile<f32>,
    pub one: Tile<E>,
    pub two: Tile<E>,
    pub state: Tile<E>,
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
    if cube >= sizes.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let (padding, operand) = comptime!((b.padding(), b.operand_padding()));
    let (c, delta_rows) = comptime!((b.chunk, if b.delta { b.chunk } else { 1 }));
    let mut decay = Decay::new(b);
    let mut pairs = Pairs::<E> {
        p: Tile::<E>::new(c, c, operand),
        r: Tile::<E>::new(delta_rows, c, operand),
        square: Tile::<f32>::new(comptime!(if b.gate == GateKind::Key { c } else { 1 }), b.block, padding),
        one: Tile::<E>::new(c, b.block, operand),
        two: Tile::<E>::new(c, b.block, operand),
        state: Tile::<E>::new(b.block, b.block, operand),
    };
    let mut roles = Roles {
        q_left: Tile::<f32>::new(c, b.block, padding),
        k_left: Tile::<f32>::new(delta_rows, b.block, padding),
        k_right: Tile::<f32>::new(c, b.block, padding),
        k_end: Tile::<f32>::new(c, b.block, padding),
    };
    let mut tokens = ByToken {
        diagonal: Shared::new_slice(c),
        beta: Shared::new_slice(c),
        carry: Shared::new_slice(b.block),
        d_beta: Shared::new_slice(b.units),
        dc: Shared::new_slice(b.units),
        ending: Shared::new_slice(b.units),
        carries: Shared::new_slice(b.units),
    };
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
    tokens.d_beta[unit()] = 0.0;
    tokens.dc[unit()] = 0.0;
    tokens.ending[unit()] = 0.0;
    decay.load_rows(&x.g, &place, sizes, b);
    let squares = place.scores(sizes, b);
    load_scores::<E, N>(p, squares, &mut pairs.p);
    if comptime!(b.delta) {
        load_scores::<E, N>(r, squares, &mut pairs.r);
    }
    sync_cube();
    for i in range_stepped(unit(), c, units()) {
        tokens.diagonal[i] = pairs.p.get(i, i);
        pairs.p.set(i, i, 0.0);
    }
    sync_cube();

    let mut total = f32::new(0.0);
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
        if comptime!(b.gate == GateKind::Key) {
            key_pairs::<I, E, N>(x, &place, sizes, k0, &mut decay, &mut pairs, &mut roles, &tokens, b);
        } else {
            scalar_pairs::<I, E, N>(x, &place, sizes, k0, &decay, &mut pairs, &mut roles, &tokens, b);
        }
        finish::<I, E, O, N>(x, &place, sizes, k0, &mut roles, &tokens, out, b);
        sync_cube();
        if comptime!(b.delta) {
            tokens.d_beta[unit()] += sum_row(&roles.k_right, b);
        }
        if comptime!(b.gate == GateKind::Head) {
            tokens.dc[unit()] += sum_row(&roles.q_left, b);
            tokens.ending[unit()] += sum_row(&roles.k_end, b);
        }
        if comptime!(b.gate == GateKind::Head) {
            for k in 0..b.block {
                total += tokens.carry[k];
            }
        }
        if comptime!(b.gate == GateKind::Key) {
            key_gate_gradient(&place, sizes, k0, &mut roles, &tokens, &mut out.dg, b);
        }
        sync_cube();
    }
    if comptime!(b.delta) {
        let d_beta = over_shares(&tokens.d_beta, b);
        if unit() < place.rows {
            out.dbeta[scalar_at + unit() * stride] = d_beta;
        }
    }
    if comptime!(b.gate == GateKind::Head) {
        let (ending, dc) = (over_shares(&tokens.ending, b), over_shares(&tokens.dc, b));
        // Once more by token, as every unit reads all of them; the steps are not needed any more.
        sync_cube();
        let i = unit();
        if i < c {
            tokens.diagonal[i] = ending;
            tokens.beta[i] = dc;
        }
        sync_cube();
        if i < place.rows {
            let mut sum = f32::new(0.0);
            // From the last token on, as gates that are strong make the later terms the smaller ones.
            let mut later = total;
            for j in 0..c {
                let back = comptime!(c - 1).runtime() - j;
                sum += select(j < i, tokens.diagonal[j], f32::new(0.0));
                later += select(back >= i, tokens.beta[back], f32::new(0.0));
            }
            out.dg[scalar_at + i * stride] = sum + later;
        }
    }
}

/// Units of a token, each with a share of the key features. The units of a cube are a multiple of the tokens.
fn shares(b: Blueprint) -> usize {
    b.units / b.chunk
}

/// This unit's share of the sum of a row: unit `i + share * chunk` has row `i`.
#[cube]
fn sum_row(tile: &Tile<f32>, #[comptime] b: Blueprint) -> f32 {
    let mut sum = f32::new(0.0);
    for k in range_stepped(unit() / b.chunk, tile.cols, comptime!(shares(b))) {
        sum += tile.get(unit() % b.chunk, k);
    }
    sum
}

/// The sum over the shares of token `unit()`, in order; of no use to units beyond the tokens.
#[cube]
fn over_shares(by_unit: &Shared<[f32]>, #[comptime] b: Blueprint) -> f32 {
    let mut sum = f32::new(0.0);
    #[unroll]
    for share in 0..comptime!(shares(b)) {
        sum += by_unit[unit() % b.chunk + share * b.chunk];
    }
    sum
}

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
    let n = N::value().comptime();
    let (at, state_at) = (place.values(sizes), place.state(sizes));
    let form = comptime!(Form::abt(b.chunk, b.block, b.block, Mode::Add));
    fill::<f32>(&mut roles.q_left, 0.0);
    fill::<f32>(&mut roles.k_left, 0.0);
    fill::<f32>(&mut roles.k_right, 0.0);
    fill::<f32>(&mut roles.k_end, 0.0);
    // `sum_v S dS'`, in f32: neighbouring units share a row.
    let columns = comptime!(b.units / b.block);
    let (carry_row, column) = (unit() / columns, unit() % columns);
    let mut carry = f32::new(0.0);
    for part in 0..sizes.value_blocks {
        let v0 = part * b.block;
        load::<I, E, N>(do_, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
        load_state::<E, E, N>(&x.states, state_at, k0, v0, sizes, &mut pairs.state, true);
        sync_cube();
        product::<E>(&pairs.one, &pairs.state, &mut roles.q_left, form, b.units, b.engine);
        if carry_row < b.block {
            for i in range_stepped(column, comptime!(b.block / n), columns) {
                let (rows, v) = ((state_at, sizes.value_dim), v0 + i * n);
                let state = read::<E, N>(&x.states, rows, sizes.key_dim, k0 + carry_row, v, sizes.value_dim);
                let dstate = read::<E, N>(dstates, rows, sizes.key_dim, k0 + carry_row, v, sizes.value_dim);
                let both = Vector::<f32, N>::cast_from(state) * Vector::<f32, N>::cast_from(dstate);
                #[unroll]
                for j in 0..n {
                    carry += both.extract(j);
                }
            }
        }
        sync_cube();
        if comptime!(b.delta) {
            load::<I, E, N>(z, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
            sync_cube();
            product::<E>(&pairs.one, &pairs.state, &mut roles.k_left, form, b.units, b.engine);
            sync_cube();
        }
        load::<I, E, N>(&x.x, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
        load_state::<E, E, N>(dstates, state_at, k0, v0, sizes, &mut pairs.state, true);
        sync_cube();
        product::<E>(&pairs.one, &pairs.state, &mut roles.k_end, form, b.units, b.engine);
        sync_cube();
    }
    tokens.carries[unit()] = carry;
    sync_cube();
    for k in range_stepped(unit(), b.block, units()) {
        let mut sum = f32::new(0.0);
        for column in 0..columns {
            sum += tokens.carries[k * columns + column];
        }
        tokens.carry[k] = sum * decay.end(k, b);
    }
    decay.prepare(&x.g, place, sizes, k0, Role::FromStart, b);
    scale(&mut roles.q_left, sizes.scale, &*decay, Role::FromStart, b);
    if comptime!(b.delta) {
        scale(&mut roles.k_left, -1.0, &*decay, Role::FromStart, b);
    }
    sync_cube();
    decay.prepare(&x.g, place, sizes, k0, Role::ToEnd, b);
    scale(&mut roles.k_end, 1.0, &*decay, Role::ToEnd, b);
    sync_cube();
}

/// Adds up the roles and writes `dq` and `dk`. Leaves in `q_left` the gradient of `c`, in `k_end` what goes to the gates
/// after the token, in `k_right` the terms of `dbeta`.
#[cube]
fn finish<I: Float, E: Float, O: Float, N: Size>(
    x: &Operands<I, E, N>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    roles: &mut Roles,
    tokens: &ByToken,
    out: &mut Gradients<O, N>,
    #[comptime] b: Blueprint,
) {
    let n = N::value().comptime();
    let (at, to) = (place.keys(sizes), place.key_gates(sizes));
    let cols = comptime!(b.block / n);
    for item in range_stepped(unit(), comptime!(b.chunk * cols), units()) {
        let (row, d) = (item / cols, item % cols * n);
        let query = Vector::<f32, N>::cast_from(read::<I, N>(&x.q, at, place.rows, row, k0 + d, sizes.key_dim));
        let key = Vector::<f32, N>::cast_from(read::<I, N>(&x.k, at, place.rows, row, k0 + d, sizes.key_dim));
        let (beta, diagonal) = (Vector::new(tokens.beta[row]), Vector::new(tokens.diagonal[row]));
        let (q_left, end) = (roles.q_left.get_many::<N>(row, d), roles.k_end.get_many::<N>(row, d));
        let right = roles.k_right.get_many::<N>(row, d);
        let unstepped = right + end + diagonal * query;
        let mut dk = beta * unstepped;
        let mut dc = query * q_left - beta * key * right;
        if comptime!(b.delta) {
            let k_left = roles.k_left.get_many::<N>(row, d);
            dk += k_left;
            dc += key * k_left;
        }
        if row < place.rows && k0 + d < sizes.key_dim {
            let at = (to.0 + row * to.1 + k0 + d) / n;
            out.dq[at] = Vector::<O, N>::cast_from(q_left + diagonal * beta * key);
            out.dk[at] = Vector::<O, N>::cast_from(dk);
        }
        roles.q_left.set_many::<f32, N>(row, d, dc);
        roles.k_end.set_many::<f32, N>(row, d, beta * key * end);
        roles.k_right.set_many::<f32, N>(row, d, key * unstepped);
    }
}

/// The gradient of the gates of a block of key features, a feature per unit.
#[cube]
fn key_gate_gradient(
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    roles: &mut Roles,
    tokens: &ByToken,
    dg: &mut [f32],
    #[comptime] b: Blueprint,
) {
    let at = place.key_gates(sizes);
    for d in range_stepped(unit(), b.block, units()) {
        let mut earlier = f32::new(0.0);
        for row in 0..b.chunk {
            let end = roles.k_end.get(row, d);
            roles.k_end.set(row, d, earlier);
            earlier += end;
        }
        let mut later = tokens.carry[d];
        for i in 0..b.chunk {
            let row = comptime!(b.chunk - 1).runtime() - i;
            later += roles.q_left.get(row, d);
            if row < place.rows && k0 + d < sizes.key_dim {
                dg[at.0 + row * at.1 + k0 + d] = later + roles.k_end.get(row, d);
            }
        }
    }
}
