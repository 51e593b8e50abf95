//! Where chunks lie in the tensors.

use cubecl::prelude::*;

use super::blueprint::{Blueprint, GateKind};
use crate::chunks::{Cut, Span};

/// The sizes that are known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    pub cut: Cut,
    pub sequences: usize,
    pub heads: usize,
    pub value_heads: usize,
    /// From the scalar gate of a token to that of the next: 0 if all tokens of a head share one.
    pub gate_stride: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Blocks of key and of value features, the last ones padded with zeros.
    pub key_blocks: usize,
    pub value_blocks: usize,
    pub scale: f32,
}

/// The chunks of one sequence, of which there is at least one.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Walk {
    pub first_token: usize,
    pub end: usize,
    pub first_chunk: usize,
    pub chunks: usize,
}

#[cube]
impl Walk {
    pub fn of(sizes: &Sizes, table: &[u32], sequence: usize, #[comptime] b: Blueprint) -> Walk {
        Walk::along(Span::of_sequence(sequence, &sizes.cut, table, b.chunk), b)
    }

    fn along(span: Span, #[comptime] b: Blueprint) -> Walk {
        let Span { first_token, end, first_chunk, .. } = span;
        Walk { first_token, end, first_chunk, chunks: (end - first_token).div_ceil(b.chunk) }
    }

    /// The `n`-th chunk, of one head.
    pub fn place(&self, sizes: &Sizes, n: usize, head: usize, #[comptime] b: Blueprint) -> Place {
        let token = self.first_token + n * b.chunk;
        let left = self.end - token;
        let rows = select(left < b.chunk, left, b.chunk.runtime());
        let key_head = head / (sizes.value_heads / sizes.heads);
        Place { chunk: self.first_chunk + n, token, rows, head, key_head }
    }
}

/// A chunk of one head.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Place {
    /// Its number among all chunks.
    pub chunk: usize,
    /// Its first token in the tensors.
    pub token: usize,
    pub rows: usize,
    pub head: usize,
    pub key_head: usize,
}

#[cube]
impl Place {
    /// The chunk of cube `cube`, if each has a chunk of a head.
    pub fn of(cube: usize, sizes: &Sizes, table: &[u32], #[comptime] b: Blueprint) -> Place {
        let (chunk, head) = (cube / sizes.value_heads, cube % sizes.value_heads);
        let walk = Walk::along(Span::of_chunk(chunk, &sizes.cut, table, b.chunk), b);
        walk.place(sizes, chunk - walk.first_chunk, head, b)
    }

    /// Where the chunk's first row is in a `[tokens, heads, key_dim]` tensor, and from there to the next row.
    pub fn keys(&self, sizes: &Sizes) -> (usize, usize) {
        ((self.token * sizes.heads + self.key_head) * sizes.key_dim, sizes.heads * sizes.key_dim)
    }

    /// The same in `[tokens, value_heads, key_dim]`.
    pub fn key_gates(&self, sizes: &Sizes) -> (usize, usize) {
        ((self.token * sizes.value_heads + self.head) * sizes.key_dim, sizes.value_heads * sizes.key_dim)
    }

    /// Where the keys are that the walks read: with gates per key feature those that the scores' launch has weighted.
    pub fn walked_keys(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> (usize, usize) {
        if comptime!(b.gate == GateKind::KEY) { self.key_gates(sizes) } else { self.keys(sizes) }
    }

    /// Where the chunk's row is in `[chunks, value_heads, key_dim]`.
    pub fn ends(&self, sizes: &Sizes) -> usize {
        (self.chunk * sizes.value_heads + self.head) * sizes.key_dim
    }

    /// The same in `[tokens, value_heads, value_dim]`.
    pub fn values(&self, sizes: &Sizes) -> (usize, usize) {
        ((self.token * sizes.value_heads + self.head) * sizes.value_dim, sizes.value_heads * sizes.value_dim)
    }

    /// The same in `[tokens, value_heads]`.
    pub fn scalars(&self, sizes: &Sizes) -> (usize, usize) {
        (self.token * sizes.value_heads + self.head, sizes.value_heads)
    }

    /// Where the chunk's state is in `[chunks, value_heads, key_dim, value_dim]`.
    pub fn state(&self, sizes: &Sizes) -> usize {
        (self.chunk * sizes.value_heads + self.head) * (sizes.key_dim * sizes.value_dim)
    }

    /// Where the chunk's scores are in `[chunks, value_heads, chunk, chunk]`.
    pub fn scores(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> usize {
        (self.chunk * sizes.value_heads + self.head) * comptime!(b.chunk * b.chunk)
    }
}
