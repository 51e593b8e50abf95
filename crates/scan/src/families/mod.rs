//! One short file per recurrence: its equation, its arguments, and which decay and write it composes.

mod delta_rule;
mod dplr;
mod gated_delta_rule;
mod gla;
mod hgrn2;
mod kda;
mod linear_attention;
mod simple_gla;

pub use delta_rule::{delta_rule, delta_rule_step};
pub use dplr::{dplr, dplr_step};
pub use gated_delta_rule::{gated_delta_rule, gated_delta_rule_step};
pub use gla::{gla, gla_step};
pub use hgrn2::{hgrn2, hgrn2_step};
pub use kda::{kda, kda_step};
pub use linear_attention::{
    NormalizedOutput, linear_attention, linear_attention_step, normalized_linear_attention,
    normalized_linear_attention_step,
};
pub use simple_gla::{retention, retention_step, simple_gla, simple_gla_step};
