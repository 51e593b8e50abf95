//! Hybrid sequence models: configuration, data, training, generation, checkpoints.
//!
//! One [`Model`] serves every pattern of mixers. A [`ModelConfig`] describes it (a file, a [`preset`], or code), a
//! [`Trainer`] trains it on any [`data::BatchSource`], [`checkpoint`] keeps it, and a [`Generator`] continues prompts.

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
pub use tokenizer::{Alphabet, BYTE_SEPARATOR, Decoder, Tokenizer};
pub use trainer::{
    DataOrigin, Evaluation, EvaluationProgress, Event, Observer, RunState, StepReport, TrainOptions, Trainer,
    batch_loss,
};
