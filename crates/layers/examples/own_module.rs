//! A mixer in a module of one's own, trained by a loop of one's own, then run token by token.
//!
//! `cargo run --release -p thalweg-layers --example own_module`

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::optim::{AdamWConfig, GradientsParams};
use burn::tensor::{Device, Distribution, Tensor};
use thalweg_layers::gla::{Gla, GlaConfig, GlaState};
use thalweg_layers::{ConfigError, Context, Error, MixerOptions, SequenceMixer, Site};
use thalweg_scan::{ScanOptions, linear_scan};

// ANCHOR: module
/// Reads a sequence of features, writes one number for each token.
#[derive(Module, Debug)]
struct Filter {
    embed: Linear,
    mixer: Gla, // or `Mixer`, where a config file chooses the kind
    head: Linear,
}

impl Filter {
    fn new(features: usize, width: usize, device: &Device) -> Result<Self, ConfigError> {
        let options = GlaConfig { num_heads: 2, ..GlaConfig::default() };
        Ok(Self {
            embed: LinearConfig::new(features, width).init(device),
            mixer: options.init(&Site::new(width), device)?,
            head: LinearConfig::new(width, 1).init(device),
        })
    }

    /// `[batch, time, features]` to `[batch, time, 1]`, from the state before the first token.
    fn forward(&self, x: Tensor<3>) -> Result<Tensor<3>, Error> {
        let x = self.embed.forward(x);
        let (mixed, _) = self.mixer.forward(x.clone(), None, &Context::default())?;
        Ok(self.head.forward(x + mixed))
    }

    /// One token, `[batch, features]` to `[batch, 1]`; takes a state and returns the next one.
    fn step(&self, x: Tensor<2>, state: GlaState) -> Result<(Tensor<2>, GlaState), Error> {
        let x = self.embed.forward(x);
        let (mixed, state) = self.mixer.step(x.clone(), state, &Context::default())?;
        Ok((self.head.forward(x + mixed), state))
    }
}
// ANCHOR_END: module

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // ANCHOR: training
    let device = Device::flex().autodiff();
    device.seed(1);
    let mut model = Filter::new(1, 32, &device)?;
    let mut optimizer = AdamWConfig::new().init();

    // To be learned: y_t = 0.9 y_{t-1} + 0.1 x_t.
    let x = Tensor::<3>::random([4, 64, 1], Distribution::Normal(0.0, 1.0), &device);
    let target = linear_scan(Tensor::full([4, 64, 1], 0.9, &device), x.clone() * 0.1, ScanOptions::new())?.o;

    let mut losses = Vec::new();
    for _ in 0..60 {
        let loss = (model.forward(x.clone())? - target.clone()).square().mean();
        losses.push(loss.clone().into_scalar::<f32>());
        let gradients = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(1e-2, model, gradients);
    }
    // ANCHOR_END: training
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    println!("loss {first:.4}, after 60 steps {last:.4}");
    assert!(last < first);

    // ANCHOR: steps
    let model = model.valid(); // the same parameters without a graph
    let x = x.inner();
    let whole = model.forward(x.clone())?;
    let mut state = model.mixer.initial_state(4, &x.device());
    for t in 0..64 {
        let token = x.clone().narrow(1, t, 1).squeeze_dim::<2>(1);
        let (y, next) = model.step(token, state)?;
        state = next;
        let difference = (y - whole.clone().narrow(1, t, 1).squeeze_dim::<2>(1)).abs().max().into_scalar::<f32>();
        assert!(difference < 1e-4, "token {t}: {difference}");
    }
    // ANCHOR_END: steps
    Ok(())
}
