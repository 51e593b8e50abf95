//! Fresh parameters.

use burn::module::{Param, ParamId};
use burn::nn::{Initializer, Linear};
use burn::tensor::{Device, Shape, Tensor};

/// `N(0, std^2)` weights `[input, output]` and zero bias.
pub(crate) fn linear(input: usize, output: usize, bias: bool, std: f64, device: &Device) -> Linear {
    let normal = Initializer::Normal { mean: 0.0, std };
    Linear {
        weight: normal.init([input, output], device),
        bias: bias.then(|| Initializer::Zeros.init([output], device)),
    }
}

/// A parameter whose value `make` computes when it is first needed (so that loading a checkpoint never runs it).
pub(crate) fn param<const D: usize>(
    shape: [usize; D],
    device: &Device,
    make: impl Fn(&Device) -> Tensor<D> + Send + Sync + 'static,
) -> Param<Tensor<D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device, require_grad| {
            let value = make(device).detach();
            if require_grad { value.require_grad() } else { value }
        },
        device.clone(),
        true,
        Shape::from(shape),
    )
}
