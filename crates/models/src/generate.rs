//! Continuing a prompt, token by token, with a state that does not grow (but for full attention's cache).

use burn::module::Module;

use crate::data::ids_tensor;
use crate::error::{Error, Result};
use crate::sampling::{Sampler, Sampling};
use crate::{Model, ModelState};

/// Continues one sequence.
#[derive(Debug)]
pub struct Generator {
    model: Model,
    state: Option<ModelState>,
    sampler: Sampler,
    logits: Vec<f32>,
    allowed: usize,
    /// Drawn, but not yet read: the last token of a text never is.
    drawn: Option<u32>,
}

/// Tokens of a prompt that go through the model in one call: bounds the memory of a long prompt.
const PREFILL: usize = 512;

impl Generator {
    /// Reads the prompt. Tokens from `allowed` on are never drawn (a vocabulary that was padded).
    ///
    /// # Errors
    /// If the prompt is empty or has ids outside the vocabulary, or the sampling options cannot be used.
    pub fn new(model: &Model, prompt: &[u32], sampling: Sampling, allowed: usize) -> Result<Self> {
        let sampler = Sampler::new(sampling)?;
        let mut generator =
            Self { model: model.valid(), state: None, sampler, logits: Vec::new(), allowed, drawn: None };
        generator.read(prompt)?;
        Ok(generator)
    }

    /// Appends tokens that were not drawn.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn read(&mut self, ids: &[u32]) -> Result<()> {
        let vocab = self.model.vocab_size();
        if ids.is_empty() {
            return Err(Error::argument("prompt", "is empty"));
        }
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab) {
            return Err(Error::argument("prompt", format!("token {id} is outside the vocabulary of {vocab}")));
        }
        let device = self.model.device();
        self.logits.clear(); // should a layer fail, none are left to draw from
        let ids: Vec<u32> = self.drawn.take().into_iter().chain(ids.iter().copied()).collect();
        for chunk in ids.chunks(PREFILL) {
            let input = ids_tensor(chunk, [1, chunk.len()], &device);
            let (hidden, state) = self.model.forward(input, self.state.take(), None)?;
            let last = hidden.narrow(1, chunk.len() - 1, 1);
            self.logits = floats(self.model.logits(last).into_data())?;
            self.state = Some(state);
        }
        Ok(())
    }

    /// Draws the next token.
    ///
    /// # Errors
    /// If a layer fails; [`Error::Draw`] if the logits are not finite or allow no token.
    pub fn draw(&mut self) -> Result<u32> {
        if let Some(id) = self.drawn.take() {
            self.logits.clear();
            let state = match self.state.take() {
                Some(state) => state,
                None => self.model.initial_state(1),
            };
            let (logits, state) = self.model.step(ids_tensor(&[id], [1], &self.model.device()), state)?;
            self.logits = floats(logits.into_data())?;
            self.state = Some(state);
        }
        let id = self.sampler.draw(&self.logits, self.allowed)?;
        self.drawn = Some(id);
        Ok(id)
    }

    /// Logits that the last token was drawn from, or that the next one will be, if none was yet.
    pub fn logits(&self) -> &[f32] {
        &self.logits
    }

    /// Bytes of memory of the state.
    pub fn state_bytes(&self) -> usize {
        self.state.as_ref().map_or(0, ModelState::size_in_bytes)
    }
}

fn floats(data: burn::tensor::TensorData) -> Result<Vec<f32>> {
    let read = || data.try_cast_as::<f32>()?.try_into_vec::<f32>();
    read().map_err(|error| Error::argument("logits", format!("{error:?}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ModelConfig;
    use burn::tensor::Device;

    fn model(pattern: &[&str]) -> Model {
        let mut config = ModelConfig::new(16, pattern.iter().copied()).with_vocab_size(13);
        config.channel_mixer.intermediate_size = Some(24);
        config.initializer_range = 0.3;
        Model::new(&config, 4, &Device::flex()).unwrap()
    }

    fn drawn(model: &Model, sampling: Sampling) -> Vec<u32> {
        let mut generator = Generator::new(model, &[1, 2, 3], sampling, 13).unwrap();
        (0..20).map(|_| generator.draw().unwrap()).collect()
    }

    #[test]
    fn greedy_text_is_the_argmax_of_one_pass() {
        let model = model(&["hgrn", "attention"]);
        let greedy = drawn(&model, Sampling { temperature: 0.0, ..Sampling::default() });
        let ids: Vec<u32> = [1, 2, 3].into_iter().chain(greedy.iter().copied()).collect();
        let (hidden, _) = model.forward(ids_tensor(&ids, [1, ids.len()], &model.device()), None, None).unwrap();
        let best = model.logits(hidden).argmax(2).into_data().iter::<i64>().map(|id| id as u32).collect::<Vec<_>>();
        assert_eq!(greedy, best[2..ids.len() - 1]);
    }

    #[test]
    fn the_seed_fixes_the_text() {
        let model = model(&["hgrn"]);
        let sampling = Sampling { temperature: 1.0, seed: 3, ..Sampling::default() };
        assert_eq!(drawn(&model, sampling), drawn(&model, sampling));
        assert_ne!(drawn(&model, sampling), drawn(&model, Sampling { seed: 4, ..sampling }));
    }

    #[test]
    fn a_recurrent_state_does_not_grow() {
        let model = model(&["hgrn", "lightning"]);
        let mut generator = Generator::new(&model, &[1], Sampling::default(), 13).unwrap();
        let before = generator.state_bytes();
        for _ in 0..50 {
            generator.draw().unwrap();
        }
        assert!(before > 0);
        assert_eq!(generator.state_bytes(), before);
    }

    #[test]
    fn prompts_are_checked_and_long_ones_are_read_in_parts() {
        let model = model(&["hgrn"]);
        let new = |prompt: &[u32]| Generator::new(&model, prompt, Sampling::default(), 13);
        assert_eq!(new(&[]).unwrap_err().to_string(), "prompt: is empty");
        assert!(new(&[1, 13]).unwrap_err().to_string().contains("outside the vocabulary"));
        let ids: Vec<u32> = (0..PREFILL as u32 + 9).map(|i| i % 13).collect();
        let (hidden, _) = model.forward(ids_tensor(&ids, [1, ids.len()], &model.device()), None, None).unwrap();
        let whole = floats(model.logits(hidden.narrow(1, ids.len() - 1, 1)).into_data()).unwrap();
        let parts = new(&ids).unwrap();
        assert!(parts.logits().iter().zip(&whole).all(|(a, b)| (a - b).abs() < 1e-3));
    }

    #[test]
    fn a_model_that_is_not_finite_is_told_not_sampled() {
        use burn::module::{ModuleMapper, Param};
        use burn::tensor::Tensor;
        struct Poison;
        impl ModuleMapper for Poison {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                param.map(|tensor| tensor * f32::NAN)
            }
        }
        let broken = model(&["attention"]).map(&mut Poison);
        for temperature in [0.0, 0.8] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let mut generator = Generator::new(&broken, &[1, 2], sampling, 13).unwrap();
            for _ in 0..2 {
                let error = generator.draw().unwrap_err();
                assert!(matches!(error, Error::Draw { token: 1, .. }), "{error}");
            }
        }
        let mut generator = Generator::new(&model(&["hgrn"]), &[1], Sampling::default(), 0).unwrap();
        assert!(matches!(generator.draw(), Err(Error::Draw { token: 1, .. })), "no token is allowed");
    }
}
