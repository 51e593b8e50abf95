//! Train a hybrid of your own from Rust, then let it write.
//!
//! ```text
//! cargo run --release -p thalweg-models --example train_tiny -- path/to/text
//! ```

use burn::tensor::Device;
use thalweg_layers::MixerConfig;
use thalweg_layers::attention::AttentionConfig;
use thalweg_layers::gla::GlaConfig;
use thalweg_models::data::{Corpus, read_text, repository_text};
use thalweg_models::{Event, Generator, ModelConfig, Sampling, Tokenizer, TrainOptions, Trainer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let documents = match std::env::args().nth(1) {
        Some(path) => read_text(path.as_ref())?,
        None => repository_text(&std::env::current_dir()?)?,
    };
    // Two layers of gated linear attention, then one of softmax attention that sees 32 tokens.
    let gla = GlaConfig { num_heads: 2, ..GlaConfig::default() };
    let local = AttentionConfig { num_heads: 4, window: Some(32), ..AttentionConfig::default() };
    let config = ModelConfig::new(64, ["gla", "gla", "local"])
        .with_mixer("gla", MixerConfig::Gla(gla))
        .with_mixer("local", MixerConfig::Attention(local));

    let options = TrainOptions { steps: 60, batch: 4, context: 128, warmup: 10, eval_every: 20, ..Default::default() };
    let tokenizer = Tokenizer::bytes();
    let corpus = Corpus::new(&documents, &tokenizer, options.context, options.seed)?;
    let mut trainer = Trainer::new(&config, &corpus, Some(&tokenizer), options, &Device::flex())?;
    trainer.run(&mut |event: &Event<'_>| {
        if let Event::Evaluation(evaluation) = event {
            let bits = evaluation.bits_per_byte.unwrap_or_default();
            println!("step {}: {bits:.3} bits per byte on held-out text", evaluation.step);
        }
        true
    })?;

    let prompt = tokenizer.encode("prompt", b"the ")?;
    let mut generator = Generator::new(trainer.model(), &prompt, Sampling::default(), tokenizer.vocab_size())?;
    let mut decoder = tokenizer.decoder();
    print!("{}", prompt.iter().map(|&id| decoder.push(id)).collect::<String>());
    for _ in 0..80 {
        print!("{}", decoder.push(generator.draw()?));
    }
    println!("{}", decoder.finish());
    Ok(())
}
