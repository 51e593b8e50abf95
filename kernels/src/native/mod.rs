//! The kernels on the CPU.
pub(crate) mod gemm;
pub(crate) mod simd;
pub(crate) mod tile;
