//! Loops of the complex scan: as the real one, with two planes of state and `lambda` formed on the way.

use super::{
    plan::{Task, each, plan},
    rows::{Aligned, BLOCK, Block, Output, Rows, block, fence, prefetch},
    simd::{MAX_ANGLE, exp, sin_cos, vectorize},
    tile::Shared,
};
use crate::{
    complex_scan::{Complex, ComplexGradients, ComplexInputs, ComplexOutputs},
    element::Element,
    sequences::Sequences,
};

/// The state of a task, or any pair of rows.
type State = Complex<Vec<Block>>;

fn load(task: &Task, state: Option<Complex<&[f32]>>, channels: usize) -> State {
    Complex { re: task.load_state(state.map(|s| s.re), channels), im: task.load_state(state.map(|s| s.im), channels) }
}

fn store(task: &Task, state: &State, to: &Complex<Shared<f32>>, channels: usize) {
    let at = task.state(channels);
    for (to, from) in [(&to.re, &state.re), (&to.im, &state.im)] {
        // Safety: each sequence and slice is one task.
        unsafe { to.slice_mut(at.start, at.len()) }.copy_from_slice(&from.as_flattened()[..at.len()]);
    }
}

fn states(sequences: &Sequences, channels: usize) -> Complex<Vec<f32>> {
    let n = sequences.count() * channels;
    Complex { re: vec![0.0; n], im: vec![0.0; n] }
}

fn shared(state: &mut Complex<Vec<f32>>) -> Complex<Shared<f32>> {
    Complex { re: Shared::new(&mut state.re), im: Shared::new(&mut state.im) }
}

/// A parameter of `lambda`: a row for each token, or one row for all.
#[derive(Clone, Copy)]
struct Parameter<'a, E> {
    x: &'a [E],
    constant: bool,
}

impl<'a, E: Element> Parameter<'a, E> {
    fn new(x: &'a [E], tokens: usize, channels: usize) -> Self {
        Self { x, constant: x.len() != tokens * channels }
    }

    /// The block of channel `c` at position `at` of the token.
    #[inline(always)]
    fn block<'b>(&self, at: usize, c: usize, len: usize, buffer: &'b mut Block) -> &'b Block
    where
        'a: 'b,
    {
        block(self.x, if self.constant { c } else { at }, len, buffer)
    }
}

/// `exp(log_a + i theta)`.
#[inline(always)]
fn lambda(log_a: &Block, theta: &Block) -> Complex<Block> {
    let mut modulus = [0.0; BLOCK];
    for i in 0..BLOCK {
        modulus[i] = exp(log_a[i]);
    }
    let mut l = Complex { re: [0.0; BLOCK], im: [0.0; BLOCK] };
    let mut far = 0u32;
    for i in 0..BLOCK {
        let (sin, cos) = sin_cos(theta[i]);
        far |= (theta[i].abs() > MAX_ANGLE) as u32;
        (l.re[i], l.im[i]) = (modulus[i] * cos, modulus[i] * sin);
    }
    if far != 0 {
        turn_far(&modulus, theta, &mut l);
    }
    l
}

/// The `lambda` of angles beyond [`MAX_ANGLE`], by the library's functions, which reduce any angle exactly.
#[cold]
#[inline(never)]
fn turn_far(modulus: &Block, theta: &Block, l: &mut Complex<Block>) {
    for i in (0..BLOCK).filter(|&i| theta[i].abs() > MAX_ANGLE) {
        let (sin, cos) = f64::from(theta[i]).sin_cos();
        (l.re[i], l.im[i]) = (modulus[i] * cos as f32, modulus[i] * sin as f32);
    }
}

/// Whether `lambda` is in range; false for NaN as well.
#[inline(always)]
fn valid(log_a: &Block, theta: &Block) -> bool {
    let mut bad = 0u32;
    for i in 0..BLOCK {
        bad |= !(log_a[i] <= 0.0 && theta[i].is_finite()) as u32;
    }
    bad == 0
}

/// `None` if a `lambda` is out of range.
pub(crate) fn forward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &ComplexInputs<E>,
) -> Option<ComplexOutputs<E>> {
    let n = inputs.b.re.len();
    let (mut re, mut im) = (Output::new(n, Vec::new()), Output::new(n, Vec::new()));
    let out = Complex { re: re.rows(), im: im.rows() };
    let mut final_state = states(sequences, channels);
    let finals = shared(&mut final_state);
    let tasks = plan(sequences, channels, rayon::current_num_threads(), false).concat();
    let valid = each(tasks, n, |task| {
        let mut h = load(&task, inputs.initial_state, channels);
        let valid = forward_task(&task, sequences, channels, inputs, &out, &mut h);
        store(&task, &h, &finals, channels);
        valid
    });
    // Safety: the tasks cover all rows of both planes.
    let o = unsafe { Complex { re: re.finish(), im: im.finish() } };
    valid.into_iter().all(|v| v).then_some(ComplexOutputs { o, final_state })
}

fn forward_task<E: Element>(
    task: &Task,
    sequences: &Sequences,
    channels: usize,
    inputs: &ComplexInputs<E>,
    out: &Complex<Rows<E>>,
    state: &mut State,
) -> bool {
    let log_a = Parameter::new(inputs.log_a, sequences.tokens(), channels);
    let theta = Parameter::new(inputs.theta, sequences.tokens(), channels);
    let constant = log_a.constant && theta.constant;
    let mut lambdas = vec![Complex { re: [0.0; BLOCK], im: [0.0; BLOCK] }; state.re.len()];
    let (mut ab, mut tb, mut rb, mut ib) =
        (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    let all_valid = vectorize(
        #[inline(always)]
        || {
            let mut all_valid = true;
            for t in task.tokens.clone() {
                for (j, at, len) in task.blocks(t, channels) {
                    prefetch(inputs.b.re, task.ahead(j, at, channels));
                    prefetch(inputs.b.im, task.ahead(j, at, channels));
                    let l = &mut lambdas[j];
                    if !constant || t == task.tokens.start {
                        let c = at - t * channels;
                        let (a, th) = (log_a.block(at, c, len, &mut ab), theta.block(at, c, len, &mut tb));
                        all_valid &= valid(a, th);
                        *l = lambda(a, th);
                    }
                    let b = (block(inputs.b.re, at, len, &mut rb), block(inputs.b.im, at, len, &mut ib));
                    let (mut re, mut im) = (state.re[j], state.im[j]);
                    for i in 0..BLOCK {
                        let (x, y) = (re[i], im[i]);
                        re[i] = l.re[i] * x - l.im[i] * y + b.0[i];
                        im[i] = l.re[i] * y + l.im[i] * x + b.1[i];
                    }
                    (state.re[j], state.im[j]) = (re, im);
                    // Safety: tasks own disjoint rows of disjoint slices.
                    unsafe {
                        out.re.put(at, &re, len);
                        out.im.put(at, &im, len);
                    }
                }
            }
            all_valid
        },
    );
    fence();
    all_valid
}

/// Where the gradients of `lambda` go: rows for each token, or sums over a task's tokens, `[log_a, theta][blocks]`.
struct ParameterGradients<E> {
    rows: [Option<Rows<E>>; 2],
}

pub(crate) fn backward<E: Element>(
    sequences: &Sequences,
    channels: usize,
    inputs: &ComplexInputs<E>,
    o: Complex<&[E]>,
    do_: Complex<&[E]>,
    d_final_state: Option<Complex<&[f32]>>,
) -> ComplexGradients<E> {
    let n = o.re.len();
    let (mut re, mut im) = (Output::new(n, Vec::new()), Output::new(n, Vec::new()));
    let db = Complex { re: re.rows(), im: im.rows() };
    let gated = [inputs.log_a.len() == n, inputs.theta.len() == n];
    let mut outputs = gated.map(|gated| gated.then(|| Output::new(n, Vec::new())));
    let [log_a, theta] = &mut outputs;
    let parameters = ParameterGradients { rows: [log_a.as_mut().map(Output::rows), theta.as_mut().map(Output::rows)] };
    let mut d_initial_state = states(sequences, channels);
    let initials = shared(&mut d_initial_state);
    let tasks = plan(sequences, channels, rayon::current_num_threads(), false).concat();
    let sums = each(tasks, n, |task| {
        let mut carry = load(&task, d_final_state, channels);
        let sums = backward_task(&task, sequences, channels, inputs, o, do_, &db, &parameters, &mut carry);
        store(&task, &carry, &initials, channels);
        (task.channels, sums)
    });
    // The gradients of constant parameters: over the sequences in order.
    let mut totals = [vec![0.0f32; channels], vec![0.0f32; channels]];
    for (slice, sums) in &sums {
        for (total, sums) in totals.iter_mut().zip(sums) {
            total[slice.clone()].iter_mut().zip(sums.as_flattened()).for_each(|(t, s)| *t += s);
        }
    }
    let [log_a, theta] = outputs;
    let finish = |rows: Option<Output<E>>, total: &[f32]| match rows {
        // Safety: the tasks cover all rows.
        Some(rows) => unsafe { rows.finish() },
        None => total.iter().map(|&x| E::from_f32(x)).collect(),
    };
    ComplexGradients {
        dlog_a: finish(log_a, &totals[0]),
        dtheta: finish(theta, &totals[1]),
        // Safety: the tasks cover all rows of both planes.
        db: unsafe { Complex { re: re.finish(), im: im.finish() } },
        d_initial_state,
    }
}

/// Tokens between additions of a partial sum to its total, so that long sums lose little.
const PARTIAL: usize = 64;

fn backward_task<E: Element>(
    task: &Task,
    sequences: &Sequences,
    channels: usize,
    inputs: &ComplexInputs<E>,
    o: Complex<&[E]>,
    do_: Complex<&[E]>,
    db: &Complex<Rows<E>>,
    parameters: &ParameterGradients<E>,
    carry: &mut State,
) -> [Vec<Block>; 2] {
    let log_a = Parameter::new(inputs.log_a, sequences.tokens(), channels);
    let theta = Parameter::new(inputs.theta, sequences.tokens(), channels);
    let constant = log_a.constant && theta.constant;
    let before = load(task, inputs.initial_state, channels);
    let blocks = carry.re.len();
    let zeros = || vec![[0.0; BLOCK]; blocks];
    let (mut totals, mut partials) = ([zeros(), zeros()], [zeros(), zeros()]);
    let mut lambdas = vec![Complex { re: [0.0; BLOCK], im: [0.0; BLOCK] }; blocks];
    let mut buffers = Aligned([[0.0; BLOCK]; 6]);
    vectorize(
        #[inline(always)]
        || {
            for t in task.tokens.clone().rev() {
                for (j, at, len) in task.blocks(t, channels).rev() {
                    let next = task.behind(j, at, channels);
                    [do_.re, do_.im].into_iter().for_each(|x| prefetch(x, next));
                    [o.re, o.im].into_iter().for_each(|x| prefetch(x, next.wrapping_sub(channels)));
                    let [ab, tb, dr, di, hr, hi] = &mut buffers.0;
                    let l = &mut lambdas[j];
                    if !constant || t + 1 == task.tokens.end {
                        let c = at - t * channels;
                        *l = lambda(log_a.block(at, c, len, ab), theta.block(at, c, len, tb));
                    }
                    let d = (block(do_.re, at, len, dr), block(do_.im, at, len, di));
                    let h = if t == task.tokens.start {
                        (&before.re[j], &before.im[j])
                    } else {
                        (block(o.re, at - channels, len, hr), block(o.im, at - channels, len, hi))
                    };
                    let (mut cr, mut ci) = (carry.re[j], carry.im[j]);
                    let (mut ur, mut ui) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
                    let (mut da, mut dth) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
                    for i in 0..BLOCK {
                        let (u, w, re, im) = (d.0[i] + cr[i], d.1[i] + ci[i], l.re[i], l.im[i]);
                        let (x, y) = (h.0[i], h.1[i]);
                        // u conj(h) is the gradient of lambda; d lambda = lambda d log_a + i lambda d theta.
                        let (gr, gi) = (u * x + w * y, w * x - u * y);
                        da[i] = gr * re + gi * im;
                        dth[i] = gi * re - gr * im;
                        (ur[i], ui[i]) = (u, w);
                        cr[i] = re * u + im * w;
                        ci[i] = re * w - im * u;
                    }
                    (carry.re[j], carry.im[j]) = (cr, ci);
                    // Safety: tasks own disjoint rows of disjoint slices.
                    unsafe {
                        db.re.put(at, &ur, len);
                        db.im.put(at, &ui, len);
                    }
                    for (k, gradient) in [da, dth].iter().enumerate() {
                        match &parameters.rows[k] {
                            // Safety: as above.
                            Some(rows) => unsafe { rows.put(at, gradient, len) },
                            None => partials[k][j].iter_mut().zip(gradient.iter()).for_each(|(s, x)| *s += x),
                        }
                    }
                }
                if t.is_multiple_of(PARTIAL) || t == task.tokens.start {
                    for (totals, partials) in totals.iter_mut().zip(&mut partials) {
                        for (total, partial) in totals.as_flattened_mut().iter_mut().zip(partials.as_flattened_mut()) {
                            *total += *partial;
                            *partial = 0.0;
                        }
                    }
                }
            }
        },
    );
    fence();
    totals
}
