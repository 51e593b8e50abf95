//! Errors of the layers.

/// An option of a layer that cannot be used, found before anything is built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ConfigError {
    /// The option, as it is spelt in a config file.
    pub field: String,
    /// What is wrong with its value and what was expected.
    pub message: String,
}

impl ConfigError {
    /// An error about `field`.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }

    /// The same error with the field named from one level further out: `num_heads` becomes `mixer.num_heads`.
    #[must_use]
    pub fn within(self, outer: &str) -> Self {
        Self { field: format!("{outer}.{}", self.field), ..self }
    }
}

/// What a layer can refuse.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option of the layer is unusable.
    #[error("invalid option {0}")]
    Config(#[from] ConfigError),
    /// An argument has the wrong shape.
    #[error("{argument} has shape {actual:?}, expected {expected}")]
    Shape {
        /// Name of the argument.
        argument: &'static str,
        /// Its shape.
        actual: Vec<usize>,
        /// The shape that was expected, in words.
        expected: String,
    },
    /// The state belongs to another kind of layer.
    #[error("state is of kind `{actual}`, this layer is `{expected}`")]
    StateKind {
        /// Kind of the layer.
        expected: &'static str,
        /// Kind of the state.
        actual: String,
    },
    /// The state was made for another layer, or its parts do not fit the layer or each other.
    #[error("state of layer {layer}: `{entry}` is {found}, expected {expected}")]
    State {
        /// Index and kind of the layer: `3 (attention)`.
        layer: String,
        /// The option, tensor or counters that differ.
        entry: String,
        /// What the state has.
        found: String,
        /// What the layer takes.
        expected: String,
    },
    /// Bytes that are not a saved state.
    #[error("saved state: {0}")]
    StateBytes(String),
    /// An operation refused its arguments.
    #[error(transparent)]
    Operation(#[from] thalweg_scan::Error),
    /// `cu_seqlens` does not describe the packed sequence.
    #[error("cu_seqlens {0}")]
    Packing(String),
}

pub(crate) fn shape_error(argument: &'static str, actual: &[usize], expected: impl Into<String>) -> Error {
    Error::Shape { argument, actual: actual.to_vec(), expected: expected.into() }
}

/// `Ok` if `value` is at least 1.
pub(crate) fn positive(field: &str, value: usize) -> Result<(), ConfigError> {
    if value == 0 {
        return Err(ConfigError::new(field, "must be at least 1, got 0"));
    }
    Ok(())
}

/// `Ok(value / parts)` if `parts` divides `value`.
pub(crate) fn divide(field: &str, value: usize, parts_name: &str, parts: usize) -> Result<usize, ConfigError> {
    positive(parts_name, parts)?;
    if value == 0 || !value.is_multiple_of(parts) {
        return Err(ConfigError::new(field, format!("{value} is not a positive multiple of {parts_name} {parts}")));
    }
    Ok(value / parts)
}

/// `Ok` if `value` is finite and greater than 0 in f32, in which layers compute: 1e-50 is not.
///
/// # Errors
/// Names `field` and its value.
pub fn positive_number(field: &str, value: f64) -> Result<(), ConfigError> {
    if !(f32::MIN_POSITIVE..=f32::MAX).contains(&(value as f32)) {
        return Err(ConfigError::new(field, format!("must be a finite number above 0 in f32, got {value}")));
    }
    Ok(())
}

/// `hidden_size * ratio` as a size, if it is one.
pub(crate) fn scaled(field: &str, size: usize, ratio: f64) -> Result<usize, ConfigError> {
    positive_number(field, ratio)?;
    let value = size as f64 * ratio;
    if value.fract() != 0.0 || value < 1.0 {
        return Err(ConfigError::new(field, format!("{ratio} times {size} is not a whole number of features")));
    }
    Ok(value as usize)
}

/// `Ok` if the rotated features of a head come in pairs.
pub(crate) fn even(field: &str, features: usize) -> Result<(), ConfigError> {
    if features == 0 || !features.is_multiple_of(2) {
        return Err(ConfigError::new(
            field,
            format!("gives {features} rotary features per head, expected an even number above 0"),
        ));
    }
    Ok(())
}
