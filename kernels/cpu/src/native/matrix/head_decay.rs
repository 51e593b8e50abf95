//! Decay by a scalar: one gate per token and head (or one per head, or none).

use super::super::gemm::Mode;
use super::super::simd::{exp, vectorize};
use super::super::tile::Tile;
use super::decay::{Decay, Reads};
use super::lower;
use super::rows::{dot_rows, scale_rows};

/// Where the gates are.
#[derive(Clone, Copy)]
pub(crate) enum HeadGate<'a> {
    None,
    /// `[value_heads]`.
    Constant(&'a [f32]),
    /// `[tokens, value_heads]`.
    Token(&'a [f32]),
}

pub(crate) struct HeadDecay<'a> {
    pub gate: HeadGate<'a>,
    pub value_heads: usize,
}

pub(crate) struct HeadSums {
    rows: usize,
    g: Vec<f32>,
    /// `e^{c_i}` for `i` in `0..=n`, and `e^{c_n - c_{i+1}}`.
    from_start: Vec<f32>,
    to_end: Vec<f32>,
    /// `e^{c_{i+1} - c_{j+1}}` for `i >= j`.
    ratio: Tile,
    log: Vec<f32>,
    transposed: Tile,
    dots: Vec<f32>,
    /// Of the sums `c_i`; and, for each token, what all gates after it get.
    gradient: Vec<f32>,
    ending: Vec<f32>,
}

impl HeadSums {
    fn end(&self) -> f32 {
        self.from_start[self.rows]
    }
}

impl Decay for HeadDecay<'_> {
    type Sums = HeadSums;

    fn sums(&self, chunk: usize, key_dim: usize) -> HeadSums {
        HeadSums {
            rows: 0,
            g: vec![0.0; chunk],
            from_start: vec![1.0; chunk + 1],
            to_end: vec![1.0; chunk],
            ratio: Tile::new(chunk, chunk),
            log: vec![0.0; chunk],
            transposed: Tile::new(key_dim, chunk),
            dots: vec![0.0; chunk.max(key_dim)],
            gradient: vec![0.0; chunk + 1],
            ending: vec![0.0; chunk],
        }
    }

    fn load(&self, s: &mut HeadSums, token: usize, rows: usize, head: usize) {
        s.rows = rows;
        for (i, g) in s.g[..rows].iter_mut().enumerate() {
            *g = match self.gate {
                HeadGate::None => 0.0,
                HeadGate::Constant(g) => g[head],
                HeadGate::Token(g) => g[(token + i) * self.value_heads + head],
            };
        }
        let (mut forward, mut backward) = (0.0, 0.0);
        for i in 0..rows {
            forward += s.g[i];
            s.from_start[i + 1] = exp(forward);
            s.to_end[rows - 1 - i] = exp(backward);
            backward += s.g[rows - 1 - i];
        }
        let HeadSums { ratio, log, g, .. } = s;
        vectorize(
            #[inline(always)]
            || {
                for i in 0..rows {
                    log[..i].iter_mut().for_each(|l| *l += g[i]);
                    log[i] = 0.0;
                    ratio.row_mut(i)[..=i].iter_mut().zip(&log[..=i]).for_each(|(r, l)| *r = exp(*l));
                }
            },
        );
    }

    fn scale_from_start(&self, s: &HeadSums, reads: Reads, mode: Mode, src: &Tile, dst: &mut Tile) {
        scale_rows(&s.from_start[reads.offset()..][..s.rows], mode, src, dst);
    }

    fn scale_to_end(&self, s: &HeadSums, mode: Mode, src: &Tile, dst: &mut Tile) {
        scale_rows(&s.to_end[..s.rows], mode, src, dst);
    }

    fn decay_state(&self, s: &HeadSums, state: &mut Tile) {
        if matches!(self.gate, HeadGate::None) {
            return;
        }
        let (factor, data) = (s.end(), state.data_mut());
        vectorize(
            #[inline(always)]
            || data.iter_mut().for_each(|x| *x *= factor),
        );
    }

    fn scores(&self, s: &mut HeadSums, (x, reads): (&Tile, Reads), y: &Tile, diagonal: bool, p: &mut Tile) {
        s.transposed.transpose_from(y, s.rows);
        lower::outer(s.rows, x, &s.transposed, p);
        multiply_lower(s, reads, diagonal, p);
    }

    fn scores_backward(
        &self,
        s: &mut HeadSums,
        dp: &mut Tile,
        (x, reads): (&Tile, Reads),
        y: &Tile,
        dx: &mut Tile,
        dy: &mut Tile,
    ) {
        // A token alone has no pair, and its zero would hide nothing.
        if s.rows < 2 {
            return;
        }
        multiply_lower(s, reads, false, dp);
        lower::apply(Mode::Add, s.rows, dp, y, dx);
        lower::apply_transposed(Mode::Add, s.rows, dp, x, dy);
    }

    fn gradient_of_state(&self, s: &mut HeadSums, state: &Tile, dstate: &Tile) {
        let dots = &mut s.dots[..state.rows()];
        dot_rows(state, dstate, dots);
        let total: f32 = dots.iter().sum();
        s.gradient.fill(0.0);
        s.ending.fill(0.0);
        s.gradient[s.rows] = s.end() * total;
    }

    fn gradient_of_end(&self, s: &mut HeadSums, x: &Tile, dx: &Tile) {
        let HeadSums { dots, ending, rows, .. } = s;
        dot_rows(x, dx, &mut dots[..*rows]);
        ending.iter_mut().zip(&dots[..*rows]).for_each(|(e, d)| *e += d);
    }

    fn gradient_of_rows(&self, s: &mut HeadSums, reads: Reads, sign: f32, x: &Tile, dx: &Tile) {
        let HeadSums { dots, gradient, rows, .. } = s;
        dot_rows(x, dx, &mut dots[..*rows]);
        for (sum, d) in gradient[reads.offset()..].iter_mut().zip(&dots[..*rows]) {
            *sum += sign * d;
        }
    }

    fn gate_gradient(&self, s: &mut HeadSums, store: &mut dyn FnMut(usize, &[f32])) {
        let HeadSums { dots, gradient, ending, rows, .. } = s;
        let mut earlier = 0.0;
        for (sum, e) in dots.iter_mut().zip(&ending[..*rows]) {
            *sum = earlier;
            earlier += e;
        }
        let mut later = 0.0;
        for i in (0..*rows).rev() {
            later += gradient[i + 1];
            store(i, &[later + dots[i]]);
        }
    }
}

/// `p = ratio (.) p` on and below the diagonal (or just below it), zero elsewhere.
fn multiply_lower(s: &HeadSums, reads: Reads, diagonal: bool, p: &mut Tile) {
    vectorize(
        #[inline(always)]
        || {
            for i in 0..s.rows {
                let keep = i + diagonal as usize;
                // Between j and the state before token i lie the same tokens as between j and token i - 1.
                let ratio = s.ratio.row((i + reads.offset()).saturating_sub(1));
                let row = p.row_mut(i);
                row[..keep].iter_mut().zip(ratio).for_each(|(p, r)| *p *= r);
                row[keep..].fill(0.0);
            }
        },
    );
}
