//! Errors of models, data, training and checkpoints.

use std::path::{Path, PathBuf};

/// What this crate can refuse.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A field of a model's configuration cannot be used.
    #[error("config: `{field}`: {message}")]
    Config {
        /// The field, as it is spelt in a config file.
        field: String,
        /// What is wrong and what was expected.
        message: String,
    },
    /// No preset has this name.
    #[error("preset: no preset is called `{name}`; near names: {}", near.join(", "))]
    UnknownPreset {
        /// The name that was asked for.
        name: String,
        /// Names that exist and look alike.
        near: Vec<String>,
    },
    /// An argument cannot be used.
    #[error("{argument}: {message}")]
    Argument {
        /// The argument, as the command line spells it without its dashes.
        argument: &'static str,
        /// What is wrong and what was expected.
        message: String,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A checkpoint is missing, truncated, or does not fit.
    #[error("checkpoint {}: {message}", path.display())]
    Checkpoint {
        /// The checkpoint's folder or the file in it.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// Another run writes into the folder.
    #[error("{} is in use by another run; wait until it ends or name another folder", path.display())]
    Locked {
        /// The run's folder.
        path: PathBuf,
    },
    /// A layer refused its input.
    #[error(transparent)]
    Layer(#[from] thalweg_layers::Error),
    /// No token can be drawn from the logits.
    #[error("generation stopped at token {token}: {message}")]
    Draw {
        /// Which of the generated tokens it would have been, counted from 1.
        token: usize,
        /// What is wrong with the logits.
        message: String,
    },
    /// Training cannot go on.
    #[error("training stopped at step {step}: {message}")]
    Diverged {
        /// The step.
        step: usize,
        /// What happened.
        message: String,
    },
}

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn config(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::Config { field: field.into(), message: message.into() }
    }

    pub(crate) fn argument(argument: &'static str, message: impl Into<String>) -> Self {
        Self::Argument { argument, message: message.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    pub(crate) fn checkpoint(path: &Path, message: impl Into<String>) -> Self {
        Self::Checkpoint { path: path.to_owned(), message: message.into() }
    }
}

impl From<thalweg_layers::ConfigError> for Error {
    fn from(error: thalweg_layers::ConfigError) -> Self {
        Self::Config { field: error.field, message: error.message }
    }
}
