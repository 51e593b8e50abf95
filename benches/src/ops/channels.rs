//! The operations on `[batch, time, channels]`.

use super::{Any, Input, Op, cotangent, narrow, total, widen, with_tolerance};
use crate::noise::{fill, signed, wide};
use crate::workload::{Expected, Named, Workload};
use crate::{Case, Dtype, Error, Pass, Path};
use burn::tensor::Device;
use half::bf16;
#[cfg(feature = "gpu")]
use thalweg_gpu as gpu;
use thalweg_kernels::cost::{self, Cost};
use thalweg_kernels::elementwise_scan::{self, ScanGate, ScanGradients, ScanInputs, ScanOutputs};
use thalweg_kernels::short_conv::{self, Activation, ConvGradients, ConvInputs, ConvOutputs, ConvProblem};
use thalweg_kernels::{Element, ScanProblem};
use thalweg_reference::{Shape, elementwise, short_conv as conv_oracle};
use thalweg_scan as scan;

pub(super) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    match case.name.as_str() {
        "scan" | "hgrn" => on_path::<Scan>(case, device),
        _ => on_path::<Conv>(case, device),
    }
}

pub(super) fn on_path<C: Channels + 'static>(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    match (case.path, case.dtype) {
        (Path::Native, Dtype::F32) => Ok(Box::new(Native::<C, f32>::new(case))),
        (Path::Native, Dtype::Bf16) => Ok(Box::new(Native::<C, bf16>::new(case))),
        _ => super::on_burn(C::new(case), case, device),
    }
}

/// An operation of this kind: its inputs, and the kernels that run it on slices.
pub(super) trait Channels: Op + Sized {
    /// Results of the last run, whose memory the next one takes.
    type Results<E: Element>: Default + Send;

    fn new(case: &Case) -> Self;
    /// Runs a pass on the stored inputs (in the order of [`Op::inputs`], empty where they are f32).
    fn run<E: Element>(
        &self,
        pass: Pass,
        stored: &[Vec<E>],
        d_o: &[E],
        state: &mut [f32],
        reuse: Self::Results<E>,
    ) -> Result<Self::Results<E>, thalweg_kernels::Error>;
    fn main<E: Element>(results: &Self::Results<E>) -> &[E];
    /// Final state and gradients.
    fn rest<E: Element>(&self, pass: Pass, results: &Self::Results<E>) -> Vec<Named>;
}

struct Native<C: Channels, E: Element> {
    op: C,
    case: Case,
    stored: Vec<Vec<E>>,
    d_o: Vec<E>,
    state: Vec<f32>,
    results: C::Results<E>,
}

impl<C: Channels, E: Element> Native<C, E> {
    fn new(case: &Case) -> Self {
        let op = C::new(case);
        let train = case.pass == Pass::Train;
        let stored = |input: Input| if input.stored { narrow(&input.values) } else { Vec::new() };
        Self {
            stored: op.inputs().into_iter().map(stored).collect(),
            d_o: if train { narrow(&cotangent(case, &op.output())) } else { Vec::new() },
            state: op.state().map(|state| state.values).unwrap_or_default(),
            results: C::Results::default(),
            case: case.clone(),
            op,
        }
    }
}

impl<C: Channels, E: Element> Workload for Native<C, E> {
    fn run(&mut self) -> Result<(), Error> {
        let reuse = std::mem::take(&mut self.results);
        self.results = self.op.run(self.case.pass, &self.stored, &self.d_o, &mut self.state, reuse)?;
        Ok(())
    }

    fn found(&self) -> Vec<Named> {
        let o = Named { name: "o", values: widen(C::main(&self.results)) };
        let rest = match self.case.pass {
            Pass::Step => vec![Named { name: "state", values: wide(&self.state) }],
            pass => self.op.rest(pass, &self.results),
        };
        std::iter::once(o).chain(rest).collect()
    }

    fn head(&self, len: usize) -> Vec<f64> {
        let o = C::main(&self.results);
        widen(&o[..len.min(o.len())])
    }

    fn expected(&self) -> Result<Vec<Expected>, Error> {
        let d_o: Vec<f32> = self.d_o.iter().map(|x| x.to_f32()).collect();
        Ok(with_tolerance(&self.case, self.op.expected(self.case.pass, &d_o)))
    }

    fn cost(&self) -> Cost {
        self.op.cost(self.case.pass, self.case.dtype.size())
    }

    fn tokens(&self) -> usize {
        self.op.tokens()
    }
}

pub(super) fn problem(case: &Case) -> ScanProblem {
    ScanProblem::new(case.shape[0], case.shape[1], case.shape[2])
}

pub(super) fn sizes(problem: &ScanProblem) -> Vec<usize> {
    vec![problem.batch, problem.time, problem.channels]
}

pub(super) fn shape(problem: &ScanProblem) -> Shape {
    let ScanProblem { batch, time, channels, .. } = *problem;
    Shape { batch, time, channels, cu_seqlens: None }
}

/// `h = a h + x`; for HGRN the gate is a logarithm.
pub(super) struct Scan {
    problem: ScanProblem,
    log: bool,
    a: Vec<f32>,
    x: Vec<f32>,
    state: Vec<f32>,
}

impl Scan {
    fn gate_gradient(&self) -> &'static str {
        if self.log { "dg" } else { "da" }
    }
}

impl Op for Scan {
    fn inputs(&self) -> Vec<Input> {
        let input = |gradient, values: &Vec<f32>| Input {
            gradient,
            shape: sizes(&self.problem),
            values: values.clone(),
            stored: true,
        };
        vec![input(self.gate_gradient(), &self.a), input("dx", &self.x)]
    }

    fn state(&self) -> Option<Input> {
        let shape = vec![self.problem.batch, self.problem.channels];
        Some(Input { gradient: "", shape, values: self.state.clone(), stored: false })
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let (a, x, state) = (wide(&self.a), wide(&self.x), wide(&self.state));
        let gate = if self.log { elementwise::Gate::Log(&a) } else { elementwise::Gate::Linear(&a) };
        let shape = shape(&self.problem);
        let state = (pass == Pass::Step).then_some(&state[..]);
        let out = elementwise::scan_forward(&shape, gate, &x, state);
        let mut expected = vec![("o", out.h), ("state", out.final_state)];
        if pass == Pass::Train {
            let d = elementwise::scan_backward(&shape, gate, &x, None, &wide(d_o), None);
            expected.extend([(self.gate_gradient(), d.gate), ("dx", d.b)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        sizes(&self.problem)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::scan(&self.problem, self.log, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::ScanOptions::new().with_path(path);
        let out = match self.log {
            true => scan::hgrn(x[1].r3(), x[0].r3(), options)?,
            false => scan::linear_scan(x[0].r3(), x[1].r3(), options)?,
        };
        Ok(out.o.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, _: scan::Path) -> Result<(Any, Any), scan::Error> {
        let [a, x] = [0, 1].map(|i| x[i].r3().squeeze_dim::<2>(1));
        let (o, state) = match self.log {
            true => scan::hgrn_step(x, a, state.r2())?,
            false => scan::linear_scan_step(a, x, state.r2())?,
        };
        Ok((o.into(), state.into()))
    }
}

impl Channels for Scan {
    type Results<E: Element> = (ScanOutputs<E>, ScanGradients<E>);

    fn new(case: &Case) -> Self {
        let problem = problem(case);
        let inner = [problem.batch, problem.time, problem.channels];
        let log = case.name == "hgrn";
        let gate = |u: f32| if log { (0.5 + 0.5 * u).ln() } else { 0.5 + 0.5 * u };
        Self {
            log,
            a: case.dtype.round(fill(1, inner, gate)),
            x: case.dtype.round(signed(2, inner)),
            state: signed(3, [problem.batch, 1, problem.channels]),
            problem,
        }
    }

    fn run<E: Element>(
        &self,
        pass: Pass,
        stored: &[Vec<E>],
        d_o: &[E],
        state: &mut [f32],
        (out, gradients): Self::Results<E>,
    ) -> Result<Self::Results<E>, thalweg_kernels::Error> {
        let gate = if self.log { ScanGate::Log(&stored[0][..]) } else { ScanGate::Linear(&stored[0][..]) };
        let inputs = ScanInputs { gate, x: &stored[1], initial_state: None };
        match pass {
            Pass::Forward => Ok((elementwise_scan::forward_into(&self.problem, &inputs, out)?, gradients)),
            Pass::Train => {
                let out = elementwise_scan::forward_into(&self.problem, &inputs, out)?;
                let d = elementwise_scan::backward_into(&self.problem, &inputs, &out.o, d_o, None, gradients)?;
                Ok((out, d))
            }
            Pass::Step => {
                let ScanProblem { batch, channels, .. } = self.problem;
                let o = elementwise_scan::step(batch, channels, gate, &stored[1], state)?;
                Ok((ScanOutputs { o, final_state: Vec::new() }, gradients))
            }
        }
    }

    fn main<E: Element>(results: &Self::Results<E>) -> &[E] {
        &results.0.o
    }

    fn rest<E: Element>(&self, pass: Pass, (out, d): &Self::Results<E>) -> Vec<Named> {
        let mut rest = vec![Named { name: "state", values: wide(&out.final_state) }];
        if pass == Pass::Train {
            rest.extend(
                [(self.gate_gradient(), &d.dgate), ("dx", &d.dx)].map(|(name, x)| Named { name, values: widen(x) }),
            );
        }
        rest
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for Scan {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        state: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        use gpu::elementwise_scan::{ScanGate, ScanInputs, backward, forward};
        let gate = if self.log { ScanGate::Log(&x[0]) } else { ScanGate::Linear(&x[0]) };
        let inputs = ScanInputs { gate, x: &x[1], initial_state: state };
        let out = forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.o), ("state", out.final_state)];
        if let Some(d_o) = d_o.first() {
            let d = backward(client, &self.problem, &inputs, &found[0].1, d_o, None)?;
            found.extend([(self.gate_gradient(), d.dgate), ("dx", d.dx)]);
        }
        Ok(found)
    }
}

/// The short convolution of width 4 with bias and SiLU.
pub(super) struct Conv {
    problem: ConvProblem,
    x: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    state: Vec<f32>,
}

const WIDTH: usize = 4;

impl Op for Conv {
    fn inputs(&self) -> Vec<Input> {
        let d = self.problem.shape.channels;
        let input =
            |gradient, shape, values: &Vec<f32>, stored| Input { gradient, shape, values: values.clone(), stored };
        vec![
            input("dx", sizes(&self.problem.shape), &self.x, true),
            input("dweight", vec![d, WIDTH], &self.weight, false),
            input("dbias", vec![d], &self.bias, false),
        ]
    }

    fn state(&self) -> Option<Input> {
        let shape = vec![self.problem.shape.batch, self.problem.shape.channels, WIDTH - 1];
        Some(Input { gradient: "", shape, values: self.state.clone(), stored: false })
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let [x, weight, bias, state] = [&self.x, &self.weight, &self.bias, &self.state].map(|x| wide(x));
        let state = (pass == Pass::Step).then_some(&state[..]);
        let inputs = conv_oracle::Inputs { x: &x, weight: &weight, bias: Some(&bias), silu: true, state };
        let shape = shape(&self.problem.shape);
        let (o, state) = conv_oracle::forward(&shape, &inputs);
        let mut expected = vec![("o", o), ("state", state)];
        if pass == Pass::Train {
            let d = conv_oracle::backward(&shape, &inputs, &wide(d_o), None);
            expected.extend([("dx", d.x), ("dweight", d.weight), ("dbias", d.bias)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        sizes(&self.problem.shape)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::short_conv(&self.problem, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.shape.batch * self.problem.shape.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::ShortConvOptions::new().with_activation(scan::ConvActivation::Silu).with_path(path);
        Ok(scan::short_conv(x[0].r3(), x[1].r2(), Some(x[2].r1()), options)?.o.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        let token = x[0].r3().squeeze_dim::<2>(1);
        let (bias, silu) = (Some(x[2].r1()), scan::ConvActivation::Silu);
        let (o, state) = scan::short_conv_step(token, x[1].r2(), bias, silu, state.r3(), path)?;
        Ok((o.into(), state.into()))
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for Conv {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        state: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        let inputs = gpu::short_conv::Inputs { x: &x[0], weight: &x[1], bias: Some(&x[2]), state };
        let out = gpu::short_conv::forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.y), ("state", out.state)];
        if let Some(d_o) = d_o.first() {
            let d = gpu::short_conv::backward(client, &self.problem, &inputs, d_o, None)?;
            found.extend([("dx", d.dx), ("dweight", d.dweight), ("dbias", d.dbias)]);
        }
        Ok(found)
    }
}

impl Channels for Conv {
    type Results<E: Element> = (ConvOutputs<E>, ConvGradients<E>);

    fn new(case: &Case) -> Self {
        let problem = ConvProblem { shape: problem(case), width: WIDTH, activation: Activation::Silu };
        let ScanProblem { batch, time, channels, .. } = problem.shape;
        Self {
            x: case.dtype.round(signed(1, [batch, time, channels])),
            weight: signed(2, [1, channels, WIDTH]),
            bias: signed(3, [1, 1, channels]),
            // What the convolution saw: of the element type, like its input.
            state: case.dtype.round(signed(4, [batch, channels, WIDTH - 1])),
            problem,
        }
    }

    fn run<E: Element>(
        &self,
        pass: Pass,
        stored: &[Vec<E>],
        d_o: &[E],
        state: &mut [f32],
        (out, gradients): Self::Results<E>,
    ) -> Result<Self::Results<E>, thalweg_kernels::Error> {
        let (weight, bias) = (&self.weight, Some(&self.bias[..]));
        let inputs = ConvInputs { x: &stored[0], weight, bias, state: None };
        // There is no memory to reuse in this kernel's interface.
        drop(out);
        match pass {
            Pass::Forward => Ok((short_conv::forward(&self.problem, &inputs)?, gradients)),
            Pass::Train => {
                drop(gradients);
                let out = short_conv::forward(&self.problem, &inputs)?;
                let d = short_conv::backward(&self.problem, &inputs, d_o, None)?;
                Ok((out, d))
            }
            Pass::Step => {
                let (batch, silu) = (self.problem.shape.batch, Activation::Silu);
                let y = short_conv::step(batch, &stored[0], weight, bias, silu, state)?;
                Ok((ConvOutputs { y, state: Vec::new() }, gradients))
            }
        }
    }

    fn main<E: Element>(results: &Self::Results<E>) -> &[E] {
        &results.0.y
    }

    fn rest<E: Element>(&self, pass: Pass, (out, d): &Self::Results<E>) -> Vec<Named> {
        let mut rest = vec![Named { name: "state", values: wide(&out.state) }];
        if pass == Pass::Train {
            rest.push(Named { name: "dx", values: widen(&d.dx) });
            let single = [("dweight", &d.dweight), ("dbias", &d.dbias)];
            rest.extend(single.map(|(name, x)| Named { name, values: wide(x) }));
        }
        rest
    }
}
