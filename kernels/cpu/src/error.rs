//! What can be wrong with a caller's arguments; found on the host, before any kernel runs.

/// An argument that a kernel cannot work with.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A buffer or tensor has the wrong number of elements or the wrong shape.
    #[error("`{argument}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// Its shape; one number where only a length is known.
        found: Vec<usize>,
        /// The shape that the other arguments imply.
        expected: Vec<usize>,
    },
    /// A size or option is outside of its range.
    #[error("`{argument}` is {found}, expected {expected}")]
    Value {
        /// Name of the argument.
        argument: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
    /// An element of a tensor is outside of its range: a positive log-decay, a NaN.
    #[error("`{argument}` holds {found} at position {position}, expected {expected}")]
    Element {
        /// Name of the argument.
        argument: &'static str,
        /// The offending element.
        found: f32,
        /// Its index in row-major order.
        position: usize,
        /// What is allowed.
        expected: &'static str,
    },
    /// The boundaries of packed sequences are not `0 = c_0 < c_1 < ... < c_N = total`.
    #[error("`cu_seqlens` {reason}")]
    Sequences {
        /// What is wrong with it.
        reason: String,
    },
    /// A device cannot run the kernel, or failed while it ran.
    #[error("the device failed: {reason}")]
    Device {
        /// What the device said.
        reason: String,
    },
}

impl Error {
    /// Checks the length of a buffer against the shape it must have.
    #[doc(hidden)]
    pub fn check_len(argument: &'static str, found: usize, expected: &[usize]) -> Result<(), Error> {
        if found == expected.iter().product::<usize>() {
            return Ok(());
        }
        Err(Error::Shape { argument, found: vec![found], expected: expected.to_vec() })
    }

    /// Checks that a size is at least one.
    pub(crate) fn check_positive(argument: &'static str, found: usize) -> Result<(), Error> {
        if found > 0 {
            return Ok(());
        }
        Err(Error::Value { argument, found: found.to_string(), expected: "at least 1" })
    }

    /// Checks that every log-decay is at most 0 (`-inf` is allowed and forgets everything).
    pub(crate) fn check_log_decay(argument: &'static str, g: &[f32]) -> Result<(), Error> {
        // The common case is one vectorised pass; the position is only looked for when it fails.
        let all = super::native::simd::vectorize(
            #[inline(always)]
            || g.iter().fold(true, |ok, &x| ok & (x <= 0.0)),
        );
        if all {
            return Ok(());
        }
        let position = g.iter().position(|&x| x > 0.0 || x.is_nan()).unwrap_or(0);
        let expected = "a natural-log decay, at most 0 and not NaN";
        Err(Error::Element { argument, found: g[position], position, expected })
    }
}
