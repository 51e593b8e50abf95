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
use super::super::tile::{Shared, Tile};
use super::chunk::{Chunk, Layout, Place, Rule};
use super::decay::{Decay, Reads};
use super::key_gradient::{KeyGradient, Target};
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
        let dh0 = Shared::new(&mut dh0);
        let pass = Pass {
            layout,
            rule,
            x,
            decay,
            do_: cotangents.o,
            chunk_states,
            dq: dq.target(),
            dk: dk.target(),
            da: da.target(),
            db: db.target(),
            dv: dv.rows(),
            dg: (Shared::new(&mut dg), gate_len),
            dbeta: (Shared::new(&mut dbeta), beta_len),
        };
        let work = || Work::new(layout, rule, decay.sums(p.chunk, p.key_dim));
        (0..layout.tasks()).into_par_iter().for_each_init(work, |w, task| {
            let walk = layout.walk(task);
            let Place { sequence, value_head, block, .. } = walk[0];
            match cotangents.final_state {
                Some(d) => w.dstate.load(d, layout.state(walk[0]), p.key_dim),
                None => w.dstate.fill(0.0),
            }
            w.constant = 0.0;
            for (i, &at) in walk.iter().enumerate().rev() {
                w.state.load(chunk_states, layout.chunk_state(at), p.key_dim);
                pass.run(w, at, i.checked_sub(1).map(|i| walk[i]));
            }
            if x.initial_state.is_some() {
                w.dstate.store(&dh0, layout.state(walk[0]), p.key_dim);
            }
            if let Gate::Constant(_) = x.gate {
                let (dg, each) = &pass.dg;
                // Safety: as in `Pass::store`.
                unsafe { dg.slice_mut(block * each + sequence * p.value_heads + value_head, 1)[0] = w.constant as f32 };
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

/// What the chunks of all tasks have in common.
struct Pass<'a, E, D> {
    layout: Layout<'a>,
    rule: Rule,
    x: &'a MatrixInputs<'a, E>,
    decay: &'a D,
    do_: &'a [E],
    chunk_states: &'a [f32],
    dq: Target<E>,
    dk: Target<E>,
    da: Target<E>,
    db: Target<E>,
    dv: Sink<E>,
    /// Parts by value block, and the length of each.
    dg: (Shared<f32>, usize),
    dbeta: (Shared<f32>, usize),
}

impl<E: Element, D: Decay> Pass<'_, E, D> {
    /// One chunk: its gradients, and from `dstate` of the state after it to that of the state before it, which is in `state`.
    fn run(&self, w: &mut Work<D::Sums>, at: Place, next: Option<Place>) {
        let Self { layout, rule, x, decay, do_, chunk_states, .. } = *self;
        let p = layout.p;
        w.chunk.load(layout, x, decay, &mut w.sums, at);
        w.do_.load(do_, layout.value(at), at.rows);
        w.chunk.ahead.clear();
        if let Some(next) = next {
            w.chunk.ahead.rows(chunk_states, layout.chunk_state(next), p.key_dim, layout.width());
            w.chunk.ask_for(layout, x, next);
            w.chunk.ahead.rows(do_, layout.value(next), next.rows, layout.width());
        }
        w.run(rule, decay, at.rows);
        w.finish(rule, at.rows, p.scale);
        if at.rows > 1 && !w.is_finite(rule, at.rows) {
            self.token_by_token(w, at);
        } else {
            self.store(w, at);
        }
    }

    /// A chunk again, as chunks of one token each.
    fn token_by_token(&self, w: &mut Work<D::Sums>, at: Place) {
        let Self { layout, rule, x, decay, .. } = *self;
        // As it was before the chunk.
        w.dstate.transpose_from(&w.dstate_t, layout.width());
        w.chunk.ahead.clear();
        let mut state = w.state.clone();
        let states: Vec<_> = at
            .tokens()
            .map(|token| {
                let before = state.clone();
                w.chunk.load(layout, x, decay, &mut w.sums, token);
                w.chunk.solve(rule, decay, &mut w.sums, 1, &state);
                w.chunk.update_state(rule, decay, &w.sums, 1, &mut state);
                before
            })
            .collect();
        for (token, state) in at.tokens().zip(states).rev() {
            w.state = state;
            self.run(w, token, None);
        }
    }

    fn store(&self, w: &mut Work<D::Sums>, at: Place) {
        let (p, gate) = (self.layout.p, self.x.gate);
        // Safety (here and below): a task writes only the rows of its own tokens, head and block.
        let row = |i: usize| (at.token + i) * p.value_heads + at.value_head;
        if !matches!(gate, Gate::None) {
            let (dg, each) = &self.dg;
            self.decay.gate_gradient(&mut w.sums, &mut |i, gradient| match gate {
                Gate::Constant(_) => w.constant += gradient[0] as f64,
                _ => {
                    let offset = at.block * each + row(i) * gradient.len();
                    unsafe { dg.slice_mut(offset, gradient.len()) }.copy_from_slice(gradient);
                }
            });
        }
        if self.rule == Rule::Delta {
            let (dbeta, each) = &self.dbeta;
            for (i, &b) in w.dbeta[..at.rows].iter().enumerate() {
                unsafe { dbeta.slice_mut(at.block * each + row(i), 1)[0] = b };
            }
        }
        w.dv.put(&self.dv, self.layout.value(at), at.rows);
        self.dq.store(&w.q_left, at);
        self.dk.store(&w.k_right, at);
        if self.rule == Rule::LowRank {
            self.da.store(&w.a_left, at);
            self.db.store(&w.b_right, at);
        }
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
    /// Of the head's one gate, over the tokens so far.
    constant: f64,
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
            constant: 0.0,
            diagonal_k: vec![0.0; c],
            diagonal_b: vec![0.0; c],
            next_k: vec![0.0; c],
            next_b: vec![0.0; c],
            s: Scratch { unscaled: keys(true), key_out: keys(true), value_t: Tile::new(width, c), dp: Tile::new(c, c) },
        }
    }

    /// Whether the gradients of the chunk's tensors are; then so are those of its gates.
    fn is_finite(&self, rule: Rule, rows: usize) -> bool {
        let of_all = [&self.q_left, &self.k_right, &self.dv].iter().all(|tile| tile.is_finite(rows));
        of_all && (rule != Rule::LowRank || (self.a_left.is_finite(rows) && self.b_right.is_finite(rows)))
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
        // A token alone is on the right of no pair, and those zeros would hide nothing.
        if rows > 1 {
            decay.gradient_of_rows(sums, Reads::Decayed, -1.0, &c.k, &self.k_right);
        }
        match rule {
            Rule::Additive => {}
            Rule::Delta => decay.gradient_of_rows(sums, Reads::Decayed, 1.0, &c.k, &self.k_left),
            Rule::LowRank => {
                decay.gradient_of_rows(sums, Reads::Before, 1.0, &c.a, &self.a_left);
                if rows > 1 {
                    decay.gradient_of_rows(sums, Reads::Decayed, -1.0, &c.b, &self.b_right);
                }
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
        if rows > 1 {
            lower::apply_transposed(Mode::Add, rows, &c.p_feed, du, dv);
        }
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
