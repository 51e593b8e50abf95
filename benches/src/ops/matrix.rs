//! The matrix-state recurrences.

use super::{Any, Input, Op, cotangent, narrow, total, widen, with_tolerance};
use crate::noise::{fill, signed, wide};
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass, Path};
use burn::tensor::Device;
use half::bf16;
#[cfg(feature = "gpu")]
use thalweg_gpu as gpu;
use thalweg_kernels::Element;
use thalweg_kernels::cost::{self, Cost};
use thalweg_kernels::matrix::{
    self, GateKind, KeepStates, MatrixGradients, MatrixInputs, MatrixOutputs, MatrixProblem, Write, WriteKind,
};
use thalweg_reference::matrix as oracle;
use thalweg_scan as scan;

/// Name, gate, write.
const OPS: [(&str, GateKind, WriteKind); 8] = [
    ("linear_attention", GateKind::None, WriteKind::Additive),
    ("retention", GateKind::CONSTANT, WriteKind::Additive),
    ("simple_gla", GateKind::HEAD, WriteKind::Additive),
    ("gla", GateKind::KEY, WriteKind::Additive),
    ("delta_rule", GateKind::None, WriteKind::DELTA),
    ("gated_delta_rule", GateKind::HEAD, WriteKind::DELTA),
    ("kda", GateKind::KEY, WriteKind::DELTA),
    ("dplr", GateKind::KEY, WriteKind::LOW_RANK),
];

/// The tensors of any of them; what an operation does not take is empty. `q`, `k`, `v`, `a`, `b` are rounded.
pub(super) struct Data {
    problem: MatrixProblem,
    gate: GateKind,
    write: WriteKind,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    g: Vec<f32>,
    beta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    state: Vec<f32>,
}

/// The operation of this name.
pub(super) fn data(case: &Case) -> Result<Data, Error> {
    let op = OPS.iter().find(|op| op.0 == case.name);
    let Some(&(_, gate, write)) = op else {
        return Err(Error::argument("name", format!("`{}` is no operation", case.name)));
    };
    Ok(Data::new(case, gate, write))
}

pub(super) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    let data = data(case)?;
    match (case.path, case.dtype) {
        (Path::Native, Dtype::F32) => Ok(Box::new(Native::<f32>::new(data, case))),
        (Path::Native, Dtype::Bf16) => Ok(Box::new(Native::<bf16>::new(data, case))),
        _ => super::on_burn(data, case, device),
    }
}

impl Data {
    fn new(case: &Case, gate: GateKind, write: WriteKind) -> Self {
        let [batch, time, heads, key_dim, value_dim] = case.shape[..] else { unreachable!("checked by `ops::build`") };
        let mut problem = MatrixProblem::new(batch, time, heads, key_dim, value_dim);
        problem.chunk = case.chunk.unwrap_or(problem.chunk);
        let tokens = |inner: usize| [batch, time, inner];
        // Keys of about unit length, with which the delta rule contracts.
        let unit = (3.0 / key_dim as f32).sqrt();
        let key = |tensor: u64, size: f32| fill(tensor, tokens(heads * key_dim), |u| size * (2.0 * u - 1.0));
        let low_rank = write == WriteKind::LOW_RANK;
        let a = if low_rank { key(5, -unit) } else { Vec::new() };
        // b is -a, shortened: b a^T takes away less than all along a.
        let lengths = fill(6, tokens(1), |u| u);
        let b = a.chunks(heads * key_dim).zip(&lengths).flat_map(|(a, u)| a.iter().map(move |x| -u * x)).collect();
        let round = |values| case.dtype.round(values);
        Self {
            q: round(signed(1, tokens(heads * key_dim))),
            k: round(key(2, unit)),
            v: round(signed(3, tokens(heads * value_dim))),
            g: match gate {
                GateKind::None => Vec::new(),
                GateKind::CONSTANT => (0..heads).map(|h| -0.3 / (h + 1) as f32).collect(),
                GateKind::HEAD => fill(4, tokens(heads), |u| -0.3 * u),
                GateKind::KEY => fill(4, tokens(heads * key_dim), |u| -0.1 * u),
            },
            beta: if write == WriteKind::DELTA { fill(7, tokens(heads), |u| u) } else { Vec::new() },
            a: round(a),
            b: round(b),
            state: if case.pass == Pass::Step { signed(8, [batch, heads, key_dim * value_dim]) } else { Vec::new() },
            problem,
            gate,
            write,
        }
    }
}

impl Op for Data {
    fn inputs(&self) -> Vec<Input> {
        let (keys, values) = (self.problem.key_shape().to_vec(), self.problem.value_shape().to_vec());
        let head = keys[..3].to_vec();
        let gate = match self.gate {
            GateKind::None => None,
            GateKind::CONSTANT => Some(vec![self.problem.heads]),
            GateKind::HEAD => Some(head.clone()),
            GateKind::KEY => Some(keys.clone()),
        };
        let input = |gradient, shape: &Vec<usize>, values: &Vec<f32>, stored| Input {
            gradient,
            shape: shape.clone(),
            values: values.clone(),
            stored,
        };
        let mut inputs = vec![
            input("dq", &keys, &self.q, true),
            input("dk", &keys, &self.k, true),
            input("dv", &values, &self.v, true),
        ];
        if self.write == WriteKind::LOW_RANK {
            inputs.extend([input("da", &keys, &self.a, true), input("db", &keys, &self.b, true)]);
        }
        inputs.extend(gate.map(|shape| input("dg", &shape, &self.g, false)));
        if self.write == WriteKind::DELTA {
            inputs.push(input("dbeta", &head, &self.beta, false));
        }
        inputs
    }

    fn state(&self) -> Option<Input> {
        let shape = self.problem.state_shape().to_vec();
        Some(Input { gradient: "", shape, values: self.state.clone(), stored: false })
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let MatrixProblem { batch, time, heads, value_heads, key_dim, value_dim, scale, .. } = self.problem;
        let scale = f64::from(scale);
        let problem = oracle::Problem { batch, time, heads, value_heads, key_dim, value_dim, scale, cu_seqlens: None };
        let [q, k, v, g] = [&self.q, &self.k, &self.v, &self.g].map(|x| wide(x));
        let [beta, a, b, state] = [&self.beta, &self.a, &self.b, &self.state].map(|x| wide(x));
        let inputs = oracle::Inputs {
            q: &q,
            k: &k,
            v: &v,
            gate: match self.gate {
                GateKind::None => oracle::Gate::None,
                GateKind::CONSTANT => oracle::Gate::Constant(&g),
                GateKind::HEAD => oracle::Gate::Head(&g),
                GateKind::KEY => oracle::Gate::Key(&g),
            },
            write: match self.write {
                WriteKind::Additive => oracle::Write::Additive,
                WriteKind::DELTA => oracle::Write::Delta { beta: &beta },
                WriteKind::LOW_RANK => oracle::Write::LowRank { a: &a, b: &b },
            },
            initial_state: (pass == Pass::Step).then_some(&state[..]),
        };
        let out = oracle::forward(&problem, &inputs);
        let mut expected = vec![("o", out.o), ("state", out.final_state)];
        if pass == Pass::Train {
            let d = oracle::backward(&problem, &inputs, &wide(d_o), None);
            expected.extend([("dq", d.q), ("dk", d.k), ("dv", d.v), ("dg", d.gate)]);
            expected.extend([("dbeta", d.beta), ("da", d.a), ("db", d.b)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        self.problem.value_shape().to_vec()
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::matrix(&self.problem, self.gate, self.write, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::MatrixOptions::new().with_chunk(self.problem.chunk).with_path(path);
        let [q, k, v] = [0, 1, 2].map(|i| x[i].r4());
        let out = match (self.write, self.gate) {
            (WriteKind::Additive, GateKind::None) => scan::linear_attention(q, k, v, options),
            (WriteKind::Additive, GateKind::CONSTANT) => scan::retention(q, k, v, x[3].r1(), options),
            (WriteKind::Additive, GateKind::HEAD) => scan::simple_gla(q, k, v, x[3].r3(), options),
            (WriteKind::Additive, GateKind::KEY) => scan::gla(q, k, v, x[3].r4(), options),
            (WriteKind::DELTA, GateKind::KEY) => scan::kda(q, k, v, x[3].r4(), x[4].r3(), options),
            (WriteKind::DELTA, GateKind::None) => scan::delta_rule(q, k, v, x[3].r3(), options),
            (WriteKind::DELTA, _) => scan::gated_delta_rule(q, k, v, x[3].r3(), x[4].r3(), options),
            (WriteKind::LOW_RANK, _) => scan::dplr(q, k, v, x[3].r4(), x[4].r4(), x[5].r4(), options),
        }?;
        Ok(out.o.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        let options = scan::StepOptions::new().with_path(path);
        let token4 = |i: usize| x[i].r4().squeeze_dim::<3>(1);
        let token3 = |i: usize| x[i].r3().squeeze_dim::<2>(1);
        // The state's only holder: the kernel may advance it in place.
        let Any::R4(state) = state else { unreachable!("a state has 4 axes") };
        let [q, k, v] = [0, 1, 2].map(token4);
        let (o, state) = match (self.write, self.gate) {
            (WriteKind::Additive, GateKind::None) => scan::linear_attention_step(q, k, v, state, options),
            (WriteKind::Additive, GateKind::CONSTANT) => scan::retention_step(q, k, v, x[3].r1(), state, options),
            (WriteKind::Additive, GateKind::HEAD) => scan::simple_gla_step(q, k, v, token3(3), state, options),
            (WriteKind::Additive, GateKind::KEY) => scan::gla_step(q, k, v, token4(3), state, options),
            (WriteKind::DELTA, GateKind::KEY) => scan::kda_step(q, k, v, token4(3), token3(4), state, options),
            (WriteKind::DELTA, GateKind::None) => scan::delta_rule_step(q, k, v, token3(3), state, options),
            (WriteKind::DELTA, _) => scan::gated_delta_rule_step(q, k, v, token3(3), token3(4), state, options),
            (WriteKind::LOW_RANK, _) => scan::dplr_step(q, k, v, token4(3), token4(4), token4(5), state, options),
        }?;
        Ok((o.into(), state.into()))
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for Data {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        state: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        use gpu::matrix::{Inputs, Write, backward, forward, step};
        let [q, k, v, rest @ ..] = x else { unreachable!("three tensors at least go in") };
        let mut rest = rest.iter();
        let low_rank =
            (self.write == WriteKind::LOW_RANK).then(|| [(); 2].map(|()| rest.next().expect("a and b go in")));
        let mut next = || rest.next().expect("gates and steps go in after them");
        let gate = self.gate.map(|()| next());
        let write = match (low_rank, self.write) {
            (Some([a, b]), _) => Write::LowRank { a, b },
            (None, WriteKind::DELTA) => Write::Delta { beta: next() },
            (None, _) => Write::Additive,
        };
        let inputs = Inputs { q, k, v, gate, write, initial_state: None };
        if let Some(state) = state {
            let o = step(client, &self.problem, &inputs, state)?;
            return Ok(vec![("o", o), ("state", state.clone())]);
        }
        let out = forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.o), ("state", out.final_state)];
        if let Some(d_o) = d_o.first() {
            let d = backward(client, &self.problem, &inputs, Some(d_o), None)?;
            found.extend([("dq", d.dq), ("dk", d.dk), ("dv", d.dv)]);
            found.extend(d.dg.map(|x| ("dg", x)));
            let rest = [("dbeta", d.dbeta), ("da", d.da), ("db", d.db)];
            found.extend(rest.into_iter().filter_map(|(name, x)| Some((name, x?))));
        }
        Ok(found)
    }
}

/// The kernels on slices.
struct Native<E> {
    data: Data,
    case: Case,
    q: Vec<E>,
    k: Vec<E>,
    v: Vec<E>,
    a: Vec<E>,
    b: Vec<E>,
    d_o: Vec<E>,
    state: Vec<f32>,
    out: Option<MatrixOutputs<E>>,
    gradients: Option<MatrixGradients<E>>,
    o: Vec<E>,
}

impl<E: Element> Native<E> {
    fn new(data: Data, case: &Case) -> Self {
        let train = case.pass == Pass::Train;
        Self {
            q: narrow(&data.q),
            k: narrow(&data.k),
            v: narrow(&data.v),
            a: narrow(&data.a),
            b: narrow(&data.b),
            d_o: if train { narrow(&cotangent(case, &data.output())) } else { Vec::new() },
            state: data.state.clone(),
            case: case.clone(),
            data,
            out: None,
            gradients: None,
            o: Vec::new(),
        }
    }
}

impl<E: Element> Workload for Native<E> {
    fn run(&mut self) -> Result<(), Error> {
        let Data { problem, gate, write, g, beta, .. } = &self.data;
        let inputs = MatrixInputs {
            q: &self.q,
            k: &self.k,
            v: &self.v,
            gate: gate.map(|()| &g[..]),
            write: match *write {
                WriteKind::Additive => Write::Additive,
                WriteKind::DELTA => Write::Delta { beta },
                WriteKind::LOW_RANK => Write::LowRank { a: &self.a, b: &self.b },
            },
            initial_state: None,
        };
        match self.case.pass {
            Pass::Forward => self.out = Some(matrix::forward(problem, &inputs, KeepStates::No)?),
            Pass::Train => {
                let out = matrix::forward(problem, &inputs, KeepStates::Yes)?;
                let states = out.chunk_states.as_deref();
                self.gradients = Some(matrix::backward(problem, &inputs, &self.d_o, None, states)?);
                self.out = Some(out);
            }
            Pass::Step => self.o = matrix::step(problem, &inputs, &mut self.state)?,
        }
        Ok(())
    }

    fn found(&self) -> Vec<Named> {
        if self.case.pass == Pass::Step {
            return vec![
                Named { name: "o", values: widen(&self.o) },
                Named { name: "state", values: wide(&self.state) },
            ];
        }
        let mut found = Vec::new();
        if let Some(out) = &self.out {
            found.push(Named { name: "o", values: widen(&out.o) });
            found.push(Named { name: "state", values: wide(&out.final_state) });
        }
        if let Some(d) = &self.gradients {
            let stored = [("dq", Some(&d.dq)), ("dk", Some(&d.dk)), ("dv", Some(&d.dv))];
            let stored = stored.into_iter().chain([("da", d.da.as_ref()), ("db", d.db.as_ref())]);
            found.extend(stored.filter_map(|(name, x)| Some(Named { name, values: widen(x?) })));
            let single = [("dg", d.dg.as_ref()), ("dbeta", d.dbeta.as_ref())];
            found.extend(single.into_iter().filter_map(|(name, x)| Some(Named { name, values: wide(x?) })));
        }
        found
    }

    fn head(&self, len: usize) -> Vec<f64> {
        self.out.as_ref().map(|out| widen(&out.o[..len.min(out.o.len())])).unwrap_or_default()
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let d_o: Vec<f32> = self.d_o.iter().map(|x| x.to_f32()).collect();
        Ok(with_tolerance(&self.case, self.data.expected(self.case.pass, &d_o)))
    }

    fn cost(&self) -> Cost {
        self.data.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.data.tokens()
    }
}
