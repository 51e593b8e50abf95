//! Sequence-mixing layers and channel mixers for Burn.
//!
//! One block per file, each with its options, its module, its state, `forward` over whole sequences and `step` over one
//! token. [`mixer`] is the interface that they share, [`state`] what can be done with any state.

pub mod error;
pub mod mixer;
pub mod state;

pub use error::{ConfigError, Error};
pub use mixer::{Context, MixerOptions, SequenceMixer, Site};
pub use state::LayerState;
