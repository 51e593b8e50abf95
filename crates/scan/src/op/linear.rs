//! Linear layers, dense and block-diagonal.

use std::borrow::Cow;

use burn::Tensor;
use burn::tensor::{FloatDType, Shape};
use burn_flex::{FlexTensor, Layout};
use thalweg_kernels::linear::{self as kernel, LinearProblem};

use crate::binding::cpu::{Number, optional, slice, values};
use crate::binding::{self, Forward, KernelResult, Operation, OutputSpec, operands};
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
    let mut shape = dims;
    if let Some(last) = shape.last_mut() {
        *last = outputs;
    }
    let layer = Linear { problem: LinearProblem::new(rows, inputs, outputs), shape: shape.into() };
    if layer.available(path, &x) {
        return Ok(layer.run(x, weight, bias)?.cast(dtype));
    }
    // Burn's own layer, whose one product is of matrices.
    let y: Tensor<2> = x.reshape([rows, inputs]).matmul(weight);
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
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
    let problem = LinearProblem::new(rows, inputs, outputs).with_blocks(blocks);
    let layer = Linear { problem, shape: [batch, time, blocks * outputs].into() };
    if layer.available(path, &x) {
        return Ok(layer.run(x, weight, bias)?.cast(dtype));
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
    let dtype = if same || !binding::on_cpu(path, &x) { x.dtype().into() } else { FloatDType::F32 };
    Ok((x.cast(dtype), weight.cast(dtype), bias.map(|bias| bias.cast(dtype))))
}

operands! {
    /// The tensors of a linear layer.
    struct Operands { x, weight; bias: Option }
}

/// A linear layer.
#[derive(Debug, Clone)]
struct Linear {
    problem: LinearProblem,
    /// Of the result.
    shape: Shape,
}

impl Linear {
    fn available<const D: usize>(&self, path: Path, x: &Tensor<D>) -> bool {
        let LinearProblem { rows, inputs, outputs, .. } = self.problem;
        rows > 0 && inputs > 0 && outputs > 0 && binding::available(self, path, x)
    }

    fn run<const D: usize, const W: usize, const B: usize>(
        self,
        x: Tensor<D>,
        weight: Tensor<W>,
        bias: Option<Tensor<B>>,
    ) -> Result<Tensor<D>, Error> {
        let (weight, bias) = (weight.into_dispatch(), bias.map(Tensor::into_dispatch));
        let [y] = binding::run(self, Operands { x: x.into_dispatch(), weight, bias })?;
        Ok(Tensor::from_dispatch(y))
    }
}

impl Operation for Linear {
    type Operands = Operands<()>;

    fn typed<T>(x: &Operands<T>) -> &T {
        &x.x
    }

    fn outputs(&self) -> Vec<OutputSpec> {
        vec![OutputSpec::typed(self.shape.clone())]
    }

    /// A weight that is a view of its transpose is taken as that lies.
    fn cpu_layout(&self, x: &mut Operands<FlexTensor>, _: bool) -> Cow<'_, Self> {
        let weight = &x.weight;
        if self.problem.blocks != 1 || weight.layout().num_dims() != 2 || weight.is_contiguous() {
            return Cow::Borrowed(self);
        }
        let transposed = weight.transpose(0, 1);
        if !transposed.is_contiguous() {
            return Cow::Borrowed(self);
        }
        x.weight = transposed;
        Cow::Owned(Self { problem: self.problem.with_transposed_weight(), shape: self.shape.clone() })
    }

    fn cpu_forward<E: Number>(&self, x: Operands<FlexTensor>, _: bool) -> KernelResult<Forward<FlexTensor>> {
        let y = kernel::forward::<E>(&self.problem, slice(&x.x), slice(&x.weight), optional(&x.bias))?;
        Ok(Forward::of([values(y)]))
    }

    fn cpu_backward<E: Number>(
        &self,
        x: Operands<FlexTensor>,
        _: &[FlexTensor],
        d: &[FlexTensor],
    ) -> KernelResult<Operands<Option<FlexTensor>>> {
        let has_bias = x.bias.is_some();
        let grads = kernel::backward::<E>(&self.problem, slice(&x.x), slice(&x.weight), slice(&d[0]), has_bias)?;
        let mut d_weight = values(grads.d_weight);
        if self.problem.transposed {
            d_weight = d_weight.with_layout(Layout::contiguous(x.weight.layout().shape().clone())).transpose(0, 1);
        }
        Ok(Operands {
            x: Some(values(grads.dx)),
            weight: Some(d_weight),
            bias: x.bias.map(|_| grads.d_bias.map(values)),
        })
    }
}
