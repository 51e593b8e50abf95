//! What can be wrong with an operation's arguments.

use burn::tensor::DType;

/// An argument that an operation cannot work with. Shapes and sequence bounds are checked before
/// anything runs; the values of gates are checked by the native kernels only, because reading them
/// back from an accelerator would stall it.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor's shape does not fit those of the other arguments.
    #[error("`{argument}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that the other arguments imply, with the names of its axes.
        expected: String,
    },
    /// A tensor's element type does not fit.
    #[error("`{argument}` has element type {found:?}, expected {expected}")]
    Type {
        /// Name of the argument.
        argument: &'static str,
        /// Its element type.
        found: DType,
        /// What is allowed.
        expected: String,
    },
    /// An option is outside of its range.
    #[error("`{argument}` is {found}, expected {expected}")]
    Value {
        /// Name of the argument.
        argument: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// The sequence bounds are no partition of time, or a native kernel refused an argument: a positive
    /// or NaN gate.
    #[error(transparent)]
    Kernel(#[from] thalweg_kernels::Error),
}
