//! The depth-wise causal convolution over time that precedes most linear recurrences, with its state.
//!
//! `y_t[d] = act(bias[d] + sum_j weight[d, j] x_{t - (W - 1) + j}[d])`: the last weight meets the current token. The
//! state is the last `W - 1` inputs, oldest first; it makes a split sequence equal to a whole one.
//!
//! Used by Mamba (Gu and Dao 2023, arXiv:2312.00752), Griffin, Gated DeltaNet and KDA, with widths 2 to 4 and mostly
//! SiLU. Inputs and outputs are in `E`; weights, bias, state and their gradients are f32.

use crate::{channels::ScanProblem, element::Element, error::Error, native, sequences::Sequences};

/// What follows the convolution.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Activation {
    /// Nothing.
    #[default]
    None,
    /// `x * sigmoid(x)`.
    Silu,
}

/// Sizes and options of a short convolution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvProblem {
    /// Batch, time, channels and packed sequences.
    pub shape: ScanProblem,
    /// Taps, 2 to 8.
    pub width: usize,
    /// What follows.
    pub activation: Activation,
}

/// The arguments of [`forward`].
#[derive(Debug, Clone, Copy)]
pub struct ConvInputs<'a, E> {
    /// `[batch, time, channels]`.
    pub x: &'a [E],
    /// `[channels, width]`.
    pub weight: &'a [f32],
    /// `[channels]`.
    pub bias: Option<&'a [f32]>,
    /// The inputs before the first token, `[sequences, channels, width - 1]`, oldest first; zero where absent.
    pub state: Option<&'a [f32]>,
}

/// What [`forward`] returns.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConvOutputs<E> {
    /// `[batch, time, channels]`.
    pub y: Vec<E>,
    /// The new state, `[sequences, channels, width - 1]`.
    pub state: Vec<f32>,
}

/// What [`backward`] returns, each shaped like what it is the gradient of.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ConvGradients<E> {
    /// Of `x`.
    pub dx: Vec<E>,
    /// Of `weight`.
    pub dweight: Vec<f32>,
    /// Of `bias`; also where there is none.
    pub dbias: Vec<f32>,
    /// Of `state`; also where there is none.
    pub dstate: Vec<f32>,
}

impl ConvProblem {
    #[doc(hidden)]
    pub fn check_sizes(&self) -> Result<Sequences, Error> {
        let sequences = self.shape.sequences()?;
        if !(2..=8).contains(&self.width) {
            return Err(Error::Value { argument: "width", found: self.width.to_string(), expected: "2 to 8" });
        }
        Ok(sequences)
    }
}

fn check<E>(problem: &ConvProblem, inputs: &ConvInputs<E>) -> Result<Sequences, Error> {
    let (shape, width) = (&problem.shape, problem.width);
    let sequences = problem.check_sizes()?;
    shape.check_tokens("x", inputs.x)?;
    Error::check_len("weight", inputs.weight.len(), &[shape.channels, width])?;
    if let Some(bias) = inputs.bias {
        Error::check_len("bias", bias.len(), &[shape.channels])?;
    }
    check_state(problem, &sequences, "state", inputs.state)?;
    Ok(sequences)
}

fn check_state(p: &ConvProblem, sequences: &Sequences, name: &'static str, x: Option<&[f32]>) -> Result<(), Error> {
    x.map_or(Ok(()), |x| Error::check_len(name, x.len(), &[sequences.count(), p.shape.channels, p.width - 1]))
}

/// The convolution over every sequence, and the state for going on.
///
/// # Errors
/// [`Error`] for sizes of zero, a width outside of 2 to 8, buffers of the wrong length and bad `cu_seqlens`.
///
/// # Example
/// ```
/// use thalweg_kernels::{ScanProblem, short_conv::{self, Activation, ConvInputs, ConvProblem}};
/// let problem = ConvProblem { shape: ScanProblem::new(1, 3, 1), width: 2, activation: Activation::None };
/// let inputs = ConvInputs { x: &[1.0f32, 2.0, 3.0], weight: &[10.0, 1.0], bias: None, state: None };
/// let out = short_conv::forward(&problem, &inputs).unwrap();
/// assert_eq!((out.y, out.state), (vec![1.0, 12.0, 23.0], vec![3.0]));
/// ```
pub fn forward<E: Element>(problem: &ConvProblem, inputs: &ConvInputs<E>) -> Result<ConvOutputs<E>, Error> {
    let sequences = check(problem, inputs)?;
    Ok(native::short_conv::forward(&sequences, problem, inputs))
}

/// Gradients of everything that [`forward`] takes, given the cotangents of `y` (`[batch, time, channels]`) and of the
/// new state (`[sequences, channels, width - 1]`, zero where absent). Sums over time are taken in a fixed order.
///
/// # Errors
/// As [`forward`].
pub fn backward<E: Element>(
    problem: &ConvProblem,
    inputs: &ConvInputs<E>,
    dy: &[E],
    d_new_state: Option<&[f32]>,
) -> Result<ConvGradients<E>, Error> {
    let sequences = check(problem, inputs)?;
    problem.shape.check_tokens("dy", dy)?;
    check_state(problem, &sequences, "d_new_state", d_new_state)?;
    Ok(native::short_conv::backward(&sequences, problem, inputs, dy, d_new_state))
}

/// One token of `batch` sequences: `x` is `[batch, channels]`; `state` (`[batch, channels, width - 1]`) is updated in
/// place.
///
/// # Errors
/// As [`forward`]; `state` is then unchanged.
pub fn step<E: Element>(
    batch: usize,
    x: &[E],
    weight: &[f32],
    bias: Option<&[f32]>,
    activation: Activation,
    state: &mut [f32],
) -> Result<Vec<E>, Error> {
    Error::check_positive("batch", batch)?;
    let channels = x.len() / batch;
    let width = weight.len() / channels.max(1);
    let problem = ConvProblem { shape: ScanProblem::new(batch, 1, channels), width, activation };
    let out = forward(&problem, &ConvInputs { x, weight, bias, state: Some(state) })?;
    state.copy_from_slice(&out.state);
    Ok(out.y)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Noise, assert_close, shape_of, wide};
    use half::bf16;
    use thalweg_reference::short_conv as oracle;

    fn check_against_oracle<E: Element>(problem: &ConvProblem, with_bias: bool, tolerance: f64) {
        let sequences = problem.shape.sequences().unwrap();
        let (d, w, n) = (problem.shape.channels, problem.width, sequences.tokens() * problem.shape.channels);
        let mut noise = Noise::new((n + w) as u64);
        let (x, dy): (Vec<E>, Vec<E>) = (noise.uniform(n, -2.0, 2.0), noise.uniform(n, -1.0, 1.0));
        let weight: Vec<f32> = noise.uniform(d * w, -1.0, 1.0);
        let bias: Option<Vec<f32>> = with_bias.then(|| noise.uniform(d, -1.0, 1.0));
        let states = sequences.count() * d * (w - 1);
        let (state, ds): (Vec<f32>, Vec<f32>) = (noise.uniform(states, -2.0, 2.0), noise.uniform(states, -1.0, 1.0));
        let inputs = ConvInputs { x: &x, weight: &weight, bias: bias.as_deref(), state: Some(&state) };
        let out = forward(problem, &inputs).unwrap();
        let grads = backward(problem, &inputs, &dy, Some(&ds)).unwrap();

        let (x, weight, state, bias) = (wide(&x), wide(&weight), wide(&state), bias.map(|b| wide(&b)));
        let silu = problem.activation == Activation::Silu;
        let inputs = oracle::Inputs { x: &x, weight: &weight, bias: bias.as_deref(), silu, state: Some(&state) };
        let (y, new_state) = oracle::forward(&shape_of(&problem.shape), &inputs);
        let want = oracle::backward(&shape_of(&problem.shape), &inputs, &wide(&dy), Some(&wide(&ds)));
        assert_close("y", &out.y, &y, tolerance);
        assert_close("state", &out.state, &new_state, 0.0);
        assert_close("dx", &grads.dx, &want.x, tolerance);
        assert_close("dweight", &grads.dweight, &want.weight, 1e-5);
        assert_close("dbias", &grads.dbias, &want.bias, 1e-5);
        assert_close("dstate", &grads.dstate, &want.state, 1e-5);
    }

    #[test]
    fn equals_the_oracle() {
        for time in [1, 2, 5, 63, 64, 65, 300] {
            for (width, channels) in [(2, 3), (4, 130), (7, 64), (8, 9)] {
                for activation in [Activation::None, Activation::Silu] {
                    let problem = ConvProblem { shape: ScanProblem::new(2, time, channels), width, activation };
                    check_against_oracle::<f32>(&problem, true, 1e-5);
                    check_against_oracle::<bf16>(&problem, false, 1e-2);
                }
            }
        }
        let shape = ScanProblem::packed(70, vec![0, 1, 3, 300, 301]);
        check_against_oracle::<f32>(&ConvProblem { shape, width: 4, activation: Activation::Silu }, true, 1e-5);
    }

    #[test]
    fn a_split_sequence_and_steps_equal_the_whole() {
        let (d, w, time) = (5, 4, 9);
        let mut noise = Noise::new(1);
        let x: Vec<f32> = noise.uniform(time * d, -1.0, 1.0);
        let weight: Vec<f32> = noise.uniform(d * w, -1.0, 1.0);
        let run = |x: &[f32], state: Option<&[f32]>| {
            let shape = ScanProblem::new(1, x.len() / d, d);
            let problem = ConvProblem { shape, width: w, activation: Activation::Silu };
            forward(&problem, &ConvInputs { x, weight: &weight, bias: None, state }).unwrap()
        };
        let whole = run(&x, None);
        let first = run(&x[..2 * d], None);
        let mut y = first.y.clone();
        let mut state = first.state;
        for t in 2..time {
            let x = &x[t * d..(t + 1) * d];
            y.extend(step(1, x, &weight, None, Activation::Silu, &mut state).unwrap());
        }
        assert_eq!((y, state), (whole.y, whole.state));
    }

    #[test]
    fn names_the_bad_argument() {
        let problem = |width| ConvProblem { shape: ScanProblem::new(1, 2, 2), width, activation: Activation::None };
        let inputs = ConvInputs { x: &[0.0f32; 4], weight: &[0.0; 6], bias: None, state: None };
        assert!(matches!(forward(&problem(9), &inputs), Err(Error::Value { argument: "width", .. })));
        assert!(matches!(forward(&problem(4), &inputs), Err(Error::Shape { argument: "weight", .. })));
        let inputs = ConvInputs { state: Some(&[0.0; 2]), ..inputs };
        assert!(matches!(forward(&problem(3), &inputs), Err(Error::Shape { argument: "state", .. })));
        assert!(step(0, &[0.0f32], &[0.0; 2], None, Activation::None, &mut []).is_err());
    }
}
