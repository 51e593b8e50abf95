//! Results that are infinite or NaN, once more.
//!
//! A product of tiles multiplies a pair that does not meet by 0, which hides no infinite value: what a later token, or one
//! outside of the window, holds would reach rows that do not see it. So results that are not finite, and only they, are summed
//! again over the pairs that meet. Those that should be infinite or NaN are told by what they are summed from, without a
//! product; left are the few of a block in which something is not finite.

use cubecl::prelude::*;

use super::backward::Outputs;
use super::place::{Block, Rows, Sizes, number_of};
use crate::tile::{unit, units};

/// Whether a number is neither infinite nor NaN.
#[cube]
fn is_finite(x: f32) -> bool {
    x.abs() <= f32::new(f32::MAX)
}

/// Whether a number that is not finite in `x` has no reason to be: `marks` is 0 where it was summed from finite ones.
#[cube]
fn is_spoilt<N: Size>(x: Vector<f32, N>, marks: Vector<f32, N>) -> bool {
    let mut spoilt = false.runtime();
    #[unroll]
    for j in 0..N::value().comptime() {
        if !is_finite(x.extract(j)) && is_finite(marks.extract(j)) {
            spoilt = true.runtime();
        }
    }
    spoilt
}

/// `x . y` of the `dim` elements from two places on.
#[cube]
fn dot<I: Float, N: Size>(x: &[Vector<I, N>], at: usize, y: &[Vector<I, N>], other: usize, dim: usize) -> f32 {
    let n = N::value().comptime();
    let mut sum = f32::new(0.0);
    for i in 0..dim / n {
        let product = Vector::<f32, N>::cast_from(x[at / n + i]) * Vector::<f32, N>::cast_from(y[other / n + i]);
        #[unroll]
        for j in 0..n {
            sum += product.extract(j);
        }
    }
    sum
}

#[cube]
fn vector<I: Float, N: Size>(x: &[Vector<I, N>], at: usize) -> Vector<f32, N> {
    Vector::cast_from(x[at / N::value().comptime()])
}

/// `0` of a finite number, else NaN.
#[cube]
fn mark<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    x * Vector::new(f32::new(0.0))
}

/// The first of the keys that a query at this position sees.
#[cube]
fn first_seen(query: usize, sizes: &Sizes) -> usize {
    query + 1 - min(sizes.window, query + 1)
}

/// Outputs `o` of a block of queries, which are complete, as are their `lse`.
#[cube]
pub(super) fn repair_outputs<I: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    o: &mut [Vector<I, N>],
    lse: &[f32],
    own: &Rows,
    keys: &Rows,
    position: usize,
    sizes: &Sizes,
) {
    let n = N::value().comptime();
    let vectors = sizes.value_dim / n;
    let ((queries, query_stride), (out, out_stride)) = (own.at(sizes.key_dim), own.at(sizes.value_dim));
    let ((first_key, key_stride), (first_value, value_stride)) = (keys.at(sizes.key_dim), keys.at(sizes.value_dim));
    for i in range_stepped(unit(), own.count * vectors, units()) {
        let (row, col) = (i / vectors, i % vectors * n);
        let at = out + row * out_stride + col;
        let found = vector::<I, N>(&*o, at);
        let lse = lse[number_of(own.first + row, own.head, sizes)];
        if is_finite(lse) && is_spoilt::<N>(found, Vector::new(f32::new(0.0))) {
            let query = position + row;
            let from = first_seen(query, sizes);
            let mut marks = Vector::<f32, N>::new(f32::new(0.0));
            for j in from..query + 1 {
                marks += mark::<N>(vector::<I, N>(v, first_value + j * value_stride + col));
            }
            if is_spoilt::<N>(found, marks) {
                let mut sum = Vector::<f32, N>::new(f32::new(0.0));
                for j in from..query + 1 {
                    let key = first_key + j * key_stride;
                    let score = dot::<I, N>(q, queries + row * query_stride, k, key, sizes.key_dim) * sizes.scale;
                    let value = vector::<I, N>(v, first_value + j * value_stride + col);
                    sum += value * Vector::new((score - lse).exp());
                }
                o[at / n] = Vector::cast_from(sum);
            }
        }
    }
}

/// Where the tensors' rows of a query and a key are.
#[derive(CubeType, Clone, Copy)]
struct Pair {
    q: usize,
    k: usize,
    v: usize,
    d_o: usize,
    /// Of the query in `lse`.
    number: usize,
}

/// The weight of a pair, and the gradient of its score.
#[cube]
fn weigh<I: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    x: &Outputs<I, N>,
    at: Pair,
    sizes: &Sizes,
) -> (f32, f32) {
    let weight = (dot::<I, N>(q, at.q, k, at.k, sizes.key_dim) * sizes.scale - x.lse[at.number]).exp();
    let d_weight = dot::<I, N>(&x.do_, at.d_o, v, at.v, sizes.value_dim);
    (weight, weight * (d_weight - x.products[at.number]) * sizes.scale)
}

/// `dq` of a block of queries, which is complete.
#[cube]
pub(super) fn repair_queries<I: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    x: &Outputs<I, N>,
    dq: &mut [Vector<I, N>],
    own: &Rows,
    keys: &Rows,
    position: usize,
    sizes: &Sizes,
) {
    let n = N::value().comptime();
    let vectors = sizes.key_dim / n;
    let ((queries, query_stride), (outs, out_stride)) = (own.at(sizes.key_dim), own.at(sizes.value_dim));
    let ((first_key, key_stride), (first_value, value_stride)) = (keys.at(sizes.key_dim), keys.at(sizes.value_dim));
    for i in range_stepped(unit(), own.count * vectors, units()) {
        let (row, col) = (i / vectors, i % vectors * n);
        let q_at = queries + row * query_stride;
        let found = vector::<I, N>(&*dq, q_at + col);
        let number = number_of(own.first + row, own.head, sizes);
        let (lse, product) = (x.lse[number], x.products[number]);
        if is_finite(lse) && is_finite(product) && is_spoilt::<N>(found, Vector::new(f32::new(0.0))) {
            let query = position + row;
            let from = first_seen(query, sizes);
            let mut marks = Vector::<f32, N>::new(f32::new(0.0));
            for j in from..query + 1 {
                marks += mark::<N>(vector::<I, N>(k, first_key + j * key_stride + col));
            }
            if is_spoilt::<N>(found, marks) {
                let mut sum = Vector::<f32, N>::new(f32::new(0.0));
                for j in from..query + 1 {
                    let (k_at, v_at) = (first_key + j * key_stride, first_value + j * value_stride);
                    let at = Pair { q: q_at, k: k_at, v: v_at, d_o: outs + row * out_stride, number };
                    let pair = weigh::<I, N>(q, k, v, x, at, sizes);
                    sum += vector::<I, N>(k, k_at + col) * Vector::new(pair.1);
                }
                dq[(q_at + col) / n] = Vector::cast_from(sum);
            }
        }
    }
}

/// `dk` of a block of keys, or `dv`, which is complete.
#[cube]
pub(super) fn repair_keys<I: Float, N: Size>(
    q: &[Vector<I, N>],
    k: &[Vector<I, N>],
    v: &[Vector<I, N>],
    x: &Outputs<I, N>,
    out: &mut [Vector<I, N>],
    own: &Rows,
    block: &Block,
    sizes: &Sizes,
    #[comptime] of_values: bool,
) {
    let n = N::value().comptime();
    let dim = if comptime!(of_values) { sizes.value_dim } else { sizes.key_dim };
    let (vectors, group) = (dim / n, sizes.heads / sizes.kv_heads);
    let ((keys, key_stride), (values, value_stride)) = (own.at(sizes.key_dim), own.at(sizes.value_dim));
    let (outs, out_stride) = own.at(dim);
    for i in range_stepped(unit(), own.count * vectors, units()) {
        let (row, col) = (i / vectors, i % vectors * n);
        let at = outs + row * out_stride + col;
        let found = vector::<I, N>(&*out, at);
        if is_spoilt::<N>(found, Vector::new(f32::new(0.0))) {
            let (from, end) = block.queries_of(row, sizes);
            let (k_at, v_at) = (keys + row * key_stride, values + row * value_stride);
            let mut marks = Vector::<f32, N>::new(f32::new(0.0));
            for member in 0..group {
                let rows = Rows { first: block.other, count: 0, head: own.head * group + member, heads: sizes.heads };
                for j in from..end {
                    let number = number_of(rows.first + j, rows.head, sizes);
                    let mut scalar = x.lse[number];
                    if comptime!(of_values) {
                        let (first, stride) = rows.at(sizes.value_dim);
                        marks += mark::<N>(vector::<I, N>(&x.do_, first + j * stride + col));
                    } else {
                        let (first, stride) = rows.at(sizes.key_dim);
                        marks += mark::<N>(vector::<I, N>(q, first + j * stride + col));
                        scalar += x.products[number];
                    }
                    marks += mark::<N>(Vector::new(scalar));
                }
            }
            if is_spoilt::<N>(found, marks) {
                let mut sum = Vector::<f32, N>::new(f32::new(0.0));
                for member in 0..group {
                    let rows =
                        Rows { first: block.other, count: 0, head: own.head * group + member, heads: sizes.heads };
                    let ((queries, query_stride), (d_outs, d_out_stride)) =
                        (rows.at(sizes.key_dim), rows.at(sizes.value_dim));
                    for j in from..end {
                        let number = number_of(rows.first + j, rows.head, sizes);
                        let (q_at, d_at) = (queries + j * query_stride, d_outs + j * d_out_stride);
                        let place = Pair { q: q_at, k: k_at, v: v_at, d_o: d_at, number };
                        let pair = weigh::<I, N>(q, k, v, x, place, sizes);
                        if comptime!(of_values) {
                            sum += vector::<I, N>(&x.do_, d_at + col) * Vector::new(pair.0);
                        } else {
                            sum += vector::<I, N>(q, q_at + col) * Vector::new(pair.1);
                        }
                    }
                }
                out[at / n] = Vector::cast_from(sum);
            }
        }
    }
}
