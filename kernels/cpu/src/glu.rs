//! Gated units: `y = f(x) z`, and `y = f(x)` alone, for the activations whose cost is an exponential.
//!
//! They stand in every block of a model, between its projections; a plain element-wise pass per arithmetic operation
//! would read and write the same memory four times over, and a scalar `exp` per element costs as much as a small
//! matrix product.

use crate::native::plan::each;
use crate::native::rows::{Aligned, BLOCK, Output, Rows, block, fence};
use crate::native::simd::{sigmoid, silu, silu_with_slope, vectorize};
use crate::{Element, Error};
use std::ops::Range;

/// The `f` of a gated unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `s(x) = 1 / (1 + exp(-x))`
    Sigmoid,
    /// `x s(x)`
    Silu,
    /// `x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`
    GeluTanh,
}

/// Gradients of [`forward`].
#[derive(Debug, Clone, PartialEq)]
pub struct GluGradients<E> {
    /// Of `x`.
    pub dx: Vec<E>,
    /// Of `z`, if there is one.
    pub dz: Option<Vec<E>>,
}

/// Elements per task.
const TASK: usize = 128 * BLOCK;

/// An element-wise function with its derivative.
trait Function {
    fn value(x: f32) -> f32;
    /// `(f(x), f'(x))`
    fn slope(x: f32) -> (f32, f32);
}

struct Sigmoid;
struct Silu;
struct GeluTanh;

impl Function for Sigmoid {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        sigmoid(x)
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        (s, s * (1.0 - s))
    }
}

impl Function for Silu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        silu(x).0
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        silu_with_slope(x)
    }
}

impl GeluTanh {
    /// `2 sqrt(2 / pi)`: `(1 + tanh u) / 2 = s(2 u)`.
    const RATE: f32 = 1.595_769;
    const CUBIC: f32 = 0.044715 * Self::RATE;

    /// `f(x)` and the gate `(1 + tanh u) / 2`.
    #[inline(always)]
    fn gated(x: f32) -> (f32, f32) {
        let s = sigmoid(x * (Self::RATE + Self::CUBIC * x * x));
        // Of minus infinity times 0 nothing would be left.
        ((if x < f32::MIN { f32::MIN } else { x }) * s, s)
    }
}

impl Function for GeluTanh {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        Self::gated(x).0
    }
    #[inline(always)]
    fn slope(x: f32) -> (f32, f32) {
        let (value, s) = Self::gated(x);
        // The factor s (1 - s) is 0 long before the cube overflows.
        let bounded = x.clamp(-1e6, 1e6);
        let inner = Self::RATE + 3.0 * Self::CUBIC * bounded * bounded;
        (value, s + bounded * s * (1.0 - s) * inner)
    }
}

/// `x = f(x)`
pub(crate) fn apply(activation: Activation, x: &mut [f32]) {
    fn map<F: Function>(x: &mut [f32]) {
        vectorize(
            #[inline(always)]
            || x.iter_mut().for_each(|x| *x = F::value(*x)),
        );
    }
    match activation {
        Activation::Sigmoid => map::<Sigmoid>(x),
        Activation::Silu => map::<Silu>(x),
        Activation::GeluTanh => map::<GeluTanh>(x),
    }
}

/// `x, slope = f(x), f'(x)`
pub(crate) fn apply_with_slope(activation: Activation, x: &mut [f32], slope: &mut [f32]) {
    fn map<F: Function>(x: &mut [f32], slope: &mut [f32]) {
        vectorize(
            #[inline(always)]
            || x.iter_mut().zip(slope).for_each(|(x, slope)| (*x, *slope) = F::slope(*x)),
        );
    }
    match activation {
        Activation::Sigmoid => map::<Sigmoid>(x, slope),
        Activation::Silu => map::<Silu>(x, slope),
        Activation::GeluTanh => map::<GeluTanh>(x, slope),
    }
}

/// `f(x) z`, or `f(x)` if `z` is absent.
///
/// # Errors
/// If `z` is not as long as `x`.
pub fn forward<E: Element>(activation: Activation, x: &[E], z: Option<&[E]>) -> Result<Vec<E>, Error> {
    Error::check_len("z", z.map_or(x.len(), <[E]>::len), &[x.len()])?;
    let mut y = Output::new(x.len(), Vec::new());
    let rows = y.rows();
    each(tasks(x.len()), x.len(), |range| match activation {
        Activation::Sigmoid => values::<Sigmoid, E>(range, x, z, &rows),
        Activation::Silu => values::<Silu, E>(range, x, z, &rows),
        Activation::GeluTanh => values::<GeluTanh, E>(range, x, z, &rows),
    });
    // Safety: the tasks have written all of it.
    Ok(unsafe { y.finish() })
}

/// Runs of elements that cover `0..len`.
fn tasks(len: usize) -> Vec<Range<usize>> {
    (0..len).step_by(TASK).map(|at| at..len.min(at + TASK)).collect()
}

/// Gradients of [`forward`] for the cotangent `dy` of its result.
///
/// # Errors
/// If `z` or `dy` is not as long as `x`.
pub fn backward<E: Element>(
    activation: Activation,
    x: &[E],
    z: Option<&[E]>,
    dy: &[E],
) -> Result<GluGradients<E>, Error> {
    Error::check_len("z", z.map_or(x.len(), <[E]>::len), &[x.len()])?;
    Error::check_len("dy", dy.len(), &[x.len()])?;
    let mut dx = Output::new(x.len(), Vec::new());
    let mut dz = z.map(|z| Output::new(z.len(), Vec::new()));
    let rows = (dx.rows(), dz.as_mut().map(Output::rows));
    each(tasks(x.len()), x.len(), |range| match activation {
        Activation::Sigmoid => slopes::<Sigmoid, E>(range, (x, z, dy), &rows),
        Activation::Silu => slopes::<Silu, E>(range, (x, z, dy), &rows),
        Activation::GeluTanh => slopes::<GeluTanh, E>(range, (x, z, dy), &rows),
    });
    // Safety: the tasks have written all of both.
    Ok(unsafe { GluGradients { dx: dx.finish(), dz: dz.map(|dz| dz.finish()) } })
}

fn values<F: Function, E: Element>(range: Range<usize>, x: &[E], z: Option<&[E]>, y: &Rows<E>) {
    let (mut xb, mut zb) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
    vectorize(
        #[inline(always)]
        || {
            for at in range.clone().step_by(BLOCK) {
                let len = BLOCK.min(range.end - at);
                let (x, mut values) = (block(x, at, len, &mut xb), Aligned([0.0; BLOCK]));
                match z {
                    Some(z) => {
                        let inputs = x.iter().zip(block(z, at, len, &mut zb));
                        values.iter_mut().zip(inputs).for_each(|(y, (x, z))| *y = F::value(*x) * z);
                    }
                    None => values.iter_mut().zip(x).for_each(|(y, x)| *y = F::value(*x)),
                }
                // Safety: tasks own disjoint ranges.
                unsafe { y.put(at, &values, len) };
            }
        },
    );
    fence();
}

fn slopes<F: Function, E: Element>(
    range: Range<usize>,
    (x, z, dy): (&[E], Option<&[E]>, &[E]),
    (dx, dz): &(Rows<E>, Option<Rows<E>>),
) {
    let mut buffers = Aligned([[0.0; BLOCK]; 3]);
    vectorize(
        #[inline(always)]
        || {
            for at in range.clone().step_by(BLOCK) {
                let (len, [xb, zb, db]) = (BLOCK.min(range.end - at), &mut buffers.0);
                let (x, d) = (block(x, at, len, xb), block(dy, at, len, db));
                let z = z.map_or(&[1.0; BLOCK], |z| block(z, at, len, zb));
                let (mut of_x, mut of_z) = (Aligned([0.0; BLOCK]), Aligned([0.0; BLOCK]));
                for i in 0..BLOCK {
                    let (value, slope) = F::slope(x[i]);
                    (of_x[i], of_z[i]) = (d[i] * z[i] * slope, d[i] * value);
                }
                // Safety: tasks own disjoint ranges.
                unsafe {
                    dx.put(at, &of_x, len);
                    if let Some(dz) = dz {
                        dz.put(at, &of_z, len);
                    }
                }
            }
        },
    );
    fence();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_formulas_in_f64() {
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let tanh = |x: f64| 0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh());
        // Long enough for several tasks, with a ragged end.
        let x: Vec<f32> = (0..3 * TASK + 77).map(|i| (i % 1999) as f32 * 0.01 - 10.0).collect();
        let z: Vec<f32> = (0..x.len()).map(|i| ((i * 7) % 31) as f32 * 0.1 - 1.5).collect();
        let dy: Vec<f32> = (0..x.len()).map(|i| ((i * 5) % 17) as f32 * 0.1 - 0.8).collect();
        for activation in [Activation::Sigmoid, Activation::Silu, Activation::GeluTanh] {
            let f = |x: f64| match activation {
                Activation::Sigmoid => sigmoid(x),
                Activation::Silu => x * sigmoid(x),
                Activation::GeluTanh => tanh(x),
            };
            for gate in [None, Some(z.as_slice())] {
                let y = forward(activation, &x, gate).unwrap();
                let grads = backward(activation, &x, gate, &dy).unwrap();
                for i in 0..x.len() {
                    let (xi, zi, di) = (f64::from(x[i]), gate.map_or(1.0, |z| f64::from(z[i])), f64::from(dy[i]));
                    let slope = (f(xi + 1e-5) - f(xi - 1e-5)) / 2e-5;
                    assert!((f64::from(y[i]) - f(xi) * zi).abs() < 2e-6 * f(xi).abs().max(1.0), "{activation:?} {xi}");
                    assert!((f64::from(grads.dx[i]) - di * zi * slope).abs() < 1e-5, "{activation:?} {xi}");
                    if let Some(dz) = &grads.dz {
                        assert!((f64::from(dz[i]) - di * f(xi)).abs() < 1e-5, "{activation:?} {xi}");
                    }
                }
            }
        }
    }

    /// At both ends every unit is the product of its argument (or 1) and a gate of 0 or 1, and its slope is 0 or 1.
    #[test]
    fn has_its_limits_at_both_ends_and_refuses_lengths() {
        fn check<E: Element + PartialEq + std::fmt::Debug>(largest: f32) {
            let ends: Vec<f32> = [1e3, 1e20f32.min(largest), largest, f32::INFINITY].into();
            let x: Vec<E> = ends.iter().flat_map(|&x| [-x, x]).map(E::from_f32).collect();
            let ones = vec![E::from_f32(1.0); x.len()];
            for activation in [Activation::Sigmoid, Activation::Silu, Activation::GeluTanh] {
                let y = forward(activation, &x, None).unwrap();
                let dx = backward(activation, &x, None, &ones).unwrap().dx;
                for ((x, y), dx) in x.iter().map(|x| x.to_f32()).zip(&y).zip(&dx) {
                    let unit = if activation == Activation::Sigmoid { 1.0 } else { x };
                    let value = if x > 0.0 { unit } else { 0.0 };
                    let slope = if x > 0.0 && activation != Activation::Sigmoid { 1.0 } else { 0.0 };
                    assert_eq!((y.to_f32(), dx.to_f32()), (value, slope), "{activation:?} {x}");
                }
            }
        }
        check::<f32>(f32::MAX);
        check::<half::bf16>(half::bf16::MAX.to_f32());
        check::<half::f16>(half::f16::MAX.to_f32());
        let x = [0.0f32; 5];
        for activation in [Activation::Sigmoid, Activation::Silu, Activation::GeluTanh] {
            let nan = forward(activation, &[f32::NAN], None).unwrap();
            assert!(nan[0].is_nan(), "{activation:?}");
            assert!(forward(activation, &x, Some(&x[1..])).is_err());
            assert!(backward(activation, &x, None, &x[1..]).is_err());
        }
    }
}
