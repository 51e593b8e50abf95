//! Whole models of about 10 M parameters: training, prefill, greedy decoding.

use crate::layers::parameters;
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Entry, Error, Part, Pass, Path, noise};
use burn::module::Module;
use burn::tensor::{Device, Int, Tensor, TensorData};
use serde_json::json;
use thalweg_kernels::cost::Cost;
use thalweg_models::data::{Batch, BatchSource};
use thalweg_models::{Model, ModelConfig, ModelState, TrainOptions, Trainer};

const fn model(name: &'static str) -> Entry {
    Entry {
        part: Part::Models,
        name,
        axes: &["batch", "time"],
        shapes: &[&[4, 512]],
        steps: &[&[1, 16], &[8, 16], &[32, 16]],
        chunked: false,
        paths: &[Path::Burn],
        dtypes: &[Dtype::F32],
    }
}

/// The stacks. A step comes after a prompt of `time` tokens.
pub(crate) const ENTRIES: &[Entry] =
    &[model("gated_delta_net-3:1"), model("gla-3:1"), model("griffin-2:1"), model("transformer")];

/// Tokens that a run decodes.
const STEPS: usize = 64;
const VOCABULARY: usize = 256;
const HIDDEN: usize = 320;
/// Divisible by all periods but Griffin's.
const LAYERS: usize = 8;

/// Eight layers of width 320 with gated channel mixers of 864; heads of 64, values of Gated DeltaNet of 128. Attention
/// has the norms, the output gate and the partial rotation of Qwen3-Next.
fn config(name: &str) -> Result<ModelConfig, Error> {
    let attention = json!({
        "type": "attention", "num_heads": 5, "head_dim": 64, "qk_norm": true, "norm_unit_offset": true,
        "output_gate": true, "partial_rotary_factor": 0.25
    });
    let (pattern, mixer): (&[&str], _) = match name {
        "gated_delta_net-3:1" => (
            &["mixer", "mixer", "mixer", "attention"],
            json!({"type": "gated_delta_net", "num_heads": 4, "head_dim": 64, "expand_v": 2.0}),
        ),
        "gla-3:1" => {
            (&["mixer", "mixer", "mixer", "attention"], json!({"type": "gla", "num_heads": 5, "expand_k": 1.0}))
        }
        "griffin-2:1" => (&["mixer", "mixer", "local"], json!({"type": "rg_lru", "num_heads": 5})),
        _ => (&["attention"], json!(null)),
    };
    let mut local = attention.clone();
    local["window"] = 128.into();
    let mut mixers = serde_json::Map::new();
    for (name, options) in [("attention", attention), ("mixer", mixer), ("local", local)] {
        if pattern.contains(&name) {
            mixers.insert(name.into(), options);
        }
    }
    let text = json!({
        "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "layers": LAYERS, "pattern": pattern, "mixers": mixers,
        "channel_mixer": {"type": "swiglu", "intermediate_size": 864}
    });
    Ok(ModelConfig::from_json(&text.to_string())?)
}

/// Random ids.
struct Bytes {
    context: usize,
}

fn ids(seed: u64, rows: usize, time: usize) -> Vec<u32> {
    noise::fill(seed, [rows, time, 1], |u| u * VOCABULARY as f32).into_iter().map(|id| id as u32).collect()
}

impl BatchSource for Bytes {
    fn train(&self, index: u64, rows: usize) -> Batch {
        let inputs = ids(index, rows, self.context);
        let targets = inputs.iter().skip(1).chain(inputs.first()).copied().collect();
        Batch { inputs, targets, weights: None, rows, context: self.context, cu_seqlens: None }
    }

    fn held_out(&self, _: usize, _: Option<usize>) -> Box<dyn Iterator<Item = Batch> + '_> {
        Box::new(std::iter::empty())
    }

    fn vocab_size(&self) -> usize {
        VOCABULARY
    }

    fn bytes_per_token(&self) -> Option<f64> {
        None
    }

    fn fingerprint(&self) -> u64 {
        0
    }
}

enum Work {
    Train(Box<Trainer<'static>>),
    Prefill(Box<Model>),
    /// With the state and the logits after the prompt.
    Decode(Box<Model>, Box<(ModelState, Tensor<2>)>),
}

pub(crate) struct Whole {
    case: Case,
    work: Work,
    ids: Tensor<2, Int>,
    /// Of the last token of each row.
    logits: Option<Tensor<2>>,
    decoded: Vec<Tensor<1, Int>>,
}

impl Whole {
    pub fn new(case: &Case, device: &Device) -> Result<Self, Error> {
        let [batch, time] = case.shape[..] else { unreachable!("checked by `build`") };
        let config = config(&case.name)?;
        let values: Vec<i64> = ids(0, batch, time).into_iter().map(i64::from).collect();
        let tokens = Tensor::from_data(TensorData::new(values, [batch, time]), device);
        let model = || Model::new(&config, 0, device).map(Box::new);
        let work = match case.pass {
            Pass::Train => {
                // A trainer borrows its source; this one is a number, and lives as long as the benchmarks.
                let source = Box::leak(Box::new(Bytes { context: time }));
                let options =
                    TrainOptions { steps: 1 << 20, batch, context: time, lr: 1e-3, ..TrainOptions::default() };
                Work::Train(Box::new(Trainer::new(&config, source, None, options, device)?))
            }
            Pass::Forward => Work::Prefill(model()?),
            Pass::Step => {
                let model = model()?;
                let (logits, state) = prefill(&model, tokens.clone())?;
                Work::Decode(model, Box::new((state, logits)))
            }
        };
        Ok(Self { case: case.clone(), work, ids: tokens, logits: None, decoded: Vec::new() })
    }

    fn model(&self) -> Model {
        match &self.work {
            Work::Train(trainer) => trainer.model().valid(),
            Work::Prefill(model) | Work::Decode(model, ..) => (**model).clone(),
        }
    }
}

/// Logits of the last token of each row, and the state after it.
fn prefill(model: &Model, ids: Tensor<2, Int>) -> Result<(Tensor<2>, ModelState), Error> {
    let time = ids.dims()[1];
    let (hidden, state) = model.forward(ids, None, None)?;
    Ok((model.logits(hidden.narrow(1, time - 1, 1)).squeeze_dim(1), state))
}

/// Logits after the last of `ids`, one step at a time.
fn stepwise(model: &Model, ids: &Tensor<2, Int>) -> Result<Tensor<2>, Error> {
    let [batch, time] = ids.dims();
    let (mut state, mut logits) = (model.initial_state(batch), None);
    for t in 0..time {
        let (next, after) = model.step(ids.clone().narrow(1, t, 1).squeeze_dim(1), state)?;
        (state, logits) = (after, Some(next));
    }
    logits.ok_or_else(|| Error::argument("time", "is 0, expected at least 1"))
}

fn floats(x: Tensor<2>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

impl Workload for Whole {
    fn run(&mut self) -> Result<(), Error> {
        match &mut self.work {
            Work::Train(trainer) => {
                trainer.step()?;
            }
            Work::Prefill(model) => self.logits = Some(prefill(model, self.ids.clone())?.0),
            Work::Decode(model, start) => {
                let (mut state, mut logits) = (**start).clone();
                self.decoded.clear();
                for _ in 0..STEPS {
                    let next = logits.argmax(1).squeeze_dim::<1>(1);
                    self.decoded.push(next.clone());
                    (logits, state) = model.step(next, state)?;
                }
                self.logits = Some(logits);
            }
        }
        Ok(())
    }

    /// What the model gives is compared, also where it is trained: its forward pass with its steps.
    fn found(&self) -> Vec<Named> {
        let logits = match &self.work {
            Work::Train(_) => prefill(&self.model(), self.ids.clone()).ok().map(|(logits, _)| logits),
            _ => self.logits.clone(),
        };
        logits.into_iter().map(|logits| Named { name: "logits", values: floats(logits) }).collect()
    }

    fn head(&self, _: usize) -> Vec<f64> {
        Vec::new()
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let model = self.model();
        let logits = if self.case.pass == Pass::Step {
            let decoded = self.decoded.iter().map(|id| id.clone().unsqueeze_dim(1));
            let all = Tensor::cat(std::iter::once(self.ids.clone()).chain(decoded).collect(), 1);
            prefill(&model, all)?.0
        } else {
            stepwise(&model, &self.ids)?
        };
        Ok(vec![Expected { name: "logits", values: floats(logits), allowed: 1e-4 }])
    }

    /// The work of the parameters' products, the tied head's included; mixing along the sequence is not counted.
    fn cost(&self) -> Cost {
        let state = match &self.work {
            Work::Decode(_, start) => 2 * start.0.size_in_bytes() as u64,
            _ => 0,
        };
        let count = self.model().num_params() as u64;
        parameters(count, self.tokens() as u64, self.case.pass) + Cost { flops: 0, bytes: state }
    }

    fn tokens(&self) -> usize {
        self.case.shape[0] * if self.case.pass == Pass::Step { 1 } else { self.case.shape[1] }
    }

    fn calls(&self) -> usize {
        if self.case.pass == Pass::Step { STEPS } else { 1 }
    }
}
