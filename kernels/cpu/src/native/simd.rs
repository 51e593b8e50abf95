//! Element-wise loops on slices, compiled for the vector unit found at run time.
//!
//! Each body is an ordinary loop; [`vectorize`] runs it inside a function compiled for AVX-512, AVX2, NEON or the
//! baseline, and the compiler turns it into vector code.

use crate::Element;
use pulp::{Arch, Simd, WithSimd};
use std::sync::OnceLock;

/// The best vector unit of this machine, or the lesser one that the environment variable `THALWEG_SIMD` names: `avx2` or
/// `scalar`. So one machine can test and time what others run.
pub(crate) fn arch() -> Arch {
    static ARCH: OnceLock<Arch> = OnceLock::new();
    *ARCH.get_or_init(|| match std::env::var("THALWEG_SIMD").as_deref() {
        Ok("scalar") => Arch::Scalar,
        #[cfg(target_arch = "x86_64")]
        Ok("avx2") => pulp::x86::V3::try_new().map_or(Arch::Scalar, Arch::V3),
        _ => Arch::new(),
    })
}

/// Whether the kernels use AVX2 and what came with it, or more.
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx2() -> bool {
    matches!(arch(), Arch::V3(_) | Arch::V4(_))
}

/// The vector unit that the kernels use: `avx512`, `avx2`, `neon`, `scalar`, or `other`. The environment variable
/// `THALWEG_SIMD` may name a lesser one than the machine has (`avx2` or `scalar`; anything else is ignored).
pub fn vector_unit() -> &'static str {
    match arch() {
        #[cfg(target_arch = "x86_64")]
        Arch::V4(_) => "avx512",
        #[cfg(target_arch = "x86_64")]
        Arch::V3(_) => "avx2",
        #[cfg(target_arch = "aarch64")]
        Arch::Neon(_) => "neon",
        Arch::Scalar => "scalar",
        _ => "other",
    }
}

/// Runs `body` compiled for [`arch`]. The closure must be `#[inline(always)]`.
#[inline(always)]
pub(crate) fn vectorize<R>(body: impl FnOnce() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnOnce() -> R> WithSimd for Body<F> {
        type Output = R;
        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> R {
            (self.0)()
        }
    }
    arch().dispatch(Body(body))
}

/// [`Element::to_f32_slice`] in vector code, for callers that are not inside of [`vectorize`].
pub(crate) fn widen<E: Element>(src: &[E], dst: &mut [f32]) {
    match E::as_f32_slice(src) {
        Some(src) => dst.copy_from_slice(src),
        None => vectorize(
            #[inline(always)]
            || E::to_f32_slice(src, dst),
        ),
    }
}

/// [`Element::from_f32_slice`] in vector code, for callers that are not inside of [`vectorize`].
pub(crate) fn round<E: Element>(src: &[f32], dst: &mut [E]) {
    vectorize(
        #[inline(always)]
        || E::from_f32_slice(src, dst),
    );
}

/// `a * b + c`, rounded once where vector units do that: on others a call of the mathematical library would take its place.
#[inline(always)]
pub(crate) fn mul_add(a: f32, b: f32, c: f32) -> f32 {
    if cfg!(any(target_arch = "x86_64", target_arch = "aarch64")) { a.mul_add(b, c) } else { a * b + c }
}

/// The polynomial with these coefficients, the highest first.
#[inline(always)]
fn polynomial<const N: usize>(x: f32, coefficients: [f32; N]) -> f32 {
    let mut sum = coefficients[0];
    for c in &coefficients[1..] {
        sum = mul_add(sum, x, *c);
    }
    sum
}

/// `(e^r - 1) / r` for `|r| <= ln 2 / 2`: the polynomial of this degree with the least relative error there, 1.8e-8 (Taylor's
/// has 4e-7), among those that are 1 at 0.
const EXPM1_OVER_R: [f32; 6] = [1.388_251e-3, 8.366_58e-3, 4.166_72e-2, 0.166_665_43, 0.499_999_97, 1.0];

/// `(e^x, e^x - 1)` for `x <= 88`, 2 and 4 ulp; arguments below -87.3 give `(0, -1)` (gates of -1e4 and -inf are ordinary
/// inputs). NaN stays NaN.
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`, and `e^x = 2^n (1 + q)` with `q = e^r - 1`. Near 0, where `e^x - 1` must keep its
/// digits, `n` is 0.
#[inline(always)]
pub(crate) fn exp_and_expm1(x: f32) -> (f32, f32) {
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    // Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the mantissa.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -87.3 { -87.3 } else { x };
    let shifted = mul_add(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add(-n, LN2_LO, mul_add(-n, LN2_HI, clamped));
    let q = r * polynomial(r, EXPM1_OVER_R);
    let scale = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < -87.3 { (0.0, -1.0) } else { (mul_add(scale, q, scale), mul_add(scale, q, scale - 1.0)) }
}

/// The first of [`exp_and_expm1`].
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    exp_and_expm1(x).0
}

/// The logistic function `1 / (1 + e^-x)` for any `x`; the exponential's argument is never positive.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    let e = exp(-x.abs());
    (if x >= 0.0 { 1.0 } else { e }) / (1.0 + e)
}

/// `x s(x)` and `s(x)` of the logistic function: 0 and 0 at minus infinity, its limits.
#[inline(always)]
pub(crate) fn silu(x: f32) -> (f32, f32) {
    let s = sigmoid(x);
    // Of minus infinity times 0 nothing would be left.
    ((if x < f32::MIN { f32::MIN } else { x }) * s, s)
}

/// `x s(x)` and its slope, which is 0 at minus infinity and 1 at infinity.
#[inline(always)]
pub(crate) fn silu_with_slope(x: f32) -> (f32, f32) {
    let (value, s) = silu(x);
    (value, s + x.clamp(f32::MIN, f32::MAX) * s * (1.0 - s))
}

/// Up to here [`sin_cos`] is accurate; far beyond, what it returns is not even bounded.
pub(crate) const MAX_ANGLE: f32 = 1e4;

/// Sine and cosine, error below 1.2e-7 for `|x| <= MAX_ANGLE`.
///
/// `x = n pi / 2 + r` with `|r| <= pi / 4`. The first two parts of `pi / 2` have 8 and 11 bits, so that their products
/// with `n < 2^13` and the differences are exact.
#[inline(always)]
pub(crate) fn sin_cos(x: f32) -> (f32, f32) {
    const HALF_PI: [f32; 3] = [1.570_312_5, 4.837_513e-4, 7.549_79e-8];
    const ROUND: f32 = 12_582_912.0;
    let shifted = mul_add(x, std::f32::consts::FRAC_2_PI, ROUND);
    let n = shifted - ROUND;
    let r = mul_add(-n, HALF_PI[2], mul_add(-n, HALF_PI[1], mul_add(-n, HALF_PI[0], x)));
    let r2 = r * r;
    let sin = polynomial(r2, [1.0 / 362_880.0, -1.0 / 5040.0, 1.0 / 120.0, -1.0 / 6.0]);
    let sin = mul_add(r * r2, sin, r);
    let cos = polynomial(r2, [1.0 / 40320.0, -1.0 / 720.0, 1.0 / 24.0, -0.5, 1.0]);
    let quadrant = shifted.to_bits();
    let (sin, cos) = if quadrant & 1 == 0 { (sin, cos) } else { (cos, sin) };
    let sign = |x: f32, bit: u32| f32::from_bits(x.to_bits() ^ ((bit & 2) << 30));
    (sign(sin, quadrant), sign(cos, quadrant.wrapping_add(1)))
}

/// Sums of [`dot`] that run side by side.
const LANES: usize = 16;

/// The lanes by `op`, half with half: shuffles of vectors, where one lane after the other would wait for each.
#[inline(always)]
pub(crate) fn reduce<const N: usize>(mut lanes: [f32; N], op: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = N / 2;
    while half > 0 {
        for i in 0..half {
            lanes[i] = op(lanes[i], lanes[i + half]);
        }
        half /= 2;
    }
    lanes[0]
}

/// `<a, b>`, summed in a fixed order; to be called inside of [`vectorize`].
#[inline(always)]
pub(crate) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let (a, a_rest) = a.as_chunks::<LANES>();
    let (b, b_rest) = b.as_chunks::<LANES>();
    let mut lanes = [0.0; LANES];
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            lanes[i] = mul_add(a[i], b[i], lanes[i]);
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    reduce(lanes, |x, y| x + y) + rest
}

/// `dst[j, i] = src[i, j]` for an `[rows, cols]` block, in 8x8 squares.
pub(crate) fn transpose(src: &[f32], src_stride: usize, dst: &mut [f32], dst_stride: usize, rows: usize, cols: usize) {
    if rows == 0 || cols == 0 {
        return;
    }
    assert!(src.len() >= (rows - 1) * src_stride + cols && dst.len() >= (cols - 1) * dst_stride + rows);
    let (full_rows, full_cols) = (rows / 8 * 8, cols / 8 * 8);
    // Safety: the squares lie inside both blocks, checked above.
    unsafe { squares(src.as_ptr(), src_stride, dst.as_mut_ptr(), dst_stride, full_rows, full_cols) };
    for i in 0..rows {
        let from = if i < full_rows { full_cols } else { 0 };
        for j in from..cols {
            dst[j * dst_stride + i] = src[i * src_stride + j];
        }
    }
}

/// Transposes whole 8x8 squares.
unsafe fn squares(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize, rows: usize, cols: usize) {
    #[cfg(target_arch = "x86_64")]
    if has_avx2() {
        // Safety: the processor has AVX2.
        return unsafe { avx2::squares(src, src_stride, dst, dst_stride, rows, cols) };
    }
    for j in (0..cols).step_by(8) {
        for i in (0..rows).step_by(8) {
            unsafe { square(src.add(i * src_stride + j), src_stride, dst.add(j * dst_stride + i), dst_stride) };
        }
    }
}

/// Transposes 8x8 floats: three rounds of pairwise exchanges of halves, the textbook butterfly.
#[inline(always)]
unsafe fn square(src: *const f32, src_stride: usize, dst: *mut f32, dst_stride: usize) {
    unsafe {
        let mut x = [[0.0f32; 8]; 8];
        for (i, row) in x.iter_mut().enumerate() {
            *row = (src.add(i * src_stride) as *const [f32; 8]).read_unaligned();
        }
        for half in [4, 2, 1] {
            for i in 0..8 {
                if i & half == 0 {
                    for j in 0..8 {
                        if j & half != 0 {
                            let t = x[i][j];
                            x[i][j] = x[i + half][j - half];
                            x[i + half][j - half] = t;
                        }
                    }
                }
            }
        }
        for (i, row) in x.iter().enumerate() {
            (dst.add(i * dst_stride) as *mut [f32; 8]).write_unaligned(*row);
        }
    }
}

/// What turns squares over in registers, with the shuffles named: of the butterfly the compiler makes three times as many.
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2 {
    use std::arch::x86_64::*;

    /// Lines that [`dots`] takes.
    pub const GROUP: usize = 16;

    /// # Safety
    /// As that of [`super::squares`], and the processor has AVX2.
    #[target_feature(enable = "avx2")]
    pub unsafe fn squares(
        src: *const f32,
        src_stride: usize,
        dst: *mut f32,
        dst_stride: usize,
        rows: usize,
        cols: usize,
    ) {
        for j in (0..cols).step_by(8) {
            for i in (0..rows).step_by(8) {
                unsafe {
                    let columns = columns(src.add(i * src_stride + j), src_stride);
                    for (c, column) in columns.into_iter().enumerate() {
                        _mm256_storeu_ps(dst.add((j + c) * dst_stride + i), column);
                    }
                }
            }
        }
    }

    /// The columns of eight rows of eight.
    #[inline]
    #[target_feature(enable = "avx2")]
    unsafe fn columns(src: *const f32, stride: usize) -> [__m256; 8] {
        // Columns `c..c + 4` of rows `r` and `r + 4`: what crosses the halves of a register is loaded to its place.
        let load = |r: usize, c: usize| unsafe {
            let at = src.add(r * stride + c);
            _mm256_insertf128_ps::<1>(_mm256_castps128_ps256(_mm_loadu_ps(at)), _mm_loadu_ps(at.add(4 * stride)))
        };
        let four = |c: usize| {
            let rows = [load(0, c), load(1, c), load(2, c), load(3, c)];
            let (low, high) = (_mm256_unpacklo_ps(rows[0], rows[1]), _mm256_unpackhi_ps(rows[0], rows[1]));
            let (low2, high2) = (_mm256_unpacklo_ps(rows[2], rows[3]), _mm256_unpackhi_ps(rows[2], rows[3]));
            [
                _mm256_shuffle_ps::<0x44>(low, low2),
                _mm256_shuffle_ps::<0xee>(low, low2),
                _mm256_shuffle_ps::<0x44>(high, high2),
                _mm256_shuffle_ps::<0xee>(high, high2),
            ]
        };
        let ([a, b, c, d], [e, f, g, h]) = (four(0), four(4));
        [a, b, c, d, e, f, g, h]
    }

    /// Products of [`GROUP`] lines, which begin every `stride` elements, with each of up to four vectors of one length:
    /// `sums[i][j] = <x_i, line_j>`, each summed in order from 0 with one rounding per product.
    pub fn dots(x: &[&[f32]], lines: &[f32], stride: usize, sums: &mut [[f32; GROUP]]) {
        let length = x.first().map_or(0, |x| x.len());
        assert!(super::has_avx2() && x.len() <= sums.len() && x.iter().all(|x| x.len() == length));
        assert!(lines.len() >= (GROUP - 1) * stride + length);
        // Safety: all reads are inside of the slices, checked above.
        unsafe {
            match x.len() {
                1 => along::<1>(x, lines, stride, length, sums),
                2 => along::<2>(x, lines, stride, length, sums),
                3 => along::<3>(x, lines, stride, length, sums),
                4 => along::<4>(x, lines, stride, length, sums),
                other => unreachable!("{other} vectors"),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    unsafe fn along<const M: usize>(
        x: &[&[f32]],
        lines: &[f32],
        stride: usize,
        length: usize,
        sums: &mut [[f32; GROUP]],
    ) {
        let mut acc = [[_mm256_setzero_ps(); GROUP / 8]; M];
        let whole = length / 8 * 8;
        for p in (0..whole).step_by(8) {
            for half in 0..GROUP / 8 {
                let columns = unsafe { columns(lines.as_ptr().add(8 * half * stride + p), stride) };
                for (u, column) in columns.into_iter().enumerate() {
                    for (acc, x) in acc.iter_mut().zip(x) {
                        let x = _mm256_set1_ps(unsafe { *x.as_ptr().add(p + u) });
                        acc[half] = _mm256_fmadd_ps(x, column, acc[half]);
                    }
                }
            }
        }
        for ((acc, x), sums) in acc.iter().zip(x).zip(sums) {
            for (half, &acc) in acc.iter().enumerate() {
                unsafe { _mm256_storeu_ps(sums.as_mut_ptr().add(8 * half), acc) };
            }
            for (j, sum) in sums.iter_mut().enumerate() {
                for (x, line) in x[whole..].iter().zip(&lines[j * stride + whole..]) {
                    *sum = x.mul_add(*line, *sum);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_accurate_and_total() {
        let mut worst: f64 = 0.0;
        for i in 0..200_000 {
            let x = -87.0 + i as f32 * (175.0 / 200_000.0);
            let want = (x as f64).exp();
            worst = worst.max((exp(x) as f64 - want).abs() / want);
        }
        assert!(worst < 2.5e-7, "{worst}");
        assert_eq!(exp(0.0), 1.0);
        for x in [-88.0, -1e4, f32::NEG_INFINITY] {
            assert_eq!(exp(x), 0.0);
        }
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn sigmoid_has_both_tails() {
        for x in [-100.0f32, -87.0, -20.0, -1.0, -1e-3, 0.0, 0.5, 17.0, 100.0] {
            let want = 1.0 / (1.0 + (-x as f64).exp());
            assert!((sigmoid(x) as f64 - want).abs() <= 3e-7 * want + 1e-38, "{x}");
        }
        assert!(sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn expm1_keeps_small_differences() {
        for i in 0..100_000 {
            let x = -(10f64.powf(i as f64 / 10_000.0 - 8.0)) as f32;
            let want = (x as f64).exp_m1();
            let expm1 = exp_and_expm1(x).1;
            assert!(((expm1 as f64 - want) / want).abs() < 4e-7, "{x}");
        }
        assert_eq!((exp_and_expm1(0.0), exp_and_expm1(f32::NEG_INFINITY)), ((1.0, 0.0), (0.0, -1.0)));
    }

    #[test]
    fn sin_cos_are_accurate_at_large_angles() {
        for i in 0..400_000 {
            let x = ((i as f64 - 200_000.0) * 0.05000123) as f32;
            let ((sin, cos), want) = (sin_cos(x), (x as f64).sin_cos());
            assert!((sin as f64 - want.0).abs() < 1.2e-7 && (cos as f64 - want.1).abs() < 1.2e-7, "{x}");
        }
    }

    #[test]
    fn transposes_any_shape() {
        for (rows, cols) in [(1, 1), (8, 8), (13, 29), (64, 40)] {
            let src: Vec<f32> = (0..rows * cols).map(|i| i as f32).collect();
            let mut dst = vec![0.0; rows * cols];
            transpose(&src, cols, &mut dst, rows, rows, cols);
            for i in 0..rows {
                for j in 0..cols {
                    assert_eq!(dst[j * rows + i], src[i * cols + j]);
                }
            }
        }
    }
}
