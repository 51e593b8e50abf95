//! `thalweg generate`: continue a prompt.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args as ClapArgs;
use thalweg_models::{Generator, Sampling, checkpoint};

use crate::{DeviceArgs, Outcome};

/// Continue a prompt with a trained model.
#[derive(Debug, ClapArgs)]
pub struct Args {
    /// A checkpoint, or a run's folder, which stands for its newest one.
    #[arg(long)]
    checkpoint: PathBuf,
    /// The text to continue.
    #[arg(long, allow_hyphen_values = true)]
    prompt: String,
    /// Tokens to add.
    #[arg(long, default_value_t = 256)]
    max_tokens: usize,
    /// Randomness: 0 always takes the most likely token.
    #[arg(long, default_value_t = Sampling::default().temperature)]
    temperature: f64,
    /// Consider only so many of the most likely tokens; 0 is all.
    #[arg(long, default_value_t = Sampling::default().top_k)]
    top_k: usize,
    /// Consider only the most likely tokens that together have this probability.
    #[arg(long, default_value_t = Sampling::default().top_p)]
    top_p: f64,
    /// Fixes what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print speed and the size of the state at the end, on stderr.
    #[arg(long)]
    stats: bool,
}

pub fn run(args: &Args) -> Outcome {
    let Args { temperature, top_k, top_p, seed, .. } = *args;
    let sampling = Sampling { temperature, top_k, top_p, seed };
    sampling.validate()?;
    let device = args.device.find()?;
    let loaded = checkpoint::load(&args.checkpoint, &device)?;
    let tokenizer = loaded.tokenizer.ok_or("checkpoint: was trained on a synthetic task and cannot read text")?;
    crate::tell(tokenizer.notes());
    let prompt = tokenizer.encode("prompt", args.prompt.as_bytes())?;
    if prompt.is_empty() {
        return Err("prompt: is empty".into());
    }

    let start = Instant::now();
    let mut generator = Generator::new(&loaded.model, &prompt, sampling, tokenizer.vocab_size())?;
    let prefill = start.elapsed().as_secs_f64();
    let state_before = generator.state_bytes();

    let mut out = std::io::stdout().lock();
    let mut decoder = tokenizer.decoder();
    let mut print = |text: &str| out.write_all(text.as_bytes()).and_then(|()| out.flush());
    // The prompt as the tokenizer gives it back: what follows is decoded as its continuation.
    print(&prompt.iter().map(|&id| decoder.push(id)).collect::<String>())?;
    let start = Instant::now();
    let mut drawn = 0;
    while drawn < args.max_tokens {
        let id = generator.draw()?;
        drawn += 1;
        if Some(id) == tokenizer.separator() {
            break;
        }
        print(&decoder.push(id))?;
    }
    print(&decoder.finish())?;
    print("\n")?;
    if args.stats {
        let seconds = start.elapsed().as_secs_f64();
        eprintln!(
            "prompt {} tokens, {:.1} tokens/s; generated {drawn} tokens, {:.1} tokens/s; state {state_before} bytes after \
             the prompt, {} at the end",
            prompt.len(),
            prompt.len() as f64 / prefill,
            drawn as f64 / seconds,
            generator.state_bytes()
        );
    }
    Ok(ExitCode::SUCCESS)
}
