//! Matrices that one plane holds by itself, on [`super::Engine::Mma`]: what it computes from them waits for no other plane.
//!
//! A result of `mma` lies in the registers as its left operand does, two blocks of 16 x 8 being one of 16 x 16. So a panel
//! is summed, weighed by row or column, and multiplied from the right without leaving them.

use cubecl::cmma::{MatrixIdent, MmaDefinition};
use cubecl::prelude::*;

use super::{BLOCK, Tile, WARP, unit};

/// A `[16, cols]` matrix of f32.
#[derive(CubeType)]
pub(crate) struct Panel {
    /// For each block of eight columns two pairs, of rows `lane / 4` and `lane / 4 + 8`.
    pairs: Array<Vector<f32, Const<2>>>,
    #[cube(comptime)]
    pub cols: usize,
}

#[cube]
impl Panel {
    /// Zeros.
    pub fn new(#[comptime] cols: usize) -> Panel {
        let mut panel = Panel { pairs: Array::new(comptime!(cols / 4)), cols };
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
        comptime!(self.cols / 4)
    }

    /// Row and first column of the first pair. [`Panel::offset`] says how far another one is.
    pub fn first(&self) -> (usize, usize) {
        let lane = unit() % WARP;
        (lane / 4, lane % 4 * 2)
    }

    /// Rows and columns from the first pair to another: what is added to an address is known at compile time.
    pub fn offset(&self, #[comptime] i: usize) -> comptime_type!((usize, usize)) {
        comptime!((i % 2 * 8, i / 2 * 8))
    }

    /// A pair.
    pub fn get(&self, #[comptime] i: usize) -> Vector<f32, Const<2>> {
        self.pairs[i]
    }

    /// Sets a pair.
    pub fn set(&mut self, #[comptime] i: usize, pair: Vector<f32, Const<2>>) {
        self.pairs[i] = pair;
    }

    /// Multiplies a pair.
    pub fn weigh(&mut self, #[comptime] i: usize, weight: Vector<f32, Const<2>>) {
        self.pairs[i] *= weight;
    }

    /// Takes the columns `col..` of `cols` rows of a tile, transposed.
    pub fn take_transposed<E: Float>(&mut self, tile: &Tile<E>, row: usize, col: usize) {
        let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
        let lane = unit() % WARP;
        let first = tile.at(row + lane % 8 + lane / 16 * 8, col + lane / 8 % 2 * 8);
        #[unroll]
        for step in 0..comptime!(self.cols / BLOCK) {
            let at = first + comptime!(step * BLOCK * tile.stride);
            let mut x = Array::<Vector<E, Const<2>>>::new(4usize);
            let rows = &tile.data[at..tile.data.len()];
            mma.load_matrix_inplace::<E, Const<2>>(rows, &mut x, MatrixIdent::A, 4usize, true);
            #[unroll]
            for i in 0..4 {
                self.pairs[comptime!(4 * step + i)] = Vector::cast_from(x[i]);
            }
        }
    }

    /// Writes all to the columns `col..` of a tile, transposed.
    pub fn put_transposed<E: Float>(&self, tile: &mut Tile<E>, row: usize, col: usize) {
        let (r, c) = self.first();
        let first = tile.at(row + c, col + r);
        #[unroll]
        for i in 0..self.pairs() {
            let (down, right) = self.offset(i);
            let at = first + comptime!(right * tile.stride + down);
            let pair = Vector::<E, Const<2>>::cast_from(self.pairs[i]);
            tile.data[at] = pair.extract(0usize);
            tile.data[at + comptime!(tile.stride)] = pair.extract(1usize);
        }
    }

    /// Adds `left right`. `right` begins at a row of its tile and is stored as `[depth, cols]`, or transposed.
    pub fn add<E: Float>(&mut self, left: &Panel, right: &Tile<E>, row: usize, #[comptime] transposed: bool) {
        let mma = MmaDefinition::<E, E, f32>::new(16usize, 8usize, 16usize);
        let lane = unit() % WARP;
        let first = if comptime!(transposed) {
            right.at(row + lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8)
        } else {
            right.at(row + lane % 16, lane / 16 * 8)
        };
        #[unroll]
        for step in 0..comptime!(left.cols / BLOCK) {
            let mut x = Array::<Vector<E, Const<2>>>::new(4usize);
            #[unroll]
            for i in 0..4 {
                x[i] = Vector::cast_from(left.pairs[comptime!(4 * step + i)]);
            }
            #[unroll]
            for n in 0..comptime!(self.cols / BLOCK) {
                let at = first
                    + comptime!(match transposed {
                        true => n * BLOCK * right.stride + step * BLOCK,
                        false => step * BLOCK * right.stride + n * BLOCK,
                    });
                let mut y = Array::<Vector<E, Const<2>>>::new(4usize);
                let rows = &right.data[at..right.data.len()];
                mma.load_matrix_inplace::<E, Const<2>>(rows, &mut y, MatrixIdent::B, 4usize, comptime!(!transposed));
                #[unroll]
                for j in 0..2 {
                    let mut operand = Array::<Vector<E, Const<2>>>::new(2usize);
                    operand[0] = y[comptime!(2 * j)];
                    operand[1] = y[comptime!(2 * j + 1)];
                    let i = comptime!(2 * (2 * n + j));
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
