//! Ready configurations: the grid of hybrids of Wang et al. 2025 (arXiv:2507.06457), and the well-known mixtures.
//!
//! `MIXER-RATIO-SIZE`, for instance `gated_delta_net-3:1-tiny`: a pattern of RATIO layers of the mixer and one of full
//! attention, or none of attention for `pure`, repeated until the stack is about as deep as the size says (a whole number
//! of patterns, so that the ratio is exact). Besides, `transformer-SIZE` is attention alone, `griffin-SIZE` two of
//! Griffin's recurrent blocks to one of local attention (De et al. 2024, arXiv:2402.19427), and
//! `gated_delta_net_swa-SIZE` Gated DeltaNet and sliding windows by turns (Yang et al. 2024, arXiv:2412.06464).

use thalweg_layers::MixerConfig;
use thalweg_layers::attention::AttentionConfig;
use thalweg_layers::channel_mixer::{ChannelMixerConfig, ChannelMixerKind};
use thalweg_layers::delta_net::DeltaNetConfig;
use thalweg_layers::gated_delta_net::GatedDeltaNetConfig;
use thalweg_layers::gla::GlaConfig;
use thalweg_layers::hgrn2::Hgrn2Config;
use thalweg_layers::retnet::RetnetConfig;
use thalweg_layers::rg_lru::RgLruConfig;

use super::ModelConfig;
use crate::error::{Error, Result};

/// Names of near presets in an error.
const NEAR: usize = 5;

const MIXERS: [&str; 6] = ["retnet", "hgrn", "hgrn2", "gla", "delta_net", "gated_delta_net"];
const RATIOS: [(&str, usize); 5] = [("24:1", 24), ("12:1", 12), ("6:1", 6), ("3:1", 3), ("pure", 0)];
const MIXTURES: [&str; 3] = ["transformer", "griffin", "gated_delta_net_swa"];

struct Size {
    name: &'static str,
    hidden: usize,
    depth: usize,
    /// Attention heads.
    heads: usize,
    /// Features of a key of the matrix-state mixers.
    head_dim: usize,
    /// Sliding windows.
    window: usize,
    /// Width inside channel mixers, for models too small for multiples of 256.
    intermediate: Option<usize>,
}

const SIZES: [Size; 3] = [
    Size { name: "tiny", hidden: 192, depth: 4, heads: 6, head_dim: 64, window: 64, intermediate: Some(512) },
    Size { name: "340m", hidden: 1024, depth: 24, heads: 16, head_dim: 256, window: 2048, intermediate: None },
    Size { name: "1.3b", hidden: 2048, depth: 24, heads: 32, head_dim: 256, window: 2048, intermediate: None },
];

/// The preset called `name`.
///
/// # Errors
/// If there is none; the error lists near names.
pub fn preset(name: &str) -> Result<ModelConfig> {
    let unknown = || Error::UnknownPreset { name: name.to_owned(), near: near(name) };
    let (rest, size) = name.rsplit_once('-').ok_or_else(unknown)?;
    let size = SIZES.iter().find(|known| known.name == size).ok_or_else(unknown)?;
    if MIXTURES.contains(&rest) {
        return Ok(mixture(rest, size));
    }
    let (mixer, ratio) = rest.rsplit_once('-').ok_or_else(unknown)?;
    let (_, ratio) = RATIOS.iter().find(|(known, _)| *known == ratio).ok_or_else(unknown)?;
    if !MIXERS.contains(&mixer) {
        return Err(unknown());
    }
    let mut pattern = vec![mixer; (*ratio).max(1)];
    if *ratio > 0 {
        pattern.push("attention");
    }
    Ok(stack(size, &pattern))
}

/// The names of all presets.
pub fn preset_names() -> Vec<String> {
    let mut names = Vec::new();
    for size in &SIZES {
        for mixer in MIXERS {
            names.extend(RATIOS.iter().map(|(ratio, _)| format!("{mixer}-{ratio}-{}", size.name)));
        }
        names.extend(MIXTURES.iter().map(|mixture| format!("{mixture}-{}", size.name)));
    }
    names
}

/// A whole number of patterns, about as deep as the size says.
fn stack(size: &Size, pattern: &[&str]) -> ModelConfig {
    let repeats = ((size.depth as f64 / pattern.len() as f64).round() as usize).max(1);
    let mut config = ModelConfig::new(size.hidden, pattern.iter().copied()).with_layers(repeats * pattern.len());
    config.channel_mixer.intermediate_size = size.intermediate;
    for name in pattern {
        config.mixers.insert((*name).to_owned(), mixer(name, size));
    }
    config
}

fn mixture(name: &str, size: &Size) -> ModelConfig {
    match name {
        "griffin" => {
            let mut config = stack(size, &["rg_lru", "rg_lru", "local_attention"]);
            let gelu = ChannelMixerConfig::new(ChannelMixerKind::Geglu);
            config.channel_mixer = ChannelMixerConfig { intermediate_size: size.intermediate, ..gelu };
            config.embedding_scale = Some((size.hidden as f64).sqrt());
            config.logits_soft_cap = Some(30.0);
            config
        }
        "gated_delta_net_swa" => stack(size, &["gated_delta_net", "sliding_attention"]),
        _ => stack(size, &["attention"]),
    }
}

fn mixer(name: &str, size: &Size) -> MixerConfig {
    let heads = size.hidden / size.head_dim;
    let attention = AttentionConfig { num_heads: size.heads, ..AttentionConfig::default() };
    match name {
        "retnet" => MixerConfig::Retnet(RetnetConfig { num_heads: heads, ..RetnetConfig::default() }),
        "hgrn" => MixerConfig::Hgrn(Default::default()),
        "hgrn2" => {
            let expand_ratio = size.head_dim.min(128);
            MixerConfig::Hgrn2(Hgrn2Config { expand_ratio, ..Hgrn2Config::default() })
        }
        "gla" => MixerConfig::Gla(GlaConfig { num_heads: heads, ..GlaConfig::default() }),
        "delta_net" => {
            let num_heads = size.hidden / size.head_dim.min(128);
            MixerConfig::DeltaNet(DeltaNetConfig { num_heads, ..DeltaNetConfig::default() })
        }
        "gated_delta_net" => {
            // Three quarters of the width for the keys and twice that for the values: as many parameters as attention
            // and a gate have. A tiny model keeps the width, so that its few heads stay whole.
            let tiny = size.intermediate.is_some();
            let (num_heads, expand_v) = if tiny { (heads, 1.0) } else { (heads * 3 / 4, 2.0) };
            let head_dim = size.head_dim;
            MixerConfig::GatedDeltaNet(GatedDeltaNetConfig {
                num_heads,
                head_dim,
                expand_v,
                ..GatedDeltaNetConfig::default()
            })
        }
        "rg_lru" => MixerConfig::RgLru(RgLruConfig { num_heads: size.heads, ..RgLruConfig::default() }),
        "local_attention" => MixerConfig::Attention(AttentionConfig {
            num_kv_heads: Some(1),
            window: Some(size.window),
            partial_rotary_factor: 0.5,
            ..attention
        }),
        "sliding_attention" => MixerConfig::Attention(AttentionConfig { window: Some(size.window), ..attention }),
        _ => MixerConfig::Attention(attention),
    }
}

/// The names that need the fewest edits to become `name`.
fn near(name: &str) -> Vec<String> {
    let mut names = preset_names();
    names.sort_by_cached_key(|known| edits(name, known));
    names.truncate(NEAR);
    names
}

/// Levenshtein's distance.
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_preset_is_valid_and_keeps_its_ratio() {
        let names = preset_names();
        assert_eq!(names.len(), 3 * (6 * 5 + 3));
        for name in names {
            let config = preset(&name).unwrap();
            config.validate().unwrap_or_else(|error| panic!("{name}: {error}"));
            let attention = (0..config.layers()).filter(|&layer| !config.mixer(layer).unwrap().is_recurrent()).count();
            let recurrent = config.layers() - attention;
            if let Some((_, ratio)) = RATIOS.iter().find(|(ratio, _)| name.contains(&format!("-{ratio}-"))) {
                assert_eq!(recurrent, if *ratio == 0 { config.layers() } else { ratio * attention }, "{name}");
            }
            assert_eq!(ModelConfig::from_toml(&config.to_toml().unwrap()).unwrap(), config);
        }
    }

    #[test]
    fn a_misspelt_name_is_told_its_neighbours() {
        let error = preset("gated_deltanet-3:1-tiny").unwrap_err();
        let Error::UnknownPreset { near, .. } = &error else { panic!("{error}") };
        assert_eq!(near[0], "gated_delta_net-3:1-tiny");
        assert!(preset("tiny").is_err() && preset("").is_err() && preset("gla-2:1-tiny").is_err());
    }
}
