//! The Burn operations as a runner: native kernels or the portable body, gradients by Burn's autodiff.

use crate::parse::{Attention, ComplexScan, Decay, Matrix, Normalised, Parsed, RgLru, Scan, ShortConv, Write};
use crate::{Case, Error, Results, Runner, Tensor};
use burn::Tensor as Burn;
use burn::tensor::{Bool, Device, Gradients, TensorData};
use thalweg_scan as scan;

/// Runs cases through `thalweg-scan` in f32.
#[derive(Debug, Clone)]
pub struct Engine {
    path: scan::Path,
    device: Device,
}

impl Engine {
    /// The native kernels, of the CPU until [`Engine::on`] says otherwise.
    pub fn native() -> Self {
        Self { path: scan::Path::Auto, device: Device::flex().autodiff() }
    }

    /// The portable body in Burn tensor operations.
    pub fn portable() -> Self {
        Self { path: scan::Path::Portable, device: Device::flex().autodiff() }
    }

    /// The same on another device.
    pub fn on(self, device: Device) -> Self {
        Self { device: device.autodiff(), ..self }
    }
}

impl Runner for Engine {
    fn run(&self, case: &Case) -> Result<Results, Error> {
        let mut graph = Graph {
            case,
            device: &self.device,
            path: self.path,
            leaves: Vec::new(),
            results: Results::new(),
            loss: None,
        };
        match case.parse()? {
            Parsed::Matrix(op) => graph.matrix(&op),
            Parsed::Normalised(op) => graph.normalised(&op),
            Parsed::Attention(op) => graph.attention(&op),
            Parsed::Scan(op) => graph.scan(&op),
            Parsed::ComplexScan(op) => graph.complex_scan(&op),
            Parsed::RgLru(op) => graph.rg_lru(&op),
            Parsed::ShortConv(op) => graph.short_conv(&op),
            Parsed::Ssd(_) | Parsed::Rwkv(_) | Parsed::Selective(_) => {
                return Err(Error::UnsupportedOp { op: case.op.clone() });
            }
        }
        .map_err(|error| Error::Engine(error.to_string()))?;
        graph.finish()
    }
}

/// An input: its name, number of elements and, after the backward pass, its gradient.
type Leaf = (String, usize, Box<dyn Fn(&Gradients) -> Option<TensorData>>);

/// A case on its way through the engine: the leaves to differentiate, the outputs, and the loss over them.
struct Graph<'a> {
    case: &'a Case,
    device: &'a Device,
    path: scan::Path,
    leaves: Vec<Leaf>,
    results: Results,
    loss: Option<Burn<1>>,
}

impl Graph<'_> {
    /// A tensor of the case on the device; its rank was checked when the case was parsed.
    fn constant<const D: usize>(&self, tensor: &Tensor) -> Burn<D> {
        let values: Vec<_> = tensor.values.iter().map(|&x| x as f32).collect();
        Burn::from_data(TensorData::new(values, tensor.shape.clone()), self.device)
    }

    /// An input whose gradient is wanted.
    fn input<const D: usize>(&mut self, name: &str, tensor: &Tensor) -> Burn<D> {
        let leaf = self.constant::<D>(tensor).require_grad();
        let handle = leaf.clone();
        let gradient = move |gradients: &Gradients| handle.grad(gradients).map(|grad| grad.into_data());
        self.leaves.push((format!("grad.{name}"), tensor.values.len(), Box::new(gradient)));
        leaf
    }

    /// An input that may be absent.
    fn optional<const D: usize>(&mut self, name: &str, tensor: Option<&Tensor>) -> Option<Burn<D>> {
        tensor.map(|tensor| self.input(name, tensor))
    }

    /// An initial state that may be absent; zeros if the file has none but wants its gradient.
    fn state<const D: usize>(&mut self, name: &str, tensor: Option<&Tensor>, shape: [usize; D]) -> Option<Burn<D>> {
        if tensor.is_none() && self.case.wants_gradient(name) {
            let zeros = Tensor { shape: shape.to_vec(), values: vec![0.0; shape.iter().product()] };
            return Some(self.input(name, &zeros));
        }
        self.optional(name, tensor)
    }

    /// Records an output and adds its part of the loss.
    fn output<const D: usize>(&mut self, name: &str, output: Burn<D>) {
        self.results.insert(format!("out.{name}"), values(output.clone().into_data()));
        if let Some(cotangent) = self.case.cotangent(name) {
            let part = (self.constant::<D>(cotangent) * output).sum();
            self.loss = Some(match self.loss.take() {
                Some(loss) => loss + part,
                None => part,
            });
        }
    }

    /// Differentiates the loss in every leaf; one that the loss does not depend on has gradient zero.
    fn finish(mut self) -> Result<Results, Error> {
        let gradients = self.loss.map(|loss| loss.backward());
        for (name, len, gradient) in self.leaves {
            let found = gradients.as_ref().and_then(&gradient).map_or_else(|| vec![0.0; len], values);
            self.results.insert(name, found);
        }
        Ok(self.results)
    }

    fn matrix(&mut self, op: &Matrix<'_>) -> Result<(), scan::Error> {
        let p = &op.problem;
        let q = self.input::<4>("q", op.q);
        let k = self.optional::<4>("k", op.k);
        let v = self.input::<4>("v", op.v);
        let beta = self.optional::<3>("beta", op.beta);
        let (a, b) = (self.optional::<4>("a", op.a), self.optional::<4>("b", op.b));
        let initial_state = self.state("h0", op.h0, [p.sequences(), p.value_heads, p.key_dim, p.value_dim]);
        let options = scan::MatrixOptions {
            scale: Some(p.scale),
            initial_state,
            cu_seqlens: p.cu_seqlens.clone(),
            chunk: None,
            qk_l2norm: op.l2norm,
            path: self.path,
        };
        let out = match (op.decay, op.write, op.gate, k, beta, a.zip(b)) {
            (Decay::None, Write::Additive, _, Some(k), ..) => scan::linear_attention(q, k, v, options),
            (Decay::Constant, Write::Additive, Some(g), Some(k), ..) => {
                scan::retention(q, k, v, self.input("g_gamma", g), options)
            }
            (Decay::Head, Write::Additive, Some(g), Some(k), ..) => {
                scan::simple_gla(q, k, v, self.input("g", g), options)
            }
            (Decay::Key, Write::Additive, Some(g), Some(k), ..) => scan::gla(q, k, v, self.input("g", g), options),
            (Decay::Key, Write::Additive, Some(g), None, ..) => scan::hgrn2(q, v, self.input("g", g), options),
            (Decay::None, Write::Delta, _, Some(k), Some(beta), _) => scan::delta_rule(q, k, v, beta, options),
            (Decay::Head, Write::Delta, Some(g), Some(k), Some(beta), _) => {
                scan::gated_delta_rule(q, k, v, self.input("g", g), beta, options)
            }
            (Decay::Key, Write::Delta, Some(g), Some(k), Some(beta), _) => {
                scan::kda(q, k, v, self.input("g", g), beta, options)
            }
            (Decay::Key, Write::LowRank, Some(g), Some(k), _, Some((a, b))) => {
                scan::dplr(q, k, v, a, b, self.input("g", g), options)
            }
            (decay, write, ..) => unreachable!("no operation parses to {decay:?} with {write:?}"),
        }?;
        self.output("o", out.o);
        self.output("ht", out.final_state);
        Ok(())
    }

    fn normalised(&mut self, op: &Normalised<'_>) -> Result<(), scan::Error> {
        let p = &op.problem;
        let (q, k, v) = (self.input("q", op.q), self.input("k", op.k), self.input("v", op.v));
        let initial_state = self.state("h0", op.h0, [p.sequences(), p.value_heads, p.key_dim, p.value_dim]);
        let z0 = self.state("z0", op.z0, [p.sequences(), 1, p.heads, p.key_dim]);
        let options = scan::MatrixOptions {
            scale: Some(p.scale),
            initial_state,
            cu_seqlens: p.cu_seqlens.clone(),
            path: self.path,
            ..Default::default()
        };
        let out = scan::normalized_linear_attention(q, k, v, z0, options)?;
        self.output("o", out.o);
        self.output("ht", out.final_state);
        self.output("zt", out.final_normalizer);
        Ok(())
    }

    fn attention(&mut self, op: &Attention<'_>) -> Result<(), scan::Error> {
        let p = &op.problem;
        let (q, k, v) = (self.input("q", op.q), self.input("k", op.k), self.input("v", op.v));
        let options = scan::AttentionOptions {
            window: p.window,
            scale: Some(p.scale),
            cu_seqlens: p.cu_seqlens.clone(),
            path: self.path,
        };
        let o = scan::attention(q, k, v, options)?;
        self.output("o", o);
        Ok(())
    }

    fn scan_options(&mut self, shape: &thalweg_reference::Shape, h0: Option<&Tensor>) -> scan::ScanOptions {
        scan::ScanOptions {
            initial_state: self.state("h0", h0, [shape.sequences().len(), shape.channels]),
            cu_seqlens: shape.cu_seqlens.clone(),
            path: self.path,
        }
    }

    fn scan(&mut self, op: &Scan<'_>) -> Result<(), scan::Error> {
        let (x, g) = (self.input("x", op.x), self.input("g", op.g));
        let options = self.scan_options(&op.shape, op.h0);
        let out = scan::hgrn(x, g, options)?;
        self.output("o", out.o);
        self.output("ht", out.final_state);
        Ok(())
    }

    fn complex_scan(&mut self, op: &ComplexScan<'_>) -> Result<(), scan::Error> {
        let channels = op.shape.channels;
        let mut lambda = |name: &str, tensor: &Tensor| match tensor.shape.len() {
            1 => self.input::<1>(name, tensor).reshape([1, 1, channels]),
            _ => self.input::<3>(name, tensor),
        };
        let (log_a, theta) = (lambda("log_a", op.log_a), lambda("theta", op.theta));
        let (b_re, b_im) = (self.input("b_re", op.b_re), self.input("b_im", op.b_im));
        let shape = [op.shape.sequences().len(), channels];
        let h0 = (self.state("h0_re", op.h0_re, shape), self.state("h0_im", op.h0_im, shape));
        let initial_state = match h0 {
            (None, None) => None,
            (re, im) => {
                let zeros = || Burn::zeros(shape, self.device);
                Some((re.unwrap_or_else(zeros), im.unwrap_or_else(zeros)))
            }
        };
        let cu_seqlens = op.shape.cu_seqlens.clone();
        let options = scan::ComplexScanOptions { initial_state, cu_seqlens, path: self.path };
        let out = scan::complex_scan(log_a, theta, b_re, b_im, options)?;
        self.output("o_re", out.re);
        self.output("o_im", out.im);
        self.output("ht_re", out.final_re);
        self.output("ht_im", out.final_im);
        Ok(())
    }

    fn rg_lru(&mut self, op: &RgLru<'_>) -> Result<(), scan::Error> {
        let thalweg_reference::Shape { batch, time, channels, .. } = op.shape;
        let (blocks, width) = (op.blocks, channels / op.blocks);
        let x = self.input::<3>("x", op.x);
        let by_block = x.clone().reshape([batch * time, blocks, width]).swap_dims(0, 1);
        let mut gate = |name: &str, weight: &Tensor, bias: &Tensor| {
            let weight = self.input::<3>(&format!("{name}_weight"), weight);
            let bias = self.input::<2>(&format!("{name}_bias"), bias).unsqueeze_dim::<3>(1);
            let logits = by_block.clone().matmul(weight) + bias;
            logits.swap_dims(0, 1).reshape([batch, time, channels])
        };
        let recurrent = gate("recurrent_gate", op.recurrent_weight, op.recurrent_bias);
        let input = gate("input_gate", op.input_weight, op.input_bias);
        let param = self.input("recurrent_param", op.param);
        let reset = op
            .reset
            .as_ref()
            .map(|reset| Burn::<2, Bool>::from_data(TensorData::new(reset.clone(), [batch, time]), self.device));
        let options = self.scan_options(&op.shape, op.h0);
        let out = scan::rg_lru(x, recurrent, input, param, reset, options)?;
        self.output("o", out.o);
        self.output("ht", out.final_state);
        Ok(())
    }

    fn short_conv(&mut self, op: &ShortConv<'_>) -> Result<(), scan::Error> {
        let (x, weight) = (self.input("x", op.x), self.input("weight", op.weight));
        let bias = self.optional("bias", op.bias);
        let shape = [op.shape.sequences().len(), op.shape.channels, op.width - 1];
        let options = scan::ShortConvOptions {
            activation: if op.silu { scan::ConvActivation::Silu } else { scan::ConvActivation::None },
            initial_state: self.state("state", op.state, shape),
            cu_seqlens: op.shape.cu_seqlens.clone(),
            path: self.path,
        };
        let out = scan::short_conv(x, weight, bias, options)?;
        self.output("o", out.o);
        self.output("state", out.final_state);
        Ok(())
    }
}

fn values(data: TensorData) -> Vec<f64> {
    data.iter::<f64>().collect()
}
