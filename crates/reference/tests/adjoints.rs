//! Every adjoint against central differences of its forward, on tiny shapes.

use thalweg_reference::random::Random;
use thalweg_reference::tolerance::relative_error;
use thalweg_reference::{Shape, attention, elementwise, matrix, rg_lru, short_conv, wrappers};

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// Compares `gradients` with central differences of `loss` in every element of every input.
#[track_caller]
fn check(inputs: &[(&str, Vec<f64>)], gradients: &[Vec<f64>], loss: impl Fn(&[Vec<f64>]) -> f64) {
    assert_eq!(inputs.len(), gradients.len());
    const H: f64 = 1e-5;
    let mut point: Vec<Vec<f64>> = inputs.iter().map(|(_, x)| x.clone()).collect();
    for (i, (name, x)) in inputs.iter().enumerate() {
        let mut numeric = Vec::new();
        for (j, &value) in x.iter().enumerate() {
            point[i][j] = value + H;
            let above = loss(&point);
            point[i][j] = value - H;
            let below = loss(&point);
            point[i][j] = value;
            numeric.push((above - below) / (2.0 * H));
        }
        let error = relative_error(&gradients[i], &numeric);
        assert!(error < 1e-7, "{name}: {error:.2e}");
    }
}

fn negative(random: &mut Random, len: usize) -> Vec<f64> {
    random.uniforms(len).iter().map(|u| -2.0 * u - 0.01).collect()
}

const SHAPES: [(usize, usize, Option<&[usize]>); 2] = [(2, 4, None), (1, 6, Some(&[0, 1, 6]))];

fn shape(batch: usize, time: usize, bounds: Option<&[usize]>) -> Shape {
    Shape { batch, time, channels: 4, cu_seqlens: bounds.map(<[usize]>::to_vec) }
}

#[test]
fn real_scan() {
    let mut r = Random::new(1);
    for (batch, time, bounds) in SHAPES {
        let s = shape(batch, time, bounds);
        let (len, states) = (batch * time * 4, 2 * 4);
        let (dh, d_last) = (r.normals(len), r.normals(states));
        for log in [false, true] {
            let gate = |x: &'_ [f64]| if log { x.to_vec() } else { x.iter().map(|x| x.exp()).collect() };
            let inputs =
                [("gate", gate(&negative(&mut r, len))), ("b", r.normals(len)), ("initial_state", r.normals(states))];
            fn wrap(log: bool, x: &[f64]) -> elementwise::Gate<'_> {
                if log { elementwise::Gate::Log(x) } else { elementwise::Gate::Linear(x) }
            }
            let [(_, g), (_, b), (_, h0)] = &inputs;
            let grad = elementwise::scan_backward(&s, wrap(log, g), b, Some(h0), &dh, Some(&d_last));
            check(&inputs, &[grad.gate, grad.b, grad.initial_state], |x| {
                let out = elementwise::scan_forward(&s, wrap(log, &x[0]), &x[1], Some(&x[2]));
                dot(&out.h, &dh) + dot(&out.final_state, &d_last)
            });
        }
    }
}

#[test]
fn complex_scan() {
    use elementwise::{Lambda, Planes, complex_backward, complex_forward};
    let mut r = Random::new(2);
    for (batch, time, bounds) in SHAPES {
        let s = shape(batch, time, bounds);
        let (len, states) = (batch * time * 4, 2 * 4);
        let planes = |r: &mut Random, len: usize| Planes { re: r.normals(len), im: r.normals(len) };
        let (dh, d_last) = (planes(&mut r, len), planes(&mut r, states));
        for lambdas in [4, len] {
            let inputs = [
                ("log_a", negative(&mut r, lambdas)),
                ("theta", r.normals(lambdas)),
                ("b_re", r.normals(len)),
                ("b_im", r.normals(len)),
                ("h0_re", r.normals(states)),
                ("h0_im", r.normals(states)),
            ];
            let x: Vec<_> = inputs.iter().map(|(_, x)| x.clone()).collect();
            let parts = |x: &[Vec<f64>]| {
                (Planes { re: x[2].clone(), im: x[3].clone() }, Planes { re: x[4].clone(), im: x[5].clone() })
            };
            let (b, h0) = parts(&x);
            let grad = complex_backward(&s, Lambda { log_a: &x[0], theta: &x[1] }, &b, Some(&h0), &dh, Some(&d_last));
            let gradients =
                [grad.log_a, grad.theta, grad.b.re, grad.b.im, grad.initial_state.re, grad.initial_state.im];
            check(&inputs, &gradients, |x| {
                let (b, h0) = parts(x);
                let (h, last) = complex_forward(&s, Lambda { log_a: &x[0], theta: &x[1] }, &b, Some(&h0));
                dot(&h.re, &dh.re) + dot(&h.im, &dh.im) + dot(&last.re, &d_last.re) + dot(&last.im, &d_last.im)
            });
        }
    }
}

#[test]
fn rg_lru_with_its_gates_and_resets() {
    use rg_lru::{BlockDiagonal, Inputs};
    let mut r = Random::new(3);
    for (batch, time, bounds) in SHAPES {
        let s = shape(batch, time, bounds);
        let (len, states) = (batch * time * 4, 2 * 4);
        let reset: Vec<_> = (0..batch * time).map(|t| t % 3 == 2).collect();
        let (dh, d_last) = (r.normals(len), r.normals(states));
        let inputs = [
            ("x", r.normals(len)),
            ("recurrent_weight", r.normals(2 * 2 * 2)),
            ("recurrent_bias", r.normals(4)),
            ("input_weight", r.normals(2 * 2 * 2)),
            ("input_bias", r.normals(4)),
            ("param", r.normals(4)),
            ("initial_state", r.normals(states)),
        ];
        let x: Vec<_> = inputs.iter().map(|(_, x)| x.clone()).collect();
        let recurrent = BlockDiagonal { weight: &x[1], bias: &x[2], blocks: 2 };
        let input = BlockDiagonal { weight: &x[3], bias: &x[4], blocks: 2 };
        let (rl, il) = (recurrent.forward(&x[0]), input.forward(&x[0]));
        let unit = Inputs {
            x: &x[0],
            recurrent_logits: &rl,
            input_logits: &il,
            param: &x[5],
            reset: Some(&reset),
            initial_state: Some(&x[6]),
        };
        let grad = rg_lru::backward(&s, &unit, &dh, Some(&d_last));
        let (dx_r, dw_r, db_r) = recurrent.backward(&x[0], &grad.recurrent_logits);
        let (dx_i, dw_i, db_i) = input.backward(&x[0], &grad.input_logits);
        let dx = grad.x.iter().zip(dx_r).zip(dx_i).map(|((a, b), c)| a + b + c).collect();
        check(&inputs, &[dx, dw_r, db_r, dw_i, db_i, grad.param, grad.initial_state], |x| {
            let rl = BlockDiagonal { weight: &x[1], bias: &x[2], blocks: 2 }.forward(&x[0]);
            let il = BlockDiagonal { weight: &x[3], bias: &x[4], blocks: 2 }.forward(&x[0]);
            let unit = Inputs {
                x: &x[0],
                recurrent_logits: &rl,
                input_logits: &il,
                param: &x[5],
                reset: Some(&reset),
                initial_state: Some(&x[6]),
            };
            let (h, last) = rg_lru::forward(&s, &unit);
            dot(&h, &dh) + dot(&last, &d_last)
        });
    }
}

fn problem(batch: usize, time: usize, bounds: Option<&[usize]>) -> matrix::Problem {
    let cu_seqlens = bounds.map(<[usize]>::to_vec);
    matrix::Problem { batch, time, heads: 1, value_heads: 2, key_dim: 3, value_dim: 2, scale: 0.7, cu_seqlens }
}

#[test]
fn every_decay_with_every_write() {
    use matrix::{Gate, Inputs, Write};
    /// Inputs in the order of the tensors in `every_decay_with_every_write`.
    fn inputs(x: &[Vec<f64>], decay: usize, write: usize) -> Inputs<'_> {
        let gate = [Gate::None, Gate::Constant(&x[4]), Gate::Head(&x[4]), Gate::Key(&x[4])][decay];
        let write = [Write::Additive, Write::Delta { beta: &x[5] }, Write::LowRank { a: &x[5], b: &x[6] }][write];
        Inputs { q: &x[0], k: &x[1], v: &x[2], gate, write, initial_state: Some(&x[3]) }
    }
    let mut r = Random::new(4);
    for (batch, time, bounds) in SHAPES {
        let p = problem(batch, time, bounds);
        let (keys, values, rows) = (batch * time * 3, batch * time * 2 * 2, batch * time * 2);
        for decay in 0..4 {
            for write in 0..3 {
                let tensors = [
                    ("q", r.normals(keys)),
                    ("k", r.normals(keys)),
                    ("v", r.normals(values)),
                    ("initial_state", r.normals(p.state_len())),
                    ("gate", negative(&mut r, [0, 2, rows, rows * 3][decay])),
                    (["none", "beta", "a"][write], r.normals([0, rows, keys][write])),
                    ("b", r.normals([0, 0, keys][write])),
                ];
                let x: Vec<_> = tensors.iter().map(|(_, x)| x.clone()).collect();
                let (d_o, d_last) = (r.normals(values), r.normals(p.state_len()));
                let g = matrix::backward(&p, &inputs(&x, decay, write), &d_o, Some(&d_last));
                let sixth = if write == 1 { g.beta } else { g.a };
                check(&tensors, &[g.q, g.k, g.v, g.initial_state, g.gate, sixth, g.b], |x| {
                    let out = matrix::forward(&p, &inputs(x, decay, write));
                    dot(&out.o, &d_o) + dot(&out.final_state, &d_last)
                });
            }
        }
    }
}

#[test]
fn wrappers_around_the_matrix_recurrence() {
    let mut r = Random::new(5);
    let x = [("x", r.normals(6))];
    let dy = r.normals(6);
    check(&x, &[wrappers::l2norm_backward(&x[0].1, 3, &dy)], |x| dot(&wrappers::l2norm(&x[0], 3), &dy));

    for (batch, time, bounds) in SHAPES {
        let p = problem(batch, time, bounds);
        let (keys, values) = (batch * time * 3, batch * time * 2 * 2);
        let (d_o, d_last, d_z) = (r.normals(values), r.normals(p.state_len()), r.normals(2 * 3));
        let inputs = [
            ("q", r.uniforms(keys)),
            ("k", r.uniforms(keys)),
            ("v", r.normals(values)),
            ("initial_state", r.normals(p.state_len())),
            ("initial_z", r.uniforms(2 * 3)),
        ];
        let tensors: Vec<_> = inputs.iter().map(|(_, x)| x.clone()).collect();
        fn norm(x: &[Vec<f64>]) -> wrappers::NormInputs<'_> {
            wrappers::NormInputs { q: &x[0], k: &x[1], v: &x[2], initial_state: Some(&x[3]), initial_z: Some(&x[4]) }
        }
        let (g, dz) = wrappers::linear_attention_norm_backward(&p, &norm(&tensors), &d_o, Some(&d_last), Some(&d_z));
        check(&inputs, &[g.q, g.k, g.v, g.initial_state, dz], |x| {
            let (out, z) = wrappers::linear_attention_norm(&p, &norm(x));
            dot(&out.o, &d_o) + dot(&out.final_state, &d_last) + dot(&z, &d_z)
        });

        let p = matrix::Problem { heads: 2, ..p };
        let rows = batch * time * 2;
        let inputs = [
            ("q", r.normals(rows * 3)),
            ("v", r.normals(rows * 2)),
            ("g", negative(&mut r, rows * 3)),
            ("initial_state", r.normals(p.state_len())),
        ];
        let [(_, q), (_, v), (_, g), (_, h0)] = &inputs;
        let grad = wrappers::hgrn2_backward(&p, q, v, g, Some(h0), &d_o, Some(&d_last));
        check(&inputs, &[grad.q, grad.v, grad.gate, grad.initial_state], |x| {
            let out = wrappers::hgrn2_forward(&p, &x[0], &x[1], &x[2], Some(&x[3]));
            dot(&out.o, &d_o) + dot(&out.final_state, &d_last)
        });
    }
}

#[test]
fn softmax_attention() {
    let mut r = Random::new(6);
    for (batch, time, bounds) in SHAPES {
        for window in [None, Some(2)] {
            let cu_seqlens = bounds.map(<[usize]>::to_vec);
            let p = attention::Problem {
                batch,
                time,
                heads: 4,
                kv_heads: 2,
                key_dim: 3,
                value_dim: 2,
                scale: 0.6,
                window,
                cu_seqlens,
            };
            let inputs = [
                ("q", r.normals(batch * time * 12)),
                ("k", r.normals(batch * time * 6)),
                ("v", r.normals(batch * time * 4)),
            ];
            let d_o = r.normals(batch * time * 8);
            let [(_, q), (_, k), (_, v)] = &inputs;
            let grad = attention::backward(&p, q, k, v, &d_o);
            check(&inputs, &[grad.q, grad.k, grad.v], |x| dot(&attention::forward(&p, &x[0], &x[1], &x[2]), &d_o));
        }
    }
}

#[test]
fn short_convolution() {
    fn inputs(x: &[Vec<f64>], silu: bool) -> short_conv::Inputs<'_> {
        short_conv::Inputs { x: &x[0], weight: &x[1], bias: Some(&x[2]), silu, state: Some(&x[3]) }
    }
    let mut r = Random::new(7);
    for (batch, time, bounds) in SHAPES {
        for (width, silu) in [(1, true), (3, false), (4, true)] {
            let s = shape(batch, time, bounds);
            let states = 2 * 4 * (width - 1);
            let tensors = [
                ("x", r.normals(batch * time * 4)),
                ("weight", r.normals(4 * width)),
                ("bias", r.normals(4)),
                ("state", r.normals(states)),
            ];
            let x: Vec<_> = tensors.iter().map(|(_, x)| x.clone()).collect();
            let (dy, d_state) = (r.normals(batch * time * 4), r.normals(states));
            let grad = short_conv::backward(&s, &inputs(&x, silu), &dy, Some(&d_state));
            check(&tensors, &[grad.x, grad.weight, grad.bias, grad.state], |x| {
                let (y, state) = short_conv::forward(&s, &inputs(x, silu));
                dot(&y, &dy) + dot(&state, &d_state)
            });
        }
    }
}
