//! One chunk of one head in scratch tiles: loading, and the values that the chunk writes.

use super::super::ahead::Ahead;
use super::super::gemm::{Lhs, Mode, Rhs, gemm};
use super::super::simd::vectorize;
use super::super::tile::{LINE, Rows, Tile};
use super::decay::{Decay, Reads};
use super::{chunks_before, lower};
use crate::element::Element;
use crate::matrix::{Gate, MatrixInputs, MatrixProblem, Write};
use crate::sequences::Sequences;

/// Where one chunk of one value block lies in the tensors.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub sequence: usize,
    /// First token of the chunk, counted over all sequences.
    pub token: usize,
    pub rows: usize,
    pub value_head: usize,
    /// Which slice of the head's value features.
    pub block: usize,
    /// Index of the chunk over all sequences.
    pub chunk: usize,
}

impl Place {
    /// Its tokens, each a chunk of its own: without a pair of tokens that must not meet. In a longer chunk such a pair's score
    /// is 0, and what is infinite or NaN would reach other tokens through it.
    pub fn tokens(self) -> impl ExactSizeIterator<Item = Place> + DoubleEndedIterator {
        (0..self.rows).map(move |i| Place { token: self.token + i, rows: 1, ..self })
    }
}

/// How a problem is cut into tasks, and where each finds its data. A task walks the chunks of one sequence for one value
/// head or, where those are fewer than the threads, for a block of its value features: the columns of a state do not
/// depend on each other.
#[derive(Clone, Copy)]
pub(crate) struct Layout<'a> {
    pub p: &'a MatrixProblem,
    sequences: &'a Sequences,
    pub blocks: usize,
}

impl<'a> Layout<'a> {
    pub fn new(p: &'a MatrixProblem, sequences: &'a Sequences) -> Self {
        let heads = sequences.count() * p.value_heads;
        let mut blocks = 1;
        while heads * blocks < rayon::current_num_threads() && p.value_dim.is_multiple_of(2 * blocks * LINE) {
            blocks *= 2;
        }
        Self { p, sequences, blocks }
    }

    pub fn tasks(&self) -> usize {
        self.sequences.count() * self.p.value_heads * self.blocks
    }

    /// Value features of a block.
    pub fn width(&self) -> usize {
        self.p.value_dim / self.blocks
    }

    /// The chunks of a task, in order; at least one.
    pub fn walk(&self, task: usize) -> Vec<Place> {
        let Self { p, sequences, blocks } = *self;
        let (block, head) = (task % blocks, task / blocks);
        let (value_head, sequence) = (head % p.value_heads, head / p.value_heads);
        let range = sequences.range(sequence);
        let first = chunks_before(sequences, sequence, p.chunk);
        let place = |(i, token): (usize, usize)| {
            let rows = p.chunk.min(range.end - token);
            Place { sequence, token, rows, value_head, block, chunk: first + i }
        };
        range.clone().step_by(p.chunk).enumerate().map(place).collect()
    }

    /// In a `[tokens, heads, key_dim]` tensor.
    pub fn key(&self, at: Place) -> Rows {
        let stride = self.p.heads * self.p.key_dim;
        Rows { offset: at.token * stride + at.value_head * self.p.heads / self.p.value_heads * self.p.key_dim, stride }
    }

    /// In a `[tokens, value_heads, value_dim]` tensor.
    pub fn value(&self, at: Place) -> Rows {
        let stride = self.p.value_heads * self.p.value_dim;
        Rows { offset: at.token * stride + at.value_head * self.p.value_dim + at.block * self.width(), stride }
    }

    /// In a `[sequences, value_heads, key_dim, value_dim]` tensor.
    pub fn state(&self, at: Place) -> Rows {
        self.matrix(at.sequence, at)
    }

    /// In a `[chunks, value_heads, key_dim, value_dim]` tensor.
    pub fn chunk_state(&self, at: Place) -> Rows {
        self.matrix(at.chunk, at)
    }

    fn matrix(&self, index: usize, at: Place) -> Rows {
        let MatrixProblem { value_heads, key_dim, value_dim, .. } = *self.p;
        let offset = (index * value_heads + at.value_head) * key_dim * value_dim + at.block * self.width();
        Rows { offset, stride: value_dim }
    }
}

/// The inputs of a chunk, and what the forward pass computes of them.
pub(crate) struct Chunk {
    /// `scale * q`.
    pub q: Tile,
    pub k: Tile,
    pub v: Tile,
    /// Low-rank write only.
    pub a: Tile,
    pub b: Tile,
    /// `q e^c`, and `k e^c` (delta) or `a e^{c-}` (low rank).
    pub q_in: Tile,
    pub read_in: Tile,
    /// `key e^{c_n - c}` of a write.
    pub key_out: Tile,
    /// The solved values, and `v - (k e^c) S` of the delta rule.
    pub u: Tile,
    pub residual: Tile,
    pub beta: Vec<f32>,
    /// `P_k,k` or `P_a,b`; with `diag(beta)` or the sign of the solve applied in `system`.
    pub p_solve: Tile,
    pub system: Tile,
    /// `P_a,k`.
    pub p_feed: Tile,
    /// `P_q,k`, and `P_q,b`.
    pub p_k: Tile,
    pub p_b: Tile,
    /// The next chunk's inputs, for the products with the state.
    pub ahead: Ahead,
}

/// Which of the two solved writes, or none.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    Additive,
    Delta,
    LowRank,
}

impl Rule {
    pub fn of<B, L>(write: &Write<B, L>) -> Self {
        match write {
            Write::Additive => Rule::Additive,
            Write::Delta { .. } => Rule::Delta,
            Write::LowRank { .. } => Rule::LowRank,
        }
    }
}

impl Chunk {
    pub fn new(layout: Layout, rule: Rule) -> Self {
        let p = layout.p;
        let c = p.chunk;
        // Tiles that a rule does not use stay empty.
        let size = |used: bool, n: usize| if used { n } else { 1 };
        let (solved, low) = (rule != Rule::Additive, rule == Rule::LowRank);
        let keys = |used| Tile::new(size(used, c), p.key_dim);
        let values = |used| Tile::new(size(used, c), layout.width());
        let square = |used| Tile::new(size(used, c), size(used, c));
        Self {
            q: keys(true),
            k: keys(true),
            v: values(true),
            a: keys(low),
            b: keys(low),
            q_in: keys(true),
            read_in: keys(solved),
            key_out: keys(true),
            u: values(solved),
            residual: values(rule == Rule::Delta),
            beta: vec![0.0; c],
            p_solve: square(solved),
            system: square(solved),
            p_feed: square(low),
            p_k: square(true),
            p_b: square(low),
            ahead: Ahead::default(),
        }
    }

    /// Reads the chunk's part of every input, and sums its gates.
    pub fn load<E: Element, D: Decay>(
        &mut self,
        layout: Layout,
        x: &MatrixInputs<E>,
        decay: &D,
        sums: &mut D::Sums,
        at: Place,
    ) {
        let p = layout.p;
        let load_key = |tile: &mut Tile, src: &[E]| tile.load(src, layout.key(at), at.rows);
        load_key(&mut self.q, x.q);
        load_key(&mut self.k, x.k);
        self.v.load(x.v, layout.value(at), at.rows);
        match x.write {
            Write::Additive => {}
            Write::Delta { beta } => {
                for (i, b) in self.beta[..at.rows].iter_mut().enumerate() {
                    *b = beta[(at.token + i) * p.value_heads + at.value_head];
                }
            }
            Write::LowRank { a, b } => {
                load_key(&mut self.a, a);
                load_key(&mut self.b, b);
            }
        }
        let (scale, q) = (p.scale, self.q.data_mut());
        vectorize(
            #[inline(always)]
            || q.iter_mut().for_each(|x| *x *= scale),
        );
        decay.load(sums, at.token, at.rows, at.value_head);
    }

    /// The inputs of a chunk that will be loaded next are asked for.
    pub fn ask_for<E: Element>(&mut self, layout: Layout, x: &MatrixInputs<E>, next: Place) {
        let (p, ahead) = (layout.p, &mut self.ahead);
        let mut ask_for_keys = |x| ahead.rows(x, layout.key(next), next.rows, p.key_dim);
        ask_for_keys(x.q);
        ask_for_keys(x.k);
        if let Write::LowRank { a, b } = x.write {
            ask_for_keys(a);
            ask_for_keys(b);
        }
        ahead.rows(x.v, layout.value(next), next.rows, layout.width());
        if let Gate::Key(g) = x.gate {
            let stride = p.value_heads * p.key_dim;
            let at = Rows { offset: next.token * stride + next.value_head * p.key_dim, stride };
            ahead.rows(g, at, next.rows, p.key_dim);
        }
    }

    /// Solves for the values `u` that the chunk writes, given the state that enters it.
    pub fn solve<D: Decay>(&mut self, rule: Rule, decay: &D, sums: &mut D::Sums, rows: usize, state: &Tile) {
        let (k_dim, v_dim) = (state.rows(), state.cols());
        match rule {
            Rule::Additive => {}
            Rule::Delta => {
                decay.scale_from_start(sums, Reads::Decayed, Mode::Set, &self.k, &mut self.read_in);
                self.residual.copy_rows(&self.v, rows);
                gemm(
                    Mode::Sub,
                    [rows, v_dim, k_dim],
                    Lhs::of(&self.read_in, 0, 0),
                    Rhs::from((state, 0, 0)).asking(&self.ahead),
                    (&mut self.residual, 0, 0),
                );
                super::rows::scale_rows(&self.beta[..rows], Mode::Set, &self.residual, &mut self.u);
                decay.scores(sums, (&self.k, Reads::Decayed), &self.k, false, &mut self.p_solve);
                super::rows::scale_rows(&self.beta[..rows], Mode::Set, &self.p_solve, &mut self.system);
                lower::solve(rows, &self.system, &mut self.u);
            }
            Rule::LowRank => {
                decay.scale_from_start(sums, Reads::Before, Mode::Set, &self.a, &mut self.read_in);
                let (a, s) = (Lhs::of(&self.read_in, 0, 0), Rhs::from((state, 0, 0)).asking(&self.ahead));
                gemm(Mode::Set, [rows, v_dim, k_dim], a, s, (&mut self.u, 0, 0));
                decay.scores(sums, (&self.a, Reads::Before), &self.k, false, &mut self.p_feed);
                // A token alone has no pair, and its zero would hide nothing.
                if rows > 1 {
                    lower::apply(Mode::Add, rows, &self.p_feed, &self.v, &mut self.u);
                }
                decay.scores(sums, (&self.a, Reads::Before), &self.b, false, &mut self.p_solve);
                negate(rows, &self.p_solve, &mut self.system);
                lower::solve(rows, &self.system, &mut self.u);
            }
        }
    }

    /// `state = Diag(e^{c_n}) state + (key e^{c_n - c})^T value`, summed over the writes.
    pub fn update_state<D: Decay>(&mut self, rule: Rule, decay: &D, sums: &D::Sums, rows: usize, state: &mut Tile) {
        let (k_dim, v_dim) = (state.rows(), state.cols());
        decay.decay_state(sums, state);
        let Self { k, b, v, u, key_out, ahead, .. } = self;
        let mut add = |key: &Tile, value: &Tile| {
            decay.scale_to_end(sums, Mode::Set, key, key_out);
            let value = Rhs::from((value, 0, 0)).asking(ahead);
            gemm(Mode::Add, [k_dim, v_dim, rows], Lhs::transposed(key_out, 0, 0), value, (&mut *state, 0, 0));
        };
        match rule {
            Rule::Additive => add(k, v),
            Rule::Delta => add(k, u),
            Rule::LowRank => {
                add(k, v);
                add(b, u);
            }
        }
    }
}

fn negate(rows: usize, src: &Tile, dst: &mut Tile) {
    for i in 0..rows {
        dst.row_mut(i).iter_mut().zip(src.row(i)).for_each(|(d, s)| *d = -s);
    }
}
