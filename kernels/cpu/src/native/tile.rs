//! Scratch matrices in f32, and the only place where tensors in memory are read and written.
//!
//! A kernel loads a `[rows, cols]` block of a strided tensor into a [`Tile`], computes on tiles, and stores a tile back.
//! Row strides are padded to an odd number of cache lines: with a power-of-two stride the rows of a block would share
//! a few cache sets, and a panel of a matrix product would evict itself.

use super::rows::{Aligned, BLOCK, Rows as Sink};
use super::simd::{round, vectorize, widen};
use crate::element::Element;

/// One cache line, so that a vector of buffers is aligned for 512-bit loads.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LINE]);

// Sixteen plain floats without padding.
unsafe impl bytemuck::Zeroable for Line {}
unsafe impl bytemuck::Pod for Line {}

/// Floats in a cache line; columns are padded to a multiple of it, so products need no column remainder.
pub(crate) const LINE: usize = 16;

/// Rows of a block of a tensor: where the first begins, and how far it is from each to the next.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub offset: usize,
    pub stride: usize,
}

/// A `[rows, cols]` f32 matrix with padded rows. The padding is finite and never read into a result.
#[derive(Clone, Default)]
pub(crate) struct Tile {
    data: Vec<Line>,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Tile {
    /// A zeroed matrix.
    pub fn new(rows: usize, cols: usize) -> Self {
        let lines = cols.div_ceil(LINE).max(1) | 1;
        Self { data: vec![Line([0.0; LINE]); rows.max(1) * lines], rows, cols, stride: lines * LINE }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Floats from one row to the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn data(&self) -> &[f32] {
        bytemuck::cast_slice(&self.data)
    }

    pub fn data_mut(&mut self) -> &mut [f32] {
        bytemuck::cast_slice_mut(&mut self.data)
    }

    pub fn row(&self, i: usize) -> &[f32] {
        let at = i * self.stride;
        &self.data()[at..at + self.cols]
    }

    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let (at, cols) = (i * self.stride, self.cols);
        &mut self.data_mut()[at..at + cols]
    }

    /// Row `i` and row `j` (`i != j`), the first to write and the second to read.
    pub fn two_rows(&mut self, i: usize, j: usize) -> (&mut [f32], &[f32]) {
        let (stride, cols) = (self.stride, self.cols);
        let data = self.data_mut();
        if i < j {
            let (a, b) = data.split_at_mut(j * stride);
            (&mut a[i * stride..i * stride + cols], &b[..cols])
        } else {
            let (a, b) = data.split_at_mut(i * stride);
            (&mut b[..cols], &a[j * stride..j * stride + cols])
        }
    }

    /// The rows before `row`, and those from it on.
    pub fn split(&mut self, row: usize) -> (&mut [f32], &mut [f32]) {
        let at = row * self.stride;
        self.data_mut().split_at_mut(at)
    }

    /// Whether nothing in rows `0..rows` is infinite or NaN.
    pub fn is_finite(&self, rows: usize) -> bool {
        let magnitude = |x: f32| x.abs().to_bits();
        let mut most = [0; LINE];
        vectorize(
            #[inline(always)]
            || {
                for i in 0..rows {
                    let (lines, rest) = self.row(i).as_chunks::<LINE>();
                    for line in lines {
                        most.iter_mut().zip(line).for_each(|(m, x)| *m = magnitude(*x).max(*m));
                    }
                    most.iter_mut().zip(rest).for_each(|(m, x)| *m = magnitude(*x).max(*m));
                }
            },
        );
        most.iter().all(|&most| most < f32::INFINITY.to_bits())
    }

    pub fn fill(&mut self, value: f32) {
        self.data_mut().fill(value);
    }

    /// Copies rows `0..rows` of a tile of the same width.
    pub fn copy_rows(&mut self, from: &Tile, rows: usize) {
        debug_assert_eq!(self.stride, from.stride);
        let n = rows * self.stride;
        self.data_mut()[..n].copy_from_slice(&from.data()[..n]);
    }

    /// Loads `rows` rows of a tensor.
    pub fn load<E: Element>(&mut self, src: &[E], at: Rows, rows: usize) {
        for i in 0..rows {
            let from = at.offset + i * at.stride;
            let cols = self.cols;
            widen(&src[from..from + cols], self.row_mut(i));
        }
    }

    /// Stores `rows` rows into a tensor shared with other tasks.
    pub fn store<E: Element>(&self, dst: &Shared<E>, at: Rows, rows: usize) {
        for i in 0..rows {
            // Safety: tasks own disjoint blocks of the tensor, so no two of them write the same elements.
            let out = unsafe { dst.slice_mut(at.offset + i * at.stride, self.cols) };
            round(self.row(i), out);
        }
    }

    /// Writes `rows` rows into a large output.
    pub fn put<E: Element>(&self, dst: &Sink<E>, at: Rows, rows: usize) {
        vectorize(
            #[inline(always)]
            || {
                for i in 0..rows {
                    for from in (0..self.cols).step_by(BLOCK) {
                        let (len, start) = (BLOCK.min(self.cols - from), i * self.stride + from);
                        let mut rest = Aligned([0.0; BLOCK]);
                        let block = match self.data()[start..].first_chunk() {
                            Some(block) => block,
                            None => {
                                rest[..len].copy_from_slice(&self.data()[start..start + len]);
                                &rest
                            }
                        };
                        // Safety: tasks own disjoint blocks of the tensor, so no two of them write the same elements.
                        unsafe { dst.put(at.offset + i * at.stride + from, block, len) };
                    }
                }
            },
        );
    }

    /// `self[j, i] = from[i, j]` for the leading `rows` rows of `from`.
    pub fn transpose_from(&mut self, from: &Tile, rows: usize) {
        let (cols, s, d) = (from.cols, from.stride, self.stride);
        debug_assert!(self.rows >= cols && self.stride >= rows);
        super::simd::transpose(from.data(), s, self.data_mut(), d, rows, cols);
    }
}

/// An output buffer written by several tasks, each to its own rows.
pub(crate) struct Shared<E> {
    ptr: *mut E,
    len: usize,
}

unsafe impl<E: Send> Send for Shared<E> {}
unsafe impl<E: Send> Sync for Shared<E> {}

impl<E> Shared<E> {
    pub fn new(buffer: &mut [E]) -> Self {
        Self { ptr: buffer.as_mut_ptr(), len: buffer.len() }
    }

    /// # Safety
    /// No two live slices may overlap.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice_mut(&self, at: usize, len: usize) -> &mut [E] {
        assert!(at + len <= self.len, "store outside of the output buffer");
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(at), len) }
    }
}
