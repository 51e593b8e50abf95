//! Stage 2 reversed by planes that compute by themselves; see [`super::panels`] and, for what is computed,
//! [`super::state_backward`].

use cubecl::prelude::*;

use super::ahead::WalkedKeys;
use super::blueprint::{GateKind, WalkBlueprint};
use super::panels::{Of, Weights, WeightsAhead, leave_state, take_away_chunk, take_state, twice};
use super::place::{Sizes, Walk};
use super::state::Part;
use crate::tile::{Left, Panel, WARP, fresh, this_cube, unit};
use crate::transfer::Flight;

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn panel_state_backward_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    keys: &WalkedKeys<I, N>,
    g: &[f32],
    beta: &[f32],
    a: &[Vector<E, N>],
    t: &[Vector<E, N>],
    do_: &[Vector<I, N>],
    d_final: &[f32],
    table: &[u32],
    dv: &mut [Vector<I, N>],
    dstates: &mut [Vector<E, N>],
    d_initial: &mut [f32],
    sizes: &Sizes,
    #[comptime] has_final: bool,
    #[comptime] w: WalkBlueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    let b = comptime!(w.chunk);
    let (c, d, rows, cols) = comptime!((b.chunk, w.value_block, w.rows(), w.panel()));
    let cube = CUBE_POS;
    if cube >= sizes.sequences * sizes.value_heads * (sizes.key_blocks / w.state_blocks * sizes.value_dim.div_ceil(d)) {
        terminate!();
    }
    let part = Part::of(cube, sizes, w);
    let walk = Walk::of(sizes, table, part.sequence, b);
    let (delta, key_wise) = comptime!((b.delta, b.gate == GateKind::KEY));
    let mut queries = twice::<E>(c, rows, true, b);
    let mut reading = twice::<E>(c, rows, delta, b);
    let mut writing = if comptime!(key_wise) { twice::<E>(c, rows, delta, b) } else { reading.alias() };
    let mut d_outs = twice::<E>(c, d, true, b);
    let mut scores = twice::<E>(c, c, delta, b);
    let mut inverse = twice::<E>(c, c, delta, b);
    let mut stage = twice::<E>(c, d, delta, b);
    let mut narrow = twice::<E>(rows, d, true, b);
    let mut weights = Weights::new(w);

    let computes = unit() < comptime!(w.computing());
    let col = unit() / WARP * cols;
    let mut dstate = Panel::new(rows, cols);
    if computes {
        take_state(&mut dstate, d_final, &part, part.v0 + col, sizes, has_final);
    }
    // As in `panel_state`, from the last chunk to the first.
    for turn in 0..walk.chunks + 2 {
        let (half, other) = ((turn + 1) % 2, turn % 2);
        if computes {
            if turn > 0 && turn <= walk.chunks {
                let (at, state_at) = (half * c, half * rows);
                dstate.put::<E>(&mut narrow, state_at, col);
                let mut z = Panel::new(c, cols);
                if comptime!(delta) {
                    sync_plane();
                    let mut du = Panel::new(c, cols);
                    du.add::<E>(&reading, at, &narrow, (state_at, col), Left::PLAIN, rows);
                    weights.weigh(&mut du, f32::new(1.0), half, Of::ToEnd, b);
                    du.add::<E>(&scores, at, &d_outs, (at, col), Left::LOWER_TRANSPOSED, c);
                    weights.weigh(&mut du, f32::new(1.0), half, Of::Steps, b);
                    du.put::<E>(&mut stage, at, col);
                    sync_plane();
                    z.add::<E>(&inverse, at, &stage, (at, col), Left::LOWER_TRANSPOSED, c);
                    z.put::<E>(&mut stage, at, col);
                }
                if comptime!(!key_wise) {
                    let mut d_out = Panel::new(c, cols);
                    d_out.take::<E>(&d_outs, at, col);
                    sync_plane();
                    weights.weigh(&mut d_out, sizes.scale, half, Of::FromStart, b);
                    d_out.put::<E>(&mut d_outs, at, col);
                    sync_plane();
                }
                weights.decay(&mut dstate, half, w);
                dstate.add::<E>(&queries, at, &d_outs, (at, col), Left::TRANSPOSED, c);
                if comptime!(delta) {
                    weights.weigh(&mut z, f32::new(-1.0), half, Of::FromStart, b);
                    z.put::<E>(&mut d_outs, at, col);
                    sync_plane();
                    dstate.add::<E>(&writing, at, &d_outs, (at, col), Left::TRANSPOSED, c);
                }
            }
        } else {
            let carrier = unit() - comptime!(w.computing());
            let mut queries_load = Flight::<I, N>::new(comptime!(w.carried(c, rows)), true);
            let mut reading_load = Flight::<I, N>::new(comptime!(w.carried(c, rows)), delta);
            let mut writing_load = Flight::<I, N>::new(comptime!(w.carried(c, rows)), comptime!(delta && key_wise));
            let mut d_outs_load = Flight::<I, N>::new(comptime!(w.carried(c, d)), true);
            let mut scores_load = Flight::<E, N>::new(comptime!(w.carried(c, c)), delta);
            let mut inverse_load = Flight::<E, N>::new(comptime!(w.carried(c, c)), delta);
            let mut weights_load = WeightsAhead::new(w);
            if turn < walk.chunks {
                let place = walk.place(sizes, walk.chunks - 1 - turn, part.head, b);
                let at = place.walked_keys(sizes, b);
                queries_load.ask(q, at, place.rows, part.k0, sizes.key_dim, carrier);
                reading_load.ask(&keys.reading, at, place.rows, part.k0, sizes.key_dim, carrier);
                writing_load.ask(&keys.writing, at, place.rows, part.k0, sizes.key_dim, carrier);
                d_outs_load.ask(do_, place.values(sizes), place.rows, part.v0, sizes.value_dim, carrier);
                let (square, side) = (place.scores(sizes, b), c.runtime());
                scores_load.ask(a, (square, side), side, 0, side, carrier);
                inverse_load.ask(t, (square, side), side, 0, side, carrier);
                weights_load.ask(g, beta, &keys.ends, &place, &part, sizes, carrier, w);
            }
            if turn > 1 {
                take_away_chunk::<I, E, N>(
                    &narrow,
                    &stage,
                    dstates,
                    dv,
                    &walk,
                    fresh((walk.chunks + 1 - turn) as u32) as usize,
                    other,
                    &part,
                    sizes,
                    carrier,
                    w,
                );
            }
            if turn < walk.chunks {
                queries_load.put::<E>(&mut queries, other * c, carrier);
                reading_load.put::<E>(&mut reading, other * c, carrier);
                writing_load.put::<E>(&mut writing, other * c, carrier);
                d_outs_load.put::<E>(&mut d_outs, other * c, carrier);
                scores_load.put::<E>(&mut scores, other * c, carrier);
                inverse_load.put::<E>(&mut inverse, other * c, carrier);
                weights.put(&weights_load, carrier, other, w);
            }
        }
        sync_cube();
    }
    if computes {
        let part = Part::of(this_cube(), sizes, w);
        leave_state(&dstate, d_initial, &part, part.v0 + col, sizes);
    }
}
