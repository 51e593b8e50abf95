//! Sequence-mixing layers and channel mixers for Burn.
//!
//! One block per file, each with its options, its module, its state, `forward` over whole sequences and `step` over one
//! token. [`mixer`] is the interface that they share, [`state`] what can be done with any state.

pub mod activation;
pub mod channel_mixer;
pub mod error;
mod init;
pub mod mixer;
pub mod norm;
pub mod rotary;
pub mod state;

pub use error::{ConfigError, Error};
pub use mixer::{Context, MixerOptions, SequenceMixer, Site};
pub use state::LayerState;
