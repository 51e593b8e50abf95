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
use super::decay::{Decay, Role, load, read, scale};
use super::pair_gradients::{key_pairs, scalar_pairs};
use super::place::{Place, Sizes};
use super::state::load_state;

/// What the chunk reads.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Operands<I: Float + CubePrimitive> {
    pub q: Box<[I]>,
    pub k: Box<[I]>,
    pub g: Box<[f32]>,
    pub beta: Box<[f32]>,
    /// `v` without the delta rule.
    pub x: Box<[I]>,
    pub states: Box<[f32]>,
}

/// The gradients that leave it.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Gradients<O: Float + CubePrimitive> {
    /// `[tokens, value_heads, key_dim]`.
    pub dq: Box<[O]>,
    pub dk: Box<[O]>,
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
    pub d_beta: Shared<[f32]>,
    /// Gradient of `c_i`, and what the end of the chunk says of the gates after token `i`. Scalar gates.
    pub dc: Shared<[f32]>,
    pub ending: Shared<[f32]>,
    /// By key feature of the block, the gradient of `c_n` that the state gives.
    pub carry: Shared<[f32]>,
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
pub(crate) fn chunk_backward_kernel<I: Float, E: Float, O: Float>(
    x: &Operands<I>,
    p: &[E],
    r: &[E],
    do_: &[I],
    z: &[I],
    dstates: &[f32],
    table: &[u32],
    out: &mut Gradients<O>,
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
        d_beta: Shared::new_slice(c),
        dc: Shared::new_slice(c),
        ending: Shared::new_slice(c),
        carry: Shared::new_slice(comptime!(2 * b.block)),
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
        tokens.d_beta[i] = 0.0;
        tokens.dc[i] = 0.0;
        tokens.ending[i] = 0.0;
    }
    decay.load(&x.g, &place, sizes, b);
    let squares = place.scores(sizes, b);
    for i in range_stepped(unit(), comptime!(c * c), units()) {
        let (row, col) = (i / c, i % c);
        let value = f32::cast_from(p[squares + i]);
        pairs.p.set(row, col, select(row == col, f32::new(0.0), value));
        if row == col {
            tokens.diagonal[row] = value;
        }
        if comptime!(b.delta) {
            pairs.r.set(row, col, f32::cast_from(r[squares + i]));
        }
    }
    sync_cube();

    let mut total = f32::new(0.0);
    for block in 0..sizes.key_blocks {
        let k0 = block * b.block;
        decay.load_block(&x.g, &place, sizes, k0, b);
        through_state::<I, E>(
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
            key_pairs::<I, E>(x, &place, sizes, k0, &mut decay, &mut pairs, &mut roles, &tokens, b);
        } else {
            scalar_pairs::<I, E>(x, &place, sizes, k0, &decay, &mut pairs, &mut roles, &tokens, b);
        }
        finish::<I, O>(x, &place, sizes, k0, &mut roles, &tokens, out, b);
        sync_cube();
        for i in range_stepped(unit(), c, units()) {
            if comptime!(b.delta) {
                tokens.d_beta[i] += sum_row(&roles.k_right, i);
            }
            if comptime!(b.gate == GateKind::Head) {
                tokens.dc[i] += sum_row(&roles.q_left, i);
                tokens.ending[i] += sum_row(&roles.k_end, i);
            }
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
    for i in range_stepped(unit(), place.rows, units()) {
        if comptime!(b.delta) {
            out.dbeta[scalar_at + i * stride] = tokens.d_beta[i];
        }
        if comptime!(b.gate == GateKind::Head) {
            let mut sum = f32::new(0.0);
            for j in 0..i {
                sum += tokens.ending[j];
            }
            // From the last token on, as gates that are strong make the later terms the smaller ones.
            let mut later = total;
            for j in 0..c - i {
                later += tokens.dc[c - 1 - j];
            }
            out.dg[scalar_at + i * stride] = sum + later;
        }
    }
}

#[cube]
fn sum_row(tile: &Tile<f32>, row: usize) -> f32 {
    let mut sum = f32::new(0.0);
    for k in 0..comptime!(tile.cols) {
        sum += tile.get(row, k);
    }
    sum
}

/// Starts the gradients by role with what comes through the states before and after the chunk. Synchronises.
#[cube]
fn through_state<I: Float, E: Float>(
    x: &Operands<I>,
    do_: &[I],
    z: &[I],
    dstates: &[f32],
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
    fill::<f32>(&mut roles.q_left, 0.0);
    fill::<f32>(&mut roles.k_left, 0.0);
    fill::<f32>(&mut roles.k_right, 0.0);
    fill::<f32>(&mut roles.k_end, 0.0);
    for k in range_stepped(unit(), b.block, units()) {
        tokens.carry[k] = 0.0;
    }
    for part in 0..sizes.value_blocks {
        let v0 = part * b.block;
        load::<I, E>(do_, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
        load_state::<E>(&x.states, state_at, k0, v0, sizes, &mut pairs.state, true);
        sync_cube();
        product::<E>(&pairs.one, &pairs.state, &mut roles.q_left, form, b.engine);
        // `sum_v S dS'`, in f32.
        for k in range_stepped(unit(), b.block, units()) {
            let mut sum = tokens.carry[k];
            for v in 0..b.block {
                let row = (state_at, sizes.value_dim);
                let s = read::<f32>(&x.states, row, sizes.key_dim, k0 + k, v0 + v, sizes.value_dim);
                sum += s * read::<f32>(dstates, row, sizes.key_dim, k0 + k, v0 + v, sizes.value_dim);
            }
            tokens.carry[k] = sum;
        }
        sync_cube();
        if comptime!(b.delta) {
            load::<I, E>(z, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
            sync_cube();
            product::<E>(&pairs.one, &pairs.state, &mut roles.k_left, form, b.engine);
            sync_cube();
        }
        load::<I, E>(&x.x, at, place.rows, v0, sizes.value_dim, &mut pairs.one);
        load_state::<E>(dstates, state_at, k0, v0, sizes, &mut pairs.state, true);
        sync_cube();
        product::<E>(&pairs.one, &pairs.state, &mut roles.k_end, form, b.engine);
        sync_cube();
    }
    for k in range_stepped(unit(), b.block, units()) {
        tokens.carry[k] *= decay.end(k, b);
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
fn finish<I: Float, O: Float>(
    x: &Operands<I>,
    place: &Place,
    sizes: &Sizes,
    k0: usize,
    roles: &mut Roles,
    tokens: &ByToken,
    out: &mut Gradients<O>,
    #[comptime] b: Blueprint,
) {
    let (at, to) = (place.keys(sizes), place.key_gates(sizes));
    for item in range_stepped(unit(), comptime!(b.chunk * b.block), units()) {
        let (row, d) = (item / b.block, item % b.block);
        let query = read::<I>(&x.q, at, place.rows, row, k0 + d, sizes.key_dim);
        let key = read::<I>(&x.k, at, place.rows, row, k0 + d, sizes.key_dim);
        let (beta, diagonal) = (tokens.beta[row], tokens.diagonal[row]);
        let (q_left, end) = (roles.q_left.get(row, d), roles.k_end.get(row, d));
        let right = roles.k_right.get(row, d);
        let unstepped = right + end + diagonal * query;
        let mut dk = beta * unstepped;
        let mut dc = query * q_left - beta * key * right;
        if comptime!(b.delta) {
            let k_left = roles.k_left.get(row, d);
            dk += k_left;
            dc += key * k_left;
        }
        if row < place.rows && k0 + d < sizes.key_dim {
            out.dq[to.0 + row * to.1 + k0 + d] = O::cast_from(q_left + diagonal * beta * key);
            out.dk[to.0 + row * to.1 + k0 + d] = O::cast_from(dk);
        }
        roles.q_left.set(row, d, dc);
        roles.k_end.set(row, d, beta * key * end);
        roles.k_right.set(row, d, key * unstepped);
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
