//! The kernels on the CPU.
mod ahead;
pub(crate) mod attention;
pub(crate) mod complex_scan;
pub(crate) mod elementwise_scan;
pub(crate) mod few_rows;
pub(crate) mod gemm;
pub(crate) mod matrix;
pub(crate) mod plan;
pub(crate) mod product;
pub(crate) mod rg_lru;
pub(crate) mod rows;
pub(crate) mod short_conv;
pub(crate) mod simd;
pub(crate) mod tile;
