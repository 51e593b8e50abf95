//! Gradients of tensors with query/key heads.

use super::super::rows::{Output, Rows as Sink};
use super::super::tile::{Rows, Tile};
use super::chunk::{Layout, Place};
use crate::element::Element;
use crate::matrix::MatrixProblem;
use rayon::prelude::*;

/// Gradient of a tensor with query/key heads, to which several value heads and blocks contribute: each its own part,
/// then summed in order.
pub(super) enum KeyGradient<E> {
    Whole { gradient: Output<E>, heads: usize },
    Parts { parts: Output<f32>, heads: usize, blocks: usize, key_dim: usize, group: usize },
}

pub(super) enum Target<E> {
    Whole { out: Sink<E>, heads: usize },
    Parts { out: Sink<f32>, heads: usize, blocks: usize },
}

impl<E: Element> KeyGradient<E> {
    pub fn new(layout: Layout, used: bool) -> Self {
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

    pub fn target(&mut self) -> Target<E> {
        match self {
            KeyGradient::Whole { gradient, heads, .. } => Target::Whole { out: gradient.rows(), heads: *heads },
            KeyGradient::Parts { parts, heads, blocks, .. } => {
                Target::Parts { out: parts.rows(), heads: *heads, blocks: *blocks }
            }
        }
    }

    /// # Safety
    /// Every row has been stored.
    pub unsafe fn finish(self) -> Vec<E> {
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
    pub fn store(&self, tile: &Tile, at: Place) {
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
