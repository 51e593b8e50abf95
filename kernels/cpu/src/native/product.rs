//! Products of matrices that do not fit a cache: linear layers and their gradients, on all threads.
//!
//! The inner size is cut into chunks. Of each, `B` is packed once into panels as wide as a register block, for all
//! threads; these take rows of `C` and pack their rows of `A`. With few rows each element of `B` is read once, by columns
//! or line by line. Where sums are cut does not depend on the number of threads, nor do the bits.

use super::ahead::Ahead;
use super::gemm::{Lhs, Mode, Out, PANEL, Rhs, gemm};
use super::rows::{Output, zeroed};
use super::simd::{arch, round, transpose, vectorize, widen};
use super::tile::{LINE, Tile};
use crate::Element;
use pulp::{Simd, WithSimd};
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Inner elements of a chunk at most: a panel of `B` and a task's rows of `A` stay in a second-level cache.
const DEPTH: usize = 1024;
/// Rows of `C` that a task takes at most.
const ROWS: usize = 64;
/// Panels of `B` from which on rows of `A` are read so often that packing them pays; rows of a transpose always are.
const OFTEN: usize = 16;
/// Rows of `C` at most that are computed while `B` is read in the order of memory.
const FEW: usize = 4;
/// Bytes of `B` that a task then reads, about, and lines at least: each run leaves a row of sums.
const RUN: usize = 256 << 10;
const RUN_LINES: usize = 32;
/// Lines of it that are read side by side: memory gives more to some streams than to one.
const STREAMS: usize = 4;
/// Multiply-adds below which waking a thread costs more than it saves.
const SERIAL: usize = 1 << 18;

/// One matrix per block: row `i` of block `b` begins at `b * block + i * stride`. The operand is that matrix, or its
/// transpose.
#[derive(Clone, Copy)]
pub(crate) struct Operand<'a, E> {
    pub data: &'a [E],
    pub stride: usize,
    pub block: usize,
    pub transposed: bool,
}

impl<'a, E: Element> Operand<'a, E> {
    /// One block alone.
    pub fn only(self, block: usize) -> Self {
        Self { data: &self.data[block * self.block..], ..self }
    }

    /// Elements `columns` of a row in memory.
    fn row(&self, block: usize, row: usize, columns: Range<usize>) -> &'a [E] {
        let at = block * self.block + row * self.stride;
        &self.data[at + columns.start..at + columns.end]
    }

    /// `[rows, inner]` of the operand as a left operand: f32 as it lies where that is fast, others by way of `tile`.
    fn lhs<'t>(&self, tile: &'t mut Tile, block: usize, rows: Range<usize>, inner: Range<usize>) -> Lhs<'t>
    where
        'a: 't,
    {
        // Rows of a transpose are read across, which a stride that visits few sets of a cache makes slow.
        if let Some(data) = E::as_f32_slice(self.data).filter(|_| !self.transposed || !self.stride.is_multiple_of(512))
        {
            let (line, column) = if self.transposed { (inner.start, rows.start) } else { (rows.start, inner.start) };
            let data = &data[block * self.block + line * self.stride + column..];
            return Lhs::strided(data, self.stride, self.transposed);
        }
        let (lines, columns) = if self.transposed { (inner, rows) } else { (rows, inner) };
        if tile.rows() < lines.len() || tile.cols() != columns.len() {
            *tile = Tile::new(lines.len(), columns.len());
        }
        for (i, line) in lines.enumerate() {
            let row = self.row(block, line, columns.clone());
            widen(row, &mut tile.row_mut(i)[..row.len()]);
        }
        if self.transposed { Lhs::transposed(tile, 0, 0) } else { Lhs::of(tile, 0, 0) }
    }

    /// `[inner, columns]` of the operand as it lies, if a product can take it so.
    fn panel(&self, block: usize, inner: Range<usize>, columns: Range<usize>) -> Option<Rhs<'a>> {
        let data = E::as_f32_slice(self.data).filter(|_| !self.transposed && columns.len().is_multiple_of(LINE))?;
        Some(Rhs::strided(&data[block * self.block + inner.start * self.stride + columns.start..], self.stride))
    }

    /// `[inner, columns]` of the operand into a panel, filled up with columns of 0.
    fn pack(&self, panel: &mut [f32], block: usize, inner: Range<usize>, columns: Range<usize>) {
        let width = columns.len();
        if !self.transposed {
            for (p, line) in inner.zip(panel.as_chunks_mut::<PANEL>().0) {
                let row = self.row(block, p, columns.clone());
                // A length that the compiler knows makes a copy without a call.
                if let Some(row) = E::as_f32_slice(row).and_then(|row| row.first_chunk()) {
                    *line = *row;
                    continue;
                }
                widen(row, &mut line[..width]);
                line[width..].fill(0.0);
            }
            return;
        }
        let mut tile = Tile::new(width, inner.len());
        for (j, column) in columns.enumerate() {
            widen(self.row(block, column, inner.clone()), tile.row_mut(j));
        }
        if width < PANEL {
            panel.fill(0.0);
        }
        transpose(tile.data(), tile.stride(), panel, PANEL, width, inner.len());
    }
}

/// `C = A B + bias` in each block: `A` is `[m, k]`, `B` is `[k, n]`, and `C` is stored `[m, blocks, n]`; `bias` is
/// `[blocks, n]`. Sums are f32.
pub(crate) fn product<E: Element>(size: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let [_, m, _, _] = size;
    match m {
        ..=FEW if !a.transposed => by_lines(size, a, b, bias),
        ..=ROWS => by_columns(size, a, b, bias),
        _ => by_rows(size, a, b, bias),
    }
}

/// Whether one thread takes all of a product, since it is small or there is no other: reading an element of B takes as long
/// as multiplying it by some of A.
fn serial([blocks, m, n, k]: [usize; 4]) -> bool {
    blocks * m.max(8) * n * k < SERIAL || rayon::current_num_threads() == 1
}

/// What the tasks of a product leave, in their order; each thread has scratch of its own.
fn run_tasks<S: Default, T: Send, R: Send>(
    size: [usize; 4],
    tasks: impl Iterator<Item = T>,
    run: impl Fn(&mut S, T) -> R + Sync + Send,
) -> Vec<R> {
    if serial(size) {
        let mut scratch = S::default();
        return tasks.map(|task| run(&mut scratch, task)).collect();
    }
    tasks.collect::<Vec<_>>().into_par_iter().map_init(S::default, run).collect()
}

/// A row or a few, as when tokens are decoded: bound by reading `B`, whose lines in memory are several streams. Each task
/// goes on in all of them where the one before it ends.
fn by_lines<E: Element>(size: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let [blocks, m, n, k] = size;
    // Lines are rows of `B`, whose multiples are summed, or columns of it.
    let (lines, length) = if b.transposed { (n, k) } else { (k, n) };
    let runs = (lines * length * size_of::<E>()).div_ceil(RUN).min(lines.div_ceil(RUN_LINES)).next_multiple_of(2);
    let stream = lines.div_ceil(STREAMS);
    let run = stream.div_ceil(runs);
    let runs = stream.div_ceil(run);
    let width = if b.transposed { STREAMS * run } else { n };
    let mut widened = vec![0.0; if E::as_f32_slice(a.data).is_none() { blocks * m * k } else { 0 }];
    for (row, x) in widened.chunks_exact_mut(k).enumerate() {
        widen(a.row(row / m, row % m, 0..k), x);
    }
    let x = |block, i| match E::as_f32_slice(a.row(block, i, 0..k)) {
        Some(x) => x,
        None => &widened[(block * m + i) * k..][..k],
    };
    let mut parts = vec![0.0f32; blocks * runs * m * width];
    let task = |buffer: &mut Tile, (t, y): (usize, &mut [f32])| {
        let (block, first) = (t / runs, t % runs * run);
        let x = std::array::from_fn(|i| if i < m { x(block, i) } else { &[] });
        let places = first..stream.min(first + run);
        arch().dispatch(Lines { b, x, block, lines, length, stream, run, places, buffer, y, width });
    };
    run_tasks(size, parts.chunks_exact_mut(m * width).enumerate(), task);
    let mut c = vec![0.0; m * blocks * n];
    for (row, sums) in c.chunks_exact_mut(n).enumerate() {
        let (i, block) = (row / blocks, row % blocks);
        if let Some(bias) = bias {
            widen(&bias[block * n..(block + 1) * n], sums);
        }
        let parts = parts[block * runs * m * width..].chunks_exact(m * width).take(runs);
        for (r, part) in parts.enumerate() {
            let part = &part[i * width..(i + 1) * width];
            // Of columns a run has a few from each stream, of rows a multiple of all.
            let (to, from, first) = if b.transposed { (stream, run, r * run) } else { (n, n, 0) };
            for (sums, part) in sums.chunks_mut(to).zip(part.chunks_exact(from)) {
                let first = sums.len().min(first);
                let sums = &mut sums[first..];
                let len = sums.len().min(part.len());
                vectorize(
                    #[inline(always)]
                    || add([1.0], [&part[..len]], &mut sums[..len]),
                );
            }
        }
    }
    E::from_f32_vec(c)
}

/// A task's places in the streams of lines of `B`, the rows of `A` that they meet, and what comes of it.
struct Lines<'a, E> {
    b: Operand<'a, E>,
    x: [&'a [f32]; FEW],
    block: usize,
    lines: usize,
    length: usize,
    /// Lines of a stream; the last may have fewer.
    stream: usize,
    run: usize,
    places: Range<usize>,
    buffer: &'a mut Tile,
    y: &'a mut [f32],
    width: usize,
}

impl<E: Element> WithSimd for Lines<'_, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let Range { start, end } = self.places;
        let all = self.lines.saturating_sub((STREAMS - 1) * self.stream).clamp(start, end);
        for place in start..all {
            self.multiply::<S, STREAMS>(simd, place, 0);
        }
        for place in all..end {
            for first in 0..(self.lines - place).div_ceil(self.stream) {
                self.multiply::<S, 1>(simd, place, first);
            }
        }
    }
}

impl<E: Element> Lines<'_, E> {
    /// The lines at this place of `N` streams, with all rows.
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(&mut self, simd: S, place: usize, first: usize) {
        let Self { b, x, block, length, stream, run, places, buffer, y, width, .. } = self;
        let numbers: [usize; N] = std::array::from_fn(|s| (first + s) * *stream + place);
        let rows = numbers.map(|line| b.row(*block, line, 0..*length));
        if E::as_f32_slice(rows[0]).is_none() {
            if buffer.cols() != *length {
                **buffer = Tile::new(STREAMS, *length);
            }
            for (i, row) in rows.iter().enumerate() {
                E::to_f32_slice(row, buffer.row_mut(i));
            }
        }
        let lines: [&[f32]; N] = std::array::from_fn(|i| match E::as_f32_slice(rows[i]) {
            Some(row) => row,
            None => buffer.row(i),
        });
        for (x, y) in x.iter().zip(y.chunks_exact_mut(*width)) {
            if b.transposed {
                for (s, sum) in dots(simd, x, lines).into_iter().enumerate() {
                    y[(first + s) * *run + place - places.start] = sum;
                }
            } else {
                add(numbers.map(|line| x[line]), lines, y);
            }
        }
    }
}

/// `<x, line>` for each line. Written with vectors: of sums side by side the compiler makes none of itself.
#[inline(always)]
fn dots<S: Simd, const N: usize>(simd: S, x: &[f32], lines: [&[f32]; N]) -> [f32; N] {
    let (vectors, rest) = S::as_simd_f32s(x);
    let lines = lines.map(|line| S::as_simd_f32s(&line[..x.len()]));
    let mut sums = [simd.splat_f32s(0.0); N];
    for (i, &x) in vectors.iter().enumerate() {
        for (sum, (line, _)) in sums.iter_mut().zip(&lines) {
            *sum = simd.mul_add_e_f32s(x, line[i], *sum);
        }
    }
    std::array::from_fn(|n| {
        let rest: f32 = rest.iter().zip(lines[n].1).map(|(x, w)| x * w).sum();
        simd.reduce_sum_f32s(sums[n]) + rest
    })
}

/// `y += x_0 lines_0 + x_1 lines_1 + ..`, in vector code.
#[inline(always)]
fn add<const N: usize>(x: [f32; N], lines: [&[f32]; N], y: &mut [f32]) {
    let lines = lines.map(|line| &line[..y.len()]);
    for (i, y) in y.iter_mut().enumerate() {
        for (x, line) in x.iter().zip(lines) {
            *y += x * line[i];
        }
    }
}

/// More rows than that, of several tokens or sequences: each task takes a panel of `B`.
fn by_columns<E: Element>([blocks, m, n, k]: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let panels = n.div_ceil(PANEL);
    let mut tiles: Vec<_> = (0..blocks).map(|_| Tile::default()).collect();
    let lhs: Vec<_> = tiles.iter_mut().enumerate().map(|(block, tile)| a.lhs(tile, block, 0..m, 0..k)).collect();
    let task = |packed: &mut Vec<f32>, p: usize| {
        let (block, column) = (p / panels, p % panels * PANEL);
        let columns = column..n.min(column + PANEL);
        let mut c = vec![0.0; m * PANEL];
        if let Some(bias) = bias {
            let bias = &bias[block * n + columns.start..block * n + columns.end];
            c.chunks_exact_mut(PANEL).for_each(|c| widen(bias, &mut c[..bias.len()]));
        }
        for from in (0..k).step_by(DEPTH) {
            let inner = from..k.min(from + DEPTH);
            // A single block of rows reads a panel once, so packing it would not pay.
            let rhs = match b.panel(block, inner.clone(), columns.clone()) {
                Some(rhs) if m <= 8 => rhs,
                _ => {
                    packed.resize(inner.len() * PANEL, 0.0);
                    b.pack(packed, block, inner.clone(), columns.clone());
                    Rhs::strided(packed, PANEL)
                }
            };
            let out = Out::initialised(&mut c, PANEL);
            let width = columns.len().next_multiple_of(LINE);
            gemm(Mode::Add, [m, width, inner.len()], lhs[block].from(inner.start), rhs, out);
        }
        c
    };
    let tasks = run_tasks([blocks, m, n, k], 0..blocks * panels, task);
    let mut c = vec![E::default(); m * blocks * n];
    for (i, row) in c.chunks_exact_mut(n).enumerate() {
        let (i, block) = (i / blocks, i % blocks);
        for (to, from) in row.chunks_mut(PANEL).zip(&tasks[block * panels..]) {
            round(&from[i * PANEL..i * PANEL + to.len()], to);
        }
    }
    c
}

/// Many rows, of which each task takes some.
fn by_rows<E: Element>([blocks, m, n, k]: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    // The register blocks write whole cache lines.
    let padded = n.next_multiple_of(LINE);
    let (width, panels) = (blocks * padded, padded.div_ceil(PANEL));
    let first = bias.map(|bias| {
        let mut first = vec![0.0; width];
        for (first, bias) in first.chunks_exact_mut(padded).zip(bias.chunks_exact(n)) {
            widen(bias, &mut first[..n]);
        }
        first
    });
    let serial = serial([blocks, m, n, k]);
    let threads = if serial { 1 } else { rayon::current_num_threads() };
    let rows = m.div_ceil(4 * threads).next_multiple_of(8).min(ROWS);
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    let scratch = || (Tile::default(), Vec::new(), Ahead::default());

    let mut packed = Vec::new();
    let mut c = Output::new(m * width, Vec::new());
    for from in (0..k).step_by(depth) {
        let inner = from..k.min(from + depth);
        let panel = inner.len() * PANEL;
        let pack = |(p, to)| {
            let (block, column) = (p / panels, p % panels * PANEL);
            b.pack(zeroed(to), block, inner.clone(), column..n.min(column + PANEL));
        };
        let mut output = Output::new(blocks * panels * panel, std::mem::take(&mut packed));
        let parts: Vec<_> = output.parts(panel).enumerate().collect();
        if serial {
            parts.into_iter().for_each(pack);
        } else {
            parts.into_par_iter().for_each(pack);
        }
        // Safety: every panel has been packed.
        packed = unsafe { output.finish() };
        let task = |(tile, buffer, ahead): &mut (Tile, Vec<f32>, Ahead), (i, c): (usize, &mut [MaybeUninit<f32>])| {
            if let (0, Some(first)) = (from, &first) {
                c.chunks_exact_mut(width).for_each(|row| _ = row.write_copy_of_slice(first));
            }
            // Safety of adding: initialised by the bias, or set in the first chunk.
            let mode = if from == 0 && first.is_none() { Mode::Set } else { Mode::Add };
            let taken = i * rows..i * rows + c.len() / width;
            for (block, packed) in packed.chunks_exact(panels * panel).enumerate() {
                let lhs = a.lhs(tile, block, taken.clone(), inner.clone());
                let pays = a.transposed || panels >= OFTEN;
                let lhs = if pays { lhs.packed(taken.len(), inner.len(), buffer) } else { lhs };
                for (p, column) in (0..padded).step_by(PANEL).enumerate() {
                    let (data, later) = packed[p * panel..].split_at(panel);
                    let out = Out { data: &mut c[block * padded + column..], stride: width };
                    let size = [taken.len(), PANEL.min(padded - column), inner.len()];
                    ahead.clear();
                    ahead.slice(&later[..panel.min(later.len())]);
                    gemm(mode, size, lhs, Rhs::strided(data, PANEL).asking(ahead), out);
                }
            }
        };
        let parts = c.parts(rows * width).enumerate();
        if serial {
            let mut tile = scratch();
            parts.for_each(|part| task(&mut tile, part));
        } else {
            parts.collect::<Vec<_>>().into_par_iter().with_max_len(1).for_each_init(scratch, task);
        }
    }
    // Safety: every element was initialised in the first chunk, and there is one, since `k` is not 0.
    let c = unsafe { c.finish() };
    if padded == n {
        return E::from_f32_vec(c);
    }
    let mut narrow = vec![E::default(); m * blocks * n];
    let rows = narrow.par_chunks_exact_mut(n).zip(c.par_chunks_exact(padded)).with_min_len(1024);
    rows.for_each(|(to, from)| round(&from[..n], to));
    narrow
}
