//! Loops of the short convolution. Time is cut into fixed runs, so that sums over it do not depend on the threads; a
//! task keeps the last rows of its channel slice in a ring in L1.

use super::{
    plan::{Task, each},
    rows::{Aligned, BLOCK, Block, Output, Rows, block, fence, prefetch},
    simd::{self, silu_with_slope, vectorize, widen},
    tile::Shared,
};
use crate::{
    element::Element,
    sequences::Sequences,
    short_conv::{Activation, ConvGradients, ConvInputs, ConvOutputs, ConvProblem},
};

/// Tokens of a task.
const RUN: usize = 256;
/// Channels of a task: its ring of [`RING`] rows stays in L1.
const WIDTH: usize = 512;
/// Rows of a ring, a power of two and at least the largest width.
const RING: usize = 8;

type Ring = [Block; RING];

/// Fixed runs of every sequence, in slices of the channels.
fn tasks(sequences: &Sequences, channels: usize) -> Vec<Task> {
    let mut tasks = Vec::new();
    for sequence in 0..sequences.count() {
        let tokens = sequences.range(sequence);
        for t in tokens.clone().step_by(RUN) {
            for c in (0..channels).step_by(WIDTH) {
                let (tokens, channels) = (t..(t + RUN).min(tokens.end), c..(c + WIDTH).min(channels));
                tasks.push(Task { sequence, tokens, channels });
            }
        }
    }
    tasks
}

/// One convolution as its loops see it: what is before a sequence's first token is in the state.
struct Conv<'a, E, const W: usize> {
    sequences: &'a Sequences,
    problem: &'a ConvProblem,
    inputs: &'a ConvInputs<'a, E>,
}

/// The parameters of a task's channels, `[blocks][taps]`; tap `k` meets the token `k` steps back.
struct Taps<const W: usize> {
    weight: Vec<[Block; W]>,
    bias: Vec<Block>,
}

impl<E: Element, const W: usize> Conv<'_, E, W> {
    fn taps(&self, task: &Task) -> Taps<W> {
        let blocks = task.channels.len().div_ceil(BLOCK);
        let mut taps = Taps { weight: vec![[[0.0; BLOCK]; W]; blocks], bias: vec![[0.0; BLOCK]; blocks] };
        for (i, d) in task.channels.clone().enumerate() {
            for k in 0..W {
                taps.weight[i / BLOCK][k][i % BLOCK] = self.inputs.weight[d * W + W - 1 - k];
            }
            taps.bias[i / BLOCK][i % BLOCK] = self.inputs.bias.map_or(0.0, |b| b[d]);
        }
        taps
    }

    /// The element of a `[sequences, channels, W - 1]` state that stands for the token `back >= 1` before the first.
    fn state_index(&self, sequence: usize, channel: usize, back: usize) -> usize {
        (sequence * self.problem.shape.channels + channel) * (W - 1) + W - 1 - back
    }

    /// The rings of a task before its first token: slot `t % RING` holds token `t`.
    fn rings(&self, task: &Task) -> Vec<Ring> {
        let channels = self.problem.shape.channels;
        let mut rings = vec![[[0.0; BLOCK]; RING]; task.channels.len().div_ceil(BLOCK)];
        let (t0, start) = (task.tokens.start, self.sequences.range(task.sequence).start);
        for back in 1..W {
            for (i, d) in task.channels.clone().enumerate() {
                let x = if t0 - start >= back {
                    self.inputs.x[(t0 - back) * channels + d].to_f32()
                } else {
                    let state = self.inputs.state;
                    state.map_or(0.0, |s| s[self.state_index(task.sequence, d, back - (t0 - start))])
                };
                rings[i / BLOCK][slot(t0, back)][i % BLOCK] = x;
            }
        }
        rings
    }

    fn forward_task(&self, task: &Task, y: &Rows<E>) {
        let (channels, x) = (self.problem.shape.channels, self.inputs.x);
        let silu = self.problem.activation == Activation::Silu;
        let (taps, mut rings, mut xb) = (self.taps(task), self.rings(task), Aligned([0.0; BLOCK]));
        vectorize(
            #[inline(always)]
            || {
                for t in task.tokens.clone() {
                    for (j, at, len) in task.blocks(t, channels) {
                        prefetch(x, task.ahead(j, at, channels));
                        let ring = &mut rings[j];
                        ring[slot(t, 0)] = *block(x, at, len, &mut xb);
                        let mut z = convolve(&taps.weight[j], &taps.bias[j], ring, t);
                        if silu {
                            for z in &mut z {
                                *z = simd::silu(*z).0;
                            }
                        }
                        // Safety: tasks own disjoint rows of disjoint slices.
                        unsafe { y.put(at, &z, len) };
                    }
                }
            },
        );
        fence();
    }

    /// What a decoding step asks for, one token of each sequence: channel by channel, as weights and state lie in memory.
    fn one_token_each(&self) -> ConvOutputs<E> {
        let ConvInputs { x, weight, bias, state: before } = *self.inputs;
        let channels = self.problem.shape.channels;
        let mut out = ConvOutputs { y: vec![E::default(); x.len()], state: vec![0.0; x.len() * (W - 1)] };
        if let Some(before) = before {
            out.state.copy_from_slice(before);
        }
        let sequences = x.chunks_exact(channels).zip(out.y.chunks_exact_mut(channels));
        let sequences = sequences.zip(out.state.chunks_exact_mut(channels * (W - 1))).collect();
        each(sequences, x.len(), |((x, y), state)| {
            let mut z = vec![0.0; channels];
            widen(x, &mut z);
            let taps = weight.chunks_exact(W).zip(state.chunks_exact_mut(W - 1));
            for (d, (z, (weight, state))) in z.iter_mut().zip(taps).enumerate() {
                let x = *z;
                *z = bias.map_or(0.0, |bias| bias[d]) + weight[W - 1] * x;
                for back in 1..W {
                    *z += weight[W - 1 - back] * state[W - 1 - back];
                }
                state.copy_within(1.., 0);
                state[W - 2] = x;
            }
            vectorize(
                #[inline(always)]
                || {
                    if self.problem.activation == Activation::Silu {
                        for z in &mut z {
                            *z = simd::silu(*z).0;
                        }
                    }
                    E::from_f32_slice(&z, y);
                },
            );
        });
        out
    }

    /// Writes `dx` of its tokens and, if it is a sequence's first run, `d_state`; returns its sums for `dweight` and `dbias`,
    /// `[blocks][W + 1]`, by tap and then the bias.
    fn backward_task(
        &self,
        task: &Task,
        dy: &[E],
        d_new_state: Option<&[f32]>,
        dx: &Rows<E>,
        d_state: &Shared<f32>,
    ) -> Vec<Vec<Block>> {
        let (channels, x) = (self.problem.shape.channels, self.inputs.x);
        let silu = self.problem.activation == Activation::Silu;
        let sequence = self.sequences.range(task.sequence);
        let (taps, mut rings) = (self.taps(task), self.rings(task));
        let mut dz_rings = vec![[[0.0; BLOCK]; RING]; rings.len()];
        let mut sums = vec![vec![[0.0; BLOCK]; W + 1]; rings.len()];
        let (mut xb, mut db) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
        // A token reaches the W - 1 outputs after it: the gradient of row t is complete, and leaves, at row t + W - 1.
        for t in task.tokens.start..task.tokens.end + W - 1 {
            let (own, inside) = (t < task.tokens.end, t < sequence.end);
            vectorize(
                #[inline(always)]
                || {
                    for (j, at, len) in task.blocks(t, channels) {
                        let (ring, dz_ring) = (&mut rings[j], &mut dz_rings[j]);
                        let mut dz = [0.0; BLOCK];
                        if inside {
                            prefetch(x, task.ahead(j, at, channels));
                            prefetch(dy, task.ahead(j, at, channels));
                            ring[slot(t, 0)] = *block(x, at, len, &mut xb);
                            dz = *block(dy, at, len, &mut db);
                            if silu {
                                let z = convolve(&taps.weight[j], &taps.bias[j], ring, t);
                                for (dz, z) in dz.iter_mut().zip(z) {
                                    *dz *= silu_with_slope(z).1;
                                }
                            }
                        }
                        dz_ring[slot(t, 0)] = dz;
                        if own {
                            for k in 0..W {
                                add_product(&mut sums[j][k], &dz, &ring[slot(t, k)]);
                            }
                            add_product(&mut sums[j][W], &dz, &[1.0; BLOCK]);
                        }
                        // Row t - (W - 1), by how far it is before the end of the sequence and its first token.
                        let mut sum = transposed(&taps.weight[j], dz_ring, t);
                        let (to_end, done) = (sequence.end + W - 1 - t, t >= task.tokens.start + W - 1);
                        let first = task.channels.start + j * BLOCK;
                        if let Some(d_new_state) = d_new_state.filter(|_| to_end < W) {
                            for (i, sum) in sum[..len].iter_mut().enumerate() {
                                *sum += d_new_state[self.state_index(task.sequence, first + i, to_end)];
                            }
                        }
                        if done {
                            // Safety: tasks own disjoint rows of disjoint slices.
                            unsafe { dx.put(at - (W - 1) * channels, &sum, len) };
                        } else if task.tokens.start == sequence.start {
                            let back = sequence.start + W - 1 - t;
                            for (i, &sum) in sum[..len].iter().enumerate() {
                                // Safety: only a sequence's first run writes the gradient of its state.
                                let at = self.state_index(task.sequence, first + i, back);
                                unsafe { d_state.slice_mut(at, 1)[0] = sum };
                            }
                        }
                    }
                },
            );
        }
        fence();
        sums
    }
}

/// The slot of token `t - back`.
#[inline(always)]
fn slot(t: usize, back: usize) -> usize {
    (t + RING - back) % RING
}

#[inline(always)]
fn add_product(sum: &mut Block, a: &Block, b: &Block) {
    for i in 0..BLOCK {
        sum[i] += a[i] * b[i];
    }
}

/// The pre-activation of token `t`.
#[inline(always)]
fn convolve<const W: usize>(weight: &[Block; W], bias: &Block, ring: &Ring, t: usize) -> Block {
    let mut z = *bias;
    for (k, weight) in weight.iter().enumerate() {
        add_product(&mut z, weight, &ring[slot(t, k)]);
    }
    z
}

/// The gradient of the input of token `t - (W - 1)`, from the pre-activations' of the `W` tokens up to `t`.
#[inline(always)]
fn transposed<const W: usize>(weight: &[Block; W], dz: &Ring, t: usize) -> Block {
    let mut sum = [0.0; BLOCK];
    for (k, weight) in weight.iter().enumerate() {
        add_product(&mut sum, weight, &dz[slot(t, W - 1 - k)]);
    }
    sum
}

/// Calls `$run::<E, W>` with the problem's width as a constant: the taps are unrolled.
macro_rules! with_width {
    ($run:ident, $width:expr, $($argument:expr),*) => {
        match $width {
            2 => $run::<E, 2>($($argument),*),
            3 => $run::<E, 3>($($argument),*),
            4 => $run::<E, 4>($($argument),*),
            5 => $run::<E, 5>($($argument),*),
            6 => $run::<E, 6>($($argument),*),
            7 => $run::<E, 7>($($argument),*),
            _ => $run::<E, 8>($($argument),*),
        }
    };
}

/// The width has been checked to be in 2..=8.
pub(crate) fn forward<E: Element>(
    sequences: &Sequences,
    problem: &ConvProblem,
    inputs: &ConvInputs<E>,
) -> ConvOutputs<E> {
    with_width!(run_forward, problem.width, sequences, problem, inputs)
}

pub(crate) fn backward<E: Element>(
    sequences: &Sequences,
    problem: &ConvProblem,
    inputs: &ConvInputs<E>,
    dy: &[E],
    d_new_state: Option<&[f32]>,
) -> ConvGradients<E> {
    with_width!(run_backward, problem.width, sequences, problem, inputs, dy, d_new_state)
}

fn run_forward<E: Element, const W: usize>(
    sequences: &Sequences,
    problem: &ConvProblem,
    inputs: &ConvInputs<E>,
) -> ConvOutputs<E> {
    let (conv, channels) = (Conv::<E, W> { sequences, problem, inputs }, problem.shape.channels);
    if sequences.count() == sequences.tokens() {
        return conv.one_token_each();
    }
    let mut y = Output::new(inputs.x.len(), Vec::new());
    let rows = y.rows();
    each(tasks(sequences, channels), inputs.x.len(), |task| conv.forward_task(&task, &rows));
    let mut state = Vec::with_capacity(sequences.count() * channels * (W - 1));
    for n in 0..sequences.count() {
        let tokens = sequences.range(n);
        for d in 0..channels {
            for back in (1..W).rev() {
                state.push(if back <= tokens.len() {
                    inputs.x[(tokens.end - back) * channels + d].to_f32()
                } else {
                    inputs.state.map_or(0.0, |s| s[conv.state_index(n, d, back - tokens.len())])
                });
            }
        }
    }
    // Safety: the tasks cover all rows.
    ConvOutputs { y: unsafe { y.finish() }, state }
}

fn run_backward<E: Element, const W: usize>(
    sequences: &Sequences,
    problem: &ConvProblem,
    inputs: &ConvInputs<E>,
    dy: &[E],
    d_new_state: Option<&[f32]>,
) -> ConvGradients<E> {
    let (conv, channels) = (Conv::<E, W> { sequences, problem, inputs }, problem.shape.channels);
    let mut dx = Output::new(inputs.x.len(), Vec::new());
    let mut dstate = vec![0.0; sequences.count() * channels * (W - 1)];
    let (rows, d_state) = (dx.rows(), Shared::new(&mut dstate));
    let sums = each(tasks(sequences, channels), inputs.x.len(), |task| {
        let sums = conv.backward_task(&task, dy, d_new_state, &rows, &d_state);
        (task.channels, sums)
    });
    let (mut dweight, mut dbias) = (vec![0.0; channels * W], vec![0.0; channels]);
    for (slice, sums) in sums {
        for (i, d) in slice.enumerate() {
            for k in 0..W {
                dweight[d * W + W - 1 - k] += sums[i / BLOCK][k][i % BLOCK];
            }
            dbias[d] += sums[i / BLOCK][W][i % BLOCK];
        }
    }
    // Safety: the tasks cover all rows.
    ConvGradients { dx: unsafe { dx.finish() }, dweight, dbias, dstate }
}
