//! AdamW on the fused kernel.

use burn::module::{Module, ParamGroup, ParamId};
use burn::optim::{AdamWState, AdaptiveMomentumState, LearningRate, ModuleOptimizer, Optimizer};
use burn::tensor::{Device, Tensor};
use thalweg_scan::{AdamWOutput, AdamWStep, Path};

use crate::params::{Named, names};

/// AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) as one pass over memory on a CPU. Its state is that of Burn's
/// AdamW, so either resumes what the other has saved.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Decay rates of the moments.
    pub betas: (f32, f32),
    /// Added to the root of the second moment.
    pub epsilon: f32,
    /// Decay of the parameters per step, in learning rates.
    pub weight_decay: f32,
}

impl Optimizer for AdamW {
    type State<const D: usize> = AdamWState<D>;

    fn step<const D: usize>(
        &self,
        lr: LearningRate,
        tensor: Tensor<D>,
        grad: Tensor<D>,
        state: Option<Self::State<D>>,
    ) -> (Tensor<D>, Option<Self::State<D>>) {
        let (time, moments) = match state.map(|state| state.momentum) {
            Some(AdaptiveMomentumState { time, moment_1, moment_2, .. }) => (time + 1, Some([moment_1, moment_2])),
            None => (1, None),
        };
        let Self { betas, epsilon, weight_decay } = *self;
        let step = AdamWStep { lr, betas, epsilon, weight_decay, time };
        match thalweg_scan::adamw(&step, tensor, grad, moments, Path::Auto) {
            Ok(AdamWOutput { p, m, v }) => (p, Some(AdamWState::new(AdaptiveMomentumState::new(time, m, v)))),
            // The trait has no error. Gradients have the shape of their parameters, and saved states are checked when
            // they are loaded.
            Err(error) => panic!("AdamW: {error}"),
        }
    }

    fn to_device<const D: usize>(mut state: Self::State<D>, device: &Device) -> Self::State<D> {
        state.momentum = state.momentum.to_device(device);
        state
    }
}

/// Parameters that weight decay would pull towards a value that means nothing: norms and biases (one axis), and the
/// gates' own parameters.
fn is_decayed(named: &Named) -> bool {
    const GATES: [&str; 3] = ["A_log", "a_param", "lower_bounds"];
    let is_gate = named.name.split('.').any(|part| GATES.contains(&part) || part.ends_with("bias"));
    named.shape.len() >= 2 && !is_gate
}

/// [`AdamW`] for a whole module, with `weight_decay` on its matrices only.
pub(crate) fn adamw<M: Module>(module: &M, betas: (f32, f32), weight_decay: f32) -> ModuleOptimizer {
    let plain = AdamW { betas, epsilon: 1e-8, weight_decay: 0.0 };
    let decayed: Vec<ParamId> = names(module).iter().filter(|named| is_decayed(named)).map(|named| named.id).collect();
    ModuleOptimizer::from(plain.clone()).with_group(
        ParamGroup::from_ids(decayed),
        AdamW { weight_decay, ..plain },
        None,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::optim::{AdamWConfig, GradientsParams};
    use burn::tensor::Tolerance;

    use crate::params::settle;

    fn steps(optimizer: &mut ModuleOptimizer, mut model: Linear, steps: std::ops::Range<usize>) -> Linear {
        let device = model.weight.device();
        for step in steps {
            let x = Tensor::<2>::full([4, 30], 0.1 * (step + 1) as f32, &device);
            let grads = GradientsParams::from_grads(model.forward(x).square().mean().backward(), &model);
            model = optimizer.step(0.01, model, grads);
        }
        model
    }

    /// Bias and weight have different decays, and the moments of one are taken over by the other.
    #[test]
    fn equals_burns_and_resumes_its_state() {
        let device = Device::flex().autodiff();
        let model: Linear = settle(LinearConfig::new(30, 20).init(&device));
        let config = AdamWConfig::new().with_beta_2(0.95).with_epsilon(1e-8);
        let decayed = ParamGroup::from_ids(vec![model.weight.id]);
        let burns = || {
            let plain = ModuleOptimizer::from(config.clone().with_weight_decay(0.0).build());
            plain.with_group(decayed.clone(), config.clone().with_weight_decay(0.3).build(), None)
        };
        let (mut theirs, mut ours) = (burns(), adamw(&model, (0.9, 0.95), 0.3));
        let close = |a: &Linear, b: &Linear| {
            let tolerance = Tolerance::<f32>::rel_abs(1e-5, 1e-6);
            a.weight.val().into_data().assert_approx_eq(&b.weight.val().into_data(), tolerance);
        };
        let halfway = steps(&mut theirs, model.clone(), 0..3);
        close(&halfway, &steps(&mut ours, model.clone(), 0..3));
        let mut resumed = adamw(&model, (0.9, 0.95), 0.3).load_record(theirs.to_record());
        close(&steps(&mut theirs, halfway.clone(), 3..6), &steps(&mut resumed, halfway, 3..6));
    }
}
