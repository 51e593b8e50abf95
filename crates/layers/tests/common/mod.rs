//! All mixers, and what tests compare.
#![allow(dead_code)] // Each test has use for some.

use burn::tensor::{Device, Distribution, Tensor};
use thalweg_layers::{Context, Mixer, MixerConfig, Site};

pub const HIDDEN: usize = 16;

/// Every mixer, and those of its options that change what it carries.
pub fn cases() -> Vec<(&'static str, MixerConfig)> {
    [
        ("gla", r#"{"type": "gla", "num_heads": 2}"#),
        (
            "gla, conv and shared keys",
            r#"{"type": "gla", "num_heads": 4, "num_kv_heads": 2, "use_short_conv": true}"#,
        ),
        ("hgrn", r#"{"type": "hgrn"}"#),
        ("hgrn2", r#"{"type": "hgrn2", "expand_ratio": 8}"#),
        ("delta_net", r#"{"type": "delta_net", "num_heads": 2, "allow_neg_eigval": true}"#),
        (
            "delta_net, no conv",
            r#"{"type": "delta_net", "num_heads": 2, "use_short_conv": false, "use_gate": true}"#,
        ),
        (
            "gated_delta_net",
            r#"{"type": "gated_delta_net", "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5}"#,
        ),
        ("kda", r#"{"type": "kda", "num_heads": 2, "head_dim": 8}"#),
        ("retnet", r#"{"type": "retnet", "num_heads": 2}"#),
        ("lightning", r#"{"type": "lightning", "num_heads": 2}"#),
        ("rg_lru", r#"{"type": "rg_lru", "num_heads": 4, "lru_width": 24}"#),
        ("attention", r#"{"type": "attention", "num_heads": 4, "num_kv_heads": 2}"#),
        (
            "attention, window",
            r#"{"type": "attention", "num_heads": 2, "window": 5, "partial_rotary_factor": 0.5, "qk_norm": true, "output_gate": true}"#,
        ),
    ]
    .map(|(name, json)| (name, serde_json::from_str(json).expect(name)))
    .into()
}

pub fn device() -> Device {
    Device::flex()
}

pub fn site() -> Site {
    Site::new(HIDDEN).at(1, 3).with_initializer_range(0.3)
}

pub fn mixer(config: &MixerConfig) -> Mixer {
    config.init(&site(), &device()).expect("a valid config")
}

pub fn context(config: &MixerConfig) -> Context {
    let bound = config.lower_bound_features(&Site::new(HIDDEN));
    Context::default().with_lower_bound(bound.map(|n| Tensor::full([n], 0.3, &device())))
}

pub fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device())
}

/// Largest difference over the largest magnitude.
pub fn distance<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f32 {
    let size = b.clone().abs().max().into_scalar::<f32>().max(1e-6);
    (a.clone() - b.clone()).abs().max().into_scalar::<f32>() / size
}
