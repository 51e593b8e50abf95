//! The one backbone: embedding, blocks of a sequence mixer and a channel mixer, norm, head.

use burn::module::{Module, Param};
use burn::nn::Initializer;
use burn::tensor::{Device, Int, Tensor};
use thalweg_layers::channel_mixer::ChannelMixer;
use thalweg_layers::hgrn::LowerBounds;
use thalweg_layers::norm::{RmsNorm, RmsNormConfig};
use thalweg_layers::{Context, Mixer, MixerState};
use thalweg_scan::{Path, linear};

use crate::config::{ModelConfig, Residual};
use crate::error::{Error, Result};
use crate::params;

/// One block: `x + mixer(norm(x))`, then `x + channel_mixer(norm(x))`.
#[derive(Module, Debug)]
pub struct Block {
    /// Absent with ReZero residuals.
    pub mixer_norm: Option<RmsNorm>,
    /// Mixes along the sequence.
    pub mixer: Mixer,
    /// `[1]`, with ReZero residuals.
    pub mixer_scale: Option<Param<Tensor<1>>>,
    /// Absent with ReZero residuals.
    pub channel_norm: Option<RmsNorm>,
    /// Mixes features.
    pub channel_mixer: ChannelMixer,
    /// `[1]`, with ReZero residuals.
    pub channel_scale: Option<Param<Tensor<1>>>,
}

/// A language model over a pattern of sequence mixers.
#[derive(Module, Debug)]
pub struct Model {
    /// `[vocab, hidden]`.
    pub embeddings: Param<Tensor<2>>,
    /// The blocks, first to last.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: RmsNorm,
    /// `[vocab, hidden]`; absent if the head is the embedding.
    pub lm_head: Option<Param<Tensor<2>>>,
    /// What bounds the forget gates of HGRN and HGRN2 from below; absent without such layers.
    pub lower_bounds: Option<LowerBounds>,
    #[module(skip)]
    config: ModelConfig,
}

/// What a model carries from one token to the next: the states of its layers, in order.
#[derive(Debug, Clone)]
pub struct ModelState {
    /// One per block.
    pub layers: Vec<MixerState>,
}

impl ModelState {
    /// Bytes of memory that the states hold.
    pub fn size_in_bytes(&self) -> usize {
        self.layers.iter().map(MixerState::size_in_bytes).sum()
    }

    /// The state cut off from the graph of the calls that made it.
    #[must_use]
    pub fn detach(self) -> Self {
        Self { layers: self.layers.into_iter().map(MixerState::detach).collect() }
    }
}

impl Model {
    /// A model with fresh parameters, which `seed` fixes.
    ///
    /// # Errors
    /// If the configuration cannot be used or has no `vocab_size`.
    pub fn new(config: &ModelConfig, seed: u64, device: &Device) -> Result<Self> {
        // Backends may have one generator for all threads: no other model may draw from it in between.
        static SEEDED: std::sync::Mutex<()> = std::sync::Mutex::new(());
        let _guard = SEEDED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        device.seed(seed);
        Ok(params::settle(Self::lazy(config, device)?))
    }

    /// A model whose parameters are made when they are first needed.
    pub(crate) fn lazy(config: &ModelConfig, device: &Device) -> Result<Self> {
        config.validate()?;
        let vocab = config.vocab_size.ok_or_else(|| Error::config("vocab_size", "is missing"))?;
        let hidden = config.hidden_size;
        let normal = Initializer::Normal { mean: 0.0, std: config.initializer_range };
        let norm = || RmsNormConfig::new(hidden).with_eps(config.norm_eps).init(device);
        let rezero = config.residual == Residual::Rezero;
        let scale = || rezero.then(|| Initializer::Zeros.init([1], device));
        let block = |layer| -> Result<Block> {
            let site = config.site(layer);
            Ok(Block {
                mixer_norm: (!rezero).then(norm),
                mixer: config.mixer(layer)?.init(&site, device)?,
                mixer_scale: scale(),
                channel_norm: (!rezero).then(norm),
                channel_mixer: config.channel_mixer(layer).init(&site, device)?,
                channel_scale: scale(),
            })
        };
        let blocks = (0..config.layers()).map(block).collect::<Result<Vec<_>>>()?;
        Ok(Self {
            embeddings: normal.init([vocab, hidden], device),
            blocks,
            norm: norm(),
            lm_head: (!config.tie_embeddings).then(|| normal.init([vocab, hidden], device)),
            lower_bounds: config
                .lower_bound_features()?
                .map(|features| LowerBounds::new(config.layers(), features, device)),
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.embeddings.lazy_shape()[0]
    }

    /// Where the parameters are.
    pub fn device(&self) -> Device {
        self.embeddings.lazy_device()
    }

    /// The state before the first token of `batch` sequences.
    pub fn initial_state(&self, batch: usize) -> ModelState {
        let device = self.device();
        ModelState { layers: self.blocks.iter().map(|block| block.mixer.initial_state(batch, &device)).collect() }
    }

    /// The residual stream after the last norm, for whole sequences.
    ///
    /// | argument | shape |
    /// |---|---|
    /// | `ids` | `[B, T]`, or `[1, total]` with `cu_seqlens` |
    /// | `state` | of `B` sequences, or one per packed document; `None` is the state before the first token |
    /// | `cu_seqlens` | `[0, end of the first document, ..., total]` |
    ///
    /// Returns `[B, T, hidden]`, for [`logits`](Self::logits) or [`crate::cross_entropy`], and the state after the last
    /// tokens. Ids must be below [`vocab_size`](Self::vocab_size).
    ///
    /// # Errors
    /// If shapes, state or boundaries do not fit each other, or the state is not one of this model.
    pub fn forward(
        &self,
        ids: Tensor<2, Int>,
        state: Option<ModelState>,
        cu_seqlens: Option<&[usize]>,
    ) -> Result<(Tensor<3>, ModelState)> {
        let states = self.states(state)?;
        let mut x = burn::tensor::module::embedding(self.embeddings.val(), ids);
        if let Some(scale) = self.config.embedding_scale {
            x = x * scale;
        }
        let mut next = Vec::with_capacity(self.blocks.len());
        for ((block, state), context) in self.blocks.iter().zip(states).zip(self.contexts(cu_seqlens)) {
            let (mixed, state) = block.mixer.forward(norm(&block.mixer_norm, &x), state, &context)?;
            x = block.add_channels(add(x, mixed, &block.mixer_scale));
            next.push(state);
        }
        Ok((self.norm.forward(x), ModelState { layers: next }))
    }

    /// One token of every sequence: `ids` is `[B]`; returns logits `[B, vocab]`.
    ///
    /// # Errors
    /// If `ids` and `state` do not fit each other, or the state is not one of this model.
    pub fn step(&self, ids: Tensor<1, Int>, state: ModelState) -> Result<(Tensor<2>, ModelState)> {
        let states = self.states(Some(state))?;
        let embedded = burn::tensor::module::embedding(self.embeddings.val(), ids.unsqueeze_dim(1));
        let mut x: Tensor<2> = embedded.squeeze_dim(1);
        if let Some(scale) = self.config.embedding_scale {
            x = x * scale;
        }
        let mut next = Vec::with_capacity(self.blocks.len());
        for ((block, state), context) in self.blocks.iter().zip(states).zip(self.contexts(None)) {
            let state = match state {
                Some(state) => state,
                None => block.mixer.initial_state(x.dims()[0], &x.device()),
            };
            let (mixed, state) = block.mixer.step(norm(&block.mixer_norm, &x), state, &context)?;
            x = block.add_channels(add(x, mixed, &block.mixer_scale));
            next.push(state);
        }
        Ok((self.logits(self.norm.forward(x)), ModelState { layers: next }))
    }

    /// Logits `[.., vocab]` of `[.., hidden]` from [`forward`](Self::forward).
    ///
    /// # Panics
    /// If the last axis is not of the model's width.
    pub fn logits<const D: usize>(&self, hidden: Tensor<D>) -> Tensor<D> {
        let logits = match linear(hidden, self.head().transpose(), None, Path::Auto) {
            Ok(logits) => logits,
            Err(error) => panic!("{error}"),
        };
        match self.config.logits_soft_cap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        }
    }

    /// The head's weight, `[vocab, hidden]`.
    pub fn head(&self) -> Tensor<2> {
        self.lm_head.as_ref().unwrap_or(&self.embeddings).val()
    }

    /// What every layer is told besides its input and its state.
    fn contexts(&self, cu_seqlens: Option<&[usize]>) -> Vec<Context> {
        let context = Context { cu_seqlens: cu_seqlens.map(<[usize]>::to_vec), ..Context::default() };
        match &self.lower_bounds {
            None => vec![context; self.blocks.len()],
            Some(bounds) => bounds.forward().into_iter().map(|bound| context.clone().with_lower_bound(bound)).collect(),
        }
    }

    /// Checks that `state` is one of this model: as many layers, each of them whole and made by the layer in its place, all
    /// at the same positions.
    ///
    /// # Errors
    /// Names the layer and what differs.
    pub fn check_state(&self, state: &ModelState) -> Result<()> {
        let (found, expected) = (state.layers.len(), self.blocks.len());
        if found != expected {
            return Err(Error::argument("state", format!("has {found} layers, the model {expected}")));
        }
        let mut first = None;
        for (block, state) in self.blocks.iter().zip(&state.layers) {
            block.mixer.check_state(state)?;
            let Some(positions) = state.positions() else {
                continue;
            };
            let (layer, expected) = first.get_or_insert_with(|| (state.spec().label(), positions.clone()));
            if positions != *expected {
                let (found, expected) = (format!("{positions:?}"), format!("{expected:?}, that of layer {layer}"));
                return Err(state.spec().mismatch("positions", found, expected).into());
            }
        }
        Ok(())
    }

    fn states(&self, state: Option<ModelState>) -> Result<Vec<Option<MixerState>>> {
        let Some(state) = state else {
            return Ok(vec![None; self.blocks.len()]);
        };
        self.check_state(&state)?;
        Ok(state.layers.into_iter().map(Some).collect())
    }
}

impl Block {
    fn add_channels<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let mixed = self.channel_mixer.forward(norm(&self.channel_norm, &x));
        add(x, mixed, &self.channel_scale)
    }
}

fn norm<const D: usize>(norm: &Option<RmsNorm>, x: &Tensor<D>) -> Tensor<D> {
    match norm {
        Some(norm) => norm.forward(x.clone()),
        None => x.clone(),
    }
}

fn add<const D: usize>(x: Tensor<D>, mixed: Tensor<D>, scale: &Option<Param<Tensor<1>>>) -> Tensor<D> {
    match scale {
        Some(scale) => {
            let scale = scale.val().cast(mixed.dtype());
            x + mixed * scale.unsqueeze()
        }
        None => x + mixed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::ids_tensor;
    use burn::tensor::Tolerance;
    use thalweg_layers::MixerConfig;
    use thalweg_layers::attention::AttentionConfig;
    use thalweg_layers::gated_delta_net::GatedDeltaNetConfig;
    use thalweg_layers::hgrn2::Hgrn2Config;

    /// Every kind of state and of context: a matrix state with a convolution, lower bounds, a window, full attention.
    pub(crate) fn hybrid() -> ModelConfig {
        let attention = AttentionConfig { num_heads: 2, ..AttentionConfig::default() };
        let delta = GatedDeltaNetConfig { num_heads: 2, head_dim: 8, ..GatedDeltaNetConfig::default() };
        let mut config = ModelConfig::new(16, ["gated_delta_net", "hgrn2", "window", "attention"])
            .with_vocab_size(11)
            .with_mixer("gated_delta_net", MixerConfig::GatedDeltaNet(delta))
            .with_mixer("hgrn2", MixerConfig::Hgrn2(Hgrn2Config { expand_ratio: 8, ..Hgrn2Config::default() }))
            .with_mixer("window", MixerConfig::Attention(AttentionConfig { window: Some(3), ..attention.clone() }))
            .with_mixer("attention", MixerConfig::Attention(attention));
        config.channel_mixer.intermediate_size = Some(24);
        config.initializer_range = 0.2;
        config
    }

    fn close<const D: usize>(actual: Tensor<D>, expected: Tensor<D>) {
        actual.into_data().assert_approx_eq::<f32>(&expected.into_data(), Tolerance::rel_abs(1e-4, 1e-5));
    }

    const IDS: [u32; 10] = [1, 5, 9, 10, 0, 3, 3, 7, 2, 8];

    #[test]
    fn packed_documents_do_not_see_each_other() {
        let device = Device::flex();
        let model = Model::new(&hybrid(), 1, &device).unwrap();
        let (packed, _) = model.forward(ids_tensor(&IDS, [1, 10], &device), None, Some(&[0, 4, 10])).unwrap();
        for (start, length) in [(0, 4), (4, 6)] {
            let ids = ids_tensor(&IDS[start..start + length], [1, length], &device);
            let (alone, _) = model.forward(ids, None, None).unwrap();
            close(packed.clone().narrow(1, start, length), alone);
        }
    }

    #[test]
    fn prefill_then_steps_equal_one_pass() {
        let device = Device::flex();
        let mut config = hybrid();
        config.logits_soft_cap = Some(5.0);
        config.embedding_scale = Some(3.0);
        config.tie_embeddings = false;
        let model = Model::new(&config, 1, &device).unwrap();
        let (hidden, _) = model.forward(ids_tensor(&IDS, [1, 10], &device), None, None).unwrap();
        let whole = model.logits(hidden);
        let (_, mut state) = model.forward(ids_tensor(&IDS[..5], [1, 5], &device), None, None).unwrap();
        for (at, &id) in IDS.iter().enumerate().skip(5) {
            let (logits, next) = model.step(ids_tensor(&[id], [1], &device), state).unwrap();
            close(logits, whole.clone().narrow(1, at, 1).squeeze_dim(1));
            state = next;
        }
    }

    /// Bit by bit: prompts alone, in batches and packed, and steps after each.
    #[test]
    fn logits_do_not_depend_on_the_rest_of_the_batch() {
        let device = Device::flex();
        let model = Model::new(&hybrid().with_vocab_size(300), 1, &device).unwrap();
        let (count, time, steps) = (17, 21, 2);
        let id = |n: usize, t: usize| (n * 131 + t * t * 37 + 5) as u32 % 300;
        let bits = |x: Tensor<2>| x.into_data().iter::<f32>().map(f32::to_bits).collect::<Vec<_>>();
        // Logits of the last token of each prompt, and of the steps, for sequences `first..first + batch`.
        let run = |first: usize, batch: usize, packed: bool| {
            let ids: Vec<_> = (0..batch * time).map(|i| id(first + i / time, i % time)).collect();
            let bounds: Vec<_> = (0..=batch).map(|n| n * time).collect();
            let shape = if packed { [1, batch * time] } else { [batch, time] };
            let bounds = packed.then_some(&bounds[..]);
            let (hidden, mut state) = model.forward(ids_tensor(&ids, shape, &device), None, bounds).unwrap();
            let logits = model.logits(hidden).reshape([batch, time, 300]);
            let mut all = vec![logits.narrow(1, time - 1, 1).squeeze_dim::<2>(1)];
            for t in time..time + steps {
                let ids: Vec<_> = (first..first + batch).map(|n| id(n, t)).collect();
                let (logits, next) = model.step(ids_tensor(&ids, [batch], &device), state).unwrap();
                all.push(logits);
                state = next;
            }
            all
        };
        let alone: Vec<_> = (0..count).map(|n| run(n, 1, false).into_iter().map(bits).collect::<Vec<_>>()).collect();
        for (batch, packed) in [(2, false), (5, false), (8, false), (17, false), (5, true), (17, true)] {
            let first = count - batch;
            for (t, logits) in run(first, batch, packed).into_iter().enumerate() {
                for n in 0..batch {
                    let found = bits(logits.clone().narrow(0, n, 1));
                    let other = found.iter().zip(&alone[first + n][t]).filter(|(a, b)| a != b).count();
                    assert_eq!(other, 0, "sequence {n} of {batch}, packed: {packed}, call {t}: logits that differ");
                }
            }
        }
    }

    /// Parameters and the residual stream in any types, with a loss.
    #[test]
    fn models_take_mixed_types() {
        use burn::tensor::DType;
        struct Cast<F>(F);
        impl<F: FnMut() -> DType> burn::module::ModuleMapper for Cast<F> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let dtype = (self.0)();
                param.map(|value| value.without_autodiff().cast(dtype).autodiff().require_grad())
            }
        }
        let device = Device::flex().autodiff();
        let loss = |model: &Model| {
            let ids = ids_tensor(&IDS, [1, 10], &device);
            let (hidden, _) = model.forward(ids, None, None).unwrap();
            let targets = ids_tensor(&IDS, [10], &device);
            let hidden = hidden.reshape([10, 16]);
            let loss = crate::cross_entropy(hidden, model.head(), targets, None, None);
            let gradients = loss.surrogate.as_ref().unwrap().backward();
            let gradient = model.embeddings.val().grad(&gradients).unwrap();
            assert!(gradient.cast(DType::F32).into_data().iter::<f32>().all(f32::is_finite));
            let mut state = model.initial_state(1);
            for &id in &IDS[..2] {
                let (logits, next) = model.step(ids_tensor(&[id], [1], &device), state).unwrap();
                assert_eq!(logits.dtype(), model.embeddings.val().dtype());
                state = next;
            }
            loss.mean()
        };
        for residual in [Residual::PreNorm, Residual::Rezero] {
            // Small outputs that norms make large again would measure the digits lost in summing them.
            let config = ModelConfig { residual, norm_eps: 0.1, initializer_range: 0.1, ..hybrid() };
            let model = Model::new(&config, 1, &Device::flex()).unwrap();
            let types = [DType::F32, DType::BF16, DType::F16];
            let cast = |dtype: Box<dyn FnMut() -> DType>| model.clone().map(&mut Cast(dtype));
            let expected = loss(&cast(Box::new(|| DType::F32)));
            for dtype in types {
                // All in one type; embeddings in another than the rest; a change of type at every parameter.
                let (mut first, mut turn) = (true, 0);
                let embeddings = move || if std::mem::take(&mut first) { dtype } else { DType::F32 };
                let every = move || {
                    turn += 1;
                    if turn == 1 { dtype } else { types[turn % 3] }
                };
                for model in [cast(Box::new(move || dtype)), cast(Box::new(embeddings)), cast(Box::new(every))] {
                    let found = loss(&model);
                    assert!((found - expected).abs() < 0.02 * expected, "{dtype:?}: {found}, f32 {expected}");
                }
            }
        }
    }

    #[test]
    fn rezero_starts_as_the_identity() {
        let device = Device::flex();
        let model = Model::new(&ModelConfig { residual: Residual::Rezero, ..hybrid() }, 1, &device).unwrap();
        let ids = ids_tensor(&IDS, [1, 10], &device);
        let (hidden, _) = model.forward(ids.clone(), None, None).unwrap();
        close(hidden, model.norm.forward(burn::tensor::module::embedding(model.embeddings.val(), ids)));
    }

    #[test]
    fn the_seed_fixes_the_parameters_and_their_names_are_plain() {
        let device = Device::flex();
        let values = |seed| params::values(&Model::new(&hybrid(), seed, &device).unwrap());
        let (first, again, other) = (values(1), values(1), values(2));
        assert_eq!(first, again);
        assert_ne!(first, other);
        let names: Vec<_> = first.iter().map(|(name, _)| name.as_str()).collect();
        for name in ["embeddings", "blocks.0.mixer.q_proj.weight", "blocks.3.channel_norm.weight", "norm.weight"] {
            assert!(names.contains(&name), "{name} is not among {names:?}");
        }
    }

    #[test]
    fn a_state_of_another_model_is_refused() {
        let device = Device::flex();
        let ids = || ids_tensor(&IDS[..1], [1], &device);
        let model = Model::new(&hybrid(), 1, &device).unwrap();
        let (_, good) = model.forward(ids_tensor(&IDS, [1, 10], &device), None, None).unwrap();
        let refused = |state: ModelState, complaint: &str| {
            let [step, forward] = [
                model.step(ids(), state.clone()).map(|_| ()),
                model.forward(ids().unsqueeze_dim(1), Some(state), None).map(|_| ()),
            ];
            for error in [step, forward] {
                let text = error.unwrap_err().to_string();
                assert!(text.contains(complaint), "{text}");
            }
        };
        model.step(ids(), good.clone()).unwrap();
        let mut state = good.clone();
        state.layers.swap(0, 1);
        refused(state, "state is of kind `hgrn2`, this layer is `gated_delta_net`");
        let mut state = good.clone();
        state.layers.swap(2, 3);
        refused(state, "state of layer 2 (attention): `layer` is 3, expected 2");
        let mut state = good.clone();
        state.layers.pop();
        refused(state, "state: has 3 layers, the model 4");
        let mut state = good.clone();
        let (_, shorter) = model.forward(ids_tensor(&IDS[..6], [1, 6], &device), None, None).unwrap();
        state.layers[3] = shorter.layers[3].clone();
        refused(state, "state of layer 3 (attention): `positions` is [6], expected [10], that of layer 2 (attention)");

        let mut wider = hybrid();
        for mixer in wider.mixers.values_mut() {
            if let MixerConfig::Attention(AttentionConfig { window: window @ Some(_), .. }) = mixer {
                *window = Some(4);
            }
        }
        let other = Model::new(&wider, 1, &device).unwrap();
        let (_, state) = other.forward(ids_tensor(&IDS, [1, 10], &device), None, None).unwrap();
        refused(state, "state of layer 2 (attention): `window` is 4, expected 3");
    }
}
