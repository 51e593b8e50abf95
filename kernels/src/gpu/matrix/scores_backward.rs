//! Stage 1 reversed, all chunks at once: the gradients of the scores.
//!
//! ```text
//! P_ij = scale do_i . x_j  (i >= j)        R_ij = -z_i . x_j  (i > j, delta)
//! ```
//! times the decay between the tokens where that is a scalar. One cube computes one chunk of one head.

use cubecl::prelude::*;

use super::super::tile::{Form, Mode, Sums, Tile};
use super::blueprint::{Blueprint, GateKind};
use super::decay::Decay;
use super::place::{Place, Sizes};
use super::transfer::{load, store_scores};

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
    if cube >= sizes.chunks * sizes.value_heads {
        terminate!();
    }
    let place = Place::of(cube, sizes, table, b);
    let mut decay = Decay::new(b);
    if comptime!(b.gate == GateKind::Head) {
        decay.load(g, &place, sizes, b);
    }
    let mut sums = Sums::new(comptime!(b.spread(b.chunk, b.chunk)));
    let mut square = sums.whole();
    let mut left = Tile::<E>::new(b.chunk, b.block, comptime!(b.operand_padding()));
    let mut right = Tile::<E>::new(b.chunk, b.block, comptime!(b.operand_padding()));
    outer::<I, E, N>(
        do_,
        x,
        p_out,
        sizes.scale,
        &place,
        sizes,
        &decay,
        &mut sums,
        &mut square,
        &mut left,
        &mut right,
        false,
        b,
    );
    if comptime!(b.delta) {
        sync_cube();
        outer::<I, E, N>(
            z,
            x,
            r_out,
            -1.0,
            &place,
            sizes,
            &decay,
            &mut sums,
            &mut square,
            &mut left,
            &mut right,
            true,
            b,
        );
    }
}

/// `out = factor y x^T` over the value features, on and below the diagonal or `strict`ly below it.
#[cube]
fn outer<I: Float, E: Float, N: Size>(
    y: &[Vector<I, N>],
    x: &[Vector<I, N>],
    out: &mut [Vector<E, N>],
    factor: f32,
    place: &Place,
    sizes: &Sizes,
    decay: &Decay,
    sums: &mut Sums,
    square: &mut Tile<f32>,
    left: &mut Tile<E>,
    right: &mut Tile<E>,
    #[comptime] strict: bool,
    #[comptime] b: Blueprint,
) {
    let (c, at) = (comptime!(b.chunk), place.values(sizes));
    sums.clear();
    for part in 0..sizes.value_blocks {
        load::<I, E, N>(y, at, place.rows, part * b.block, sizes.value_dim, left);
        load::<I, E, N>(x, at, place.rows, part * b.block, sizes.value_dim, right);
        sync_cube();
        sums.product::<E, E>(&*left, &*right, comptime!(Form::abt(c, c, b.block, Mode::Add)));
        sync_cube();
    }
    sums.put::<f32>(square);
    sync_cube();
    decay.multiply_lower(square, strict, b);
    sync_cube();
    store_scores::<E, N>(&*square, out, place.scores(sizes, b), factor, b);
}
