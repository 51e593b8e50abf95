//! Products of matrices that do not fit a cache: linear layers and their gradients, on all threads.
//!
//! The inner size is cut into chunks. Of each, `B` is packed once into panels as wide as a register block, for all
//! threads; these take rows of `C` and pack their rows of `A`. With few rows each element of `B` is read once, by columns
//! or line by line.
//!
//! A row of `C` has the same bits whatever rows are computed with it, and whatever the number of threads: all ways sum the
//! same [`pieces`] of the inner size, each in order from 0 with one rounding per product, and add them up in order.

use super::ahead::Ahead;
use super::few_rows;
use super::gemm::{self, Lhs, Mode, Out, PANEL, Rhs, gemm};
use super::rows::{Output, zeroed};
use super::simd::{round, transpose, widen};
use super::tile::{LINE, Tile};
use crate::Element;
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
pub(super) const FEW: usize = 4;
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
    pub fn row(&self, block: usize, row: usize, columns: Range<usize>) -> &'a [E] {
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
        if width < PANEL {
            panel.fill(0.0);
        }
        if let Some(data) = E::as_f32_slice(self.data) {
            let data = &data[block * self.block + columns.start * self.stride + inner.start..];
            // Eight rows at a time: so few streams the hardware reads ahead.
            for row in (0..width).step_by(8) {
                let (data, panel) = (&data[row * self.stride..], &mut panel[row..]);
                transpose(data, self.stride, panel, PANEL, 8.min(width - row), inner.len());
            }
            return;
        }
        let mut tile = Tile::new(width, inner.len());
        for (j, column) in columns.enumerate() {
            widen(self.row(block, column, inner.clone()), tile.row_mut(j));
        }
        transpose(tile.data(), tile.stride(), panel, PANEL, width, inner.len());
    }
}

/// `C = A B + bias` in each block: `A` is `[m, k]`, `B` is `[k, n]`, and `C` is stored `[m, blocks, n]`; `bias` is
/// `[blocks, n]`. Sums are f32.
pub(crate) fn product<E: Element>(size: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let [_, m, _, _] = size;
    match m {
        ..=FEW if !a.transposed && !b.transposed => {
            few_rows::with_rows(size, a, |x| few_rows::by_lines(size, x, b, bias))
        }
        #[cfg(target_arch = "x86_64")]
        ..=FEW if !a.transposed && super::simd::has_avx2() => {
            few_rows::with_rows(size, a, |x| few_rows::by_outputs(size, x, b, bias))
        }
        ..=ROWS => by_columns(size, a, b, bias),
        _ => by_rows(size, a, b, bias),
    }
}

/// Inner elements of a chunk: even parts of `k`.
fn chunk(k: usize) -> usize {
    k.div_ceil(k.div_ceil(DEPTH))
}

/// The parts of the inner size that are summed by themselves: chunks, as deep as register blocks go at a time.
pub(super) fn pieces(k: usize) -> Vec<Range<usize>> {
    let (chunk, depth) = (chunk(k), gemm::depth());
    let chunks = (0..k).step_by(chunk).map(|from| from..k.min(from + chunk));
    let cut = |chunk: Range<usize>| {
        let end = chunk.end;
        chunk.step_by(depth).map(move |from| from..end.min(from.saturating_add(depth)))
    };
    chunks.flat_map(cut).collect()
}

/// Whether one thread takes all of a product, since it is small or there is no other: reading an element of B takes as long
/// as multiplying it by some of A.
fn serial([blocks, m, n, k]: [usize; 4]) -> bool {
    blocks * m.max(8) * n * k < SERIAL || rayon::current_num_threads() == 1
}

/// What the tasks of a product leave, in their order; each thread has scratch of its own.
pub(super) fn run_tasks<S: Default, T: Send, R: Send>(
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

/// More rows than that, of several tokens or sequences, or few with a transpose: each task takes a panel of `B`.
fn by_columns<E: Element>([blocks, m, n, k]: [usize; 4], a: Operand<E>, b: Operand<E>, bias: Option<&[E]>) -> Vec<E> {
    let (panels, pieces) = (n.div_ceil(PANEL), pieces(k));
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
        for inner in pieces.iter().cloned() {
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
            let mode = if inner.start == 0 && bias.is_none() { Mode::Set } else { Mode::Add };
            gemm(mode, [m, width, inner.len()], lhs[block].from(inner.start), rhs, out);
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
    let depth = chunk(k);
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
