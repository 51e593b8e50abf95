//! Functions of f32 vectors whose accuracy must not depend on the device's own; exponential, reciprocal and square root
//! alone are the device's. On CUDA they are the instructions, which are off by 2 units in the last place (an exponential
//! by as many as its argument besides): rounded correctly, each takes ten instructions and a branch, and gates would cost
//! more than their memory.

use cubecl::prelude::*;

use crate::tile::takes_ptx;

/// What a device computes in one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Instruction {
    /// Two to the power of.
    Power,
    Reciprocal,
    Root,
    InverseRoot,
}

/// Number by number. Only where the device takes PTX.
#[cube]
fn instruction<N: Size>(x: Vector<f32, N>, #[comptime] which: Instruction) -> Vector<f32, N> {
    let mut values = all::<N>(0.0);
    #[unroll]
    for i in 0..N::value().comptime() {
        let from = x.extract(i);
        let to: f32;
        match which {
            Instruction::Power => {
                gpu_asm!("ex2.approx.ftz.f32 {}, {};", out(_) to, in(_) from, options(nomem));
            }
            Instruction::Reciprocal => {
                gpu_asm!("rcp.approx.ftz.f32 {}, {};", out(_) to, in(_) from, options(nomem));
            }
            Instruction::Root => {
                gpu_asm!("sqrt.approx.ftz.f32 {}, {};", out(_) to, in(_) from, options(nomem));
            }
            Instruction::InverseRoot => {
                gpu_asm!("rsqrt.approx.ftz.f32 {}, {};", out(_) to, in(_) from, options(nomem));
            }
        }
        values.insert(i, to);
    }
    values
}

/// `e^x`; on CUDA 0 below `2^-126`.
#[cube]
pub(crate) fn exp<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) {
        instruction::<N>(x * all::<N>(std::f32::consts::LOG2_E), Instruction::Power)
    } else {
        x.exp()
    }
}

#[cube]
fn reciprocal<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) { instruction::<N>(x, Instruction::Reciprocal) } else { all::<N>(1.0) / x }
}

#[cube]
pub(crate) fn root<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) { instruction::<N>(x, Instruction::Root) } else { x.sqrt() }
}

#[cube]
pub(crate) fn inverse_root<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let device = comptime::device_properties().comptime();
    if comptime!(takes_ptx(&device)) { instruction::<N>(x, Instruction::InverseRoot) } else { all::<N>(1.0) / x.sqrt() }
}

/// A vector of one number.
#[cube]
pub(crate) fn all<N: Size>(#[comptime] x: f32) -> Vector<f32, N> {
    Vector::new(f32::new(x))
}

/// Horner's rule, highest power first.
#[cube]
#[allow(clippy::needless_range_loop)]
fn polynomial<N: Size>(x: Vector<f32, N>, #[comptime] coefficients: Vec<f32>) -> Vector<f32, N> {
    let mut p = all::<N>(comptime!(coefficients[0]));
    #[unroll]
    for i in 1..comptime!(coefficients.len()) {
        p = p * x + all::<N>(comptime!(coefficients[i]));
    }
    p
}

/// The logistic function: 0 where the exponential overflows.
#[cube]
pub(crate) fn sigmoid<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    reciprocal::<N>(all::<N>(1.0) + exp::<N>(-x))
}

/// `x` as a factor of `sigmoid(x)`, of `1 - sigmoid(x)` or of both: where those are 0, it is not infinite.
#[cube]
pub(crate) fn bounded<N: Size>(x: Vector<f32, N>, #[comptime] below: bool, #[comptime] above: bool) -> Vector<f32, N> {
    let (least, most) = (all::<N>(-1e4), all::<N>(1e4));
    let mut y = x;
    if comptime!(below) {
        y = select_many(y.less_than(&least), least, y);
    }
    if comptime!(above) {
        y = select_many(y.greater_than(&most), most, y);
    }
    y
}

/// `e^x - 1` for `x <= 0` and `power = e^x`: no digit is lost near 0. Taylor's series, whose remainder at -1/2 is 2^-26 of
/// the value; half of it for what is `short` of digits anyway, at -1/8 off by 2^-19.
#[cube]
pub(crate) fn expm1<N: Size>(x: Vector<f32, N>, power: Vector<f32, N>, #[comptime] short: bool) -> Vector<f32, N> {
    let taylor = comptime!([1.0 / 40320.0, 1.0 / 5040.0, 1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0]);
    let (skipped, least) = comptime!(if short { (4, -0.125) } else { (0, -0.5) });
    let series = x * polynomial::<N>(x, comptime!(taylor[skipped..].to_vec()));
    select_many(x.greater_than(&all::<N>(least)), series, power - all::<N>(1.0))
}

/// `ln(1 + e^x)`, with `ln(1 + e) = 2 artanh(e / (2 + e))` as a series.
#[cube]
pub(crate) fn softplus<N: Size>(x: Vector<f32, N>) -> Vector<f32, N> {
    let e = (-x.abs()).exp();
    let s = e / (e + all::<N>(2.0));
    let odd = comptime!(vec![1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 0.2, 1.0 / 3.0, 1.0]);
    let zero = all::<N>(0.0);
    select_many(x.greater_than(&zero), x, zero) + all::<N>(2.0) * s * polynomial::<N>(s * s, odd)
}

/// Up to here three parts of `pi / 2` reduce an angle.
const MAX_ANGLE: f32 = 1e4;

/// `2 / pi` in words of 32 bits, the first of weight 2^-34: as many as the largest f32 needs.
const TWO_OVER_PI: [u32; 7] = [0, 0x28be_60db, 0x9391_054a, 0x7f09_d5f4, 0x7d4d_3770, 0x36d8_a566, 0x4f10_e410];

/// Word `at` of `2 / pi`. A table in memory would be one more buffer for each kernel.
#[cube]
fn two_over_pi(at: u32) -> u32 {
    let mut word = 0u32;
    #[unroll]
    for i in 1..7usize {
        if at == comptime!(i as u32) {
            word = comptime!(TWO_OVER_PI[i]).runtime();
        }
    }
    word
}

/// `(n mod 4, r)` with `x = n pi / 2 + r` and `|r| <= pi / 4`, for any finite `|x| >= 2`: Payne and Hanek's reduction. The product of the 24 bits of `x` with those bits of `2 / pi` that make less than four
/// quarter turns, and 38 below them.
#[cube]
fn reduce_far(x: f32) -> (f32, f32) {
    let bits = u32::reinterpret(x);
    let exponent = (bits >> 23) & 0xff;
    let mantissa = (bits << 8) | 0x8000_0000;
    let (word, shift) = ((exponent - 126) >> 5, (exponent - 126) & 31);
    let (w0, w1) = (two_over_pi(word), two_over_pi(word + 1));
    let (w2, w3) = (two_over_pi(word + 2), two_over_pi(word + 3));
    let mut window = (w0, w1, w2);
    if shift > 0 {
        let rest = 32 - shift;
        window = ((w0 << shift) | (w1 >> rest), (w1 << shift) | (w2 >> rest), (w2 << shift) | (w3 >> rest));
    }
    // 64 bits, in units of 2^-62 quarter turns.
    let (middle, below) = (mantissa * window.1, mantissa.mul_hi(window.2));
    let low = middle + below;
    let mut high = mantissa * window.0 + mantissa.mul_hi(window.1);
    if low < below {
        high += 1;
    }
    let n = (high + 0x2000_0000) >> 30;
    let fraction = i32::reinterpret(high - (n << 30));
    let r = f32::cast_from(fraction) * f32::new(comptime!(std::f32::consts::FRAC_PI_2 / 1_073_741_824.0))
        + f32::cast_from(low) * f32::new(comptime!(std::f32::consts::FRAC_PI_2 / 4_611_686_018_427_387_904.0));
    let sign = if bits >> 31 == 1 { f32::new(-1.0) } else { f32::new(1.0) };
    // What is not finite makes a NaN.
    let r = if exponent == 255 { x - x } else { sign * r };
    (sign * f32::cast_from(n), r)
}

/// Sine and cosine, error below 1.2e-7 for any `x`: `x = n pi / 2 + r` with `|r| <= pi / 4`, where for `|x| <= 1e4` the
/// first parts of `pi / 2` have so few bits that their products with `n` are exact.
#[cube]
pub(crate) fn sin_cos<N: Size>(x: Vector<f32, N>) -> (Vector<f32, N>, Vector<f32, N>) {
    let mut n = (x * all::<N>(std::f32::consts::FRAC_2_PI) + all::<N>(0.5)).floor();
    let mut r = x - n * all::<N>(1.570_312_5) - n * all::<N>(4.837_513e-4) - n * all::<N>(7.549_79e-8);
    #[unroll]
    for i in 0..N::value().comptime() {
        let angle = x.extract(i);
        if angle.abs() > f32::new(MAX_ANGLE) {
            let (quarters, rest) = reduce_far(angle);
            n.insert(i, quarters);
            r.insert(i, rest);
        }
    }
    let r2 = r * r;
    let odd = comptime!(vec![1.0 / 362_880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0]);
    let even = comptime!(vec![1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5]);
    let sin = r + r * r2 * polynomial::<N>(r2, odd);
    let cos = all::<N>(1.0) + r2 * polynomial::<N>(r2, even);
    // The quadrant, 0 to 3.
    let quadrant = n - all::<N>(4.0) * (n * all::<N>(0.25)).floor();
    let half = (quadrant * all::<N>(0.5)).floor();
    let swap = (quadrant - all::<N>(2.0) * half).greater_than(&all::<N>(0.5));
    let turned = half.greater_than(&all::<N>(0.5));
    let (s, c) = (select_many(swap, cos, sin), select_many(swap, -sin, cos));
    (select_many(turned, -s, s), select_many(turned, -c, c))
}
