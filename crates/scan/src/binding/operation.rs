//! What an operation is to the binding: operands by name, shapes of outputs, kernels.

use std::borrow::Cow;
use std::fmt::Debug;

use burn::tensor::{DType, Shape};
use burn_flex::FlexTensor;
#[cfg(feature = "cube")]
use thalweg_gpu::{Buffer, Client, Storage};
use thalweg_kernels::Error;

use super::cpu::Number;
use super::structure::Structure;

/// What kernels return.
pub(crate) type KernelResult<T> = Result<T, Error>;

/// The operands of an operation, each a `T`.
pub(crate) type Of<O, T> = <<O as Operation>::Operands as Structure>::Of<T>;

/// One operation with kernels. What is known on the host is in the type that implements it, tensors are operands.
///
/// Every output is differentiable, and every operand that [`CONSTANTS`](Self::CONSTANTS) does not name. Kernels return
/// flat tensors; they get their shapes from [`outputs`](Self::outputs), gradients those of their operands.
pub(crate) trait Operation: Debug + Clone + Send + Sync + 'static {
    /// Names of the operands; see [`operands!`](super::operands).
    type Operands: Structure;

    /// Outputs that the backward pass wants to see again.
    const SAVED: &'static [usize] = &[];

    /// Operands without a gradient.
    const CONSTANTS: &'static [&'static str] = &[];

    /// A state that the operation may overwrite and return, if nobody else holds it.
    const IN_PLACE: Option<&'static str> = None;

    /// The operand whose element type the operation has.
    fn typed<T>(x: &Of<Self, T>) -> &T;

    /// Shapes and element types of the outputs.
    fn outputs(&self) -> Vec<OutputSpec>;

    /// The operation on operands as they lie in memory, where the CPU kernel takes more than one order; `keep` as in
    /// [`cpu_forward`](Self::cpu_forward). Operands that are no plain run of memory after it are copied.
    fn cpu_layout(&self, _x: &mut Of<Self, FlexTensor>, _keep: bool) -> Cow<'_, Self> {
        Cow::Borrowed(self)
    }

    /// The CPU kernel. `keep` asks for what the backward pass wants.
    fn cpu_forward<E: Number>(&self, x: Of<Self, FlexTensor>, keep: bool) -> KernelResult<Forward<FlexTensor>>;

    /// The CPU kernel of the gradients. `saved` are the outputs that [`SAVED`](Self::SAVED) names, then what the forward
    /// pass kept besides; `d` are the cotangents of all outputs.
    fn cpu_backward<E: Number>(
        &self,
        x: Of<Self, FlexTensor>,
        saved: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Of<Self, Option<FlexTensor>>>;

    /// Whether there is a GPU kernel for this problem on this device.
    #[cfg(feature = "cube")]
    fn on_gpu(&self, _client: &Client, _storage: Storage) -> bool {
        false
    }

    /// The GPU kernel.
    #[cfg(feature = "cube")]
    fn gpu_forward(&self, _client: &Client, _x: &Of<Self, Buffer>) -> KernelResult<Vec<Buffer>> {
        Err(no_gpu_kernel(self))
    }

    /// The GPU kernel of the gradients; arguments as in [`cpu_backward`](Self::cpu_backward).
    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        _client: &Client,
        _x: &Of<Self, Buffer>,
        _saved: &[Buffer],
        _d: &[Buffer],
    ) -> KernelResult<Of<Self, Option<Buffer>>> {
        Err(no_gpu_kernel(self))
    }
}

#[cfg(feature = "cube")]
fn no_gpu_kernel(operation: &impl Debug) -> Error {
    Error::Device { reason: format!("there is no GPU kernel for {operation:?}") }
}

/// Shape and element type of an output.
#[derive(Debug, Clone)]
pub(crate) struct OutputSpec {
    pub shape: Shape,
    /// Has the element type of the operation; f32 otherwise.
    pub typed: bool,
}

impl OutputSpec {
    /// An output of the operation's element type.
    pub(crate) fn typed(shape: impl Into<Shape>) -> Self {
        Self { shape: shape.into(), typed: true }
    }

    /// An output in f32: a state, a statistic.
    pub(crate) fn f32(shape: impl Into<Shape>) -> Self {
        Self { shape: shape.into(), typed: false }
    }

    /// The element type for an operation of type `dtype`.
    pub(crate) fn dtype(&self, dtype: DType) -> DType {
        if self.typed { dtype } else { DType::F32 }
    }
}

/// What a forward pass returns.
#[derive(Debug)]
pub(crate) struct Forward<T> {
    /// The outputs, in the order of [`Operation::outputs`].
    pub outputs: Vec<T>,
    /// What the backward pass wants besides operands and outputs.
    pub kept: Vec<T>,
}

impl<T> Forward<T> {
    /// Outputs alone.
    pub(crate) fn of(outputs: impl Into<Vec<T>>) -> Self {
        Self { outputs: outputs.into(), kept: Vec::new() }
    }
}
