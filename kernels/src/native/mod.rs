//! The kernels on the CPU.
pub(crate) mod gemm;
pub(crate) mod matrix;
pub(crate) mod simd;
pub(crate) mod tile;
