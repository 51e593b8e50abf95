//! Every layer takes activations and parameters in f32, bf16 or f16, in any combination: outputs and gradients have the
//! type of what they belong to, and lie as near to those of f32 as the fewer digits allow.

mod common;

use std::sync::{Mutex, MutexGuard, PoisonError};

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{DType, Device, Distribution, Gradients, Tensor};
use common::{HIDDEN, cases, context, site};
use thalweg_layers::activation::ActivationConfig;
use thalweg_layers::channel_mixer::{ChannelMixerConfig, ChannelMixerKind};
use thalweg_layers::hgrn::LowerBounds;
use thalweg_layers::norm::{GatedRmsNorm, OutputGate, RmsNormConfig};
use thalweg_layers::rotary::Rotary;
use thalweg_layers::{Context, Mixer, Site};

const SEED: u64 = 2;
const TYPES: [DType; 3] = [DType::F32, DType::BF16, DType::F16];

fn device() -> Device {
    Device::flex().autodiff()
}

/// The module with its parameters in another type.
fn cast<M: Module>(module: &M, dtype: DType) -> M {
    struct Cast(DType);
    impl ModuleMapper for Cast {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| value.without_autodiff().cast(self.0).autodiff().require_grad())
        }
    }
    module.clone().map(&mut Cast(dtype))
}

/// Checks that every parameter has a finite gradient of its own type.
fn check_parameters<M: Module>(what: &str, module: &M, gradients: &Gradients) {
    struct Check<'a>(&'a str, &'a Gradients, usize);
    impl ModuleVisitor for Check<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.val();
            let gradient = value.grad(self.1).unwrap_or_else(|| panic!("{}: no gradient {}", self.0, self.2));
            assert_eq!(gradient.dtype(), value.dtype(), "{}: gradient {}", self.0, self.2);
            assert!(finite(&gradient), "{}: gradient {}", self.0, self.2);
            self.2 += 1;
        }
    }
    module.visit(&mut Check(what, gradients, 0));
}

fn finite<const D: usize>(x: &Tensor<D>) -> bool {
    x.clone().into_data().iter::<f32>().all(f32::is_finite)
}

/// The relative error that a layer's value may have in these types: half a unit in the last place of the coarser one, times
/// the roundings that lie on top of each other in it. Gradients go through twice as many.
fn tolerance(types: [DType; 2]) -> f32 {
    let unit = |dtype| match dtype {
        DType::BF16 => 2f32.powi(-9),
        DType::F16 => 2f32.powi(-12),
        _ => 2f32.powi(-21),
    };
    8.0 * unit(types[0]).max(unit(types[1]))
}

/// The size of the difference over the size of what is expected.
fn distance<const D: usize>(found: Tensor<D>, expected: Tensor<D>) -> f32 {
    let size = |x: Tensor<D>| x.square().sum().into_scalar::<f32>().sqrt();
    size(found - expected.clone()) / size(expected)
}

/// Fixes the random numbers of a test, which no other may draw from meanwhile.
fn seeded() -> MutexGuard<'static, ()> {
    static SEEDED: Mutex<()> = Mutex::new(());
    let guard = SEEDED.lock().unwrap_or_else(PoisonError::into_inner);
    Device::flex().seed(SEED);
    guard
}

/// Runs a layer in all combinations of types. The f32 run that each is compared with has the same rounded numbers.
fn check<M: Module, const D: usize>(name: &str, module: &M, shape: [usize; D], f: impl Fn(&M, Tensor<D>) -> Tensor<D>) {
    let noise = || Tensor::<D>::random(shape, Distribution::Normal(0.0, 1.0), &Device::flex()).into_data();
    let (input, weights) = (noise(), noise());
    for parameters in TYPES {
        for dtype in TYPES {
            let what = format!("{name}, parameters {parameters:?}, input {dtype:?}");
            let run = |module: &M, dtype: DType, rounded: DType| {
                let x =
                    Tensor::<D>::from_data(input.clone(), &device()).cast(rounded).cast(dtype).detach().require_grad();
                let y = f(module, x.clone());
                let weights = Tensor::<D>::from_data(weights.clone(), &device());
                let gradients = (y.clone().cast(DType::F32) * weights).sum().backward();
                check_parameters(&what, module, &gradients);
                (y.inner(), x.grad(&gradients).expect("a gradient"))
            };
            let module = cast(module, parameters);
            let (y, dx) = run(&module, dtype, dtype);
            assert_eq!((y.dims(), y.dtype(), dx.dtype()), (shape, dtype, dtype), "{what}");
            let (expected, expected_dx) = run(&cast(&module, DType::F32), DType::F32, dtype);
            for (tensor, found, expected, times) in [("y", y, expected, 1.0), ("dx", dx, expected_dx, 2.0)] {
                let found = found.cast(DType::F32);
                assert!(finite(&found), "{what}: {tensor}");
                let (error, limit) = (distance(found, expected), times * tolerance([parameters, dtype]));
                assert!(error < limit, "{what}: {tensor} is off by {error}, at most {limit}");
            }
        }
    }
}

/// A prompt from no state and steps from the empty one; then both go on.
fn all_calls(mixer: &Mixer, x: Tensor<3>, context: &Context) -> Tensor<3> {
    let [batch, time, _] = x.dims();
    let half = time / 2;
    let (first, mut state) = mixer.forward(x.clone().narrow(1, 0, half), None, context).expect("a prompt");
    let mut outputs = vec![first];
    let mut fresh = mixer.initial_state(batch, &x.device());
    for t in 0..half {
        let token = |t| x.clone().narrow(1, t, 1).squeeze_dim(1);
        let (y, next) = mixer.step(token(half + t), state, context).expect("a step");
        let (other, empty) = mixer.step(token(t), fresh, context).expect("a step from the empty state");
        outputs.push((y + other).unsqueeze_dim(1));
        (state, fresh) = (next, empty);
    }
    Tensor::cat(outputs, 1)
}

#[test]
fn mixers_take_any_types() {
    let _guard = seeded();
    for (name, config) in cases() {
        let context = context(&config);
        let bound = context.lower_bound.clone().map(Tensor::autodiff);
        // Small outputs that are made large again would measure the digits that are lost in summing them.
        let module = config.init(&site().with_norm_eps(0.1), &Device::flex()).expect("a valid config");
        let context = context.with_lower_bound(bound);
        check(name, &module, [2, 12, HIDDEN], |mixer, x| all_calls(mixer, x, &context));
        check(&format!("{name}, packed"), &module, [1, 12, HIDDEN], |mixer, x| {
            let context = context.clone().with_cu_seqlens(vec![0, 1, 5, 12]);
            let (y, state) = mixer.forward(x.clone(), None, &context).expect("packed");
            y + mixer.forward(x, Some(state), &context).expect("packed").0
        });
    }
}

#[test]
fn channel_mixers_and_activations_take_any_types() {
    let _guard = seeded();
    let site = Site::new(HIDDEN).with_initializer_range(0.3);
    let mut configs: Vec<_> = [
        ChannelMixerKind::Glu,
        ChannelMixerKind::Bilinear,
        ChannelMixerKind::Reglu,
        ChannelMixerKind::Geglu,
        ChannelMixerKind::Swiglu,
        ChannelMixerKind::Mlp,
    ]
    .map(ChannelMixerConfig::new)
    .into();
    configs.push(ChannelMixerConfig { bias: true, ..ChannelMixerConfig::default() });
    for activation in [
        r#""sigmoid""#,
        r#""relu""#,
        r#""prelu""#,
        r#""gelu""#,
        r#""gelu_tanh""#,
        r#""silu""#,
        r#"{"type": "swish", "beta": 1.7}"#,
        r#"{"type": "swish", "trainable": true}"#,
        r#"{"type": "smelu", "beta": 2.0}"#,
        r#""golu""#,
        r#""helu""#,
        r#""xatlu""#,
        r#""xgelu""#,
        r#""xsilu""#,
    ] {
        let activation: ActivationConfig = serde_json::from_str(activation).expect(activation);
        check(&format!("{activation:?}"), &activation.init(&device()), [3, 5, 7], |f, x| f.forward(x));
        check(&format!("{activation:?}, gate"), &activation.init(&device()), [3, 5], |f, x| f.gate(x.clone(), x));
        configs.push(ChannelMixerConfig::new(ChannelMixerKind::Gated).with_activation(activation));
    }
    for config in configs {
        let mixer = config.clone().with_intermediate_size(20).init(&site, &device()).expect("valid");
        check(&format!("{config:?}"), &mixer, [2, 3, HIDDEN], |mixer, x| mixer.forward(x));
    }
}

#[test]
fn norms_and_rotations_take_any_types() {
    let _guard = seeded();
    for unit_offset in [false, true] {
        let norm = RmsNormConfig::new(24).with_unit_offset(unit_offset).init(&device());
        check("rms_norm", &norm, [4, 24], |norm, x| norm.forward(x));
    }
    for gate in [OutputGate::Silu, OutputGate::Sigmoid] {
        let norm = GatedRmsNorm::new(24, 1e-6, gate, &device());
        check("gated_rms_norm", &norm, [4, 24], |norm, x| norm.forward(x.clone(), x));
        check("gated_rms_norm without a gate", &norm, [4, 24], |norm, x| norm.normalize(x));
    }
    let rotation = Rotary::new(6, 100.0).at(&[3, 4, 1000], 1, &device());
    let nothing = ActivationConfig::Identity.init(&device());
    check("rotary", &nothing, [2, 3, 2, 8], |_, x| rotation.apply(x));
    // Bounds of gates are f32 from parameters of any type.
    for dtype in TYPES {
        let bounds = cast(&LowerBounds::new(3, 5, &device()), dtype).forward();
        assert_eq!(bounds[2].as_ref().expect("a bound").dtype(), DType::F32);
    }
}
