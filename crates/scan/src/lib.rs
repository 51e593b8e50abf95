//! Burn operations over the linear-recurrence kernels.
//!
//! Tensors are laid out `[batch, time, heads, feature]`, states `[sequences, heads, key, value]`, gates are natural
//! logs of decays (at most 0). Every recurrence takes an optional initial state and optional bounds of packed
//! sequences, returns its outputs and the final state, and is differentiable in all of them through Burn's autodiff.
//! Most have a `*_step` for one token.
//!
//! | family | functions | returns |
//! |---|---|---|
//! | matrix states | [`gla`], [`hgrn2`], [`simple_gla`], [`retention`], [`linear_attention`], [`delta_rule`], [`gated_delta_rule`], [`kda`], [`dplr`] | [`Output`] |
//! | element-wise | [`linear_scan`], [`hgrn`], [`rg_lru`], [`complex_scan`] | [`ScanOutput`], [`ComplexScanOutput`] |
//! | attention | [`attention`], [`attention_step`] | a tensor |
//! | between them | [`short_conv`], [`linear`], [`block_linear`], [`rms_norm`], [`l2_norm`], [`glu`], [`adamw`] | |
//!
//! On the Flex backend the CPU kernels of [`kernels`] run, on the CubeCL backends (features `cuda`, `rocm`, `metal`,
//! `vulkan`, `webgpu`, `wgpu`) the GPU kernels. Where a backend has no kernel, the chunked algorithm runs in Burn
//! tensor operations; [`Path`] can ask for that anywhere. [`device`] finds a device by its name.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use thalweg_scan::{MatrixOptions, StepOptions, gated_delta_rule, gated_delta_rule_step};
//!
//! let device = Device::default();
//! let x = Tensor::<4>::ones([1, 2, 1, 1], &device);              // q, k and v of two tokens
//! let g = Tensor::<3>::full([1, 2, 1], -(2f32.ln()), &device);   // the state is halved, ...
//! let beta = Tensor::<3>::full([1, 2, 1], 0.5, &device);         // ... then corrected by half of the error
//! let out = gated_delta_rule(x.clone(), x.clone(), x, g, beta, MatrixOptions::new())?;
//! // 0 + 0.5 (1 - 0) = 0.5, then 0.25 + 0.5 (1 - 0.25) = 0.625
//! assert!((out.final_state.clone().into_scalar::<f32>() - 0.625).abs() < 1e-6);
//!
//! // The next token goes on from the state: 0.3125 + 0.5 (1 - 0.3125) = 0.65625.
//! let x = Tensor::<3>::ones([1, 1, 1], &device);
//! let (g, beta) = (Tensor::<2>::full([1, 1], -(2f32.ln()), &device), Tensor::<2>::full([1, 1], 0.5, &device));
//! let (o, _) = gated_delta_rule_step(x.clone(), x.clone(), x, g, beta, out.final_state, StepOptions::new())?;
//! assert!((o.into_scalar::<f32>() - 0.65625).abs() < 1e-6);
//! # Ok::<(), thalweg_scan::Error>(())
//! ```

mod binding;
mod check;
mod device;
mod error;
mod op;
mod options;
mod portable;

pub use device::{DeviceError, device, gpus};
pub use error::Error;
pub use op::*;
pub use options::{
    AttentionOptions, ComplexScanOptions, MatrixOptions, Path, ScanOptions, ShortConvOptions, StepOptions,
};
pub use thalweg_kernels as kernels;

/// The code of the repository's README.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
