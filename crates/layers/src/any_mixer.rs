//! Any of the mixers, for models whose config file chooses them.

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::attention::{Attention, AttentionConfig};
use crate::delta_net::{DeltaNet, DeltaNetConfig, DeltaNetState};
use crate::gated_delta_net::{GatedDeltaNet, GatedDeltaNetConfig, GatedDeltaNetState};
use crate::gla::{Gla, GlaConfig, GlaState};
use crate::hgrn::{Hgrn, HgrnConfig, HgrnState};
use crate::hgrn2::{Hgrn2, Hgrn2Config, Hgrn2State};
use crate::kda::{Kda, KdaConfig, KdaState};
use crate::kv_cache::AttentionState;
use crate::lightning::{Lightning, LightningConfig, LightningState};
use crate::mixer::{Context, MixerOptions, SequenceMixer, Site};
use crate::retnet::{Retnet, RetnetConfig, RetnetState};
use crate::rg_lru::{RgLruBlock, RgLruConfig, RgLruState};
use crate::state::SavedState;
use crate::{ConfigError, Error, LayerState, StateSpec};

/// Makes the three enums from one list of mixers.
macro_rules! mixers {
    ($($(#[$doc:meta])* $variant:ident($config:ident, $layer:ident, $state:ident),)+) => {
        /// Options of any mixer. In a config file a table whose `type` says which: `type = "gated_delta_net"`.
        #[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
        #[serde(tag = "type", rename_all = "snake_case")]
        pub enum MixerConfig {
            $($(#[$doc])* $variant($config),)+
        }

        /// Any mixer.
        #[derive(Module, Debug)]
        // One per layer of a model, never in bulk: a box would only cost an indirection.
        #[allow(clippy::large_enum_variant)]
        pub enum Mixer {
            $($(#[$doc])* $variant($layer),)+
        }

        /// The state of any mixer.
        #[derive(Debug, Clone)]
        pub enum MixerState {
            $($(#[$doc])* $variant($state),)+
        }

        impl MixerConfig {
            /// The names of all mixers, as `type` in a config file.
            pub const KINDS: &[&str] = &[$(<$state as LayerState>::KIND,)+];

            /// The name of the mixer, as `type` in a config file.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => <$state as LayerState>::KIND,)+
                }
            }

            /// The default options of the mixer called `kind`.
            ///
            /// # Errors
            /// If there is no such mixer; the error lists those that there are.
            pub fn from_kind(kind: &str) -> Result<Self, ConfigError> {
                $(if kind == <$state as LayerState>::KIND {
                    return Ok(Self::$variant($config::default()));
                })+
                let known = Self::KINDS.join(", ");
                Err(ConfigError::new("type", format!("no mixer `{kind}`; there are {known}")))
            }

            /// Checks the options for a layer at `site`.
            ///
            /// # Errors
            /// Names the first option that cannot be used.
            pub fn validate(&self, site: &Site) -> Result<(), ConfigError> {
                match self {
                    $(Self::$variant(config) => config.validate(site),)+
                }
            }

            /// The mixer with fresh parameters.
            ///
            /// # Errors
            /// As [`validate`](Self::validate).
            pub fn init(&self, site: &Site, device: &Device) -> Result<Mixer, ConfigError> {
                match self {
                    $(Self::$variant(config) => config.init(site, device).map(Mixer::$variant),)+
                }
            }
        }

        impl Mixer {
            /// The name of the mixer, as `type` in a config file.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => <$state as LayerState>::KIND,)+
                }
            }

            /// Checks that `state` was made by this layer and is whole.
            ///
            /// # Errors
            /// Names the layer and the kind, or the first option, tensor or counters that differ.
            pub fn check_state(&self, state: &MixerState) -> Result<(), Error> {
                match (self, state) {
                    $((Self::$variant(layer), MixerState::$variant(state)) => layer.state_spec().check(state),)+
                    (_, other) => Err(self.wrong_kind(other)),
                }
            }

            /// See [`SequenceMixer::load_state`].
            ///
            /// # Errors
            /// As [`MixerState::from_bytes`], and if the state was made for another layer.
            pub fn load_state(&self, bytes: &[u8], device: &Device) -> Result<MixerState, Error> {
                match self {
                    $(Self::$variant(layer) => layer.load_state(bytes, device).map(MixerState::$variant),)+
                }
            }

            /// See [`SequenceMixer::initial_state`].
            pub fn initial_state(&self, batch: usize, device: &Device) -> MixerState {
                match self {
                    $(Self::$variant(layer) => MixerState::$variant(layer.initial_state(batch, device)),)+
                }
            }

            /// See [`SequenceMixer::forward`].
            ///
            /// # Errors
            /// If `x`, `state` or `context` do not fit the layer or each other.
            pub fn forward(
                &self,
                x: Tensor<3>,
                state: Option<MixerState>,
                context: &Context,
            ) -> Result<(Tensor<3>, MixerState), Error> {
                match self {
                    $(Self::$variant(layer) => {
                        let state = match state {
                            Some(MixerState::$variant(state)) => Some(state),
                            Some(other) => return Err(self.wrong_kind(&other)),
                            None => None,
                        };
                        let (y, state) = layer.forward(x, state, context)?;
                        Ok((y, MixerState::$variant(state)))
                    })+
                }
            }

            /// See [`SequenceMixer::step`].
            ///
            /// # Errors
            /// If `x` or `state` do not fit the layer or each other.
            pub fn step(
                &self,
                x: Tensor<2>,
                state: MixerState,
                context: &Context,
            ) -> Result<(Tensor<2>, MixerState), Error> {
                match (self, state) {
                    $((Self::$variant(layer), MixerState::$variant(state)) => {
                        let (y, state) = layer.step(x, state, context)?;
                        Ok((y, MixerState::$variant(state)))
                    })+
                    (_, other) => Err(self.wrong_kind(&other)),
                }
            }
        }

        impl MixerState {
            /// The name of the mixer that the state belongs to.
            pub fn kind(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => <$state as LayerState>::KIND,)+
                }
            }

            /// See [`LayerState::spec`].
            pub fn spec(&self) -> &StateSpec {
                match self {
                    $(Self::$variant(state) => state.spec(),)+
                }
            }

            /// See [`LayerState::positions`].
            pub fn positions(&self) -> Option<Vec<usize>> {
                match self {
                    $(Self::$variant(state) => state.positions(),)+
                }
            }

            /// See [`LayerState::snapshot`].
            #[must_use]
            pub fn snapshot(&self) -> Self {
                self.clone()
            }

            /// See [`LayerState::fork`].
            #[must_use]
            pub fn fork(&self) -> Self {
                self.clone()
            }

            /// See [`LayerState::rollback`].
            ///
            /// # Errors
            /// If the snapshot is of another mixer; the state then stays as it was.
            pub fn rollback(&mut self, snapshot: &Self) -> Result<(), Error> {
                if self.kind() == snapshot.kind() {
                    self.spec().check_origin(snapshot.spec())?;
                }
                match (self, snapshot) {
                    $((Self::$variant(state), Self::$variant(snapshot)) => state.rollback(snapshot),)+
                    (state, snapshot) => return Err(Error::StateKind {
                        expected: state.kind(),
                        actual: snapshot.kind().to_owned(),
                    }),
                }
                Ok(())
            }

            /// See [`LayerState::detach`].
            #[must_use]
            pub fn detach(self) -> Self {
                match self {
                    $(Self::$variant(state) => Self::$variant(state.detach()),)+
                }
            }

            /// See [`LayerState::to_device`].
            #[must_use]
            pub fn to_device(self, device: &Device) -> Self {
                match self {
                    $(Self::$variant(state) => Self::$variant(state.to_device(device)),)+
                }
            }

            /// See [`LayerState::size_in_bytes`].
            pub fn size_in_bytes(&self) -> usize {
                match self {
                    $(Self::$variant(state) => state.size_in_bytes(),)+
                }
            }

            /// See [`LayerState::to_bytes`].
            ///
            /// # Errors
            /// If a tensor cannot be read from its device.
            pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
                match self {
                    $(Self::$variant(state) => state.to_bytes(),)+
                }
            }

            /// Reads what [`to_bytes`](Self::to_bytes) wrote, of whatever kind it is.
            ///
            /// # Errors
            /// As [`LayerState::from_bytes`], and if the kind is unknown.
            pub fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self, Error> {
                match SavedState::parse(bytes, device)?.kind() {
                    $(<$state as LayerState>::KIND => {
                        $state::from_bytes(bytes, device).map(Self::$variant)
                    })+
                    kind => Err(Error::StateBytes(format!("unknown kind of layer `{kind}`"))),
                }
            }
        }
    };
}

mixers! {
    /// Gated linear attention.
    Gla(GlaConfig, Gla, GlaState),
    /// HGRN.
    Hgrn(HgrnConfig, Hgrn, HgrnState),
    /// HGRN2.
    Hgrn2(Hgrn2Config, Hgrn2, Hgrn2State),
    /// DeltaNet.
    DeltaNet(DeltaNetConfig, DeltaNet, DeltaNetState),
    /// Gated DeltaNet.
    GatedDeltaNet(GatedDeltaNetConfig, GatedDeltaNet, GatedDeltaNetState),
    /// Kimi Delta Attention.
    Kda(KdaConfig, Kda, KdaState),
    /// Retention.
    Retnet(RetnetConfig, Retnet, RetnetState),
    /// Lightning Attention.
    Lightning(LightningConfig, Lightning, LightningState),
    /// Griffin's recurrent block.
    RgLru(RgLruConfig, RgLruBlock, RgLruState),
    /// Softmax attention, full or windowed.
    Attention(AttentionConfig, Attention, AttentionState),
}

impl MixerConfig {
    /// Whether the state stays the same size however long the sequence grows.
    pub fn is_recurrent(&self) -> bool {
        !matches!(self, Self::Attention(_))
    }

    /// Features of the lower bound that the layer takes in [`Context::lower_bound`]; `None` if it takes none.
    pub fn lower_bound_features(&self, site: &Site) -> Option<usize> {
        match self {
            Self::Hgrn(config) => Some(config.channels(site)),
            Self::Hgrn2(config) => config.features(site).ok(),
            _ => None,
        }
    }
}

impl Mixer {
    fn wrong_kind(&self, state: &MixerState) -> Error {
        Error::StateKind { expected: self.kind(), actual: state.kind().to_owned() }
    }
}
