//! Linear layers on the kernels' product.

use burn::nn::Linear;
use burn::tensor::Tensor;
use thalweg_scan::{Path, linear};

/// What a layer does with its linear maps.
pub(crate) trait Projection {
    /// `x W + b` over the last axis of `x`, `[.., inputs]`, in the type of `x`, whatever that of the parameters.
    ///
    /// # Panics
    /// If the shapes do not fit, as Burn's own layer does.
    fn project<const D: usize>(&self, x: Tensor<D>) -> Tensor<D>;
}

impl Projection for Linear {
    #[track_caller]
    fn project<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        match linear(x, self.weight.val(), self.bias.as_ref().map(|bias| bias.val()), Path::Auto) {
            Ok(y) => y,
            Err(error) => panic!("{error}"),
        }
    }
}
