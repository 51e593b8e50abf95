//! Where chunks lie in the tensors.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use crate::matrix::MatrixProblem;
use crate::sequences::Sequences;

/// The sizes that are known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    /// Tokens of a sequence, if they are not packed.
    pub time: usize,
    /// Chunks of a sequence, if they are not packed.
    pub chunks: usize,
    /// Chunks of all sequences.
    pub all_chunks: usize,
    pub heads: usize,
    pub value_heads: usize,
    pub scale: f32,
}

/// Host side: the sizes, and the table of the chunks of packed sequences.
pub(crate) struct Layout {
    pub time: usize,
    pub chunks: usize,
    pub all_chunks: usize,
    pub sequences: usize,
    pub heads: usize,
    pub value_heads: usize,
    pub scale: f32,
    /// For each chunk its first token, tokens and sequence; then for each sequence its first chunk and chunks. One
    /// zero if sequences have one length.
    pub table: Vec<u32>,
}

impl Layout {
    pub fn new(p: &MatrixProblem, sequences: &Sequences, chunk: usize) -> Self {
        let chunks = p.time.div_ceil(chunk);
        let (mut table, mut all_chunks) = (vec![0], p.batch * chunks);
        if p.cu_seqlens.is_some() {
            table.clear();
            let mut walks = Vec::new();
            for n in 0..sequences.count() {
                let range = sequences.range(n);
                walks.extend([(table.len() / 3) as u32, range.len().div_ceil(chunk) as u32]);
                for token in range.clone().step_by(chunk) {
                    table.extend([token as u32, chunk.min(range.end - token) as u32, n as u32]);
                }
            }
            all_chunks = table.len() / 3;
            table.extend(walks);
        }
        let (sequences, time) = (sequences.count(), p.time);
        let (heads, value_heads, scale) = (p.heads, p.value_heads, p.scale);
        Self { time, chunks, all_chunks, sequences, heads, value_heads, scale, table }
    }

    pub fn sizes(&self) -> SizesLaunch {
        SizesLaunch::new(self.time, self.chunks, self.all_chunks, self.heads, self.value_heads, self.scale)
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
    pub fn new(sizes: &Sizes, table: &[u32], chunk: usize, head: usize, #[comptime] b: Blueprint) -> Place {
        let key_head = head / (sizes.value_heads / sizes.heads);
        if comptime!(b.packed) {
            let (token, rows) = (table[chunk * 3] as usize, table[chunk * 3 + 1] as usize);
            Place { chunk, token, rows, head, key_head }
        } else {
            let first = (chunk % sizes.chunks) * b.chunk;
            let token = (chunk / sizes.chunks) * sizes.time + first;
            let rows = clamp_max(sizes.time - first, comptime!(b.chunk));
            Place { chunk, token, rows, head, key_head }
        }
    }

    /// Where the chunk's first row is in a `[tokens, heads, key_dim]` tensor, and from there to the next row.
    pub fn keys(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> (usize, usize) {
        ((self.token * sizes.heads + self.key_head) * b.key_dim, sizes.heads * b.key_dim)
    }

    /// The same in `[tokens, value_heads, key_dim]`.
    pub fn key_gates(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> (usize, usize) {
        ((self.token * sizes.value_heads + self.head) * b.key_dim, sizes.value_heads * b.key_dim)
    }

    /// The same in `[tokens, value_heads, value_dim]`.
    pub fn values(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> (usize, usize) {
        ((self.token * sizes.value_heads + self.head) * b.value_dim, sizes.value_heads * b.value_dim)
    }

    /// The same in `[tokens, value_heads]`.
    pub fn scalars(&self, sizes: &Sizes) -> (usize, usize) {
        (self.token * sizes.value_heads + self.head, sizes.value_heads)
    }

    /// Where the chunk's state is in `[chunks, value_heads, key_dim, value_dim]`.
    pub fn state(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> usize {
        (self.chunk * sizes.value_heads + self.head) * comptime!(b.key_dim * b.value_dim)
    }

    /// Where the chunk's scores are in `[chunks, value_heads, chunk, chunk]`.
    pub fn scores(&self, sizes: &Sizes, #[comptime] b: Blueprint) -> usize {
        (self.chunk * sizes.value_heads + self.head) * comptime!(b.chunk * b.chunk)
    }
}

#[cube]
fn clamp_max(x: usize, #[comptime] max: usize) -> usize {
    if x < max { x } else { max.runtime() }
}

/// The chunks of a sequence: the first, and how many.
#[cube]
pub(crate) fn walk(sizes: &Sizes, table: &[u32], sequence: usize, #[comptime] b: Blueprint) -> (usize, usize) {
    if comptime!(b.packed) {
        let at = sizes.all_chunks * 3 + sequence * 2;
        (table[at] as usize, table[at + 1] as usize)
    } else {
        (sequence * sizes.chunks, sizes.chunks)
    }
}
