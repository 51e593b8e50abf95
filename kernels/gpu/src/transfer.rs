//! Rows between tensors and tiles: at once, or in two steps. A walk asks for the next chunk's while it computes this one's,
//! so that it does not wait for memory once for every tensor and chunk; until they are put they are in registers.

use cubecl::prelude::*;

use crate::tile::{Tile, unit};

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
    #[comptime] units: usize,
) {
    let mut flight = Flight::<I, N>::new(comptime!(Shape { rows: tile.rows, cols: tile.cols, units }), true);
    flight.ask(x, at, rows, col0, dim, unit());
    flight.put_all::<E>(tile);
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
    #[comptime] units: usize,
) {
    let shape = comptime!(Shape { rows: tile.rows, cols: tile.cols, units });
    store_as::<I, E, N>(unit(), tile, 0, out, at, rows, col0, dim, shape);
}

/// The same of so many rows from `row0` on, as the `worker`-th of those that do it. Of 16-bit tiles no loop remains: the
/// compiler on CUDA reads a vector from a tile at once only where it sees that its place is a multiple of the vector. Of
/// f32 there is less to gain, and the addresses of all rows at once would take registers.
#[cube]
pub(crate) fn store_as<I: Float, E: Float, N: Size>(
    worker: usize,
    tile: &Tile<E>,
    row0: usize,
    out: &mut [Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    #[comptime] shape: Shape,
) {
    let n = N::value().comptime();
    let all = comptime!(shape.rows * shape.cols / n);
    if comptime!(E::size() == 2) {
        #[unroll]
        for j in 0..comptime!(shape.vectors(n)) {
            let i = worker + j * shape.units;
            if comptime!(shape.even(n)) || i < all {
                store_vector::<I, E, N>(i, tile, row0, out, at, rows, col0, dim, shape);
            }
        }
    } else {
        for i in range_stepped(worker, all, shape.units) {
            store_vector::<I, E, N>(i, tile, row0, out, at, rows, col0, dim, shape);
        }
    }
}

/// The `i`-th vector of them.
#[cube]
fn store_vector<I: Float, E: Float, N: Size>(
    i: usize,
    tile: &Tile<E>,
    row0: usize,
    out: &mut [Vector<I, N>],
    at: (usize, usize),
    rows: usize,
    col0: usize,
    dim: usize,
    #[comptime] shape: Shape,
) {
    let n = N::value().comptime();
    let cols = comptime!(shape.cols / n);
    let (row, col) = (i / cols, i % cols * n);
    if row < rows && col0 + col < dim {
        let values = tile.as_they_are::<N>(row0 + row, col);
        out[(at.0 + row * at.1 + col0 + col) / n] = Vector::<I, N>::cast_from(values);
    }
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

/// Rows on their way from a tensor. CUDA's compiler takes a vector of 16-bit numbers apart as soon as it is loaded, which
/// waits for memory, so that one load waits for the other; words are left alone until they are put.
#[derive(CubeType)]
pub(crate) struct Flight<I: Float, N: Size> {
    vectors: Array<Vector<I, N>>,
    words: Array<Vector<u32, Const<4>>>,
    #[cube(comptime)]
    shape: Shape,
    #[cube(comptime)]
    wanted: bool,
}

/// Whether vectors travel as words: 16 bytes of 16-bit numbers, where the device takes one for the other.
#[cube]
fn in_words<I: Float, N: Size>() -> comptime_type!(bool) {
    let (n, size) = (N::value().comptime(), I::size().comptime());
    let device = comptime::device_properties().comptime();
    comptime!(n * size == 16 && size == 2 && device.features.memory_reinterpret)
}

#[cube]
impl<I: Float, N: Size> Flight<I, N> {
    /// Of rows as `shape` says, if any are `wanted`.
    pub fn new(#[comptime] shape: Shape, #[comptime] wanted: bool) -> Self {
        let n = N::value().comptime();
        let words = in_words::<I, N>();
        let (vectors, words) = comptime!(match (wanted, words) {
            (false, _) => (1, 1),
            (_, false) => (shape.vectors(n), 1),
            (_, true) => (1, shape.vectors(n)),
        });
        Flight::<I, N> { vectors: Array::new(vectors), words: Array::new(words), shape, wanted }
    }

    /// The same rows again.
    pub fn alias(&self) -> Self {
        Flight::<I, N> { vectors: self.vectors, words: self.words, shape: self.shape, wanted: self.wanted }
    }

    /// Asks, as the `worker`-th of those that do it, for the features `col0..` of `rows` rows, the first at `at.0` and each
    /// `at.1` after the one before.
    pub fn ask(&mut self, x: &[Vector<I, N>], at: (usize, usize), rows: usize, col0: usize, dim: usize, worker: usize) {
        if comptime!(self.wanted) {
            let n = N::value().comptime();
            let words = in_words::<I, N>();
            let cols = comptime!(self.shape.cols / n);
            #[unroll]
            for j in 0..comptime!(self.shape.vectors(n)) {
                let i = worker + j * self.shape.units;
                let (row, col) = (i / cols, col0 + i % cols * n);
                if comptime!(words) {
                    self.words[j] = Vector::new(0u32);
                    if row < rows && col < dim {
                        self.words[j] = Vector::reinterpret(x[(at.0 + row * at.1 + col) / n]);
                    }
                } else {
                    self.vectors[j] = read::<I, N>(x, at, rows, row, col, dim);
                }
            }
        }
    }

    /// Vectors of a worker.
    pub fn vectors(&self) -> comptime_type!(usize) {
        let n = N::value().comptime();
        comptime!(self.shape.vectors(n))
    }

    /// Row and first column of the `j`-th vector, of one of all units.
    pub fn place(&self, #[comptime] j: usize) -> (usize, usize) {
        let n = N::value().comptime();
        let cols = comptime!(self.shape.cols / n);
        let i = unit() + j * self.shape.units;
        (i / cols, i % cols * n)
    }

    /// Whether there is a `j`-th vector.
    pub fn has(&self, #[comptime] j: usize) -> bool {
        let n = N::value().comptime();
        if comptime!(self.shape.even(n)) { true.runtime() } else { self.place(j).0 < self.shape.rows }
    }

    /// Puts what all units have asked for into a tile.
    pub fn put_all<E: Float>(&self, tile: &mut Tile<E>) {
        self.put::<E>(tile, 0, unit());
    }

    /// Puts what has arrived into a tile, from row `row0` on.
    pub fn put<E: Float>(&self, tile: &mut Tile<E>, row0: usize, worker: usize) {
        if comptime!(self.wanted) {
            let n = N::value().comptime();
            let cols = comptime!(self.shape.cols / n);
            #[unroll]
            for j in 0..comptime!(self.shape.vectors(n)) {
                let i = worker + j * self.shape.units;
                if comptime!(self.shape.even(n)) {
                    tile.set_many::<I, N>(row0 + i / cols, i % cols * n, self.vector(j));
                } else {
                    if i / cols < self.shape.rows {
                        tile.set_many::<I, N>(row0 + i / cols, i % cols * n, self.vector(j));
                    }
                }
            }
        }
    }

    /// The `j`-th vector of this worker.
    pub fn vector(&self, #[comptime] j: usize) -> Vector<I, N> {
        let words = in_words::<I, N>();
        if comptime!(words) { Vector::reinterpret(self.words[j]) } else { self.vectors[j] }
    }
}
