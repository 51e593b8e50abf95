//! How an element-wise recurrence is cut into tasks: by sequence and by channel slice. Not by time: a state that is put
//! together from segments is rounded otherwise than one that is walked to, so its bits would depend on the cut, and that on
//! the threads and on the other sequences of the batch.

use super::rows::{AHEAD, BLOCK, Block, to_blocks};
use crate::{channels::MAX_GROWTH, sequences::Sequences};
use rayon::prelude::*;
use std::ops::Range;

/// A run of a sequence's tokens and a slice of the channels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Task {
    pub sequence: usize,
    /// The sequence's tokens, or those of one segment of it.
    pub tokens: Range<usize>,
    pub channels: Range<usize>,
}

impl Task {
    /// Where the task's part of a `[sequences, channels]` state begins, and its length.
    pub fn state(&self, channels: usize) -> Range<usize> {
        let at = self.sequence * channels;
        at + self.channels.start..at + self.channels.end
    }

    /// The task's part of an optional state; zeros where there is none.
    pub fn load_state(&self, state: Option<&[f32]>, channels: usize) -> Vec<Block> {
        let blocks = self.channels.len().div_ceil(BLOCK);
        state.map_or_else(|| vec![[0.0; BLOCK]; blocks], |s| to_blocks(&s[self.state(channels)]))
    }

    /// The blocks of the row of token `t`: which one, where it begins in a `[tokens, channels]` tensor, its length.
    #[inline(always)]
    pub fn blocks(&self, t: usize, channels: usize) -> impl DoubleEndedIterator<Item = (usize, usize, usize)> + use<> {
        let (start, len) = (t * channels + self.channels.start, self.channels.len());
        (0..len.div_ceil(BLOCK)).map(move |j| (j, start + j * BLOCK, BLOCK.min(len - j * BLOCK)))
    }

    /// Where the block begins that the walk over the tokens reaches [`AHEAD`] blocks after block `j`, which begins at `at`.
    #[inline(always)]
    pub fn ahead(&self, j: usize, at: usize, channels: usize) -> usize {
        let blocks = self.channels.len().div_ceil(BLOCK);
        let next_row = if j + AHEAD < blocks { 0 } else { channels.wrapping_sub(blocks * BLOCK) };
        at.wrapping_add(AHEAD * BLOCK).wrapping_add(next_row)
    }

    /// The same for a walk in reverse.
    #[inline(always)]
    pub fn behind(&self, j: usize, at: usize, channels: usize) -> usize {
        let blocks = self.channels.len().div_ceil(BLOCK);
        let next_row = if j >= AHEAD { 0 } else { channels.wrapping_sub(blocks * BLOCK) };
        at.wrapping_sub(AHEAD * BLOCK).wrapping_sub(next_row)
    }
}

/// Rows of a slice should be read in whole pages; the state of a much wider one would leave L1.
const MAX_CHANNELS: usize = 1024;

/// The tasks of one (sequence, channel slice) in order of time.
pub(crate) type Group = Vec<Task>;

/// Cuts a problem for `threads` threads.
pub(crate) fn plan(sequences: &Sequences, channels: usize, threads: usize, _: bool) -> Vec<Group> {
    let n = sequences.count();
    let wanted = if n >= 2 * threads { 1 } else { threads.div_ceil(n) };
    let blocks = channels.div_ceil(BLOCK);
    let count = wanted.max(channels.div_ceil(MAX_CHANNELS));
    // Three tasks occupy two threads as long as four do.
    let even = (count..=2 * count).find(|count| (n * count).is_multiple_of(threads)).unwrap_or(count);
    let count = if n * count < 4 * threads { even } else { count }.clamp(1, blocks);
    let width = channels.div_ceil(count).next_multiple_of(BLOCK);
    let slices: Vec<_> = (0..channels).step_by(width).map(|c| c..(c + width).min(channels)).collect();
    let mut groups = Vec::with_capacity(n * slices.len());
    for sequence in 0..n {
        let task = |channels| Task { sequence, tokens: sequences.range(sequence), channels };
        groups.extend(slices.iter().cloned().map(|slice| vec![task(slice)]));
    }
    groups
}

/// A segment as the affine map that it applies to a state, per channel: `state -> product * state + sum`.
pub(crate) struct Summary {
    pub product: Vec<Block>,
    /// What the tokens make of the state that they were walked from.
    pub sum: Vec<Block>,
    /// The most by which a run of tokens that ends with the segment multiplies.
    pub growth: Vec<Block>,
}

impl Summary {
    /// Takes a state over the segment; `false` where it must be [walked](MAX_GROWTH), which leaves the state as it is.
    /// What is not finite is walked too: `0 * inf` is not what the tokens make of it.
    fn apply(&self, channel: usize, state: &mut f32) -> bool {
        let [product, sum, growth] = [&self.product, &self.sum, &self.growth].map(|x| x.as_flattened()[channel]);
        let next = product * *state + sum;
        let safe = growth <= MAX_GROWTH && state.is_finite() && next.is_finite();
        *state = if safe { next } else { *state };
        safe
    }
}

/// Gives each task the state it starts from. A recurrence that runs backwards in time has its `groups` reversed.
/// `summary` walks over a segment from a state: from zeros for its map, from the true one where the map will not do.
pub(crate) fn with_states(
    groups: Vec<Group>,
    initial: impl Fn(&Task) -> Vec<Block> + Sync,
    summary: impl Fn(&Task, Vec<Block>) -> Summary + Sync,
) -> Vec<(Task, Vec<Block>)> {
    let mut tasks = Vec::new();
    for group in groups {
        let map = |task: &Task| summary(task, task.load_state(None, 0));
        let summaries: Vec<_> = group[..group.len() - 1].par_iter().with_max_len(1).map(map).collect();
        let mut state = initial(&group[0]);
        let mut summaries = summaries.into_iter();
        for task in group {
            let start = state.clone();
            if let Some(map) = summaries.next() {
                let states = state.as_flattened_mut().iter_mut().enumerate();
                let walk: Vec<usize> = states.filter_map(|(c, h)| (!map.apply(c, h)).then_some(c)).collect();
                if !walk.is_empty() {
                    let walked = summary(&task, start.clone()).sum;
                    walk.into_iter().for_each(|c| state.as_flattened_mut()[c] = walked.as_flattened()[c]);
                }
            }
            tasks.push((task, start));
        }
    }
    tasks
}

/// Below this many elements waking the threads takes longer than the work: one token is decoded on the caller's thread.
const SERIAL: usize = 16 << 10;

/// Runs tasks that together have `elements` elements; the results come in the order of the tasks.
pub(crate) fn each<T: Send, R: Send>(tasks: Vec<T>, elements: usize, run: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    if tasks.len() == 1 || elements < SERIAL {
        return tasks.into_iter().map(run).collect();
    }
    tasks.into_par_iter().with_max_len(1).map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_everything_once() {
        for (batch, time, channels) in [(1, 5000, 3), (1, 700, 200), (4, 4096, 1024), (1, 9, 2560), (40, 3, 5000)] {
            let sequences = Sequences::new(batch, time, None).unwrap();
            for threads in [1, 2, 7] {
                let mut seen = vec![0; batch * time * channels];
                for task in plan(&sequences, channels, threads, true).concat() {
                    assert_eq!(task.tokens, sequences.range(task.sequence), "states have the bits of a plain walk");
                    for t in task.tokens {
                        seen[t * channels + task.channels.start..t * channels + task.channels.end]
                            .iter_mut()
                            .for_each(|n| *n += 1);
                    }
                }
                assert!(seen.iter().all(|&n| n == 1));
            }
        }
    }
}
