//! What the options accept, and what fresh parameters look like.

use burn::tensor::{Device, Tensor};
use thalweg_layers::activation::ActivationConfig;
use thalweg_layers::channel_mixer::ChannelMixerConfig;
use thalweg_layers::gated_delta_net::GatedDeltaNetConfig;
use thalweg_layers::hgrn::LowerBounds;
use thalweg_layers::lightning::slopes;
use thalweg_layers::rg_lru::RgLruConfig;
use thalweg_layers::{MixerConfig, MixerOptions, Site};

#[test]
fn a_bad_option_is_named() {
    for (json, field) in [
        (r#"{"type": "gla", "num_heads": 3}"#, "expand_k"),
        (r#"{"type": "gla", "num_heads": 0}"#, "num_heads"),
        (r#"{"type": "gla", "num_heads": 4, "num_kv_heads": 3}"#, "num_heads"),
        (r#"{"type": "gla", "expand_k": -1.0}"#, "expand_k"),
        (r#"{"type": "gla", "gate_logit_normalizer": 0.0}"#, "gate_logit_normalizer"),
        (r#"{"type": "hgrn", "expand_ratio": 0}"#, "expand_ratio"),
        (r#"{"type": "hgrn2", "expand_ratio": 5}"#, "hidden_size"),
        (r#"{"type": "delta_net", "conv_size": 1}"#, "conv_size"),
        (r#"{"type": "gated_delta_net", "num_heads": 2, "num_v_heads": 3}"#, "num_v_heads"),
        (r#"{"type": "gated_delta_net", "head_dim": 8, "expand_v": 0.3}"#, "expand_v"),
        (r#"{"type": "kda", "head_dim": 0}"#, "head_dim"),
        (r#"{"type": "retnet", "num_heads": 32}"#, "expand_k"),
        (r#"{"type": "lightning", "num_heads": 5}"#, "hidden_size"),
        (r#"{"type": "rg_lru", "max_radius": 1.0}"#, "max_radius"),
        (r#"{"type": "rg_lru", "num_heads": 5}"#, "lru_width"),
        (r#"{"type": "attention", "window": 0}"#, "window"),
        (r#"{"type": "attention", "partial_rotary_factor": 1.5}"#, "partial_rotary_factor"),
        (r#"{"type": "attention", "num_heads": 8, "num_kv_heads": 3}"#, "num_heads"),
    ] {
        let config: MixerConfig = serde_json::from_str(json).expect(json);
        let error = config.init(&Site::new(32), &Device::flex()).map(|_| ()).expect_err(json);
        assert_eq!(error.field, field, "{json}: {error}");
        let text = error.within("mixer").to_string();
        assert!(text.starts_with(&format!("mixer.{field}: ")), "{text}");
    }
    for (json, complaint) in [
        (r#"{"type": "gla", "heads": 2}"#, "heads"),
        (r#"{"type": "mamba9"}"#, "mamba9"),
        (r#"{"num_heads": 2}"#, "type"),
    ] {
        let error = serde_json::from_str::<MixerConfig>(json).expect_err(json).to_string();
        assert!(error.contains(complaint), "{error}");
    }
    let error = MixerConfig::from_kind("mamba9").expect_err("unknown").to_string();
    assert!(error.contains("mamba9") && error.contains("gated_delta_net"), "{error}");

    let swiglu: ChannelMixerConfig =
        serde_json::from_str(r#"{"type": "swiglu", "activation": "relu"}"#).expect("parses");
    assert_eq!(swiglu.validate(&Site::new(8)).expect_err("two activations").field, "activation");
    let smelu: ActivationConfig = serde_json::from_str(r#"{"type": "smelu", "beta": 0.0}"#).expect("parses");
    assert_eq!(smelu.validate().expect_err("no width").field, "activation.beta");
}

#[test]
fn options_survive_writing_and_reading() {
    for kind in
        ["gla", "hgrn", "hgrn2", "delta_net", "gated_delta_net", "kda", "retnet", "lightning", "rg_lru", "attention"]
    {
        let config = MixerConfig::from_kind(kind).expect(kind);
        assert_eq!(config.kind(), kind);
        let json = serde_json::to_string(&config).expect(kind);
        assert_eq!(serde_json::from_str::<MixerConfig>(&json).expect(&json), config);
    }
    for activation in [ActivationConfig::Golu, ActivationConfig::Swish { beta: 2.0, trainable: true }] {
        let json = serde_json::to_string(&activation).expect("serialises");
        assert_eq!(serde_json::from_str::<ActivationConfig>(&json).expect(&json), activation);
    }
}

fn values<const D: usize>(x: Tensor<D>) -> Vec<f32> {
    x.try_into_vec_as::<f32>().expect("f32")
}

/// `exp(-softplus(a))`, the radius, lies between 0.9 and 0.999, uniform in area.
#[test]
fn rg_lru_starts_with_its_radii_in_the_ring() {
    let site = Site::new(2048);
    let block = RgLruConfig::default().init(&site, &Device::flex()).expect("valid");
    let radii: Vec<f32> =
        values(block.rg_lru.recurrent_param.val()).into_iter().map(|a| 1.0 / (1.0 + a.exp())).collect();
    assert!(radii.iter().all(|r| (0.8999..0.9991).contains(r)), "{radii:?}");
    let area = radii.iter().map(|r| r * r).sum::<f32>() / radii.len() as f32;
    assert!((area - (0.81 + 0.998) / 2.0).abs() < 0.01, "{area}");
    let gate = values(block.rg_lru.input_gate_weight.val().square().mean());
    assert!((gate[0] - 1.0 / 256.0).abs() < 2e-4, "{gate:?}");
}

#[test]
fn gated_delta_net_starts_with_its_decay_in_range() {
    let config = GatedDeltaNetConfig { num_heads: 1024, head_dim: 1, expand_v: 1.0, ..Default::default() };
    let layer = config.init(&Site::new(1), &Device::flex()).expect("valid");
    let rates = values(layer.decay.a_log.val().exp());
    assert!(rates.iter().all(|a| (0.0..=16.001).contains(a)) && rates.iter().any(|a| *a > 14.0));
    let steps = values(layer.decay.dt_bias.val()).into_iter().map(|x| x.exp().ln_1p());
    assert!(steps.clone().all(|dt| (0.99e-3..0.1001).contains(&dt)), "{:?}", steps.collect::<Vec<_>>());
}

#[test]
fn lower_bounds_rise_from_layer_to_layer() {
    let bounds = LowerBounds::new(4, 3, &Device::flex()).forward();
    assert!(bounds[0].is_none());
    for (layer, bound) in bounds.into_iter().enumerate().skip(1) {
        let expected = layer as f32 / 4.0;
        assert!(values(bound.expect("a bound")).iter().all(|b| (b - expected).abs() < 1e-6));
    }
}

/// Heads forget at 2^(-8 (h + 1) / H) in the first layer and hardly at all in the last.
#[test]
fn lightning_slopes_follow_the_paper() {
    let first = slopes(8, 0, 3);
    assert!((first[0] - 0.5 * (1.0 + 1e-5)).abs() < 1e-12 && (first[7] - 2f64.powi(-8) * (1.0 + 1e-5)).abs() < 1e-12);
    assert!(slopes(8, 2, 3)[0] < 1e-5);
}
