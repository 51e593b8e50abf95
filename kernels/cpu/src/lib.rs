//! Linear-recurrence kernels on plain slices: no framework, no Burn.
//!
//! Every kernel has a `forward` over whole sequences and a `backward` for all of its inputs; the recurrences have a
//! `step` for one token too. Elements are f32, bf16 or f16 ([`Element`]); gates, states and sums are f32. Work is
//! spread over the threads of the current rayon pool; vector units are chosen at run time ([`vector_unit`]). Arguments
//! are checked first: an [`Error`] names the argument, what was found and what was expected.
//!
//! | module | computes |
//! |---|---|
//! | [`matrix`] | recurrences with a matrix state: GLA, RetNet, Mamba-2, DeltaNet, Gated DeltaNet, KDA, RWKV-7 |
//! | [`elementwise_scan`], [`complex_scan`], [`rg_lru`] | recurrences with a vector state: HGRN, LRU, GateLoop, RG-LRU |
//! | [`attention`] | causal softmax attention: windows, grouped heads, a cache |
//! | [`short_conv`] | depth-wise causal convolution with state |
//! | [`linear`], [`norm`], [`glu`], [`adamw`] | what stands between them in a model, and its optimizer |
//! | [`cost`] | FLOP and bytes of each, and of each launch on a GPU |
//! | [`ceiling`] | what this machine can do at the most |
//!
//! The math is in the book: `docs/src/math.md`.
//!
//! ```
//! use thalweg_kernels::matrix::{self, Gate, KeepStates, MatrixInputs, MatrixProblem, Write};
//!
//! // Three tokens, one head, one feature; the state is halved before each write: 1, 1.5, 1.75.
//! let problem = MatrixProblem::new(1, 3, 1, 1, 1);
//! let (ones, g) = ([1.0f32; 3], [-(2f32.ln()); 3]);
//! let gate = Gate::Key(&g[..]);
//! let inputs = MatrixInputs { q: &ones, k: &ones, v: &ones, gate, write: Write::Additive, initial_state: None };
//! let out = matrix::forward(&problem, &inputs, KeepStates::Yes)?;
//! assert!((out.o[2] - 1.75).abs() < 1e-6);
//!
//! // The first value reaches three outputs: 1 + 1/2 + 1/4.
//! let gradients = matrix::backward(&problem, &inputs, &ones, None, out.chunk_states.as_deref())?;
//! assert!((gradients.dv[0] - 1.75).abs() < 1e-6);
//!
//! // The next token updates the state in place.
//! let mut state = out.final_state;
//! let one = &ones[..1];
//! let token = MatrixInputs { q: one, k: one, v: one, gate: Gate::Key(&g[..1]), ..inputs };
//! let o = matrix::step(&MatrixProblem::new(1, 1, 1, 1, 1), &token, &mut state)?;
//! assert!((o[0] - 1.875).abs() < 1e-6);
//! # Ok::<(), thalweg_kernels::Error>(())
//! ```

pub mod adamw;
pub mod attention;
pub mod ceiling;
mod channels;
pub mod complex_scan;
pub mod cost;
mod element;
pub mod elementwise_scan;
mod error;
pub mod glu;
pub mod linear;
pub mod matrix;
mod native;
pub mod norm;
pub mod rg_lru;
mod sequences;
pub mod short_conv;
#[cfg(test)]
mod testing;

pub use channels::{MAX_GROWTH, ScanProblem};
pub use element::{Element, ElementKind};
pub use error::Error;
pub use native::simd::vector_unit;
pub use sequences::Sequences;
