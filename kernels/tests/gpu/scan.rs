//! The element-wise scans against the oracle.

use bytemuck::Pod;
use half::{bf16, f16};
use thalweg_kernels::complex_scan::Complex;
use thalweg_kernels::gpu::complex_scan::{self, ComplexInputs};
use thalweg_kernels::gpu::elementwise_scan::{self, ScanGate, ScanInputs};
use thalweg_kernels::gpu::rg_lru::{self, RgLruInputs};
use thalweg_kernels::gpu::{Buffer, Client, Storage};
use thalweg_kernels::{Element, Error, ScanProblem};
use thalweg_reference::cases::Precision;
use thalweg_reference::elementwise::{self, Gate, Lambda, Planes};
use thalweg_reference::random::Random;
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};
use thalweg_reference::{Shape, rg_lru as real_gated};

/// Log-gates from what forgets nothing to what forgets all; `NAN` stands for a random one.
const GATES: [f64; 8] = [f64::NAN, f64::NAN, 0.0, -1e-4, -1.0, -20.0, -80.0, -1e4];

trait Number: Element + Pod {}
impl<E: Element + Pod> Number for E {}

/// Whether the device has this element type; says so where not.
fn has<E: Number>(client: &Client) -> bool {
    let supported = client.properties().supports_type(Storage::of::<E>().elem_type());
    if !supported {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "NOT RUN, the device has no {}", E::NAME);
    }
    supported
}

/// Random numbers as the device gets them, and exactly the same for the oracle.
fn tensor<E: Number>(client: &Client, x: Vec<f64>) -> (Buffer, Vec<f64>) {
    let x: Vec<E> = x.iter().map(|&x| E::from_f32(x as f32)).collect();
    (Buffer::from_slice(client, &x), wide(&x))
}

fn wide<E: Number>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

fn symmetric(random: &mut Random, len: usize, range: f64) -> Vec<f64> {
    random.uniforms(len).iter().map(|x| range * (2.0 * x - 1.0)).collect()
}

fn log_gates(random: &mut Random, len: usize) -> Vec<f64> {
    let mut one = || match GATES[random.below(GATES.len())] {
        g if g.is_nan() => -random.uniform(),
        g => g,
    };
    (0..len).map(|_| one()).collect()
}

#[track_caller]
fn close<E: Number>(client: &Client, name: &str, found: &Buffer, want: &[f64], quantity: Quantity) {
    let found = wide(&found.read::<E>(client).expect("the device works"));
    let error = relative_error(&found, want);
    // f16 keeps three bits more than bf16.
    let allowed = match E::NAME {
        "f32" => tolerance(Precision::F32, quantity, true),
        "f16" => tolerance(Precision::Bf16, quantity, true) / 8.0,
        _ => tolerance(Precision::Bf16, quantity, true),
    };
    assert!(error <= allowed, "{name}: relative error {error:.2e} above {allowed:.0e}");
}

fn shape_of(p: &ScanProblem) -> Shape {
    Shape { batch: p.batch, time: p.time, channels: p.channels, cu_seqlens: p.cu_seqlens.clone() }
}

/// Lengths around those of segments and blocks; channels around those of a cube.
fn problems() -> Vec<ScanProblem> {
    let mut problems: Vec<_> = [(1, 3), (5, 70), (63, 33), (64, 32), (65, 130), (200, 6), (1000, 18)]
        .into_iter()
        .map(|(time, channels)| ScanProblem::new(2, time, channels))
        .collect();
    problems.push(ScanProblem::packed(20, vec![0, 1, 7, 70, 270]));
    problems.push(ScanProblem::packed(5, vec![0, 600, 1600]));
    problems
}

fn linear<E: Number>(client: &Client, p: &ScanProblem, log: bool) {
    let sequences = p.sequences().expect("a valid problem");
    let (n, states) = (sequences.tokens() * p.channels, sequences.count() * p.channels);
    let random = &mut Random::new(n as u64);
    let gates = match log {
        true => log_gates(random, n),
        // Of both signs, some 0.
        false => symmetric(random, n, 1.2).iter().map(|x| x.clamp(-1.0, 1.0) * f64::from(x.abs() > 0.1)).collect(),
    };
    let (gate, gates) = tensor::<E>(client, gates);
    let (x, xs) = tensor::<E>(client, symmetric(random, n, 1.0));
    let (d, ds) = tensor::<E>(client, symmetric(random, n, 1.0));
    let (h0, h0s) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let (dht, dhts) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let kind = if log { ScanGate::Log(&gate) } else { ScanGate::Linear(&gate) };
    for initial in [true, false] {
        let inputs = ScanInputs { gate: kind, x: &x, initial_state: initial.then_some(&h0) };
        let out = elementwise_scan::forward(client, p, &inputs).expect("valid arguments");
        let grads =
            elementwise_scan::backward(client, p, &inputs, &out.o, &d, Some(&dht)).expect("valid arguments");
        let (shape, kind) = (shape_of(p), if log { Gate::Log(&gates) } else { Gate::Linear(&gates) });
        let first = initial.then_some(&h0s[..]);
        let want = elementwise::scan_forward(&shape, kind, &xs, first);
        let adjoint = elementwise::scan_backward(&shape, kind, &xs, first, &ds, Some(&dhts));
        let name = |what: &str| format!("{what} of {} {p:?}, log {log}", E::NAME);
        close::<E>(client, &name("o"), &out.o, &want.h, Quantity::Value);
        close::<f32>(client, &name("final_state"), &out.final_state, &want.final_state, Quantity::Value);
        close::<E>(client, &name("dgate"), &grads.dgate, &adjoint.gate, Quantity::Gradient);
        close::<E>(client, &name("dx"), &grads.dx, &adjoint.b, Quantity::Gradient);
        let initial = (&grads.d_initial_state, &adjoint.initial_state);
        close::<f32>(client, &name("d_initial_state"), initial.0, initial.1, Quantity::Gradient);
    }
}

#[test]
fn linear_scan_equals_the_oracle() {
    let Some(client) = super::client() else { return };
    for problem in problems() {
        for log in [true, false] {
            linear::<f32>(&client, &problem, log);
        }
    }
    let odd_and_even = [ScanProblem::new(2, 65, 33), ScanProblem::packed(34, vec![0, 1, 7, 170])];
    for problem in odd_and_even {
        if has::<f16>(&client) {
            linear::<f16>(&client, &problem, true);
        }
        if has::<bf16>(&client) {
            linear::<bf16>(&client, &problem, true);
        }
    }
}
