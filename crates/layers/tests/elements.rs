//! Activations, norms and channel mixers against their closed forms in f64.

use std::f64::consts::PI;

use burn::module::Param;
use burn::tensor::{Device, Distribution, Tensor};
use thalweg_layers::Site;
use thalweg_layers::activation::{Activation, ActivationConfig};
use thalweg_layers::channel_mixer::{ChannelMixerConfig, ChannelMixerKind};
use thalweg_layers::norm::{GatedRmsNorm, OutputGate, RmsNormConfig};
use thalweg_layers::rotary::Rotary;

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// The normal distribution function, by Simpson's rule on its density.
fn phi(x: f64) -> f64 {
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * PI).sqrt();
    let steps = 2000;
    let h = x / f64::from(steps);
    let inner: f64 = (1..steps).map(|i| density(f64::from(i) * h) * if i % 2 == 1 { 4.0 } else { 2.0 }).sum();
    0.5 + (density(0.0) + inner + density(x)) * h / 3.0
}

fn smelu(x: f64, beta: f64) -> f64 {
    match x {
        x if x <= -beta => 0.0,
        x if x >= beta => x,
        x => (x + beta).powi(2) / (4.0 * beta),
    }
}

type Case = (&'static str, fn(f64) -> f64);

/// A config as it is written, and the function it stands for. Trained ranges are set to 0.3 before they are compared.
const CASES: [Case; 15] = [
    (r#""identity""#, |x| x),
    (r#""sigmoid""#, sigmoid),
    (r#""relu""#, |x| x.max(0.0)),
    (r#"{"type": "prelu", "slope": 0.3}"#, |x| x.max(0.0) + 0.3 * x.min(0.0)),
    (r#""gelu""#, |x| x * phi(x)),
    (r#""gelu_tanh""#, |x| 0.5 * x * (1.0 + ((2.0 / PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())),
    (r#""silu""#, |x| x * sigmoid(x)),
    (r#"{"type": "swish", "beta": 1.7}"#, |x| x * sigmoid(1.7 * x)),
    (r#"{"type": "swish", "trainable": true}"#, |x| x * sigmoid(0.3 * x)),
    (r#"{"type": "smelu", "beta": 2.0}"#, |x| smelu(x, 2.0)),
    (r#""golu""#, |x| x * (-(-x).exp()).exp()),
    (r#""helu""#, |x| x.max(0.0)),
    (r#""xatlu""#, |x| x * ((x.atan() / PI + 0.5) * 1.6 - 0.3)),
    (r#""xgelu""#, |x| x * (phi(x) * 1.6 - 0.3)),
    (r#""xsilu""#, |x| x * (sigmoid(x) * 1.6 - 0.3)),
];

fn activation(json: &str, device: &Device) -> Activation {
    let config: ActivationConfig = serde_json::from_str(json).expect(json);
    let mut activation = config.init(device);
    if activation.alpha.is_some() {
        activation.alpha = Some(Param::from_tensor(Tensor::full([1], 0.3, device)));
    }
    activation
}

/// Values and derivatives of `activation` at `points`.
fn evaluate(activation: &Activation, points: &[f32], device: &Device) -> (Vec<f32>, Vec<f32>) {
    let x = Tensor::<1>::from_floats(points, device).require_grad();
    let y = activation.forward(x.clone());
    let gradients = y.clone().sum().backward();
    let dx = x.grad(&gradients).expect("a gradient");
    let values = |t: Tensor<1>| t.try_into_vec_as::<f32>().expect("f32");
    (values(y), values(dx))
}

#[test]
fn activations_are_their_closed_forms_and_so_are_their_derivatives() {
    let device = Device::flex().autodiff();
    let points: Vec<f32> = (-27..=27).map(|i| i as f32 * 0.21 + 0.013).collect();
    for (json, f) in CASES {
        let (values, derivatives) = evaluate(&activation(json, &device), &points, &device);
        for ((x, y), dy) in points.iter().zip(&values).zip(&derivatives) {
            let exact = f64::from(*x);
            let expected = f(exact);
            assert!(
                (f64::from(*y) - expected).abs() < 3e-6 * expected.abs().max(1.0),
                "{json} at {x}: {y} is not {expected}"
            );
            // HeLU's point is that its gradient is not the derivative.
            let slope = match json {
                r#""helu""# => f64::from(u8::from(exact > -0.05)),
                _ => (f(exact + 1e-5) - f(exact - 1e-5)) / 2e-5,
            };
            assert!((f64::from(*dy) - slope).abs() < 2e-5, "{json} at {x}: slope {dy} is not {slope}");
        }
        // Far out there is neither overflow nor 0 * inf.
        let (values, derivatives) = evaluate(&activation(json, &device), &[-1e4, -200.0, -90.0, 90.0, 1e4], &device);
        assert!(values.iter().chain(&derivatives).all(|y| y.is_finite()), "{json}: {values:?} {derivatives:?}");
    }
}

#[test]
fn trained_ranges_start_at_the_plain_activation_and_have_gradients() {
    let device = Device::flex().autodiff();
    let x = Tensor::<2>::random([4, 5], Distribution::Normal(0.0, 2.0), &device);
    for (expanded, plain) in
        [(ActivationConfig::Xgelu, ActivationConfig::Gelu), (ActivationConfig::Xsilu, ActivationConfig::Silu)]
    {
        let module = expanded.init(&device);
        let y = module.forward(x.clone());
        let difference = (y.clone() - plain.init(&device).forward(x.clone())).abs().max();
        assert!(difference.into_scalar::<f32>() < 1e-6, "{expanded:?}");
        let gradients = y.sum().backward();
        let alpha = module.alpha.expect("a range").val();
        let slope = alpha.grad(&gradients).expect("a gradient").into_scalar::<f32>();
        assert!(slope.is_finite() && slope != 0.0, "{expanded:?}: {slope}");
    }
}

#[test]
fn norms_are_their_closed_forms() {
    let device = Device::flex();
    let x = Tensor::<2>::from_floats([[3.0, -4.0, 0.0, 5.0]], &device);
    let close = |a: Tensor<2>, b: [f32; 4]| {
        let difference = (a - Tensor::<2>::from_floats([b], &device)).abs().max();
        assert!(difference.into_scalar::<f32>() < 1e-6);
    };
    let rms = 12.5f32.sqrt();
    let mut norm = RmsNormConfig::new(4).with_eps(1e-12).with_unit_offset(true).init(&device);
    norm.weight = Param::from_tensor(Tensor::from_floats([0.0, 1.0, 2.0, -1.0], &device));
    close(norm.forward(x.clone()), [3.0 / rms, -8.0 / rms, 0.0, 0.0]);
    norm.unit_offset = false;
    close(norm.forward(x.clone()), [0.0, -4.0 / rms, 0.0, -5.0 / rms]);

    let gate = GatedRmsNorm::new(4, 1e-12, OutputGate::Sigmoid, &device);
    close(gate.forward(x.clone(), x.zeros_like()), [1.5 / rms, -2.0 / rms, 0.0, 2.5 / rms]);
}

#[test]
fn channel_mixers_are_their_formulas() {
    let device = Device::flex();
    let site = Site::new(6).with_initializer_range(0.5);
    let x = Tensor::<3>::random([2, 3, 6], Distribution::Normal(0.0, 1.0), &device);
    for (kind, gate) in [
        (ChannelMixerKind::Glu, Some(ActivationConfig::Sigmoid)),
        (ChannelMixerKind::Bilinear, Some(ActivationConfig::Identity)),
        (ChannelMixerKind::Reglu, Some(ActivationConfig::Relu)),
        (ChannelMixerKind::Geglu, Some(ActivationConfig::Gelu)),
        (ChannelMixerKind::Swiglu, Some(ActivationConfig::Silu)),
        (ChannelMixerKind::Gated, Some(ActivationConfig::Silu)),
        (ChannelMixerKind::Mlp, None),
    ] {
        let mixer = ChannelMixerConfig::new(kind).with_intermediate_size(10).init(&site, &device).expect("valid");
        let up = mixer.up_proj.forward(x.clone());
        let inner = match gate {
            Some(f) => {
                let logits = mixer.gate_proj.as_ref().expect("a gate").forward(x.clone());
                f.init(&device).forward(logits) * up
            }
            None => ActivationConfig::Gelu.init(&device).forward(up),
        };
        let expected = mixer.down_proj.forward(inner);
        let y = mixer.forward(x.clone());
        assert!((y - expected).abs().max().into_scalar::<f32>() < 1e-6, "{kind:?}");
    }
}

#[test]
fn rotation_keeps_lengths_and_sees_distances_only() {
    let device = Device::flex();
    let rotary = Rotary::new(4, 100.0);
    let [q, k] = [(); 2].map(|()| Tensor::<4>::random([1, 1, 1, 6], Distribution::Normal(0.0, 1.0), &device));
    let at = |x: &Tensor<4>, position| rotary.at(&[position], 1, &device).apply(x.clone());
    let score = |i, j| (at(&q, i) * at(&k, j)).sum().into_scalar::<f32>();
    assert!((score(7, 3) - score(1004, 1000)).abs() < 1e-4);
    assert!((score(7, 3) - score(7, 4)).abs() > 1e-4);
    // The last two of six features are not rotated.
    let rest = at(&q, 9).narrow(3, 4, 2) - q.clone().narrow(3, 4, 2);
    assert_eq!(rest.abs().max().into_scalar::<f32>(), 0.0);
}

/// Angles are exact far out, and a position's rotation has the same bits whatever positions it is asked for with.
#[test]
fn rotations_far_out_are_exact_and_do_not_depend_on_the_split() {
    let device = Device::flex();
    let (theta, half) = (10_000.0f64, 32);
    let rotary = Rotary::new(2 * half, theta);
    let ones =
        Tensor::<4>::cat(vec![Tensor::ones([1, 1, 1, half], &device), Tensor::zeros([1, 1, 1, half], &device)], 3);
    let values = |positions: &[usize]| {
        let x = ones.clone().expand([1, positions.len(), 1, 2 * half]);
        rotary.at(positions, 1, &device).apply(x).try_into_vec_as::<f32>().expect("f32")
    };
    for first in [0, (1 << 16) - 3, (1 << 20) - 3, (1 << 24) - 3, (1 << 28) - 3] {
        let positions: Vec<usize> = (first..first + 7).collect();
        let together = values(&positions);
        for (row, position) in together.chunks(2 * half).zip(&positions) {
            assert_eq!(values(&[*position]), row, "position {position}");
            for i in 0..half {
                // The angle in whole turns and the rest of one, whose product with the position is exact to the last bits.
                let turns = theta.powf(-(i as f64) / half as f64) / (2.0 * PI);
                let whole = (turns * f64::from(1 << 26)).floor() / f64::from(1 << 26);
                let (near, far) = ((*position as f64 * whole).fract(), *position as f64 * (turns - whole));
                let angle = 2.0 * PI * (near + far);
                for (value, expected) in [(row[i], angle.cos()), (row[half + i], angle.sin())] {
                    let error = (f64::from(value) - expected).abs();
                    assert!(error < 1e-6, "position {position}, pair {i}: {value} is not {expected}");
                }
            }
        }
    }
}
