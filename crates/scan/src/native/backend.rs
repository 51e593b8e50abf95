//! The extension trait that Burn's dispatch routes to a backend, and the trait that a backend with
//! kernels implements.

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, ExtensionType, TensorMetadata, backend_extension};
use burn::tensor::FloatDType;
use thalweg_kernels::Error;

use super::operation::{Operation, SLOTS};

/// An operand that may be absent.
#[derive(ExtensionType)]
pub(crate) enum Slot<B: Backend> {
    Absent,
    Present(FloatTensor<B>),
}

/// The operands of an operation.
#[derive(ExtensionType)]
pub(crate) struct Slots<B: Backend> {
    pub x0: FloatTensor<B>,
    #[extension_type]
    pub x1: Slot<B>,
    #[extension_type]
    pub x2: Slot<B>,
    #[extension_type]
    pub x3: Slot<B>,
    #[extension_type]
    pub x4: Slot<B>,
    #[extension_type]
    pub x5: Slot<B>,
    #[extension_type]
    pub x6: Slot<B>,
}

impl<B: Backend> Slots<B> {
    pub(crate) fn into_array(self) -> [Option<FloatTensor<B>>; SLOTS] {
        let tensor = |slot| match slot {
            Slot::Absent => None,
            Slot::Present(tensor) => Some(tensor),
        };
        let Self { x0, x1, x2, x3, x4, x5, x6 } = self;
        [Some(x0), tensor(x1), tensor(x2), tensor(x3), tensor(x4), tensor(x5), tensor(x6)]
    }
}

/// What an operation returns through the dispatch. If the status is an error, the tensors are any.
#[derive(ExtensionType)]
pub(crate) struct Results<B: Backend> {
    pub o: FloatTensor<B>,
    pub final_state: FloatTensor<B>,
    pub status: Result<(), Error>,
}

impl<B: Backend> Results<B> {
    pub(crate) fn failed(device: &B::Device, error: Error) -> Self {
        let any = || B::float_zeros([1].into(), device, FloatDType::F32);
        Self { o: any(), final_state: any(), status: Err(error) }
    }
}

/// The one custom operation: every recurrence, by its [`Operation`].
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub(crate) trait Recurrence: Backend {
    fn recurrence(operation: Operation, #[extension_type] slots: Slots<Self>) -> Results<Self>;
}

/// What a forward pass returns.
pub(crate) struct Forward<B: Backend> {
    pub o: FloatTensor<B>,
    pub final_state: FloatTensor<B>,
    /// What the backward pass wants besides the operands, if it was asked for.
    pub saved: Vec<FloatTensor<B>>,
}

/// A backend that has kernels.
pub(crate) trait Kernels: Backend {
    /// Runs an operation; `keep` asks for what the backward pass wants.
    fn forward(
        operation: &Operation,
        operands: [Option<FloatTensor<Self>>; SLOTS],
        keep: bool,
    ) -> Result<Forward<Self>, Error>;

    /// Gradients of the operands. `d_o` is absent if only the final state is used.
    fn backward(
        operation: &Operation,
        operands: [Option<FloatTensor<Self>>; SLOTS],
        saved: Vec<FloatTensor<Self>>,
        d_o: Option<FloatTensor<Self>>,
        d_final_state: FloatTensor<Self>,
    ) -> Result<[Option<FloatTensor<Self>>; SLOTS], Error>;
}

/// The custom operation of a backend that has kernels, without gradients.
pub(crate) fn plain<B: Kernels>(operation: Operation, slots: Slots<B>) -> Results<B> {
    let device = slots.x0.device();
    match B::forward(&operation, slots.into_array(), false) {
        Ok(Forward { o, final_state, .. }) => Results { o, final_state, status: Ok(()) },
        Err(error) => Results::failed(&device, error),
    }
}
