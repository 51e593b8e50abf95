//! What can go wrong with a benchmark.

use std::path::PathBuf;

/// Why there is no time.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An option that cannot be used.
    #[error("`{argument}` {reason}")]
    Argument {
        /// Its name.
        argument: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// The result is not that of the oracle: nothing is timed.
    #[error("{case} is wrong: `{tensor}` is off by {error:.1e} of its largest element, {allowed:.0e} is allowed")]
    Wrong {
        /// The benchmark.
        case: String,
        /// The tensor that is off.
        tensor: String,
        /// Largest difference over the largest magnitude.
        error: f64,
        /// The tolerance.
        allowed: f64,
    },
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] thalweg_kernels::Error),
    /// An operation refused its arguments.
    #[error(transparent)]
    Scan(#[from] thalweg_scan::Error),
    /// A layer refused its arguments.
    #[error(transparent)]
    Layer(#[from] thalweg_layers::Error),
    /// A layer refused its options.
    #[error(transparent)]
    Config(#[from] thalweg_layers::ConfigError),
    /// A model refused its arguments.
    #[error(transparent)]
    Model(#[from] thalweg_models::Error),
    /// A file cannot be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is no report.
    #[error("{}: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
    /// A request or answer cannot go through.
    #[error("serve: {0}")]
    Serve(#[from] std::io::Error),
    /// A picture cannot be drawn.
    #[error("plot: {0}")]
    Plot(String),
    /// The device failed.
    #[error("device: {0}")]
    Device(#[from] burn::backend::ExecutionError),
    /// The threads cannot be started.
    #[error("threads: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

impl Error {
    pub(crate) fn argument(argument: &'static str, reason: impl Into<String>) -> Self {
        Self::Argument { argument, reason: reason.into() }
    }
}
