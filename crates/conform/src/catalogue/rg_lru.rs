//! Griffin's RG-LRU with its block-diagonal gates.

use super::sample::Build;
use super::{Draw, Graph, Problem, cotangent, results, sum, values};
use crate::{Case, Error, Results, Tensor};
use burn::Tensor as Burn;
use burn::tensor::{Bool, TensorData};
use thalweg_reference::{Shape, rg_lru};
use thalweg_scan as scan;

/// RG-LRU with its block-diagonal gates.
pub(super) struct RgLru<'a> {
    shape: Shape,
    blocks: usize,
    x: &'a Tensor,
    recurrent_weight: &'a Tensor,
    recurrent_bias: &'a Tensor,
    input_weight: &'a Tensor,
    input_bias: &'a Tensor,
    param: &'a Tensor,
    reset: Option<Vec<bool>>,
    h0: Option<&'a Tensor>,
}

impl<'a> RgLru<'a> {
    pub(super) fn parse(case: &'a Case) -> Result<Self, Error> {
        let shape = case.channels("in.x")?;
        let [blocks, width] = case.sizes("in.recurrent_gate_bias")?;
        let Shape { batch, time, channels, .. } = shape;
        if blocks * width != channels {
            return Err(case.misfit("in.recurrent_gate_bias", format!("[blocks, width] with product {channels}")));
        }
        case.output("o", &[batch, time, channels])?;
        let reset = match case.tensors.get("int.position_ids") {
            None => None,
            Some(_) => {
                let positions = case.expect("int.position_ids", &[batch, time])?;
                Some(positions.values.iter().map(|&position| position == 0.0).collect())
            }
        };
        Ok(Self {
            blocks,
            x: case.any("in.x")?,
            recurrent_weight: case.input("recurrent_gate_weight", &[blocks, width, width])?,
            recurrent_bias: case.any("in.recurrent_gate_bias")?,
            input_weight: case.input("input_gate_weight", &[blocks, width, width])?,
            input_bias: case.input("input_gate_bias", &[blocks, width])?,
            param: case.input("recurrent_param", &[channels])?,
            reset,
            h0: case.state("h0", "ht", &[shape.sequences().len(), channels])?,
            shape,
        })
    }
}

impl Problem for RgLru<'_> {
    fn reference(&self, case: &Case) -> Results {
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

    fn run(&self, graph: &mut Graph<'_>) -> Result<(), scan::Error> {
        let thalweg_reference::Shape { batch, time, channels, .. } = self.shape;
        let (blocks, width) = (self.blocks, channels / self.blocks);
        let x = graph.input::<3>("x", self.x);
        let by_block = x.clone().reshape([batch * time, blocks, width]).swap_dims(0, 1);
        let mut gate = |name: &str, weight: &Tensor, bias: &Tensor| {
            let weight = graph.input::<3>(&format!("{name}_weight"), weight);
            let bias = graph.input::<2>(&format!("{name}_bias"), bias).unsqueeze_dim::<3>(1);
            let logits = by_block.clone().matmul(weight) + bias;
            logits.swap_dims(0, 1).reshape([batch, time, channels])
        };
        let recurrent = gate("recurrent_gate", self.recurrent_weight, self.recurrent_bias);
        let input = gate("input_gate", self.input_weight, self.input_bias);
        let param = graph.input("recurrent_param", self.param);
        let reset = self
            .reset
            .as_ref()
            .map(|reset| Burn::<2, Bool>::from_data(TensorData::new(reset.clone(), [batch, time]), graph.device));
        let options = graph.scan_options(&self.shape, self.h0);
        let out = scan::rg_lru(x, recurrent, input, param, reset, options)?;
        graph.output("o", out.o);
        graph.output("ht", out.final_state);
        Ok(())
    }
}

/// A case of the drawn sizes.
pub(super) fn sample(op: &str, draw: &Draw) -> Case {
    let p = &draw.problem;
    let ((full, state), build) = Build::of_channels(op, draw);
    let (channels, blocks) = (full[2], full[2] / p.key_dim);
    let (weight, bias) = ([blocks, p.key_dim, p.key_dim], [blocks, p.key_dim]);
    // Decays from next to 1, where the root's derivative is bounded, to fast.
    let params: Vec<_> = (0..channels).map(|c| [-20.0, -12.0, -2.0, 0.5][c % 4]).collect();
    let positions: Vec<_> = (0..p.batch * p.time).map(|t| (t % 29) as f64).collect();
    let build = build.normal("in.x", &full).normal("cot.o", &full).with_states(draw, "h0", "ht", &state);
    let build = ["recurrent_gate", "input_gate"].iter().fold(build, |b, gate| {
        b.normal(&format!("in.{gate}_weight"), &weight).normal(&format!("in.{gate}_bias"), &bias)
    });
    build
        .with("in.recurrent_param", &[channels], &params)
        .when(draw.seed.is_multiple_of(2), |b| b.with("int.position_ids", &full[..2], &positions))
        .case
}
