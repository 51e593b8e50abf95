//! Linear layers, dense and block-diagonal.

use burn::Tensor;
use burn::tensor::FloatDType;
use thalweg_kernels::linear::LinearProblem;

use crate::native::{self, Operand, Operation, Written};
use crate::{Error, Path, check};

/// `y = x W + b` over the last axis.
///
/// `x` is `[.., inputs]`, `weight` `[inputs, outputs]`, `bias` `[outputs]`; the result is `[.., outputs]`. On the CPU one
/// product on all threads with no copies around it, also of a weight that is the transpose of another tensor; elsewhere it
/// is Burn's. Weight and bias may have other element types than `x`, as in mixed precision; the result has that of `x`.
/// On the CPU the bits of a row do not depend on the other rows.
///
/// # Errors
/// If the shapes do not fit or an element type is no float.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use thalweg_scan::{Path, linear};
///
/// let device = Device::default();
/// let (x, w) = (Tensor::<3>::ones([2, 20, 3], &device), Tensor::<2>::ones([3, 4], &device));
/// assert_eq!(linear(x, w, None, Path::Auto)?.dims(), [2, 20, 4]);
/// # Ok::<(), thalweg_scan::Error>(())
/// ```
pub fn linear<const D: usize>(
    x: Tensor<D>,
    weight: Tensor<2>,
    bias: Option<Tensor<1>>,
    path: Path,
) -> Result<Tensor<D>, Error> {
    let dims = x.dims();
    let inputs = dims.last().copied().unwrap_or(0);
    let [_, outputs] = weight.dims();
    check::shape("weight", &weight, [("inputs", inputs), ("outputs", outputs)])?;
    if let Some(bias) = &bias {
        check::shape("bias", bias, [("outputs", outputs)])?;
    }
    let dtype = x.dtype();
    let (x, weight, bias) = in_one_type(x, weight, bias, path)?;
    let rows = dims.iter().take(D.saturating_sub(1)).product();
    if let Some(problem) = fits(LinearProblem::new(rows, inputs, outputs), path, &x) {
        return Ok(run(problem, x, weight.into(), bias.map(Into::into))?.cast(dtype));
    }
    // Burn's own layer, whose one product is of matrices.
    let y: Tensor<2> = x.reshape([rows, inputs]).matmul(weight);
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    let mut shape = dims;
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    Ok(y.reshape(shape))
}

/// `y[.., h, :] = x[.., h, :] W[h] + b[h]`: a linear layer whose weight is block-diagonal, as in the gates of the RG-LRU.
///
/// `x` is `[batch, time, blocks * inputs]`, `weight` `[blocks, inputs, outputs]`, `bias` `[blocks, outputs]`; the result is
/// `[batch, time, blocks * outputs]`. Element types are as in [`linear`].
///
/// # Errors
/// If the shapes do not fit or an element type is no float.
pub fn block_linear(x: Tensor<3>, weight: Tensor<3>, bias: Option<Tensor<2>>, path: Path) -> Result<Tensor<3>, Error> {
    let [batch, time, features] = x.dims();
    let [blocks, inputs, outputs] = weight.dims();
    check::not_empty("weight", &weight)?;
    check::shape("x", &x, [("batch", batch), ("time", time), ("blocks * inputs", blocks * inputs)])?;
    if let Some(bias) = &bias {
        check::shape("bias", bias, [("blocks", blocks), ("outputs", outputs)])?;
    }
    let dtype = x.dtype();
    let (x, weight, bias) = in_one_type(x, weight, bias, path)?;
    let rows = batch * time;
    debug_assert_eq!(features, blocks * inputs);
    if let Some(problem) = fits(LinearProblem::new(rows, inputs, outputs).with_blocks(blocks), path, &x) {
        return Ok(run(problem, x, weight.into(), bias.map(Into::into))?.cast(dtype));
    }
    let y = x.reshape([rows, blocks, inputs]).swap_dims(0, 1).matmul(weight);
    let y = match bias {
        Some(bias) => y + bias.unsqueeze_dim(1),
        None => y,
    };
    Ok(y.swap_dims(0, 1).reshape([batch, time, blocks * outputs]))
}

/// Operands of one element type: that of `x` if it is everyone's. Where it is not, the kernel, which sums in f32 anyway,
/// takes all in f32 and only the result is rounded; elsewhere weights go to the type of `x`, which matrix units multiply.
fn in_one_type<const D: usize, const W: usize, const B: usize>(
    x: Tensor<D>,
    weight: Tensor<W>,
    bias: Option<Tensor<B>>,
    path: Path,
) -> Result<(Tensor<D>, Tensor<W>, Option<Tensor<B>>), Error> {
    check::float("x", &x)?;
    check::float("weight", &weight)?;
    let mut same = weight.dtype() == x.dtype();
    if let Some(bias) = &bias {
        check::float("bias", bias)?;
        same &= bias.dtype() == x.dtype();
    }
    let dtype = match same || !native::available(path, Written::ForCpu, &x) {
        true => x.dtype().into(),
        false => FloatDType::F32,
    };
    Ok((x.cast(dtype), weight.cast(dtype), bias.map(|bias| bias.cast(dtype))))
}

/// The problem, if the kernel is the way to solve it.
fn fits<const D: usize>(problem: LinearProblem, path: Path, x: &Tensor<D>) -> Option<LinearProblem> {
    let LinearProblem { rows, inputs, outputs, .. } = problem;
    (rows > 0 && inputs > 0 && outputs > 0 && native::available(path, Written::ForCpu, x)).then_some(problem)
}

fn run<const D: usize>(
    problem: LinearProblem,
    x: Tensor<D>,
    weight: Operand,
    bias: Option<Operand>,
) -> Result<Tensor<D>, Error> {
    let rest = [Some(weight), bias, None, None, None, None];
    let (y, _) = native::run::<D, 1>(Operation::Linear { problem }, x, rest)?;
    Ok(y)
}
