//! The element-wise scans of factors above 1, whose products grow, and of angles beyond what few digits reduce.

use crate::client;
use crate::scan::{Number, bits, complex, has, linear_of};
use half::f16;
use thalweg_gpu::elementwise_scan::{self, ScanGate, ScanInputs};
use thalweg_gpu::{Buffer, Client};
use thalweg_kernels::ScanProblem;
use thalweg_reference::random::Random;

fn linear<E: Number>(client: &Client, p: &ScanProblem) {
    let n = p.batch * p.time * p.channels;
    let factors = [0.0, 2.0, -2.0, 1.5, 0.5, -0.7, 0.1, 0.0];
    let random = &mut Random::new(5);
    linear_of::<E>(client, p, false, (0..n).map(|_| factors[random.below(factors.len())]).collect());
}

#[test]
fn factors_up_to_2_equal_the_recurrence() {
    let Some(client) = client() else { return };
    linear::<f32>(&client, &ScanProblem::new(2, 200, 33));
    linear::<f32>(&client, &ScanProblem::new(2, 1000, 18));
    if has::<f16>(&client) {
        linear::<f16>(&client, &ScanProblem::new(2, 200, 34));
    }
}

/// One state per channel: its `factor` and what is added for the first tokens, then 0.5 and 1, and what it starts from.
const CASES: [(f32, f32, f32); 5] =
    [(2.0, 0.0, 0.0), (1e20, 0.0, 0.0), (2.0, -1.0, 1.0), (4096.0, -4095.0, 1.0), (0.9, 0.1, 1.0)];

#[test]
fn products_that_overflow_do_not_show() {
    let Some(client) = client() else { return };
    let (time, grows, n) = (300, 150, CASES.len());
    let table = |of: &dyn Fn(usize, usize) -> f32| -> Vec<f32> { (0..time * n).map(|i| of(i / n, i % n)).collect() };
    let upload = |x: &[f32]| Buffer::from_slice(&client, x);
    let a = table(&|t, c| if t < grows { CASES[c].0 } else { 0.5 });
    let x = table(&|t, c| if t < grows { CASES[c].1 } else { 1.0 });
    // Against time, the gradient passes through a gate after its token.
    let reversed = table(&|t, c| a[(time - t) % time * n + c]);
    let cotangent = table(&|t, c| x[(time - 1 - t) * n + c]);
    let (h0, zeros) = (CASES.map(|c| c.2), vec![0.0; time * n]);
    let last: Vec<f32> = CASES.iter().map(|c| c.0 * c.2).collect();

    let problem = ScanProblem::new(1, time, n);
    let (a, x, h0) = (upload(&a), upload(&x), upload(&h0));
    let inputs = ScanInputs { gate: ScanGate::Linear(&a), x: &x, initial_state: Some(&h0) };
    let out = elementwise_scan::forward(&client, &problem, &inputs).expect("valid arguments");
    let reversed = upload(&reversed);
    let inputs = ScanInputs { gate: ScanGate::Linear(&reversed), ..inputs };
    let (zeros, cotangent, last) = (upload(&zeros), upload(&cotangent), upload(&last));
    let grads = elementwise_scan::backward(&client, &problem, &inputs, &zeros, &cotangent, Some(&last));
    let h = out.o.read::<f32>(&client).expect("the device works");
    let u = grads.expect("valid arguments").dx.read::<f32>(&client).expect("the device works");
    for (c, case) in CASES.iter().enumerate() {
        for t in 0..time {
            let settled = 2.0 - (2.0 - f64::from(case.2)) * 0.5f64.powi(t.saturating_sub(grows - 1) as i32);
            let want = if t < grows { f64::from(case.2) } else { settled };
            for found in [h[t * n + c], u[(time - 1 - t) * n + c]].map(f64::from) {
                assert!((found - want).abs() <= 1e-5 * want, "{case:?}: {found} at {t}, want {want}");
            }
        }
    }
    let final_state = out.final_state.read::<f32>(&client).expect("the device works");
    assert_eq!(final_state, h[(time - 1) * n..]);
}

/// Also where lanes take turns, in cubes of other shapes.
#[test]
fn growing_factors_give_the_same_bits_alone_and_in_a_batch() {
    let Some(client) = client() else { return };
    let (channels, time, batch) = (16, 500, 40);
    let n = time * channels;
    let random = &mut Random::new(6);
    let numbers = |random: &mut Random, range: f64| -> Vec<f32> {
        random.uniforms(batch * n).iter().map(|x| (range * (2.0 * x - 1.0)) as f32).collect()
    };
    let (a, x) = (numbers(random, 2.2), numbers(random, 1.0));
    let run = |batch: usize, rows: std::ops::Range<usize>| {
        let (a, x) = (Buffer::from_slice(&client, &a[rows.clone()]), Buffer::from_slice(&client, &x[rows]));
        let inputs = ScanInputs { gate: ScanGate::Linear(&a), x: &x, initial_state: None };
        let out = elementwise_scan::forward(&client, &ScanProblem::new(batch, time, channels), &inputs);
        bits(&client, &out.expect("valid arguments").o)
    };
    assert!(run(1, 3 * n..4 * n) == run(batch, 0..batch * n)[3 * n..4 * n]);
}

#[test]
fn angles_of_any_size_equal_the_recurrence() {
    let Some(client) = client() else { return };
    let problem = ScanProblem::new(2, 200, 33);
    for angle in [1.2e4, 1e7, 3e8, 3e38] {
        complex::<f32>(&client, &problem, [true, true], angle);
    }
    complex::<f32>(&client, &problem, [false, false], 3e8);
}
