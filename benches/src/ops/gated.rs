//! The complex scan, and RG-LRU with and without the products that make its gates.

use super::channels::{Channels, on_path, problem, shape, sizes};
use super::{Any, Input, Op, total, widen};
use crate::noise::{fill, signed, wide};
use crate::workload::{Named, Workload};
use crate::{Case, Error, Pass};
use burn::tensor::Device;
#[cfg(feature = "gpu")]
use thalweg_gpu as gpu;
use thalweg_kernels::complex_scan::{self, Complex, ComplexGradients, ComplexInputs, ComplexOutputs};
use thalweg_kernels::cost::{self, Cost};
use thalweg_kernels::rg_lru::{self, RgLruGradients, RgLruInputs, RgLruOutputs};
use thalweg_kernels::{Element, ScanProblem};
use thalweg_reference::elementwise::{self, Lambda, Planes};
use thalweg_reference::rg_lru as oracle;
use thalweg_scan as scan;

pub(super) fn build(case: &Case, device: &Device) -> Result<Box<dyn Workload>, Error> {
    match case.name.as_str() {
        "complex_scan" => on_path::<ComplexScan>(case, device),
        "rg_lru" => on_path::<RgLru>(case, device),
        _ => super::on_burn(Block::new(case)?, case, device),
    }
}

fn stored(gradient: &'static str, shape: Vec<usize>, values: &[f32]) -> Input {
    Input { gradient, shape, values: values.to_vec(), stored: true }
}

/// `h = exp(log_a + i theta) h + b` with one lambda per token. The main output is the real plane, and only it has a
/// cotangent.
pub(super) struct ComplexScan {
    problem: ScanProblem,
    log_a: Vec<f32>,
    theta: Vec<f32>,
    re: Vec<f32>,
    im: Vec<f32>,
}

impl Op for ComplexScan {
    fn inputs(&self) -> Vec<Input> {
        let tensors = [("dlog_a", &self.log_a), ("dtheta", &self.theta), ("db_re", &self.re), ("db_im", &self.im)];
        tensors.map(|(name, x)| stored(name, sizes(&self.problem), x)).into()
    }

    fn state(&self) -> Option<Input> {
        None
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let (shape, log_a, theta) = (shape(&self.problem), wide(&self.log_a), wide(&self.theta));
        let lambda = Lambda { log_a: &log_a, theta: &theta };
        let b = Planes { re: wide(&self.re), im: wide(&self.im) };
        let (o, _) = elementwise::complex_forward(&shape, lambda, &b, None);
        let mut expected = vec![("o", o.re), ("o_im", o.im)];
        if pass == Pass::Train {
            let d_o = Planes { re: wide(d_o), im: vec![0.0; d_o.len()] };
            let d = elementwise::complex_backward(&shape, lambda, &b, None, &d_o, None);
            expected.extend([("dlog_a", d.log_a), ("dtheta", d.theta), ("db_re", d.b.re), ("db_im", d.b.im)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        sizes(&self.problem)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::complex_scan(&self.problem, false, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::ComplexScanOptions::new().with_path(path);
        Ok(scan::complex_scan(x[0].r3(), x[1].r3(), x[2].r3(), x[3].r3(), options)?.re.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        Ok((self.apply(x, path)?, state))
    }
}

/// Outputs, gradients, and the zeros that are the imaginary plane's cotangent.
type ComplexResults<E> = (ComplexOutputs<E>, ComplexGradients<E>, Vec<E>);

impl Channels for ComplexScan {
    type Results<E: Element> = ComplexResults<E>;

    fn new(case: &Case) -> Self {
        let problem = problem(case);
        let inner = [problem.batch, problem.time, problem.channels];
        let round = |values| case.dtype.round(values);
        Self {
            log_a: round(fill(1, inner, |u| -0.3 * u)),
            theta: round(fill(2, inner, |u| 3.0 * (2.0 * u - 1.0))),
            re: round(signed(3, inner)),
            im: round(signed(4, inner)),
            problem,
        }
    }

    fn run<E: Element>(
        &self,
        pass: Pass,
        stored: &[Vec<E>],
        d_o: &[E],
        _: &mut [f32],
        (.., mut zeros): ComplexResults<E>,
    ) -> Result<ComplexResults<E>, thalweg_kernels::Error> {
        let b = Complex { re: &stored[2][..], im: &stored[3][..] };
        let inputs = ComplexInputs { log_a: &stored[0], theta: &stored[1], b, initial_state: None };
        let out = complex_scan::forward(&self.problem, &inputs)?;
        let mut gradients = ComplexGradients::default();
        if pass == Pass::Train {
            zeros.resize(d_o.len(), E::default());
            let d_o = Complex { re: d_o, im: &zeros[..] };
            gradients = complex_scan::backward(&self.problem, &inputs, out.o.as_slices(), d_o, None)?;
        }
        Ok((out, gradients, zeros))
    }

    fn main<E: Element>(results: &ComplexResults<E>) -> &[E] {
        &results.0.o.re
    }

    fn rest<E: Element>(&self, pass: Pass, (out, d, _): &ComplexResults<E>) -> Vec<Named> {
        let mut rest = vec![("o_im", &out.o.im)];
        if pass == Pass::Train {
            rest.extend([("dlog_a", &d.dlog_a), ("dtheta", &d.dtheta), ("db_re", &d.db.re), ("db_im", &d.db.im)]);
        }
        rest.into_iter().map(|(name, x)| Named { name, values: widen(x) }).collect()
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for ComplexScan {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        _: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        use gpu::complex_scan::{ComplexInputs, backward, forward};
        let b = Complex { re: &x[2], im: &x[3] };
        let inputs = ComplexInputs { log_a: &x[0], theta: &x[1], b, initial_state: None };
        let out = forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.o.re), ("o_im", out.o.im)];
        if let [re, im] = d_o {
            let o = Complex { re: &found[0].1, im: &found[1].1 };
            let d = backward(client, &self.problem, &inputs, o, Complex { re, im }, None)?;
            found.extend([("dlog_a", d.dlog_a), ("dtheta", d.dtheta), ("db_re", d.db.re), ("db_im", d.db.im)]);
        }
        Ok(found)
    }

    fn cotangents(&self, d_o: &[f32]) -> Vec<Vec<f32>> {
        vec![d_o.to_vec(), vec![0.0; d_o.len()]]
    }
}

/// RG-LRU from the logits of its gates.
pub(super) struct RgLru {
    problem: ScanProblem,
    x: Vec<f32>,
    recurrent: Vec<f32>,
    input: Vec<f32>,
    param: Vec<f32>,
    state: Vec<f32>,
}

/// The decay's parameter: with open gates decays between 0.05 and 0.9.
fn decay_parameter(channels: usize) -> Vec<f32> {
    fill(5, [1, 1, channels], |u| -4.3 + 3.5 * u)
}

impl Op for RgLru {
    fn inputs(&self) -> Vec<Input> {
        let tensors = [("dx", &self.x), ("drecurrent", &self.recurrent), ("dinput", &self.input)];
        let mut inputs: Vec<_> = tensors.map(|(name, x)| stored(name, sizes(&self.problem), x)).into();
        let (shape, values) = (vec![self.problem.channels], self.param.clone());
        inputs.push(Input { gradient: "dparam", shape, values, stored: false });
        inputs
    }

    fn state(&self) -> Option<Input> {
        let shape = vec![self.problem.batch, self.problem.channels];
        Some(Input { gradient: "", shape, values: self.state.clone(), stored: false })
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let [x, recurrent_logits, input_logits] = [&self.x, &self.recurrent, &self.input].map(|x| wide(x));
        let (param, state) = (wide(&self.param), wide(&self.state));
        let inputs = oracle::Inputs {
            x: &x,
            recurrent_logits: &recurrent_logits,
            input_logits: &input_logits,
            param: &param,
            reset: None,
            initial_state: (pass == Pass::Step).then_some(&state[..]),
        };
        let shape = shape(&self.problem);
        let (o, state) = oracle::forward(&shape, &inputs);
        let mut expected = vec![("o", o), ("state", state)];
        if pass == Pass::Train {
            let d = oracle::backward(&shape, &inputs, &wide(d_o), None);
            expected.extend([("dx", d.x), ("drecurrent", d.recurrent_logits), ("dinput", d.input_logits)]);
            expected.push(("dparam", d.param));
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        sizes(&self.problem)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        total(pass, |pass| cost::rg_lru(&self.problem, element, pass))
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let options = scan::ScanOptions::new().with_path(path);
        Ok(scan::rg_lru(x[0].r3(), x[1].r3(), x[2].r3(), x[3].r1(), None, options)?.o.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        let [token, recurrent, input] = [0, 1, 2].map(|i| x[i].r3().squeeze_dim::<2>(1));
        let (o, state) = scan::rg_lru_step(token, recurrent, input, x[3].r1(), None, state.r2(), path)?;
        Ok((o.into(), state.into()))
    }
}

impl Channels for RgLru {
    type Results<E: Element> = (RgLruOutputs<E>, RgLruGradients<E>);

    fn new(case: &Case) -> Self {
        let problem = problem(case);
        let inner = [problem.batch, problem.time, problem.channels];
        let round = |values| case.dtype.round(values);
        Self {
            x: round(signed(1, inner)),
            recurrent: round(signed(2, inner)),
            input: round(signed(3, inner)),
            param: decay_parameter(problem.channels),
            state: signed(4, [problem.batch, 1, problem.channels]),
            problem,
        }
    }

    fn run<E: Element>(
        &self,
        pass: Pass,
        stored: &[Vec<E>],
        d_o: &[E],
        state: &mut [f32],
        _: Self::Results<E>,
    ) -> Result<Self::Results<E>, thalweg_kernels::Error> {
        let [x, recurrent_gate, input_gate] = [0, 1, 2].map(|i| &stored[i][..]);
        let a_param = &self.param;
        let mut gradients = RgLruGradients::default();
        if pass == Pass::Step {
            let o = rg_lru::step(self.problem.batch, x, recurrent_gate, input_gate, a_param, None, state)?;
            return Ok((RgLruOutputs { o, final_state: Vec::new() }, gradients));
        }
        let inputs = RgLruInputs { x, recurrent_gate, input_gate, a_param, reset: None, initial_state: None };
        let out = rg_lru::forward(&self.problem, &inputs)?;
        if pass == Pass::Train {
            gradients = rg_lru::backward(&self.problem, &inputs, &out.o, d_o, None)?;
        }
        Ok((out, gradients))
    }

    fn main<E: Element>(results: &Self::Results<E>) -> &[E] {
        &results.0.o
    }

    fn rest<E: Element>(&self, pass: Pass, (out, d): &Self::Results<E>) -> Vec<Named> {
        let mut rest = vec![Named { name: "state", values: wide(&out.final_state) }];
        if pass == Pass::Train {
            let wide_of = [("dx", &d.dx), ("drecurrent", &d.d_recurrent_gate), ("dinput", &d.d_input_gate)];
            rest.extend(wide_of.map(|(name, x)| Named { name, values: widen(x) }));
            rest.push(Named { name: "dparam", values: wide(&d.d_a_param) });
        }
        rest
    }
}

#[cfg(feature = "gpu")]
impl super::gpu::GpuOp for RgLru {
    fn launch(
        &self,
        client: &gpu::Client,
        x: &[gpu::Buffer],
        d_o: &[gpu::Buffer],
        initial_state: Option<&gpu::Buffer>,
    ) -> Result<super::gpu::Found, thalweg_kernels::Error> {
        use gpu::rg_lru::{RgLruInputs, backward, forward};
        let [x, recurrent_gate, input_gate, a_param] = x else { unreachable!("four tensors go in") };
        let inputs = RgLruInputs { x, recurrent_gate, input_gate, a_param, reset: None, initial_state };
        let out = forward(client, &self.problem, &inputs)?;
        let mut found = vec![("o", out.o), ("state", out.final_state)];
        if let Some(d_o) = d_o.first() {
            let d = backward(client, &self.problem, &inputs, &found[0].1, d_o, None)?;
            found.extend([("dx", d.dx), ("drecurrent", d.d_recurrent_gate), ("dinput", d.d_input_gate)]);
            found.push(("dparam", d.d_a_param));
        }
        Ok(found)
    }
}

/// RG-LRU with the block-diagonal products that make its gates, as Griffin has it.
struct Block {
    problem: ScanProblem,
    blocks: usize,
    x: Vec<f32>,
    /// Weight and bias of the recurrence gate, then of the input gate.
    gates: [(Vec<f32>, Vec<f32>); 2],
    param: Vec<f32>,
}

impl Block {
    fn new(case: &Case) -> Result<Self, Error> {
        let (problem, blocks) = (problem(case), case.shape[3]);
        let channels = problem.channels;
        if !channels.is_multiple_of(blocks) {
            return Err(Error::argument("shape", format!("has {channels} channels, no multiple of {blocks} blocks")));
        }
        let width = channels / blocks;
        let size = (3.0 / width as f32).sqrt();
        let gate =
            |id| (fill(id, [blocks, width, width], |u| size * (2.0 * u - 1.0)), signed(id + 1, [1, 1, channels]));
        let x = signed(1, [problem.batch, problem.time, channels]);
        Ok(Self { x, gates: [gate(10), gate(20)], param: decay_parameter(channels), problem, blocks })
    }

    fn width(&self) -> usize {
        self.problem.channels / self.blocks
    }
}

impl Op for Block {
    fn inputs(&self) -> Vec<Input> {
        let (n, width) = (self.blocks, self.width());
        let [(wr, br), (wi, bi)] = &self.gates;
        vec![
            stored("dx", sizes(&self.problem), &self.x),
            stored("drecurrent_weight", vec![n, width, width], wr),
            stored("drecurrent_bias", vec![n, width], br),
            stored("dinput_weight", vec![n, width, width], wi),
            stored("dinput_bias", vec![n, width], bi),
            stored("dparam", vec![self.problem.channels], &self.param),
        ]
    }

    fn state(&self) -> Option<Input> {
        None
    }

    fn expected(&self, pass: Pass, d_o: &[f32]) -> Vec<(&'static str, Vec<f64>)> {
        let (x, param) = (wide(&self.x), wide(&self.param));
        let gates = self.gates.each_ref().map(|(weight, bias)| (wide(weight), wide(bias)));
        let [recurrent, input] =
            gates.each_ref().map(|(weight, bias)| oracle::BlockDiagonal { weight, bias, blocks: self.blocks });
        let (recurrent_logits, input_logits) = (recurrent.forward(&x), input.forward(&x));
        let inputs = oracle::Inputs {
            x: &x,
            recurrent_logits: &recurrent_logits,
            input_logits: &input_logits,
            param: &param,
            reset: None,
            initial_state: None,
        };
        let shape = shape(&self.problem);
        let mut expected = vec![("o", oracle::forward(&shape, &inputs).0)];
        if pass == Pass::Train {
            let d = oracle::backward(&shape, &inputs, &wide(d_o), None);
            let (dx_r, dw_r, db_r) = recurrent.backward(&x, &d.recurrent_logits);
            let (dx_i, dw_i, db_i) = input.backward(&x, &d.input_logits);
            let dx = d.x.iter().zip(dx_r).zip(dx_i).map(|((a, b), c)| a + b + c).collect();
            expected.extend([("dx", dx), ("drecurrent_weight", dw_r), ("drecurrent_bias", db_r)]);
            expected.extend([("dinput_weight", dw_i), ("dinput_bias", db_i), ("dparam", d.param)]);
        }
        expected
    }

    fn output(&self) -> Vec<usize> {
        sizes(&self.problem)
    }

    fn cost(&self, pass: Pass, element: usize) -> Cost {
        // The gates stay in cache at best: their logits are not counted as bytes, the weights are.
        let (tokens, channels, width) = (self.tokens() as u64, self.problem.channels as u64, self.width() as u64);
        let products = Cost { flops: 2 * 2 * tokens * channels * width, bytes: 4 * 2 * channels * width };
        let times = |n: u64| Cost { flops: n * products.flops, bytes: n * products.bytes };
        let logits = 2 * tokens * channels * element as u64;
        total(pass, |pass| {
            let unit = cost::rg_lru(&self.problem, element, pass);
            match pass {
                cost::Pass::Backward => Cost { bytes: unit.bytes - 2 * logits, ..unit } + times(2),
                _ => Cost { bytes: unit.bytes - logits, ..unit } + times(1),
            }
        })
    }

    fn tokens(&self) -> usize {
        self.problem.batch * self.problem.time
    }

    fn apply(&self, x: &[Any], path: scan::Path) -> Result<Any, scan::Error> {
        let gate = |weight, bias| scan::block_linear(x[0].r3(), weight, Some(bias), path);
        let (recurrent, input) = (gate(x[1].r3(), x[2].r2())?, gate(x[3].r3(), x[4].r2())?);
        let options = scan::ScanOptions::new().with_path(path);
        Ok(scan::rg_lru(x[0].r3(), recurrent, input, x[5].r1(), None, options)?.o.into())
    }

    fn apply_step(&self, x: &[Any], state: Any, path: scan::Path) -> Result<(Any, Any), scan::Error> {
        Ok((self.apply(x, path)?, state))
    }
}
