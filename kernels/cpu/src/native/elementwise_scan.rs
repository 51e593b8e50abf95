//! Loops of the element-wise scan: one task walks over the rows of a channel slice with the state in L1.

use super::{
    plan::{Summary, Task, each, plan, with_states},
    rows::{Aligned, BLOCK, Block, Output, Rows, block, fence, prefetch},
    simd::{exp, vectorize},
    tile::Shared,
};
use crate::{
    element::Element,
    elementwise_scan::{ScanGate, ScanGradients, ScanInputs, ScanOutputs},
    sequences::Sequences,
};

/// `None` if a gate is out of range.
pub(crate) fn forward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &ScanInputs<E>,
    reuse: ScanOutputs<E>,
) -> Option<ScanOutputs<E>> {
    match inputs.gate {
        ScanGate::Linear(gate) => run_forward::<E, false>(sequences, channels, gate, inputs, reuse),
        ScanGate::Log(gate) => run_forward::<E, true>(sequences, channels, gate, inputs, reuse),
    }
}

pub(crate) fn backward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &ScanInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
    reuse: ScanGradients<E>,
) -> ScanGradients<E> {
    match inputs.gate {
        ScanGate::Linear(gate) => {
            run_backward::<E, false>(sequences, channels, gate, inputs, o, do_, d_final_state, reuse)
        }
        ScanGate::Log(gate) => run_backward::<E, true>(sequences, channels, gate, inputs, o, do_, d_final_state, reuse),
    }
}

fn run_forward<E: Element, const LOG: bool>(
    sequences: &Sequences,
    channels: usize,
    gate: &[E],
    inputs: &ScanInputs<E>,
    reuse: ScanOutputs<E>,
) -> Option<ScanOutputs<E>> {
    let x = inputs.x;
    let mut o = Output::new(x.len(), reuse.o);
    let mut final_state = reuse.final_state;
    final_state.resize(sequences.count() * channels, 0.0);
    let (rows, finals) = (o.rows(), Shared::new(&mut final_state));
    let tasks = with_states(
        plan(sequences, channels, rayon::current_num_threads(), true),
        |task| task.load_state(inputs.initial_state, channels),
        |task, state| summarise::<E, LOG>(task, task.tokens.clone(), channels, gate, x, state, false),
    );
    let valid = each(tasks, x.len(), |(task, mut h)| {
        let valid = forward_task::<E, LOG>(&task, channels, gate, x, &rows, &mut h);
        if task.tokens.end == sequences.range(task.sequence).end {
            let at = task.state(channels);
            // Safety: the last task of this sequence and slice is the only one to write its final state.
            unsafe { finals.slice_mut(at.start, at.len()) }.copy_from_slice(&h.as_flattened()[..at.len()]);
        }
        valid
    });
    // Safety: the tasks cover all rows.
    let o = unsafe { o.finish() };
    valid.iter().all(|&v| v).then_some(ScanOutputs { o, final_state })
}

/// The factor that a gate stands for.
#[inline(always)]
fn factor<const LOG: bool>(gate: f32) -> f32 {
    if LOG { exp(gate) } else { gate }
}

/// `a x`, where a factor of exactly 0 forgets also what is not finite, as on a device.
#[inline(always)]
fn times(a: f32, x: f32) -> f32 {
    if a == 0.0 { 0.0 } else { a * x }
}

/// Whether all gates are in range.
fn forward_task<E: Element, const LOG: bool>(
    task: &Task,
    channels: usize,
    gate: &[E],
    x: &[E],
    out: &Rows<E>,
    state: &mut [Block],
) -> bool {
    let (mut gb, mut xb) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    let bad = vectorize(
        #[inline(always)]
        || {
            let mut bad = 0u32;
            for t in task.tokens.clone() {
                for (j, at, len) in task.blocks(t, channels) {
                    prefetch(gate, task.ahead(j, at, channels));
                    prefetch(x, task.ahead(j, at, channels));
                    let (g, x) = (block(gate, at, len, &mut gb), block(x, at, len, &mut xb));
                    let mut h = state[j];
                    for i in 0..BLOCK {
                        // False for NaN as well.
                        let valid = if LOG { g[i] <= 0.0 } else { !g[i].is_nan() };
                        bad |= !valid as u32;
                        h[i] = times(factor::<LOG>(g[i]), h[i]) + x[i];
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

/// A segment walked from a state, forwards (`h -> a h + x`) or backwards (`u -> a (x + u)`, the carry of gradients).
fn summarise<E: Element, const LOG: bool>(
    task: &Task,
    tokens: impl Iterator<Item = usize>,
    channels: usize,
    gate: &[E],
    x: &[E],
    mut sum: Vec<Block>,
    backward: bool,
) -> Summary {
    let (mut gb, mut xb) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    let blocks = task.channels.len().div_ceil(BLOCK);
    let (mut product, mut growth) = (vec![[1.0f32; BLOCK]; blocks], vec![[1.0f32; BLOCK]; blocks]);
    vectorize(
        #[inline(always)]
        || {
            for t in tokens {
                for (j, at, len) in task.blocks(t, channels) {
                    let (g, x) = (block(gate, at, len, &mut gb), block(x, at, len, &mut xb));
                    let (mut p, mut s, mut most) = (product[j], sum[j], growth[j]);
                    let mut factors = [0.0; BLOCK];
                    for i in 0..BLOCK {
                        factors[i] = factor::<LOG>(g[i]);
                    }
                    for i in 0..BLOCK {
                        let a = factors[i];
                        p[i] *= a;
                        if !LOG {
                            most[i] = a.abs() * if most[i] < 1.0 { 1.0 } else { most[i] };
                        }
                        s[i] = if backward { times(a, x[i] + s[i]) } else { times(a, s[i]) + x[i] };
                    }
                    (product[j], sum[j], growth[j]) = (p, s, most);
                }
            }
        },
    );
    Summary { product, sum, growth }
}

fn run_backward<E: Element, const LOG: bool>(
    sequences: &Sequences,
    channels: usize,
    gate: &[E],
    inputs: &ScanInputs<E>,
    o: &[E],
    do_: &[E],
    d_final_state: Option<&[f32]>,
    reuse: ScanGradients<E>,
) -> ScanGradients<E> {
    let (mut dgate, mut dx) = (Output::new(gate.len(), reuse.dgate), Output::new(gate.len(), reuse.dx));
    let mut d_initial_state = reuse.d_initial_state;
    d_initial_state.resize(sequences.count() * channels, 0.0);
    let out = (dgate.rows(), dx.rows());
    let initials = Shared::new(&mut d_initial_state);
    let mut groups = plan(sequences, channels, rayon::current_num_threads(), true);
    groups.iter_mut().for_each(|group| group.reverse());
    let tasks = with_states(
        groups,
        |task| task.load_state(d_final_state, channels),
        |task, state| summarise::<E, LOG>(task, task.tokens.clone().rev(), channels, gate, do_, state, true),
    );
    each(tasks, gate.len(), |(task, mut carry)| {
        let first = task.tokens.start == sequences.range(task.sequence).start;
        // Zeros, or the initial state: what came before the sequence's first token.
        let before = task.load_state(inputs.initial_state, channels);
        backward_task::<E, LOG>(&task, channels, gate, o, do_, first.then_some(&before[..]), &out, &mut carry);
        if first {
            let at = task.state(channels);
            // Safety: the first task of this sequence and slice is the only one to write its gradient.
            unsafe { initials.slice_mut(at.start, at.len()) }.copy_from_slice(&carry.as_flattened()[..at.len()]);
        }
    });
    // Safety: the tasks cover all rows of both.
    unsafe { ScanGradients { dgate: dgate.finish(), dx: dx.finish(), d_initial_state } }
}

/// `before`: the state before the task's first token where that is not in `o`.
fn backward_task<E: Element, const LOG: bool>(
    task: &Task,
    channels: usize,
    gate: &[E],
    o: &[E],
    do_: &[E],
    before: Option<&[Block]>,
    (dgate, dx): &(Rows<E>, Rows<E>),
    carry: &mut [Block],
) {
    let (mut gb, mut hb, mut db) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    vectorize(
        #[inline(always)]
        || {
            for t in task.tokens.clone().rev() {
                for (j, at, len) in task.blocks(t, channels).rev() {
                    let next = task.behind(j, at, channels);
                    prefetch(gate, next);
                    prefetch(do_, next);
                    prefetch(o, next.wrapping_sub(channels));
                    let (g, d) = (block(gate, at, len, &mut gb), block(do_, at, len, &mut db));
                    let h = match before {
                        Some(before) if t == task.tokens.start => &before[j],
                        _ => block(o, at - channels, len, &mut hb),
                    };
                    let (mut c, mut u, mut dg) = (carry[j], Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
                    for i in 0..BLOCK {
                        let a = factor::<LOG>(g[i]);
                        u[i] = d[i] + c[i];
                        c[i] = times(a, u[i]);
                        dg[i] = if LOG { c[i] } else { u[i] } * h[i];
                    }
                    carry[j] = c;
                    // Safety: tasks own disjoint rows of disjoint slices.
                    unsafe {
                        dgate.put(at, &dg, len);
                        dx.put(at, &u, len);
                    }
                }
            }
        },
    );
    fence();
}
