//! Linear-recurrence kernels on plain slices: no framework, no Burn.

mod element;
mod error;
pub mod matrix;
mod native;
mod sequences;

pub use element::Element;
pub use error::Error;
pub use sequences::Sequences;
