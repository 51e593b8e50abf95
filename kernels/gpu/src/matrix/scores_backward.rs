//! Stage 1 reversed, all chunks at once: the gradients of the scores.
//!
//! ```text
//! P_ij = scale do_i . x_j  (i >= j)        R_ij = -z_i . x_j  (i > j, delta)
//! ```
//! times the decay between the tokens where that is a scalar. One cube computes one chunk of one head.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use super::decay::Decay;
use super::lower::{Between, multiply_lower, weigh_lower};
use super::place::{Place, Sizes};
use super::transfer::{store_scores, store_square};
use crate::tile::{Form, Mode, Sums, Tile, this_cube, unit};
use crate::transfer::Flight;

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn scores_backward_kernel<I: Float, E: Float, N: Size>(
    x: &[Vector<I, N>],
    g: &[f32],
    do_: &[Vector<I, N>],
    z: &[Vector<I, N>],
    table: &[u32],
    p_out: &mut [Vector<E, N>],
    r_out: &mut [Vector<E, N>],
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
    if comptime!(b.gate == GateKind::HEAD) {
        decay.load(g, &place, sizes, b);
    }
    let mut between = Between::new(true, b);
    between.load(&decay, b);
    let (c, delta_rows) = comptime!((b.chunk, if b.delta { b.chunk } else { 1 }));
    let mut p_sums = Sums::new(comptime!(b.spread(c, c)));
    let mut r_sums = Sums::new(comptime!(b.spread(if b.delta { c } else { 0 }, c)));
    let weighs = comptime!(b.weighs_scores());
    let (mut p, mut r) = (p_sums.whole(!weighs), r_sums.whole(!weighs));
    let operand = comptime!(b.operand_padding());
    let mut right = Tile::<E>::new(c, b.block, operand);
    let mut p_left = Tile::<E>::new(c, b.block, operand);
    let mut r_left = Tile::<E>::new(delta_rows, b.block, operand);
    p_sums.clear();
    r_sums.clear();
    let at = place.values(sizes);
    for part in 0..sizes.value_blocks {
        let v0 = part * b.block;
        let shape = comptime!(b.shape(c, b.block));
        let mut x_flight = Flight::<I, N>::new(shape, true);
        let mut do_flight = Flight::<I, N>::new(shape, true);
        let mut z_flight = Flight::<I, N>::new(shape, b.delta);
        x_flight.ask(x, at, place.rows, v0, sizes.value_dim, unit());
        do_flight.ask(do_, at, place.rows, v0, sizes.value_dim, unit());
        z_flight.ask(z, at, place.rows, v0, sizes.value_dim, unit());
        x_flight.put_all::<E>(&mut right);
        do_flight.put_all::<E>(&mut p_left);
        z_flight.put_all::<E>(&mut r_left);
        sync_cube();
        let form = comptime!(Form::abt(c, c, b.block, Mode::Add));
        p_sums.product::<E, E>(&p_left, &right, form);
        if comptime!(b.delta) {
            r_sums.product::<E, E>(&r_left, &right, form);
        }
        sync_cube();
    }
    let out = Place::of(this_cube(), sizes, table, b).scores(sizes, b);
    if comptime!(weighs) {
        let (mut p, mut r) = (Tile::<E>::new(c, c, operand), Tile::<E>::new(delta_rows, c, operand));
        weigh_lower(&mut p_sums, sizes.scale, &mut r_sums, -1.0, &decay, &between, b);
        p_sums.put::<E>(&mut p);
        if comptime!(b.delta) {
            r_sums.put::<E>(&mut r);
        }
        sync_cube();
        store_square::<E, N>(&p, p_out, out, b);
        if comptime!(b.delta) {
            store_square::<E, N>(&r, r_out, out, b);
        }
    } else {
        p_sums.put::<f32>(&mut p);
        if comptime!(b.delta) {
            r_sums.put::<f32>(&mut r);
        }
        sync_cube();
        multiply_lower(&mut p, &mut r, &decay, b);
        sync_cube();
        store_scores::<E, N>(&p, p_out, out, sizes.scale, b);
        if comptime!(b.delta) {
            store_scores::<E, N>(&r, r_out, out, -1.0, b);
        }
    }
}
