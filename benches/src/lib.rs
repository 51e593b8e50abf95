//! Verify-then-time benchmarks.
//!
//! A wrong kernel may be fast. So every benchmark first runs on a small shape and is compared with the f64 oracle of
//! `thalweg-reference`, and the output at its full shape is compared with it over the first tokens; one that is out of
//! tolerance is an [`Error::Wrong`], not a time. Then come warm-up and repetitions: [`Row`] has median, minimum and
//! interquartile range, the FLOP and bytes of [`thalweg_kernels::cost`], and the fraction of the ceiling that binds,
//! which [`Ceilings`] measures on the same machine in the same run.
//!
//! [`Selection::cases`] lists what to run, [`Runner`] runs it, [`Report`] keeps the rows and compares them with an earlier
//! report, [`plot`] draws them, [`serve`] answers single requests for side-by-side runs.

mod case;
mod error;
#[cfg(feature = "gpu")]
mod gpu;
mod heap;
mod layers;
mod machine;
mod models;
mod noise;
mod ops;
pub mod plot;
mod report;
mod runner;
mod select;
mod serve;
mod timing;
mod workload;

pub use case::{Case, Dtype, Part, Pass, Path};
pub use error::Error;
pub use heap::Counting;
pub use machine::{Ceilings, Machine};
pub use report::{Change, Report, Row};
pub use runner::Runner;
pub use select::{Entry, Selection, catalogue};
pub use serve::serve;
pub use timing::{Effort, Samples};
