//! The tests of the GPU kernels on an emulated H100: what CUDA gets, run by the CPU, in the configurations that only large
//! devices select: chunks of 64 tokens, matrix units with operands of 16 bits.

mod emulator_itself;
#[path = "../../../../kernels/tests/gpu/matrix.rs"]
mod matrix;
#[path = "../../../../kernels/tests/gpu/matrix_check.rs"]
mod matrix_check;
#[path = "../../../../kernels/tests/gpu/scan.rs"]
mod scan;

use std::sync::LazyLock;

use half::bf16;
use matrix_check::{FORMS, Sizes, check};
use thalweg_kernels::gpu::{self, Client};
use thalweg_nvrtc::{Arch, emulator};
use thalweg_reference::cases::{GATES, Precision};

fn client() -> Option<Client> {
    static CLIENT: LazyLock<Client> = LazyLock::new(|| emulator(Arch::Sm90).expect("a folder for compiled kernels"));
    gpu::poison_outputs();
    Some(CLIENT.clone())
}

/// Every form in bf16 at the sizes of models: alone, and packed with heads that share keys.
///
/// The seeds keep apart identical keys, steps of one and gates that leave nothing: together they make of the gradient of
/// the gates a difference of nearly equal numbers, which operands of 8 bits do not resolve.
#[test]
fn bf16_on_matrix_units() {
    let client = client().expect("there is always one");
    let older = emulator(Arch::Sm80).expect("a folder for compiled kernels");
    for (i, form) in FORMS.into_iter().enumerate() {
        let gates = |shift: usize| GATES[(i + shift) % GATES.len()];
        let alone = Sizes { time: 200, heads: 1, value_heads: 1, key_dim: 128, value_dim: 128, cu_seqlens: None };
        check::<bf16>(&client, &alone, form, Precision::Bf16, gates(5), i as u64 + 1);
        let cu_seqlens = Some(vec![0, 1, 66, 130]);
        let packed = Sizes { time: 130, heads: 1, value_heads: 2, key_dim: 64, value_dim: 128, cu_seqlens };
        for client in [&client, &older] {
            check::<bf16>(client, &packed, form, Precision::Bf16, gates(0), i as u64 + 1);
        }
    }
}
