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
//! way while lanes wait for one another. Nothing is divided by a gate and no log-gates are subtracted from each other:
//! products of decays may underflow to 0, which is what they are.
//!
//! The result depends on the length of a segment, which is a constant of the map, and not on how many lanes or
//! channels a cube has: the carry is handed on segment by segment, whichever lane owns it. So the host may shape the
//! cubes by the size of the batch (few channels a cube and many lanes where there are few sequences), and a sequence
//! gives the same bits alone and in any batch, with any device's cube. (Gradients of parameters are sums over all
//! sequences; a lane sums over its tokens first, so their rounding alone depends on the shape.) This is also why time is not cut over cubes: that
//! reads everything twice, while cubes of 16 channels keep most of the 132 multiprocessors of an H100 busy from
//! `batch * channels = 1600` on.
//!
//! A factor of exactly 0 forgets also what is not finite (real recurrences): a reset document is not poisoned by its
//! neighbour.

use cubecl::prelude::*;

use super::map::{ElementMap, Inputs, Outputs, Plan};

/// Lanes divide by it: at most so many maps are fetched from shared memory before the carry needs the first.
pub(crate) const GROUP: usize = 8;

/// What a unit owns: a vector of channels of one sequence.
#[derive(CubeType, Clone, Copy)]
struct Place {
    start: usize,
    length: usize,
    channel: usize,
    channels: usize,
    /// Whether the channel exists.
    inside: bool,
}

#[cube]
impl Place {
    /// The token that the walk meets after `step` others.
    fn token(&self, step: usize, #[comptime] backward: bool) -> usize {
        if comptime!(backward) { self.start + self.length - 1 - step } else { self.start + step }
    }

    fn at(&self, token: usize) -> usize {
        token * self.channels + self.channel
    }

    fn has(&self, step: usize) -> bool {
        self.inside && step < self.length
    }
}

/// Starts the loads of a segment.
#[cube]
fn load<I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    place: &Place,
    first: usize,
    raw: &mut Array<Vector<I, N>>,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for j in 0..comptime!(plan.tokens) {
        let step = first + j;
        if place.has(step) {
            let at = place.at(place.token(step, plan.backward));
            #[unroll]
            for k in 0..comptime!(plan.inputs) {
                if comptime!(plan.backward && k < plan.planes) {
                    // The state before: the sequence's first token has none in `o`.
                    if step + 1 < place.length {
                        raw[j * plan.inputs + k] = inputs.tokens[k][at - place.channels];
                    }
                } else {
                    raw[j * plan.inputs + k] = inputs.tokens[k][at];
                }
            }
        }
    }
}

/// Forms the registers of a segment; tokens that do not exist get the identity.
#[cube]
fn prepare<M: ElementMap, I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    place: &Place,
    first: usize,
    raw: &Array<Vector<I, N>>,
    constants: &Array<Vector<f32, N>>,
    before: &Array<Vector<f32, N>>,
    kept: &mut Array<Vector<f32, N>>,
    #[comptime] plan: Plan,
) {
    let planes = comptime!(plan.planes);
    #[unroll]
    for j in 0..comptime!(plan.tokens) {
        let step = first + j;
        let base = comptime!(j * plan.kept);
        if place.has(step) {
            if comptime!(plan.backward) {
                #[unroll]
                for k in 0..planes {
                    kept[base + planes + k] = Vector::cast_from(raw[j * plan.inputs + planes + k]);
                    kept[base + 2 * planes + k] = Vector::cast_from(raw[j * plan.inputs + k]);
                    if step + 1 == place.length {
                        kept[base + 2 * planes + k] = before[k];
                    }
                }
            }
            M::prepare::<I, N>(inputs, place.token(step, plan.backward), raw, constants, kept, j, plan);
        } else {
            kept[base] = Vector::new(f32::new(1.0));
            #[unroll]
            for k in 1..2 * planes {
                kept[base + k] = Vector::new(f32::new(0.0));
            }
        }
    }
}

/// `x <- a x + b`, or `a x` alone, for numbers of one or two planes.
#[cube]
fn affine<N: Size>(
    x: &mut Array<Vector<f32, N>>,
    a_re: Vector<f32, N>,
    a_im: Vector<f32, N>,
    b_re: Vector<f32, N>,
    b_im: Vector<f32, N>,
    #[comptime] planes: usize,
) {
    if comptime!(planes == 1) {
        let zero = Vector::new(f32::new(0.0));
        x[0] = select_many(a_re.equal(&zero), b_re, a_re * x[0] + b_re);
    } else {
        let (re, im) = (x[0], x[1]);
        x[0] = a_re * re - a_im * im + b_re;
        x[1] = a_re * im + a_im * re + b_im;
    }
}

/// Takes the carry over token `j`, and leaves in `value` its state or, backwards, its `u`.
#[cube]
fn advance<N: Size>(
    kept: &Array<Vector<f32, N>>,
    carry: &mut Array<Vector<f32, N>>,
    value: &mut Array<Vector<f32, N>>,
    #[comptime] j: usize,
    #[comptime] plan: Plan,
) {
    let planes = comptime!(plan.planes);
    let (a, b) = comptime!((j * plan.kept, j * plan.kept + planes));
    let (a_im, b_im) = comptime!((a + planes - 1, b + planes - 1));
    if comptime!(plan.backward) {
        let zero = Vector::new(f32::new(0.0));
        #[unroll]
        for k in 0..planes {
            carry[k] += kept[b + k];
            value[k] = carry[k];
        }
        affine::<N>(carry, kept[a], kept[a_im], zero, zero, planes);
    } else {
        affine::<N>(carry, kept[a], kept[a_im], kept[b], kept[b_im], planes);
        #[unroll]
        for k in 0..planes {
            value[k] = carry[k];
        }
    }
}

/// Takes the carry over the maps of all lanes, and leaves in `shift` what each starts with.
#[cube]
fn hand_on<N: Size>(
    carry: &mut Array<Vector<f32, N>>,
    factor: &Shared<[Vector<f32, N>]>,
    shift: &mut Shared<[Vector<f32, N>]>,
    channel: usize,
    lanes: usize,
    width: usize,
    #[comptime] plan: Plan,
) {
    let (units, planes) = comptime!((plan.units, plan.planes));
    // Where the tokens take most registers, few are left for maps.
    let n = N::value().comptime();
    let group = comptime!(if planes * n == 1 { GROUP } else { 2 });
    let mut a = Array::<Vector<f32, N>>::new(comptime!(group * planes));
    let mut b = Array::<Vector<f32, N>>::new(comptime!(group * planes));
    for first in range_stepped(0, lanes, group) {
        #[unroll]
        for i in 0..group {
            #[unroll]
            for k in 0..planes {
                let at = k * units + (first + i) * width + channel;
                a[i * planes + k] = factor[at];
                b[i * planes + k] = shift[at];
            }
        }
        #[unroll]
        for i in 0..group {
            #[unroll]
            for k in 0..planes {
                shift[k * units + (first + i) * width + channel] = carry[k];
            }
            let (re, im) = comptime!((i * planes, i * planes + planes - 1));
            affine::<N>(carry, a[re], a[im], b[re], b[im], planes);
        }
    }
}

/// See the top of this file. `channels` and `width` count vectors; the cubes are numbered sequence by sequence.
#[cube(launch_unchecked, address_type = "dynamic")]
pub(crate) fn scan<M: ElementMap, I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    outputs: &mut Outputs<I, N>,
    sequences: usize,
    time: usize,
    channels: usize,
    lanes: usize,
    width: usize,
    #[comptime] plan: Plan,
    #[define(I)] _storage: cubecl::ir::ElemType,
) {
    let (units, planes) = comptime!((plan.units, plan.planes));
    let tiles = channels.div_ceil(width);
    let sequence = CUBE_POS / tiles;
    if sequence < sequences {
        let unit = UNIT_POS as usize;
        let lane = unit / width;
        let channel = (CUBE_POS % tiles) * width + unit % width;
        let mut start = sequence * time;
        let mut length = time;
        if comptime!(plan.packed) {
            start = inputs.bounds[0][sequence] as usize;
            length = inputs.bounds[0][sequence + 1] as usize - start;
        }
        let place = Place { start, length, channel, channels, inside: channel < channels };
        let state = sequence * channels + channel;

        let mut constants = Array::<Vector<f32, N>>::new(comptime!(plan.constants));
        let mut sums = Array::<Vector<f32, N>>::new(comptime!(plan.sums.max(1)));
        let mut before = Array::<Vector<f32, N>>::new(planes);
        let mut carry = Array::<Vector<f32, N>>::new(planes);
        let mut value = Array::<Vector<f32, N>>::new(planes);
        #[unroll]
        for k in 0..planes {
            carry[k] = Vector::new(f32::new(0.0));
            before[k] = Vector::new(f32::new(0.0));
        }
        #[unroll]
        for k in 0..comptime!(plan.sums) {
            sums[k] = Vector::new(f32::new(0.0));
        }
        if place.inside {
            M::constants::<I, N>(inputs, channel, &mut constants, plan);
            #[unroll]
            for k in 0..inputs.initial.len() {
                carry[k] = inputs.initial[k][state];
            }
            #[unroll]
            for k in 0..inputs.before.len() {
                before[k] = inputs.before[k][state];
            }
        }

        // The maps of the segments, `[planes, lanes, width]`; `shift` then holds what each segment starts with.
        let mut factor = Shared::<[Vector<f32, N>]>::new_slice(comptime!(planes * units));
        let mut shift = Shared::<[Vector<f32, N>]>::new_slice(comptime!(planes.max(plan.sums) * units));
        let mut raw = Array::<Vector<I, N>>::new(comptime!(plan.inputs * plan.tokens));
        let mut kept = Array::<Vector<f32, N>>::new(comptime!(plan.kept * plan.tokens));
        let mut local = Array::<Vector<f32, N>>::new(planes);
        let mut product = Array::<Vector<f32, N>>::new(planes);

        let block = lanes * plan.tokens;
        load::<I, N>(inputs, &place, lane * plan.tokens, &mut raw, plan);
        for number in 0..length.div_ceil(block) {
            let first = number * block + lane * plan.tokens;
            prepare::<M, I, N>(inputs, &place, first, &raw, &constants, &before, &mut kept, plan);
            load::<I, N>(inputs, &place, first + block, &mut raw, plan);
            let zero = Vector::new(f32::new(0.0));
            #[unroll]
            for k in 0..planes {
                local[k] = zero;
                product[k] = zero;
            }
            product[0] = Vector::new(f32::new(1.0));
            #[unroll]
            for j in 0..comptime!(plan.tokens) {
                let at = comptime!(j * plan.kept);
                advance::<N>(&kept, &mut local, &mut value, j, plan);
                affine::<N>(&mut product, kept[at], kept[at + planes - 1], zero, zero, planes);
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
            sync_cube();
            #[unroll]
            for k in 0..planes {
                local[k] = shift[k * units + unit];
            }
            #[unroll]
            for j in 0..comptime!(plan.tokens) {
                advance::<N>(&kept, &mut local, &mut value, j, plan);
                if place.has(first + j) {
                    let at = place.at(place.token(first + j, plan.backward));
                    M::emit::<I, N>(outputs, at, &value, &constants, &kept, &mut sums, j, plan);
                }
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
