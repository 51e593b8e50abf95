//! The interface that every sequence mixer has.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::{Device, Tensor};
use thalweg_scan::{AttentionOptions, MatrixOptions, Path, ScanOptions, StepOptions};

use crate::error::shape_error;
use crate::{ConfigError, Error, LayerState, StateSpec};

/// Where in a model a layer stands, and what the model decides for all its layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Site {
    /// Features of the residual stream, `D`.
    pub hidden_size: usize,
    /// Index of the block, from 0. Lightning attention's slopes depend on it.
    pub layer: usize,
    /// Number of blocks in the model.
    pub layers: usize,
    /// Standard deviation of the normal initialisation of projections whose paper does not say otherwise.
    pub initializer_range: f64,
    /// Epsilon of the norms inside mixers.
    pub norm_eps: f64,
}

impl Site {
    /// The only block of a model of width `hidden_size`.
    pub fn new(hidden_size: usize) -> Self {
        Self { hidden_size, layer: 0, layers: 1, initializer_range: 0.02, norm_eps: 1e-6 }
    }

    /// The same site at block `layer` of `layers`.
    #[must_use]
    pub fn at(self, layer: usize, layers: usize) -> Self {
        Self { layer, layers, ..self }
    }

    /// The same site with another initialisation scale.
    #[must_use]
    pub fn with_initializer_range(self, initializer_range: f64) -> Self {
        Self { initializer_range, ..self }
    }

    /// The same site with another epsilon for the norms.
    #[must_use]
    pub fn with_norm_eps(self, norm_eps: f64) -> Self {
        Self { norm_eps, ..self }
    }
}

/// What a call is told besides its input and its state.
#[derive(Debug, Clone, Default)]
pub struct Context {
    /// Boundaries of packed documents, `[0, end of the first, ..., total]`. The input is then `[1, total, D]` and a
    /// state, if given, has one entry per document. Nothing passes from one document to the next.
    pub cu_seqlens: Option<Vec<usize>>,
    /// This layer's lower bound of the forget gate, `[features]`, for HGRN and HGRN2 (see
    /// [`LowerBounds`](crate::hgrn::LowerBounds)). `None` is no bound.
    pub lower_bound: Option<Tensor<1>>,
    /// Which implementation of the recurrences runs.
    pub path: Path,
}

impl Context {
    /// A context for packed documents.
    #[must_use]
    pub fn with_cu_seqlens(self, cu_seqlens: Vec<usize>) -> Self {
        Self { cu_seqlens: Some(cu_seqlens), ..self }
    }

    /// A context with a lower bound of the forget gate.
    #[must_use]
    pub fn with_lower_bound(self, lower_bound: Option<Tensor<1>>) -> Self {
        Self { lower_bound, ..self }
    }

    /// The same context with another implementation of the recurrences.
    #[must_use]
    pub fn with_path(self, path: Path) -> Self {
        Self { path, ..self }
    }

    /// Number of sequences in an input of `batch` rows: `batch`, or the number of packed documents.
    pub fn sequences(&self, batch: usize) -> usize {
        match &self.cu_seqlens {
            Some(cu_seqlens) => cu_seqlens.len().saturating_sub(1),
            None => batch,
        }
    }

    pub(crate) fn matrix_options(&self, state: Option<Tensor<4>>) -> MatrixOptions {
        MatrixOptions {
            initial_state: state,
            cu_seqlens: self.cu_seqlens.clone(),
            path: self.path,
            ..MatrixOptions::default()
        }
    }

    pub(crate) fn step_options(&self) -> StepOptions {
        StepOptions::new().with_path(self.path)
    }

    pub(crate) fn scan_options(&self, state: Option<Tensor<2>>) -> ScanOptions {
        ScanOptions { initial_state: state, cu_seqlens: self.cu_seqlens.clone(), path: self.path }
    }

    pub(crate) fn attention_options(&self, window: Option<usize>) -> AttentionOptions {
        AttentionOptions { window, path: self.path, ..AttentionOptions::default() }
    }

    /// The context of a single token: no packing.
    pub(crate) fn of_step(&self) -> Self {
        Self { cu_seqlens: None, ..self.clone() }
    }

    /// Checks an input against the width of the layer and `cu_seqlens`.
    pub(crate) fn check_input(&self, x: &Tensor<3>, hidden_size: usize) -> Result<(), Error> {
        let [batch, time, width] = x.dims();
        if width != hidden_size || time == 0 || batch == 0 {
            return Err(shape_error("x", &x.dims(), format!("[batch, time, {hidden_size}] with at least one token")));
        }
        self.validate(batch, time)
    }

    /// Checks `cu_seqlens` against an input `[batch, time, ..]`.
    fn validate(&self, batch: usize, time: usize) -> Result<(), Error> {
        let Some(cu) = &self.cu_seqlens else {
            return Ok(());
        };
        if batch != 1 {
            return Err(Error::Packing(format!("needs an input with batch 1, got batch {batch}")));
        }
        if cu.len() < 2 || cu[0] != 0 || cu.last() != Some(&time) {
            return Err(Error::Packing(format!("must start with 0 and end with the length {time}, got {cu:?}")));
        }
        match cu.windows(2).find(|pair| pair[0] >= pair[1]) {
            Some(pair) => Err(Error::Packing(format!("must increase, got {} after {}", pair[1], pair[0]))),
            None => Ok(()),
        }
    }
}

/// A layer that mixes along the sequence.
///
/// Inputs may be f32, bf16 or f16, parameters in the same type or another of these; the output has the type of the input.
/// Decays, gates, recurrent states and the statistics of norms are f32 throughout. On a CPU the bits of a sequence's
/// output and state do not depend on what else is in the batch or packed with it.
///
/// Both calls take a state and return one, always; the law that ties them is that any split of a sequence into calls of
/// `forward` and `step` gives the outputs and the final state of one `forward` over the whole of it (up to rounding).
pub trait SequenceMixer: Module + Debug {
    /// What is carried from one call to the next.
    type State: LayerState;

    /// What the layer's states are of. Calls refuse others.
    fn state_spec(&self) -> &StateSpec;

    /// Reads a state of this layer from what [`LayerState::to_bytes`] wrote.
    ///
    /// # Errors
    /// As [`LayerState::from_bytes`], and if the state was made for another layer.
    fn load_state(&self, bytes: &[u8], device: &Device) -> Result<Self::State, Error> {
        let state = Self::State::from_bytes(bytes, device)?;
        self.state_spec().check(&state)?;
        Ok(state)
    }

    /// The state before the first token of `batch` sequences.
    fn initial_state(&self, batch: usize, device: &Device) -> Self::State;

    /// Whole sequences: training, and prefill of a prompt.
    ///
    /// | argument | shape |
    /// |---|---|
    /// | `x` | `[B, T, D]`, or `[1, total, D]` with `context.cu_seqlens` |
    /// | `state` | of `B` sequences, or one per packed document; `None` is the state before the first token |
    ///
    /// Returns the output, shaped as `x`, and the state after the last token of every sequence.
    ///
    /// # Errors
    /// If `x`, `state` or `context` do not fit the layer or each other.
    fn forward(
        &self,
        x: Tensor<3>,
        state: Option<Self::State>,
        context: &Context,
    ) -> Result<(Tensor<3>, Self::State), Error>;

    /// One token of every sequence: `x` and the output are `[B, D]`. Ignores `context.cu_seqlens`.
    ///
    /// # Errors
    /// If `x` or `state` do not fit the layer or each other.
    fn step(&self, x: Tensor<2>, state: Self::State, context: &Context) -> Result<(Tensor<2>, Self::State), Error>;
}

/// The options of a layer, as they stand in a config file.
pub trait MixerOptions {
    /// The layer that these options make.
    type Layer: SequenceMixer;

    /// Checks the options for a layer at `site`.
    ///
    /// # Errors
    /// Names the first option that cannot be used.
    fn validate(&self, site: &Site) -> Result<(), ConfigError>;

    /// Makes the layer with fresh parameters.
    ///
    /// # Errors
    /// As [`validate`](Self::validate).
    fn init(&self, site: &Site, device: &Device) -> Result<Self::Layer, ConfigError>;
}
