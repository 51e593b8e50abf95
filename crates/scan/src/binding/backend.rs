//! The extension trait that Burn's dispatch routes to a backend, and the trait of backends that have kernels.

use std::fmt::Debug;
use std::sync::Arc;

use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, ExtensionType,
    backend_extension,
};
use burn_flex::FlexTensor;
use thalweg_kernels::Error;

#[cfg(feature = "cube")]
use super::gpu::CubeTensor;
use super::operation::{Forward, Operation, OutputSpec};
use super::structure::Structure;

/// Any number of tensors on their way through the dispatch.
pub(crate) struct Tensors<B: Backend>(pub Vec<FloatTensor<B>>);

impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        let wrap = |x| DispatchTensor { kind: map_kind(BackendTensor::Float(x)), autodiff };
        Tensors(self.0.into_iter().map(wrap).collect())
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        Self(target.0.into_iter().map(|x| unwrap_kind(x).float()).collect())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        target.0.iter().fold(DispatchAutodiffContext::Disabled, |context, x| context.merge(x.autodiff))
    }
}

/// What an operation returns through the dispatch; no outputs if the status is an error.
#[derive(ExtensionType)]
pub(crate) struct Results<B: Backend> {
    #[extension_type]
    pub outputs: Tensors<B>,
    pub status: Result<(), Error>,
}

impl<B: Backend> From<Result<Vec<FloatTensor<B>>, Error>> for Results<B> {
    fn from(results: Result<Vec<FloatTensor<B>>, Error>) -> Self {
        match results {
            Ok(outputs) => Self { outputs: Tensors(outputs), status: Ok(()) },
            Err(error) => Self { outputs: Tensors(Vec::new()), status: Err(error) },
        }
    }
}

/// The one custom operation of Burn's graph: any [`Operation`].
#[backend_extension(Flex, Cube: cfg(feature = "cube"), Autodiff)]
pub(crate) trait Execute: Backend {
    fn execute(operation: AnyOperation, #[extension_type] operands: Tensors<Self>) -> Results<Self>;
}

/// A backend with kernels.
pub(crate) trait Kernels: Backend {
    /// Runs an operation; `keep` asks for what the backward pass wants.
    fn forward(
        operation: &AnyOperation,
        operands: Vec<FloatTensor<Self>>,
        keep: bool,
    ) -> Result<Forward<FloatTensor<Self>>, Error>;

    /// Gradients of the operands, of the outputs that the operation saves, what the forward pass kept, and the outputs'
    /// cotangents; zeros where there is none.
    fn backward(
        operation: &AnyOperation,
        operands: Vec<FloatTensor<Self>>,
        saved: Vec<FloatTensor<Self>>,
        cotangents: Vec<Option<FloatTensor<Self>>>,
    ) -> Result<Vec<Option<FloatTensor<Self>>>, Error>;
}

/// [`Execute`] for a backend with kernels, without gradients.
pub(crate) fn plain<B: Kernels>(operation: AnyOperation, operands: Tensors<B>) -> Results<B> {
    B::forward(&operation, operands.0, false).map(|forward| forward.outputs).into()
}

/// Any operation together with the structure of its operands.
pub(crate) type AnyOperation = Arc<dyn Erased>;

/// An [`Operation`] behind a pointer, on lists of tensors.
pub(crate) trait Erased: Debug + Send + Sync {
    /// Shapes and element types of the outputs.
    fn outputs(&self) -> Vec<OutputSpec>;

    /// Index of the operand whose element type the operation has.
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    fn typed(&self) -> usize;

    /// Outputs that the backward pass wants to see again.
    fn saved(&self) -> &'static [usize];

    /// Which operands have a gradient.
    fn differentiable(&self) -> Vec<bool>;

    /// Index of the operand that may be overwritten.
    #[cfg_attr(not(feature = "cube"), allow(dead_code))]
    fn in_place(&self) -> Option<usize>;

    fn cpu_forward(&self, operands: Vec<FlexTensor>, keep: bool) -> Result<Forward<FlexTensor>, Error>;

    fn cpu_backward(
        &self,
        operands: Vec<FlexTensor>,
        saved: Vec<FlexTensor>,
        cotangents: Vec<FlexTensor>,
    ) -> Result<Vec<Option<FlexTensor>>, Error>;

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, operands: Vec<CubeTensor>) -> Result<Vec<CubeTensor>, Error>;

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        operands: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        cotangents: Vec<CubeTensor>,
    ) -> Result<Vec<Option<CubeTensor>>, Error>;
}

/// An operation bound to the structure of its operands.
#[derive(Debug)]
pub(crate) struct Bound<O: Operation> {
    pub operation: O,
    pub structure: O::Operands,
}

impl<O: Operation> Bound<O> {
    fn position(&self, name: &str) -> Option<usize> {
        self.structure.names().iter().position(|&x| x == name)
    }
}

impl<O: Operation> Erased for Bound<O> {
    fn outputs(&self) -> Vec<OutputSpec> {
        self.operation.outputs()
    }

    fn typed(&self) -> usize {
        *O::typed(&self.structure.join(0..))
    }

    fn saved(&self) -> &'static [usize] {
        O::SAVED
    }

    fn differentiable(&self) -> Vec<bool> {
        self.structure.names().iter().map(|name| !O::CONSTANTS.contains(name)).collect()
    }

    fn in_place(&self) -> Option<usize> {
        O::IN_PLACE.and_then(|name| self.position(name))
    }

    fn cpu_forward(&self, operands: Vec<FlexTensor>, keep: bool) -> Result<Forward<FlexTensor>, Error> {
        super::cpu::forward(self, operands, keep)
    }

    fn cpu_backward(
        &self,
        operands: Vec<FlexTensor>,
        saved: Vec<FlexTensor>,
        cotangents: Vec<FlexTensor>,
    ) -> Result<Vec<Option<FlexTensor>>, Error> {
        super::cpu::backward(self, operands, saved, cotangents)
    }

    #[cfg(feature = "cube")]
    fn gpu_forward(&self, operands: Vec<CubeTensor>) -> Result<Vec<CubeTensor>, Error> {
        super::gpu::forward(self, operands)
    }

    #[cfg(feature = "cube")]
    fn gpu_backward(
        &self,
        operands: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        cotangents: Vec<CubeTensor>,
    ) -> Result<Vec<Option<CubeTensor>>, Error> {
        super::gpu::backward(self, operands, saved, cotangents)
    }
}
