//! Products of a row or a few, as when tokens are decoded: bound by reading `B`, each element once and as it lies in memory.
//! The sums are those of all products (see [`product`](super::product)), to the bit.

use super::product::{FEW, Operand, pieces, run_tasks};
use super::rows::{BLOCK, prefetch};
use super::simd::{arch, vectorize, widen};
use super::tile::Tile;
use crate::Element;
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Lines that a task reads side by side: sums are loaded and stored once for all of them.
const LINES: usize = 4;
/// Pieces that a task reads by turns: memory is prefetched in so many distant streams.
const STREAMS: usize = 4;
/// Columns of a task at most: sums stay in a first-level cache, and lines are read by the page.
const STRIP: usize = 2048;

/// Rows of `A` in f32, those of each block together; empty ones make up the number.
type Few<'a> = [&'a [f32]; FEW];

/// Calls `run` with the `m` rows of `A` in each of the blocks.
pub(super) fn with_rows<E: Element, R>(
    [blocks, m, _, k]: [usize; 4],
    a: Operand<E>,
    run: impl FnOnce(&[Few]) -> R,
) -> R {
    let mut widened = vec![0.0; if E::as_f32_slice(a.data).is_none() { blocks * m * k } else { 0 }];
    for (row, x) in widened.chunks_exact_mut(k).enumerate() {
        widen(a.row(row / m, row % m, 0..k), x);
    }
    let x = |block, i| match E::as_f32_slice(a.row(block, i, 0..k)) {
        Some(x) => x,
        None => &widened[(block * m + i) * k..][..k],
    };
    let rows: Vec<Few> =
        (0..blocks).map(|block| std::array::from_fn(|i| if i < m { x(block, i) } else { &[] })).collect();
    run(&rows)
}

/// `C = A B + bias`, line by line of `B`. Each task takes some pieces of the inner size, and all columns or some.
pub(super) fn by_lines<E: Element>(size: [usize; 4], x: &[Few], b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let [blocks, m, n, k] = size;
    let pieces = pieces(k);
    let (groups, width) = cut(blocks, pieces.len(), n);
    let (strips, per_group) = (n.div_ceil(width), pieces.len() / groups);
    let mut parts = vec![0.0f32; blocks * strips * pieces.len() * m * width];
    let task = |buffer: &mut Tile, (t, y): (usize, &mut [f32])| {
        let (place, pieces) = (t / groups, &pieces[t % groups * per_group..][..per_group]);
        let (block, column) = (place / strips, place % strips * width);
        let columns = column..n.min(column + width);
        arch().dispatch(Lines { b, x: x[block], block, pieces, columns, buffer, y, width });
    };
    run_tasks(size, parts.chunks_exact_mut(per_group * m * width).enumerate(), task);
    let mut c = vec![0.0; m * blocks * n];
    for (row, sums) in c.chunks_exact_mut(n).enumerate() {
        let (i, block) = (row / blocks, row % blocks);
        if let Some(bias) = bias {
            widen(&bias[block * n..(block + 1) * n], sums);
        }
        for (strip, sums) in sums.chunks_mut(width).enumerate() {
            for piece in 0..pieces.len() {
                let at = (((block * strips + strip) * pieces.len() + piece) * m + i) * width;
                join(piece == 0 && bias.is_none(), &parts[at..][..sums.len()], sums);
            }
        }
    }
    E::from_f32_vec(c)
}

/// Groups that the pieces of the inner size are dealt to, as many in each, and columns of a task, for every thread to have
/// one at least. Sums do not depend on either. Whole lines are read where the pieces can be dealt evenly.
fn cut(blocks: usize, pieces: usize, n: usize) -> (usize, usize) {
    let threads = rayon::current_num_threads().div_ceil(blocks);
    let groups = (1..=threads).rev().find(|groups| pieces.is_multiple_of(*groups)).unwrap_or(1);
    let strips = threads.div_ceil(groups).max(n.div_ceil(STRIP));
    (groups, n.div_ceil(strips).next_multiple_of(2 * BLOCK))
}

/// The sum of a piece into that of those before it; the first sets it, unless there is a bias.
fn join(first: bool, part: &[f32], sums: &mut [f32]) {
    if first {
        return sums.copy_from_slice(part);
    }
    vectorize(
        #[inline(always)]
        || sums.iter_mut().zip(part).for_each(|(sum, part)| *sum += part),
    );
}

/// A task's pieces of the inner size and its columns of `B`, the rows of `A` that they meet, and what comes of it.
struct Lines<'a, E> {
    b: Operand<'a, E>,
    x: Few<'a>,
    block: usize,
    pieces: &'a [Range<usize>],
    columns: Range<usize>,
    buffer: &'a mut Tile,
    y: &'a mut [f32],
    width: usize,
}

impl<E: Element> WithSimd for Lines<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let pieces = self.pieces;
        for (set, streams) in pieces.chunks(STREAMS).enumerate() {
            let longest = streams.iter().map(Range::len).max().unwrap_or(0);
            for from in (0..longest).step_by(LINES) {
                for (stream, piece) in streams.iter().enumerate() {
                    let (part, lines) = (set * STREAMS + stream, piece.start + from..piece.end);
                    if lines.len() >= LINES {
                        self.multiply::<S, LINES>(simd, lines.start, part);
                    } else {
                        lines.for_each(|line| self.multiply::<S, 1>(simd, line, part));
                    }
                }
            }
        }
    }
}

impl<E: Element> Lines<'_, E> {
    /// `N` lines with all rows, added to the sums of a piece.
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(&mut self, simd: S, first: usize, part: usize) {
        let Self { b, x, block, pieces, columns, buffer, y, width } = self;
        let sums = y.len() / pieces.len();
        let y = &mut y[part * sums..(part + 1) * sums];
        let rows: [&[E]; N] = std::array::from_fn(|i| b.row(*block, first + i, columns.clone()));
        if E::as_f32_slice(rows[0]).is_none() {
            if buffer.cols() != *width {
                **buffer = Tile::new(LINES, *width);
            }
            for (i, row) in rows.iter().enumerate() {
                E::to_f32_slice(row, &mut buffer.row_mut(i)[..row.len()]);
            }
        }
        let lines: [&[f32]; N] = std::array::from_fn(|i| match E::as_f32_slice(rows[i]) {
            Some(row) => row,
            None => &buffer.row(i)[..rows[i].len()],
        });
        let next = *block * b.block + (first + N) * b.stride + columns.start;
        for from in (0..columns.len()).step_by(BLOCK) {
            for i in 0..N {
                prefetch(b.data, next + i * b.stride + from);
            }
            let rest = columns.len() - from;
            for (x, y) in x.iter().zip(y.chunks_exact_mut(*width)) {
                let (x, lines, y) =
                    (std::array::from_fn(|i| x[first + i]), lines.map(|line| &line[from..]), &mut y[from..]);
                // A length that the compiler knows makes a run of vector code without tests.
                match rest {
                    BLOCK.. => add(simd, x, lines.map(|line| &line[..BLOCK]), &mut y[..BLOCK]),
                    _ => add(simd, x, lines.map(|line| &line[..rest]), &mut y[..rest]),
                }
            }
        }
    }
}

/// `y += x_0 lines_0 + x_1 lines_1 + ..`, one after the other with one rounding each, as in a register block.
#[inline(always)]
fn add<S: Simd, const N: usize>(simd: S, x: [f32; N], lines: [&[f32]; N], y: &mut [f32]) {
    let x = x.map(|x| simd.splat_f32s(x));
    let (vectors, rest) = S::as_mut_simd_f32s(y);
    let lines = lines.map(|line| {
        let (line, rest) = S::as_simd_f32s(line);
        (&line[..vectors.len()], rest)
    });
    for (i, y) in vectors.iter_mut().enumerate() {
        for (&x, (line, _)) in x.iter().zip(&lines) {
            *y = simd.mul_add_e_f32s(x, line[i], *y);
        }
    }
    if !rest.is_empty() {
        let mut sum = simd.partial_load_f32s(rest);
        for (&x, (_, line)) in x.iter().zip(&lines) {
            sum = simd.mul_add_e_f32s(x, simd.partial_load_f32s(line), sum);
        }
        simd.partial_store_f32s(rest, sum);
    }
}

/// Bytes of `B` that a task of [`by_outputs`] reads, about.
#[cfg(target_arch = "x86_64")]
const RUN: usize = 128 << 10;

/// `C = A B + bias` for a `B` that is stored as its transpose, line by line of that: squares of it are turned over in
/// registers, so that an output's sum goes along the inner size as in all products.
#[cfg(target_arch = "x86_64")]
pub(super) fn by_outputs<E: Element>(size: [usize; 4], x: &[Few], b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    use super::simd::avx2::{GROUP, dots};
    let [blocks, m, n, k] = size;
    let pieces = pieces(k);
    let width = (RUN / (k * size_of::<E>())).clamp(1, n).next_multiple_of(GROUP);
    let tasks = n.div_ceil(width);
    let task = |buffer: &mut Tile, t: usize| {
        let (block, first) = (t / tasks, t % tasks * width);
        let mut y = vec![0.0; m * width];
        if let Some(bias) = bias {
            let bias = &bias[block * n + first..block * n + n.min(first + width)];
            y.chunks_exact_mut(width).for_each(|y| widen(bias, &mut y[..bias.len()]));
        }
        for from in (first..n.min(first + width)).step_by(GROUP) {
            for piece in &pieces {
                let lines = from..n.min(from + GROUP);
                let whole = E::as_f32_slice(b.data).filter(|_| lines.len() == GROUP);
                let (lines, stride) = match whole {
                    Some(data) => (&data[block * b.block + from * b.stride + piece.start..], b.stride),
                    None => {
                        if buffer.cols() < piece.len() || buffer.rows() < GROUP {
                            *buffer = Tile::new(GROUP, pieces[0].len());
                        }
                        for (i, line) in lines.enumerate() {
                            widen(b.row(block, line, piece.clone()), &mut buffer.row_mut(i)[..piece.len()]);
                        }
                        (buffer.data(), buffer.stride())
                    }
                };
                let mut sums = [[0.0; GROUP]; FEW];
                let x = x[block].map(|x| x.get(piece.clone()).unwrap_or(&[]));
                dots(&x[..m], lines, stride, &mut sums);
                for (y, sums) in y.chunks_exact_mut(width).zip(&sums) {
                    join(piece.start == 0 && bias.is_none(), sums, &mut y[from - first..][..GROUP]);
                }
            }
        }
        y
    };
    let done = run_tasks(size, 0..blocks * tasks, task);
    let mut c = vec![0.0; m * blocks * n];
    for (row, c) in c.chunks_exact_mut(n).enumerate() {
        let (i, block) = (row / blocks, row % blocks);
        for (c, y) in c.chunks_mut(width).zip(&done[block * tasks..]) {
            c.copy_from_slice(&y[i * width..][..c.len()]);
        }
    }
    E::from_f32_vec(c)
}
