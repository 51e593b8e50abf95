//! One pass over memory for every element-wise recurrence, forwards in time or backwards.
//!
//! ```text
//! forward    h_t = a_t h_{t-1} + b_t
//! backward   u_t = d_t + c_{t+1},   c_t = conj(a_t) u_t        (d: cotangent of h, c_t: what flows into h_{t-1})
//! ```
//!
//! Both are affine maps of a carried number (real, or complex in two planes), one after another in the order of the
//! walk. What `a` and `b` are, and what becomes of `h` or `u`, is an [`ElementMap`]'s.
//!
//! A cube owns `width` channels (or pairs of them) of one sequence. It walks over time in blocks; in a block, unit
//! `(lane, channel)` owns the segment of [`Plan::tokens`] consecutive tokens number `lane`:
//!
//! 1. it forms `a` and `b` of its tokens in registers, and composes them to one map `(A, B)` of its segment;
//! 2. the first lane walks over the maps, `carry <- A carry + B`, and leaves in shared memory what each segment starts
//!    with;
//! 3. each unit walks over its registers again, now from its carry, and writes.
//!
//! So each element is read once and written once, the carry stays on chip, and the loads of the next block are under
//! way while lanes wait for one another: all of them, for they stand in no branch and nobody looks at what they bring
//! before its block is due. Nothing is divided by a gate and no log-gates are subtracted from each other:
//! products of decays may underflow to 0, which is what they are.
//!
//! The result depends on the length of a segment, which is a constant of the map, and not on how many lanes or
//! channels a cube has: the carry is handed on segment by segment, whichever lane owns it. So the host may shape the
//! cubes by the size of the batch (few channels a cube and many lanes where there are few sequences), and a sequence
//! gives the same bits alone and in any batch, with any device's cube. (Gradients of parameters are sums over all
//! sequences; a lane sums over its tokens first, so their rounding alone depends on the shape.) This is also why time is
//! not cut over cubes: that reads everything twice, while cubes of 16 channels keep most of the 132 multiprocessors of an
//! H100 busy from `batch * channels = 1600` on.
//!
//! A map cannot stand for its segment where the factors multiply a state by much (see [`MAX_GROWTH`]): lanes that have such
//! a one say so, and the cube hands the carry on once more, lane by lane, over the tokens of those segments and the maps of
//! the others. So the result depends on a segment's own numbers alone, in this too.
//!
//! A factor of exactly 0 forgets also what is not finite, where a map asks for it ([`Plan::forgets`]): a reset document is not
//! poisoned by its neighbour.

use cubecl::prelude::*;

use super::carry::{advance, compose, hand_on, take_turns};
use super::map::{ElementMap, Inputs, Outputs, Plan, numbers};
use thalweg_kernels::MAX_GROWTH;

/// What a unit owns: a vector of channels of one sequence.
#[derive(CubeType, Clone, Copy)]
struct Place {
    start: usize,
    length: usize,
    /// A channel that exists, the unit's own if that does.
    channel: usize,
    channels: usize,
    /// Whether the unit's own does.
    inside: bool,
}

#[cube]
impl Place {
    /// The token that the walk meets after `step` others.
    fn token(&self, step: usize, #[comptime] backward: bool) -> usize {
        if comptime!(backward) { self.start + self.length - 1 - step } else { self.start + step }
    }

    fn at(&self, step: usize, #[comptime] backward: bool) -> usize {
        self.token(step, backward) * self.channels + self.channel
    }

    /// `step`, or the last one if that is too far.
    fn near(&self, step: usize) -> usize {
        step.min(self.length - 1)
    }

    fn has(&self, step: usize) -> bool {
        self.inside && step < self.length
    }
}

/// A segment on its way.
#[derive(CubeType)]
struct Ahead<W: Numeric> {
    /// By token and input.
    words: Array<W>,
    /// By token.
    resets: Array<f32>,
}

#[cube]
impl<W: Numeric> Ahead<W> {
    fn new(#[comptime] plan: Plan) -> Self {
        Ahead::<W> { words: Array::new(comptime!(plan.inputs * plan.tokens)), resets: Array::new(plan.tokens) }
    }

    /// Asks for a segment. What lies outside of the sequence is asked for elsewhere inside: a branch would have to wait for
    /// what it asks for, one token after another.
    fn ask<I: Float, N: Size>(
        &mut self,
        inputs: &Inputs<W, I, N>,
        place: &Place,
        first: usize,
        #[comptime] plan: Plan,
    ) {
        #[unroll]
        for j in 0..comptime!(plan.tokens) {
            let step = place.near(first + j);
            let at = place.at(step, plan.backward);
            #[unroll]
            for k in 0..comptime!(plan.inputs) {
                if comptime!(plan.backward && k < plan.planes) {
                    // The state before.
                    self.words[j * plan.inputs + k] = inputs.tokens[k][place.at(place.near(first + j + 1), true)];
                } else {
                    self.words[j * plan.inputs + k] = inputs.tokens[k][at];
                }
            }
            #[unroll]
            for k in 0..inputs.reset.len() {
                self.resets[j] = inputs.reset[k][place.token(step, plan.backward)];
            }
        }
    }

    /// Forms the registers of the segment; tokens that do not exist get the identity.
    fn prepare<M: ElementMap, I: Float, N: Size>(
        &self,
        place: &Place,
        first: usize,
        constants: &Array<Vector<f32, N>>,
        before: &Array<Vector<f32, N>>,
        kept: &mut Array<Vector<f32, N>>,
        #[comptime] plan: Plan,
    ) {
        let planes = comptime!(plan.planes);
        #[unroll]
        for j in 0..comptime!(plan.tokens) {
            let (from, to) = comptime!((j * plan.inputs, j * plan.kept));
            if comptime!(plan.backward) {
                #[unroll]
                for k in 0..planes {
                    kept[to + planes + k] = numbers::<W, I, N>(self.words[from + planes + k]);
                    kept[to + 2 * planes + k] = numbers::<W, I, N>(self.words[from + k]);
                }
            }
            M::prepare::<W, I, N>(&self.words, &self.resets, constants, kept, j, plan);
        }
        if first + comptime!(plan.tokens) >= place.length {
            #[unroll]
            for j in 0..comptime!(plan.tokens) {
                let to = comptime!(j * plan.kept);
                if first + j >= place.length {
                    kept[to] = Vector::new(f32::new(1.0));
                    #[unroll]
                    for k in 1..2 * planes {
                        kept[to + k] = Vector::new(f32::new(0.0));
                    }
                }
                if comptime!(plan.backward) && first + j + 1 == place.length {
                    #[unroll]
                    for k in 0..planes {
                        kept[to + 2 * planes + k] = before[k];
                    }
                }
            }
        }
    }
}

/// Walks over a segment from its carry and writes; without asking what exists if it is `whole`.
#[cube]
fn finish<M: ElementMap, I: Float, N: Size>(
    outputs: &mut Outputs<I, N>,
    place: &Place,
    first: usize,
    carry: &mut Array<Vector<f32, N>>,
    constants: &Array<Vector<f32, N>>,
    kept: &Array<Vector<f32, N>>,
    sums: &mut Array<Vector<f32, N>>,
    #[comptime] whole: bool,
    #[comptime] plan: Plan,
) {
    let mut value = Array::<Vector<f32, N>>::new(plan.planes);
    #[unroll]
    for j in 0..comptime!(plan.tokens) {
        advance::<N>(kept, carry, &mut value, j, plan);
        if comptime!(whole) || place.has(first + j) {
            let at = place.at(first + j, plan.backward);
            M::emit::<I, N>(outputs, at, &value, constants, kept, sums, j, plan);
        }
    }
}

/// See the top of this file. `channels` and `width` count vectors; the cubes are numbered sequence by sequence.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn scan<M: ElementMap, W: Numeric, I: Float, N: Size>(
    inputs: &Inputs<W, I, N>,
    outputs: &mut Outputs<I, N>,
    sequences: usize,
    time: usize,
    channels: usize,
    lanes: usize,
    width: usize,
    #[comptime] plan: Plan,
    #[define(W)] _word: cubecl::ir::ElemType,
    #[define(I)] _storage: cubecl::ir::ElemType,
) {
    let (units, planes) = comptime!((plan.units, plan.planes));
    let tiles = channels.div_ceil(width);
    let sequence = CUBE_POS / tiles;
    if sequence < sequences {
        let unit = UNIT_POS as usize;
        let lane = unit / width;
        let own = (CUBE_POS % tiles) * width + unit % width;
        let channel = own.min(channels - 1);
        let mut start = sequence * time;
        let mut length = time;
        if comptime!(plan.packed) {
            start = inputs.bounds[0][sequence] as usize;
            length = inputs.bounds[0][sequence + 1] as usize - start;
        }
        let place = Place { start, length, channel, channels, inside: own < channels };
        let state = sequence * channels + channel;

        let mut constants = Array::<Vector<f32, N>>::new(comptime!(plan.constants));
        let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.sums.max(1)));
        let mut before = Array::<Vector<f32, N>>::new(planes);
        let mut carry = Array::<Vector<f32, N>>::new(planes);
        #[unroll]
        for k in 0..planes {
            carry[k] = Vector::new(f32::new(0.0));
            before[k] = Vector::new(f32::new(0.0));
        }
        #[unroll]
        for k in 0..comptime!(plan.sums) {
            sums[k] = Vector::new(f32::new(0.0));
        }
        M::constants::<W, I, N>(inputs, channel, &mut constants, plan);
        #[unroll]
        for k in 0..inputs.initial.len() {
            carry[k] = inputs.initial[k][state];
        }
        #[unroll]
        for k in 0..inputs.before.len() {
            before[k] = inputs.before[k][state];
        }

        // The maps of the segments, `[planes, lanes, width]`; `shift` then holds what each segment starts with.
        let mut factor = Shared::<[Vector<f32, N>]>::new_slice(comptime!(planes * units));
        let mut shift = Shared::<[Vector<f32, N>]>::new_slice(comptime!(planes.max(plan.sums) * units));
        let mut ahead = Ahead::<W>::new(plan);
        let mut kept = Array::<Vector<f32, N>>::new(comptime!(plan.kept * plan.tokens));
        let mut local = Array::<Vector<f32, N>>::new(planes);
        let mut product = Array::<Vector<f32, N>>::new(planes);
        // The number of the last block, from 1 on, in which a map did not stand for its segment, for even and odd ones: while
        // some units still read the one, others may write the other.
        let mut trouble = Shared::<[u32]>::new_slice(2usize);
        if comptime!(plan.grows) {
            if unit == 0 {
                trouble[0] = 0;
                trouble[1] = 0;
            }
            sync_cube();
        }

        let block = lanes * plan.tokens;
        if length > 0 {
            ahead.ask::<I, N>(inputs, &place, lane * plan.tokens, plan);
        }
        for number in 0..length.div_ceil(block) {
            let first = number * block + lane * plan.tokens;
            ahead.prepare::<M, I, N>(&place, first, &constants, &before, &mut kept, plan);
            ahead.ask::<I, N>(inputs, &place, first + block, plan);
            let growth = compose::<N>(&kept, &mut product, &mut local, plan);
            if comptime!(plan.grows) {
                #[unroll]
                for i in 0..N::value().comptime() {
                    if !(growth.extract(i) <= f32::new(MAX_GROWTH)) {
                        trouble[number % 2] = number as u32 + 1;
                    }
                }
            }
            #[unroll]
            for k in 0..planes {
                factor[k * units + unit] = product[k];
                shift[k * units + unit] = local[k];
            }
            sync_cube();
            if lane == 0 {
                hand_on::<N>(&mut carry, &factor, &mut shift, unit, lanes, width, plan);
            }
            if comptime!(plan.grows) {
                // A barrier, and whether all units take the branch, for those who check that.
                let last = workgroup_uniform_load::<u32>(&trouble[number % 2]);
                if last == number as u32 + 1 {
                    take_turns::<N>(&kept, &product, &local, growth, &mut factor, &mut shift, unit, lanes, width, plan);
                    if lane == 0 {
                        carry[0] = factor[unit];
                    }
                }
            } else {
                sync_cube();
            }
            #[unroll]
            for k in 0..planes {
                local[k] = shift[k * units + unit];
            }
            if place.has(first + comptime!(plan.tokens - 1)) {
                finish::<M, I, N>(outputs, &place, first, &mut local, &constants, &kept, &mut sums, true, plan);
            } else {
                finish::<M, I, N>(outputs, &place, first, &mut local, &constants, &kept, &mut sums, false, plan);
            }
        }

        if comptime!(plan.sums > 0) {
            // Lanes in order.
            #[unroll]
            for k in 0..comptime!(plan.sums) {
                shift[k * units + unit] = sums[k];
            }
            sync_cube();
            if lane == 0 && place.inside {
                #[unroll]
                for k in 0..comptime!(plan.sums) {
                    for l in 1..lanes {
                        sums[k] += shift[k * units + l * width + unit];
                    }
                    outputs.sums.index_mut(k)[state] = sums[k];
                }
            }
        }
        if lane == 0 && place.inside {
            #[unroll]
            for k in 0..planes {
                outputs.last.index_mut(k)[state] = carry[k];
            }
        }
    }
}

/// Adds the sums of the sequences, in order, to `[channels]`.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn total<O: Float>(
    sums: &[f32],
    out: &mut [O],
    sequences: usize,
    channels: usize,
    #[define(O)] _storage: cubecl::ir::ElemType,
) {
    let channel = ABSOLUTE_POS;
    if channel < channels {
        let mut sum = f32::new(0.0);
        for sequence in 0..sequences {
            sum += sums[sequence * channels + channel];
        }
        out[channel] = O::cast_from(sum);
    }
}
