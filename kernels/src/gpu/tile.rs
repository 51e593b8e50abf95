//! Tiles in shared memory, and their products.
//!
//! A tile is a small matrix in shared memory. All units of a cube call these functions together; between writing a tile
//! and reading it stands a `sync_cube()`, which is the caller's, so that one barrier serves several tiles.

use cubecl::cmma::{self, MatrixIdent, MatrixLayout};
use cubecl::prelude::*;

/// Side of the blocks that matrix units compute, and tokens of the sub-blocks that key-wise gates are cut into. The
/// sizes of all tiles are multiples of it.
pub(crate) const BLOCK: usize = 16;

/// How products are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Engine {
    /// Each unit computes `side x side` blocks of the result in registers, in f32. Runs everywhere.
    Registers {
        /// 4 on a GPU.
        side: usize,
    },
    /// Each plane computes 16 x 16 blocks on matrix units (tensor cores): operands of 16 bits or tf32, sums in f32.
    Matrix {
        /// Units of a plane.
        plane: usize,
        /// Operands are f32, of which the matrix unit reads the leading 19 bits.
        tf32: bool,
    },
}

impl Engine {
    pub(crate) fn on_matrix_units(self) -> bool {
        matches!(self, Engine::Matrix { .. })
    }

    /// Whether the device is a CPU behind a driver for GPUs.
    pub(crate) fn in_software(self) -> bool {
        self == Engine::Registers { side: 1 }
    }

    /// Elements between the end of a row and the next: without them a column would fall into few memory banks. Matrix
    /// units want rows at multiples of 16 bytes.
    pub(crate) fn padding(self, element_size: usize) -> usize {
        match self {
            Engine::Registers { .. } => 1,
            Engine::Matrix { .. } => 16 / element_size,
        }
    }
}

/// A `[rows, cols]` matrix in shared memory.
#[derive(CubeType)]
pub(crate) struct Tile<E: Float> {
    pub data: Shared<[E]>,
    #[cube(comptime)]
    pub rows: usize,
    #[cube(comptime)]
    pub cols: usize,
    #[cube(comptime)]
    pub stride: usize,
}

#[cube]
impl<E: Float> Tile<E> {
    /// `padding` as [`Engine::padding`] says.
    pub fn new(#[comptime] rows: usize, #[comptime] cols: usize, #[comptime] padding: usize) -> Self {
        let stride = comptime!(cols + padding);
        Tile::<E> { data: Shared::new_aligned_slice(comptime!(rows * stride), 32usize), rows, cols, stride }
    }

    /// The same memory again.
    pub fn alias(&self) -> Tile<E> {
        Tile::<E> { data: self.data.clone(), rows: self.rows, cols: self.cols, stride: self.stride }
    }

    pub fn at(&self, row: usize, col: usize) -> usize {
        row * comptime!(self.stride) + col
    }

    pub fn get(&self, row: usize, col: usize) -> f32 {
        f32::cast_from(self.data[self.at(row, col)])
    }

    pub fn set(&mut self, row: usize, col: usize, value: f32) {
        let at = self.at(row, col);
        self.data[at] = E::cast_from(value);
    }

    /// `N` elements of a row.
    pub fn get_many<N: Size>(&self, row: usize, col: usize) -> Vector<f32, N> {
        let mut values = Vector::<f32, N>::new(f32::new(0.0));
        #[unroll]
        for j in 0..N::value().comptime() {
            values.insert(j, self.get(row, col + j));
        }
        values
    }

    /// Sets `N` elements of a row.
    pub fn set_many<A: Float, N: Size>(&mut self, row: usize, col: usize, values: Vector<A, N>) {
        let at = self.at(row, col);
        let values = Vector::<E, N>::cast_from(values);
        #[unroll]
        for j in 0..N::value().comptime() {
            self.data[at + j] = values.extract(j);
        }
    }
}

/// The index of this unit in its cube, [`fresh`].
#[cube]
pub(crate) fn unit() -> usize {
    fresh(UNIT_POS) as usize
}

/// The same number, which the compiler on CUDA takes for a new one at every call: what loops make of it would else be
/// computed once, before the walk over chunks and blocks, and kept until registers run out.
#[cube]
pub(crate) fn fresh(x: u32) -> u32 {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) {
        let y: u32;
        gpu_asm!("mov.u32 {}, {};", out(_) y, in(_) x, options(nomem));
        y
    } else {
        x
    }
}

fn takes_ptx(device: &DeviceProperties) -> bool {
    cfg!(feature = "inline-ptx") && device.identity.fingerprint.starts_with("ptx")
}

/// The units of a cube.
#[cube]
pub(crate) fn units() -> usize {
    CUBE_DIM as usize
}

/// Sets all of a tile.
#[cube]
pub(crate) fn fill<E: Float>(tile: &mut Tile<E>, value: f32) {
    let (rows, cols) = comptime!((tile.rows, tile.cols));
    for i in range_stepped(unit(), rows * cols, units()) {
        tile.set(i / cols, i % cols, value);
    }
}

/// `to = from`, in the element type of `to`, from row `row` of `from` on.
#[cube]
pub(crate) fn copy<A: Float, B: Float>(from: &Tile<A>, row: usize, to: &mut Tile<B>) {
    let (rows, cols) = comptime!((to.rows, to.cols));
    for i in range_stepped(unit(), rows * cols, units()) {
        to.set(i / cols, i % cols, from.get(row + i / cols, i % cols));
    }
}

/// What a product does with its result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Mode {
    Set,
    Add,
    /// `out = -(a b)`; registers only.
    SetNegative,
}

/// Sizes and form of a product: `[m, depth] x [depth, n]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Form {
    pub m: usize,
    pub n: usize,
    pub depth: usize,
    /// `a` is stored as `[depth, m]`.
    pub a_transposed: bool,
    /// `b` is stored as `[n, depth]`.
    pub b_transposed: bool,
    pub mode: Mode,
}

impl Form {
    /// `a b`
    pub const fn ab(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { m, n, depth, a_transposed: false, b_transposed: false, mode }
    }

    /// `a b^T`
    pub const fn abt(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { b_transposed: true, ..Self::ab(m, n, depth, mode) }
    }

    /// `a^T b`
    pub const fn atb(m: usize, n: usize, depth: usize, mode: Mode) -> Self {
        Self { a_transposed: true, ..Self::ab(m, n, depth, mode) }
    }
}

/// Where in the stored tiles a product begins.
#[derive(CubeType, Clone, Copy)]
pub(crate) struct Corner {
    pub a_row: usize,
    pub a_col: usize,
    pub b_row: usize,
    pub out_row: usize,
}

/// `out (+)= a b` of whole tiles.
#[cube]
pub(crate) fn product<E: Float>(
    a: &Tile<E>,
    b: &Tile<E>,
    out: &mut Tile<f32>,
    #[comptime] form: Form,
    #[comptime] engine: Engine,
) {
    let corner = Corner { a_row: 0usize, a_col: 0usize, b_row: 0usize, out_row: 0usize };
    product_at::<E, E>(a, b, out, &corner, form, engine);
}

/// `out (+)= a b` of parts of tiles; of one element type on matrix units.
#[cube]
pub(crate) fn product_at<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] engine: Engine,
) {
    match comptime!(engine) {
        Engine::Registers { side } => in_registers::<A, B>(a, b, out, corner, form, side),
        Engine::Matrix { plane, tf32 } => {
            on_matrix_units::<A, B>(a, b, out, corner, form, plane, comptime!(depth(tf32)));
        }
    }
}

#[cube]
fn in_registers<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] side: usize,
) {
    // The rows of a block lie `rows` apart, its columns `cols`: neighbouring units read neighbouring columns.
    let (rows, cols) = comptime!((form.m / side, form.n / side));
    for block in range_stepped(unit(), rows * cols, units()) {
        let (row, col) = (block / cols, block % cols);
        let mut sum = Array::<f32>::new(comptime!(side * side));
        #[unroll]
        for i in 0..comptime!(side * side) {
            sum[i] = f32::new(0.0);
        }
        for k in 0..form.depth {
            let mut x = Array::<f32>::new(side);
            let mut y = Array::<f32>::new(side);
            #[unroll]
            for i in 0..side {
                let (r, c) = (row + i * rows, col + i * cols);
                if comptime!(form.a_transposed) {
                    x[i] = a.get(corner.a_row + k, corner.a_col + r);
                } else {
                    x[i] = a.get(corner.a_row + r, corner.a_col + k);
                }
                if comptime!(form.b_transposed) {
                    y[i] = b.get(corner.b_row + c, k);
                } else {
                    y[i] = b.get(corner.b_row + k, c);
                }
            }
            #[unroll]
            for i in 0..side {
                #[unroll]
                for j in 0..side {
                    sum[i * side + j] += x[i] * y[j];
                }
            }
        }
        #[unroll]
        for i in 0..side {
            #[unroll]
            for j in 0..side {
                let at = out.at(corner.out_row + row + i * rows, col + j * cols);
                match comptime!(form.mode) {
                    Mode::Set => out.data[at] = sum[i * side + j],
                    Mode::Add => out.data[at] += sum[i * side + j],
                    Mode::SetNegative => out.data[at] = -sum[i * side + j],
                }
            }
        }
    }
}

#[cube]
fn on_matrix_units<A: Float, B: Float>(
    a: &Tile<A>,
    b: &Tile<B>,
    out: &mut Tile<f32>,
    corner: &Corner,
    #[comptime] form: Form,
    #[comptime] plane: usize,
    #[comptime] depth: usize,
) {
    comptime!(assert!(form.mode != Mode::SetNegative, "matrix units only add"));
    let (rows, cols) = comptime!((form.m / BLOCK, form.n / BLOCK));
    let (a_layout, b_layout) = comptime!((layout(form.a_transposed), layout(form.b_transposed)));
    let (a_stride, b_stride, out_stride) = comptime!((a.stride as u32, b.stride as u32, out.stride as u32));
    for block in range_stepped(unit() / plane, rows * cols, units() / plane) {
        let (row, col) = ((block / cols) * BLOCK, (block % cols) * BLOCK);
        let at = out.at(corner.out_row + row, col);
        let mut sum = cmma::Matrix::<f32>::from_value(
            MatrixIdent::Accumulator,
            BLOCK,
            BLOCK,
            depth,
            MatrixLayout::Undefined,
            f32::new(0.0),
        );
        if comptime!(form.mode == Mode::Add) {
            cmma::load_with_layout(&mut sum, &out.data[at..out.data.len()], out_stride, MatrixLayout::RowMajor);
        }
        for k in range_stepped(0usize, form.depth, depth) {
            let x_at = if comptime!(form.a_transposed) {
                a.at(corner.a_row + k, corner.a_col + row)
            } else {
                a.at(corner.a_row + row, corner.a_col + k)
            };
            let y_at =
                if comptime!(form.b_transposed) { b.at(corner.b_row + col, k) } else { b.at(corner.b_row + k, col) };
            let x = cmma::Matrix::<A>::from_slice(
                MatrixIdent::A,
                BLOCK,
                BLOCK,
                depth,
                a_layout,
                &a.data[x_at..a.data.len()],
                a_stride,
            );
            let y = cmma::Matrix::<B>::from_slice(
                MatrixIdent::B,
                BLOCK,
                BLOCK,
                depth,
                b_layout,
                &b.data[y_at..b.data.len()],
                b_stride,
            );
            cmma::execute(&x, &y, &sum, &sum);
        }
        let end = out.data.len();
        cmma::store(&mut out.data[at..end], &sum, out_stride, MatrixLayout::RowMajor);
    }
}

/// Products of an element of a block that one instruction of a matrix unit sums.
pub(crate) const fn depth(tf32: bool) -> usize {
    if tf32 { BLOCK / 2 } else { BLOCK }
}

fn layout(transposed: bool) -> MatrixLayout {
    if transposed { MatrixLayout::ColMajor } else { MatrixLayout::RowMajor }
}
