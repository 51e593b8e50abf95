//! Hybrid sequence models: configuration, data, training, generation, checkpoints.
//!
//! One [`Model`] serves every pattern of mixers.
//!
//! | item | does |
//! |---|---|
//! | [`ModelConfig`], [`preset`] | describe a model: a TOML or JSON file, a name, or code |
//! | [`Model`], [`ModelState`] | whole sequences (`forward`) and single tokens (`step`) |
//! | [`Trainer`], [`TrainOptions`] | train it on any [`data::BatchSource`]; [`checkpoint`] keeps it |
//! | [`cross_entropy`], [`AdamW`], [`Cosine`] | parts of a training loop, for loops of one's own too |
//! | [`Generator`], [`Sampling`] | continue a prompt |
//! | [`Tokenizer`] | bytes, or a Hugging Face `tokenizer.json` |
//!
//! ```
//! use burn::tensor::{Device, Int, Tensor};
//! use thalweg_layers::MixerConfig;
//! use thalweg_layers::gla::GlaConfig;
//! use thalweg_models::{Model, ModelConfig};
//!
//! let device = Device::default();
//! let gla = MixerConfig::Gla(GlaConfig { num_heads: 2, ..GlaConfig::default() });
//! let mut config = ModelConfig::new(32, ["gla", "gla", "attention"]).with_mixer("gla", gla);
//! config.vocab_size = Some(100);
//! let model = Model::new(&config, 1, &device)?;
//!
//! let prompt = Tensor::<2, Int>::from_ints([[1, 2, 3, 4]], &device);
//! let (hidden, state) = model.forward(prompt, None, None)?;
//! assert_eq!(model.logits(hidden).dims(), [1, 4, 100]);
//! let (logits, _) = model.step(Tensor::<1, Int>::from_ints([5], &device), state)?;
//! assert_eq!(logits.dims(), [1, 100]);
//! # Ok::<(), thalweg_models::Error>(())
//! ```

pub mod checkpoint;
mod config;
pub mod data;
mod error;
mod generate;
mod loss;
pub mod metrics;
mod model;
mod optimizer;
pub mod params;
mod sampling;
mod schedule;
mod storage;
mod tokenizer;
mod trainer;

pub use config::{ModelConfig, Residual, preset, preset_names};
pub use error::{Error, Result};
pub use generate::Generator;
pub use loss::{Loss, cross_entropy};
pub use model::{Block, Model, ModelState};
pub use optimizer::AdamW;
pub use sampling::{Sampler, Sampling};
pub use schedule::Cosine;
pub use tokenizer::{Alphabet, BYTE_SEPARATOR, Decoder, HuggingFace, Tokenizer};
pub use trainer::{
    DataOrigin, Evaluation, EvaluationProgress, Event, Observer, RunState, StepReport, TrainOptions, Trainer,
    batch_loss,
};
