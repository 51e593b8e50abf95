//! The paths that users run, on a GPU: golden cases, drawn cases, and a model that learns as it does on the CPU.
#![cfg(any(feature = "wgpu", feature = "cuda", feature = "rocm"))]

use burn::tensor::Device;
use serde_json::json;
use std::path::Path;
use thalweg_conform::{Case, Engine, Runner, check, load};
use thalweg_layers::MixerConfig;
use thalweg_layers::attention::AttentionConfig;
use thalweg_models::data::{Corpus, Document};
use thalweg_models::{DataOrigin, ModelConfig, Tokenizer, TrainOptions, Trainer};

/// The first GPU; nothing, with a word on the terminal, where there is none.
fn gpu() -> Option<Device> {
    thalweg_reference::device::or_skip(thalweg_scan::gpus().into_iter().next())
}

/// Golden cases of operations that the engine has.
fn cases() -> Vec<Case> {
    let found = load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("golden")).unwrap();
    let cases = found.cases.into_iter().map(|(_, case)| case.unwrap());
    cases.filter(|case| case.operation().unwrap().implemented).collect()
}

#[test]
fn golden_cases_agree() {
    let Some(gpu) = gpu() else { return };
    let engine = Engine::native().on(gpu);
    let failures: Vec<_> = cases().iter().map(|case| check(&engine, case)).filter(|r| !r.passes(1e-4)).collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Kernels that quietly did not run would pass every other test; their bits give them away.
#[test]
fn kernels_run_where_there_are_some() {
    let Some(gpu) = gpu() else { return };
    let [native, portable] = [Engine::native(), Engine::portable()].map(|engine| engine.on(gpu.clone()));
    for op in ["gla", "gated_delta_rule", "hgrn", "complex_scan", "short_conv", "attention"] {
        let case = cases().into_iter().find(|case| case.op == op).unwrap();
        let plain = portable.run(&case).unwrap();
        assert!(native.run(&case).unwrap() != plain, "{}: the same bits on both paths", case.name);
        // One path has the same bits every time.
        assert!(op != "short_conv" || portable.run(&case).unwrap() == plain);
    }
}

/// The same weights and batches give the same losses, step by step.
fn learns_as_on_the_cpu(mixers: [(&str, MixerConfig); 4]) {
    const STEPS: usize = 8;
    let Some(gpu) = gpu() else { return };
    let config = ModelConfig::new(48, mixers.each_ref().map(|(name, _)| *name));
    let config = mixers.into_iter().fold(config, |config, (name, mixer)| config.with_mixer(name, mixer));
    let text = (0..200).map(|i| format!("{i} times {i} is {}. ", i * i)).collect::<String>();
    let text = [Document { name: "squares".into(), bytes: text.into_bytes() }];
    let tokenizer = Tokenizer::bytes();
    let options =
        TrainOptions { steps: 1 + STEPS, batch: 4, context: 80, lr: 1e-2, warmup: 2, ..TrainOptions::default() };
    let corpus = Corpus::new(&text, &tokenizer, options.context, options.seed).unwrap();
    let run = tempfile::tempdir().unwrap();
    // Random numbers are the device's own: both start from a checkpoint.
    let first = Trainer::new(&config, &corpus, Some(&tokenizer), options, &Device::flex()).unwrap();
    let mut first = first.with_output(run.path(), DataOrigin::default()).unwrap();
    first.step().unwrap();
    first.save().unwrap();
    // Its lock on the folder ends with it.
    drop(first);
    let losses = |device: &Device| -> Vec<f64> {
        let mut trainer = Trainer::resume(run.path(), &corpus, Some(&tokenizer), None, device).unwrap();
        (0..STEPS).map(|_| trainer.step().unwrap().loss).collect()
    };
    let (cpu, gpu) = (losses(&Device::flex()), losses(&gpu));
    assert!(cpu[STEPS - 1] < 0.8 * cpu[0], "it learns: {cpu:?}");
    for (a, b) in cpu.iter().zip(&gpu) {
        assert!((a - b).abs() < 1e-4 * a, "{cpu:?} on the CPU, {gpu:?} on the GPU");
    }
}

fn attention() -> MixerConfig {
    MixerConfig::Attention(AttentionConfig { num_heads: 2, window: Some(32), ..AttentionConfig::default() })
}

fn mixer(json: serde_json::Value) -> MixerConfig {
    serde_json::from_value(json).unwrap()
}

#[test]
fn matrix_hybrid_learns_as_on_the_cpu() {
    learns_as_on_the_cpu([
        ("gla", mixer(json!({"type": "gla", "num_heads": 2, "expand_k": 1.0}))),
        ("gated_delta_net", mixer(json!({"type": "gated_delta_net", "num_heads": 2, "head_dim": 16}))),
        ("retnet", mixer(json!({"type": "retnet", "num_heads": 2}))),
        ("local", attention()),
    ]);
}

#[test]
fn scan_hybrid_learns_as_on_the_cpu() {
    learns_as_on_the_cpu([
        ("hgrn", mixer(json!({"type": "hgrn"}))),
        ("rg_lru", mixer(json!({"type": "rg_lru", "num_heads": 2}))),
        ("kda", mixer(json!({"type": "kda", "num_heads": 2, "head_dim": 16}))),
        ("local", attention()),
    ]);
}
