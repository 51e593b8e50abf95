//! Sequence-mixing layers and channel mixers for Burn.
//!
//! One block per file, each with its options, its module, its state, `forward` over whole sequences and `step` over one
//! token. [`mixer`] is the interface that they share, [`state`] what can be done with any state.

pub mod activation;
pub mod any_mixer;
pub mod attention;
pub mod channel_mixer;
pub mod decay;
pub mod delta_net;
pub mod error;
mod gated;
pub mod gated_delta_net;
pub mod gla;
mod heads;
pub mod hgrn;
pub mod hgrn2;
mod init;
pub mod kda;
pub mod kv_cache;
pub mod lightning;
pub mod mixer;
pub mod norm;
mod projection;
pub mod retnet;
pub mod rg_lru;
pub mod rotary;
pub mod short_conv;
pub mod state;
pub mod state_spec;
mod unique_keys;

pub use any_mixer::{Mixer, MixerConfig, MixerState};
pub use error::{ConfigError, Error};
pub use mixer::{Context, MixerOptions, SequenceMixer, Site};
pub use state::LayerState;
pub use state_spec::StateSpec;
