//! The backward pass: the chunks in reverse, each recomputed from its inputs and the state that entered it.
//!
//! Gate gradients need no pass of their own. A tensor meets the decay in one of two roles: on the left, multiplied by
//! `e^{c_i}`, or on the right, by `e^{-c_j}`; so `dc = left (.) dleft - right (.) dright`, and `dg_t` is the sum of `dc`
//! from `t` on. Pairs with `i = j` do not meet the decay at all and are kept apart, as is what a key at `j` leaves to the
//! end of the chunk (it goes to the gates after `j`, summed forwards): under strong gates either would drown the rest.

use super::super::ahead::Ahead;
use super::super::gemm::{Lhs, Mode, Rhs, gemm};
use super::super::rows::{Output, Rows as Sink, fence};
use super::super::simd::vectorize;
use super::super::tile::{Rows, Shared, Tile};
use super::chunk::{Chunk, Layout, Place, Rule};
use super::decay::{Decay, Reads};
use super::lower;
use super::rows::{add_rows, dot_rows, scale_rows};
use crate::element::Element;
use crate::matrix::{Gate, MatrixGradients, MatrixInputs, MatrixProblem};
use crate::sequences::Sequences;
use rayon::prelude::*;

/// Gradients of the outputs.
pub(crate) struct Cotangents<'a, E> {
    pub o: &'a [E],
    pub final_state: Option<&'a [f32]>,
}

pub(crate) fn backward<E: Element, D: Decay>(
    p: &MatrixProblem,
    sequences: &Sequences,
    x: &MatrixInputs<E>,
    decay: &D,
    cotangents: Cotangents<E>,
    chunk_states: &[f32],
) -> MatrixGradients<E> {
    let rule = Rule::of(&x.write);
    let layout = Layout::new(p, sequences);
    let (tokens, blocks) = (p.batch * p.time, layout.blocks);
    let (delta, low, gated) = (rule == Rule::Delta, rule == Rule::LowRank, !matches!(x.gate, Gate::None));
    let gate_len = match x.gate {
        Gate::None => 0,
        Gate::Constant(_) => sequences.count() * p.value_heads,
        Gate::Head(g) | Gate::Key(g) => g.len(),
    };
    let beta_len = if delta { tokens * p.value_heads } else { 0 };
    let mut dv = Output::<E>::new(tokens * p.value_heads * p.value_dim, Vec::new());
    // What the value blocks of a head share gets a part from each; the parts are summed in order below.
    let mut dg = vec![0.0f32; blocks * gate_len];
    let mut dbeta = vec![0.0f32; blocks * beta_len];
    let mut dh0 = vec![0.0f32; x.initial_state.map_or(0, <[f32]>::len)];
    let (mut dq, mut dk) = (KeyGradient::new(layout, true), KeyGradient::new(layout, true));
    let (mut da, mut db) = (KeyGradient::new(layout, low), KeyGradient::new(layout, low));
    {
        let (dq, dk, da, db) = (dq.target(), dk.target(), da.target(), db.target());
        let (dv, dg) = (dv.rows(), Shared::new(&mut dg));
        let (dbeta, dh0) = (Shared::new(&mut dbeta), Shared::new(&mut dh0));
        let work = || Work::new(layout, rule, decay.sums(p.chunk, p.key_dim));
        (0..layout.tasks()).into_par_iter().for_each_init(work, |w, task| {
            let walk = layout.walk(task);
            let Place { sequence, value_head, block, .. } = walk[0];
            match cotangents.final_state {
                Some(d) => w.dstate.load(d, layout.state(walk[0]), p.key_dim),
                None => w.dstate.fill(0.0),
            }
            let mut constant = 0.0f64;
            for (i, &at) in walk.iter().enumerate().rev() {
                w.state.load(chunk_states, layout.chunk_state(at), p.key_dim);
                w.chunk.load(layout, x, decay, &mut w.sums, at);
                w.do_.load(cotangents.o, layout.value(at), at.rows);
                w.chunk.ahead.clear();
                if i > 0 {
                    let next = walk[i - 1];
                    w.chunk.ahead.rows(chunk_states, layout.chunk_state(next), p.key_dim, layout.width());
                    w.chunk.ask_for(layout, x, next);
                    w.chunk.ahead.rows(cotangents.o, layout.value(next), next.rows, layout.width());
                }
                w.run(rule, decay, at.rows);

                // Safety (here and below): a task writes only the rows of its own tokens, head and block.
                let row = |i: usize| (at.token + i) * p.value_heads + value_head;
                if gated {
                    decay.gate_gradient(&mut w.sums, &mut |i, gradient| match x.gate {
                        Gate::Constant(_) => constant += gradient[0] as f64,
                        _ => {
                            let offset = block * gate_len + row(i) * gradient.len();
                            unsafe { dg.slice_mut(offset, gradient.len()) }.copy_from_slice(gradient);
                        }
                    });
                }
                if delta {
                    for (i, &b) in w.dbeta[..at.rows].iter().enumerate() {
                        unsafe { dbeta.slice_mut(block * beta_len + row(i), 1)[0] = b };
                    }
                }
                w.dv.put(&dv, layout.value(at), at.rows);
                w.finish(rule, at.rows, p.scale);
                dq.store(&w.q_left, at);
                dk.store(&w.k_right, at);
                if low {
                    da.store(&w.a_left, at);
                    db.store(&w.b_right, at);
                }
            }
            if x.initial_state.is_some() {
                w.dstate.store(&dh0, layout.state(walk[0]), p.key_dim);
            }
            if let Gate::Constant(_) = x.gate {
                unsafe {
                    dg.slice_mut(block * gate_len + sequence * p.value_heads + value_head, 1)[0] = constant as f32
                };
            }
            fence();
        });
    }
    sum_parts(&mut dg, blocks);
    sum_parts(&mut dbeta, blocks);
    if let Gate::Constant(_) = x.gate {
        dg = (0..p.value_heads).map(|h| dg.iter().skip(h).step_by(p.value_heads).sum()).collect();
    }
    // Safety (of all): the tasks cover every token, head and value block.
    MatrixGradients {
        dq: unsafe { dq.finish() },
        dk: unsafe { dk.finish() },
        dv: unsafe { dv.finish() },
        dg: gated.then_some(dg),
        dbeta: delta.then_some(dbeta),
        da: low.then(|| unsafe { da.finish() }),
        db: low.then(|| unsafe { db.finish() }),
        d_initial_state: x.initial_state.map(|_| dh0),
    }
}

/// Adds the later of `count` equal parts to the first, and keeps that.
fn sum_parts(parts: &mut Vec<f32>, count: usize) {
    let len = parts.len() / count;
    let (sum, rest) = parts.split_at_mut(len);
    for part in rest.chunks_exact(len.max(1)) {
        sum.iter_mut().zip(part).for_each(|(s, x)| *s += x);
    }
    parts.truncate(len);
}

/// Scratch of one thread: a chunk, and the gradients of its tensors by role.
struct Work<S> {
    chunk: Chunk,
    sums: S,
    state: Tile,
    state_t: Tile,
    dstate: Tile,
    dstate_t: Tile,
    do_: Tile,
    dv: Tile,
    du: Tile,
    q_left: Tile,
    k_left: Tile,
    k_right: Tile,
    k_end: Tile,
    a_left: Tile,
    b_right: Tile,
    b_end: Tile,
    dbeta: Vec<f32>,
    diagonal_k: Vec<f32>,
    diagonal_b: Vec<f32>,
    /// Gradients of the scores `P_a,k` and `P_a,b` of neighbours, between which no decay lies either.
    next_k: Vec<f32>,
    next_b: Vec<f32>,
    s: Scratch,
}

struct Scratch {
    /// `[chunk, key_dim]`.
    unscaled: Tile,
    key_out: Tile,
    /// `[value_dim, chunk]`.
    value_t: Tile,
    /// `[chunk, chunk]`.
    dp: Tile,
}

impl<S> Work<S> {
    fn new(layout: Layout, rule: Rule, sums: S) -> Self {
        let (p, width) = (layout.p, layout.width());
        let c = p.chunk;
        let keys = |used: bool| Tile::new(if used { c } else { 1 }, p.key_dim);
        let values = |used: bool| Tile::new(if used { c } else { 1 }, width);
        let (solved, low) = (rule != Rule::Additive, rule == Rule::LowRank);
        Self {
            chunk: Chunk::new(layout, rule),
            sums,
            state: Tile::new(p.key_dim, width),
            state_t: Tile::new(width, p.key_dim),
            dstate: Tile::new(p.key_dim, width),
            dstate_t: Tile::new(width, p.key_dim),
            do_: values(true),
            dv: values(true),
            du: values(solved),
            q_left: keys(true),
            k_left: keys(rule == Rule::Delta),
            k_right: keys(true),
            k_end: keys(true),
            a_left: keys(low),
            b_right: keys(low),
            b_end: keys(low),
            dbeta: vec![0.0; c],
            diagonal_k: vec![0.0; c],
            diagonal_b: vec![0.0; c],
            next_k: vec![0.0; c],
            next_b: vec![0.0; c],
            s: Scratch { unscaled: keys(true), key_out: keys(true), value_t: Tile::new(width, c), dp: Tile::new(c, c) },
        }
    }

    /// From `do` and `dstate` (of the state that leaves the chunk) to the gradients by role, and `dstate` of the state
    /// that enters it.
    fn run<D: Decay<Sums = S>>(&mut self, rule: Rule, decay: &D, rows: usize) {
        let Self { chunk: c, sums, state, state_t, dstate, dstate_t, do_, s, .. } = self;
        let (k_dim, v_dim) = (state.rows(), state.cols());
        c.solve(rule, decay, sums, rows, state);
        decay.scale_from_start(sums, Reads::Decayed, Mode::Set, &c.q, &mut c.q_in);
        state_t.transpose_from(state, k_dim);
        dstate_t.transpose_from(dstate, k_dim);
        decay.gradient_of_state(sums, state, dstate);
        for tile in [&mut self.q_left, &mut self.k_left, &mut self.k_right, &mut self.a_left, &mut self.b_right] {
            tile.fill(0.0);
        }

        // Through what the chunk wrote.
        let mut write = Written { decay, do_, dstate, dstate_t, q_left: &mut self.q_left, q: &c.q, s, ahead: &c.ahead };
        let (k_right, k_end) = (&mut self.k_right, &mut self.k_end);
        let mut by_k = Key { key: &c.k, right: k_right, end: k_end, diagonal: &mut self.diagonal_k };
        match rule {
            Rule::Additive => write.backward(sums, rows, &mut by_k, &c.v, &mut self.dv, &mut c.p_k),
            Rule::Delta => write.backward(sums, rows, &mut by_k, &c.u, &mut self.du, &mut c.p_k),
            Rule::LowRank => {
                write.backward(sums, rows, &mut by_k, &c.v, &mut self.dv, &mut c.p_k);
                let (b_right, b_end) = (&mut self.b_right, &mut self.b_end);
                let mut by_b = Key { key: &c.b, right: b_right, end: b_end, diagonal: &mut self.diagonal_b };
                write.backward(sums, rows, &mut by_b, &c.u, &mut self.du, &mut c.p_b);
            }
        }

        // Through the queries' reading of the state.
        let by_state = Rhs::from((&*state_t, 0, 0)).asking(&c.ahead);
        gemm(Mode::Set, [rows, k_dim, v_dim], Lhs::of(do_, 0, 0), by_state, (&mut s.unscaled, 0, 0));
        decay.scale_from_start(sums, Reads::Decayed, Mode::Add, &s.unscaled, &mut self.q_left);
        decay.decay_state(sums, dstate);
        let by_do = Rhs::from((&*do_, 0, 0)).asking(&c.ahead);
        gemm(Mode::Add, [k_dim, v_dim, rows], Lhs::transposed(&c.q_in, 0, 0), by_do, (&mut *dstate, 0, 0));

        match rule {
            Rule::Additive => {}
            Rule::Delta => self.delta(decay, rows),
            Rule::LowRank => self.low_rank(decay, rows),
        }

        let Self { chunk: c, sums, .. } = self;
        decay.gradient_of_rows(sums, Reads::Decayed, 1.0, &c.q, &self.q_left);
        decay.gradient_of_rows(sums, Reads::Decayed, -1.0, &c.k, &self.k_right);
        match rule {
            Rule::Additive => {}
            Rule::Delta => decay.gradient_of_rows(sums, Reads::Decayed, 1.0, &c.k, &self.k_left),
            Rule::LowRank => {
                decay.gradient_of_rows(sums, Reads::Before, 1.0, &c.a, &self.a_left);
                decay.gradient_of_rows(sums, Reads::Decayed, -1.0, &c.b, &self.b_right);
            }
        }
    }

    /// Through `(I + diag(beta) P) u = beta (v - (k e^c) S)`.
    fn delta<D: Decay<Sums = S>>(&mut self, decay: &D, rows: usize) {
        let Self { chunk: c, sums, state_t, dstate, du, dv, dbeta, s, k_left, k_right, .. } = self;
        lower::solve_transposed(rows, &c.system, du);
        s.value_t.transpose_from(&c.u, rows);
        lower::outer(rows, du, &s.value_t, &mut s.dp);
        dot_rows(du, &c.residual, &mut dbeta[..rows]);
        for i in 0..rows {
            let (dp, p) = (s.dp.row_mut(i), c.p_solve.row(i));
            dbeta[i] -= dp[..i].iter().zip(&p[..i]).map(|(d, p)| d * p).sum::<f32>();
            dp[..i].iter_mut().for_each(|d| *d *= -c.beta[i]);
            dp[i..].fill(0.0);
        }
        decay.scores_backward(sums, &mut s.dp, (&c.k, Reads::Decayed), &c.k, k_left, k_right);
        scale_rows(&c.beta[..rows], Mode::Set, du, dv);
        let (k_dim, v_dim) = (dstate.rows(), dstate.cols());
        gemm(Mode::Set, [rows, k_dim, v_dim], Lhs::of(dv, 0, 0), (&*state_t, 0, 0), (&mut s.unscaled, 0, 0));
        decay.scale_from_start(sums, Reads::Decayed, Mode::Sub, &s.unscaled, k_left);
        gemm(Mode::Sub, [k_dim, v_dim, rows], Lhs::transposed(&c.read_in, 0, 0), (&*dv, 0, 0), (dstate, 0, 0));
    }

    /// Through `(I - P_a,b) u = (a e^{c-}) S + P_a,k v`.
    fn low_rank<D: Decay<Sums = S>>(&mut self, decay: &D, rows: usize) {
        let Self { chunk: c, sums, state_t, dstate, du, dv, s, a_left, b_right, k_right, next_k, next_b, .. } = self;
        lower::solve_transposed(rows, &c.system, du);
        for (key, value, right, next) in [(&c.b, &c.u, b_right, next_b), (&c.k, &c.v, k_right, next_k)] {
            s.value_t.transpose_from(value, rows);
            lower::outer(rows, du, &s.value_t, &mut s.dp);
            clear_from_diagonal(rows, &mut s.dp);
            for (i, d) in next[..rows].iter_mut().enumerate().skip(1) {
                *d = std::mem::take(&mut s.dp.row_mut(i)[i - 1]);
            }
            decay.scores_backward(sums, &mut s.dp, (&c.a, Reads::Before), key, a_left, right);
        }
        lower::apply_transposed(Mode::Add, rows, &c.p_feed, du, dv);
        let (k_dim, v_dim) = (dstate.rows(), dstate.cols());
        gemm(Mode::Set, [rows, k_dim, v_dim], Lhs::of(du, 0, 0), (&*state_t, 0, 0), (&mut s.unscaled, 0, 0));
        decay.scale_from_start(sums, Reads::Before, Mode::Add, &s.unscaled, a_left);
        gemm(Mode::Add, [k_dim, v_dim, rows], Lhs::transposed(&c.read_in, 0, 0), (&*du, 0, 0), (dstate, 0, 0));
    }

    /// Adds up the roles: `q_left` becomes `dq`, `k_right` `dk`, `b_right` `db`; `a_left` is `da` already.
    fn finish(&mut self, rule: Rule, rows: usize, scale: f32) {
        let Self { chunk: c, q_left, k_right, k_end, b_right, b_end, diagonal_k, diagonal_b, .. } = self;
        scale_rows(&diagonal_k[..rows], Mode::Add, &c.k, q_left);
        scale_rows(&diagonal_k[..rows], Mode::Add, &c.q, k_right);
        add_rows(rows, k_end, k_right);
        if rule == Rule::Delta {
            add_rows(rows, &self.k_left, k_right);
        }
        if rule == Rule::LowRank {
            scale_rows(&diagonal_b[..rows], Mode::Add, &c.b, q_left);
            scale_rows(&diagonal_b[..rows], Mode::Add, &c.q, b_right);
            add_rows(rows, b_end, b_right);
            for (next, key, right) in [(&self.next_k, &c.k, k_right), (&self.next_b, &c.b, b_right)] {
                for (i, &d) in next[..rows].iter().enumerate().skip(1) {
                    self.a_left.row_mut(i).iter_mut().zip(key.row(i - 1)).for_each(|(x, k)| *x += d * k);
                    right.row_mut(i - 1).iter_mut().zip(c.a.row(i)).for_each(|(x, a)| *x += d * a);
                }
            }
        }
        let data = q_left.data_mut();
        vectorize(
            #[inline(always)]
            || data.iter_mut().for_each(|x| *x *= scale),
        );
    }
}

/// What every write shares: `o += tril(P_q,key) value` and `S += (key e^{c_n - c})^T value`.
struct Written<'a, D> {
    decay: &'a D,
    do_: &'a Tile,
    dstate: &'a Tile,
    dstate_t: &'a Tile,
    q: &'a Tile,
    q_left: &'a mut Tile,
    s: &'a mut Scratch,
    ahead: &'a Ahead,
}

impl<D: Decay> Written<'_, D> {
    fn backward(
        &mut self,
        sums: &mut D::Sums,
        rows: usize,
        by: &mut Key,
        value: &Tile,
        dvalue: &mut Tile,
        p: &mut Tile,
    ) {
        let Scratch { unscaled, key_out, value_t, dp, .. } = &mut *self.s;
        let (k_dim, v_dim) = (self.dstate.rows(), self.dstate.cols());
        self.decay.scale_to_end(sums, Mode::Set, by.key, key_out);
        let by_dstate = Rhs::from((self.dstate, 0, 0)).asking(self.ahead);
        gemm(Mode::Set, [rows, v_dim, k_dim], Lhs::of(key_out, 0, 0), by_dstate, (&mut *dvalue, 0, 0));
        self.decay.scores(sums, (self.q, Reads::Decayed), by.key, true, p);
        lower::apply_transposed(Mode::Add, rows, p, self.do_, dvalue);

        let by_dstate = Rhs::from((self.dstate_t, 0, 0)).asking(self.ahead);
        gemm(Mode::Set, [rows, k_dim, v_dim], Lhs::of(value, 0, 0), by_dstate, (&mut *unscaled, 0, 0));
        self.decay.scale_to_end(sums, Mode::Set, unscaled, by.end);
        self.decay.gradient_of_end(sums, by.key, by.end);

        value_t.transpose_from(value, rows);
        lower::outer(rows, self.do_, value_t, dp);
        for (i, d) in by.diagonal[..rows].iter_mut().enumerate() {
            *d = dp.row(i)[i];
        }
        clear_from_diagonal(rows, dp);
        self.decay.scores_backward(sums, dp, (self.q, Reads::Decayed), by.key, self.q_left, by.right);
    }
}

/// The key of a write and its gradients: through the scores of later queries, through the state at the end of the
/// chunk, and through the score with its own token's query.
struct Key<'a> {
    key: &'a Tile,
    right: &'a mut Tile,
    end: &'a mut Tile,
    diagonal: &'a mut [f32],
}

fn clear_from_diagonal(rows: usize, p: &mut Tile) {
    for i in 0..rows {
        p.row_mut(i)[i..].fill(0.0);
    }
}

/// Gradient of a tensor with query/key heads, to which several value heads and blocks contribute: each its own part,
/// then summed in order.
enum KeyGradient<E> {
    Whole { gradient: Output<E>, heads: usize },
    Parts { parts: Output<f32>, heads: usize, blocks: usize, key_dim: usize, group: usize },
}

enum Target<E> {
    Whole { out: Sink<E>, heads: usize },
    Parts { out: Sink<f32>, heads: usize, blocks: usize },
}

impl<E: Element> KeyGradient<E> {
    fn new(layout: Layout, used: bool) -> Self {
        let (p, blocks) = (layout.p, layout.blocks);
        let tokens = if used { p.batch * p.time } else { 0 };
        let MatrixProblem { value_heads: heads, key_dim, .. } = *p;
        if p.heads == heads * blocks {
            KeyGradient::Whole { gradient: Output::new(tokens * heads * key_dim, Vec::new()), heads }
        } else {
            let parts = Output::new(tokens * heads * blocks * key_dim, Vec::new());
            let group = heads * blocks / p.heads;
            KeyGradient::Parts { parts, heads, blocks, key_dim, group }
        }
    }

    fn target(&mut self) -> Target<E> {
        match self {
            KeyGradient::Whole { gradient, heads, .. } => Target::Whole { out: gradient.rows(), heads: *heads },
            KeyGradient::Parts { parts, heads, blocks, .. } => {
                Target::Parts { out: parts.rows(), heads: *heads, blocks: *blocks }
            }
        }
    }

    /// # Safety
    /// Every row has been stored.
    unsafe fn finish(self) -> Vec<E> {
        match self {
            // Safety: see above.
            KeyGradient::Whole { gradient, .. } => unsafe { gradient.finish() },
            KeyGradient::Parts { parts, key_dim, group, .. } => {
                // Safety: see above.
                let parts = unsafe { parts.finish() };
                let mut out = vec![E::default(); parts.len() / group];
                let sum = |(out, parts): (&mut [E], &[f32])| {
                    for (i, o) in out.iter_mut().enumerate() {
                        *o = E::from_f32(parts.iter().skip(i).step_by(key_dim).sum());
                    }
                };
                out.par_chunks_mut(key_dim).zip(parts.par_chunks(key_dim * group)).for_each(sum);
                out
            }
        }
    }
}

impl<E: Element> Target<E> {
    fn store(&self, tile: &Tile, at: Place) {
        let rows = |heads: usize, head: usize| {
            let stride = heads * tile.cols();
            Rows { offset: at.token * stride + head * tile.cols(), stride }
        };
        match self {
            Target::Whole { out, heads } => tile.put(out, rows(*heads, at.value_head), at.rows),
            Target::Parts { out, heads, blocks } => {
                tile.put(out, rows(heads * blocks, at.value_head * blocks + at.block), at.rows);
            }
        }
    }
}
