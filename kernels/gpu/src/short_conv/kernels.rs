//! The convolution and its reverse, over segments of sequences.
//!
//! ```text
//! z_t = bias + sum_j w_j x_{t-(W-1)+j}      y_t = act(z_t)
//! dz_t = act'(z_t) dy_t      dx_p = sum_j w_j dz_{p+(W-1)-j}      dw_j = sum_t dz_t x_{t-(W-1)+j}      dbias = sum_t dz_t
//! ```
//! A unit walks a segment for a few channels, with the last `W` inputs in registers; backwards it goes on for `W - 1` tokens,
//! whose `dz` the last inputs of its segment need. Inputs of a sequence are counted from its state's first: input `W - 1` is that
//! of its first token. Sums over tokens leave each segment by themselves.

use cubecl::prelude::*;

use super::SEGMENT;
use crate::chunks::{Cut, Span};
use crate::scan::functions::bounded;
use thalweg_kernels::short_conv::Activation;

/// Inputs that a unit asks for at once.
const GROUP: usize = 8;

/// The compile-time key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Plan {
    pub width: usize,
    pub silu: bool,
    pub bias: bool,
    pub state: bool,
    /// Backwards, whether there is a gradient of the new state.
    pub d_new: bool,
}

impl Plan {
    pub fn new(width: usize, activation: Activation, [bias, state, d_new]: [bool; 3]) -> Self {
        Self { width, silu: activation == Activation::Silu, bias, state, d_new }
    }
}

#[derive(CubeType, Clone, Copy)]
struct Segment {
    first: usize,
    tokens: usize,
    /// Of the sequence, first token and the one after the last.
    start: usize,
    end: usize,
    sequence: usize,
}

#[cube]
impl Segment {
    fn of<I: Float, N: Size>(index: usize, inputs: &Inputs<I, N>) -> Segment {
        let span = Span::of_chunk(index, &inputs.cut, &inputs.table, SEGMENT);
        let (first, tokens) = span.tokens(index, SEGMENT);
        Segment { first, tokens, start: span.first_token, end: span.end, sequence: span.sequence }
    }
}

/// What both kernels read.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Inputs<I: Float, N: Size> {
    /// `[tokens, channels]`.
    pub x: Box<[Vector<I, N>]>,
    /// `[channels, width]`.
    pub weight: Box<[f32]>,
    /// `[channels]`.
    pub bias: Box<[f32]>,
    /// `[sequences, channels, width - 1]`.
    pub state: Box<[f32]>,
    pub table: Box<[u32]>,
    pub cut: Cut,
    pub channels: usize,
}

/// The weights of a unit's channels.
#[derive(CubeType)]
struct Taps<N: Size> {
    weights: Array<Vector<f32, N>>,
    bias: Vector<f32, N>,
}

#[cube]
impl<N: Size> Taps<N> {
    fn load<I: Float>(inputs: &Inputs<I, N>, d: usize, #[comptime] plan: Plan) -> Self {
        let mut weights = Array::<Vector<f32, N>>::new(plan.width);
        let mut bias = Vector::<f32, N>::new(f32::new(0.0));
        #[unroll]
        for j in 0..plan.width {
            let mut tap = Vector::<f32, N>::new(f32::new(0.0));
            #[unroll]
            for i in 0..N::value().comptime() {
                tap.insert(i, inputs.weight[(d + i) * plan.width + j]);
            }
            weights[j] = tap;
        }
        if comptime!(plan.bias) {
            #[unroll]
            for i in 0..N::value().comptime() {
                bias.insert(i, inputs.bias[d + i]);
            }
        }
        Taps::<N> { weights, bias }
    }

    /// `z`, of the last inputs, the oldest first.
    fn meet(&self, inputs: &Array<Vector<f32, N>>, #[comptime] plan: Plan) -> Vector<f32, N> {
        let mut sum = self.bias;
        #[unroll]
        for j in 0..plan.width {
            sum += self.weights[j] * inputs[j];
        }
        sum
    }
}

/// The `q`-th input of a sequence for `N` channels: of the state, then of the tokens; zero beyond the last.
#[cube]
fn input<I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    segment: &Segment,
    q: usize,
    d: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, N> {
    let before = comptime!(plan.width - 1);
    let mut value = Vector::<f32, N>::new(f32::new(0.0));
    if q >= before {
        let t = segment.start + q - before;
        if t < segment.end {
            value = Vector::cast_from(inputs.x[(t * inputs.channels + d) / N::value().comptime()]);
        }
    } else if comptime!(plan.state) {
        value = of_state::<N>(&inputs.state, segment, q, d, inputs.channels, plan);
    }
    value
}

/// The `q`-th of a state for `N` channels.
#[cube]
fn of_state<N: Size>(
    state: &[f32],
    segment: &Segment,
    q: usize,
    d: usize,
    channels: usize,
    #[comptime] plan: Plan,
) -> Vector<f32, N> {
    let mut value = Vector::<f32, N>::new(f32::new(0.0));
    #[unroll]
    for i in 0..N::value().comptime() {
        value.insert(i, state[state_at(segment, q, d + i, channels, plan)]);
    }
    value
}

#[cube]
fn state_at(segment: &Segment, q: usize, channel: usize, channels: usize, #[comptime] plan: Plan) -> usize {
    (segment.sequence * channels + channel) * comptime!(plan.width - 1) + q
}

/// Writes the `q`-th of a state for `N` channels.
#[cube]
fn set_state<N: Size>(
    out: &mut [f32],
    value: Vector<f32, N>,
    segment: &Segment,
    q: usize,
    d: usize,
    channels: usize,
    #[comptime] plan: Plan,
) {
    #[unroll]
    for i in 0..N::value().comptime() {
        out[state_at(segment, q, d + i, channels, plan)] = value.extract(i);
    }
}

/// Makes room for a new value after all others.
#[cube]
fn push<N: Size>(window: &mut Array<Vector<f32, N>>, value: Vector<f32, N>, #[comptime] width: usize) {
    #[unroll]
    for j in 1..width {
        window[comptime!(j - 1)] = window[j];
    }
    window[comptime!(width - 1)] = value;
}

#[cube]
fn empty<N: Size>(#[comptime] width: usize) -> Array<Vector<f32, N>> {
    let mut window = Array::<Vector<f32, N>>::new(width);
    #[unroll]
    for j in 0..width {
        window[j] = Vector::new(f32::new(0.0));
    }
    window
}

#[cube]
fn sigmoid<N: Size>(z: Vector<f32, N>) -> Vector<f32, N> {
    let one = Vector::<f32, N>::new(f32::new(1.0));
    one / (one + (-z).exp())
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(super) fn forward_kernel<I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    y: &mut [Vector<I, N>],
    new_state: &mut [f32],
    #[comptime] plan: Plan,
    #[define(I)] _storage: ElemType,
) {
    let n = N::value().comptime();
    let (width, vectors) = (plan.width, inputs.channels / n);
    if ABSOLUTE_POS >= inputs.cut.chunks * vectors {
        terminate!();
    }
    let (segment, d) = (Segment::of(ABSOLUTE_POS / vectors, inputs), ABSOLUTE_POS % vectors * n);
    let taps = Taps::<N>::load::<I>(inputs, d, plan);
    let mut window = empty::<N>(width);
    let (first, all) = (segment.first - segment.start, segment.tokens + comptime!(width - 1));
    for group in 0..all.div_ceil(GROUP) {
        let mut asked = Array::<Vector<f32, N>>::new(GROUP);
        #[unroll]
        for i in 0..GROUP {
            asked[i] = input::<I, N>(inputs, &segment, first + group * GROUP + i, d, plan);
        }
        #[unroll]
        for i in 0..GROUP {
            push::<N>(&mut window, asked[i], width);
            let at = group * GROUP + i;
            if at + 1 >= width && at < all {
                let z = taps.meet(&window, plan);
                let mut value = z;
                if comptime!(plan.silu) {
                    value = bounded::<N>(z, true, false) * sigmoid::<N>(z);
                }
                let t = segment.first + at - comptime!(width - 1);
                y[(t * inputs.channels + d) / n] = Vector::cast_from(value);
            }
        }
    }
    let length = segment.end - segment.start;
    if segment.first + segment.tokens == segment.end {
        #[unroll]
        for j in 0..comptime!(width - 1) {
            let last = input::<I, N>(inputs, &segment, length + j, d, plan);
            set_state::<N>(new_state, last, &segment, j.runtime(), d, inputs.channels, plan);
        }
    }
}

/// The gradients that leave a segment.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Gradients<I: Float, N: Size> {
    /// `[tokens, channels]`.
    pub dx: Box<[Vector<I, N>]>,
    /// `[segments, channels, width]`.
    pub dweight: Box<[f32]>,
    /// `[segments, channels]`.
    pub dbias: Box<[f32]>,
    /// `[sequences, channels, width - 1]`.
    pub dstate: Box<[f32]>,
}

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(super) fn backward_kernel<I: Float, N: Size>(
    inputs: &Inputs<I, N>,
    dy: &[Vector<I, N>],
    d_new_state: &[f32],
    out: &mut Gradients<I, N>,
    #[comptime] plan: Plan,
    #[define(I)] _storage: ElemType,
) {
    let n = N::value().comptime();
    let (width, before, vectors) = (plan.width, comptime!(plan.width - 1), inputs.channels / n);
    if ABSOLUTE_POS >= inputs.cut.chunks * vectors {
        terminate!();
    }
    let (index, d) = (ABSOLUTE_POS / vectors, ABSOLUTE_POS % vectors * n);
    let segment = Segment::of(index, inputs);
    let taps = Taps::<N>::load::<I>(inputs, d, plan);
    // The last inputs, and the last `dz`, the newest last too.
    let (mut window, mut slopes) = (empty::<N>(width), empty::<N>(width));
    let mut d_weights = empty::<N>(width);
    let mut d_bias = Vector::<f32, N>::new(f32::new(0.0));
    let (first, all) = (segment.first - segment.start, segment.tokens + 2 * before);
    let length = segment.end - segment.start;
    for group in 0..all.div_ceil(GROUP) {
        let mut asked = Array::<Vector<f32, N>>::new(GROUP);
        let mut asked_dy = Array::<Vector<f32, N>>::new(GROUP);
        #[unroll]
        for i in 0..GROUP {
            let at = group * GROUP + i;
            asked[i] = input::<I, N>(inputs, &segment, first + at, d, plan);
            asked_dy[i] = Vector::new(f32::new(0.0));
            if at >= before && segment.first + at - before < segment.end {
                asked_dy[i] = Vector::cast_from(dy[((segment.first + at - before) * inputs.channels + d) / n]);
            }
        }
        #[unroll]
        for i in 0..GROUP {
            let at = group * GROUP + i;
            push::<N>(&mut window, asked[i], width);
            if at >= before && at < all {
                let mut slope = asked_dy[i];
                if comptime!(plan.silu) {
                    let z = taps.meet(&window, plan);
                    let (s, one) = (sigmoid::<N>(z), Vector::<f32, N>::new(f32::new(1.0)));
                    slope *= s + bounded::<N>(z, true, true) * s * (one - s);
                    // Behind the end there is no output, and its zero would not hide a slope that is NaN.
                    if segment.first + at - before >= segment.end {
                        slope = Vector::new(f32::new(0.0));
                    }
                }
                push::<N>(&mut slopes, slope, width);
                if at - before < segment.tokens {
                    d_bias += slope;
                    #[unroll]
                    for j in 0..width {
                        d_weights[j] += slope * window[j];
                    }
                }
                // Of the input `W - 1` before this one, all that it met has come by.
                let mut value = Vector::<f32, N>::new(f32::new(0.0));
                #[unroll]
                for j in 0..width {
                    value += taps.weights[j] * slopes[comptime!(width - 1 - j)];
                }
                let q = first + at - before;
                if comptime!(plan.d_new) {
                    if q >= length {
                        value += of_state::<N>(d_new_state, &segment, q - length, d, inputs.channels, plan);
                    }
                }
                if at >= 2 * before {
                    let t = segment.first + at - 2 * before;
                    out.dx[(t * inputs.channels + d) / n] = Vector::cast_from(value);
                } else if first == 0 {
                    set_state::<N>(&mut out.dstate, value, &segment, q, d, inputs.channels, plan);
                }
            }
        }
    }
    #[unroll]
    for i in 0..n {
        let channel = index * inputs.channels + d + i;
        out.dbias[channel] = d_bias.extract(i);
        #[unroll]
        for j in 0..width {
            out.dweight[channel * width + j] = d_weights[j].extract(i);
        }
    }
}
