//! Verify-then-time benchmarks.
//!
//! A wrong kernel may be fast. So every benchmark first runs on a small shape and is compared with the f64 oracle of
//! `thalweg-reference`, and the output at its full shape is compared with it over the first tokens; one that is out of
//! tolerance is an [`Error::Wrong`], not a time. Then come warm-up and repetitions: [`Row`] has median, minimum and
//! interquartile range, the FLOP and bytes of [`thalweg_kernels::cost`], and the fraction of the ceiling that binds,
//! which [`Ceilings`] measures on the same machine in the same run.
//!
//! [`Selection::cases`] lists what to run, [`Runner`] runs it, [`Report`] keeps the rows and compares them with an
//! earlier report, [`plot`] draws them, [`serve`] answers single requests for side-by-side runs.
//!
//! | item | does |
//! |---|---|
//! | [`catalogue`], [`Entry`] | all benchmarks, with their default shapes |
//! | [`Selection`], [`Case`] | a choice of them; one benchmark at one shape |
//! | [`Runner`], [`Effort`], [`Samples`] | verify, then time |
//! | [`Ceilings`], [`Machine`] | what this machine can do, and which it is |
//! | [`Report`], [`Row`], [`Change`] | results as JSON, and their comparison |
//!
//! ```
//! use thalweg_bench::{Pass, Selection};
//!
//! let selection = Selection { filter: vec!["ops/gla/".into()], pass: vec![Pass::Step], ..Selection::default() };
//! let cases = selection.cases()?;
//! // One token of one sequence, and of eight: batch, time, heads, key_dim, value_dim.
//! assert_eq!(cases.len(), 2);
//! assert_eq!(cases[1].shape, [8, 1, 4, 128, 128]);
//! # Ok::<(), thalweg_bench::Error>(())
//! ```

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
