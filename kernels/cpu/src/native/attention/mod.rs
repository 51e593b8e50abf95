//! Softmax attention on tiles: a task owns a block of queries (forward) or the keys of a head (backward).
//!
//! `q k^T` needs its right operand transposed. The keys and values of a head are loaded into tiles once, in the
//! orientations that the products need, and serve all blocks of queries and all query heads of the group.

mod backward;
mod forward;
mod step;

pub(crate) use backward::backward;
pub(crate) use forward::forward;
pub(crate) use step::step;

use super::tile::{LINE, Rows, Tile};
use crate::{attention::AttentionProblem, element::Element, sequences::Sequences};
use rayon::prelude::*;
use std::ops::Range;

/// Queries of a block, and keys of a tile.
const QUERIES: usize = 128;
const KEYS: usize = 128;
/// Rows and columns of a run: a multiple of the heights of register blocks, and of a cache line.
const RUN: usize = 48;

/// A sequence: where its queries and keys are among all tokens, and its first tile among those of a head.
struct Sequence {
    queries: Range<usize>,
    keys: Range<usize>,
    first_tile: usize,
}

impl Sequence {
    fn all(p: &AttentionProblem, sequences: &Sequences) -> Vec<Self> {
        let mut first_tile = 0;
        let mut all = Vec::with_capacity(sequences.count());
        for n in 0..sequences.count() {
            let queries = sequences.range(n);
            let keys = if p.cu_seqlens.is_some() { queries.clone() } else { n * p.kv_time..(n + 1) * p.kv_time };
            let tiles = keys.len().div_ceil(KEYS);
            all.push(Self { queries, keys, first_tile });
            first_tile += tiles;
        }
        all
    }

    fn tiles(&self) -> usize {
        self.keys.len().div_ceil(KEYS)
    }

    fn blocks(&self) -> usize {
        self.queries.len().div_ceil(QUERIES)
    }

    /// The queries of block `i`, counted from the sequence's first query.
    fn block(&self, i: usize) -> Range<usize> {
        i * QUERIES..((i + 1) * QUERIES).min(self.queries.len())
    }

    /// The keys that query `i` sees, counted from the sequence's first key.
    fn seen(&self, i: usize, window: Option<usize>) -> Range<usize> {
        let end = i + self.keys.len() - self.queries.len() + 1;
        end.saturating_sub(window.unwrap_or(end))..end
    }
}

/// The part of a key tile that a block of queries sees: columns `start..end`, `start` a multiple of a cache line.
struct Part<'a> {
    sequence: &'a Sequence,
    window: Option<usize>,
    block: Range<usize>,
    first_key: usize,
    start: usize,
    end: usize,
}

impl<'a> Part<'a> {
    /// The parts of all tiles that the queries of `block` see, with the tile's number.
    fn all(
        sequence: &'a Sequence,
        window: Option<usize>,
        block: Range<usize>,
    ) -> impl Iterator<Item = (usize, Part<'a>)> {
        let from = sequence.seen(block.start, window).start;
        let to = sequence.seen(block.end - 1, window).end;
        (from / KEYS..to.div_ceil(KEYS)).map(move |tile| {
            let first_key = tile * KEYS;
            let start = from.saturating_sub(first_key) / LINE * LINE;
            let end = (to - first_key).min(KEYS);
            (tile, Part { sequence, window, block: block.clone(), first_key, start, end })
        })
    }

    fn rows(&self) -> usize {
        self.block.len()
    }

    fn cols(&self) -> usize {
        self.end - self.start
    }

    /// The columns that row `row` sees.
    fn seen(&self, row: usize) -> Range<usize> {
        let keys = self.sequence.seen(self.block.start + row, self.window);
        let column = |key: usize| key.saturating_sub(self.first_key).clamp(self.start, self.end);
        column(keys.start)..column(keys.end)
    }

    /// Runs of rows, and the end of the columns that they see: short runs on the diagonal, above which little is then computed.
    fn runs(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let rows = self.rows();
        let run = if rows == QUERIES && self.seen(0).end < self.end { RUN } else { rows };
        (0..rows).step_by(run).map(move |row| {
            let rows = row..rows.min(row + run);
            (rows.clone(), self.seen(rows.end - 1).end)
        })
    }

    /// Runs of columns, and the first row that sees some of them.
    fn column_runs(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let first_row = |col: usize| {
            let key = self.first_key + col + self.sequence.queries.len();
            key.saturating_sub(self.sequence.keys.len() + self.block.start)
        };
        let run = if first_row(self.end - 1) > 0 { RUN } else { self.cols() };
        (self.start..self.end).step_by(run).map(move |col| (col..self.end.min(col + run), first_row(col)))
    }

    /// The columns as they are computed: whole cache lines.
    fn padded(&self) -> Range<usize> {
        self.start..self.start + self.cols().next_multiple_of(LINE)
    }

    /// Whether every query of the block sees all of the part.
    fn all_seen(&self) -> bool {
        [0, self.rows() - 1].into_iter().all(|row| self.seen(row) == (self.start..self.end))
    }

    /// Gives the pairs of a query and a key that it does not see this value.
    fn mask(&self, pairs: &mut Tile, value: f32) {
        for i in 0..self.rows() {
            let Range { start: from, end: to } = self.seen(i);
            let row = &mut pairs.row_mut(i)[..self.padded().end];
            row[self.start..from].fill(value);
            row[to.max(from)..].fill(value);
        }
    }
}

/// Makes a tile for each (tile of keys, kv head) of all sequences, in that order.
fn pack<T: Send>(
    p: &AttentionProblem,
    sequences: &[Sequence],
    make: impl Fn(usize, usize, usize) -> T + Sync + Send,
) -> Vec<T> {
    let first_keys: Vec<_> = sequences
        .iter()
        .flat_map(|s| s.keys.clone().step_by(KEYS).map(move |at| (at, KEYS.min(s.keys.end - at))))
        .collect();
    (0..first_keys.len() * p.kv_heads)
        .into_par_iter()
        .with_min_len(4)
        .map(|i| make(first_keys[i / p.kv_heads].0, first_keys[i / p.kv_heads].1, i % p.kv_heads))
        .collect()
}

/// One head of a `[tokens, heads, features]` tensor, from `token` on.
fn at(token: usize, head: usize, heads: usize, features: usize) -> Rows {
    Rows { offset: (token * heads + head) * features, stride: heads * features }
}

/// Loads `rows` tokens from `token` on of one head of a `[tokens, heads, features]` tensor.
fn load<E: Element>(x: &[E], token: usize, rows: usize, head: usize, heads: usize, features: usize) -> Tile {
    let mut tile = Tile::new(rows, features);
    tile.load(x, at(token, head, heads, features), rows);
    tile
}

/// The transpose of a tile of keys or values: `[features, KEYS]`, zero beyond its tokens.
fn transposed(tile: &Tile) -> Tile {
    let mut t = Tile::new(tile.cols(), KEYS);
    t.transpose_from(tile, tile.rows());
    t
}

/// Multiplies the rows of a tile, padding included, by one factor.
fn scale(tile: &mut Tile, factor: f32) {
    let data = tile.data_mut();
    super::simd::vectorize(
        #[inline(always)]
        || data.iter_mut().for_each(|x| *x *= factor),
    );
}

/// What exponents are relative to, where the largest score so far is `max`: 0 as long as that is minus infinity, from which no
/// difference can be taken.
#[inline(always)]
fn origin(max: f32) -> f32 {
    if max == f32::NEG_INFINITY { 0.0 } else { max }
}
