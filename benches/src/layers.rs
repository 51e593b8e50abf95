//! The sequence-mixing layers: prefill, gradients, decoding.

use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Entry, Error, Part, Pass, Path, noise};
use burn::Tensor;
use burn::module::Module;
use burn::tensor::{Device, Gradients, TensorData};
use serde_json::json;
use thalweg_kernels::cost::Cost;
use thalweg_layers::{Context, Mixer, MixerConfig, MixerState, Site};
use thalweg_scan as scan;

const fn layer(name: &'static str) -> Entry {
    Entry {
        part: Part::Layers,
        name,
        axes: &["batch", "time", "hidden"],
        shapes: &[&[1, 1024, 512]],
        steps: &[&[1, 256, 512], &[8, 256, 512]],
        chunked: false,
        paths: &[Path::Burn, Path::Portable],
        dtypes: &[Dtype::F32],
    }
}

/// Every mixer. A step comes after `time` tokens.
pub(crate) const ENTRIES: &[Entry] = &[
    layer("gla"),
    layer("hgrn"),
    layer("hgrn2"),
    layer("delta_net"),
    layer("gated_delta_net"),
    layer("kda"),
    layer("retnet"),
    layer("lightning"),
    layer("rg_lru"),
    layer("attention"),
];

/// Steps of a run: a state may grow, so that every run goes on from the same one.
const STEPS: usize = 16;

/// Heads of 128 features, where a layer has heads.
fn config(name: &str, hidden: usize) -> Result<MixerConfig, Error> {
    let heads = (hidden / 128).max(1);
    let mut options = match name {
        "gla" => json!({"num_heads": heads, "expand_k": 1.0}),
        "delta_net" => json!({"num_heads": heads}),
        "gated_delta_net" => json!({"num_heads": heads, "head_dim": 128, "expand_v": 1.0}),
        "kda" | "lightning" => json!({"num_heads": heads, "head_dim": 128}),
        "retnet" => json!({"num_heads": heads, "expand_v": 1.0}),
        "attention" => json!({"num_heads": heads}),
        _ => json!({}),
    };
    options["type"] = name.into();
    serde_json::from_value(options).map_err(|error| Error::argument("name", format!("`{name}`: {error}")))
}

pub(crate) struct Layer {
    case: Case,
    mixer: Mixer,
    context: Context,
    /// `[batch, time, hidden]`, for steps with theirs at the end.
    x: Tensor<3>,
    state: Option<MixerState>,
    output: Option<Tensor<3>>,
    gradients: Option<Gradients>,
}

impl Layer {
    pub fn new(case: &Case, device: &Device) -> Result<Self, Error> {
        let [batch, time, hidden] = case.shape[..] else { unreachable!("checked by `build`") };
        let device = if case.pass == Pass::Train { device.clone().autodiff() } else { device.clone() };
        device.seed(1);
        let mixer = config(&case.name, hidden)?.init(&Site::new(hidden), &device)?;
        let steps = if case.pass == Pass::Step { STEPS } else { 0 };
        let shape = [batch, time + steps, hidden];
        let x = Tensor::from_data(TensorData::new(noise::signed(1, shape), shape), &device);
        let x = if case.pass == Pass::Train { x.require_grad() } else { x };
        let path = if case.path == Path::Portable { scan::Path::Portable } else { scan::Path::Auto };
        let context = Context::default().with_path(path);
        let state = match case.pass {
            Pass::Step => Some(mixer.forward(x.clone().narrow(1, 0, time), None, &context)?.1),
            _ => None,
        };
        Ok(Self { case: case.clone(), mixer, context, x, state, output: None, gradients: None })
    }

    /// Tokens `from..` of `x`, one step each from `state`; the outputs.
    fn steps(&self, from: usize, mut state: MixerState, context: &Context) -> Result<Tensor<3>, Error> {
        let [_, time, _] = self.x.dims();
        let mut outputs = Vec::with_capacity(time - from);
        for t in from..time {
            let token = self.x.clone().narrow(1, t, 1).squeeze_dim::<2>(1);
            let (y, next) = self.mixer.step(token, state, context)?;
            (state, outputs) = (next, [outputs, vec![y.unsqueeze_dim(1)]].concat());
        }
        Ok(Tensor::cat(outputs, 1))
    }
}

fn floats(x: Tensor<3>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

impl Workload for Layer {
    fn run(&mut self) -> Result<(), Error> {
        if let Some(state) = &self.state {
            self.output = Some(self.steps(self.case.shape[1], state.fork(), &self.context)?);
            return Ok(());
        }
        let (output, _) = self.mixer.forward(self.x.clone(), None, &self.context)?;
        if self.case.pass == Pass::Train {
            self.gradients = Some(output.backward());
        }
        self.output = Some(output);
        Ok(())
    }

    fn found(&self) -> Vec<Named> {
        let output = self.output.iter().map(|o| Named { name: "o", values: floats(o.clone()) });
        let gradient = self.gradients.iter().filter_map(|gradients| self.x.grad(gradients));
        output.chain(gradient.map(|dx| Named { name: "dx", values: floats(dx) })).collect()
    }

    fn head(&self, _: usize) -> Vec<f64> {
        Vec::new()
    }

    /// A layer has no oracle of its own, but two ways to the same result: its steps, by tensor operations, for its
    /// forward and backward pass; its forward pass, by tensor operations, for its steps.
    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let context = self.context.clone().with_path(scan::Path::Portable);
        let expected = |name, values| Expected { name, values, allowed: 1e-4 };
        if self.case.pass == Pass::Step {
            let (o, _) = self.mixer.forward(self.x.clone(), None, &context)?;
            return Ok(vec![expected("o", floats(o.narrow(1, self.case.shape[1], STEPS)))]);
        }
        let state = self.mixer.initial_state(self.case.shape[0], &self.x.device());
        let o = self.steps(0, state, &context)?;
        let mut results = vec![expected("o", floats(o.clone()))];
        if self.case.pass == Pass::Train {
            results.extend(self.x.grad(&o.backward()).map(|dx| expected("dx", floats(dx))));
        }
        Ok(results)
    }

    /// The projections' work; the recurrence's own, which is less, is in its operation.
    fn cost(&self) -> Cost {
        let [batch, time, hidden] = self.case.shape[..] else { unreachable!("checked by `build`") };
        let tokens = (batch * if self.case.pass == Pass::Step { 1 } else { time }) as u64;
        let state = self.state.as_ref().map_or(0, MixerState::size_in_bytes) as u64;
        parameters(self.mixer.num_params() as u64, tokens, self.case.pass)
            + Cost { flops: 0, bytes: 2 * 4 * tokens * hidden as u64 + 2 * state }
    }

    fn tokens(&self) -> usize {
        self.case.shape[0] * if self.case.pass == Pass::Step { 1 } else { self.case.shape[1] }
    }

    fn calls(&self) -> usize {
        if self.case.pass == Pass::Step { STEPS } else { 1 }
    }
}

/// Products of `tokens` tokens with `count` f32 parameters: once, or with their gradients.
pub(crate) fn parameters(count: u64, tokens: u64, pass: Pass) -> Cost {
    let times = if pass == Pass::Train { 3 } else { 1 };
    Cost { flops: times * 2 * count * tokens, bytes: times * 4 * count }
}
