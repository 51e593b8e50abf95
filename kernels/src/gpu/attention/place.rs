//! Where blocks of queries and of keys lie in the tensors, and which pairs of them meet.

use cubecl::prelude::*;

use super::super::tile::unit;
use super::super::transfer::Flight;
use super::blueprint::Blueprint;
use crate::attention::AttentionProblem;
use crate::sequences::Sequences;

/// The sizes that are known at launch.
#[derive(CubeType, CubeLaunch, Clone, Copy)]
pub(crate) struct Sizes {
    /// Blocks of this launch.
    pub blocks: usize,
    pub time: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Tokens that a query sees, itself among them.
    pub window: usize,
    pub scale: f32,
}

/// Numbers of a block in a table.
const FIELDS: usize = 6;

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

/// Blocks of `chunk` rows, of queries or (`of_keys`) of keys; the last ones, which causal queries have the most to do for,
/// come first.
pub(crate) fn table(p: &AttentionProblem, sequences: &Sequences, chunk: usize, of_keys: bool) -> (Vec<u32>, usize) {
    let mut table = Vec::new();
    for n in 0..sequences.count() {
        let queries = sequences.range(n);
        let keys = if p.cu_seqlens.is_some() { queries.clone() } else { n * p.kv_time..(n + 1) * p.kv_time };
        let ahead = keys.len() - queries.len();
        let (own, other, [position, other_position]) =
            if of_keys { (keys, queries, [0, ahead]) } else { (queries, keys, [ahead, 0]) };
        for at in (0..own.len()).step_by(chunk) {
            let rows = chunk.min(own.len() - at);
            let block = [own.start + at, rows, position + at, other.start, other.len(), other_position];
            table.push(block.map(|x| x as u32));
        }
    }
    if !of_keys {
        table.reverse();
    }
    (table.concat(), table.len())
}

#[cube]
impl Block {
    pub fn of(index: usize, table: &[u32]) -> Block {
        let at = index * comptime!(FIELDS);
        Block {
            first: table[at] as usize,
            rows: table[at + 1] as usize,
            position: table[at + 2] as usize,
            other: table[at + 3] as usize,
            other_rows: table[at + 4] as usize,
            other_position: table[at + 5] as usize,
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

/// Whether the query at one position sees the key at another.
#[cube]
pub(crate) fn sees(query: usize, key: usize, sizes: &Sizes) -> bool {
    key <= query && query - min(key, query) < sizes.window
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
