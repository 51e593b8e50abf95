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
        let step = AdamWStep { lr, betas, epsilon, weight_decay, time: i32::try_from(time).unwrap_or(i32::MAX) };
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
