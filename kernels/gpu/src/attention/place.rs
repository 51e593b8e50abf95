//! Where blocks of queries and of keys lie in the tensors, and which pairs of them meet.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use crate::chunks::{Cut, Span};
use crate::tile::unit;
use crate::transfer::Flight;

/// The sizes that are known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    /// The blocks of this launch.
    pub cut: Cut,
    /// Keys before the first query of a sequence.
    pub ahead: usize,
    pub time: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Tokens that a query sees, itself among them.
    pub window: usize,
    pub scale: f32,
    /// Minus infinity, the score of a pair that does not meet. WGSL has no constant for it.
    pub hidden: f32,
}

/// A block of queries or of keys of one sequence.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Block {
    /// Its first row in the tensor, and its rows.
    pub first: usize,
    pub rows: usize,
    /// Position of the first row in the sequence's keys.
    pub position: usize,
    /// On the other side, of keys or of queries: first row and rows of the sequence, and the position of the first.
    pub other: usize,
    pub other_rows: usize,
    pub other_position: usize,
}

#[cube]
impl Block {
    /// Of queries, the last of a sequence first, for they have the most to do where attention is causal.
    pub fn of_queries(index: usize, sizes: &Sizes, table: &[u32], #[comptime] chunk: usize) -> Block {
        let index = sizes.cut.chunks - 1 - index;
        let span = Span::of_chunk(index, &sizes.cut, table, chunk);
        let (first, rows) = span.tokens(index, chunk);
        Block {
            first,
            rows,
            position: sizes.ahead + first - span.first_token,
            other: span.first_token + span.sequence * sizes.ahead,
            other_rows: span.end - span.first_token + sizes.ahead,
            other_position: 0usize.runtime(),
        }
    }

    /// Of keys.
    pub fn of_keys(index: usize, sizes: &Sizes, table: &[u32], #[comptime] chunk: usize) -> Block {
        let span = Span::of_chunk(index, &sizes.cut, table, chunk);
        let (first, rows) = span.tokens(index, chunk);
        Block {
            first,
            rows,
            position: first - span.first_token,
            other: span.first_token - span.sequence * sizes.ahead,
            other_rows: span.end - span.first_token - sizes.ahead,
            other_position: sizes.ahead,
        }
    }

    /// Of a block of queries: the first row of the keys that any of them sees, down to a multiple of `chunk`, and the row
    /// after the last.
    pub fn keys(&self, sizes: &Sizes, #[comptime] chunk: usize) -> (usize, usize) {
        let seen = self.position + 1;
        let from = select(seen > sizes.window, seen - min(sizes.window, seen), 0usize.runtime());
        (from / chunk * chunk, self.position + self.rows)
    }

    /// Of a block of keys: the same of the queries that see any of them.
    pub fn queries(&self, sizes: &Sizes, #[comptime] chunk: usize) -> (usize, usize) {
        let from = max(self.position, self.other_position) - self.other_position;
        let last = self.position + self.rows - 1;
        // No sum beyond the tokens that there are, as no window may be the largest number.
        let left = self.other_position + self.other_rows - last;
        let end = last + min(sizes.window, left);
        (from / chunk * chunk, max(end, self.other_position) - self.other_position)
    }
}

#[cube]
impl Block {
    /// Of a block of keys: the rows of the queries that see its key `row`, and the row after the last.
    pub fn queries_of(&self, row: usize, sizes: &Sizes) -> (usize, usize) {
        let key = self.position + row;
        let from = max(key, self.other_position) - self.other_position;
        let left = self.other_position + self.other_rows - key;
        (from, max(key + min(sizes.window, left), self.other_position) - self.other_position)
    }
}

/// Whether the query at one position sees the key at another.
#[cube]
pub(crate) fn sees(query: usize, key: usize, sizes: &Sizes) -> bool {
    key <= query && query - min(key, query) < sizes.window
}

/// Whether that is so of all pairs of two blocks that begin there.
#[cube]
pub(crate) fn all_see(queries: usize, keys: usize, sizes: &Sizes, #[comptime] chunk: usize) -> bool {
    keys + chunk <= queries + 1 && queries + chunk - keys <= sizes.window
}

/// Rows of a head of a `[rows, heads, dim]` tensor.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Rows {
    pub first: usize,
    pub count: usize,
    pub head: usize,
    pub heads: usize,
}

#[cube]
impl Rows {
    /// Where the first is, and from there to the next.
    pub fn at(&self, dim: usize) -> (usize, usize) {
        ((self.first * self.heads + self.head) * dim, self.heads * dim)
    }

    /// Asks for all features of these rows.
    pub fn ask<I: Float, N: Size>(
        &self,
        x: &[Vector<I, N>],
        dim: usize,
        #[comptime] cols: usize,
        #[comptime] b: Blueprint,
    ) -> Flight<I, N> {
        let mut flight = Flight::<I, N>::new(comptime!(b.shape(cols)), true);
        flight.ask(x, self.at(dim), self.count, 0, dim, unit());
        flight
    }
}

/// Where the number of a query is in `[batch, heads, time]`.
#[cube]
pub(crate) fn number_of(row: usize, head: usize, sizes: &Sizes) -> usize {
    (row / sizes.time * sizes.heads + head) * sizes.time + row % sizes.time
}
