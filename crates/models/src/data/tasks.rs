//! Synthetic tasks that separate recurrences: recall, copying, state tracking. Only answers count in the loss.

use rand::Rng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{Batch, BatchSource, FNV_START, fnv1a, rng};
use crate::error::{Error, Result};

/// A kind of task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// Multi-query associative recall (Arora et al. 2023, arXiv:2312.04927): key-value pairs, then the keys in random
    /// order, over and over to the end; the answer to each is its value.
    Mqar,
    /// Symbols, a mark, then as many blanks; the answers are the symbols in their order.
    Copy,
    /// As copy, with the symbols spread among noise (Gu and Dao 2023, arXiv:2312.00752, section 4.1).
    SelectiveCopy,
    /// Bits; the answer at every bit is the parity of all bits up to it.
    Parity,
    /// Digits modulo `vocab`; the answer at every digit is the sum of all digits up to it.
    ModularSum,
    /// Permutations of 3 things; the answer is the product of all up to each.
    S3,
    /// Permutations of 5 things, the smallest group whose word problem is complete for NC1.
    S5,
}

/// A task and its size.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskOptions {
    /// The kind.
    pub task: Task,
    /// Tokens per example.
    pub length: usize,
    /// Key-value pairs of `mqar`, symbols of `copy` and `selective_copy`; unused by the others.
    pub items: usize,
    /// Number of symbols. For `mqar` the half of them are keys and the other half values; for `modular_sum` it is the
    /// modulus; unused by parity and permutations.
    pub symbols: usize,
    /// Fixes the examples.
    pub seed: u64,
}

/// Stands for nothing, where there is no question.
const BLANK: u32 = 0;
/// Ends what is to be copied.
const MARK: u32 = 1;
/// The first symbol.
const FIRST: u32 = 2;

/// Examples held out for judging.
const HELD_OUT_EXAMPLES: usize = 512;

/// Streams of the generator: held-out examples share none with training.
const HELD_OUT_STREAM: u64 = 1 << 63;

impl TaskOptions {
    /// A task at `length` with sizes that fit it.
    pub fn new(task: Task, length: usize, seed: u64) -> Self {
        let items = match task {
            Task::Mqar => (length / 8).max(1),
            Task::Copy => (length.saturating_sub(1) / 2).max(1),
            _ => (length / 4).max(1),
        };
        let symbols = match task {
            Task::Mqar => (4 * items).max(64),
            Task::ModularSum => 5,
            _ => 16,
        };
        Self { task, length, items, symbols, seed }
    }

    /// Checks the sizes.
    ///
    /// # Errors
    /// If the items do not fit into the length or there are too few symbols.
    pub fn validate(&self) -> Result<()> {
        let bad = |argument, message: String| Err(Error::argument(argument, message));
        let (length, items, symbols) = (self.length, self.items, self.symbols);
        if length == 0 || length > 1 << 20 {
            return bad("context", format!("must be between 1 and 1048576, got {length}"));
        }
        if items == 0 {
            return bad("task-items", "must be at least 1, got 0".to_owned());
        }
        let needed = match self.task {
            Task::Mqar => items.saturating_mul(3),
            Task::Copy | Task::SelectiveCopy => items.saturating_mul(2).saturating_add(1),
            _ => 1,
        };
        if needed > length {
            return bad("task-items", format!("{items} need {needed} tokens, the context has {length}"));
        }
        let least = if self.task == Task::Mqar { 2 * items.max(2) } else { 2 };
        if !(least..=1 << 20).contains(&symbols) {
            return bad("task-symbols", format!("must be between {least} and 1048576, got {symbols}"));
        }
        Ok(())
    }

    fn vocab(&self) -> usize {
        match self.task {
            Task::Mqar => FIRST as usize + self.symbols / 2 * 2,
            Task::Copy | Task::SelectiveCopy => FIRST as usize + self.symbols,
            Task::Parity => 2,
            Task::ModularSum => self.symbols,
            Task::S3 => 6,
            Task::S5 => 120,
        }
    }

    /// One example: tokens, answers, and which answers count.
    fn example(&self, rng: &mut StdRng) -> Example {
        let mut example = Example {
            inputs: vec![BLANK; self.length],
            targets: vec![BLANK; self.length],
            weights: vec![0.0; self.length],
        };
        match self.task {
            Task::Mqar => self.recall(rng, &mut example),
            Task::Copy => {
                let start = self.length - 2 * self.items - 1;
                self.copy(rng, &mut example, |item, _| start + item);
            }
            Task::SelectiveCopy => {
                let mut places: Vec<usize> = (0..self.length - self.items - 1).collect();
                places.shuffle(rng);
                places.truncate(self.items);
                places.sort_unstable();
                self.copy(rng, &mut example, |item, _| places[item]);
            }
            Task::Parity => track(rng, &mut example, 2, |sum, bit| sum ^ bit),
            Task::ModularSum => {
                let modulus = self.symbols as u32;
                track(rng, &mut example, modulus, |sum, digit| (sum + digit) % modulus);
            }
            Task::S3 => track(rng, &mut example, 6, compose::<3>),
            Task::S5 => track(rng, &mut example, 120, compose::<5>),
        }
        example
    }

    fn recall(&self, rng: &mut StdRng, example: &mut Example) {
        let half = (self.symbols / 2) as u32;
        let mut keys: Vec<u32> = (0..half).map(|key| FIRST + key).collect();
        keys.shuffle(rng);
        keys.truncate(self.items);
        let values: Vec<u32> = keys.iter().map(|_| FIRST + half + rng.random_range(0..half)).collect();
        for (pair, (&key, &value)) in keys.iter().zip(&values).enumerate() {
            example.inputs[2 * pair] = key;
            example.inputs[2 * pair + 1] = value;
        }
        let mut order: Vec<usize> = (0..self.items).collect();
        for round in (2 * self.items..self.length).step_by(self.items) {
            order.shuffle(rng);
            for (place, &pair) in (round..self.length).zip(&order) {
                example.ask(place, keys[pair], values[pair]);
            }
        }
    }

    fn copy(&self, rng: &mut StdRng, example: &mut Example, place: impl Fn(usize, &mut StdRng) -> usize) {
        let answers = self.length - self.items;
        example.inputs[answers - 1] = MARK;
        for item in 0..self.items {
            let symbol = FIRST + rng.random_range(0..self.symbols as u32);
            let at = place(item, rng);
            example.inputs[at] = symbol;
            example.ask(answers + item, BLANK, symbol);
        }
    }
}

struct Example {
    inputs: Vec<u32>,
    targets: Vec<u32>,
    weights: Vec<f32>,
}

impl Example {
    fn ask(&mut self, at: usize, question: u32, answer: u32) {
        self.inputs[at] = question;
        self.targets[at] = answer;
        self.weights[at] = 1.0;
    }
}

/// Random elements of a group of `size` with the identity 0; the answer is the product so far.
fn track(rng: &mut StdRng, example: &mut Example, size: u32, combine: impl Fn(u32, u32) -> u32) {
    let mut product = 0;
    for at in 0..example.inputs.len() {
        let next = rng.random_range(0..size);
        product = combine(product, next);
        example.ask(at, next, product);
    }
}

/// The permutation that applies `first`, then `second`, all by their index in lexicographic order.
fn compose<const N: usize>(first: u32, second: u32) -> u32 {
    let (first, second) = (permutation::<N>(first), permutation::<N>(second));
    index(first.map(|image| second[image]))
}

fn permutation<const N: usize>(mut index: u32) -> [usize; N] {
    let mut left: Vec<usize> = (0..N).collect();
    std::array::from_fn(|place| {
        let below: u32 = (1..(N - place) as u32).product();
        let choice = index / below;
        index %= below;
        left.remove(choice as usize)
    })
}

fn index<const N: usize>(permutation: [usize; N]) -> u32 {
    let smaller = |place: usize| permutation[place + 1..].iter().filter(|&&image| image < permutation[place]).count();
    (0..N).map(|place| smaller(place) as u32 * (1..(N - place) as u32).product::<u32>()).sum()
}

impl TaskOptions {
    fn batch(&self, first: u64, rows: usize, stream: u64) -> Batch {
        let mut batch = Batch {
            inputs: Vec::with_capacity(rows * self.length),
            targets: Vec::with_capacity(rows * self.length),
            weights: None,
            rows,
            context: self.length,
            cu_seqlens: None,
        };
        let mut weights = Vec::with_capacity(rows * self.length);
        for row in 0..rows as u64 {
            let example = self.example(&mut rng(self.seed, stream | (first + row)));
            batch.inputs.extend(example.inputs);
            batch.targets.extend(example.targets);
            weights.extend(example.weights);
        }
        batch.weights = Some(weights);
        batch
    }
}

impl BatchSource for TaskOptions {
    fn train(&self, index: u64, rows: usize) -> Batch {
        self.batch(index * rows as u64, rows, 0)
    }

    fn held_out(&self, rows: usize, limit: Option<usize>) -> Box<dyn Iterator<Item = Batch> + '_> {
        let batches = HELD_OUT_EXAMPLES.div_ceil(rows);
        let batches = limit.map_or(batches, |limit| batches.min(limit.max(1)));
        Box::new((0..batches as u64).map(move |index| self.batch(index * rows as u64, rows, HELD_OUT_STREAM)))
    }

    fn vocab_size(&self) -> usize {
        self.vocab()
    }

    fn bytes_per_token(&self) -> Option<f64> {
        None
    }

    fn fingerprint(&self) -> u64 {
        fnv1a(FNV_START, format!("{self:?}").into_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(task: Task, length: usize) -> (TaskOptions, Batch) {
        let options = TaskOptions::new(task, length, 7);
        options.validate().unwrap();
        let batch = options.train(3, 1);
        (options, batch)
    }

    #[test]
    fn recall_asks_every_key_for_its_value() {
        let (options, batch) = one(Task::Mqar, 64);
        let pairs = &batch.inputs[..2 * options.items];
        let asked: Vec<usize> = (0..64).filter(|&at| batch.weights.as_ref().unwrap()[at] > 0.0).collect();
        assert_eq!(asked, (2 * options.items..64).collect::<Vec<_>>());
        for at in asked {
            let pair = pairs.chunks(2).find(|pair| pair[0] == batch.inputs[at]).unwrap();
            assert_eq!(batch.targets[at], pair[1]);
        }
    }

    #[test]
    fn copies_come_in_the_order_of_the_symbols() {
        for task in [Task::Copy, Task::SelectiveCopy] {
            let (options, batch) = one(task, 33);
            let answers = 33 - options.items;
            let symbols: Vec<u32> = batch.inputs[..answers].iter().copied().filter(|&id| id >= FIRST).collect();
            assert_eq!(batch.targets[answers..], symbols);
            assert_eq!(batch.inputs[answers - 1], MARK);
            assert_eq!(batch.weights.unwrap().iter().sum::<f32>(), options.items as f32);
        }
    }

    #[test]
    fn states_are_products_in_the_group() {
        let (_, batch) = one(Task::Parity, 50);
        let ones = batch.inputs.iter().sum::<u32>();
        assert_eq!(batch.targets[49], ones % 2);
        for element in 0..120 {
            assert_eq!(index(permutation::<5>(element)), element);
            assert_eq!(compose::<5>(0, element), element);
        }
        // Not commutative, but associative.
        assert_ne!(compose::<3>(1, 2), compose::<3>(2, 1));
        assert_eq!(compose::<5>(compose::<5>(17, 42), 99), compose::<5>(17, compose::<5>(42, 99)));
    }

    #[test]
    fn examples_are_fixed_by_seed_and_index_and_held_out_ones_are_others() {
        for task in [Task::Mqar, Task::Copy, Task::SelectiveCopy, Task::Parity, Task::ModularSum, Task::S3, Task::S5] {
            let options = TaskOptions::new(task, 40, 1);
            assert_eq!(options.train(5, 2), options.train(5, 2));
            assert_eq!(options.train(2, 2).inputs[..40], options.train(4, 1).inputs[..]);
            assert_ne!(Some(options.train(0, 2)), options.held_out(2, None).next());
            let batch = options.train(0, 8);
            let vocab = options.vocab_size() as u32;
            assert!(batch.inputs.iter().chain(&batch.targets).all(|&id| id < vocab));
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let mut options = TaskOptions::new(Task::Mqar, 32, 0);
        options.items = 11;
        assert!(options.validate().unwrap_err().to_string().starts_with("task-items: 11 need 33 tokens"));
        options.items = usize::MAX;
        assert!(options.validate().unwrap_err().to_string().starts_with("task-items"));
        options.items = 4;
        options.symbols = 7;
        assert!(options.validate().unwrap_err().to_string().starts_with("task-symbols"));
        assert!(TaskOptions::new(Task::Parity, 0, 0).validate().is_err());
    }
}
