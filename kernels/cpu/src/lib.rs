//! Linear-recurrence kernels on plain slices: no framework, no Burn.

pub mod adamw;
pub mod attention;
pub mod ceiling;
mod channels;
pub mod complex_scan;
pub mod cost;
mod element;
pub mod elementwise_scan;
mod error;
pub mod glu;
pub mod linear;
pub mod matrix;
mod native;
pub mod norm;
pub mod rg_lru;
mod sequences;
pub mod short_conv;
#[cfg(test)]
mod testing;

pub use channels::ScanProblem;
pub use element::{Element, ElementKind};
pub use error::Error;
pub use native::simd::vector_unit;
pub use sequences::Sequences;
