//! The binding of the kernels to Burn's backends; it knows no operation by name.
//!
//! An operation is a file of [`crate::op`] that implements [`Operation`]: its operands by name, the shapes of its outputs, its
//! kernels on a CPU and a GPU. [`run`] takes it through Burn's dispatch as one custom operation: `backend` is the
//! extension trait, `cpu` runs Flex tensors, `gpu` CubeCL tensors, `fusion` queues for either, and `autodiff` is the only
//! place with a backward pass. A further backend is one more implementation of [`backend::Kernels`].

mod autodiff;
mod backend;
pub(crate) mod cpu;
#[cfg(feature = "cube")]
mod fusion;
#[cfg(feature = "cube")]
mod gpu;
mod operation;
mod structure;

use std::sync::Arc;

use burn::Tensor;
#[cfg(feature = "cube")]
use burn::backend::TensorMetadata as _;
use burn::backend::{Dispatch, DispatchTensor, DispatchTensorKind};
use burn::tensor::DType;

pub(crate) use operation::{Forward, KernelResult, Of, Operation, OutputSpec};
pub(crate) use structure::{Structure, operands};

use crate::{Error, Path};
use backend::{Bound, Execute, Tensors};

/// Whether a kernel runs an operation on this tensor: the path allows it, and the backend and the element type have one.
#[cfg_attr(not(feature = "cube"), allow(unused_variables))]
pub(crate) fn available<const D: usize>(operation: &impl Operation, path: Path, tensor: &Tensor<D>) -> bool {
    match kernels(path, tensor) {
        Some(DispatchTensorKind::Flex(_)) => true,
        #[cfg(feature = "cube")]
        Some(DispatchTensorKind::Cube(tensor)) => gpu::storage(tensor.dtype())
            .is_ok_and(|storage| operation.on_gpu(&tensor.device().client().into(), storage)),
        _ => false,
    }
}

/// Whether the tensor is on a CPU whose kernels may run.
pub(crate) fn on_cpu<const D: usize>(path: Path, tensor: &Tensor<D>) -> bool {
    matches!(kernels(path, tensor), Some(DispatchTensorKind::Flex(_)))
}

/// The tensor without its graph, if the path and the element type allow kernels.
fn kernels<const D: usize>(path: Path, tensor: &Tensor<D>) -> Option<DispatchTensorKind> {
    if path != Path::Auto || !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16) {
        return None;
    }
    let mut kind = tensor.clone().into_dispatch().kind;
    while let DispatchTensorKind::Autodiff(inner) = kind {
        kind = *inner;
    }
    Some(kind)
}

/// Runs an operation, which must be [`available`], and returns its outputs.
pub(crate) fn run<O: Operation, const N: usize>(
    operation: O,
    operands: Of<O, DispatchTensor>,
) -> Result<[DispatchTensor; N], Error> {
    let (structure, tensors) = O::Operands::split(operands);
    let results = <Dispatch as Execute>::execute(Arc::new(Bound { operation, structure }), Tensors(tensors));
    results.status?;
    match results.outputs.0.try_into() {
        Ok(outputs) => Ok(outputs),
        Err(outputs) => unreachable!("{} outputs in the place of {N}", Vec::<DispatchTensor>::len(&outputs)),
    }
}
