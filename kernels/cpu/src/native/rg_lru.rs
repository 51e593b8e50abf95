//! Loops of the real-gated linear recurrent unit: as the element-wise scan, with the gates formed on the way.

use super::{
    plan::{Task, each, plan},
    rows::{Aligned, BLOCK, Block, Output, Rows, block, fence, prefetch, to_blocks},
    simd::{exp_and_expm1, mul_add, sigmoid, vectorize},
    tile::Shared,
};
use crate::{
    element::Element,
    rg_lru::{RgLruGradients, RgLruInputs, RgLruOutputs},
    sequences::Sequences,
};

/// The constant in front of the recurrence gate.
const C: f32 = 8.0;
/// `1 / (2 max(sqrt(x), 5e-4))` bounds the derivative of the square root by 1000.
const MIN_ROOT: f32 = 5e-4;

/// `-8 softplus(a_param)`: the log of the decay at an open recurrence gate.
fn log_decay(task: &Task, a_param: &[f32]) -> Vec<Block> {
    let softplus = |x: f32| x.max(0.0) + (-x.abs()).exp().ln_1p();
    to_blocks(&a_param[task.channels.clone()].iter().map(|&x| -C * softplus(x)).collect::<Vec<_>>())
}

/// The gates of a block, and `a` and `sqrt(1 - a^2)`.
struct Gates {
    recurrent: Block,
    input: Block,
    a: Block,
    root: Block,
}

impl Gates {
    /// One loop for each function, since a chain of all of them keeps the processor from starting the next element.
    #[inline(always)]
    fn new(recurrent: &Block, input: &Block, log_decay: &Block) -> Aligned<Self> {
        let block = [0.0; BLOCK];
        let mut gates = Aligned(Self { recurrent: block, input: block, a: block, root: block });
        let Self { recurrent: r, input: i, a, root } = &mut gates.0;
        for (r, logit) in r.iter_mut().zip(recurrent) {
            *r = sigmoid(*logit);
        }
        for (i, logit) in i.iter_mut().zip(input) {
            *i = sigmoid(*logit);
        }
        for ((a, root), (r, log_decay)) in a.iter_mut().zip(root).zip(r.iter().zip(log_decay)) {
            let (factor, minus) = exp_and_expm1(log_decay * r);
            (*a, *root) = (factor, (-minus * (1.0 + factor)).sqrt());
        }
        gates
    }
}

/// `None` if a gate is NaN.
pub(crate) fn forward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &RgLruInputs<E>,
) -> Option<RgLruOutputs<E>> {
    let mut o = Output::new(inputs.x.len(), Vec::new());
    let rows = o.rows();
    let mut final_state = vec![0.0; sequences.count() * channels];
    let finals = Shared::new(&mut final_state);
    let tasks = plan(sequences, channels, rayon::current_num_threads(), false).concat();
    let valid = each(tasks, inputs.x.len(), |task| {
        let mut h = task.load_state(inputs.initial_state, channels);
        let valid = forward_task(&task, channels, inputs, &rows, &mut h);
        let at = task.state(channels);
        // Safety: each sequence and slice is one task.
        unsafe { finals.slice_mut(at.start, at.len()) }.copy_from_slice(&h.as_flattened()[..at.len()]);
        valid
    });
    // Safety: the tasks cover all rows.
    let o = unsafe { o.finish() };
    valid.into_iter().all(|v| v).then_some(RgLruOutputs { o, final_state })
}

fn forward_task<E: Element>(
    task: &Task,
    channels: usize,
    inputs: &RgLruInputs<E>,
    out: &Rows<E>,
    state: &mut [Block],
) -> bool {
    let log_decay = log_decay(task, inputs.a_param);
    let (mut xb, mut rb, mut ib) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    let bad = vectorize(
        #[inline(always)]
        || {
            let mut bad = 0u32;
            for t in task.tokens.clone() {
                let reset = inputs.reset.is_some_and(|reset| reset[t]);
                for (j, at, len) in task.blocks(t, channels) {
                    for tensor in [inputs.x, inputs.recurrent_gate, inputs.input_gate] {
                        prefetch(tensor, task.ahead(j, at, channels));
                    }
                    let x = block(inputs.x, at, len, &mut xb);
                    let r = block(inputs.recurrent_gate, at, len, &mut rb);
                    let input = block(inputs.input_gate, at, len, &mut ib);
                    let gates = Gates::new(r, input, &log_decay[j]);
                    let mut h = state[j];
                    for i in 0..BLOCK {
                        bad |= (r[i].is_nan() | input[i].is_nan()) as u32;
                        let b = gates.input[i] * x[i];
                        let next = mul_add(gates.a[i], h[i], gates.root[i] * b);
                        h[i] = if reset { b } else { next };
                    }
                    state[j] = h;
                    // Safety: tasks own disjoint rows of disjoint slices.
                    unsafe { out.put(at, &h, len) };
                }
            }
            bad
        },
    );
    fence();
    bad == 0
}

/// The outputs of the backward pass that have a row for each token.
struct Gradients<E> {
    x: Rows<E>,
    recurrent_gate: Rows<E>,
    input_gate: Rows<E>,
}

pub(crate) fn backward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &RgLruInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
) -> RgLruGradients<E> {
    let output = || Output::new(inputs.x.len(), Vec::new());
    let (mut dx, mut dr, mut di) = (output(), output(), output());
    let rows = Gradients { x: dx.rows(), recurrent_gate: dr.rows(), input_gate: di.rows() };
    let mut d_initial_state = vec![0.0; sequences.count() * channels];
    let initials = Shared::new(&mut d_initial_state);
    let tasks = plan(sequences, channels, rayon::current_num_threads(), false).concat();
    let sums = each(tasks, inputs.x.len(), |task| {
        let mut carry = task.load_state(d_final_state, channels);
        let sums = backward_task(&task, channels, inputs, o, do_, &rows, &mut carry);
        let at = task.state(channels);
        // Safety: each sequence and slice is one task.
        unsafe { initials.slice_mut(at.start, at.len()) }.copy_from_slice(&carry.as_flattened()[..at.len()]);
        (task.channels, sums)
    });
    // Over the sequences in order; d softplus = sigmoid.
    let mut d_a_param = vec![0.0; channels];
    for (slice, sums) in sums {
        d_a_param[slice].iter_mut().zip(sums.as_flattened()).for_each(|(d, s)| *d += s);
    }
    d_a_param.iter_mut().zip(inputs.a_param).for_each(|(d, &a)| *d *= -C * sigmoid(a));
    // Safety: the tasks cover all rows of the three.
    unsafe {
        RgLruGradients {
            dx: dx.finish(),
            d_recurrent_gate: dr.finish(),
            d_input_gate: di.finish(),
            d_a_param,
            d_initial_state,
        }
    }
}

/// Tokens between additions of a partial sum to its total, so that long sums lose little.
const PARTIAL: usize = 64;

/// Returns the sum over tokens of `r dlog_a`, the gradient of `-8 softplus(a_param)`.
fn backward_task<E: Element>(
    task: &Task,
    channels: usize,
    inputs: &RgLruInputs<E>,
    o: &[E],
    do_: &[E],
    out: &Gradients<E>,
    carry: &mut [Block],
) -> Vec<Block> {
    let log_decay = log_decay(task, inputs.a_param);
    let before = task.load_state(inputs.initial_state, channels);
    let (mut totals, mut partials) = (vec![[0.0; BLOCK]; carry.len()], vec![[0.0; BLOCK]; carry.len()]);
    let mut buffers = Aligned([[0.0; BLOCK]; 5]);
    vectorize(
        #[inline(always)]
        || {
            for t in task.tokens.clone().rev() {
                let reset = inputs.reset.is_some_and(|reset| reset[t]);
                for (j, at, len) in task.blocks(t, channels).rev() {
                    let next = task.behind(j, at, channels);
                    for tensor in [inputs.x, inputs.recurrent_gate, inputs.input_gate, do_] {
                        prefetch(tensor, next);
                    }
                    prefetch(o, next.wrapping_sub(channels));
                    let [xb, rb, ib, db, hb] = &mut buffers.0;
                    let (x, d) = (block(inputs.x, at, len, xb), block(do_, at, len, db));
                    let r_logits = block(inputs.recurrent_gate, at, len, rb);
                    let i_logits = block(inputs.input_gate, at, len, ib);
                    let h = if t == task.tokens.start { &before[j] } else { block(o, at - channels, len, hb) };
                    let (inputs, state) = ([x, r_logits, i_logits, d, h], (&mut carry[j], &mut partials[j]));
                    let [dx, dr, di] = match reset {
                        true => backward_block::<true>(inputs, &log_decay[j], state),
                        false => backward_block::<false>(inputs, &log_decay[j], state),
                    };
                    // Safety: tasks own disjoint rows of disjoint slices.
                    unsafe {
                        out.x.put(at, &dx, len);
                        out.recurrent_gate.put(at, &dr, len);
                        out.input_gate.put(at, &di, len);
                    }
                }
                if t.is_multiple_of(PARTIAL) || t == task.tokens.start {
                    for (total, partial) in totals.as_flattened_mut().iter_mut().zip(partials.as_flattened_mut()) {
                        *total += *partial;
                        *partial = 0.0;
                    }
                }
            }
        },
    );
    fence();
    totals
}

/// One token in reverse: `[x, recurrent_gate, input_gate, do, h]`, with `h` the state before it, to
/// `[dx, d_recurrent_gate, d_input_gate]`. A reset known to the compiler leaves no conditional loads and stores.
#[inline(always)]
fn backward_block<const RESET: bool>(
    [x, r_logits, i_logits, d, h]: [&Block; 5],
    log_decay: &Block,
    (carry, sums): (&mut Block, &mut Block),
) -> [Aligned<Block>; 3] {
    let (mut dx, mut dr, mut di) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    let gates = Gates::new(r_logits, i_logits, log_decay);
    for i in 0..BLOCK {
        let (r, gate, a, root) = (gates.recurrent[i], gates.input[i], gates.a[i], gates.root[i]);
        let u = d[i] + carry[i];
        dx[i] = if RESET { u * gate } else { u * root * gate };
        di[i] = dx[i] * x[i] * (1.0 - gate);
        if RESET {
            carry[i] = 0.0;
        } else {
            let slope = 0.5 / if root > MIN_ROOT { root } else { MIN_ROOT };
            let d_rest = u * gate * x[i] * slope;
            let d_gate = r * a * (u * h[i] - 2.0 * d_rest * a);
            sums[i] += d_gate;
            dr[i] = log_decay[i] * d_gate * (1.0 - r);
            carry[i] = a * u;
        }
    }
    [dx, dr, di]
}
