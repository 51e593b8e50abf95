//! Checks of shapes, element types and sequence bounds, made once before anything runs.

use burn::Tensor;
use burn::tensor::{DType, FloatDType};
use thalweg_kernels::Sequences;

use crate::Error;

/// A named axis of an expected shape: what an error message prints.
pub(crate) type Axis = (&'static str, usize);

/// Checks a tensor's shape against named axes.
pub(crate) fn shape<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
    expected: [Axis; D],
) -> Result<(), Error> {
    dims(argument, &tensor.dims(), expected)
}

/// Checks a shape against named axes.
pub(crate) fn dims<const D: usize>(
    argument: &'static str,
    found: &[usize; D],
    expected: [Axis; D],
) -> Result<(), Error> {
    if found.iter().zip(&expected).all(|(f, (_, e))| f == e) {
        return Ok(());
    }
    let axes: Vec<String> = expected.iter().map(|(name, size)| format!("{name}={size}")).collect();
    Err(Error::Shape { argument, found: found.to_vec(), expected: format!("[{}]", axes.join(", ")) })
}

/// Checks that no axis of a tensor is empty.
pub(crate) fn not_empty<const D: usize>(argument: &'static str, tensor: &Tensor<D>) -> Result<(), Error> {
    let found = tensor.dims();
    if found.iter().all(|&size| size > 0) {
        return Ok(());
    }
    Err(Error::Shape { argument, found: found.to_vec(), expected: "at least 1 along every axis".into() })
}

/// Checks that the elements of a tensor are floats, which go from one type to another.
pub(crate) fn float<const D: usize>(argument: &'static str, tensor: &Tensor<D>) -> Result<(), Error> {
    let found = tensor.dtype();
    if found.is_float() {
        return Ok(());
    }
    Err(Error::Type { argument, found, expected: "a type of floats".into() })
}

/// Checks that a tensor has the element type of another.
pub(crate) fn same_type<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
    of: &'static str,
    dtype: DType,
) -> Result<(), Error> {
    let found = tensor.dtype();
    if found == dtype {
        return Ok(());
    }
    Err(Error::Type { argument, found, expected: format!("{dtype:?}, that of `{of}`") })
}

/// Checks that a tensor has the element type and the shape of another.
pub(crate) fn like<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
    of: &'static str,
    other: &Tensor<D>,
) -> Result<(), Error> {
    same_type(argument, tensor, of, other.dtype())?;
    same_shape(argument, tensor, of, other)
}

/// Checks that a tensor has the shape of another.
pub(crate) fn same_shape<const D: usize>(
    argument: &'static str,
    tensor: &Tensor<D>,
    of: &'static str,
    other: &Tensor<D>,
) -> Result<(), Error> {
    if tensor.dims() == other.dims() {
        return Ok(());
    }
    let expected = format!("that of {of}, {:?}", other.dims());
    Err(Error::Shape { argument, found: tensor.dims().to_vec(), expected })
}

/// Checks that a size option, if given, is at least 1.
pub(crate) fn positive(argument: &'static str, value: Option<usize>) -> Result<(), Error> {
    if value == Some(0) {
        return Err(Error::Value { argument, found: "0".into(), expected: "at least 1" });
    }
    Ok(())
}

/// Checks the sequence bounds and returns the number of independent sequences `N`.
pub(crate) fn sequences(cu_seqlens: Option<&[usize]>, batch: usize, time: usize) -> Result<usize, Error> {
    Ok(Sequences::new(batch, time, cu_seqlens)?.count())
}

/// Checks that grouped heads divide: every `heads` serves the same number of `value_heads`.
pub(crate) fn grouped(
    argument: &'static str,
    found: Vec<usize>,
    value_heads: usize,
    heads: usize,
) -> Result<usize, Error> {
    if heads > 0 && value_heads.is_multiple_of(heads) {
        return Ok(value_heads / heads);
    }
    Err(Error::Shape {
        argument,
        found,
        expected: format!("a number of heads that is a multiple of {heads}, not {value_heads}"),
    })
}

/// The type of gates, states and sums: f64 for f64 inputs, else f32.
pub(crate) fn state_type(dtype: DType) -> FloatDType {
    match dtype {
        DType::F64 => FloatDType::F64,
        _ => FloatDType::F32,
    }
}
