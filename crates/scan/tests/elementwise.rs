//! The element-wise operations, the short convolution and attention on both paths against the oracle,
//! forward and gradients.

#[macro_use]
mod common;

use burn::Tensor;
use burn::tensor::{Bool, DType, Gradients, TensorData};
use common::*;
use thalweg_reference::{self as oracle, Shape, elementwise};
use thalweg_scan as scan;

const F32: DType = DType::F32;
const TOLERANCE: f64 = 1e-5;
const GRADIENT: f64 = 5e-5;

on_each_device!(
    linear_scan_and_hgrn_equal_the_oracle,
    factors_that_grow_equal_the_oracle,
    large_angles_equal_the_oracle,
    complex_scan_equals_the_oracle,
    rg_lru_equals_the_oracle,
    short_conv_equals_the_oracle,
    attention_equals_the_oracle,
    attention_continues_a_cache,
    steps_equal_sequences,
);

/// Shapes with time 1, around the block sizes, and packed.
fn shapes(channels: usize) -> Vec<Shape> {
    let shape = |batch, time, cu_seqlens| Shape { batch, time, channels, cu_seqlens };
    vec![shape(2, 1, None), shape(2, 65, None), shape(1, 200, None), shape(1, 50, Some(vec![0, 1, 3, 40, 50]))]
}

/// `sum(x * cotangent)` for a random cotangent, and the cotangent.
fn weigh<const D: usize>(random: &mut Random, x: &Tensor<D>) -> (Tensor<1>, Vec<f64>) {
    let cotangent: Tensor<D> = random.tensor(x.dims(), -1.0, 1.0, x.dtype()).detach();
    let loss = (x.clone() * cotangent.clone()).sum();
    (loss, values(&cotangent))
}

#[track_caller]
fn check_gradient<const D: usize>(what: &str, x: &Tensor<D>, gradients: &Gradients, expected: &[f64]) {
    assert_close(what, &gradient(x, gradients), expected, GRADIENT);
}

fn linear_scan_and_hgrn_equal_the_oracle() {
    for &path in paths() {
        for (case, shape) in shapes(3).into_iter().enumerate() {
            for log in [false, true] {
                let mut random = Random::new(case as u64 + 10);
                let dims = [shape.batch, shape.time, shape.channels];
                let gate = match log {
                    true => random.gates(dims, Gates::Mixed, F32),
                    false => random.tensor(dims, -1.0, 1.0, F32) * random.tensor(dims, -0.5, 1.0, F32).sign(),
                };
                check_linear(&mut random, path, &shape, log, &fresh(&gate));
            }
        }
    }
}

fn check_linear(random: &mut Random, path: scan::Path, shape: &Shape, log: bool, gate: &Tensor<3>) {
    let n = shape.sequences().len();
    let b = random.tensor([shape.batch, shape.time, shape.channels], -1.0, 1.0, F32);
    let h0 = random.tensor([n, shape.channels], -1.0, 1.0, F32);
    let mut options = scan::ScanOptions::new().with_initial_state(h0.clone()).with_path(path);
    options.cu_seqlens = shape.cu_seqlens.clone();
    let out = match log {
        true => scan::hgrn(b.clone(), gate.clone(), options),
        false => scan::linear_scan(gate.clone(), b.clone(), options),
    }
    .expect("valid arguments");
    let (loss, d_o) = weigh(random, &out.o);
    let (loss_state, d_state) = weigh(random, &out.final_state);
    let gradients = (loss + loss_state).backward();

    let (a, x, h) = (values(gate), values(&b), values(&h0));
    let kind = if log { elementwise::Gate::Log(&a) } else { elementwise::Gate::Linear(&a) };
    let want = elementwise::scan_forward(shape, kind, &x, Some(&h));
    let adjoint = elementwise::scan_backward(shape, kind, &x, Some(&h), &d_o, Some(&d_state));
    let name = format!("{path:?} {shape:?} log={log}");
    assert_close(&name, &values(&out.o), &want.h, TOLERANCE);
    assert_close(&name, &values(&out.final_state), &want.final_state, TOLERANCE);
    check_gradient(&name, gate, &gradients, &adjoint.gate);
    check_gradient(&name, &b, &gradients, &adjoint.b);
    check_gradient(&name, &h0, &gradients, &adjoint.initial_state);
}

/// Factors of up to 2, and some of 0: products over a block of tokens, or over all, are beyond f32.
fn factors_that_grow_equal_the_oracle() {
    for &path in paths() {
        for (case, mut shape) in shapes(3).into_iter().enumerate() {
            let mut random = Random::new(case as u64 + 15);
            if shape.time == 200 {
                shape.time = 1300;
            }
            let n = shape.batch * shape.time * shape.channels;
            let factors = [0.0, 2.0, -2.0, 1.5, 0.5, -0.7, 0.1, 1.0];
            let gate = (0..n).map(|_| factors[random.uniform(0.0, 8.0) as usize]).collect();
            let gate = leaf(gate, [shape.batch, shape.time, shape.channels], F32);
            check_linear(&mut random, path, &shape, false, &gate);
        }
        // State and gradients are 0, small, or cancel while the product grows; then they decay.
        for (time, grows, factor, b, h0) in [
            (130, 130, 2.0, 0.0, 0.0),
            (1024, 600, 1.2, 0.0, 0.0),
            (700, 400, 1e20, 0.0, 0.0),
            (600, 500, 2.0, -1.0, 1.0),
        ] {
            let part = |first: f64, then: f64| (0..time).map(|t| if t < grows { first } else { then }).collect();
            let a = leaf::<3>(part(factor, 0.5), [1, time, 1], F32);
            let (b_leaf, h0_leaf) = (leaf(part(b, 1.0), [1, time, 1], F32), leaf([h0].to_vec(), [1, 1], F32));
            let options = scan::ScanOptions::new().with_initial_state(h0_leaf).with_path(path);
            let out = scan::linear_scan(a, b_leaf, options).expect("valid arguments");
            let want = |t: usize| if t < grows { h0 } else { 2.0 - (2.0 - h0) * 0.5f64.powi((t + 1 - grows) as i32) };
            let want: Vec<f64> = (0..time).map(want).collect();
            assert_close(&format!("{path:?} {factor}"), &values(&out.o), &want, TOLERANCE);
            assert_close(&format!("{path:?} {factor}"), &values(&out.final_state), &want[time - 1..], TOLERANCE);
        }
        // 2^100 fits, the product over the padded blocks does not.
        let a = leaf::<3>(vec![2.0; 100], [1, 100, 1], F32);
        let b = leaf::<3>(vec![0.0; 100], [1, 100, 1], F32);
        let options = scan::ScanOptions::new().with_path(path);
        let gradients = scan::linear_scan(a.clone(), b.clone(), options).expect("valid").o.sum().backward();
        check_gradient("a", &a, &gradients, &[0.0; 100]);
        let sums: Vec<f64> = (1..=100).rev().map(|n| 2f64.powi(n) - 1.0).collect();
        check_gradient("b", &b, &gradients, &sums);
    }
}

fn complex_scan_equals_the_oracle() {
    for &path in paths() {
        for (case, shape) in shapes(3).into_iter().enumerate() {
            for constant in [false, true] {
                check_complex(case as u64 + 20, path, &shape, constant, 3.0);
            }
        }
    }
}

/// Their reduction takes more digits than they have themselves.
fn large_angles_equal_the_oracle() {
    let shape = Shape { batch: 1, time: 50, channels: 3, cu_seqlens: None };
    for &path in paths() {
        for (angle, constant) in [(9.0, false), (1e4, false), (1e7, false), (3e8, true), (3e38, false)] {
            check_complex(angle as u64, path, &shape, constant, angle);
        }
    }
}

fn check_complex(seed: u64, path: scan::Path, shape: &Shape, constant: bool, angle: f64) {
    let mut random = Random::new(seed);
    let n = shape.sequences().len();
    let dims = [shape.batch, shape.time, shape.channels];
    let gate_dims = if constant { [1, 1, shape.channels] } else { dims };
    let log_a = random.gates(gate_dims, Gates::Ordinary, F32);
    let theta = random.tensor(gate_dims, -angle, angle, F32);
    let b = [0, 1].map(|_| random.tensor(dims, -1.0, 1.0, F32));
    let h0 = [0, 1].map(|_| random.tensor([n, shape.channels], -1.0, 1.0, F32));
    let mut options = scan::ComplexScanOptions::new().with_initial_state(h0[0].clone(), h0[1].clone()).with_path(path);
    options.cu_seqlens = shape.cu_seqlens.clone();
    let out =
        scan::complex_scan(log_a.clone(), theta.clone(), b[0].clone(), b[1].clone(), options).expect("valid arguments");
    let (l0, d_re) = weigh(&mut random, &out.re);
    let (l1, d_im) = weigh(&mut random, &out.im);
    let (l2, d_final_re) = weigh(&mut random, &out.final_re);
    let (l3, d_final_im) = weigh(&mut random, &out.final_im);
    let gradients = (l0 + l1 + l2 + l3).backward();

    let (a, t) = (values(&log_a), values(&theta));
    let lambda = || elementwise::Lambda { log_a: &a, theta: &t };
    let planes = |x: [Vec<f64>; 2]| {
        let [re, im] = x;
        elementwise::Planes { re, im }
    };
    let x = planes([values(&b[0]), values(&b[1])]);
    let h = planes([values(&h0[0]), values(&h0[1])]);
    let (want, last) = elementwise::complex_forward(shape, lambda(), &x, Some(&h));
    let (d_h, d_last) = (planes([d_re, d_im]), planes([d_final_re, d_final_im]));
    let adjoint = elementwise::complex_backward(shape, lambda(), &x, Some(&h), &d_h, Some(&d_last));
    let name = format!("{path:?} {shape:?} constant={constant} angle={angle}");
    assert_close(&name, &values(&out.re), &want.re, TOLERANCE);
    assert_close(&name, &values(&out.im), &want.im, TOLERANCE);
    assert_close(&name, &values(&out.final_re), &last.re, TOLERANCE);
    assert_close(&name, &values(&out.final_im), &last.im, TOLERANCE);
    check_gradient(&name, &log_a, &gradients, &adjoint.log_a);
    check_gradient(&name, &theta, &gradients, &adjoint.theta);
    check_gradient(&name, &b[0], &gradients, &adjoint.b.re);
    check_gradient(&name, &b[1], &gradients, &adjoint.b.im);
    check_gradient(&name, &h0[0], &gradients, &adjoint.initial_state.re);
    check_gradient(&name, &h0[1], &gradients, &adjoint.initial_state.im);
}

fn rg_lru_equals_the_oracle() {
    for &path in paths() {
        for (case, shape) in shapes(3).into_iter().enumerate() {
            let mut random = Random::new(case as u64 + 30);
            let n = shape.sequences().len();
            let dims = [shape.batch, shape.time, shape.channels];
            let x = random.tensor(dims, -1.0, 1.0, F32);
            let r = random.tensor(dims, -4.0, 4.0, F32);
            let i = random.tensor(dims, -4.0, 4.0, F32);
            let a_param = random.tensor([shape.channels], -8.0, 2.0, F32);
            let h0 = random.tensor([n, shape.channels], -1.0, 1.0, F32);
            let reset: Vec<bool> = (0..shape.batch * shape.time).map(|_| random.uniform(0.0, 1.0) < 0.1).collect();
            let data = TensorData::new(reset.clone(), [shape.batch, shape.time]);
            let mask: Tensor<2, Bool> = Tensor::from_data(data, &device());
            let mut options = scan::ScanOptions::new().with_initial_state(h0.clone()).with_path(path);
            options.cu_seqlens = shape.cu_seqlens.clone();
            let out = scan::rg_lru(x.clone(), r.clone(), i.clone(), a_param.clone(), Some(mask), options)
                .expect("valid arguments");
            let (loss, d_o) = weigh(&mut random, &out.o);
            let (loss_state, d_state) = weigh(&mut random, &out.final_state);
            let gradients = (loss + loss_state).backward();

            let [x64, r64, i64] = [&x, &r, &i].map(values);
            let (p64, h64) = (values(&a_param), values(&h0));
            let inputs = oracle::rg_lru::Inputs {
                x: &x64,
                recurrent_logits: &r64,
                input_logits: &i64,
                param: &p64,
                reset: Some(&reset),
                initial_state: Some(&h64),
            };
            let (want, last) = oracle::rg_lru::forward(&shape, &inputs);
            let adjoint = oracle::rg_lru::backward(&shape, &inputs, &d_o, Some(&d_state));
            let name = format!("{path:?} {shape:?}");
            assert_close(&name, &values(&out.o), &want, TOLERANCE);
            assert_close(&name, &values(&out.final_state), &last, TOLERANCE);
            check_gradient(&format!("{name} dx"), &x, &gradients, &adjoint.x);
            check_gradient(&format!("{name} dr"), &r, &gradients, &adjoint.recurrent_logits);
            check_gradient(&format!("{name} di"), &i, &gradients, &adjoint.input_logits);
            check_gradient(&format!("{name} da"), &a_param, &gradients, &adjoint.param);
            check_gradient(&format!("{name} dh0"), &h0, &gradients, &adjoint.initial_state);
        }
    }
}

fn short_conv_equals_the_oracle() {
    for &path in paths() {
        for (case, shape) in shapes(5).into_iter().enumerate() {
            for (silu, width) in [(true, 4), (false, 2)] {
                let mut random = Random::new(case as u64 + 40);
                let n = shape.sequences().len();
                let x = random.tensor([shape.batch, shape.time, shape.channels], -1.0, 1.0, F32);
                let weight = random.tensor([shape.channels, width], -1.0, 1.0, F32);
                let bias = random.tensor([shape.channels], -1.0, 1.0, F32);
                let state = random.tensor([n, shape.channels, width - 1], -1.0, 1.0, F32);
                let activation = if silu { scan::ConvActivation::Silu } else { scan::ConvActivation::None };
                let mut options = scan::ShortConvOptions::new()
                    .with_activation(activation)
                    .with_initial_state(state.clone())
                    .with_path(path);
                options.cu_seqlens = shape.cu_seqlens.clone();
                let out =
                    scan::short_conv(x.clone(), weight.clone(), Some(bias.clone()), options).expect("valid arguments");
                let (loss, d_o) = weigh(&mut random, &out.o);
                let (loss_state, d_state) = weigh(&mut random, &out.final_state);
                let gradients = (loss + loss_state).backward();

                let (x64, w64, b64, s64) = (values(&x), values(&weight), values(&bias), values(&state));
                let inputs =
                    oracle::short_conv::Inputs { x: &x64, weight: &w64, bias: Some(&b64), silu, state: Some(&s64) };
                let (want, last) = oracle::short_conv::forward(&shape, &inputs);
                let adjoint = oracle::short_conv::backward(&shape, &inputs, &d_o, Some(&d_state));
                let name = format!("{path:?} {shape:?} silu={silu}");
                assert_close(&name, &values(&out.o), &want, TOLERANCE);
                assert_close(&name, &values(&out.final_state), &last, TOLERANCE);
                check_gradient(&name, &x, &gradients, &adjoint.x);
                check_gradient(&name, &weight, &gradients, &adjoint.weight);
                check_gradient(&name, &bias, &gradients, &adjoint.bias);
                check_gradient(&name, &state, &gradients, &adjoint.state);
            }
        }
    }
}

fn attention_equals_the_oracle() {
    for &path in paths() {
        for (time, window, cu_seqlens) in
            [(1, None, None), (300, None, None), (300, Some(17), None), (60, Some(9), Some(vec![0, 1, 33, 60]))]
        {
            let mut random = Random::new(time as u64 + 50);
            let q = random.tensor([1, time, 4, 8], -1.0, 1.0, F32);
            let k = random.tensor([1, time, 2, 8], -1.0, 1.0, F32);
            let v = random.tensor([1, time, 2, 6], -1.0, 1.0, F32);
            let options = scan::AttentionOptions { window, scale: Some(1.3), cu_seqlens: cu_seqlens.clone(), path };
            let o = scan::attention(q.clone(), k.clone(), v.clone(), options).expect("valid arguments");
            let (loss, d_o) = weigh(&mut random, &o);
            let gradients = loss.backward();

            let problem = oracle::attention::Problem {
                batch: 1,
                time,
                heads: 4,
                kv_heads: 2,
                key_dim: 8,
                value_dim: 6,
                scale: 1.3,
                window,
                cu_seqlens,
            };
            let (q64, k64, v64) = (values(&q), values(&k), values(&v));
            let want = oracle::attention::forward(&problem, &q64, &k64, &v64);
            let adjoint = oracle::attention::backward(&problem, &q64, &k64, &v64, &d_o);
            let name = format!("{path:?} T={time} window={window:?}");
            assert_close(&name, &values(&o), &want, TOLERANCE);
            // With one token the weights are constant: the gradients of q and k are zero.
            if time > 1 {
                check_gradient(&name, &q, &gradients, &adjoint.q);
                check_gradient(&name, &k, &gradients, &adjoint.k);
            }
            check_gradient(&name, &v, &gradients, &adjoint.v);
        }
    }
}

/// Queries that continue a cache see what the whole sequence would show them; one query at a time too.
fn attention_continues_a_cache() {
    for &path in paths() {
        let mut random = Random::new(60);
        let q = random.tensor([2, 40, 4, 8], -1.0, 1.0, F32);
        let k = random.tensor([2, 40, 2, 8], -1.0, 1.0, F32);
        let v = random.tensor([2, 40, 2, 8], -1.0, 1.0, F32);
        for window in [None, Some(7)] {
            let options = scan::AttentionOptions { window, path, ..Default::default() };
            let whole = scan::attention(q.clone(), k.clone(), v.clone(), options.clone()).expect("valid");
            let tail =
                scan::attention(q.clone().narrow(1, 25, 15), k.clone(), v.clone(), options.clone()).expect("valid");
            assert_close("tail", &values(&tail), &values(&whole.clone().narrow(1, 25, 15)), TOLERANCE);
            let from = window.map_or(0, |w| 40 - w);
            let last = scan::attention_step(
                q.clone().narrow(1, 39, 1).squeeze_dim(1),
                k.clone().narrow(1, from, 40 - from),
                v.clone().narrow(1, from, 40 - from),
                options,
            )
            .expect("valid");
            let want = whole.clone().narrow(1, 39, 1).squeeze_dim::<3>(1);
            assert_close("step", &values(&last), &values(&want), TOLERANCE);
            // Without gradients, the first slots of a cache that has more.
            let options = scan::AttentionOptions { window, path, ..Default::default() };
            let (from, q) = (window.map_or(0, |w| 21 - w), q.clone().narrow(1, 20, 1).squeeze_dim::<3>(1));
            let [k, v] = [&k, &v].map(|x| x.clone().inner().narrow(1, from, 21 - from));
            let early = scan::attention_step(q.inner(), k, v, options).expect("valid");
            let want = whole.narrow(1, 20, 1).squeeze_dim::<3>(1);
            assert_close("first slots", &values(&early), &values(&want), TOLERANCE);
        }
    }
}

/// The steps of every element-wise operation equal its whole-sequence form.
fn steps_equal_sequences() {
    let mut random = Random::new(70);
    let dims = [2, 9, 4];
    let x: Tensor<3> = random.tensor(dims, -1.0, 1.0, F32);
    let g = random.gates(dims, Gates::Ordinary, F32);
    let r: Tensor<3> = random.tensor(dims, -3.0, 3.0, F32);
    let a_param: Tensor<1> = random.tensor([4], -4.0, 0.0, F32);
    let weight: Tensor<2> = random.tensor([4, 3], -1.0, 1.0, F32);
    let zero = Tensor::<2>::zeros([2, 4], &device());
    let at = |x: &Tensor<3>, t: usize| x.clone().narrow(1, t, 1).squeeze_dim::<2>(1);

    let whole = scan::hgrn(x.clone(), g.clone(), scan::ScanOptions::new()).expect("valid");
    let lru =
        scan::rg_lru(x.clone(), r.clone(), g.clone(), a_param.clone(), None, scan::ScanOptions::new()).expect("valid");
    let complex = scan::ComplexScanOptions::new();
    let complex = scan::complex_scan(g.clone(), r.clone(), x.clone(), g.clone(), complex).expect("valid");
    let silu = scan::ConvActivation::Silu;
    let options = scan::ShortConvOptions::new().with_activation(silu);
    let conv = scan::short_conv(x.clone(), weight.clone(), None, options).expect("valid");

    let (mut h, mut l, mut z) = (zero.clone(), zero.clone(), (zero.clone(), zero));
    let mut c = Tensor::<3>::zeros([2, 4, 2], &device());
    for t in 0..9 {
        let (o, next) = scan::hgrn_step(at(&x, t), at(&g, t), h).expect("valid");
        assert_close("hgrn", &values(&o), &values(&at(&whole.o, t)), TOLERANCE);
        h = next;
        let (o, next) = scan::rg_lru_step(at(&x, t), at(&r, t), at(&g, t), a_param.clone(), None, l, scan::Path::Auto)
            .expect("valid");
        assert_close("rg_lru", &values(&o), &values(&at(&lru.o, t)), TOLERANCE);
        l = next;
        z = scan::complex_scan_step(at(&g, t), at(&r, t), at(&x, t), at(&g, t), z, scan::Path::Auto).expect("valid");
        assert_close("complex", &values(&z.1), &values(&at(&complex.im, t)), TOLERANCE);
        let (o, next) =
            scan::short_conv_step(at(&x, t), weight.clone(), None, silu, c, scan::Path::Auto).expect("valid");
        assert_close("conv", &values(&o), &values(&at(&conv.o, t)), TOLERANCE);
        c = next;
    }
}
