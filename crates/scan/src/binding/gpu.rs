//! The GPU kernels on CubeCL tensors: handles are lent to the kernels, and the buffers that they return become tensors.

use burn::backend::TensorMetadata;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::{DType, Shape};
use burn_cubecl::CubeBackend;
use burn_cubecl::kernel::into_contiguous;
pub(crate) use burn_cubecl::tensor::CubeTensor;
use thalweg_gpu::{Buffer, Client, Storage};
use thalweg_kernels::Error;

use super::backend::{self, AnyOperation, Bound, Erased, Execute, Kernels, Results, Tensors};
use super::operation::{Forward, Operation};
use super::structure::Structure;

impl Execute for CubeBackend {
    fn execute(operation: AnyOperation, operands: Tensors<Self>) -> Results<Self> {
        backend::plain(operation, operands)
    }
}

impl Kernels for CubeBackend {
    fn forward(operation: &AnyOperation, operands: Vec<CubeTensor>, _: bool) -> Result<Forward<CubeTensor>, Error> {
        Ok(Forward::of(operation.gpu_forward(operands)?))
    }

    fn backward(
        operation: &AnyOperation,
        operands: Vec<CubeTensor>,
        saved: Vec<CubeTensor>,
        cotangents: Vec<Option<CubeTensor>>,
    ) -> Result<Vec<Option<CubeTensor>>, Error> {
        let Some(typed) = operands.get(operation.typed()) else { return Ok(Vec::new()) };
        let present = cotangents.into_iter().zip(operation.outputs()).map(|(cotangent, output)| match cotangent {
            Some(cotangent) => into_contiguous(cotangent),
            None => {
                let dtype = output.dtype(typed.dtype).into();
                CubeBackend::float_zeros(output.shape.clone(), &typed.device, dtype)
            }
        });
        let present = present.collect();
        operation.gpu_backward(operands, saved, present)
    }
}

pub(crate) fn forward<O: Operation>(bound: &Bound<O>, operands: Vec<CubeTensor>) -> Result<Vec<CubeTensor>, Error> {
    let mut operands: Vec<_> = operands.into_iter().map(into_contiguous).collect();
    if let Some(state) = bound.in_place().and_then(|index| operands.get_mut(index))
        && !state.can_mut()
    {
        *state = state.copy();
    }
    let x = bound.structure.join(buffers(&operands)?);
    let like = &operands[bound.typed()];
    let outputs = bound.operation.gpu_forward(&Client::from(like.client.clone()), &x)?;
    let specs = bound.operation.outputs();
    Ok(outputs.iter().zip(specs).map(|(output, spec)| tensor(like, output, spec.shape)).collect())
}

pub(crate) fn backward<O: Operation>(
    bound: &Bound<O>,
    operands: Vec<CubeTensor>,
    saved: Vec<CubeTensor>,
    cotangents: Vec<CubeTensor>,
) -> Result<Vec<Option<CubeTensor>>, Error> {
    let [operands, saved] = [operands, saved].map(|x| x.into_iter().map(into_contiguous).collect::<Vec<_>>());
    let x = bound.structure.join(buffers(&operands)?);
    let client = Client::from(operands[bound.typed()].client.clone());
    let gradients = bound.operation.gpu_backward(&client, &x, &buffers(&saved)?, &buffers(&cotangents)?)?;
    let (_, gradients) = O::Operands::split(gradients);
    let shaped = gradients.into_iter().zip(&operands);
    Ok(shaped.map(|(gradient, operand)| Some(tensor(operand, &gradient?, operand.shape()))).collect())
}

/// The memory of contiguous tensors.
fn buffers(tensors: &[CubeTensor]) -> Result<Vec<Buffer>, Error> {
    tensors
        .iter()
        .map(|x| Ok(Buffer { handle: x.handle.clone(), storage: storage(x.dtype)?, len: x.shape().num_elements() }))
        .collect()
}

/// The storage type of the kernels for an element type.
pub(crate) fn storage(dtype: DType) -> Result<Storage, Error> {
    match dtype {
        DType::F32 => Ok(Storage::F32),
        DType::BF16 => Ok(Storage::Bf16),
        DType::F16 => Ok(Storage::F16),
        other => {
            let found = format!("{other:?}");
            Err(Error::Value { argument: "element type", found, expected: "f32, bf16 or f16" })
        }
    }
}

/// A tensor over a buffer on the device of another tensor.
fn tensor(like: &CubeTensor, buffer: &Buffer, shape: Shape) -> CubeTensor {
    let dtype = match buffer.storage {
        Storage::F32 => DType::F32,
        Storage::Bf16 => DType::BF16,
        Storage::F16 => DType::F16,
    };
    CubeTensor::new_contiguous(like.client.clone(), like.device.clone(), shape, buffer.handle.clone(), dtype)
}
