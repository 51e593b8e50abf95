//! The layers against whole tiny models of other programs: the logits of a sequence, the logits of cached steps after it,
//! and the gradient of every parameter (`tests/golden/README.md` says how these were made).

mod model;
mod weights;

use burn::module::Module;
use burn::tensor::activation::log_softmax;
use burn::tensor::{Device, Tensor};

use model::{Model, Peer};
use weights::{CompareGradients, File, Load};

/// Largest difference over the largest magnitude.
fn distance<const D: usize>(a: &Tensor<D>, b: &Tensor<D>) -> f32 {
    let size = b.clone().abs().max().into_scalar::<f32>().max(1e-6);
    (a.clone() - b.clone()).abs().max().into_scalar::<f32>() / size
}

fn check(peer: &Peer) {
    let folder = peer.folder;
    let device = Device::flex().autodiff();
    let weights = File::open(folder, "model.safetensors");
    let golden = File::open(folder, "golden.safetensors");
    let mut load = Load { peer, file: &weights, path: Vec::new() };
    let model = Model::new(peer, &device).map(&mut load);

    let ids = golden.ids("input_ids", &device);
    let [batch, time] = ids.dims();
    let (logits, mut states) = model.forward(ids.clone(), None);
    let error = distance(&logits, &golden.floats("logits", &device));
    assert!(error < 2e-5, "{folder}: logits differ by {error}");

    let steps = golden.ids("step_ids", &device);
    let expected = golden.floats::<3>("step_logits", &device);
    for t in 0..steps.dims()[1] {
        let (logits, next) = model.forward(steps.clone().narrow(1, t, 1), Some(states));
        let error = distance(&logits, &expected.clone().narrow(1, t, 1));
        assert!(error < 2e-5, "{folder}: logits of step {t} differ by {error}");
        states = next;
    }

    let predicted = log_softmax(logits.narrow(1, 0, time - 1), 2);
    let targets = ids.narrow(1, 1, time - 1).reshape([batch, time - 1, 1]);
    let loss = -predicted.gather(2, targets).mean();
    let error = distance(&loss, &golden.floats("loss", &device));
    assert!(error < 1e-5, "{folder}: loss differs by {error}");
    let gradients = loss.backward();
    let mut compare = CompareGradients {
        peer,
        file: &golden,
        gradients: &gradients,
        path: Vec::new(),
        worst: (0.0, String::new()),
        count: 0,
    };
    model.visit(&mut compare);
    let (error, path) = compare.worst;
    assert!(compare.count > 10 && error < peer.gradient_tolerance, "{folder}: gradient of {path} differs by {error}");
}

/// What all of flash-linear-attention's models share.
fn fla(folder: &'static str, mixers: &[&'static str], names: &'static [(&'static str, &'static str)]) -> Peer {
    Peer {
        folder,
        mixers: mixers.to_vec(),
        channel_mixer: r#"{"type": "swiglu", "intermediate_size": 32}"#,
        norm_eps: 1e-6,
        unit_offset: false,
        post_norm_experts: false,
        embedding_scale: 1.0,
        soft_cap: None,
        tied: false,
        gradient_tolerance: 2e-5,
        names,
    }
}

/// Replacements that all of flash-linear-attention's models need, after those of the mixer.
macro_rules! fla_names {
    ($($pair:expr),*) => {
        &[
            $($pair,)*
            (".conv.q.weight", ".q_conv1d.weight"),
            (".conv.k.weight", ".k_conv1d.weight"),
            (".conv.v.weight", ".v_conv1d.weight"),
            ("decay.a_log", "A_log"),
            ("decay.dt_bias", "dt_bias"),
            (".norm1.", ".attn_norm."),
            (".norm2.", ".mlp_norm."),
            ("channels.Dense", "mlp"),
            ("blocks.", "model.layers."),
            ("embed", "model.embeddings.weight"),
            ("head_proj", "lm_head.weight"),
            ("lower_bounds.weight", "model.lower_bounds"),
        ]
    };
}

#[test]
fn gla_is_the_peers() {
    check(&fla(
        "fla_gla",
        &[r#"{"type": "gla", "num_heads": 2}"#; 2],
        fla_names![("mixer.Gla.norm.", "attn.g_norm_swish_gate."), ("mixer.Gla.", "attn.")],
    ));
}

#[test]
fn hgrn_is_the_peers() {
    check(&fla(
        "fla_hgrn",
        &[r#"{"type": "hgrn"}"#; 2],
        fla_names![("mixer.Hgrn.norm.", "attn.g_norm."), ("mixer.Hgrn.", "attn.")],
    ));
}

#[test]
fn hgrn2_is_the_peers() {
    check(&fla(
        "fla_hgrn2",
        &[r#"{"type": "hgrn2", "expand_ratio": 16}"#; 2],
        fla_names![("mixer.Hgrn2.norm.", "attn.g_norm."), ("mixer.Hgrn2.", "attn.")],
    ));
}

#[test]
fn delta_net_is_the_peers() {
    check(&fla(
        "fla_delta_net",
        &[r#"{"type": "delta_net", "num_heads": 2}"#; 2],
        fla_names![("mixer.DeltaNet.norm.", "attn.o_norm."), ("mixer.DeltaNet.", "attn.")],
    ));
}

#[test]
fn retnet_is_the_peers() {
    check(&fla(
        "fla_retnet",
        &[r#"{"type": "retnet", "num_heads": 2}"#; 2],
        fla_names![("mixer.Retnet.norm.", "attn.g_norm_swish_gate."), ("mixer.Retnet.", "attn.")],
    ));
}

#[test]
fn gated_delta_net_with_attention_is_the_peers() {
    let delta = r#"{"type": "gated_delta_net", "num_heads": 2, "head_dim": 8, "expand_v": 1.0}"#;
    let attention = r#"{"type": "attention", "num_heads": 4, "num_kv_heads": 2}"#;
    // The same, at 2.6e-5.
    check(&Peer {
        gradient_tolerance: 5e-5,
        ..fla(
            "fla_gated_deltanet_hybrid",
            &[delta, attention, delta],
            fla_names![
                ("mixer.GatedDeltaNet.norm.", "attn.o_norm."),
                ("mixer.GatedDeltaNet.", "attn."),
                ("mixer.Attention.", "attn.")
            ],
        )
    });
}

#[test]
fn griffin_is_the_peers() {
    let recurrent = r#"{"type": "rg_lru", "num_heads": 4}"#;
    let local = r#"{"type": "attention", "num_heads": 4, "num_kv_heads": 1, "window": 8, "partial_rotary_factor": 0.5, "o_bias": true}"#;
    check(&Peer {
        channel_mixer: r#"{"type": "gated", "activation": "gelu_tanh", "intermediate_size": 48, "bias": true}"#,
        unit_offset: true,
        // The square root of the width, rounded to bf16.
        embedding_scale: 5.65625,
        soft_cap: Some(30.0),
        tied: true,
        ..fla(
            "recurrent_gemma",
            &[recurrent, recurrent, local],
            &[
                ("mixer.RgLru.", "temporal_block."),
                ("mixer.Attention.", "temporal_block."),
                (".norm1.", ".temporal_pre_norm."),
                (".norm2.", ".channel_pre_norm."),
                ("channels.Dense", "mlp_block"),
                ("blocks.", "model.layers."),
                ("embed", "model.embed_tokens.weight"),
            ],
        )
    });
}

#[test]
fn qwen3_next_is_the_peers() {
    let delta = r#"{"type": "gated_delta_net", "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.0}"#;
    let attention = r#"{"type": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "partial_rotary_factor": 0.25,
        "qk_norm": true, "norm_unit_offset": true, "output_gate": true}"#;
    check(&Peer {
        channel_mixer: r#"{"type": "swiglu", "intermediate_size": 48}"#,
        unit_offset: true,
        // The peer's gradients, in f32, are up to 2.8e-4 away from those of this model in f64: its keys are nearly
        // as short as the epsilon of their norm.
        gradient_tolerance: 5e-4,
        ..fla(
            "qwen3_next_dense",
            &[delta, delta, delta, attention],
            &[
                ("mixer.GatedDeltaNet.decay.a_log", "linear_attn.A_log"),
                ("mixer.GatedDeltaNet.decay.dt_bias", "linear_attn.dt_bias"),
                ("mixer.GatedDeltaNet.o_proj.", "linear_attn.out_proj."),
                ("mixer.GatedDeltaNet.", "linear_attn."),
                ("mixer.Attention.", "self_attn."),
                (".norm1.", ".input_layernorm."),
                (".norm2.", ".post_attention_layernorm."),
                ("channels.Dense", "mlp"),
                ("blocks.", "model.layers."),
                ("embed", "model.embed_tokens.weight"),
                ("head_proj", "lm_head.weight"),
            ],
        )
    });
}

#[test]
fn minimax_is_the_peers() {
    let lightning = r#"{"type": "lightning", "num_heads": 4, "head_dim": 8}"#;
    let attention = r#"{"type": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rope_theta": 1e6}"#;
    check(&Peer {
        channel_mixer: r#"{"type": "swiglu", "intermediate_size": 24}"#,
        norm_eps: 1e-5,
        post_norm_experts: true,
        ..fla(
            "minimax",
            &[lightning, lightning, attention],
            &[
                ("mixer.Lightning.", "self_attn."),
                ("mixer.Attention.", "self_attn."),
                (".norm1.", ".input_layernorm."),
                (".norm2.", ".post_attention_layernorm."),
                ("channels.Experts.router_proj.", "block_sparse_moe.gate."),
                ("channels.Experts.experts.", "block_sparse_moe.experts."),
                (".gate_proj.", ".w1."),
                (".down_proj.", ".w2."),
                (".up_proj.", ".w3."),
                ("blocks.", "model.layers."),
                ("embed", "model.embed_tokens.weight"),
                ("head_proj", "lm_head.weight"),
            ],
        )
    });
}
