//! Every operation through Burn, native and portable, against the oracle: drawn shapes, packing, regimes, gradients of
//! all inputs.

use proptest::prelude::*;
use std::collections::BTreeMap;
use thalweg_conform::{Case, Engine, Reference, Results, Runner, Tensor};
use thalweg_reference::cases::{Betas, Gates, Precision};
use thalweg_reference::random::Random;
use thalweg_reference::tolerance::{Quantity, relative_error, tolerance};
use thalweg_tests::{MatrixDraw, config, matrix_draws};

/// Operations whose q/k heads and value heads may differ, and those that have as many of both.
const GROUPED: [&str; 8] = [
    "gla",
    "simple_gla",
    "linear_attn",
    "linear_attn_norm",
    "delta_rule",
    "gated_delta_rule",
    "gated_delta_rule_l2norm",
    "kda",
];
const EQUAL: [&str; 3] = ["retention", "hgrn2", "dplr"];
const OTHERS: [&str; 5] = ["hgrn", "complex_scan", "rg_lru", "attention", "short_conv"];

/// A case under construction.
struct Build {
    case: Case,
    random: Random,
}

impl Build {
    fn new(op: &str, seed: u64) -> Self {
        let (metadata, tensors) = (BTreeMap::new(), BTreeMap::new());
        let case = Case { name: op.to_string(), op: op.to_string(), metadata, tensors };
        Self { case, random: Random::new(seed) }
    }

    fn with(mut self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        let values = Precision::F32.round_all(values.to_vec());
        self.case.tensors.insert(name.to_string(), Tensor { shape: shape.to_vec(), values });
        self
    }

    fn normal(mut self, name: &str, shape: &[usize]) -> Self {
        let values = self.random.normals(shape.iter().product());
        self.with(name, shape, &values)
    }

    fn option(mut self, name: &str, value: String) -> Self {
        self.case.metadata.insert(name.to_string(), value);
        self
    }

    fn when(self, condition: bool, then: impl FnOnce(Self) -> Self) -> Self {
        if condition { then(self) } else { self }
    }

    fn packed(self, bounds: Option<&[usize]>) -> Self {
        let Some(bounds) = bounds else { return self };
        let values: Vec<_> = bounds.iter().map(|&x| x as f64).collect();
        self.with("int.cu_seqlens", &[bounds.len()], &values)
    }
}

fn matrix_case(op: &str, draw: &MatrixDraw) -> Case {
    let (c, p) = (draw.case(Precision::F32), &draw.problem);
    let keys = [p.batch, p.time, p.heads, p.key_dim];
    let rows = [p.batch, p.time, p.value_heads];
    let values = [p.batch, p.time, p.value_heads, p.value_dim];
    let states = [p.sequences(), p.value_heads, p.key_dim, p.value_dim];
    let z = [p.sequences(), 1, p.heads, p.key_dim];
    let positive = |x: &[f64]| x.iter().map(|x| x.abs() + 0.1).collect::<Vec<_>>();
    let norm = op == "linear_attn_norm";
    let (q, k) = if norm { (positive(&c.q), positive(&c.k)) } else { (c.q, c.k) };
    let delta = ["delta_rule", "gated_delta_rule", "gated_delta_rule_l2norm", "kda"].contains(&op);
    Build::new(op, draw.seed)
        .with("in.q", &keys, &q)
        .with("in.v", &values, &c.v)
        .with("cot.o", &values, &c.d_o)
        .with("cot.ht", &states, &c.d_final_state)
        .packed(p.cu_seqlens.as_deref())
        .when(op != "hgrn2", |b| b.with("in.k", &keys, &k))
        .when(draw.initial_state, |b| b.with("in.h0", &states, &c.initial_state))
        .when(norm, |b| b.normal("cot.zt", &z))
        .when(norm && draw.initial_state, |b| b.with("in.z0", &z, &vec![0.5; z.iter().product()]))
        .when(["gla", "hgrn2", "kda", "dplr"].contains(&op), |b| {
            b.with("in.g", &[p.batch, p.time, p.value_heads, p.key_dim], &c.gate_key)
        })
        .when(["simple_gla", "gated_delta_rule", "gated_delta_rule_l2norm"].contains(&op), |b| {
            b.with("in.g", &rows, &c.gate_head)
        })
        .when(op == "retention", |b| b.with("in.g_gamma", &[p.value_heads], &c.gate_constant))
        .when(delta, |b| b.with("in.beta", &rows, &c.beta))
        .when(op == "dplr", |b| b.with("in.a", &keys, &c.a).with("in.b", &keys, &c.b))
        .case
}

/// The operations without a matrix state; channels come from the draw's key size, widths and windows from its seed.
fn other_case(op: &str, draw: &MatrixDraw) -> Case {
    let p = &draw.problem;
    let blocks = 1 + draw.seed as usize % 3;
    let channels = p.key_dim * blocks;
    let (full, state) = ([p.batch, p.time, channels], [p.sequences(), channels]);
    let build = Build::new(op, draw.seed).packed(p.cu_seqlens.as_deref());
    let states = |b: Build, initial: &str, last: &str, shape: &[usize]| {
        b.normal(&format!("cot.{last}"), shape).when(draw.initial_state, |b| b.normal(&format!("in.{initial}"), shape))
    };
    let gates = |len| draw.gates.sample(&mut Random::new(draw.seed ^ 2), len);
    let build = match op {
        "hgrn" => states(build.normal("in.x", &full), "h0", "ht", &state)
            .with("in.g", &full, &gates(full.iter().product()))
            .normal("cot.o", &full),
        "complex_scan" => {
            let lambda = if draw.seed.is_multiple_of(2) { &full[..] } else { &full[2..] };
            let log_a = gates(lambda.iter().product());
            let build =
                ["in.b_re", "in.b_im", "cot.o_re", "cot.o_im"].iter().fold(build, |b, name| b.normal(name, &full));
            let build = build.with("in.log_a", lambda, &log_a).normal("in.theta", lambda);
            states(states(build, "h0_re", "ht_re", &state), "h0_im", "ht_im", &state)
        }
        "rg_lru" => {
            let (weight, bias) = ([blocks, p.key_dim, p.key_dim], [blocks, p.key_dim]);
            // Decays from next to 1, where the root's derivative is bounded, to fast.
            let params: Vec<_> = (0..channels).map(|c| [-20.0, -12.0, -2.0, 0.5][c % 4]).collect();
            let positions: Vec<_> = (0..p.batch * p.time).map(|t| (t % 29) as f64).collect();
            let build = states(build.normal("in.x", &full).normal("cot.o", &full), "h0", "ht", &state);
            let build = ["recurrent_gate", "input_gate"].iter().fold(build, |b, gate| {
                b.normal(&format!("in.{gate}_weight"), &weight).normal(&format!("in.{gate}_bias"), &bias)
            });
            build
                .with("in.recurrent_param", &[channels], &params)
                .when(draw.seed.is_multiple_of(2), |b| b.with("int.position_ids", &full[..2], &positions))
        }
        "attention" => {
            let window = draw.seed as usize % 90;
            let query = [p.batch, p.time, p.value_heads, p.key_dim];
            let (key, value) = ([p.batch, p.time, p.heads, p.key_dim], [p.batch, p.time, p.heads, p.value_dim]);
            build
                .normal("in.q", &query)
                .normal("in.k", &key)
                .normal("in.v", &value)
                .normal("cot.o", &[p.batch, p.time, p.value_heads, p.value_dim])
                .when(window > 0, |b| b.option("window", window.to_string()))
        }
        _ => {
            let width = 2 + draw.seed as usize % 4;
            let build = build.normal("in.x", &full).normal("in.weight", &[channels, width]).normal("cot.o", &full);
            states(build, "state", "state", &[p.sequences(), channels, width - 1])
                .when(draw.seed.is_multiple_of(2), |b| b.normal("in.bias", &[channels]))
                .when(draw.seed.is_multiple_of(3), |b| b.option("activation", "none".into()))
        }
    };
    build.case
}

/// How much larger than a tensor the terms are whose sum it is, where that is known: the gradient of a constant gate adds
/// up the terms `q dq` of all tokens, with either sign, to one number.
fn cancellation(case: &Case, expected: &Results, name: &str) -> f64 {
    if name != "grad.g_gamma" {
        return 1.0;
    }
    let terms: f64 = case.tensors["in.q"].values.iter().zip(&expected["grad.q"]).map(|(q, dq)| (q * dq).abs()).sum();
    let largest = expected[name].iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if largest > 0.0 { (terms / largest).max(1.0) } else { 1.0 }
}

/// Both paths give the oracle's outputs and gradients.
fn agrees(case: &Case, gates: Gates) -> Result<(), TestCaseError> {
    let expected = Reference.run(case).unwrap();
    for (path, engine) in [("native", Engine::native()), ("portable", Engine::portable())] {
        let found = engine.run(case);
        prop_assert!(found.is_ok(), "{} {}: {}", path, case.op, found.unwrap_err());
        for (name, values) in found.unwrap() {
            let quantity = if name.starts_with("grad") { Quantity::Gradient } else { Quantity::Value };
            let allowed = tolerance(Precision::F32, quantity, gates.extreme());
            let error = relative_error(&values, &expected[&name]) / cancellation(case, &expected, &name);
            prop_assert!(
                error <= allowed,
                "{} {}: {} off by {:.2e}, {:.0e} allowed",
                path,
                case.op,
                name,
                error,
                allowed
            );
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(config(40))]

    #[test]
    fn grouped_matrix_operations(draw in matrix_draws(3), op in prop::sample::select(&GROUPED[..])) {
        // Other step sizes make gradients that are rounding alone; the kernels' own test knows how to weigh those.
        let mut draw = MatrixDraw { betas: Betas::Uniform, ..draw };
        if op.contains("norm") {
            // With one feature, or one key so far, a normaliser leaves nothing of the query's size to differentiate.
            draw.initial_state = true;
            draw.problem.key_dim = draw.problem.key_dim.max(2);
        }
        agrees(&matrix_case(op, &draw), draw.gates)?;
    }

    #[test]
    fn other_matrix_operations(draw in matrix_draws(1), op in prop::sample::select(&EQUAL[..])) {
        agrees(&matrix_case(op, &draw), draw.gates)?;
    }

    #[test]
    fn operations_without_a_matrix_state(draw in matrix_draws(3), op in prop::sample::select(&OTHERS[..])) {
        agrees(&other_case(op, &draw), draw.gates)?;
    }
}
