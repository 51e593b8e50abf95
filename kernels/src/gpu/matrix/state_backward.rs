//! Stage 2 reversed: the gradient of the state that leaves each chunk, and through the delta rule that of the values.
//!
//! ```text
//! du  = A^T do + (k e^{c_n - c}) dS'      z = T^T Diag(beta) du = dv                     (delta)
//! dS  = e^{c_n} dS' + scale (q e^{c})^T do - (k e^{c})^T z                               (no z without it)
//! ```
//! Cubes hold the same part of the state as in stage 2, and walk the chunks from the last to the first.

use cubecl::prelude::*;

use super::super::tile::{Corner, Form, Mode, Tile, copy, fresh, product, product_at, unit, units};
use super::blueprint::WalkBlueprint;
use super::decay::{Decay, Role, load, load_keys, store};
use super::place::{Sizes, Walk};
use super::state::{Part, decay_rows, load_state, scale_rows, store_state};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn state_backward_kernel<I: Float, E: Float>(
    q: &[I],
    k: &[I],
    g: &[f32],
    beta: &[f32],
    a: &[E],
    t: &[E],
    do_: &[I],
    d_final: &[f32],
    table: &[u32],
    dv: &mut [I],
    dstates: &mut [f32],
    d_initial: &mut [f32],
    sizes: &Sizes,
    #[comptime] has_final: bool,
    #[comptime] w: WalkBlueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let b = comptime!(w.chunk);
    let (state_blocks, d) = comptime!((w.state_blocks, w.value_block));
    let cube = CUBE_POS;
    let parts = sizes.key_blocks / state_blocks * sizes.value_dim.div_ceil(d);
    if cube >= sizes.sequences * sizes.value_heads * parts {
        terminate!();
    }
    let part = Part::of(cube, sizes, w);
    let (padding, operand) = comptime!((b.padding(), b.operand_padding()));
    let c = comptime!(b.chunk);
    let mut decay = Decay::new(b);
    let mut dstate = Tile::<f32>::new(comptime!(state_blocks * b.block), d, padding);
    let mut keys = Tile::<E>::new(c, b.block, operand);
    let mut d_out = Tile::<E>::new(c, d, operand);
    // `-z`, and before it what `T` is applied to.
    let mut z = Tile::<E>::new(comptime!(if b.delta { c } else { 1 }), d, operand);
    load_state::<f32>(d_final, part.state(sizes), part.k0, part.v0, sizes, &mut dstate, has_final);

    let walk = Walk::of(sizes, table, part.sequence, b);
    for n in 0..walk.chunks {
        let place = walk.place(sizes, walk.chunks - 1 - n, part.head, b);
        sync_cube();
        store_state(&dstate, dstates, place.state(sizes), part.k0, part.v0, sizes);
        decay.load(g, &place, sizes, b);
        let (key_at, value_at) = (place.keys(sizes), place.values(sizes));
        load::<I, E>(do_, value_at, place.rows, part.v0, sizes.value_dim, &mut d_out);
        if comptime!(b.delta) {
            let mut du = Tile::<f32>::new(c, d, padding);
            let mut dstate_block = Tile::<E>::new(b.block, d, operand);
            let mut square = Tile::<E>::new(c, c, operand);
            let scores_at = (place.scores(sizes, b), c.runtime());
            load::<E, E>(a, scores_at, c.runtime(), 0, c.runtime(), &mut square);
            sync_cube();
            product::<E>(&square, &d_out, &mut du, comptime!(Form::atb(c, d, c, Mode::Set)), b.engine);
            for block in 0..state_blocks {
                let k0 = block * b.block;
                decay.load_block(g, &place, sizes, k0, b);
                decay.prepare(g, &place, sizes, k0, Role::ToEnd, b);
                load_keys::<I, E>(k, key_at, place.rows, k0, sizes.key_dim, 1.0, &decay, &mut keys, Role::ToEnd, b);
                copy::<f32, E>(&dstate, k0, &mut dstate_block);
                sync_cube();
                product::<E>(&keys, &dstate_block, &mut du, comptime!(Form::ab(c, d, b.block, Mode::Add)), b.engine);
                sync_cube();
            }
            load::<E, E>(t, scores_at, c.runtime(), 0, c.runtime(), &mut square);
            scale_rows::<E>(&du, beta, place.scalars(sizes), place.rows, &mut z);
            sync_cube();
            product::<E>(&square, &z, &mut du, comptime!(Form::atb(c, d, c, Mode::Set)), b.engine);
            sync_cube();
            store::<I, f32>(&du, dv, value_at, place.rows, part.v0, sizes.value_dim);
            for i in range_stepped(unit(), comptime!(c * d), units()) {
                z.set(i / d, i % d, -du.get(i / d, i % d));
            }
        }
        for block in 0..state_blocks {
            let k0 = part.k0 + block * b.block;
            decay.load_block(g, &place, sizes, k0, b);
            decay.prepare(g, &place, sizes, k0, Role::FromStart, b);
            load_keys::<I, E>(
                q,
                key_at,
                place.rows,
                k0,
                sizes.key_dim,
                sizes.scale,
                &decay,
                &mut keys,
                Role::FromStart,
                b,
            );
            decay_rows(&mut dstate, block * b.block, &decay, b);
            sync_cube();
            let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: block * b.block };
            let form = comptime!(Form::atb(b.block, d, c, Mode::Add));
            product_at::<E>(&keys, &d_out, &mut dstate, &corner, form, b.engine);
            sync_cube();
            if comptime!(b.delta) {
                load_keys::<I, E>(k, key_at, place.rows, k0, sizes.key_dim, 1.0, &decay, &mut keys, Role::FromStart, b);
                sync_cube();
                product_at::<E>(&keys, &z, &mut dstate, &corner, form, b.engine);
                sync_cube();
            }
        }
    }
    sync_cube();
    let part = Part::of(fresh(CUBE_POS as u32) as usize, sizes, w);
    store_state(&dstate, d_initial, part.state(sizes), part.k0, part.v0, sizes);
}
