//! Rows of a tensor on their way into a tile: a walk asks for the next chunk's while it computes this one's, so that it
//! does not wait for memory once for every tensor and chunk. Until they are put they are in registers.

use cubecl::prelude::*;

use super::super::tile::{Tile, unit};
use super::decay::read;

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
    let n = N::value().comptime();
    let cols = comptime!(shape.cols / n);
    #[unroll]
    for j in 0..comptime!(shape.vectors(n)) {
        let i = unit() + j * shape.units;
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
    let n = N::value().comptime();
    let cols = comptime!(shape.cols / n);
    #[unroll]
    for j in 0..comptime!(shape.vectors(n)) {
        let i = unit() + j * shape.units;
        if comptime!(shape.even(n)) {
            tile.set_many::<I, N>(i / cols, i % cols * n, flight[j]);
        } else {
            if i / cols < shape.rows {
                tile.set_many::<I, N>(i / cols, i % cols * n, flight[j]);
            }
        }
    }
}
