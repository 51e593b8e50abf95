//! One short file per recurrence: its equation, its arguments, and which decay and write it composes.

mod adamw;
mod attention;
mod complex_scan;
mod delta_rule;
mod dplr;
mod gated_delta_rule;
mod gla;
mod glu;
mod hgrn2;
mod kda;
mod linear;
mod linear_attention;
mod linear_scan;
pub(crate) mod matrix;
mod norm;
mod rg_lru;
mod short_conv;
mod simple_gla;

pub use adamw::{AdamWOutput, adamw};
pub use attention::{attention, attention_step};
pub use complex_scan::{ComplexScanOutput, complex_scan, complex_scan_step};
pub use delta_rule::{delta_rule, delta_rule_step};
pub use dplr::{dplr, dplr_step};
pub use gated_delta_rule::{gated_delta_rule, gated_delta_rule_step};
pub use gla::{gla, gla_step};
pub use glu::{glu, self_gated};
pub use hgrn2::{hgrn2, hgrn2_step};
pub use kda::{kda, kda_step};
pub use linear::{block_linear, linear};
pub use linear_attention::{
    NormalizedOutput, linear_attention, linear_attention_step, normalized_linear_attention,
    normalized_linear_attention_step,
};
pub use linear_scan::{ScanOutput, hgrn, hgrn_step, linear_scan, linear_scan_step};
pub use matrix::Output;
pub use norm::{l2_norm, rms_norm};
pub use rg_lru::{rg_lru, rg_lru_step};
pub use short_conv::{ConvActivation, ShortConvOutput, short_conv, short_conv_step};
pub use simple_gla::{retention, retention_step, simple_gla, simple_gla_step};
pub use thalweg_kernels::adamw::AdamWStep;
pub use thalweg_kernels::glu::Activation as GluActivation;
