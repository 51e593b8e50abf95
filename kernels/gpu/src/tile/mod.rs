//! Tiles in shared memory, and their products.
//!
//! A tile is a small matrix in shared memory. All units of a cube call these functions together; between writing a tile
//! and reading it stands a `sync_cube()`, which is the caller's, so that one barrier serves several tiles.

mod form;
mod mma;
mod opaque;
mod panel;
mod registers;
mod sums;

use cubecl::prelude::*;

pub(crate) use form::{Corner, Form, Mode, product_at};
pub(crate) use opaque::depth;
pub(crate) use panel::{Left, Panel};
pub(crate) use sums::{Spread, Sums};

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
    /// Each plane computes 16 x 16 blocks on matrix units (tensor cores), and which unit holds what of a block is the
    /// driver's secret: operands of 16 bits or tf32, sums in f32.
    Matrix {
        /// Units of a plane.
        plane: usize,
        /// Operands are f32, of which the matrix unit reads the leading 19 bits.
        tf32: bool,
    },
    /// The same where the layout of blocks is known, CUDA's `mma`: operands of 16 bits.
    Mma,
}

/// Units of a plane with [`Engine::Mma`].
pub(crate) const WARP: usize = 32;

impl Engine {
    pub(crate) fn on_matrix_units(self) -> bool {
        matches!(self, Engine::Matrix { .. } | Engine::Mma)
    }

    /// What makes of a logarithm one for [`exponential`]: binary ones where `2^x` is an instruction, and operands have 16 bits
    /// anyway.
    pub(crate) fn log_scale(self) -> f32 {
        if self == Engine::Mma { std::f32::consts::LOG2_E } else { 1.0 }
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
            // Eight rows of 16 bytes of operands, or of two sums for each of four units, in different banks.
            Engine::Mma => 8,
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

    /// The elements from one on.
    pub fn from(&self, at: usize) -> &[E] {
        let at = self.bounded(at);
        &self.data[at..self.data.len()]
    }

    /// The same index, of which the compiler on CUDA then knows that it is in the tile: to one that might wrap nothing can
    /// be added by the instruction that loads, so that each load of many would have an addition of its own.
    pub fn bounded(&self, at: usize) -> usize {
        at % comptime!((self.rows * self.stride).next_power_of_two())
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
        Vector::cast_from(self.as_they_are::<N>(row, col))
    }

    /// The same in the tile's type. Loads that follow each other become one; with a conversion between they do not.
    pub fn as_they_are<N: Size>(&self, row: usize, col: usize) -> Vector<E, N> {
        let at = self.at(row, col);
        let mut values = Vector::<E, N>::new(E::new(0.0));
        #[unroll]
        for j in 0..N::value().comptime() {
            values.insert(j, self.data[at + j]);
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

/// The number of this cube, as fresh as [`unit`]: what follows from it, asked for after a loop, takes none of its registers.
#[cube]
pub(crate) fn this_cube() -> usize {
    fresh(CUBE_POS as u32) as usize
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

/// `2^x`. On CUDA one instruction, right to 22 bits; what has fewer digits because it is so small is 0. `x` is the
/// result of an operation: of a variable that changes, CubeCL hands out the address.
#[cube]
pub(crate) fn exp2(x: f32) -> f32 {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) {
        let y: f32;
        gpu_asm!("ex2.approx.ftz.f32 {}, {};", out(_) y, in(_) x, options(nomem));
        y
    } else {
        (x * std::f32::consts::LN_2).exp()
    }
}

/// The exponential of a logarithm times [`Engine::log_scale`].
#[cube]
pub(crate) fn exponential(x: f32, #[comptime] engine: Engine) -> f32 {
    if comptime!(engine == Engine::Mma) { exp2(x) } else { x.exp() }
}

/// `1 / x`, as [`exp2`] is.
#[cube]
pub(crate) fn reciprocal<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let device = comptime::device_properties().comptime();
    let mut y = Vector::<f32, N>::new(f32::new(1.0));
    if comptime!(takes_ptx(&device)) {
        #[unroll]
        for j in 0..N::value().comptime() {
            y.insert(j, fast_reciprocal(x.extract(j)));
        }
    } else {
        y /= x;
    }
    y
}

#[cube]
fn fast_reciprocal(x: f32) -> f32 {
    let y: f32;
    gpu_asm!("rcp.approx.ftz.f32 {}, {};", out(_) y, in(_) x, options(nomem));
    y
}

/// Whether kernels may have instructions in PTX.
pub(crate) fn takes_ptx(device: &DeviceProperties) -> bool {
    cfg!(feature = "inline-ptx") && device.identity.fingerprint.starts_with("ptx")
}

/// The units of a cube.
#[cube]
pub(crate) fn units() -> usize {
    CUBE_DIM as usize
}

/// Elements of a row that [`zero`] sets at a time.
const ZEROS: usize = 4;

/// Sets all of a tile to zero.
#[cube]
pub(crate) fn zero(tile: &mut Tile<f32>, #[comptime] units: usize) {
    let (rows, cols) = comptime!((tile.rows, tile.cols / ZEROS));
    #[unroll]
    for j in 0..comptime!((rows * cols).div_ceil(units)) {
        let i = unit() + j * units;
        if i < rows * cols {
            tile.set_many::<f32, Const<ZEROS>>(i / cols, i % cols * ZEROS, Vector::new(f32::new(0.0)));
        }
    }
}
