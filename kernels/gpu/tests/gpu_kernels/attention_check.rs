//! One case of attention on a device against the oracle.

use thalweg_gpu::{Buffer, Client, Storage, attention};
use thalweg_kernels::Element;
use thalweg_kernels::attention::AttentionProblem;
use thalweg_reference::attention as oracle;
use thalweg_reference::cases::Precision;
use thalweg_reference::random::Random;
use thalweg_reference::tolerance::{Quantity, relative_error_f32, tolerance};

/// Queries are the last `time` of `kv_time` tokens.
pub(crate) fn check<E: Element + bytemuck::Pod>(
    client: &Client,
    p: &AttentionProblem,
    precision: Precision,
    size: f64,
    seed: u64,
) {
    let mut random = Random::new(seed);
    let AttentionProblem { batch, time, kv_time, heads, kv_heads, key_dim, value_dim, .. } = *p;
    let mut sample = |len: usize, size: f64| {
        precision.round_all(random.normals(len).into_iter().map(|x| size * x).collect::<Vec<f64>>())
    };
    let tokens = batch * kv_time;
    let q = sample(tokens * heads * key_dim, size);
    let k = sample(tokens * kv_heads * key_dim, 1.0);
    let v = sample(tokens * kv_heads * value_dim, 1.0);
    let mut d_o = sample(tokens * heads * value_dim, 1.0);
    // Of the queries that the kernels do not have, nothing is wanted.
    let late = |x: &[f64], width: usize| -> Vec<f64> {
        let skipped = (kv_time - time) * width;
        x.chunks(kv_time * width).flat_map(|row| row[skipped..].to_vec()).collect()
    };
    for row in d_o.chunks_mut(kv_time * heads * value_dim) {
        row[..(kv_time - time) * heads * value_dim].fill(0.0);
    }
    let elements =
        |x: &[f64]| Buffer::from_slice(client, &x.iter().map(|&x| E::from_f32(x as f32)).collect::<Vec<E>>());
    let (mine_q, mine_k, mine_v) = (elements(&late(&q, heads * key_dim)), elements(&k), elements(&v));
    let mine_d = elements(&late(&d_o, heads * value_dim));
    let inputs = attention::Inputs { q: &mine_q, k: &mine_k, v: &mine_v };
    assert!(attention::fits(client, p, Storage::of::<E>()), "{p:?}");
    let out = attention::forward(client, p, &inputs).unwrap();
    let d = attention::backward(client, p, &inputs, &out, &mine_d).unwrap();

    let problem = oracle::Problem {
        batch,
        time: kv_time,
        heads,
        kv_heads,
        key_dim,
        value_dim,
        scale: f64::from(p.scale),
        window: p.window,
        cu_seqlens: p.cu_seqlens.clone(),
    };
    let want = oracle::forward(&problem, &q, &k, &v);
    let want_d = oracle::backward(&problem, &q, &k, &v, &d_o);
    let close = |name: &str, found: &Buffer, expected: &[f64], quantity: Quantity| {
        let found: Vec<f32> = found.read::<E>(client).unwrap().iter().map(|x| x.to_f32()).collect();
        let (error, allowed) = (relative_error_f32(&found, expected), tolerance(precision, quantity, size > 1.0));
        assert!(error <= allowed, "{p:?}: {name} is off by {error:.2e}, allowed {allowed:.0e}");
    };
    close("o", &out.o, &late(&want, heads * value_dim), Quantity::Value);
    close("dv", &d.dv, &want_d.v, Quantity::Gradient);
    // With one token the weights are constant: the gradients of q and k are zero.
    if kv_time > 1 {
        close("dq", &d.dq, &late(&want_d.q, heads * key_dim), Quantity::Gradient);
        close("dk", &d.dk, &want_d.k, Quantity::Gradient);
    }
}
