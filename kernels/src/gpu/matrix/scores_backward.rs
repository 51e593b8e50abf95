//! Stage 1 reversed, all chunks at once: the gradients of the scores.
//!
//! ```text
//! P_ij = scale do_i . x_j  (i >= j)        R_ij = -z_i . x_j  (i > j, delta)
//! ```
//! times the decay between the tokens where that is a scalar. One cube computes one chunk of one head.

use cubecl::prelude::*;

use super::super::tile::{Form, Mode, Tile, fill, product, unit, units};
use super::blueprint::{Blueprint, GateKind};
use super::decay::{Decay, load};
use super::place::{Place, Sizes};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn scores_backward_kernel<I: Float, E: Float>(
    x: &[I],
    g: &[f32],
    do_: &[I],
    z: &[I],
    table: &[u32],
    p_out: &mut [E],
    r_out: &mut [E],
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
    if comptime!(b.gate == GateKind::Head) {
        decay.load(g, &place, sizes, b);
    }
    let mut square = Tile::<f32>::new(b.chunk, b.chunk, comptime!(b.padding()));
    let mut left = Tile::<E>::new(b.chunk, b.block, comptime!(b.operand_padding()));
    let mut right = Tile::<E>::new(b.chunk, b.block, comptime!(b.operand_padding()));
    outer::<I, E>(do_, x, p_out, sizes.scale, &place, sizes, &decay, &mut square, &mut left, &mut right, false, b);
    if comptime!(b.delta) {
        sync_cube();
        outer::<I, E>(z, x, r_out, -1.0, &place, sizes, &decay, &mut square, &mut left, &mut right, true, b);
    }
}

/// `out = factor y x^T` over the value features, on and below the diagonal or `strict`ly below it.
#[cube]
fn outer<I: Float, E: Float>(
    y: &[I],
    x: &[I],
    out: &mut [E],
    factor: f32,
    place: &Place,
    sizes: &Sizes,
    decay: &Decay,
    square: &mut Tile<f32>,
    left: &mut Tile<E>,
    right: &mut Tile<E>,
    #[comptime] strict: bool,
    #[comptime] b: Blueprint,
) {
    let (c, at) = (comptime!(b.chunk), place.values(sizes));
    fill::<f32>(square, 0.0);
    for part in 0..sizes.value_blocks {
        load::<I, E>(y, at, place.rows, part * b.block, sizes.value_dim, left);
        load::<I, E>(x, at, place.rows, part * b.block, sizes.value_dim, right);
        sync_cube();
        product::<E>(&*left, &*right, square, comptime!(Form::abt(c, c, b.block, Mode::Add)), b.engine);
        sync_cube();
    }
    decay.multiply_lower(square, strict, b);
    sync_cube();
    let to = place.scores(sizes, b);
    for i in range_stepped(unit(), comptime!(c * c), units()) {
        out[to + i] = E::cast_from(square.get(i / c, i % c) * factor);
    }
}
