//! Softmax attention: full and windowed, grouped heads, packed sequences, queries behind a cache.

use crate::attention_check::check;
use crate::client;
use half::f16;
use thalweg_gpu::{Buffer, attention};
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::cases::Precision;

/// Lengths around a block of queries and keys, windows shorter and longer than one, sizes that are no multiple of 16.
#[test]
fn equals_the_oracle() {
    let Some(client) = client() else { return };
    for (i, time) in [1, 5, 63, 64, 65, 200].into_iter().enumerate() {
        for (j, window) in [None, Some(1), Some(17), Some(70)].into_iter().enumerate() {
            let p = AttentionProblem { value_dim: 20, window, ..AttentionProblem::new(2, time, 2, 12) };
            // Scores of some tens make of a row's softmax a maximum.
            let size = [1.0, 30.0][(i + j) % 2];
            check::<f32>(&client, &p, Precision::F32, size, (i * 4 + j) as u64);
        }
    }
}

#[test]
fn grouped_heads_and_packed_sequences() {
    let Some(client) = client() else { return };
    for (i, window) in [None, Some(9)].into_iter().enumerate() {
        let cu_seqlens = Some(vec![0, 1, 33, 130]);
        let p = AttentionProblem { kv_heads: 2, window, cu_seqlens, ..AttentionProblem::new(1, 130, 4, 32) };
        check::<f32>(&client, &p, Precision::F32, 1.0, i as u64);
    }
}

#[test]
fn queries_behind_a_cache() {
    let Some(client) = client() else { return };
    for (i, (time, window)) in [(1, None), (40, None), (40, Some(13)), (3, Some(90))].into_iter().enumerate() {
        let p = AttentionProblem { kv_time: 150, kv_heads: 1, window, ..AttentionProblem::new(2, time, 2, 16) };
        check::<f32>(&client, &p, Precision::F32, 1.0, i as u64);
    }
}

#[test]
fn half_precision() {
    let Some(client) = client() else { return };
    // And once sizes that are read one element at a time.
    for (i, head_dim) in [64, 7].into_iter().enumerate() {
        check::<f16>(&client, &AttentionProblem::new(1, 70, 2, head_dim), Precision::Bf16, 1.0, i as u64);
    }
}

#[test]
fn refuses_bad_arguments_by_name() {
    let Some(client) = client() else { return };
    let x = Buffer::from_slice(&client, &[0.0f32; 64]);
    let short = Buffer::from_slice(&client, &[0.0f32; 63]);
    let p = AttentionProblem::new(1, 4, 2, 8);
    let good = attention::Inputs { q: &x, k: &x, v: &x };
    let message =
        |p: &AttentionProblem, x: &attention::Inputs| attention::forward(&client, p, x).unwrap_err().to_string();
    assert_eq!(message(&p, &attention::Inputs { k: &short, ..good }), "`k` has shape [63], expected [1, 4, 2, 8]");
    let no_window = AttentionProblem { window: Some(0), ..p.clone() };
    assert!(message(&no_window, &good).starts_with("`window`"));
    // Rows so long that no device holds blocks of them.
    let wide = AttentionProblem::new(1, 1, 1, 1 << 16);
    let x = Buffer::from_slice(&client, &vec![0.0f32; 1 << 16]);
    assert!(message(&wide, &attention::Inputs { q: &x, k: &x, v: &x }).contains("shared memory"));
}

/// Heads so wide that blocks of them are short, on the software driver and on others.
#[test]
fn wide_heads() {
    let Some(client) = client() else { return };
    let room = client.properties().hardware.max_shared_memory_size;
    let key_dim = if room <= 32 << 10 { 128 } else { 448 };
    let p = AttentionProblem { value_dim: key_dim - 16, ..AttentionProblem::new(1, 40, 2, key_dim) };
    check::<f32>(&client, &p, Precision::F32, 1.0, 0);
}
