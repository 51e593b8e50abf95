//! Kernels with indices of 64 bits, as tensors of more than 2^30 elements get them, on tensors that an emulator has room for.

#[path = "../../../../kernels/gpu/tests/gpu_kernels/scan.rs"]
mod scan;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/short_conv.rs"]
mod short_conv;

use crate::attention_check;
use crate::matrix_check::{KERNELS, Sizes, check};
use half::bf16;
use thalweg_cuda_check::{Arch, emulator};
use thalweg_gpu::Client;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::cases::{Gates, Precision};

/// For the scans' tests, which are here in full.
fn client() -> Option<Client> {
    Some(emulator(Arch::Sm90).with_poisoned_outputs().with_wide_addresses())
}

/// The forms whose kernels differ most: a gate per head, the delta rule with one, and a low-rank write; of equal lengths, and
/// packed ones with heads that share keys.
#[test]
fn matrix_recurrences() {
    let client = client().expect("there is always one");
    let forms = KERNELS.into_iter().filter(|form| [(2, 0), (2, 1), (3, 2)].contains(form));
    for (i, form) in forms.enumerate() {
        let cu_seqlens = (i == 0).then(|| vec![0, 1, 66, 130]);
        let sizes = Sizes { time: 130, heads: 1, value_heads: 2, key_dim: 64, value_dim: 64, cu_seqlens };
        check::<bf16>(&client, &sizes, form, Precision::Bf16, Gates::Mean(0.05), i as u64 + 1);
        let step = Sizes { time: 1, cu_seqlens: None, ..sizes };
        check::<f32>(&client, &step, form, Precision::F32, Gates::Mean(0.05), i as u64 + 1);
    }
}

#[test]
fn attention() {
    let client = client().expect("there is always one");
    let p = AttentionProblem { kv_heads: 1, ..AttentionProblem::new(2, 150, 2, 64) };
    attention_check::check::<bf16>(&client, &p, Precision::Bf16, 1.0, 0);
}
