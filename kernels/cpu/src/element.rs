//! The element types that tensors may have in memory; arithmetic is always f32.

use crate::native::simd::round;
use half::{bf16, f16, slice::HalfFloatSliceExt};
use rayon::prelude::*;

/// Values that one task rounds.
const BLOCK: usize = 1 << 14;

/// Which [`Element`] a type is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum ElementKind {
    F32,
    Bf16,
    F16,
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
}

/// A storage type of the kernels: `f32`, `bf16` or `f16`, and no other.
pub trait Element: sealed::Sealed + Copy + Send + Sync + Default + 'static {
    /// Which of them it is.
    const KIND: ElementKind;
    /// The type's name in messages.
    const NAME: &'static str;
    /// Widens a slice. Both slices have the same length.
    fn to_f32_slice(src: &[Self], dst: &mut [f32]);
    /// Rounds a slice to nearest even. Both slices have the same length.
    fn from_f32_slice(src: &[f32], dst: &mut [Self]);
    /// Rounds a vector to nearest even; one of f32 is handed back as it is.
    fn from_f32_vec(values: Vec<f32>) -> Vec<Self> {
        let mut rounded = vec![Self::default(); values.len()];
        if values.len() <= BLOCK {
            round(&values, &mut rounded);
            return rounded;
        }
        let blocks = rounded.par_chunks_mut(BLOCK).zip(values.par_chunks(BLOCK));
        blocks.for_each(|(to, from)| round(from, to));
        rounded
    }
    /// The slice itself, where there is nothing to widen.
    fn as_f32_slice(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// Widens one value.
    fn to_f32(self) -> f32;
    /// Rounds one value to nearest even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const KIND: ElementKind = ElementKind::F32;
    const NAME: &'static str = "f32";
    fn to_f32_slice(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn from_f32_slice(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
    fn from_f32_vec(values: Vec<f32>) -> Vec<Self> {
        values
    }
    fn as_f32_slice(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const KIND: ElementKind = ElementKind::Bf16;
    const NAME: &'static str = "bf16";

    // Plain loops, so that they become vector code inside the kernels' own loops.
    #[inline(always)]
    fn to_f32_slice(src: &[Self], dst: &mut [f32]) {
        // Not the type's own method of that name, which makes NaN quiet.
        dst.iter_mut().zip(src).for_each(|(d, s)| *d = Element::to_f32(*s));
    }
    #[inline(always)]
    fn from_f32_slice(src: &[f32], dst: &mut [Self]) {
        dst.iter_mut().zip(src).for_each(|(d, s)| *d = <Self as Element>::from_f32(*s));
    }
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits((self.to_bits() as u32) << 16)
    }
    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7FFF + ((bits >> 16) & 1));
        // A NaN keeps a bit that says so.
        let bits = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
        Self::from_bits((bits >> 16) as u16)
    }
}

impl Element for f16 {
    const KIND: ElementKind = ElementKind::F16;
    const NAME: &'static str = "f16";
    fn to_f32_slice(src: &[Self], dst: &mut [f32]) {
        src.convert_to_f32_slice(dst);
    }
    fn from_f32_slice(src: &[f32], dst: &mut [Self]) {
        dst.convert_from_f32_slice(src);
    }
    fn to_f32(self) -> f32 {
        self.into()
    }
    fn from_f32(value: f32) -> Self {
        <Self>::from_f32(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let halves = (0..=u16::MAX).flat_map(|high| [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| (high, low)));
        for (high, low) in halves {
            let x = f32::from_bits((high as u32) << 16 | low);
            let (mine, theirs) = (<bf16 as Element>::from_f32(x), bf16::from_f32(x));
            assert!(mine.to_bits() == theirs.to_bits() || (mine.is_nan() && x.is_nan()), "{x:e} {mine} {theirs}");
            assert_eq!(Element::to_f32(theirs).to_bits(), bf16::to_f32(theirs).to_bits());
        }
    }
}
