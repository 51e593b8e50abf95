//! The binding of the kernels to Burn's backends.
//!
//! Every recurrence is one custom operation of up to seven tensors: an [`Operation`] says which, and
//! what its slots mean. `backend` is the extension trait that Burn's dispatch routes, `flex` runs the
//! CPU kernels on Flex tensors, `cube` the GPU kernels on CubeCL tensors, `autodiff` is the only place with a
//! backward pass. A further backend is one more implementation of [`backend::Kernels`].

mod autodiff;
mod backend;
#[cfg(feature = "cube")]
mod cube;
mod flex;
mod operation;

use burn::Tensor;
#[cfg(feature = "cube")]
use burn::backend::TensorMetadata as _;
use burn::backend::{Dispatch, DispatchTensorKind};
use burn::tensor::DType;
use thalweg_kernels::attention::AttentionProblem;

pub(crate) use operation::*;

use crate::{Error, Path};
use backend::{Recurrence, Slot, Slots};

/// Which kernels an operation has.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Written<'a> {
    ForCpu,
    ForCpuAndGpu,
    /// For GPUs with shared memory enough, and unless there are too few queries.
    Attention(&'a AttentionProblem),
}

/// Whether a kernel runs an operation on this tensor: the path allows it, and the backend and the
/// element type have one.
#[cfg_attr(not(feature = "cube"), allow(unused_variables))]
pub(crate) fn available<const D: usize>(path: Path, written: Written<'_>, tensor: &Tensor<D>) -> bool {
    if path != Path::Auto || !matches!(tensor.dtype(), DType::F32 | DType::BF16 | DType::F16) {
        return false;
    }
    let dtype = tensor.dtype();
    let tensor = tensor.clone().into_dispatch();
    let mut kind = &tensor.kind;
    while let DispatchTensorKind::Autodiff(inner) = kind {
        kind = inner;
    }
    match kind {
        DispatchTensorKind::Flex(_) => true,
        #[cfg(feature = "cube")]
        DispatchTensorKind::Cube(tensor) => match written {
            Written::ForCpu => false,
            Written::ForCpuAndGpu => true,
            Written::Attention(problem) => cube::attention::suits(&tensor.device().client(), problem, dtype),
        },
        _ => false,
    }
}

/// One operand, with its rank forgotten.
pub(crate) struct Operand(burn::backend::DispatchTensor);

impl<const D: usize> From<Tensor<D>> for Operand {
    fn from(tensor: Tensor<D>) -> Self {
        Self(tensor.into_dispatch())
    }
}

/// Runs an operation: the first operand always exists, the others as the operation says.
pub(crate) fn run<const O: usize, const S: usize>(
    operation: Operation,
    first: impl Into<Operand>,
    rest: [Option<Operand>; SLOTS - 1],
) -> Result<(Tensor<O>, Tensor<S>), Error> {
    let slot = |operand| match operand {
        Some(Operand(tensor)) => Slot::Present(tensor),
        None => Slot::Absent,
    };
    let [x1, x2, x3, x4, x5, x6] = rest;
    let (x1, x2, x3, x4, x5, x6) = (slot(x1), slot(x2), slot(x3), slot(x4), slot(x5), slot(x6));
    let slots = Slots { x0: first.into().0, x1, x2, x3, x4, x5, x6 };
    let results = <Dispatch as Recurrence>::recurrence(operation, slots);
    results.status?;
    Ok((Tensor::from_dispatch(results.o), Tensor::from_dispatch(results.final_state)))
}
