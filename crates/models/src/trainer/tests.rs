//! Tests of the training loop.

use super::*;
use crate::data::{Corpus, Document};
use crate::metrics::MetricsLog;
use crate::{checkpoint, params, preset};

pub(crate) fn corpus() -> Corpus {
    // Three documents, so that rows have boundaries.
    let text = |word: &str| Document { name: word.to_owned(), bytes: (word.to_owned() + " runs. ").repeat(40).into() };
    let documents = [text("water"), text("the river"), text("a thalweg")];
    Corpus::new(&documents, &Tokenizer::bytes(), 16, 0).unwrap()
}

pub(crate) fn small() -> ModelConfig {
    let mut config = preset("gated_delta_net-3:1-tiny").unwrap();
    config.hidden_size = 32;
    config.pattern = vec!["gated_delta_net".to_owned(), "attention".to_owned()];
    config.layers = None;
    config.channel_mixer.intermediate_size = Some(48);
    if let Some(thalweg_layers::MixerConfig::GatedDeltaNet(mixer)) = config.mixers.get_mut("gated_delta_net") {
        (mixer.num_heads, mixer.head_dim) = (2, 16);
    }
    if let Some(thalweg_layers::MixerConfig::Attention(mixer)) = config.mixers.get_mut("attention") {
        mixer.num_heads = 2;
    }
    config
}

pub(crate) fn options(steps: usize) -> TrainOptions {
    TrainOptions {
        steps,
        batch: 4,
        context: 16,
        lr: 1e-2,
        warmup: 4.min(steps / 5),
        eval_every: 5,
        save_every: 5,
        ..TrainOptions::default()
    }
}

pub(crate) fn trainer<'a>(source: &'a Corpus, tokenizer: &'a Tokenizer, steps: usize) -> Trainer<'a> {
    Trainer::new(&small(), source, Some(tokenizer), options(steps), &Device::flex()).unwrap()
}

#[test]
fn a_small_hybrid_learns_a_simple_text() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let mut trainer = trainer(&corpus, &tokenizer, 40);
    let before = trainer.evaluate(None).unwrap().bits_per_byte.unwrap();
    let after = trainer.run(&mut |_: &Event<'_>| true).unwrap().bits_per_byte.unwrap();
    assert!(before > 7.0 && after < 0.4 * before, "from {before} to {after} bits per byte");
}

#[test]
fn a_run_that_is_killed_and_resumed_has_the_same_losses() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let folder = tempfile::tempdir().unwrap();
    let mut whole = Vec::new();
    let mut record = |event: &Event<'_>| {
        if let Event::Step(report) = event {
            whole.push(report.loss.to_bits());
        }
        true
    };
    trainer(&corpus, &tokenizer, 20).run(&mut record).unwrap();

    let run = folder.path();
    let mut first = trainer(&corpus, &tokenizer, 20).with_output(run, DataOrigin::default()).unwrap();
    let mut parts = Vec::new();
    // Goes on to step 13 after the checkpoint of step 10, then is gone.
    for _ in 0..13 {
        parts.push(first.step().unwrap().loss.to_bits());
        if first.steps_done() == 10 {
            first.save().unwrap();
        }
    }
    drop(first);
    parts.truncate(10);
    let mut second = Trainer::resume(run, &corpus, Some(&tokenizer), None, &Device::flex()).unwrap();
    assert_eq!(second.steps_done(), 10);
    let mut record = |event: &Event<'_>| {
        if let Event::Step(report) = event {
            parts.push(report.loss.to_bits());
        }
        true
    };
    second.run(&mut record).unwrap();
    assert_eq!(parts, whole);
    assert_eq!(checkpoint::list(run).into_iter().map(|(step, _)| step).collect::<Vec<_>>(), [15, 20]);
}

/// A corpus of which the first tokens of a row count: as many as `counts` says, row after row, in training and held out.
struct Counted<'a> {
    corpus: &'a Corpus,
    counts: Vec<usize>,
}

impl Counted<'_> {
    fn weigh(&self, first: usize, mut batch: Batch) -> Batch {
        let weight = |place: usize| {
            let (row, at) = (first + place / batch.context, place % batch.context);
            f32::from(at < self.counts[row % self.counts.len()])
        };
        batch.weights = Some((0..batch.inputs.len()).map(weight).collect());
        batch
    }
}

impl BatchSource for Counted<'_> {
    fn train(&self, index: u64, rows: usize) -> Batch {
        self.weigh(index as usize * rows, self.corpus.train(index, rows))
    }

    fn held_out(&self, rows: usize, limit: Option<usize>) -> Box<dyn Iterator<Item = Batch> + '_> {
        let batches = self.corpus.held_out(rows, limit).enumerate();
        Box::new(batches.map(move |(index, batch)| self.weigh(index * rows, batch)))
    }

    fn vocab_size(&self) -> usize {
        self.corpus.vocab_size()
    }

    fn bytes_per_token(&self) -> Option<f64> {
        None
    }

    fn fingerprint(&self) -> u64 {
        0
    }
}

/// A trainer of four rows a step, in batches of `batch`, on `source`.
fn spread<'a>(source: &'a Counted<'a>, batch: usize) -> Trainer<'a> {
    let options = TrainOptions { batch, accumulate: 4 / batch, ..options(4) };
    Trainer::new(&small(), source, None, options, &Device::flex()).unwrap()
}

#[test]
fn a_step_is_the_same_however_its_rows_are_spread_over_batches() {
    let corpus = corpus();
    for counts in [vec![16, 16, 16, 16], vec![8, 8, 1, 1], vec![8, 0, 0, 1], vec![0, 0, 0, 3]] {
        let source = Counted { corpus: &corpus, counts: counts.clone() };
        let [whole, halves, rows] = [4, 2, 1].map(|batch| {
            let mut trainer = spread(&source, batch);
            let report = trainer.step().unwrap();
            (report, trainer.evaluate(None).unwrap())
        });
        assert!(whole.0.grad_norm > 0.1);
        for (step, evaluation) in [halves, rows] {
            for (name, found, expected) in [
                ("loss", step.loss, whole.0.loss),
                ("accuracy", step.accuracy, whole.0.accuracy),
                ("gradient", step.grad_norm, whole.0.grad_norm),
                ("held-out loss", evaluation.held_out_loss, whole.1.held_out_loss),
            ] {
                assert!((found - expected).abs() <= 2e-5 * expected, "{counts:?} {name}: {found}, not {expected}");
            }
        }
    }
}

#[test]
fn a_step_in_which_nothing_counts_has_no_gradient() {
    let corpus = corpus();
    let source = Counted { corpus: &corpus, counts: vec![0] };
    for batch in [4, 2] {
        let mut trainer = spread(&source, batch);
        let report = trainer.step().unwrap();
        assert_eq!((report.loss, report.accuracy, report.grad_norm), (0.0, 0.0, 0.0));
        let values = params::values(trainer.model());
        assert!(values.iter().all(|(_, data)| data.iter::<f32>().all(f32::is_finite)));
        let error = trainer.evaluate(None).unwrap_err();
        assert!(error.to_string().starts_with("held-out: "), "no loss is not a loss of 0: {error}");
    }
}

/// What a resumed trainer plans for its steps from 0 on.
fn planned(trainer: &Trainer<'_>) -> Vec<f64> {
    (0..trainer.options().steps).map(|step| trainer.schedule().at(step)).collect()
}

#[test]
fn the_learning_rate_of_a_resumed_run_does_not_jump() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let folder = tempfile::tempdir().unwrap();
    let resume = |steps| Trainer::resume(folder.path(), &corpus, Some(&tokenizer), steps, &Device::flex());
    let mut first = trainer(&corpus, &tokenizer, 8).with_output(folder.path(), DataOrigin::default()).unwrap();
    let rates = planned(&first);
    for _ in 0..6 {
        first.step().unwrap();
    }
    first.save().unwrap();
    drop(first);
    for steps in [None, Some(8)] {
        assert_eq!(planned(&resume(steps).unwrap()), rates, "the same steps are the same run");
    }
    let mut longer = resume(Some(40)).unwrap();
    assert!((longer.schedule().at(39) - 1e-3).abs() < 1e-12, "the floor of the run");
    assert_eq!(longer.step().unwrap().lr, rates[6]);
    longer.save().unwrap();
    let rates = planned(&longer);
    drop(longer);
    let again = resume(None).unwrap();
    assert_eq!((again.steps_done(), planned(&again)), (7, rates), "what was fitted anew is kept");
    drop(again);
    let error = resume(Some(5)).unwrap_err().to_string();
    assert!(error.starts_with("steps: is 5") && error.contains('7'), "{error}");
}

#[test]
fn a_run_whose_rate_has_fallen_to_0_is_not_prolonged() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let folder = tempfile::tempdir().unwrap();
    let options = TrainOptions { lr_floor: 0.0, ..options(2) };
    let mut first = Trainer::new(&small(), &corpus, Some(&tokenizer), options, &Device::flex())
        .unwrap()
        .with_output(folder.path(), DataOrigin::default())
        .unwrap();
    first.run(&mut |_: &Event<'_>| true).unwrap();
    drop(first);
    let resume = |steps| Trainer::resume(folder.path(), &corpus, Some(&tokenizer), steps, &Device::flex());
    let error = resume(Some(9)).unwrap_err().to_string();
    assert_eq!(error, "steps: is 9, but the learning rate has fallen to 0 after 2 steps");
    resume(Some(2)).unwrap();
}

#[test]
fn evaluations_tell_how_far_they_are_and_have_bounds() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let mut trainer = trainer(&corpus, &tokenizer, 1);
    let all = (corpus.held_out_stream().ids.len() - 1) / 16;
    for (tokens, rows, complete) in
        [(0, all, true), (1, 1, false), (40, 2, false), (100, 4, false), (1 << 30, all, true)]
    {
        trainer = trainer.with_eval_tokens(tokens).unwrap();
        let (mut seen, mut left) = (Vec::new(), None);
        let (evaluation, _) = trainer
            .judge(None, &mut |event: &Event<'_>| {
                if let Event::Evaluating(progress) = event {
                    seen.push((progress.batches, progress.total_batches.unwrap(), progress.tokens));
                    left = progress.seconds_left();
                }
                true
            })
            .unwrap();
        let batches = rows.div_ceil(4);
        assert_eq!((seen[0], seen[batches]), ((0, batches, 0), (batches, batches, rows * 16)), "{tokens}");
        assert_eq!((seen.len(), left, evaluation.complete), (batches + 1, Some(0.0), complete), "{tokens}");
    }
    // Whoever asks to stop gets what there is.
    let trainer = trainer.with_eval_tokens(0).unwrap();
    let (evaluation, going) = trainer.judge(None, &mut |_: &Event<'_>| false).unwrap();
    assert!(!going && !evaluation.complete && evaluation.held_out_loss > 0.0);
}

#[test]
fn an_observer_ends_a_run_after_a_checkpoint() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let folder = tempfile::tempdir().unwrap();
    let mut trainer = trainer(&corpus, &tokenizer, 20).with_output(folder.path(), DataOrigin::default()).unwrap();
    let mut log = MetricsLog::open(folder.path(), 0).unwrap();
    let mut stop = |event: &Event<'_>| {
        log.observe(event).unwrap();
        !matches!(event, Event::Step(report) if report.step == 3)
    };
    trainer.run(&mut stop).unwrap();
    assert_eq!(RunState::load(folder.path()).unwrap().step, 3);
    assert_eq!(crate::metrics::read(folder.path()).unwrap().len(), 4, "three steps and the last evaluation");
}

#[test]
fn what_cannot_be_trained_is_refused() {
    let (corpus, tokenizer) = (corpus(), Tokenizer::bytes());
    let refuse = |config: ModelConfig, options: TrainOptions| {
        Trainer::new(&config, &corpus, Some(&tokenizer), options, &Device::flex()).unwrap_err().to_string()
    };
    assert!(refuse(small().with_vocab_size(9), options(1)).starts_with("config: `vocab_size`"));
    let options = TrainOptions { lr: 1e30, clip: 0.0, ..options(9) };
    let mut trainer = Trainer::new(&small(), &corpus, Some(&tokenizer), options, &Device::flex()).unwrap();
    let error = trainer.run(&mut |_: &Event<'_>| true).unwrap_err();
    assert!(matches!(error, Error::Diverged { .. }), "{error}");
}

#[test]
fn options_out_of_range_are_named() {
    let base = options(10);
    assert!(base.validate().is_ok());
    assert!(TrainOptions { steps: 3, warmup: 3, ..base.clone() }.validate().is_ok());
    assert!(TrainOptions { steps: 3, ..TrainOptions::default() }.validate().is_ok(), "the default warm-up is cut");
    let huge = usize::MAX;
    for (name, options) in [
        ("steps", TrainOptions { steps: 0, ..base.clone() }),
        ("batch", TrainOptions { batch: 0, ..base.clone() }),
        ("batch", TrainOptions { batch: huge, ..base.clone() }),
        ("context", TrainOptions { context: huge, ..base.clone() }),
        ("accumulate", TrainOptions { accumulate: 0, ..base.clone() }),
        ("accumulate", TrainOptions { accumulate: huge, ..base.clone() }),
        ("lr", TrainOptions { lr: 0.0, ..base.clone() }),
        ("lr", TrainOptions { lr: -1.0, ..base.clone() }),
        ("lr", TrainOptions { lr: f64::NAN, ..base.clone() }),
        ("lr", TrainOptions { lr: 1e-60, ..base.clone() }),
        ("lr", TrainOptions { lr: 1e60, ..base.clone() }),
        ("lr-floor", TrainOptions { lr_floor: 1.5, ..base.clone() }),
        ("betas", TrainOptions { betas: (1.0, 0.9), ..base.clone() }),
        ("betas", TrainOptions { betas: (0.9, f32::NAN), ..base.clone() }),
        ("weight-decay", TrainOptions { weight_decay: -0.1, ..base.clone() }),
        ("weight-decay", TrainOptions { weight_decay: f32::INFINITY, ..base.clone() }),
        ("clip", TrainOptions { clip: -1.0, ..base.clone() }),
        ("clip", TrainOptions { clip: f64::NAN, ..base.clone() }),
        ("warmup", TrainOptions { warmup: 11, ..base.clone() }),
        ("seed", TrainOptions { seed: u64::MAX, ..base.clone() }),
        ("eval-batches", TrainOptions { eval_batches: 0, ..base.clone() }),
        ("eval-tokens", TrainOptions { eval_tokens: huge, ..base.clone() }),
    ] {
        match options.validate() {
            Err(Error::Argument { argument, .. }) => assert_eq!(argument, name, "{options:?}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}
