//! Where sequences begin and end: a batch of equal lengths, or packed one after another.

use crate::error::Error;
use std::ops::Range;

/// The sequences of a `[batch, time, ...]` tensor, as ranges of its `batch * time` tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    bounds: Vec<usize>,
}

impl Sequences {
    /// `batch` sequences of `time` tokens or, with `cu_seqlens = [0, .., total]`, the packed sequences
    /// `cu_seqlens[i]..cu_seqlens[i + 1]` of a `[1, total, ...]` tensor.
    ///
    /// # Errors
    /// [`Error::Value`] for a zero `batch` or `time`, [`Error::Sequences`] for boundaries that do not start at 0,
    /// increase strictly and end at `time`, or that come with `batch != 1`.
    pub fn new(batch: usize, time: usize, cu_seqlens: Option<&[usize]>) -> Result<Self, Error> {
        Error::check_positive("batch", batch)?;
        Error::check_positive("time", time)?;
        let Some(bounds) = cu_seqlens else {
            return Ok(Self { bounds: (0..=batch).map(|b| b * time).collect() });
        };
        let fail = |reason: String| Err(Error::Sequences { reason });
        if batch != 1 {
            return fail(format!("needs batch 1, the batch is {batch}"));
        }
        if bounds.len() < 2 || bounds[0] != 0 {
            return fail(format!("must begin with 0 and hold at least one sequence, got {bounds:?}"));
        }
        if let Some(i) = (1..bounds.len()).find(|&i| bounds[i] <= bounds[i - 1]) {
            return fail(format!("must increase, but entry {i} is {} after {}", bounds[i], bounds[i - 1]));
        }
        let last = bounds[bounds.len() - 1];
        if last != time {
            return fail(format!("ends at {last}, the tensor has {time} tokens"));
        }
        Ok(Self { bounds: bounds.to_vec() })
    }

    /// How many sequences there are: the leading size of a state tensor.
    pub fn count(&self) -> usize {
        self.bounds.len() - 1
    }

    /// All tokens together.
    pub fn tokens(&self) -> usize {
        self.bounds[self.count()]
    }

    /// The tokens of every sequence, if all have as many.
    pub fn common_length(&self) -> Option<usize> {
        let length = self.range(0).len();
        (1..self.count()).all(|n| self.range(n).len() == length).then_some(length)
    }

    /// The tokens of sequence `n`.
    pub fn range(&self, n: usize) -> Range<usize> {
        self.bounds[n]..self.bounds[n + 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_what_is_not_a_partition() {
        assert_eq!(Sequences::new(2, 3, None).unwrap().range(1), 3..6);
        assert_eq!(Sequences::new(2, 3, None).unwrap().common_length(), Some(3));
        assert_eq!(Sequences::new(1, 7, Some(&[0, 2, 7])).unwrap().range(1), 2..7);
        assert_eq!(Sequences::new(1, 7, Some(&[0, 2, 7])).unwrap().common_length(), None);
        for bad in [&[0][..], &[1, 7], &[0, 5, 5, 7], &[0, 6]] {
            assert!(matches!(Sequences::new(1, 7, Some(bad)), Err(Error::Sequences { .. })), "{bad:?}");
        }
        assert!(Sequences::new(2, 7, Some(&[0, 14])).is_err());
        assert!(Sequences::new(0, 7, None).is_err());
    }
}
