//! Small dense matrix products in f32, the work-horse of every chunked kernel.
//!
//! `C (=, +=, -=) A B` with `B` and `C` row-major and `A` in either order, so that `A^T B` costs nothing extra. The
//! register block is `MR` rows by two vectors: each step broadcasts `MR` elements of `A` against two vectors of `B`.
//! Operands are tiles that already sit in cache, so only an `A` that is read often is packed ([`Lhs::packed`]); `A B^T`
//! transposes `B` first (`Tile::transpose_from`). Whoever goes through more than a cache holds says what comes next
//! ([`Rhs::asking`]).

use super::ahead::{Ahead, Strip};
use super::simd::arch;
use super::tile::{LINE, Tile};
use pulp::{Simd, WithSimd};
use std::mem::MaybeUninit;
use std::ops::Range;

/// Columns of the widest register block: panels of a right operand that are packed have this many.
pub(crate) const PANEL: usize = 2 * LINE;

/// Inner steps of a register block at most, see [`Product::column`].
const DEPTH: usize = 128;

/// Columns that are packed at a time.
const LINES: usize = 64;

/// Inner steps between two tests for the last.
const UNROLL: usize = 4;

/// [`Order`] as a parameter of the compiled loops.
const ROWS: u8 = Order::Rows as u8;
const COLUMNS: u8 = Order::Columns as u8;
const PACKED: u8 = Order::Packed as u8;

/// Rows of a register block, with `left` rows to go: as many as registers allow, the rest in fours where that leaves no
/// single rows.
#[inline(always)]
fn height(left: usize, many_registers: bool) -> usize {
    match left {
        8.. if many_registers => 8,
        6 | 7 | 10.. if !many_registers => 6,
        4.. => 4,
        _ => 1,
    }
}

/// Whether the vector unit has registers for blocks of eight rows.
fn many_registers() -> bool {
    struct Count;
    impl WithSimd for Count {
        type Output = bool;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> bool {
            S::REGISTER_COUNT >= 32
        }
    }
    arch().dispatch(Count)
}

/// Inner steps that a register block sums from 0 before it adds to its output, at most.
pub(crate) fn depth() -> usize {
    if many_registers() { usize::MAX } else { DEPTH }
}

/// What a product does with the previous content of its output.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    Set,
    Add,
    Sub,
}

/// How the left operand lies in memory: row after row, as the transpose of a matrix that does, or packed, where the register
/// block that begins at row `i` is the run from `i * stride` on, one column after another.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Rows,
    Columns,
    Packed,
}

/// The left operand.
#[derive(Clone, Copy)]
pub(crate) struct Lhs<'a> {
    data: &'a [f32],
    stride: usize,
    order: Order,
}

impl<'a> Lhs<'a> {
    /// The block of `tile` that starts at `(row, col)`.
    pub fn of(tile: &'a Tile, row: usize, col: usize) -> Self {
        Self::strided(&tile.data()[row * tile.stride() + col..], tile.stride(), false)
    }

    /// The transpose of the block of `tile` that starts at `(row, col)`.
    pub fn transposed(tile: &'a Tile, row: usize, col: usize) -> Self {
        Self::strided(&tile.data()[row * tile.stride() + col..], tile.stride(), true)
    }

    /// A matrix whose rows begin every `stride` elements, or its transpose.
    pub fn strided(data: &'a [f32], stride: usize, transposed: bool) -> Self {
        Self { data, stride, order: if transposed { Order::Columns } else { Order::Rows } }
    }

    /// The same from column `col` on, if it is not packed.
    pub fn from(self, col: usize) -> Self {
        let at = match self.order {
            Order::Rows => col,
            Order::Columns => col * self.stride,
            Order::Packed => unreachable!("a packed operand is cut before it is packed"),
        };
        Self { data: &self.data[at..], ..self }
    }

    /// The same from row `row` on; of a packed operand a row at which a register block begins.
    pub fn below(self, row: usize) -> Self {
        let at = if self.order == Order::Columns { row } else { row * self.stride };
        Self { data: &self.data[at..], ..self }
    }

    /// `[m, k]` in the order in which products read it, where that pays for an operand that is read often: with many columns,
    /// and registers for so few rows that few elements of a cache line are read at a time.
    pub fn packed<'t>(self, m: usize, k: usize, buffer: &'t mut Vec<f32>) -> Lhs<'t>
    where
        'a: 't,
    {
        if self.order == Order::Packed || many_registers() {
            return self;
        }
        buffer.resize(m * k, 0.0);
        // Few columns at a time: their cache lines serve all rows.
        for from in (0..k).step_by(LINES) {
            let columns = from..k.min(from + LINES);
            let mut i = 0;
            while i < m {
                let height = height(m - i, false);
                let block = &mut buffer[i * k + from * height..i * k + columns.end * height];
                match height {
                    6 => self.interleave::<6>(i, from, block),
                    4 => self.interleave::<4>(i, from, block),
                    _ => self.interleave::<1>(i, from, block),
                }
                i += height;
            }
        }
        Lhs { data: buffer, stride: k, order: Order::Packed }
    }

    /// Rows `i..i + ROWS` of the columns from `from` on, one column after another.
    fn interleave<const ROWS: usize>(&self, i: usize, from: usize, block: &mut [f32]) {
        let columns = block.as_chunks_mut::<ROWS>().0;
        if self.order == Order::Columns {
            for (p, column) in columns.iter_mut().enumerate() {
                column.copy_from_slice(&self.data[(from + p) * self.stride + i..][..ROWS]);
            }
            return;
        }
        for r in 0..ROWS {
            let row = &self.data[(i + r) * self.stride + from..];
            columns.iter_mut().zip(row).for_each(|(column, &x)| column[r] = x);
        }
    }

    /// Elements of an `[m, k]` operand from its first to its last.
    fn extent(&self, m: usize, k: usize) -> usize {
        match self.order {
            Order::Rows => (m - 1) * self.stride + k,
            Order::Columns => (k - 1) * self.stride + m,
            Order::Packed => m * k,
        }
    }
}

/// The right operand: row `p` begins at `data[p * stride]`.
#[derive(Clone, Copy)]
pub(crate) struct Rhs<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    ahead: Option<&'a Ahead>,
}

impl<'a> Rhs<'a> {
    pub fn strided(data: &'a [f32], stride: usize) -> Self {
        Self { data, stride, ahead: None }
    }

    /// The same in a product that meanwhile asks for what is read soon.
    pub fn asking(self, ahead: &'a Ahead) -> Self {
        Self { ahead: Some(ahead), ..self }
    }
}

impl<'a> From<(&'a Tile, usize, usize)> for Rhs<'a> {
    /// The block of a tile that starts at `(row, col)`.
    fn from((tile, row, col): (&'a Tile, usize, usize)) -> Self {
        Self::strided(tile.data().get(row * tile.stride() + col..).unwrap_or_default(), tile.stride())
    }
}

/// The output: row `i` begins at `data[i * stride]`. What is not to be set but changed is initialised.
pub(crate) struct Out<'a> {
    pub data: &'a mut [MaybeUninit<f32>],
    pub stride: usize,
}

impl<'a> Out<'a> {
    pub fn initialised(data: &'a mut [f32], stride: usize) -> Self {
        // Safety: products write nothing that is not initialised.
        Self { data: unsafe { &mut *(std::ptr::from_mut(data) as *mut [MaybeUninit<f32>]) }, stride }
    }
}

impl<'a> From<(&'a mut Tile, usize, usize)> for Out<'a> {
    /// The block of a tile that starts at `(row, col)`.
    fn from((tile, row, col): (&'a mut Tile, usize, usize)) -> Self {
        let stride = tile.stride();
        Self::initialised(&mut tile.data_mut()[row * stride + col..], stride)
    }
}

/// `C[m, n] mode= A[m, k] B[k, n]`. Columns are computed in whole cache lines, so the padding of `C` is written too.
pub(crate) fn gemm<'b, 'c>(mode: Mode, [m, n, k]: [usize; 3], a: Lhs, b: impl Into<Rhs<'b>>, c: impl Into<Out<'c>>) {
    if m == 0 || n == 0 {
        return;
    }
    let (b, c) = (b.into(), c.into());
    let n = n.next_multiple_of(LINE);
    assert!(n <= c.stride && c.data.len() >= (m - 1) * c.stride + n);
    assert!(k == 0 || (n <= b.stride && b.data.len() >= (k - 1) * b.stride + n));
    assert!(k == 0 || a.data.len() >= a.extent(m, k));
    let ahead = b.ahead;
    let (b, ldb, c, ldc) = (b.data.as_ptr(), b.stride, c.data.as_mut_ptr().cast(), c.stride);
    arch().dispatch(Product { mode, m, n, k, a, b, ldb, c, ldc, ahead });
}

struct Product<'a> {
    mode: Mode,
    m: usize,
    n: usize,
    k: usize,
    a: Lhs<'a>,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    ldc: usize,
    ahead: Option<&'a Ahead>,
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // Safety: `gemm` has checked that every block lies inside its buffer.
        unsafe {
            let lanes = S::F32_LANES;
            let mut j = 0;
            while j + 2 * lanes <= self.n {
                self.column::<S, 2>(simd, j);
                j += 2 * lanes;
            }
            while j < self.n {
                self.column::<S, 1>(simd, j);
                j += lanes;
            }
        }
    }
}

impl Product<'_> {
    #[inline(always)]
    unsafe fn column<S: Simd, const NR: usize>(&self, simd: S, j: usize) {
        // Where registers hold few rows, so many steps that the columns of B stay in a first-level cache for all rows.
        let depth = if S::REGISTER_COUNT >= 32 { self.k } else { DEPTH };
        let mut from = 0;
        loop {
            let steps = from..self.k.min(from + depth);
            unsafe {
                match self.a.order {
                    Order::Rows => self.rows::<S, NR, ROWS>(simd, j, steps),
                    Order::Columns => self.rows::<S, NR, COLUMNS>(simd, j, steps),
                    Order::Packed => self.rows::<S, NR, PACKED>(simd, j, steps),
                }
            }
            from += depth;
            if from >= self.k {
                return;
            }
        }
    }

    #[inline(always)]
    unsafe fn rows<S: Simd, const NR: usize, const ORDER: u8>(&self, simd: S, j: usize, steps: Range<usize>) {
        let mut i = 0;
        while i < self.m {
            let height = height(self.m - i, S::REGISTER_COUNT >= 32);
            unsafe {
                match height {
                    8 => self.block::<S, 8, NR, ORDER>(simd, i, j, steps.clone()),
                    6 => self.block::<S, 6, NR, ORDER>(simd, i, j, steps.clone()),
                    4 => self.block::<S, 4, NR, ORDER>(simd, i, j, steps.clone()),
                    _ => self.block::<S, 1, NR, ORDER>(simd, i, j, steps.clone()),
                }
            }
            i += height;
        }
    }

    /// Steps of the inner size for the register block at `(i, j)`.
    #[inline(always)]
    unsafe fn block<S: Simd, const MR: usize, const NR: usize, const ORDER: u8>(
        &self,
        simd: S,
        i: usize,
        j: usize,
        steps: Range<usize>,
    ) {
        let mode = match self.mode {
            Mode::Set if steps.start > 0 => Mode::Add,
            mode => mode,
        };
        // Strides that are known to the compiler make addresses that cost nothing.
        let stride = self.a.stride;
        let (row, down, along) = match ORDER {
            ROWS => (stride, stride, 1),
            COLUMNS => (1, 1, stride),
            _ => (stride, 1, MR),
        };
        unsafe {
            let lanes = S::F32_LANES;
            let mut acc = [[simd.splat_f32s(0.0); NR]; MR];
            let mut a = self.a.data.as_ptr().add(i * row + steps.start * along);
            let mut b = self.b.add(steps.start * self.ldb + j);
            let mut next = self.ahead.map_or_else(Strip::default, Ahead::take);
            for _ in 0..steps.len() / UNROLL {
                next.ask();
                accumulate::<S, MR, NR, UNROLL>(simd, &mut acc, (a, down, along), (b, self.ldb));
                a = a.add(UNROLL * along);
                b = b.add(UNROLL * self.ldb);
            }
            for _ in 0..steps.len() % UNROLL {
                accumulate::<S, MR, NR, 1>(simd, &mut acc, (a, down, along), (b, self.ldb));
                a = a.add(along);
                b = b.add(self.ldb);
            }
            if let Some(ahead) = self.ahead {
                ahead.put_back(next);
            }
            for (r, row) in acc.iter().enumerate() {
                for (v, &sum) in row.iter().enumerate() {
                    let out = self.c.add((i + r) * self.ldc + j + v * lanes);
                    let value = match mode {
                        Mode::Set => sum,
                        Mode::Add => simd.add_f32s(load::<S>(out), sum),
                        Mode::Sub => simd.sub_f32s(load::<S>(out), sum),
                    };
                    (out as *mut S::f32s).write_unaligned(value);
                }
            }
        }
    }
}

/// `COUNT` inner steps of a register block: element `(r, u)` of A is `a[r * down + u * along]`.
#[inline(always)]
unsafe fn accumulate<S: Simd, const MR: usize, const NR: usize, const COUNT: usize>(
    simd: S,
    acc: &mut [[S::f32s; NR]; MR],
    (a, down, along): (*const f32, usize, usize),
    (b, ldb): (*const f32, usize),
) {
    unsafe {
        for u in 0..COUNT {
            let mut rhs = [simd.splat_f32s(0.0); NR];
            for (v, y) in rhs.iter_mut().enumerate() {
                *y = load::<S>(b.add(u * ldb + v * S::F32_LANES));
            }
            for (r, sums) in acc.iter_mut().enumerate() {
                let x = simd.splat_f32s(*a.add(r * down + u * along));
                for (v, sum) in sums.iter_mut().enumerate() {
                    *sum = simd.mul_add_e_f32s(x, rhs[v], *sum);
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd>(p: *const f32) -> S::f32s {
    unsafe { (p as *const S::f32s).read_unaligned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tile(rows: usize, cols: usize, seed: f32) -> Tile {
        let mut t = Tile::new(rows, cols);
        for i in 0..rows {
            for (j, x) in t.row_mut(i).iter_mut().enumerate() {
                *x = ((i * 31 + j * 17) as f32 * 0.37 + seed).sin();
            }
        }
        t
    }

    /// Every register-block remainder, both orientations of the left operand, all modes.
    #[test]
    fn equals_the_triple_loop() {
        for (m, n, k) in [(1, 1, 1), (8, 32, 16), (13, 20, 7), (64, 48, 33), (64, 48, 333), (3, 130, 0)] {
            let (a, b) = (tile(m, k, 0.1), tile(k, n, 0.7));
            let mut at = Tile::new(k.max(1), m);
            at.transpose_from(&a, m);
            for mode in [Mode::Set, Mode::Add, Mode::Sub] {
                let mut buffer = Vec::new();
                let packed = Lhs::transposed(&at, 0, 0).packed(m, k, &mut buffer);
                let mut buffer = Vec::new();
                let packed_rows = Lhs::of(&a, 0, 0).packed(m, k, &mut buffer);
                for lhs in [Lhs::of(&a, 0, 0), Lhs::transposed(&at, 0, 0), packed, packed_rows] {
                    let mut c = tile(m, n, 0.3);
                    let before = c.clone();
                    gemm(mode, [m, n, k], lhs, (&b, 0, 0), (&mut c, 0, 0));
                    for i in 0..m {
                        for j in 0..n {
                            let dot: f64 = (0..k).map(|p| a.row(i)[p] as f64 * b.row(p)[j] as f64).sum();
                            let old = before.row(i)[j] as f64;
                            let want = match mode {
                                Mode::Set => dot,
                                Mode::Add => old + dot,
                                Mode::Sub => old - dot,
                            };
                            assert!((c.row(i)[j] as f64 - want).abs() < 1e-4, "{m}x{n}x{k} {mode:?} at {i},{j}");
                        }
                    }
                }
            }
        }
    }
}
