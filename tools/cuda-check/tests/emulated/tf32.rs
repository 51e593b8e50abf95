//! f32 tensors on matrix units.

use crate::attention_check;
use crate::matrix_check::{KERNELS, Sizes, check};
use thalweg_cuda_check::{Arch, emulator};
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::cases::{Gates, Precision};

/// Tensors of 8 significant bits are exact in tf32; what the products make of them has 11.
#[test]
fn every_form_on_matrix_units() {
    let client = emulator(Arch::Sm80).with_poisoned_outputs().with_tf32(true);
    for (i, form) in KERNELS.into_iter().enumerate() {
        let sizes = Sizes { time: 150, heads: 1, value_heads: 1, key_dim: 128, value_dim: 64, cu_seqlens: None };
        check::<f32>(&client, &sizes, form, Precision::Bf16, Gates::Mean(0.05), i as u64);
    }
    let p = AttentionProblem::new(1, 150, 2, 64);
    attention_check::check::<f32>(&client, &p, Precision::Bf16, 1.0, 0);
}
