//! The outputs, and of each query the logarithm of the sum of its exponentials:
//!
//! ```text
//! o_i = sum_j e^{s_ij - lse_i} v_j      lse_i = log sum_j e^{s_ij}      s_ij = scale q_i . k_j
//! ```
//! One cube computes a block of queries of one head; it walks the blocks of keys that they see (Dao 2023, arXiv:2307.08691,
//! algorithm 1).

use cubecl::prelude::*;

use super::backward::leave;
use super::blueprint::Blueprint;
use super::place::{Block, Rows, Sizes, number_of};
use super::repair::repair_outputs;
use super::softmax::{Softmax, scale_scores};
use crate::tile::{Form, Mode, Sums, Tile};

#[cube(launch, launch_unchecked, address_type = "dynamic")]
pub(crate) fn forward_kernel<I: Float, E: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    table: &[u32],
    o: &mut [Vector<I, N>],
    lse: &mut [f32],
    sizes: &Sizes,
    #[comptime] b: Blueprint,
    #[define(I, E)] _types: [ElemType; 2],
) {
    if CUBE_POS >= sizes.cut.chunks * sizes.heads {
        terminate!();
    }
    let (c, operand) = comptime!((b.chunk, b.operand_padding()));
    let head = CUBE_POS % sizes.heads;
    let block = Block::of_queries(CUBE_POS / sizes.heads, sizes, table, c);
    let kv_head = head / (sizes.heads / sizes.kv_heads);
    let mut queries = Tile::<E>::new(c, b.key_cols, operand);
    let mut keys = Tile::<E>::new(c, b.key_cols, operand);
    let mut values = Tile::<E>::new(c, b.value_cols, operand);
    let mut weights = Tile::<E>::new(c, c, operand);
    let mut scores = Sums::new(comptime!(b.spread(c)));
    let mut tile = scores.whole(comptime!(!b.by_plane()));
    let mut out = Sums::new(comptime!(b.spread(b.value_cols)));
    let mut softmax = Softmax::new(b);
    out.clear();

    let own = Rows { first: block.first, count: block.rows, head, heads: sizes.heads };
    own.ask(q, sizes.key_dim, b.key_cols, b).put_all::<E>(&mut queries);
    let (from, end) = block.keys(sizes, c);
    for first in range_stepped(from, end, c) {
        let count = min(block.other_rows - first, c);
        let rows = Rows { first: block.other + first, count, head: kv_head, heads: sizes.kv_heads };
        let key_flight = rows.ask(k, sizes.key_dim, b.key_cols, b);
        let value_flight = rows.ask(v, sizes.value_dim, b.value_cols, b);
        key_flight.put_all::<E>(&mut keys);
        value_flight.put_all::<E>(&mut values);
        sync_cube();
        scores.product::<E, E>(&queries, &keys, comptime!(Form::abt(c, c, b.key_cols, Mode::Set)));
        scores.settle();
        scale_scores(&mut scores, block.position, first, sizes, b);
        softmax.take::<E>(&mut scores, &mut tile, &mut weights, b);
        softmax.shrink(&mut out, b);
        out.settle();
        out.product::<E, E>(&weights, &values, comptime!(Form::ab(c, b.value_cols, c, Mode::Add)));
        sync_cube();
    }
    softmax.divide(&mut out, b);
    softmax.leave(&scores, lse, &block, number_of(block.first, head, sizes), b);
    leave::<I, E, N>(&out, &mut values, o, &own, sizes.value_dim, b);
    sync_cube();
    let all = Rows { first: block.other, count: block.other_rows, head: kv_head, heads: sizes.kv_heads };
    repair_outputs::<I, N>(q, k, v, o, &*lse, &own, &all, block.position, sizes);
}
