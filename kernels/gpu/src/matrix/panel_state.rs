//! Stage 2 by planes that compute by themselves; see [`super::panels`].

use cubecl::prelude::*;

use super::ahead::WalkedKeys;
use super::blueprint::{GateKind, WalkBlueprint};
use super::panels::{Of, Weights, WeightsAhead, leave_state, take_away_chunk, take_state, twice};
use super::place::{Sizes, Walk};
use super::state::Part;
use crate::tile::{Left, Panel, WARP, fresh, this_cube, unit};
use crate::transfer::Flight;

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn panel_state_kernel<I: Float, E: Float, N: Size>(
    keys: &WalkedKeys<I, N>,
    v: &[Vector<I, N>],
    g: &[f32],
    beta: &[f32],
    t: &[Vector<E, N>],
    initial_state: &[f32],
    table: &[u32],
    x_out: &mut [Vector<I, N>],
    states: &mut [Vector<E, N>],
    final_state: &mut [f32],
    sizes: &Sizes,
    #[comptime] has_initial: bool,
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
    let key_wise = comptime!(b.gate == GateKind::KEY);
    let reads = comptime!(b.delta || !key_wise);
    let mut reading = twice::<E>(c, rows, reads, b);
    let mut writing = if comptime!(key_wise) { twice::<E>(c, rows, true, b) } else { reading.alias() };
    let mut values = twice::<E>(c, d, true, b);
    let mut square = twice::<E>(c, c, b.delta, b);
    let mut stage = twice::<E>(c, d, b.delta, b);
    let mut narrow = twice::<E>(rows, d, true, b);
    let mut weights = Weights::new(w);

    let computes = unit() < comptime!(w.computing());
    // Of a plane that computes: its columns of the tiles.
    let col = unit() / WARP * cols;
    let mut state = Panel::new(rows, cols);
    if computes {
        take_state(&mut state, initial_state, &part, part.v0 + col, sizes, has_initial);
    }
    // One more: before the first chunk, and after the last, there is only carrying.
    for turn in 0..walk.chunks + 2 {
        let (half, other) = ((turn + 1) % 2, turn % 2);
        if computes {
            if turn > 0 && turn <= walk.chunks {
                let (at, state_at) = (half * c, half * rows);
                state.put::<E>(&mut narrow, state_at, col);
                if comptime!(b.delta) {
                    let mut u = Panel::new(c, cols);
                    u.take::<E>(&values, at, col);
                    sync_plane();
                    let mut x = Panel::new(c, cols);
                    x.add::<E>(&reading, at, &narrow, (state_at, col), Left::PLAIN, rows);
                    weights.weigh(&mut x, f32::new(1.0), half, Of::FromStart, b);
                    #[unroll]
                    for i in 0..u.pairs() {
                        u.set(i, u.get(i) - x.get(i));
                    }
                    u.put::<E>(&mut values, at, col);
                    sync_plane();
                    x.clear();
                    x.add::<E>(&square, at, &values, (at, col), Left::LOWER, c);
                    x.put::<E>(&mut stage, at, col);
                    weights.weigh(&mut x, f32::new(1.0), half, Of::Steps, b);
                    weights.weigh(&mut x, f32::new(1.0), half, Of::ToEnd, b);
                    x.put::<E>(&mut values, at, col);
                    sync_plane();
                } else {
                    if comptime!(b.gate == GateKind::HEAD) {
                        let mut u = Panel::new(c, cols);
                        u.take::<E>(&values, at, col);
                        sync_plane();
                        weights.weigh(&mut u, f32::new(1.0), half, Of::ToEnd, b);
                        u.put::<E>(&mut values, at, col);
                        sync_plane();
                    }
                }
                weights.decay(&mut state, half, w);
                state.add::<E>(&writing, at, &values, (at, col), Left::TRANSPOSED, c);
            }
        } else {
            let carrier = unit() - comptime!(w.computing());
            let mut reading_load = Flight::<I, N>::new(comptime!(w.carried(c, rows)), reads);
            let mut writing_load = Flight::<I, N>::new(comptime!(w.carried(c, rows)), key_wise);
            let mut values_load = Flight::<I, N>::new(comptime!(w.carried(c, d)), true);
            let mut square_load = Flight::<E, N>::new(comptime!(w.carried(c, c)), b.delta);
            let mut weights_load = WeightsAhead::new(w);
            if turn < walk.chunks {
                let place = walk.place(sizes, turn, part.head, b);
                let at = place.walked_keys(sizes, b);
                reading_load.ask(&keys.reading, at, place.rows, part.k0, sizes.key_dim, carrier);
                writing_load.ask(&keys.writing, at, place.rows, part.k0, sizes.key_dim, carrier);
                values_load.ask(v, place.values(sizes), place.rows, part.v0, sizes.value_dim, carrier);
                let side = c.runtime();
                square_load.ask(t, (place.scores(sizes, b), side), side, 0, side, carrier);
                weights_load.ask(g, beta, &keys.ends, &place, &part, sizes, carrier, w);
            }
            if turn > 1 {
                take_away_chunk::<I, E, N>(
                    &narrow,
                    &stage,
                    states,
                    x_out,
                    &walk,
                    fresh((turn - 2) as u32) as usize,
                    other,
                    &part,
                    sizes,
                    carrier,
                    w,
                );
            }
            if turn < walk.chunks {
                reading_load.put::<E>(&mut reading, other * c, carrier);
                writing_load.put::<E>(&mut writing, other * c, carrier);
                values_load.put::<E>(&mut values, other * c, carrier);
                square_load.put::<E>(&mut square, other * c, carrier);
                weights.put(&weights_load, carrier, other, w);
            }
        }
        sync_cube();
    }
    if computes {
        let part = Part::of(this_cube(), sizes, w);
        leave_state(&state, final_state, &part, part.v0 + col, sizes);
    }
}
