//! Linear layers, dense and block-diagonal: `y = x W + b`, and their gradients.
//!
//! They take most of the time of a model's training step on a CPU, and a gated recurrence such as the RG-LRU has some
//! inside of it.

use rayon::prelude::*;

use crate::native::product::{Operand, product};
use crate::native::simd::{vectorize, widen};
use crate::{Element, Error};

/// Sizes of a linear layer: features are cut into `blocks`, each with a weight of its own; a dense layer has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinearProblem {
    /// Rows of `x`: batch times time.
    pub rows: usize,
    /// Diagonal blocks of the weight.
    pub blocks: usize,
    /// Input features of a block.
    pub inputs: usize,
    /// Output features of a block.
    pub outputs: usize,
    /// Whether the weight of a block is stored `[outputs, inputs]`, as that of a head which shares the embeddings.
    pub transposed: bool,
}

impl LinearProblem {
    /// A dense layer.
    pub fn new(rows: usize, inputs: usize, outputs: usize) -> Self {
        Self { rows, blocks: 1, inputs, outputs, transposed: false }
    }

    /// Says that weights are stored `[blocks, outputs, inputs]`.
    #[must_use]
    pub fn with_transposed_weight(self) -> Self {
        Self { transposed: true, ..self }
    }

    /// Sets the number of diagonal blocks; `inputs` and `outputs` are those of one block.
    #[must_use]
    pub fn with_blocks(self, blocks: usize) -> Self {
        Self { blocks, ..self }
    }

    fn check<E>(&self, x: &[E], weight: &[E]) -> Result<(), Error> {
        let Self { rows, blocks, inputs, outputs, transposed } = *self;
        for (argument, size) in [("rows", rows), ("blocks", blocks), ("inputs", inputs), ("outputs", outputs)] {
            Error::check_positive(argument, size)?;
        }
        Error::check_len("x", x.len(), &[rows, blocks, inputs])?;
        let weight_shape = if transposed { [blocks, outputs, inputs] } else { [blocks, inputs, outputs] };
        Error::check_len("weight", weight.len(), &weight_shape)
    }

    /// The weight as the right operand of a product, or its transpose.
    fn weight<'a, E>(&self, data: &'a [E], transposed: bool) -> Operand<'a, E> {
        let stride = if self.transposed { self.inputs } else { self.outputs };
        Operand { data, stride, block: self.inputs * self.outputs, transposed: self.transposed != transposed }
    }
}

/// Gradients of [`forward`].
#[derive(Debug, Clone, PartialEq)]
pub struct LinearGradients<E> {
    /// Of `x`, `[rows, blocks, inputs]`.
    pub dx: Vec<E>,
    /// Of the weight, `[blocks, inputs, outputs]`, or as the weight is stored.
    pub d_weight: Vec<E>,
    /// Of the bias, `[blocks, outputs]`, if it was asked for.
    pub d_bias: Option<Vec<E>>,
}

/// `y[t, h] = x[t, h] W[h] + b[h]`: `x` is `[rows, blocks, inputs]`, `weight` `[blocks, inputs, outputs]`, `bias`
/// `[blocks, outputs]`, the result `[rows, blocks, outputs]`. Sums are f32. A weight may be stored
/// [transposed](LinearProblem::with_transposed_weight).
///
/// # Errors
/// If a size is 0 or a slice is not as long as the problem says.
pub fn forward<E: Element>(
    problem: &LinearProblem,
    x: &[E],
    weight: &[E],
    bias: Option<&[E]>,
) -> Result<Vec<E>, Error> {
    problem.check(x, weight)?;
    let LinearProblem { rows, blocks, inputs, outputs, .. } = *problem;
    if let Some(bias) = bias {
        Error::check_len("bias", bias.len(), &[blocks, outputs])?;
    }
    let a = Operand { data: x, stride: blocks * inputs, block: inputs, transposed: false };
    Ok(product([blocks, rows, outputs, inputs], a, problem.weight(weight, false), bias))
}

/// Gradients of [`forward`] for the cotangent `dy: [rows, blocks, outputs]` of its result.
///
/// # Errors
/// If a size is 0 or a slice is not as long as the problem says.
pub fn backward<E: Element>(
    problem: &LinearProblem,
    x: &[E],
    weight: &[E],
    dy: &[E],
    with_bias: bool,
) -> Result<LinearGradients<E>, Error> {
    problem.check(x, weight)?;
    let LinearProblem { rows, blocks, inputs, outputs, transposed } = *problem;
    Error::check_len("dy", dy.len(), &[rows, blocks, outputs])?;
    let x = Operand { data: x, stride: blocks * inputs, block: inputs, transposed: false };
    let d = Operand { data: dy, stride: blocks * outputs, block: outputs, transposed: false };
    let dx = product([blocks, rows, inputs, outputs], d, problem.weight(weight, true), None);
    let ((left, m), (right, n)) = if transposed { ((d, outputs), (x, inputs)) } else { ((x, inputs), (d, outputs)) };
    let left = Operand { transposed: true, ..left };
    let of_block = |h| product([1, m, n, rows], left.only(h), right.only(h), None);
    let d_weight = match blocks {
        1 => of_block(0),
        _ => (0..blocks).into_par_iter().map(of_block).collect::<Vec<_>>().concat(),
    };
    let d_bias = with_bias.then(|| column_sums(dy, blocks * outputs));
    Ok(LinearGradients { dx, d_weight, d_bias })
}

/// Sums over the rows of `[rows, width]`, runs of rows first; in f64, since terms of a sum that cancel leave f32 few digits.
fn column_sums<E: Element>(x: &[E], width: usize) -> Vec<E> {
    const RUN: usize = 128;
    let sum = |x: &[E]| {
        let (mut sums, mut row) = (vec![0.0f64; width], vec![0.0; width]);
        for x in x.chunks_exact(width) {
            widen(x, &mut row);
            vectorize(
                #[inline(always)]
                || sums.iter_mut().zip(&row).for_each(|(s, &x)| *s += f64::from(x)),
            );
        }
        sums
    };
    let runs: Vec<_> = x.par_chunks(RUN * width).with_min_len(4).map(sum).collect();
    let add = |mut total: Vec<f64>, run: Vec<f64>| {
        total.iter_mut().zip(run).for_each(|(t, x)| *t += x);
        total
    };
    let total = runs.into_iter().fold(vec![0.0; width], add);
    E::from_f32_vec(total.into_iter().map(|x| x as f32).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, wide};
    use half::bf16;
    use proptest::prelude::*;

    /// `y`, `dx`, `dW`, `db` by definition.
    fn definition(p: &LinearProblem, x: &[f64], w: &[f64], b: &[f64], dy: &[f64]) -> [Vec<f64>; 4] {
        let LinearProblem { rows, blocks, inputs, outputs, .. } = *p;
        let (mut y, mut dx) = (vec![0.0; dy.len()], vec![0.0; x.len()]);
        let (mut dw, mut db) = (vec![0.0; w.len()], vec![0.0; b.len()]);
        for t in 0..rows {
            for h in 0..blocks {
                for o in 0..outputs {
                    let (at, to) = ((t * blocks + h) * inputs, (t * blocks + h) * outputs + o);
                    y[to] += b[h * outputs + o];
                    db[h * outputs + o] += dy[to];
                    for i in 0..inputs {
                        let weight = (h * inputs + i) * outputs + o;
                        y[to] += x[at + i] * w[weight];
                        dx[at + i] += dy[to] * w[weight];
                        dw[weight] += dy[to] * x[at + i];
                    }
                }
            }
        }
        [y, dx, dw, db]
    }

    /// Half a unit in the last place, at most of a number.
    const F32: f64 = f32::EPSILON as f64 / 2.0;
    const BF16: f64 = 1.0 / 256.0;

    /// What summing in f32 may lose of the sum of the terms' magnitudes, of which a sum that cancels leaves little.
    const SUMMING: f64 = 3.5e-7;

    /// Every product as well as its result is `rounded`, but for what summing loses; the bias's gradient is summed in f64.
    fn check<E: Element>(p: &LinearProblem, rounded: f64) {
        let LinearProblem { rows, blocks, inputs, outputs, .. } = *p;
        let lengths = [rows * blocks * inputs, blocks * inputs * outputs, blocks * outputs, rows * blocks * outputs];
        let mut noise = Noise::new(rows as u64);
        let [x, w, b, dy] = lengths.map(|n| noise.uniform::<E>(n, -1.0, 1.0));
        let all = [&x, &w, &b, &dy].map(|x| wide(x));
        let magnitudes = all.each_ref().map(|x| x.iter().map(|x| x.abs()).collect::<Vec<_>>());
        let of = |[x, w, b, dy]: &[Vec<f64>; 4]| definition(p, x, w, b, dy);
        let ([y, dx, d_weight, d_bias], [y_terms, dx_terms, d_weight_terms, _]) = (of(&all), of(&magnitudes));
        let close = |name: &str, found: &[E], want: &[f64], terms: &[f64]| {
            for (i, ((found, want), terms)) in found.iter().zip(want).zip(terms).enumerate() {
                let (found, bound) = (f64::from(found.to_f32()), rounded * want.abs() + SUMMING * terms);
                assert!((found - want).abs() <= bound, "{name}[{i}]: {found}, want {want}, tolerance {bound:e}");
            }
        };
        let grads = backward(p, &x, &w, &dy, true).unwrap();
        close("y", &forward(p, &x, &w, Some(&b)).unwrap(), &y, &y_terms);
        close("dx", &grads.dx, &dx, &dx_terms);
        close("d_weight", &grads.d_weight, &d_weight, &d_weight_terms);
        assert_close("d_bias", &grads.d_bias.unwrap(), &d_bias, rounded + SUMMING);

        let turned = p.with_transposed_weight();
        let w = transposed(&w, blocks, inputs, outputs);
        let grads = backward(&turned, &x, &w, &dy, true).unwrap();
        close("y", &forward(&turned, &x, &w, Some(&b)).unwrap(), &y, &y_terms);
        close("dx", &grads.dx, &dx, &dx_terms);
        close("d_weight", &transposed(&grads.d_weight, blocks, outputs, inputs), &d_weight, &d_weight_terms);
    }

    /// `[blocks, inputs, outputs]` as `[blocks, outputs, inputs]`.
    fn transposed<E: Element>(w: &[E], blocks: usize, inputs: usize, outputs: usize) -> Vec<E> {
        let places = (0..blocks * outputs * inputs).map(|i| (i / (outputs * inputs), i / inputs % outputs, i % inputs));
        places.map(|(block, o, i)| w[(block * inputs + i) * outputs + o]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn equals_the_definition(
            rows in prop_oneof![1usize..12, 1usize..200],
            blocks in 1usize..4,
            inputs in 1usize..80,
            outputs in 1usize..80,
        ) {
            let p = LinearProblem::new(rows, inputs, outputs).with_blocks(blocks);
            check::<f32>(&p, F32);
            check::<bf16>(&p, BF16);
        }
    }

    /// Six terms of a bias's gradient that leave 2 % of the largest.
    #[test]
    fn sums_that_cancel() {
        check::<f32>(&LinearProblem::new(6, 7, 1), F32);
    }

    /// Inner sizes of more than one chunk, in all three products.
    #[test]
    fn long_sums() {
        check::<f32>(&LinearProblem::new(1500, 40, 33), F32);
        check::<f32>(&LinearProblem::new(70, 1100, 1030), F32);
        check::<f32>(&LinearProblem::new(2, 1100, 1030), F32);
    }

    #[test]
    fn does_not_depend_on_threads() {
        for rows in [2, 20, 700] {
            let p = LinearProblem::new(rows, 96, 160).with_blocks(4);
            let mut noise = Noise::new(1);
            let [x, w, dy] = [rows * 384, 4 * 96 * 160, rows * 640].map(|n| noise.uniform::<f32>(n, -1.0, 1.0));
            let run = |threads: usize| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| (forward(&p, &x, &w, None).unwrap(), backward(&p, &x, &w, &dy, true).unwrap()))
            };
            assert_eq!(run(1), run(3));
        }
    }

    /// Of each row, alone and among others: the number of rows chooses how `B` is read, never how sums are rounded.
    #[test]
    fn rows_do_not_depend_on_each_other() {
        fn check<E: Element>(p: &LinearProblem) {
            let LinearProblem { rows, blocks, inputs, outputs, .. } = *p;
            let (from, to) = (blocks * inputs, blocks * outputs);
            let mut noise = Noise::new(7);
            let [x, w, b, dy] =
                [rows * from, blocks * inputs * outputs, to, rows * to].map(|n| noise.uniform::<E>(n, -1.0, 1.0));
            let bits = |x: &[E]| x.iter().map(|x| x.to_f32().to_bits()).collect::<Vec<_>>();
            let run = |first: usize, count: usize, bias: Option<&[E]>| {
                let p = LinearProblem { rows: count, ..*p };
                let x = &x[first * from..(first + count) * from];
                let y = forward(&p, x, &w, bias).unwrap();
                let dx = backward(&p, x, &w, &dy[first * to..(first + count) * to], false).unwrap().dx;
                [bits(&y), bits(&dx)]
            };
            for bias in [None, Some(&b[..])] {
                let [y, dx] = run(0, rows, bias);
                for (first, count) in [(0, 1), (3, 2), (0, 4), (1, 5), (0, 8), (2, 17), (0, 64), (1, 65), (rows - 3, 3)]
                {
                    let part = run(first, count, bias);
                    let whole = [&y[first * to..(first + count) * to], &dx[first * from..(first + count) * from]];
                    assert!(part[0] == whole[0] && part[1] == whole[1], "{} {p:?}, {count} rows", E::NAME);
                }
            }
        }
        for (inputs, outputs, blocks) in
            [(1, 1, 1), (40, 33, 3), (130, 7, 1), (300, 260, 1), (1100, 65, 1), (70, 1100, 1)]
        {
            let p = LinearProblem::new(140, inputs, outputs).with_blocks(blocks);
            for p in [p, p.with_transposed_weight()] {
                check::<f32>(&p);
                check::<bf16>(&p);
            }
        }
    }

    #[test]
    fn refuses_lengths() {
        let p = LinearProblem::new(2, 3, 4);
        let error = forward(&p, &[0.0f32; 5], &[0.0; 12], None).unwrap_err();
        assert_eq!(error.to_string(), "`x` has shape [5], expected [2, 1, 3]");
        assert!(forward(&p, &[0.0f32; 6], &[0.0; 12], Some(&[0.0; 3])).is_err());
        assert!(backward(&p, &[0.0f32; 6], &[0.0; 12], &[0.0; 7], false).is_err());
        assert!(forward(&LinearProblem::new(0, 3, 4), &[0.0f32; 0], &[0.0; 12], None).is_err());
    }
}
