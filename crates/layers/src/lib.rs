//! Sequence-mixing layers and channel mixers for Burn.
//!
//! One layer per file, each with its options, its module, its state, `forward` over whole sequences and `step` over one
//! token. Both take a state and return one; any split of a sequence into calls gives the outputs and the state of one
//! pass.
//!
//! | module | holds |
//! |---|---|
//! | [`mixer`] | the interface: [`SequenceMixer`], [`MixerOptions`], [`Site`] (where a layer stands), [`Context`] (what a call is told) |
//! | [`any_mixer`] | [`Mixer`], [`MixerConfig`], [`MixerState`]: any of them, as a config file chooses |
//! | [`gla`], [`hgrn`], [`hgrn2`], [`delta_net`], [`gated_delta_net`], [`kda`], [`retnet`], [`lightning`], [`rg_lru`], [`attention`] | the mixers |
//! | [`state`], [`kv_cache`] | what can be done with any state; the cache of attention |
//! | [`channel_mixer`], [`activation`] | gated and plain feed-forward layers |
//! | [`norm`], [`rotary`], [`short_conv`], [`decay`] | parts |
//!
//! ```
//! use burn::tensor::{Device, Distribution, Tensor};
//! use thalweg_layers::gla::GlaConfig;
//! use thalweg_layers::{Context, MixerConfig, Site};
//!
//! let device = Device::default();
//! let config = MixerConfig::Gla(GlaConfig { num_heads: 2, ..GlaConfig::default() });
//! let mixer = config.init(&Site::new(16), &device)?;
//!
//! let (x, context) = (Tensor::<3>::random([1, 5, 16], Distribution::Default, &device), Context::default());
//! let (y, _) = mixer.forward(x.clone(), None, &context)?;
//! assert_eq!(y.dims(), [1, 5, 16]);
//!
//! // Four tokens and then one are the same as five.
//! let (_, state) = mixer.forward(x.clone().narrow(1, 0, 4), None, &context)?;
//! let (last, _) = mixer.step(x.narrow(1, 4, 1).squeeze_dim::<2>(1), state, &context)?;
//! let difference = last - y.narrow(1, 4, 1).squeeze_dim::<2>(1);
//! assert!(difference.abs().max().into_scalar::<f32>() < 1e-5);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

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
