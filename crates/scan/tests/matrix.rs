//! The chunked forms against the step form, forward and gradients.

#[macro_use]
mod common;

use burn::Tensor;
use burn::tensor::DType;
use common::*;
use thalweg_scan::{self as scan, MatrixOptions, Output, Path, StepOptions};

on_each_device!(
    both_paths_are_safe_in_f32_with_extreme_gates,
    packed_grouped_and_normalised,
    native_steps_equal_portable_steps,
    half_size_paths_agree,
    normalised_linear_attention_of_nothing_is_nothing,
    either_output_alone_has_gradients,
    bad_arguments_are_named,
    gradient_checkpointing_changes_nothing,
);

#[derive(Debug, Clone, Copy, PartialEq)]
enum Op {
    Linear,
    Retention,
    Simple,
    Gla,
    Hgrn2,
    Delta,
    GatedDelta,
    Kda,
    Dplr,
}

const OPS: [Op; 9] =
    [Op::Linear, Op::Retention, Op::Simple, Op::Gla, Op::Hgrn2, Op::Delta, Op::GatedDelta, Op::Kda, Op::Dplr];

/// All inputs that some operation may want.
#[derive(Clone)]
struct Inputs {
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    head: Tensor<3>,
    key: Tensor<4>,
    constant: Tensor<1>,
    beta: Tensor<3>,
    a: Tensor<4>,
    b: Tensor<4>,
    state: Tensor<4>,
}

struct Shape {
    batch: usize,
    time: usize,
    heads: usize,
    value_heads: usize,
    key: usize,
    value: usize,
    sequences: usize,
}

impl Inputs {
    fn new(shape: &Shape, gates: Gates, dtype: DType) -> Self {
        let Shape { batch: b, time: t, heads: h, value_heads: hv, key: k, value: v, sequences: n } = *shape;
        let mut random = Random::new(t as u64 + 1000 * gates as u64);
        // Unit-size keys keep the delta rules contracting.
        let unit = 1.0 / (k as f64).sqrt();
        Self {
            q: random.tensor([b, t, h, k], -1.0, 1.0, dtype),
            k: random.tensor([b, t, h, k], -unit, unit, dtype),
            v: random.tensor([b, t, hv, v], -1.0, 1.0, dtype),
            head: random.gates([b, t, hv], gates, dtype),
            key: random.gates([b, t, hv, k], gates, dtype),
            constant: random.gates([hv], gates, dtype),
            beta: random.tensor([b, t, hv], 0.0, 2.0, dtype),
            a: random.tensor([b, t, hv, k], -unit, unit, dtype),
            b: random.tensor([b, t, hv, k], -unit, unit, dtype),
            state: random.tensor([n, hv, k, v], -1.0, 1.0, dtype),
        }
    }

    fn fresh(&self) -> Self {
        Self {
            q: fresh(&self.q),
            k: fresh(&self.k),
            v: fresh(&self.v),
            head: fresh(&self.head),
            key: fresh(&self.key),
            constant: fresh(&self.constant),
            beta: fresh(&self.beta),
            a: fresh(&self.a),
            b: fresh(&self.b),
            state: fresh(&self.state),
        }
    }

    /// Without gradients, on the same values.
    fn detached(&self) -> Self {
        let x = self.clone();
        Self {
            q: x.q.inner(),
            k: x.k.inner(),
            v: x.v.inner(),
            head: x.head.inner(),
            key: x.key.inner(),
            constant: x.constant.inner(),
            beta: x.beta.inner(),
            a: x.a.inner(),
            b: x.b.inner(),
            state: x.state.inner(),
        }
    }

    fn run(&self, op: Op, options: MatrixOptions) -> Output {
        let Self { q, k, v, head, key, constant, beta, a, b, state } = self.clone();
        let options = options.with_initial_state(state);
        match op {
            Op::Linear => scan::linear_attention(q, k, v, options),
            Op::Retention => scan::retention(q, k, v, constant, options),
            Op::Simple => scan::simple_gla(q, k, v, head, options),
            Op::Gla => scan::gla(q, k, v, key, options),
            Op::Hgrn2 => scan::hgrn2(q, v, key, options),
            Op::Delta => scan::delta_rule(q, k, v, beta, options),
            Op::GatedDelta => scan::gated_delta_rule(q, k, v, head, beta, options),
            Op::Kda => scan::kda(q, k, v, key, beta, options),
            Op::Dplr => scan::dplr(q, k, v, a, b, key, options),
        }
        .expect("valid arguments")
    }

    /// The recurrence token by token, sequence by sequence.
    fn steps(&self, op: Op, bounds: Option<&[usize]>, l2: bool, path: Path) -> Output {
        let time = self.q.dims()[1];
        let whole = [0, time];
        let packed = bounds.is_some();
        let (mut o, mut finals) = (Vec::new(), Vec::new());
        for (n, bound) in bounds.unwrap_or(&whole).windows(2).enumerate() {
            let mut state = self.state.clone();
            if packed {
                state = state.narrow(0, n, 1);
            }
            for t in bound[0]..bound[1] {
                let four = |x: &Tensor<4>| x.clone().narrow(1, t, 1).squeeze_dim::<3>(1);
                let three = |x: &Tensor<3>| x.clone().narrow(1, t, 1).squeeze_dim::<2>(1);
                let (q, k, v) = (four(&self.q), four(&self.k), four(&self.v));
                let (head, key, beta) = (three(&self.head), four(&self.key), three(&self.beta));
                let (a, b) = (four(&self.a), four(&self.b));
                let options = StepOptions::new().with_qk_l2norm(l2).with_path(path);
                let (out, next) = match op {
                    Op::Linear => scan::linear_attention_step(q, k, v, state, options),
                    Op::Retention => scan::retention_step(q, k, v, self.constant.clone(), state, options),
                    Op::Simple => scan::simple_gla_step(q, k, v, head, state, options),
                    Op::Gla => scan::gla_step(q, k, v, key, state, options),
                    Op::Hgrn2 => scan::hgrn2_step(q, v, key, state, options),
                    Op::Delta => scan::delta_rule_step(q, k, v, beta, state, options),
                    Op::GatedDelta => scan::gated_delta_rule_step(q, k, v, head, beta, state, options),
                    Op::Kda => scan::kda_step(q, k, v, key, beta, state, options),
                    Op::Dplr => scan::dplr_step(q, k, v, a, b, key, state, options),
                }
                .expect("valid arguments");
                o.push(out);
                state = next;
            }
            finals.push(state);
        }
        Output { o: Tensor::stack(o, 1), final_state: Tensor::cat(finals, 0) }
    }

    /// Compares two runs of an operation: outputs, and the gradients of every input that it uses.
    fn compare(&self, other: &Self, op: Op, x: &Output, y: &Output, tolerance: f64, what: &str) {
        assert_close(&format!("{what} {op:?} o"), &values(&x.o), &values(&y.o), tolerance);
        let (s, t) = (values(&x.final_state), values(&y.final_state));
        assert_close(&format!("{what} {op:?} final state"), &s, &t, tolerance);

        let mut random = Random::new(7);
        let dtype = x.o.dtype();
        let cot_o: Tensor<4> = random.tensor(x.o.dims(), -1.0, 1.0, dtype).detach();
        let cot_s: Tensor<4> = random.tensor(x.final_state.dims(), -1.0, 1.0, x.final_state.dtype()).detach();
        let loss = |out: &Output| {
            let o = (out.o.clone() * cot_o.clone()).sum();
            o.cast(cot_s.dtype()) + (out.final_state.clone() * cot_s.clone()).sum()
        };
        let (gx, gy) = (loss(x).backward(), loss(y).backward());
        macro_rules! check {
            ($($field:ident),*) => {{$(
                let (f, e) = (gradient(&self.$field, &gx), gradient(&other.$field, &gy));
                // Gradients of gates may be as good as zero; then only their absolute size counts.
                let floor = 1e-3;
                let size = e.iter().fold(0f64, |m, v| m.max(v.abs()));
                let slack = if size < floor { tolerance * floor / size.max(1e-30) } else { tolerance };
                assert_close(&format!("{what} {op:?} d{}", stringify!($field)), &f, &e, slack);
            )*}};
        }
        check!(q, v, state);
        match op {
            Op::Hgrn2 => {}
            _ => check!(k),
        }
        match op {
            Op::Linear | Op::Delta => {}
            Op::Retention => check!(constant),
            Op::Simple | Op::GatedDelta => check!(head),
            Op::Gla | Op::Hgrn2 | Op::Kda | Op::Dplr => check!(key),
        }
        match op {
            Op::Delta | Op::GatedDelta | Op::Kda => check!(beta),
            Op::Dplr => check!(a, b),
            _ => {}
        }
    }
}

/// Every operation, every gate regime, lengths around the chunk and sub-block sizes. In f64, where a
/// wrong formula cannot hide in rounding.
#[test]
fn chunked_equals_steps_in_f64() {
    for (time, chunk, gates) in [
        (1, 64, Gates::Ordinary),
        (65, 64, Gates::Ordinary),
        (40, 16, Gates::Zero),
        (50, 24, Gates::Strong),
        (70, 64, Gates::Mixed),
    ] {
        let shape = Shape { batch: 2, time, heads: 2, value_heads: 2, key: 5, value: 3, sequences: 2 };
        let inputs = Inputs::new(&shape, gates, DType::F64);
        for op in OPS {
            let (x, y) = (inputs.fresh(), inputs.fresh());
            let chunked = x.run(op, MatrixOptions::new().with_chunk(chunk).with_path(Path::Portable));
            let steps = y.steps(op, None, false, Path::Portable);
            x.compare(&y, op, &chunked, &steps, 1e-11, &format!("T={time} {gates:?}"));
        }
    }
}

/// Single precision on both paths, with gates from 0 to -1e4 mixed: the tolerance of the design.
fn both_paths_are_safe_in_f32_with_extreme_gates() {
    for (time, gates) in [(1, Gates::Ordinary), (65, Gates::Strong), (130, Gates::Ordinary), (130, Gates::Mixed)] {
        let shape = Shape { batch: 2, time, heads: 1, value_heads: 1, key: 16, value: 8, sequences: 2 };
        let inputs = Inputs::new(&shape, gates, DType::F32);
        for op in OPS {
            for &path in paths() {
                let (x, y) = (inputs.fresh(), inputs.fresh());
                let chunked = x.run(op, MatrixOptions::new().with_path(path));
                let steps = y.steps(op, None, false, Path::Portable);
                x.compare(&y, op, &chunked, &steps, 2e-5, &format!("{path:?} T={time} {gates:?}"));
            }
        }
    }
}

/// Packed sequences, grouped value heads and normalised keys.
fn packed_grouped_and_normalised() {
    let bounds = vec![0, 1, 34, 51];
    let shape = Shape { batch: 1, time: 51, heads: 2, value_heads: 4, key: 4, value: 6, sequences: 3 };
    for (path, dtype, tolerance) in [(Path::Portable, DType::F64, 1e-11), (Path::Auto, DType::F32, 2e-5)] {
        if !computes(dtype) {
            continue;
        }
        let inputs = Inputs::new(&shape, Gates::Ordinary, dtype);
        for op in [Op::Linear, Op::Retention, Op::Simple, Op::Gla, Op::Delta, Op::GatedDelta, Op::Kda] {
            let (x, y) = (inputs.fresh(), inputs.fresh());
            let options = MatrixOptions::new()
                .with_cu_seqlens(bounds.clone())
                .with_qk_l2norm(true)
                .with_chunk(32)
                .with_path(path);
            let chunked = x.run(op, options);
            let steps = y.steps(op, Some(&bounds), true, Path::Portable);
            x.compare(&y, op, &chunked, &steps, tolerance, &format!("packed {path:?}"));
        }
    }
}

/// Native single steps, with and without a graph, equal the portable ones.
fn native_steps_equal_portable_steps() {
    let shape = Shape { batch: 3, time: 5, heads: 2, value_heads: 2, key: 8, value: 4, sequences: 3 };
    let inputs = Inputs::new(&shape, Gates::Ordinary, DType::F32);
    for op in OPS {
        let (x, y) = (inputs.fresh(), inputs.fresh());
        let native = x.steps(op, None, false, Path::Auto);
        let portable = y.steps(op, None, false, Path::Portable);
        x.compare(&y, op, &native, &portable, 1e-5, "steps");
        let plain = inputs.detached().steps(op, None, false, Path::Auto);
        assert_close("untracked o", &values(&plain.o), &values(&portable.o), 1e-5);
        assert_close("untracked state", &values(&plain.final_state), &values(&portable.final_state), 1e-5);
        // A step must not write into a state that the caller still holds.
        assert_eq!(values(&inputs.state), values(&x.state));
    }
}

/// Tensors of half size: the paths round the same inputs and accumulate in f32.
fn half_size_paths_agree() {
    let shape = Shape { batch: 1, time: 70, heads: 2, value_heads: 2, key: 8, value: 8, sequences: 1 };
    for (dtype, tolerance) in [(DType::BF16, 2e-2), (DType::F16, 4e-3)] {
        if !computes(dtype) {
            continue;
        }
        let inputs = Inputs::new(&shape, Gates::Ordinary, dtype);
        for op in OPS {
            for &path in paths() {
                let (x, y) = (inputs.fresh(), inputs.fresh());
                let chunked = x.run(op, MatrixOptions::new().with_path(path));
                let steps = y.steps(op, None, false, Path::Portable);
                assert_eq!((chunked.o.dtype(), chunked.final_state.dtype()), (dtype, DType::F32));
                x.compare(&y, op, &chunked, &steps, tolerance, dtype.name());
            }
        }
    }
}

/// Only one of the two outputs in the loss: the other one's gradient is zero, not missing.
fn either_output_alone_has_gradients() {
    let shape = Shape { batch: 1, time: 20, heads: 1, value_heads: 1, key: 4, value: 4, sequences: 1 };
    let inputs = Inputs::new(&shape, Gates::Ordinary, DType::F32);
    let losses: [fn(Output) -> Tensor<1>; 2] = [|out| out.o.sum(), |out| out.final_state.sum()];
    for loss in losses {
        let (x, y) = (inputs.fresh(), inputs.fresh());
        let gx = loss(x.run(Op::Kda, MatrixOptions::new())).backward();
        let gy = loss(y.steps(Op::Kda, None, false, Path::Portable)).backward();
        for (a, b) in [(&x.k, &y.k), (&x.v, &y.v), (&x.state, &y.state), (&x.key, &y.key)] {
            assert_close("gradient", &gradient(a, &gx), &gradient(b, &gy), 2e-5);
        }
    }
}

/// Bad arguments name themselves.
fn bad_arguments_are_named() {
    let shape = Shape { batch: 1, time: 4, heads: 1, value_heads: 1, key: 2, value: 2, sequences: 1 };
    let x = Inputs::new(&shape, Gates::Ordinary, DType::F32);
    let call = |k: Tensor<4>, options: MatrixOptions| {
        let result = scan::gla(x.q.clone(), k, x.v.clone(), x.key.clone(), options);
        result.expect_err("an error").to_string()
    };
    let wrong = x.k.clone().narrow(3, 0, 1);
    assert_eq!(
        call(wrong, MatrixOptions::new()),
        "`k` has shape [1, 4, 1, 1], expected [batch=1, time=4, heads=1, key_dim=2]"
    );
    // The values on a GPU are known when all work in the queue is done, too late for an error.
    if !is_gpu() {
        let positive = scan::gla(x.q.clone(), x.k.clone(), x.v.clone(), x.key.clone().neg(), MatrixOptions::new());
        let message = positive.expect_err("an error").to_string();
        assert!(message.starts_with("`g` holds "), "{message}");
    }
    for (options, name) in [
        (MatrixOptions::new().with_chunk(0), "`chunk`"),
        (MatrixOptions::new().with_cu_seqlens(vec![0, 3, 2, 4]), "`cu_seqlens`"),
        (MatrixOptions::new().with_initial_state(x.state.clone().narrow(2, 0, 1)), "`initial_state`"),
    ] {
        let message = call(x.k.clone(), options);
        assert!(message.starts_with(name), "{message}");
    }
}

/// The normaliser of linear attention, against its definition.
#[test]
fn normalised_linear_attention() {
    let dtype = DType::F64;
    let mut random = Random::new(3);
    let q = random.tensor([1, 19, 1, 4], 0.1, 1.0, dtype);
    let k = random.tensor([1, 19, 1, 4], 0.1, 1.0, dtype);
    let v = random.tensor([1, 19, 2, 3], -1.0, 1.0, dtype);
    let z = random.tensor([1, 1, 1, 4], 0.1, 1.0, dtype);
    let s = random.tensor([1, 2, 4, 3], -1.0, 1.0, dtype);
    let options = MatrixOptions::new().with_initial_state(s.clone());
    let out = scan::normalized_linear_attention(q.clone(), k.clone(), v.clone(), Some(z.clone()), options)
        .expect("valid arguments");
    let plain =
        scan::linear_attention(q.clone(), k.clone(), v.clone(), MatrixOptions::new().with_initial_state(s.clone()))
            .expect("valid arguments");
    let sums = k.clone().cumsum(1) + z.clone();
    let weight = (q.clone().mul_scalar(0.5) * sums.clone()).sum_dim(3).add_scalar(1e-10);
    assert_close("o", &values(&out.o), &values(&(plain.o / weight)), 1e-12);
    assert_close("z", &values(&out.final_normalizer), &values(&sums.narrow(1, 18, 1)), 1e-12);

    // Step by step gives the same last output.
    let (mut state, mut z, mut last) = (s, z, None);
    for t in 0..19 {
        let at = |x: &Tensor<4>| x.clone().narrow(1, t, 1).squeeze_dim::<3>(1);
        let (o, s, n) = scan::normalized_linear_attention_step(at(&q), at(&k), at(&v), state, z, StepOptions::new())
            .expect("valid arguments");
        (state, z, last) = (s, n, Some(o));
    }
    let last = last.expect("a step").unsqueeze_dim::<4>(1);
    assert_close("last step", &values(&last), &values(&out.o.narrow(1, 18, 1)), 1e-12);
}

/// Features of 0 leave nothing to divide by but the epsilon, which f16 cannot hold.
fn normalised_linear_attention_of_nothing_is_nothing() {
    for dtype in [DType::F32, DType::BF16, DType::F16].into_iter().filter(|dtype| computes(*dtype)) {
        let [q, k, v] = [[0.0, 2.0], [0.0, 1.0], [3.0, 5.0]].map(|x| leaf(x.to_vec(), [1, 2, 1, 1], dtype));
        let out = scan::normalized_linear_attention(q.clone(), k.clone(), v.clone(), None, MatrixOptions::new())
            .expect("valid arguments");
        assert_eq!((values(&out.o), out.o.dtype()), (vec![0.0, 5.0], dtype));
        let gradients = out.o.sum().backward();
        assert_eq!(gradient(&v, &gradients), [0.0, 1.0], "{dtype:?}");
        assert!([q, k].iter().all(|x| gradient(x, &gradients).iter().all(|x| x.is_finite())), "{dtype:?}");
        let zero = |last| Tensor::<3>::full([1, 1, 1], last, (&device(), dtype));
        let [state, normalizer] = [0; 2].map(|_| Tensor::<4>::zeros([1, 1, 1, 1], (&device(), DType::F32)));
        let (o, ..) = scan::normalized_linear_attention_step(
            zero(0.0),
            zero(0.0),
            zero(3.0),
            state,
            normalizer,
            StepOptions::new(),
        )
        .expect("valid arguments");
        assert_eq!(values(&o), [0.0], "{dtype:?}");
    }
}

/// With gradient checkpointing the operands of the backward pass are recomputed.
fn gradient_checkpointing_changes_nothing() {
    let shape = Shape { batch: 1, time: 40, heads: 2, value_heads: 2, key: 4, value: 4, sequences: 1 };
    let inputs = Inputs::new(&shape, Gates::Ordinary, DType::F32);
    let [plain, recomputed] = [device(), device().gradient_checkpointing()].map(|device| {
        let on = |x: &Tensor<4>| Tensor::<4>::from_data(x.to_data(), &device).require_grad();
        let [q, k, v, g] = [&inputs.q, &inputs.k, &inputs.v, &inputs.key].map(on);
        let keys = k.clone().mul_scalar(0.5).add_scalar(0.1);
        let gates = g.clone().exp().log().add_scalar(-0.01);
        let out = scan::gla(q.clone(), keys, v.clone(), gates, MatrixOptions::new()).expect("valid arguments");
        let gradients = (out.o.powi_scalar(2).sum() + out.final_state.sum()).backward();
        [q, k, v, g].map(|x| gradient(&x, &gradients))
    });
    for (x, y) in plain.iter().zip(&recomputed) {
        assert_close("gradient", x, y, 1e-6);
    }
}
