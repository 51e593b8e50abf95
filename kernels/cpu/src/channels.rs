//! What the element-wise kernels have in common: `[batch, time, channels]` tensors and the sequences in them.

use crate::{error::Error, sequences::Sequences};

/// A scan that is cut in time hands its state over a segment as `product * state + sum`. Where a run of the segment's
/// factors multiplies by more than this, that is not what the tokens make of the state: the product overflows where the
/// state is 0 or small, or large terms cancel. Such a segment is walked from its true state. Below, all that the cut
/// costs is this many roundings of a state.
#[doc(hidden)]
pub const MAX_GROWTH: f32 = 64.0;

/// Sizes of an element-wise op: tensors are `[batch, time, channels]`, states `[sequences, channels]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScanProblem {
    /// Sequences of equal length; 1 for packed ones.
    pub batch: usize,
    /// Tokens of each sequence, or of all packed ones together.
    pub time: usize,
    /// Independent channels.
    pub channels: usize,
    /// Boundaries `[0, .., time]` of packed sequences (`batch` is then 1); see [`Sequences`].
    pub cu_seqlens: Option<Vec<usize>>,
}

impl ScanProblem {
    /// A batch of sequences of equal length.
    pub fn new(batch: usize, time: usize, channels: usize) -> Self {
        Self { batch, time, channels, cu_seqlens: None }
    }

    /// Sequences packed one after another: `cu_seqlens = [0, .., total]`.
    pub fn packed(channels: usize, cu_seqlens: Vec<usize>) -> Self {
        Self { batch: 1, time: cu_seqlens.last().copied().unwrap_or(0), channels, cu_seqlens: Some(cu_seqlens) }
    }

    /// Shape of the tensors of all tokens.
    pub fn token_shape(&self) -> [usize; 3] {
        [self.batch, self.time, self.channels]
    }

    /// Shape of the initial and final state; the leading size counts sequences.
    pub fn state_shape(&self) -> [usize; 2] {
        [self.cu_seqlens.as_ref().map_or(self.batch, |bounds| bounds.len().saturating_sub(1)), self.channels]
    }

    /// Checks the sizes and finds the sequences.
    ///
    /// # Errors
    /// [`Error::Value`] for a size of zero, [`Error::Sequences`] for bad boundaries.
    pub fn sequences(&self) -> Result<Sequences, Error> {
        Error::check_positive("channels", self.channels)?;
        Sequences::new(self.batch, self.time, self.cu_seqlens.as_deref())
    }

    /// Checks a `[batch, time, channels]` argument.
    pub(crate) fn check_tokens<E>(&self, argument: &'static str, x: &[E]) -> Result<(), Error> {
        Error::check_len(argument, x.len(), &[self.batch, self.time, self.channels])
    }

    /// Checks an optional `[sequences, channels]` state.
    pub(crate) fn check_state(&self, argument: &'static str, sequences: usize, x: Option<&[f32]>) -> Result<(), Error> {
        x.map_or(Ok(()), |x| Error::check_len(argument, x.len(), &[sequences, self.channels]))
    }
}
