//! The CPU kernels on Flex tensors: memory is lent to them as slices, without a copy where it is contiguous, and the vectors
//! that they return become tensors.

use burn::backend::Flex;
use burn::tensor::{Bytes, DType, Element as BurnElement, Shape};
use burn_flex::{FlexTensor, Layout};
use thalweg_kernels::{Element, Error};

use super::backend::{self, AnyOperation, Bound, Execute, Kernels, Results, Tensors};
use super::operation::{Forward, Of, Operation};
use super::structure::Structure;

/// An element type of both worlds.
pub(crate) trait Number: Element + BurnElement + bytemuck::Pod {}
impl Number for f32 {}
impl Number for half::bf16 {}
impl Number for half::f16 {}

/// Calls a method for an element type.
macro_rules! for_element {
    ($dtype:expr, $operation:ident.$method:ident($($argument:expr),*)) => {
        match $dtype {
            DType::F32 => $operation.$method::<f32>($($argument),*),
            DType::BF16 => $operation.$method::<half::bf16>($($argument),*),
            DType::F16 => $operation.$method::<half::f16>($($argument),*),
            other => {
                let found = format!("{other:?}");
                Err(Error::Value { argument: "element type", found, expected: "f32, bf16 or f16" })
            }
        }
    };
}

impl Execute for Flex {
    fn execute(operation: AnyOperation, operands: Tensors<Self>) -> Results<Self> {
        backend::plain(operation, operands)
    }
}

impl Kernels for Flex {
    fn forward(operation: &AnyOperation, operands: Vec<FlexTensor>, keep: bool) -> Result<Forward<FlexTensor>, Error> {
        operation.cpu_forward(operands, keep)
    }

    fn backward(
        operation: &AnyOperation,
        operands: Vec<FlexTensor>,
        saved: Vec<FlexTensor>,
        cotangents: Vec<Option<FlexTensor>>,
    ) -> Result<Vec<Option<FlexTensor>>, Error> {
        let dtype = operands.get(operation.typed()).map_or(DType::F32, FlexTensor::dtype);
        let present = cotangents.into_iter().zip(operation.outputs()).map(|(cotangent, output)| match cotangent {
            Some(cotangent) => cotangent.to_contiguous(),
            None => FlexTensor::zeros(output.shape.clone(), output.dtype(dtype)),
        });
        operation.cpu_backward(operands, saved, present.collect())
    }
}

pub(crate) fn forward<O: Operation>(
    bound: &Bound<O>,
    operands: Vec<FlexTensor>,
    keep: bool,
) -> Result<Forward<FlexTensor>, Error> {
    let mut x = bound.structure.join(operands);
    let operation = &*bound.operation.cpu_layout(&mut x, keep);
    let x = contiguous(bound, x);
    let dtype = O::typed(&x).dtype();
    let mut forward = for_element!(dtype, operation.cpu_forward(x, keep))?;
    for (output, spec) in forward.outputs.iter_mut().zip(operation.outputs()) {
        shape(output, &spec.shape);
    }
    Ok(forward)
}

pub(crate) fn backward<O: Operation>(
    bound: &Bound<O>,
    operands: Vec<FlexTensor>,
    saved: Vec<FlexTensor>,
    cotangents: Vec<FlexTensor>,
) -> Result<Vec<Option<FlexTensor>>, Error> {
    let shapes: Vec<_> = operands.iter().map(|x| x.layout().shape().clone()).collect();
    let mut x = bound.structure.join(operands);
    let operation = &*bound.operation.cpu_layout(&mut x, true);
    let x = contiguous(bound, x);
    let dtype = O::typed(&x).dtype();
    let gradients = for_element!(dtype, operation.cpu_backward(x, &saved, &cotangents))?;
    let (_, mut gradients) = O::Operands::split(gradients);
    for (gradient, to) in gradients.iter_mut().zip(&shapes) {
        if let Some(gradient) = gradient {
            shape(gradient, to);
        }
    }
    Ok(gradients)
}

/// Views that are no plain run of memory are copied; everything else is lent as it is.
fn contiguous<O: Operation>(bound: &Bound<O>, x: Of<O, FlexTensor>) -> Of<O, FlexTensor> {
    let (_, tensors) = O::Operands::split(x);
    bound.structure.join(tensors.into_iter().map(|x| if x.is_contiguous() { x } else { x.to_contiguous() }))
}

/// Gives a flat tensor its shape; one that has it already may be any view.
fn shape(tensor: &mut FlexTensor, shape: &Shape) {
    if tensor.layout().shape() != shape {
        *tensor = tensor.clone().with_layout(Layout::contiguous(shape.clone()));
    }
}

/// The elements of a contiguous tensor. None if it is of another type, which kernels refuse for their number.
pub(crate) fn slice<E: Number>(tensor: &FlexTensor) -> &[E] {
    tensor.as_slice().unwrap_or_default()
}

/// The elements of a tensor that may be absent.
pub(crate) fn optional<E: Number>(tensor: &Option<FlexTensor>) -> Option<&[E]> {
    tensor.as_ref().map(slice)
}

/// A flat tensor over the memory of a vector.
pub(crate) fn values<E: Number>(values: Vec<E>) -> FlexTensor {
    let shape = Shape::from([values.len()]);
    FlexTensor::new(Bytes::from_elems(values), Layout::contiguous(shape), E::dtype())
}
