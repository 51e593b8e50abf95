//! Activations far out: at large and infinite arguments they and their derivatives have their limits, in every element type.

use std::f64::consts::FRAC_1_PI;

use burn::tensor::{DType, Device, Tensor, TensorData};
use thalweg_layers::activation::{Activation, ActivationConfig};
use thalweg_scan::{GluActivation, Path, glu};

/// What is left of an activation: a constant, a multiple of `x`, or `x` and a constant.
#[derive(Debug, Clone, Copy)]
enum End {
    Constant(f64),
    Multiple(f64),
    Shifted(f64),
}

use End::{Constant, Multiple, Shifted};

/// A config, and what it is at minus infinity and at infinity; the derivative is that of this. A trained range of 0, as at the
/// start. `prelu` with a slope of 0 has no limit at minus infinity, and none of the activations where the derivative by the
/// trained number is asked for: it is infinite there.
const ENDS: [(&str, End, End); 15] = [
    (r#""identity""#, Multiple(1.0), Multiple(1.0)),
    (r#""sigmoid""#, Constant(0.0), Constant(1.0)),
    (r#""relu""#, Constant(0.0), Multiple(1.0)),
    (r#"{"type": "prelu", "slope": 0.25}"#, Multiple(0.25), Multiple(1.0)),
    (r#""gelu""#, Constant(0.0), Multiple(1.0)),
    (r#""gelu_tanh""#, Constant(0.0), Multiple(1.0)),
    (r#""silu""#, Constant(0.0), Multiple(1.0)),
    (r#"{"type": "swish", "beta": 1.5}"#, Constant(0.0), Multiple(1.0)),
    (r#"{"type": "swish", "beta": 1.5, "trainable": true}"#, Constant(0.0), Multiple(1.0)),
    (r#"{"type": "smelu", "beta": 2.0}"#, Constant(0.0), Multiple(1.0)),
    (r#""golu""#, Constant(0.0), Multiple(1.0)),
    (r#""helu""#, Constant(0.0), Multiple(1.0)),
    (r#""xatlu""#, Constant(-FRAC_1_PI), Shifted(-FRAC_1_PI)),
    (r#""xgelu""#, Constant(0.0), Multiple(1.0)),
    (r#""xsilu""#, Constant(0.0), Multiple(1.0)),
];

/// A type, its largest number and how far off a result in it may be.
const TYPES: [(DType, f64, f64); 3] =
    [(DType::F32, f32::MAX as f64, 1e-5), (DType::BF16, 3.389_531_4e38, 1e-2), (DType::F16, 65504.0, 2e-3)];

/// `f` and its derivative at `x`.
fn evaluate(f: impl Fn(Tensor<1>) -> Tensor<1>, x: &[f64], dtype: DType, device: &Device) -> [Vec<f64>; 2] {
    let x = Tensor::from_data(TensorData::new(x.to_vec(), [x.len()]), (device, dtype)).require_grad();
    let y = f(x.clone());
    let dx = x.grad(&y.clone().sum().backward()).expect("a gradient");
    [y, dx].map(|t| t.try_into_vec_as::<f64>().expect("numbers"))
}

fn check(name: &str, [low, high]: [End; 2], f: impl Fn(Tensor<1>) -> Tensor<1>, dtype: DType, device: &Device) {
    let (largest, tolerance) = TYPES.iter().find(|t| t.0 == dtype).map(|t| (t.1, t.2)).expect("a type");
    let far = [30.0, 256.0, 1e3, 1e20, largest, f64::INFINITY];
    let far: Vec<f64> = far.into_iter().filter(|x| *x <= largest || x.is_infinite()).collect();
    for (end, sign) in [(low, -1.0), (high, 1.0)] {
        let x: Vec<f64> = far.iter().map(|x| sign * x).collect();
        let [y, dx] = evaluate(&f, &x, dtype, device);
        for ((x, y), dx) in x.iter().zip(y).zip(dx) {
            let (value, slope) = match end {
                Constant(c) => (c, 0.0),
                Multiple(m) => (m * x, m),
                Shifted(c) => (x + c, 1.0),
            };
            // The arctangent alone is not yet there at 30.
            let slack = tolerance * value.abs().max(1.0) + if name.contains("xatlu") { 1e-3 } else { 0.0 };
            assert!(y == value || (y - value).abs() <= slack, "{name} {dtype:?} at {x}: {y}, limit {value}");
            assert!((dx - slope).abs() <= tolerance + 1e-3, "{name}' {dtype:?} at {x}: {dx}, limit {slope}");
        }
    }
}

#[test]
fn activations_have_their_limits() {
    let device = Device::flex().autodiff();
    for (json, low, high) in ENDS {
        let config: ActivationConfig = serde_json::from_str(json).expect(json);
        let activation: Activation = config.init(&device);
        for (dtype, ..) in TYPES {
            check(json, [low, high], |x| activation.forward(x), dtype, &device);
        }
    }
}

/// The tensor operations that run where there is no kernel.
#[test]
fn gated_units_have_their_limits_without_a_kernel() {
    let device = Device::flex().autodiff();
    for (f, ends) in [
        (GluActivation::Sigmoid, [Constant(0.0), Constant(1.0)]),
        (GluActivation::Silu, [Constant(0.0), Multiple(1.0)]),
        (GluActivation::GeluTanh, [Constant(0.0), Multiple(1.0)]),
    ] {
        for path in [Path::Auto, Path::Portable] {
            let unit = |x: Tensor<1>| glu(f, x, None, path).expect("a unit");
            TYPES.iter().for_each(|&(dtype, ..)| check(&format!("{f:?} {path:?}"), ends, unit, dtype, &device));
        }
    }
}
