//! The element-wise scans against the oracle. Compiling takes a software driver seconds for each variant of a kernel,
//! so tests share variants where they can.

use bytemuck::Pod;
use half::{bf16, f16};
use thalweg_gpu::complex_scan::{self, ComplexInputs};
use thalweg_gpu::elementwise_scan::{self, ScanGate, ScanInputs};
use thalweg_gpu::rg_lru::{self, RgLruInputs};
use thalweg_gpu::{Buffer, Client, Storage};
use thalweg_kernels::complex_scan::Complex;
use thalweg_kernels::{Element, Error, ScanProblem};
use thalweg_reference::cases::Precision;
use thalweg_reference::elementwise::{self, Gate, Lambda, Planes};
use thalweg_reference::random::Random;
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};
use thalweg_reference::{Shape, rg_lru as real_gated};

/// Log-gates from what forgets nothing to what forgets all; `NAN` stands for a random one.
const GATES: [f64; 8] = [f64::NAN, f64::NAN, 0.0, -1e-4, -1.0, -20.0, -80.0, -1e4];

pub(crate) trait Number: Element + Pod {}
impl<E: Element + Pod> Number for E {}

/// Whether the device has this element type; says so where not.
pub(crate) fn has<E: Number>(client: &Client) -> bool {
    let supported = client.properties().supports_type(Storage::of::<E>().elem_type());
    if !supported {
        use std::io::Write as _;
        let _ = writeln!(std::io::stderr(), "NOT RUN, the device has no {}", E::NAME);
    }
    supported
}

/// Random numbers as the device gets them, and exactly the same for the oracle.
pub(crate) fn tensor<E: Number>(client: &Client, x: Vec<f64>) -> (Buffer, Vec<f64>) {
    let x: Vec<E> = x.iter().map(|&x| E::from_f32(x as f32)).collect();
    (Buffer::from_slice(client, &x), wide(&x))
}

fn wide<E: Number>(x: &[E]) -> Vec<f64> {
    x.iter().map(|x| f64::from(x.to_f32())).collect()
}

pub(crate) fn symmetric(random: &mut Random, len: usize, range: f64) -> Vec<f64> {
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
pub(crate) fn close<E: Number>(client: &Client, name: &str, found: &Buffer, want: &[f64], quantity: Quantity) {
    close_as::<E, E>(client, name, found, want, quantity);
}

/// A tensor of `S`, as accurate as one of `E` must be.
#[track_caller]
pub(crate) fn close_as<S: Number, E: Number>(
    client: &Client,
    name: &str,
    found: &Buffer,
    want: &[f64],
    quantity: Quantity,
) {
    let found = wide(&found.read::<S>(client).expect("the device works"));
    let error = relative_error(&found, want);
    // f16 keeps three bits more than bf16.
    let allowed = match E::NAME {
        "f32" => tolerance(Precision::F32, quantity, true),
        "f16" => tolerance(Precision::Bf16, quantity, true) / 8.0,
        _ => tolerance(Precision::Bf16, quantity, true),
    };
    assert!(error <= allowed, "{name}: relative error {error:.2e} above {allowed:.0e}");
}

pub(crate) fn shape_of(p: &ScanProblem) -> Shape {
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

pub(crate) fn linear<E: Number>(client: &Client, p: &ScanProblem, log: bool) {
    let n = p.sequences().expect("a valid problem").tokens() * p.channels;
    let random = &mut Random::new(n as u64);
    let gates = match log {
        true => log_gates(random, n),
        // Of both signs, some 0.
        false => symmetric(random, n, 1.2).iter().map(|x| x.clamp(-1.0, 1.0) * f64::from(x.abs() > 0.1)).collect(),
    };
    linear_of::<E>(client, p, log, gates);
}

/// The scan of these gates.
pub(crate) fn linear_of<E: Number>(client: &Client, p: &ScanProblem, log: bool, gates: Vec<f64>) {
    let sequences = p.sequences().expect("a valid problem");
    let (n, states) = (sequences.tokens() * p.channels, sequences.count() * p.channels);
    let random = &mut Random::new(n as u64 + 1);
    let (gate, gates) = tensor::<E>(client, gates);
    let (x, xs) = tensor::<E>(client, symmetric(random, n, 1.0));
    let (d, ds) = tensor::<E>(client, symmetric(random, n, 1.0));
    let (h0, h0s) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let (dht, dhts) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let kind = if log { ScanGate::Log(&gate) } else { ScanGate::Linear(&gate) };
    for initial in [true, false].into_iter().filter(|&initial| initial || (log && p.time == 65)) {
        let inputs = ScanInputs { gate: kind, x: &x, initial_state: initial.then_some(&h0) };
        let out = elementwise_scan::forward(client, p, &inputs).expect("valid arguments");
        let grads = elementwise_scan::backward(client, p, &inputs, &out.o, &d, Some(&dht)).expect("valid arguments");
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
        linear::<f32>(&client, &problem, true);
        if problem.cu_seqlens.is_none() {
            linear::<f32>(&client, &problem, false);
        }
    }
    // In pairs of channels.
    let pairs = ScanProblem::new(2, 200, 34);
    if has::<f16>(&client) {
        linear::<f16>(&client, &pairs, true);
    }
    if has::<bf16>(&client) {
        linear::<bf16>(&client, &pairs, true);
    }
}

#[test]
fn more_cubes_than_fit_on_an_axis_are_all_run() {
    let Some(client) = super::client() else { return };
    let axis = client.properties().hardware.max_cube_count.0 as usize;
    let many = (axis + 1000).min(70_000);
    let x: Vec<f32> = (0..many).map(|i| i as f32).collect();
    let (x, gate) = (Buffer::from_slice(&client, &x), Buffer::from_slice(&client, &vec![-1.0f32; many]));
    let h0 = Buffer::from_slice(&client, &vec![0.0f32; many]);
    let inputs = ScanInputs { gate: ScanGate::Log(&gate), x: &x, initial_state: Some(&h0) };
    let out = elementwise_scan::forward(&client, &ScanProblem::new(many, 1, 1), &inputs).expect("valid arguments");
    assert_eq!(bits(&client, &out.o), bits(&client, &x));
}

/// Two planes of random numbers.
fn pair<E: Number>(client: &Client, random: &mut Random, len: usize) -> (Complex<Buffer>, Planes) {
    let (re, re_wide) = tensor::<E>(client, symmetric(random, len, 1.0));
    let (im, im_wide) = tensor::<E>(client, symmetric(random, len, 1.0));
    (Complex { re, im }, Planes { re: re_wide, im: im_wide })
}

fn refer(x: &Complex<Buffer>) -> Complex<&Buffer> {
    Complex { re: &x.re, im: &x.im }
}

#[track_caller]
fn close_planes<E: Number>(client: &Client, name: &str, found: &Complex<Buffer>, want: &Planes, quantity: Quantity) {
    close::<E>(client, &format!("re of {name}"), &found.re, &want.re, quantity);
    close::<E>(client, &format!("im of {name}"), &found.im, &want.im, quantity);
}

/// `gated`: which of `log_a` and `theta` have a value for each token.
pub(crate) fn complex<E: Number>(client: &Client, p: &ScanProblem, gated: [bool; 2], angle: f64) {
    let sequences = p.sequences().expect("a valid problem");
    let (n, states) = (sequences.tokens() * p.channels, sequences.count() * p.channels);
    let random = &mut Random::new(n as u64);
    let len = |gated| if gated { n } else { p.channels };
    let log_as = match gated[0] {
        true => log_gates(random, n),
        false => random.uniforms(p.channels).iter().map(|x| -0.5 * x).collect(),
    };
    let (log_a, log_as) = tensor::<E>(client, log_as);
    let (theta, thetas) = tensor::<E>(client, symmetric(random, len(gated[1]), angle));
    let (b, bs) = pair::<E>(client, random, n);
    let (d, ds) = pair::<E>(client, random, n);
    let (h0, h0s) = pair::<f32>(client, random, states);
    let (dht, dhts) = pair::<f32>(client, random, states);
    let inputs = ComplexInputs { log_a: &log_a, theta: &theta, b: refer(&b), initial_state: Some(refer(&h0)) };
    let out = complex_scan::forward(client, p, &inputs).expect("valid arguments");
    let grads = complex_scan::backward(client, p, &inputs, refer(&out.o), refer(&d), Some(refer(&dht)))
        .expect("valid arguments");
    let (shape, lambda) = (shape_of(p), Lambda { log_a: &log_as, theta: &thetas });
    let (o, ht) = elementwise::complex_forward(&shape, lambda, &bs, Some(&h0s));
    let want = elementwise::complex_backward(&shape, lambda, &bs, Some(&h0s), &ds, Some(&dhts));
    let name = |what: &str| format!("{what} of {} {p:?}, gated {gated:?}", E::NAME);
    close_planes::<E>(client, &name("o"), &out.o, &o, Quantity::Value);
    close_planes::<f32>(client, &name("final_state"), &out.final_state, &ht, Quantity::Value);
    close_planes::<E>(client, &name("db"), &grads.db, &want.b, Quantity::Gradient);
    close::<E>(client, &name("dlog_a"), &grads.dlog_a, &want.log_a, Quantity::Gradient);
    close::<E>(client, &name("dtheta"), &grads.dtheta, &want.theta, Quantity::Gradient);
    let initial = (&grads.d_initial_state, &want.initial_state);
    close_planes::<f32>(client, &name("d_initial_state"), initial.0, initial.1, Quantity::Gradient);
}

#[test]
fn complex_scan_equals_the_oracle() {
    let Some(client) = super::client() else { return };
    for problem in problems() {
        complex::<f32>(&client, &problem, [true, true], 3.0);
    }
    let problem = ScanProblem::new(2, 200, 33);
    complex::<f32>(&client, &problem, [true, true], 1e4);
    complex::<f32>(&client, &problem, [false, false], 3.0);
    complex::<f32>(&client, &problem, [false, true], 3.0);
    if has::<f16>(&client) {
        complex::<f16>(&client, &problem, [true, false], 3.0);
    }
}

/// Gates are uniform in `[-gate, gate]`, `a_param` in the range `param`.
fn gated_unit<E: Number>(client: &Client, p: &ScanProblem, gate: f64, param: [f64; 2], resets: bool) {
    let sequences = p.sequences().expect("a valid problem");
    let (n, states) = (sequences.tokens() * p.channels, sequences.count() * p.channels);
    let random = &mut Random::new(n as u64);
    let (x, xs) = tensor::<E>(client, symmetric(random, n, 1.0));
    let (r, rs) = tensor::<E>(client, symmetric(random, n, gate));
    let (i, is) = tensor::<E>(client, symmetric(random, n, gate));
    let (d, ds) = tensor::<E>(client, symmetric(random, n, 1.0));
    let params = random.uniforms(p.channels).iter().map(|x| param[0] + x * (param[1] - param[0])).collect();
    let (a_param, params) = tensor::<f32>(client, params);
    let (h0, h0s) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let (dht, dhts) = tensor::<f32>(client, symmetric(random, states, 1.0));
    let flags: Vec<bool> = (0..sequences.tokens()).map(|t| t % 23 == 0).collect();
    let (reset, _) = tensor::<f32>(client, flags.iter().map(|&f| f64::from(f)).collect());
    let inputs = RgLruInputs {
        x: &x,
        recurrent_gate: &r,
        input_gate: &i,
        a_param: &a_param,
        reset: resets.then_some(&reset),
        initial_state: Some(&h0),
    };
    let out = rg_lru::forward(client, p, &inputs).expect("valid arguments");
    let grads = rg_lru::backward(client, p, &inputs, &out.o, &d, Some(&dht)).expect("valid arguments");
    let inputs = real_gated::Inputs {
        x: &xs,
        recurrent_logits: &rs,
        input_logits: &is,
        param: &params,
        reset: resets.then_some(&flags[..]),
        initial_state: Some(&h0s),
    };
    let (o, ht) = real_gated::forward(&shape_of(p), &inputs);
    let want = real_gated::backward(&shape_of(p), &inputs, &ds, Some(&dhts));
    let name = |what: &str| format!("{what} of {} {p:?}, gate {gate}, a_param {param:?}, resets {resets}", E::NAME);
    close::<E>(client, &name("o"), &out.o, &o, Quantity::Value);
    close::<f32>(client, &name("final_state"), &out.final_state, &ht, Quantity::Value);
    close::<E>(client, &name("dx"), &grads.dx, &want.x, Quantity::Gradient);
    close::<E>(client, &name("d_recurrent_gate"), &grads.d_recurrent_gate, &want.recurrent_logits, Quantity::Gradient);
    close::<E>(client, &name("d_input_gate"), &grads.d_input_gate, &want.input_logits, Quantity::Gradient);
    // It depends on `o`, which has been rounded.
    close_as::<f32, E>(client, &name("d_a_param"), &grads.d_a_param, &want.param, Quantity::Gradient);
    close::<f32>(client, &name("d_initial_state"), &grads.d_initial_state, &want.initial_state, Quantity::Gradient);
}

#[test]
fn rg_lru_equals_the_oracle() {
    let Some(client) = super::client() else { return };
    // The range that Griffin initialises: a in [0.9, 0.999].
    let usual = [-7.0, -2.0];
    for problem in problems() {
        gated_unit::<f32>(&client, &problem, 3.0, usual, true);
    }
    let problem = ScanProblem::new(2, 65, 70);
    // a from 1 - 1e-9 (below the bound of the square root's derivative) to e^-800.
    gated_unit::<f32>(&client, &problem, 20.0, [-12.0, -9.0], true);
    gated_unit::<f32>(&client, &problem, 20.0, [50.0, 100.0], true);
    if has::<f16>(&client) {
        gated_unit::<f16>(&client, &problem, 1.0, usual, false);
    }
}

/// Bits of f32 elements.
pub(crate) fn bits(client: &Client, x: &Buffer) -> Vec<u32> {
    x.read::<f32>(client).expect("the device works").iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_sequence_gives_the_same_bits_alone_and_in_a_batch() {
    let Some(client) = super::client() else { return };
    // In the batch, cubes have 32 channels and 16 lanes instead of 8 and 64.
    let (channels, time, batch) = (16, 500, 40);
    let n = time * channels;
    let random = &mut Random::new(1);
    let gates: Vec<f32> = log_gates(random, batch * n).iter().map(|&x| x as f32).collect();
    let numbers =
        |random: &mut Random, len| -> Vec<f32> { symmetric(random, len, 1.0).iter().map(|&x| x as f32).collect() };
    let (x, d) = (numbers(random, batch * n), numbers(random, batch * n));
    let (h0, dht) = (numbers(random, batch * channels), numbers(random, batch * channels));
    let run = |p: &ScanProblem, rows: std::ops::Range<usize>, states: std::ops::Range<usize>| {
        let upload = |x: &[f32], range: &std::ops::Range<usize>| Buffer::from_slice(&client, &x[range.clone()]);
        let (gate, x, d) = (upload(&gates, &rows), upload(&x, &rows), upload(&d, &rows));
        let (h0, dht) = (upload(&h0, &states), upload(&dht, &states));
        let inputs = ScanInputs { gate: ScanGate::Log(&gate), x: &x, initial_state: Some(&h0) };
        let out = elementwise_scan::forward(&client, p, &inputs).expect("valid arguments");
        let grads = elementwise_scan::backward(&client, p, &inputs, &out.o, &d, Some(&dht)).expect("valid arguments");
        let rows = [out.o, grads.dgate, grads.dx].map(|x| bits(&client, &x)).concat();
        let states = [out.final_state, grads.d_initial_state].map(|x| bits(&client, &x)).concat();
        (rows, states)
    };
    let alone = run(&ScanProblem::new(1, time, channels), 3 * n..4 * n, 3 * channels..4 * channels);
    let batched = run(&ScanProblem::new(batch, time, channels), 0..batch * n, 0..batch * channels);
    // A short neighbour in front.
    let packed = ScanProblem::packed(channels, vec![0, 7, 7 + time]);
    let packed = run(&packed, 3 * n - 7 * channels..4 * n, 2 * channels..4 * channels);
    let part = |(rows, states): &(Vec<u32>, Vec<u32>), rows_at: usize, states_at: usize| {
        let rows = rows.chunks(rows.len() / 3).flat_map(|x| x[rows_at..][..n].to_vec());
        let states = states.chunks(states.len() / 2).flat_map(|x| x[states_at..][..channels].to_vec());
        (rows.collect::<Vec<_>>(), states.collect::<Vec<_>>())
    };
    assert!(alone == part(&batched, 3 * n, 3 * channels), "batched");
    assert!(alone == part(&packed, 7 * channels, channels), "packed");
}

#[test]
fn a_step_continues_a_sequence_and_a_reset_forgets_what_is_not_finite() {
    let Some(client) = super::client() else { return };
    let (time, channels) = (9, 5);
    let random = &mut Random::new(2);
    let (x, xs) = tensor::<f32>(&client, symmetric(random, time * channels, 1.0));
    let (r, rs) = tensor::<f32>(&client, symmetric(random, time * channels, 1.0));
    let (a_param, _) = tensor::<f32>(&client, vec![-3.0; channels]);
    let problem = ScanProblem::new(1, time, channels);
    let resets = |len, at| tensor::<f32>(&client, (0..len).map(|t| f64::from(t == at)).collect()).0;
    let (none, zeros) = (resets(time, time), resets(channels, channels));
    let inputs = RgLruInputs {
        x: &x,
        recurrent_gate: &r,
        input_gate: &r,
        a_param: &a_param,
        reset: Some(&none),
        initial_state: Some(&zeros),
    };
    let whole = rg_lru::forward(&client, &problem, &inputs).expect("valid arguments");
    let mut state = zeros.clone();
    for t in 0..time {
        let at = |x: &[f64]| tensor::<f32>(&client, x[t * channels..][..channels].to_vec()).0;
        let out = rg_lru::step(&client, 1, &at(&xs), &at(&rs), &at(&rs), &a_param, Some(&resets(1, 1)), &state);
        let out = out.expect("valid arguments");
        let want = wide(&whole.o.read::<f32>(&client).expect("the device works")[t * channels..][..channels]);
        close::<f32>(&client, "o", &out.o, &want, Quantity::Value);
        state = out.final_state;
    }

    let mut poisoned = xs;
    poisoned[..channels].fill(f64::NAN);
    let (x, _) = tensor::<f32>(&client, poisoned);
    let third = resets(time, 2);
    let inputs = RgLruInputs { x: &x, reset: Some(&third), ..inputs };
    let out = rg_lru::forward(&client, &problem, &inputs).expect("valid arguments");
    let o = out.o.read::<f32>(&client).expect("the device works");
    assert!(o[..2 * channels].iter().all(|x| x.is_nan()) && o[2 * channels..].iter().all(|x| x.is_finite()), "{o:?}");
    assert!(out.final_state.read::<f32>(&client).expect("the device works").iter().all(|x| x.is_finite()));
}

#[test]
fn bad_arguments_are_named() {
    let Some(client) = super::client() else { return };
    let problem = ScanProblem::new(1, 4, 2);
    let floats = |len| Buffer::from_slice(&client, &vec![0.0f32; len]);
    let (x, short, half) = (floats(8), floats(3), Buffer::from_slice(&client, &[f16::ZERO; 8]));
    let name = |result: Result<_, Error>| match result {
        Err(Error::Shape { argument, .. } | Error::Value { argument, .. }) => argument,
        Err(other) => panic!("{other}"),
        Ok(()) => panic!("accepted"),
    };
    let good = ScanInputs { gate: ScanGate::Linear(&x), x: &x, initial_state: None };
    let forward = |inputs| name(elementwise_scan::forward(&client, &problem, &inputs).map(drop));
    assert_eq!(forward(ScanInputs { gate: ScanGate::Log(&short), ..good }), "g");
    assert_eq!(forward(ScanInputs { gate: ScanGate::Linear(&half), ..good }), "a");
    assert_eq!(forward(ScanInputs { initial_state: Some(&short), ..good }), "initial_state");
    let backward = elementwise_scan::backward(&client, &problem, &good, &x, &short, None);
    assert_eq!(name(backward.map(drop)), "do");
    let b = Complex { re: &x, im: &x };
    let inputs = ComplexInputs { log_a: &x, theta: &short, b, initial_state: None };
    assert_eq!(name(complex_scan::forward(&client, &problem, &inputs).map(drop)), "theta");
    let inputs = RgLruInputs {
        x: &x,
        recurrent_gate: &x,
        input_gate: &x,
        a_param: &floats(2),
        reset: Some(&short),
        initial_state: None,
    };
    assert_eq!(name(rg_lru::forward(&client, &problem, &inputs).map(drop)), "reset");
    let packed = ScanProblem::packed(2, vec![0, 3, 3, 4]);
    let result = elementwise_scan::forward(&client, &packed, &good).map(drop);
    assert!(matches!(result, Err(Error::Sequences { .. })));
}
