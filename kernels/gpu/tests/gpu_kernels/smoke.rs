//! One small case of each kind: what runs where the kernels did not change.

use crate::{attention_check, client, matrix_check};
use thalweg_kernels::ScanProblem;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::cases::{Gates, Precision};

#[test]
fn smoke_matrix() {
    let Some(client) = client() else { return };
    for (i, form) in [(2, 0), (3, 1), (3, 2)].into_iter().enumerate() {
        let sizes =
            matrix_check::Sizes { time: 65, heads: 1, value_heads: 1, key_dim: 12, value_dim: 20, cu_seqlens: None };
        matrix_check::check::<f32>(&client, &sizes, form, Precision::F32, Gates::Mean(0.05), i as u64);
    }
}

#[test]
fn smoke_attention() {
    let Some(client) = client() else { return };
    let p = AttentionProblem { window: Some(17), ..AttentionProblem::new(1, 65, 2, 12) };
    attention_check::check::<f32>(&client, &p, Precision::F32, 1.0, 0);
}

#[test]
fn smoke_scans() {
    let Some(client) = client() else { return };
    crate::scan::linear::<f32>(&client, &ScanProblem::new(2, 130, 7), false);
}
