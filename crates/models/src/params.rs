//! What can be done with any module's parameters by name: naming, saving, loading, clipping, grouping.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::GradientsParams;
use burn::tensor::{FloatDType, Tensor, TensorData};

use crate::data::{FNV_START, fnv1a};

/// The path of the parameter that is being visited. Names of enum variants are left out: they are types, not names.
#[derive(Debug, Default)]
struct Path(Vec<Option<String>>);

impl Path {
    fn enter(&mut self, name: &str, container: &str) {
        self.0.push((!container.starts_with("Enum:")).then(|| name.to_owned()));
    }

    fn exit(&mut self) {
        self.0.pop();
    }

    fn name(&self) -> String {
        self.0.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(".")
    }
}

/// Gives every parameter an id that depends on its name alone, so that the optimizer's saved state, which is keyed by
/// id, finds its parameter in another process; and makes all parameters, in order, so that a seed fixes them.
pub(crate) fn settle<M: Module>(module: M) -> M {
    struct Settle(Path);
    impl ModuleMapper for Settle {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (_, value, mapper) = param.consume();
            let id = ParamId::from(fnv1a(FNV_START, self.0.name().into_bytes()));
            Param::from_mapped_value(id, value, mapper)
        }
    }
    module.map(&mut Settle(Path::default()))
}

/// A parameter as it is saved.
#[derive(Debug, Clone)]
pub struct Named {
    /// Its name: the fields that lead to it, joined by dots.
    pub name: String,
    /// Its id.
    pub id: ParamId,
    /// Its shape.
    pub shape: Vec<usize>,
}

/// All parameters of `module`, in order.
pub fn names<M: Module>(module: &M) -> Vec<Named> {
    struct Names(Path, Vec<Named>);
    impl ModuleVisitor for Names {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let shape = param.lazy_shape().to_vec();
            self.1.push(Named { name: self.0.name(), id: param.id, shape });
        }
    }
    let mut names = Names(Path::default(), Vec::new());
    module.visit(&mut names);
    names.1
}

/// The values of all parameters of `module`, in order.
pub(crate) fn values<M: Module>(module: &M) -> Vec<(String, TensorData)> {
    struct Values(Path, Vec<(String, TensorData)>);
    impl ModuleVisitor for Values {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.1.push((self.0.name(), param.val().into_data()));
        }
    }
    let mut values = Values(Path::default(), Vec::new());
    module.visit(&mut values);
    values.1
}

/// `module` with the values of `values`, which must have one of the right shape for every parameter (checked with
/// [`names`] before).
pub(crate) fn with_values<M: Module>(module: M, values: BTreeMap<String, TensorData>) -> M {
    struct Load(Path, BTreeMap<String, TensorData>);
    impl ModuleMapper for Load {
        fn enter_module(&mut self, name: &str, container: &str) {
            self.0.enter(name, container);
        }

        fn exit_module(&mut self, _: &str, _: &str) {
            self.0.exit();
        }

        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let Some(data) = self.1.remove(&self.0.name()) else { return param };
            let device = param.lazy_device();
            let value = Tensor::<D>::from_data(data, &device);
            let value = if device.is_autodiff() { value.require_grad() } else { value };
            Param::initialized(param.id, value)
        }
    }
    module.map(&mut Load(Path::default(), values))
}

/// The l2 norm of all gradients taken together.
fn global_norm<M: Module>(module: &M, grads: &GradientsParams) -> f64 {
    struct Squares<'a>(&'a GradientsParams, Vec<Tensor<1>>);
    impl ModuleVisitor for Squares<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = self.0.get::<D>(param.id) {
                // The square of what f16 holds does not fit into f16.
                self.1.push(grad.cast(FloatDType::F32).square().sum());
            }
        }
    }
    let mut squares = Squares(grads, Vec::new());
    module.visit(&mut squares);
    if squares.1.is_empty() {
        return 0.0;
    }
    // Read all at once: a GPU waits at each reading.
    Tensor::cat(squares.1, 0).into_data().iter::<f64>().sum::<f64>().sqrt()
}

/// Scales the gradients down so that their norm is at most `limit` (0 is no limit). Returns them and their norm before.
pub(crate) fn clip<M: Module>(module: &M, mut grads: GradientsParams, limit: f64) -> (GradientsParams, f64) {
    struct Scale<'a>(&'a mut GradientsParams, f64);
    impl ModuleVisitor for Scale<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(grad) = self.0.remove::<D>(param.id) {
                self.0.register(param.id, grad * self.1);
            }
        }
    }
    let norm = global_norm(module, &grads);
    if limit > 0.0 && norm > limit {
        module.visit(&mut Scale(&mut grads, limit / norm));
    }
    (grads, norm)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::nn::{Linear, LinearConfig};
    use burn::tensor::Device;

    fn linear() -> Linear {
        settle(LinearConfig::new(3, 2).init(&Device::flex().autodiff()))
    }

    #[test]
    fn names_and_ids_depend_on_the_fields_alone() {
        let (first, second) = (names(&linear()), names(&linear()));
        assert_eq!(first.iter().map(|named| named.name.as_str()).collect::<Vec<_>>(), ["weight", "bias"]);
        assert_eq!(first[0].shape, [3, 2]);
        assert!(first.iter().zip(&second).all(|(a, b)| a.id == b.id));
    }

    #[test]
    fn gradients_are_clipped_by_their_norm_over_all_parameters() {
        let module = linear();
        let loss = module.forward(Tensor::<2>::ones([1, 3], &Device::flex().autodiff())).sum();
        let grads = GradientsParams::from_grads(loss.backward(), &module);
        // Gradient 1 for six weights and two biases.
        let (grads, norm) = clip(&module, grads, 0.25);
        assert!((norm - 8f64.sqrt()).abs() < 1e-6);
        assert!((global_norm(&module, &grads) - 0.25).abs() < 1e-6);
        assert_eq!(clip(&module, GradientsParams::new(), 0.25).1, 0.0, "no gradient is no NaN");
    }

    #[test]
    fn values_come_back_with_gradients() {
        let module = linear();
        let saved: BTreeMap<_, _> = values(&module).into_iter().collect();
        let other = with_values(linear(), saved.clone());
        assert_eq!(values(&other).into_iter().collect::<BTreeMap<_, _>>(), saved);
        assert!(other.weight.val().is_require_grad());
    }
}
