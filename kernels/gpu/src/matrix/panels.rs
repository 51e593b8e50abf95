//! The state passes where a plane computes by itself ([`Panel`]), which is [`super::state`] and [`super::state_backward`]
//! with another division of the work.
//!
//! A plane holds the state of 8 or 16 value features in registers, and all that follows from it is products from the left:
//! for the delta rule
//!
//! ```text
//! x = T (v - Diag(e^{c}) k S)        S' = e^{c_n} S + k^T Diag(beta e^{c_n - c}) x
//! ```
//! so it waits for no other plane. Other planes bring the next chunk's tensors into one half of each tile while the other
//! half is computed with, and take away what was computed in the chunk before: one barrier for a chunk.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind, WalkBlueprint};
use super::decay::RowGates;
use super::place::{Place, Sizes, Walk};
use super::state::Part;
use crate::tile::{Panel, Tile, WARP};
use crate::transfer::{Shape, store_as};

/// Units of a cube that bring and take away.
pub(crate) const CARRIERS: usize = 128;

impl WalkBlueprint {
    /// Units that compute.
    pub fn computing(&self) -> usize {
        self.value_block / self.panel() * WARP
    }

    /// Value features of a plane that computes. The fewer, the shorter is its chain of products; four planes are enough to
    /// keep a multiprocessor's matrix units busy.
    pub fn panel(&self) -> usize {
        (self.value_block / 4).max(8)
    }

    /// A tile, as the carriers see it.
    pub fn carried(&self, rows: usize, cols: usize) -> Shape {
        Shape { rows, cols, units: CARRIERS }
    }
}

/// Two tiles of as many rows, one below the other.
#[cube]
pub(crate) fn twice<E: Float>(
    #[comptime] rows: usize,
    #[comptime] cols: usize,
    #[comptime] wanted: bool,
    #[comptime] b: Blueprint,
) -> Tile<E> {
    Tile::<E>::new(comptime!(if wanted { 2 * rows } else { 1 }), cols, comptime!(b.operand_padding()))
}

/// The small tensors of two chunks.
#[derive(CubeType)]
pub(crate) struct Weights {
    /// By token, under scalar gates.
    from_start: Shared<[f32]>,
    to_end: Shared<[f32]>,
    /// By token, with the delta rule.
    steps: Shared<[f32]>,
    /// `e^{c_n}` by key feature, under gates per key feature.
    ends: Shared<[f32]>,
}

/// Which weights of tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Of {
    FromStart,
    ToEnd,
    Steps,
}

/// The small tensors of a chunk on their way.
#[derive(CubeType)]
pub(crate) struct WeightsAhead {
    gates: RowGates,
    step: f32,
    ends: Array<f32>,
}

#[cube]
impl Weights {
    pub fn new(#[comptime] w: WalkBlueprint) -> Weights {
        let (head, key) = comptime!((w.chunk.gate == GateKind::HEAD, w.chunk.gate == GateKind::KEY));
        let tokens = comptime!(2 * w.chunk.chunk);
        Weights {
            from_start: Shared::new_slice(comptime!(if head { tokens } else { 1 })),
            to_end: Shared::new_slice(comptime!(if head { tokens } else { 1 })),
            steps: Shared::new_slice(comptime!(if w.chunk.delta { tokens } else { 1 })),
            ends: Shared::new_slice(comptime!(if key { 2 * w.rows() } else { 1 })),
        }
    }

    /// Puts what a carrier has asked for.
    pub fn put(&mut self, ahead: &WeightsAhead, carrier: usize, half: usize, #[comptime] w: WalkBlueprint) {
        let b = comptime!(w.chunk);
        if comptime!(b.gate == GateKind::HEAD) {
            if carrier / WARP < comptime!(b.chunk.div_ceil(WARP)) {
                let (from_start, to_end) = ahead.gates.weights(carrier / WARP, b);
                if carrier < b.chunk {
                    self.from_start[half * b.chunk + dealt(carrier, b.chunk)] = from_start;
                    self.to_end[half * b.chunk + dealt(carrier, b.chunk)] = to_end;
                }
            }
        }
        if comptime!(b.delta) {
            if carrier < b.chunk {
                self.steps[half * b.chunk + dealt(carrier, b.chunk)] = ahead.step;
            }
        }
        if comptime!(b.gate == GateKind::KEY) {
            #[unroll]
            for j in 0..comptime!(w.rows().div_ceil(CARRIERS)) {
                let k = carrier + comptime!(j * CARRIERS);
                if k < comptime!(w.rows()) {
                    self.ends[half * comptime!(w.rows()) + dealt(k, w.rows())] = ahead.ends[j];
                }
            }
        }
    }

    /// `panel *= factor` and the weights of its rows, tokens of the chunk in `half`.
    pub fn weigh(&self, panel: &mut Panel, factor: f32, half: usize, #[comptime] of: Of, #[comptime] b: Blueprint) {
        let weighed = comptime!(match of {
            Of::Steps => b.delta,
            Of::FromStart | Of::ToEnd => b.gate == GateKind::HEAD,
        });
        let first = half * b.chunk + dealt(panel.first().0, b.chunk);
        #[unroll]
        for i in 0..comptime!(panel.rows / 8) {
            let mut weight = factor;
            if comptime!(weighed) {
                weight *= match comptime!(of) {
                    Of::FromStart => self.from_start[first + i],
                    Of::ToEnd => self.to_end[first + i],
                    Of::Steps => self.steps[first + i],
                };
            }
            panel.weigh(i, weight);
        }
    }

    /// `state = e^{c_n} state`.
    pub fn decay(&self, state: &mut Panel, half: usize, #[comptime] w: WalkBlueprint) {
        let b = comptime!(w.chunk);
        if comptime!(b.gate != GateKind::None) {
            let first = half * comptime!(w.rows()) + dealt(state.first().0, w.rows());
            #[unroll]
            for i in 0..comptime!(state.rows / 8) {
                let factor = if comptime!(b.gate == GateKind::HEAD) {
                    self.from_start[half * b.chunk + comptime!(b.chunk - 1)]
                } else {
                    self.ends[first + i]
                };
                state.weigh(i, factor);
            }
        }
    }
}

/// Where the weight of a row is: those of one unit, whose rows lie 8 apart, are side by side.
#[cube]
fn dealt(row: usize, #[comptime] rows: usize) -> usize {
    row % 8 * comptime!(rows / 8) + row / 8
}

#[cube]
impl WeightsAhead {
    pub fn new(#[comptime] w: WalkBlueprint) -> WeightsAhead {
        WeightsAhead {
            gates: RowGates::new(w.chunk),
            step: f32::new(0.0),
            ends: Array::new(comptime!(w.rows().div_ceil(CARRIERS))),
        }
    }

    /// Asks for those of the chunk at `place`.
    pub fn ask(
        &mut self,
        g: &[f32],
        beta: &[f32],
        ends: &[f32],
        place: &Place,
        part: &Part,
        sizes: &Sizes,
        carrier: usize,
        #[comptime] w: WalkBlueprint,
    ) {
        let b = comptime!(w.chunk);
        self.gates.ask_all(g, place, sizes, b);
        if comptime!(b.delta) {
            let (at, stride) = place.scalars(sizes);
            self.step = f32::new(0.0);
            if carrier < place.rows {
                self.step = beta[at + carrier * stride];
            }
        }
        if comptime!(b.gate == GateKind::KEY) {
            #[unroll]
            for j in 0..comptime!(w.rows().div_ceil(CARRIERS)) {
                let k = part.k0 + carrier + comptime!(j * CARRIERS);
                self.ends[j] = f32::new(0.0);
                if k < sizes.key_dim {
                    self.ends[j] = ends[place.ends(sizes) + k];
                }
            }
        }
    }
}

/// Takes a state, or zeros where `present` is not; the plane has the value features from `v0` on.
#[cube]
pub(crate) fn take_state(
    state: &mut Panel,
    x: &[f32],
    part: &Part,
    v0: usize,
    sizes: &Sizes,
    #[comptime] present: bool,
) {
    if comptime!(present) {
        let first = state.first();
        #[unroll]
        for i in 0..state.pairs() {
            let (down, right) = state.offset(i);
            let (k, v) = (part.k0 + first.0 + down, v0 + first.1 + right);
            let mut pair = Vector::<f32, Const<2>>::new(f32::new(0.0));
            #[unroll]
            for j in 0..2 {
                if k < sizes.key_dim && v + j < sizes.value_dim {
                    pair.insert(j, x[part.state(sizes) + k * sizes.value_dim + v + j]);
                }
            }
            state.set(i, pair);
        }
    }
}

/// Writes a state.
#[cube]
pub(crate) fn leave_state(state: &Panel, out: &mut [f32], part: &Part, v0: usize, sizes: &Sizes) {
    let first = state.first();
    #[unroll]
    for i in 0..state.pairs() {
        let (down, right) = state.offset(i);
        let (k, v) = (part.k0 + first.0 + down, v0 + first.1 + right);
        #[unroll]
        for j in 0..2 {
            if k < sizes.key_dim && v + j < sizes.value_dim {
                out[part.state(sizes) + k * sizes.value_dim + v + j] = state.get(i).extract(j);
            }
        }
    }
}

/// Writes what a chunk left in a half of the tiles: the state, and with the delta rule rows of values.
#[cube]
pub(crate) fn take_away_chunk<I: Float, E: Float, N: Size>(
    narrow: &Tile<E>,
    stage: &Tile<E>,
    states: &mut [Vector<E, N>],
    values: &mut [Vector<I, N>],
    walk: &Walk,
    chunk: usize,
    half: usize,
    part: &Part,
    sizes: &Sizes,
    carrier: usize,
    #[comptime] w: WalkBlueprint,
) {
    let place = walk.place(sizes, chunk, part.head, w.chunk);
    let at = (place.state(sizes) + part.k0 * sizes.value_dim, sizes.value_dim);
    let rows = sizes.key_dim - part.k0;
    let shape = comptime!(w.carried(w.rows(), w.value_block));
    store_as::<E, E, N>(carrier, narrow, half * shape.rows, states, at, rows, part.v0, sizes.value_dim, shape);
    if comptime!(w.chunk.delta) {
        let (at, shape) = (place.values(sizes), comptime!(w.carried(w.chunk.chunk, w.value_block)));
        store_as::<I, E, N>(carrier, stage, half * shape.rows, values, at, place.rows, part.v0, sizes.value_dim, shape);
    }
}
