//! The tests of the GPU kernels on an emulated H100: what CUDA gets, run by the CPU, in the configurations that only large
//! devices select: chunks of 64 tokens, matrix units with operands of 16 bits.

#[path = "../../../../kernels/gpu/tests/gpu_kernels/attention.rs"]
mod attention;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/attention_check.rs"]
mod attention_check;
mod emulator_itself;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/matrix.rs"]
mod matrix;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/matrix_check.rs"]
mod matrix_check;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/scan.rs"]
mod scan;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/scan_extremes.rs"]
mod scan_extremes;
#[path = "../../../../kernels/gpu/tests/gpu_kernels/short_conv.rs"]
mod short_conv;
mod tf32;
mod wide_addresses;

use half::bf16;
use matrix_check::{KERNELS, Sizes, check};
use thalweg_cuda_check::{Arch, emulator};
use thalweg_gpu::Client;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::cases::{GATES, Precision};

fn client() -> Option<Client> {
    Some(emulator(Arch::Sm90).with_poisoned_outputs())
}

/// Every form in bf16 at the sizes of models.
///
/// The seeds, here and below, keep apart identical keys, steps of one and gates that leave nothing: together they make of
/// the gradient of the gates a difference of nearly equal numbers, which operands of 8 bits do not resolve.
#[test]
fn bf16_on_matrix_units() {
    let client = client().expect("there is always one");
    for (i, form) in KERNELS.into_iter().enumerate() {
        let sizes = Sizes { time: 200, heads: 1, value_heads: 1, key_dim: 128, value_dim: 128, cu_seqlens: None };
        check::<bf16>(&client, &sizes, form, Precision::Bf16, GATES[(i + 5) % GATES.len()], i as u64 + 1);
    }
}

/// And packed, with heads that share keys.
fn bf16_packed(client: &Client) {
    for (i, form) in KERNELS.into_iter().enumerate() {
        let cu_seqlens = Some(vec![0, 1, 66, 130]);
        let sizes = Sizes { time: 130, heads: 1, value_heads: 2, key_dim: 64, value_dim: 128, cu_seqlens };
        check::<bf16>(client, &sizes, form, Precision::Bf16, GATES[i % GATES.len()], i as u64 + 1);
    }
}

#[test]
fn bf16_packed_on_matrix_units() {
    bf16_packed(&client().expect("there is always one"));
}

/// Without `stmatrix`.
#[test]
fn bf16_packed_on_an_older_device() {
    bf16_packed(&emulator(Arch::Sm80).with_poisoned_outputs());
}

/// Attention in bf16: rows of scores in registers; and heads so wide that they go through shared memory.
#[test]
fn bf16_attention_on_matrix_units() {
    let client = client().expect("there is always one");
    for (i, (head_dim, window)) in [(128, None), (64, Some(50)), (256, None)].into_iter().enumerate() {
        let p = AttentionProblem { kv_heads: 1, window, ..AttentionProblem::new(1, 150, 2, head_dim) };
        attention_check::check::<bf16>(&client, &p, Precision::Bf16, 1.0, i as u64);
    }
}
