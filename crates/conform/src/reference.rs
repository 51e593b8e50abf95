//! The f64 oracle as a runner.

use crate::parse::{Attention, ComplexScan, Decay, Matrix, Normalised, Parsed, RgLru, Scan, ShortConv, Write};
use crate::{Case, Error, Results, Runner, Tensor};
use thalweg_reference::elementwise::{self, Lambda, Planes};
use thalweg_reference::{attention, matrix, rg_lru, short_conv, wrappers};

/// Runs cases through `thalweg-reference`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

impl Runner for Reference {
    fn run(&self, case: &Case) -> Result<Results, Error> {
        Ok(match case.parse()? {
            Parsed::Matrix(op) => op.run(case),
            Parsed::Normalised(op) => op.run(case),
            Parsed::Attention(op) => op.run(case),
            Parsed::Scan(op) => op.run(case),
            Parsed::ComplexScan(op) => op.run(case),
            Parsed::RgLru(op) => op.run(case),
            Parsed::ShortConv(op) => op.run(case),
            Parsed::Ssd(op) => op.run(case),
            Parsed::Rwkv(op) => op.run(case),
            Parsed::Selective(op) => op.run(case),
        })
    }
}

pub(crate) fn results<const N: usize>(named: [(&str, Vec<f64>); N]) -> Results {
    named.into_iter().map(|(name, values)| (name.to_string(), values)).collect()
}

pub(crate) fn values(tensor: Option<&Tensor>) -> Option<&[f64]> {
    tensor.map(|tensor| tensor.values.as_slice())
}

/// The cotangent of an output of `len` elements; an output without one does not enter the loss.
pub(crate) fn cotangent(case: &Case, name: &str, len: usize) -> Vec<f64> {
    case.cotangent(name).map_or_else(|| vec![0.0; len], |tensor| tensor.values.clone())
}

fn sum(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

impl Matrix<'_> {
    fn run(&self, case: &Case) -> Results {
        let (p, width) = (&self.problem, self.problem.key_dim);
        let of = |tensor: Option<&Tensor>| tensor.map(|t| t.values.clone()).unwrap_or_default();
        let (gate, beta, a, b) = (of(self.gate), of(self.beta), of(self.a), of(self.b));
        let h0 = values(self.h0);
        let norm = |x: &[f64]| if self.l2norm { wrappers::l2norm(x, width) } else { x.to_vec() };
        let norm_backward =
            |x: &[f64], dy: Vec<f64>| if self.l2norm { wrappers::l2norm_backward(x, width, &dy) } else { dy };
        let (q, v) = (norm(&self.q.values), &self.v.values);

        let Some(raw_k) = values(self.k) else {
            let out = wrappers::hgrn2_forward(p, &q, v, &gate, h0);
            let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
            let grad = wrappers::hgrn2_backward(p, &q, v, &gate, h0, &d_o, Some(&dht));
            return results([
                ("out.o", out.o),
                ("out.ht", out.final_state),
                ("grad.q", grad.q),
                ("grad.v", grad.v),
                ("grad.g", grad.gate),
                ("grad.h0", grad.initial_state),
            ]);
        };
        let k = norm(raw_k);
        let inputs = matrix::Inputs {
            q: &q,
            k: &k,
            v,
            gate: match self.decay {
                Decay::None => matrix::Gate::None,
                Decay::Constant => matrix::Gate::Constant(&gate),
                Decay::Head => matrix::Gate::Head(&gate),
                Decay::Key => matrix::Gate::Key(&gate),
            },
            write: match self.write {
                Write::Additive => matrix::Write::Additive,
                Write::Delta => matrix::Write::Delta { beta: &beta },
                Write::LowRank => matrix::Write::LowRank { a: &a, b: &b },
            },
            initial_state: h0,
        };
        let out = matrix::forward(p, &inputs);
        let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
        let grad = matrix::backward(p, &inputs, &d_o, Some(&dht));
        let gate_name = if self.decay == Decay::Constant { "grad.g_gamma" } else { "grad.g" };
        results([
            ("out.o", out.o),
            ("out.ht", out.final_state),
            ("grad.q", norm_backward(&self.q.values, grad.q)),
            ("grad.k", norm_backward(raw_k, grad.k)),
            ("grad.v", grad.v),
            (gate_name, grad.gate),
            ("grad.beta", grad.beta),
            ("grad.a", grad.a),
            ("grad.b", grad.b),
            ("grad.h0", grad.initial_state),
        ])
    }
}

impl Normalised<'_> {
    fn run(&self, case: &Case) -> Results {
        let inputs = wrappers::NormInputs {
            q: &self.q.values,
            k: &self.k.values,
            v: &self.v.values,
            initial_state: values(self.h0),
            initial_z: values(self.z0),
        };
        let (out, z) = wrappers::linear_attention_norm(&self.problem, &inputs);
        let (d_o, dht) = (cotangent(case, "o", out.o.len()), cotangent(case, "ht", out.final_state.len()));
        let dzt = cotangent(case, "zt", z.len());
        let (grad, dz0) =
            wrappers::linear_attention_norm_backward(&self.problem, &inputs, &d_o, Some(&dht), Some(&dzt));
        results([
            ("out.o", out.o),
            ("out.ht", out.final_state),
            ("out.zt", z),
            ("grad.q", grad.q),
            ("grad.k", grad.k),
            ("grad.v", grad.v),
            ("grad.h0", grad.initial_state),
            ("grad.z0", dz0),
        ])
    }
}

impl Attention<'_> {
    fn run(&self, case: &Case) -> Results {
        let (q, k, v) = (&self.q.values, &self.k.values, &self.v.values);
        let o = attention::forward(&self.problem, q, k, v);
        let grad = attention::backward(&self.problem, q, k, v, &cotangent(case, "o", o.len()));
        results([("out.o", o), ("grad.q", grad.q), ("grad.k", grad.k), ("grad.v", grad.v)])
    }
}

impl Scan<'_> {
    fn run(&self, case: &Case) -> Results {
        let (gate, x, h0) = (elementwise::Gate::Log(&self.g.values), &self.x.values, values(self.h0));
        let out = elementwise::scan_forward(&self.shape, gate, x, h0);
        let (d_o, dht) = (cotangent(case, "o", out.h.len()), cotangent(case, "ht", out.final_state.len()));
        let grad = elementwise::scan_backward(&self.shape, gate, x, h0, &d_o, Some(&dht));
        results([
            ("out.o", out.h),
            ("out.ht", out.final_state),
            ("grad.g", grad.gate),
            ("grad.x", grad.b),
            ("grad.h0", grad.initial_state),
        ])
    }
}

impl ComplexScan<'_> {
    fn run(&self, case: &Case) -> Results {
        let states = self.shape.sequences().len() * self.shape.channels;
        let state = |part: Option<&Tensor>| part.map_or_else(|| vec![0.0; states], |t| t.values.clone());
        let lambda = Lambda { log_a: &self.log_a.values, theta: &self.theta.values };
        let b = Planes { re: self.b_re.values.clone(), im: self.b_im.values.clone() };
        let h0 = Planes { re: state(self.h0_re), im: state(self.h0_im) };
        let (o, last) = elementwise::complex_forward(&self.shape, lambda, &b, Some(&h0));
        let planes = |name: &str, len: usize| Planes {
            re: cotangent(case, &format!("{name}_re"), len),
            im: cotangent(case, &format!("{name}_im"), len),
        };
        let (d_o, dht) = (planes("o", b.re.len()), planes("ht", states));
        let grad = elementwise::complex_backward(&self.shape, lambda, &b, Some(&h0), &d_o, Some(&dht));
        results([
            ("out.o_re", o.re),
            ("out.o_im", o.im),
            ("out.ht_re", last.re),
            ("out.ht_im", last.im),
            ("grad.log_a", grad.log_a),
            ("grad.theta", grad.theta),
            ("grad.b_re", grad.b.re),
            ("grad.b_im", grad.b.im),
            ("grad.h0_re", grad.initial_state.re),
            ("grad.h0_im", grad.initial_state.im),
        ])
    }
}

impl RgLru<'_> {
    fn run(&self, case: &Case) -> Results {
        let gate = |weight: &'_ Tensor, bias: &'_ Tensor| (weight.values.clone(), bias.values.clone());
        let (rw, rb) = gate(self.recurrent_weight, self.recurrent_bias);
        let (iw, ib) = gate(self.input_weight, self.input_bias);
        let recurrent = rg_lru::BlockDiagonal { weight: &rw, bias: &rb, blocks: self.blocks };
        let input = rg_lru::BlockDiagonal { weight: &iw, bias: &ib, blocks: self.blocks };
        let x = &self.x.values;
        let (recurrent_logits, input_logits) = (recurrent.forward(x), input.forward(x));
        let inputs = rg_lru::Inputs {
            x,
            recurrent_logits: &recurrent_logits,
            input_logits: &input_logits,
            param: &self.param.values,
            reset: self.reset.as_deref(),
            initial_state: values(self.h0),
        };
        let (h, last) = rg_lru::forward(&self.shape, &inputs);
        let (dh, dht) = (cotangent(case, "o", h.len()), cotangent(case, "ht", last.len()));
        let grad = rg_lru::backward(&self.shape, &inputs, &dh, Some(&dht));
        let (dx_r, d_rw, d_rb) = recurrent.backward(x, &grad.recurrent_logits);
        let (dx_i, d_iw, d_ib) = input.backward(x, &grad.input_logits);
        results([
            ("out.o", h),
            ("out.ht", last),
            ("grad.x", sum(&grad.x, &sum(&dx_r, &dx_i))),
            ("grad.recurrent_gate_weight", d_rw),
            ("grad.recurrent_gate_bias", d_rb),
            ("grad.input_gate_weight", d_iw),
            ("grad.input_gate_bias", d_ib),
            ("grad.recurrent_param", grad.param),
            ("grad.h0", grad.initial_state),
        ])
    }
}

impl ShortConv<'_> {
    fn run(&self, case: &Case) -> Results {
        let inputs = short_conv::Inputs {
            x: &self.x.values,
            weight: &self.weight.values,
            bias: values(self.bias),
            silu: self.silu,
            state: values(self.state),
        };
        let (y, state) = short_conv::forward(&self.shape, &inputs);
        let (dy, d_state) = (cotangent(case, "o", y.len()), cotangent(case, "state", state.len()));
        let grad = short_conv::backward(&self.shape, &inputs, &dy, Some(&d_state));
        results([
            ("out.o", y),
            ("out.state", state),
            ("grad.x", grad.x),
            ("grad.weight", grad.weight),
            ("grad.bias", grad.bias),
            ("grad.state", grad.state),
        ])
    }
}
