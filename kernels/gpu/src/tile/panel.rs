//! Columns of a matrix that one plane holds by itself, on [`super::Engine::Mma`]: what it computes from them waits for no
//! other plane.
//!
//! Operands lie in shared memory: what a plane multiplies from the right are columns of a tile that nobody else touches,
//! and between writing and reading them stands a `sync_plane()`, which is the caller's.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::sums::NARROW;
use super::{BLOCK, Tile, WARP, unit};

/// A `[rows, cols]` matrix of f32; 8 or 16 columns.
#[derive(CubeType)]
pub(crate) struct Panel {
    /// For each block of 16 x 8 two pairs, of rows `lane / 4` and `lane / 4 + 8`; blocks of one row follow each other.
    pairs: Array<Vector<f32, Const<2>>>,
    #[cube(comptime)]
    pub rows: usize,
    #[cube(comptime)]
    pub cols: usize,
}

/// Matrices of 8 x 8, in the order of a panel's pairs, that one instruction moves between registers and a tile.
fn at_once(rows: usize, cols: usize) -> usize {
    if (rows * cols).is_multiple_of(4 * NARROW * NARROW) { 4 } else { 2 }
}

/// Where in a tile, from its row and column on, the row of a matrix begins that this lane names.
#[cube]
fn named<E: Float>(tile: &Tile<E>, row: usize, col: usize, #[comptime] rows: usize, #[comptime] cols: usize) -> usize {
    let lane = unit() % WARP;
    if comptime!(cols == NARROW && at_once(rows, cols) == 4) {
        tile.at(row + lane, col)
    } else {
        let second = if comptime!(cols == NARROW) { 0usize.runtime() } else { lane / 16 * 8 };
        tile.at(row + lane % 16, col + second)
    }
}

#[cube]
impl Panel {
    /// Zeros.
    pub fn new(#[comptime] rows: usize, #[comptime] cols: usize) -> Panel {
        let mut panel = Panel { pairs: Array::new(comptime!(rows * cols / 2 / WARP)), rows, cols };
        panel.clear();
        panel
    }

    /// Sets all to zero.
    pub fn clear(&mut self) {
        #[unroll]
        for i in 0..self.pairs() {
            self.pairs[i] = Vector::new(f32::new(0.0));
        }
    }

    /// Pairs that a unit has.
    pub fn pairs(&self) -> comptime_type!(usize) {
        comptime!(self.rows * self.cols / 2 / WARP)
    }

    /// Row and first column of the first pair. [`Panel::offset`] says how far another one is.
    pub fn first(&self) -> (usize, usize) {
        let lane = unit() % WARP;
        (lane / 4, lane % 4 * 2)
    }

    /// Rows and columns from the first pair to another: what is added to an address is known at compile time.
    pub fn offset(&self, #[comptime] i: usize) -> comptime_type!((usize, usize)) {
        let across = comptime!(self.cols / NARROW);
        comptime!((i / 2 / across * BLOCK + i % 2 * 8, i / 2 % across * NARROW))
    }

    /// A pair.
    pub fn get(&self, #[comptime] i: usize) -> Vector<f32, Const<2>> {
        self.pairs[i]
    }

    /// Sets a pair.
    pub fn set(&mut self, #[comptime] i: usize, pair: Vector<f32, Const<2>>) {
        self.pairs[i] = pair;
    }

    /// Multiplies the `i`-th of the unit's rows, which lie 8 apart.
    pub fn weigh(&mut self, #[comptime] i: usize, weight: f32) {
        #[unroll]
        for n in 0..comptime!(self.cols / NARROW) {
            let at = comptime!((i / 2 * (self.cols / NARROW) + n) * 2 + i % 2);
            self.pairs[at] *= Vector::new(weight);
        }
    }

    /// Takes the columns `col..` of a tile's rows from `row` on.
    pub fn take<E: Float>(&mut self, tile: &Tile<E>, row: usize, col: usize) {
        let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
        let n = comptime!(at_once(self.rows, self.cols));
        let first = named::<E>(tile, row, col, self.rows, self.cols);
        let from = tile.from(first);
        #[unroll]
        for part in 0..comptime!(self.rows * self.cols / (2 * WARP * n)) {
            let at = comptime!(part * n * NARROW * NARROW / self.cols * tile.stride);
            let mut x = Array::<Vector<E, Const<2>>>::new(n);
            mma.load_matrix_inplace::<E, Const<2>>(&from[at..from.len()], &mut x, MatrixIdent::A, n, false);
            #[unroll]
            for i in 0..n {
                self.pairs[comptime!(part * n + i)] = Vector::cast_from(x[i]);
            }
        }
    }

    /// Writes all to the columns `col..` of a tile's rows from `row` on.
    pub fn put<E: Float>(&self, tile: &mut Tile<E>, row: usize, col: usize) {
        let device = comptime::device_properties().comptime();
        if comptime!(device.features.matmul.stmatrix.is_empty()) {
            let (r, c) = self.first();
            #[unroll]
            for i in 0..self.pairs() {
                let (down, right) = self.offset(i);
                tile.set_many::<f32, Const<2>>(row + r + down, col + c + right, self.pairs[i]);
            }
        } else {
            let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
            let n = comptime!(at_once(self.rows, self.cols));
            let first = named::<E>(&*tile, row, col, self.rows, self.cols);
            let (first, end) = (tile.bounded(first), tile.data.len());
            let to = &mut tile.data[first..end];
            #[unroll]
            for part in 0..comptime!(self.rows * self.cols / (2 * WARP * n)) {
                let at = comptime!(part * n * NARROW * NARROW / self.cols * tile.stride);
                let mut x = Array::<Vector<E, Const<2>>>::new(n);
                #[unroll]
                for i in 0..n {
                    x[i] = Vector::cast_from(self.pairs[comptime!(part * n + i)]);
                }
                let end = to.len();
                mma.store_matrix::<E, Const<2>>(&mut to[at..end], &x, MatrixIdent::Accumulator, n, false);
            }
        }
    }

    /// Adds `left right`. Both begin at a row of their tiles, `right` at a column too and is `[depth, cols]`.
    pub fn add<E: Float>(
        &mut self,
        left: &Tile<E>,
        left_row: usize,
        right: &Tile<E>,
        from: (usize, usize),
        #[comptime] left_is: Left,
        #[comptime] depth: usize,
    ) {
        let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
        let lane = unit() % WARP;
        let first = if comptime!(left_is.transposed) {
            left.at(left_row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)
        } else {
            left.at(left_row + lane % 16, lane / 16 * 8)
        };
        let right_first = named::<E>(right, from.0, from.1, depth, self.cols);
        let (left_from, right_from) = (left.from(first), right.from(right_first));
        let (across, n) = comptime!((self.cols / NARROW, at_once(depth, self.cols)));
        let steps = comptime!(n / 2 / across);
        #[unroll]
        for part in 0..comptime!(depth / BLOCK / steps) {
            let at = comptime!(part * steps * BLOCK * right.stride);
            let mut y = Array::<Vector<E, Const<2>>>::new(n);
            let rows = &right_from[at..right_from.len()];
            mma.load_matrix_inplace::<E, Const<2>>(rows, &mut y, MatrixIdent::B, n, true);
            #[unroll]
            for s in 0..steps {
                let step = comptime!(part * steps + s);
                #[unroll]
                for m in 0..comptime!(self.rows / BLOCK) {
                    if comptime!(!left_is.zero(m, step)) {
                        let at = comptime!(match left_is.transposed {
                            true => step * BLOCK * left.stride + m * BLOCK,
                            false => m * BLOCK * left.stride + step * BLOCK,
                        });
                        let mut x = Array::<Vector<E, Const<2>>>::new(4usize);
                        let rows = &left_from[at..left_from.len()];
                        mma.load_matrix_inplace::<E, Const<2>>(
                            rows,
                            &mut x,
                            MatrixIdent::A,
                            4usize,
                            left_is.transposed,
                        );
                        #[unroll]
                        for j in 0..across {
                            let from = comptime!(2 * (s * across + j));
                            let mut operand = Array::<Vector<E, Const<2>>>::new(2usize);
                            operand[0] = y[from];
                            operand[1] = y[comptime!(from + 1)];
                            let i = comptime!(2 * (m * across + j));
                            let mut sum = Array::<Vector<f32, Const<2>>>::new(2usize);
                            sum[0] = self.pairs[i];
                            sum[1] = self.pairs[comptime!(i + 1)];
                            let sum = mma.execute::<Const<2>, Const<2>, Const<2>>(&x, &operand, &sum);
                            self.pairs[i] = sum[0];
                            self.pairs[comptime!(i + 1)] = sum[1];
                        }
                    }
                }
            }
        }
    }
}

/// The left operand of [`Panel::add`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Left {
    /// It is stored as `[depth, rows]`.
    pub transposed: bool,
    /// What is stored is zero above the diagonal.
    pub lower: bool,
}

impl Left {
    pub const PLAIN: Self = Self { transposed: false, lower: false };
    pub const TRANSPOSED: Self = Self { transposed: true, lower: false };
    pub const LOWER: Self = Self { transposed: false, lower: true };
    pub const LOWER_TRANSPOSED: Self = Self { transposed: true, lower: true };

    /// Whether a block of 16 x 16 is zero.
    fn zero(self, m: usize, step: usize) -> bool {
        self.lower && if self.transposed { step < m } else { step > m }
    }
}
