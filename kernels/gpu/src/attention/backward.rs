//! The gradients, from the weights `p_ij = e^{s_ij - lse_i}`, which are computed again:
//!
//! ```text
//! dv_j = sum_i p_ij do_i      ds_ij = scale p_ij (do_i . v_j - do_i . o_i)      dq_i = sum_j ds_ij k_j      dk_j = sum_i ds_ij q_i
//! ```
//! One cube computes a block of queries of one head and walks the keys that they see, or a block of keys and walks the queries
//! of all heads that see them. So every sum has one order, and nothing is added to by two cubes.

use cubecl::prelude::*;

use super::blueprint::Blueprint;
use super::place::{Block, Rows, Sizes, all_see, number_of, sees};
use super::repair::{repair_keys, repair_queries};
use crate::tile::{Form, Mode, Sums, Tile, exponential, unit, units};
use crate::transfer::store;

/// `out = do . o` of each query and head, one for each unit.
#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn products_kernel<I: Float, N: Size>(
    o: &[Vector<I, N>],
    do_: &[Vector<I, N>],
    out: &mut [f32],
    sizes: &Sizes,
    #[define(I)] _storage: ElemType,
) {
    if ABSOLUTE_POS >= out.len() {
        terminate!();
    }
    let (row, head) = (ABSOLUTE_POS / sizes.heads, ABSOLUTE_POS % sizes.heads);
    let vectors = sizes.value_dim / N::value().comptime();
    let mut sum = f32::new(0.0);
    for i in 0..vectors {
        let at = ABSOLUTE_POS * vectors + i;
        let product = Vector::<f32, N>::cast_from(o[at]) * Vector::<f32, N>::cast_from(do_[at]);
        #[unroll]
        for j in 0..N::value().comptime() {
            sum += product.extract(j);
        }
    }
    out[number_of(row, head, sizes)] = sum;
}

/// What both launches read besides queries, keys and values.
#[derive(CubeType, CubeLaunch)]
pub(crate) struct Outputs<I: Float, N: Size> {
    pub do_: Box<[Vector<I, N>]>,
    /// `[batch, heads, time]`, as is what follows.
    pub lse: Box<[f32]>,
    /// `do . o`
    pub products: Box<[f32]>,
}

/// A block's queries, keys and what goes with them.
#[derive(CubeType)]
struct Tiles<E: Float> {
    queries: Tile<E>,
    d_outs: Tile<E>,
    keys: Tile<E>,
    values: Tile<E>,
    /// By query; the first as scores are.
    lse: Shared<[f32]>,
    products: Shared<[f32]>,
    /// Weights, and their gradients, which become those of the scores.
    weights: Sums,
    d_scores: Sums,
}

#[cube]
impl<E: Float> Tiles<E> {
    fn new(#[comptime] b: Blueprint) -> Self {
        let (c, operand) = comptime!((b.chunk, b.operand_padding()));
        Tiles::<E> {
            queries: Tile::<E>::new(c, b.key_cols, operand),
            d_outs: Tile::<E>::new(c, b.value_cols, operand),
            keys: Tile::<E>::new(c, b.key_cols, operand),
            values: Tile::<E>::new(c, b.value_cols, operand),
            lse: Shared::new_slice(c),
            products: Shared::new_slice(c),
            weights: Sums::new(comptime!(b.spread(c))),
            d_scores: Sums::new(comptime!(b.spread(c))),
        }
    }

    /// Reads queries and what came of them.
    fn load_queries<I: Float, N: Size>(
        &mut self,
        q: &[Vector<I, N>],
        x: &Outputs<I, N>,
        rows: &Rows,
        sizes: &Sizes,
        #[comptime] b: Blueprint,
    ) {
        let query_flight = rows.ask(q, sizes.key_dim, b.key_cols, b);
        let out_flight = rows.ask(&x.do_, sizes.value_dim, b.value_cols, b);
        for row in range_stepped(unit(), b.chunk, units()) {
            // Beyond the last query: no weight at all.
            let (mut lse, mut product) = (f32::new(f32::MAX), f32::new(0.0));
            if row < rows.count {
                let at = number_of(rows.first + row, rows.head, sizes);
                lse = x.lse[at] * comptime!(b.engine.log_scale());
                product = x.products[at];
            }
            self.lse[row] = lse;
            self.products[row] = product;
        }
        query_flight.put_all::<E>(&mut self.queries);
        out_flight.put_all::<E>(&mut self.d_outs);
    }

    /// Reads keys and values.
    fn load_keys<I: Float, N: Size>(
        &mut self,
        k: &[Vector<I, N>],
        v: &[Vector<I, N>],
        rows: &Rows,
        sizes: &Sizes,
        #[comptime] b: Blueprint,
    ) {
        let key_flight = rows.ask(k, sizes.key_dim, b.key_cols, b);
        let value_flight = rows.ask(v, sizes.value_dim, b.value_cols, b);
        key_flight.put_all::<E>(&mut self.keys);
        value_flight.put_all::<E>(&mut self.values);
    }

    /// The products of queries and keys.
    fn scores(&mut self, #[comptime] b: Blueprint) {
        let form = comptime!(Form::abt(b.chunk, b.chunk, b.key_cols, Mode::Set));
        self.weights.product::<E, E>(&self.queries, &self.keys, form);
    }

    /// Weights and gradients of scores, the first query and key being at these positions.
    fn weigh(&mut self, queries: usize, keys: usize, sizes: &Sizes, #[comptime] b: Blueprint) {
        let form = comptime!(Form::abt(b.chunk, b.chunk, b.value_cols, Mode::Set));
        self.d_scores.product::<E, E>(&self.d_outs, &self.values, form);
        self.d_scores.settle();
        if all_see(queries, keys, sizes, b.chunk) {
            self.weigh_pairs(queries, keys, sizes, false, b);
        } else {
            self.weigh_pairs(queries, keys, sizes, true, b);
        }
    }

    /// Without weight where a pair does not meet, if there are such.
    fn weigh_pairs(
        &mut self,
        queries: usize,
        keys: usize,
        sizes: &Sizes,
        #[comptime] hide: bool,
        #[comptime] b: Blueprint,
    ) {
        let unit = unit();
        let factor = sizes.scale * comptime!(b.engine.log_scale());
        #[unroll]
        for j in 0..comptime!(self.weights.spread.len()) {
            if self.weights.has(unit, j) {
                let place = self.weights.place(unit, j);
                let score = self.weights.get(place, j) * factor - self.lse[place.0];
                let mut weight = exponential(score, b.engine);
                let mut d_score = weight * (self.d_scores.get(place, j) - self.products[place.0]) * sizes.scale;
                if comptime!(hide) {
                    let seen = sees(queries + place.0, keys + place.1, sizes);
                    weight = select(seen, weight, f32::new(0.0));
                    d_score = select(seen, d_score, f32::new(0.0));
                }
                self.weights.set(place, j, weight);
                self.d_scores.set(place, j, d_score);
            }
        }
    }
}

/// `dq`
#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn queries_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    x: &Outputs<I, N>,
    table: &[u32],
    dq: &mut [Vector<I, N>],
    sizes: &Sizes,
    #[comptime] b: Blueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    if CUBE_POS >= sizes.cut.chunks * sizes.heads {
        terminate!();
    }
    let c = comptime!(b.chunk);
    let head = CUBE_POS % sizes.heads;
    let block = Block::of_queries(CUBE_POS / sizes.heads, sizes, table, c);
    let kv_head = head / (sizes.heads / sizes.kv_heads);
    let mut tiles = Tiles::<E>::new(b);
    let mut d_scores = Tile::<E>::new(c, c, comptime!(b.operand_padding()));
    let mut sum = Sums::new(comptime!(b.spread(b.key_cols)));
    sum.clear();
    let rows = Rows { first: block.first, count: block.rows, head, heads: sizes.heads };
    tiles.load_queries::<I, N>(q, x, &rows, sizes, b);
    let (from, end) = block.keys(sizes, c);
    for first in range_stepped(from, end, c) {
        let count = min(block.other_rows - first, c);
        let rows = Rows { first: block.other + first, count, head: kv_head, heads: sizes.kv_heads };
        tiles.load_keys::<I, N>(k, v, &rows, sizes, b);
        sync_cube();
        tiles.scores(b);
        tiles.weigh(block.position, first, sizes, b);
        tiles.d_scores.put_at::<E>(&mut d_scores, 0);
        sync_cube();
        sum.product::<E, E>(&d_scores, &tiles.keys, comptime!(Form::ab(c, b.key_cols, c, Mode::Add)));
        sync_cube();
    }
    leave::<I, E, N>(&sum, &mut tiles.queries, dq, &rows, sizes.key_dim, b);
    sync_cube();
    let all = Rows { first: block.other, count: block.other_rows, head: kv_head, heads: sizes.kv_heads };
    repair_queries::<I, N>(q, k, v, x, dq, &rows, &all, block.position, sizes);
}

/// `dk` and `dv`
#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn keys_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    x: &Outputs<I, N>,
    table: &[u32],
    dk: &mut [Vector<I, N>],
    dv: &mut [Vector<I, N>],
    sizes: &Sizes,
    #[comptime] b: Blueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    if CUBE_POS >= sizes.cut.chunks * sizes.kv_heads {
        terminate!();
    }
    let (c, operand) = comptime!((b.chunk, b.operand_padding()));
    let kv_head = CUBE_POS % sizes.kv_heads;
    let block = Block::of_keys(CUBE_POS / sizes.kv_heads, sizes, table, c);
    let group = sizes.heads / sizes.kv_heads;
    let mut tiles = Tiles::<E>::new(b);
    let mut weights = Tile::<E>::new(c, c, operand);
    let mut d_scores = Tile::<E>::new(c, c, operand);
    let mut key_sum = Sums::new(comptime!(b.spread(b.key_cols)));
    let mut value_sum = Sums::new(comptime!(b.spread(b.value_cols)));
    key_sum.clear();
    value_sum.clear();
    let rows = Rows { first: block.first, count: block.rows, head: kv_head, heads: sizes.kv_heads };
    tiles.load_keys::<I, N>(k, v, &rows, sizes, b);
    // Keys that no query sees: the tiles are written again at once.
    sync_cube();
    let (from, end) = block.queries(sizes, c);
    for member in 0..group {
        let head = kv_head * group + member;
        for first in range_stepped(from, end, c) {
            let count = min(block.other_rows - first, c);
            let rows = Rows { first: block.other + first, count, head, heads: sizes.heads };
            tiles.load_queries::<I, N>(q, x, &rows, sizes, b);
            sync_cube();
            tiles.scores(b);
            tiles.weigh(block.other_position + first, block.position, sizes, b);
            tiles.weights.put_at::<E>(&mut weights, 0);
            tiles.d_scores.put_at::<E>(&mut d_scores, 0);
            sync_cube();
            value_sum.product::<E, E>(&weights, &tiles.d_outs, comptime!(Form::atb(c, b.value_cols, c, Mode::Add)));
            key_sum.product::<E, E>(&d_scores, &tiles.queries, comptime!(Form::atb(c, b.key_cols, c, Mode::Add)));
            sync_cube();
        }
    }
    leave::<I, E, N>(&key_sum, &mut tiles.keys, dk, &rows, sizes.key_dim, b);
    leave::<I, E, N>(&value_sum, &mut tiles.values, dv, &rows, sizes.value_dim, b);
    sync_cube();
    repair_keys::<I, N>(q, k, v, x, dk, &rows, &block, sizes, false);
    repair_keys::<I, N>(q, k, v, x, dv, &rows, &block, sizes, true);
}

/// Writes sums to a tensor, through a tile that nothing reads any more. Synchronises.
#[cube]
pub(super) fn leave<I: Float, E: Float, N: Size>(
    sums: &Sums,
    tile: &mut Tile<E>,
    out: &mut [Vector<I, N>],
    rows: &Rows,
    dim: usize,
    #[comptime] b: Blueprint,
) {
    let at = rows.at(dim);
    if comptime!(sums.spread.in_memory()) {
        sync_cube();
        store::<I, f32, N>(&sums.memory, out, at, rows.count, 0, dim, b.units);
    } else {
        sums.put::<E>(tile);
        sync_cube();
        store::<I, E, N>(&*tile, out, at, rows.count, 0, dim, b.units);
    }
}
