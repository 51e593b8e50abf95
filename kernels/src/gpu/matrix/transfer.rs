//! Rows between tensors and tiles: at once, or in two steps. A walk asks for the next chunk's while it computes this one's,
//! so that it does not wait for memory once for every tensor and chunk; until they are put they are in registers.

use cubecl::prelude::*;

use super::super::tile::{Tile, unit, units};
use super::blueprint::Blueprint;

/// `N` elements of a row of a tensor, `at` being its first row and the distance of rows; 0 outside of the tensor. Sizes
/// are multiples of `N`.
#[cube]
pub(crate) fn read<I: Float, N: Size>(
    x: &[Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    row: usize,
    col: usize,
    dim: usize,
) -> Vector<I, N> {
    let n = N::value().comptime();
    let mut values = Vector::<I, N>::new(I::new(0.0));
    if row < rows && col < dim {
        values = x[(at.0 + row * at.1 + col) / n];
    }
    values
}

/// Fills a tile from the features `col0..` of a tensor.
#[cube]
pub(crate) fn load<I: Float, E: Float, N: Size>(
    x: &[Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    tile: &mut Tile<E>,
) {
    let n = N::value().comptime();
    let cols = comptime!(tile.cols / n);
    for i in range_stepped(unit(), comptime!(tile.rows * cols), units()) {
        let (row, col) = (i / cols, i % cols * n);
        let values = read::<I, N>(x, at, rows, row, col0 + col, dim);
        tile.set_many::<I, N>(row, col, values);
    }
}

/// Writes the rows of a tile to a tensor.
#[cube]
pub(crate) fn store<I: Float, E: Float, N: Size>(
    tile: &Tile<E>,
    out: &mut [Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
) {
    let n = N::value().comptime();
    let cols = comptime!(tile.cols / n);
    for i in range_stepped(unit(), comptime!(tile.rows * cols), units()) {
        let (row, col) = (i / cols, i % cols * n);
        if row < rows && col0 + col < dim {
            out[(at.0 + row * at.1 + col0 + col) / n] = Vector::<I, N>::cast_from(tile.get_many::<N>(row, col));
        }
    }
}

/// Writes `[chunk, chunk]` scores times `factor`.
#[cube]
pub(crate) fn store_scores<E: Float, N: Size>(
    tile: &Tile<f32>,
    out: &mut [Vector<E, N>],
    at: usize,
    factor: f32,
    #[comptime] b: Blueprint,
) {
    let n = N::value().comptime();
    let cols = comptime!(b.chunk / n);
    for i in range_stepped(unit(), comptime!(b.chunk * cols), units()) {
        let values = tile.get_many::<N>(i / cols, i % cols * n) * Vector::new(factor);
        out[at / n + i] = Vector::<E, N>::cast_from(values);
    }
}

/// Fills a tile with a chunk's scores, `[chunk, chunk]` at `at`.
#[cube]
pub(crate) fn load_scores<E: Float, N: Size>(x: &[Vector<E, N>], at: usize, tile: &mut Tile<E>) {
    let side = comptime!(tile.rows).runtime();
    load::<E, E, N>(x, (at, side), side, 0, side, tile);
}

/// The shape of a tile and the units that fill it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    pub rows: usize,
    pub cols: usize,
    pub units: usize,
}

impl Shape {
    /// Vectors of `n` elements that a unit holds.
    pub fn vectors(&self, n: usize) -> usize {
        (self.rows * self.cols / n).div_ceil(self.units)
    }

    fn even(&self, n: usize) -> bool {
        (self.rows * self.cols / n).is_multiple_of(self.units)
    }
}

/// Asks for the features `col0..` of `rows` rows, the first at `at.0` and each `at.1` after the one before.
#[cube]
pub(crate) fn fetch<I: Float, N: Size>(
    x: &[Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    flight: &mut Array<Vector<I, N>>,
    #[comptime] shape: Shape,
) {
    fetch_as::<I, N>(unit(), x, at, rows, col0, dim, flight, shape);
}

/// The same, as the `worker`-th of those that do it.
#[cube]
pub(crate) fn fetch_as<I: Float, N: Size>(
    worker: usize,
    x: &[Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    flight: &mut Array<Vector<I, N>>,
    #[comptime] shape: Shape,
) {
    let n = N::value().comptime();
    let cols = comptime!(shape.cols / n);
    #[unroll]
    for j in 0..comptime!(shape.vectors(n)) {
        let i = worker + j * shape.units;
        flight[j] = read::<I, N>(x, at, rows, i / cols, col0 + i % cols * n, dim);
    }
}

/// Asks for a chunk's scores, `[chunk, chunk]` at `at`.
#[cube]
pub(crate) fn fetch_scores<E: Float, N: Size>(
    x: &[Vector<E, N>],
    at: usize,
    flight: &mut Array<Vector<E, N>>,
    #[comptime] shape: Shape,
) {
    let side = comptime!(shape.rows).runtime();
    fetch::<E, N>(x, (at, side), side, 0, side, flight, shape);
}

/// Puts what has been fetched into a tile.
#[cube]
pub(crate) fn put<I: Float, E: Float, N: Size>(
    flight: &Array<Vector<I, N>>,
    tile: &mut Tile<E>,
    #[comptime] shape: Shape,
) {
    put_as::<I, E, N>(unit(), flight, tile, 0, shape);
}

/// The same, as the `worker`-th of those that do it, from row `row0` of the tile on.
#[cube]
pub(crate) fn put_as<I: Float, E: Float, N: Size>(
    worker: usize,
    flight: &Array<Vector<I, N>>,
    tile: &mut Tile<E>,
    row0: usize,
    #[comptime] shape: Shape,
) {
    let n = N::value().comptime();
    let cols = comptime!(shape.cols / n);
    #[unroll]
    for j in 0..comptime!(shape.vectors(n)) {
        let i = worker + j * shape.units;
        if comptime!(shape.even(n)) {
            tile.set_many::<I, N>(row0 + i / cols, i % cols * n, flight[j]);
        } else {
            if i / cols < shape.rows {
                tile.set_many::<I, N>(row0 + i / cols, i % cols * n, flight[j]);
            }
        }
    }
}
