//! The element types that tensors may have in memory; arithmetic is always f32.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// A storage type of the kernels: `f32`, `bf16` or `f16`.
pub trait Element: Copy + Send + Sync + Default + 'static {
    /// The type's name in messages.
    const NAME: &'static str;
    /// Widens a slice. Both slices have the same length.
    fn to_f32_slice(src: &[Self], dst: &mut [f32]);
    /// Rounds a slice to nearest even. Both slices have the same length.
    fn from_f32_slice(src: &[f32], dst: &mut [Self]);
    /// Widens one value.
    fn to_f32(self) -> f32;
    /// Rounds one value to nearest even.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    fn to_f32_slice(src: &[Self], dst: &mut [f32]) {
        dst.copy_from_slice(src);
    }
    fn from_f32_slice(src: &[f32], dst: &mut [Self]) {
        dst.copy_from_slice(src);
    }
    fn to_f32(self) -> f32 {
        self
    }
    fn from_f32(value: f32) -> Self {
        value
    }
}

macro_rules! half_element {
    ($ty:ty, $name:literal) => {
        impl Element for $ty {
            const NAME: &'static str = $name;
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
                <$ty>::from_f32(value)
            }
        }
    };
}
half_element!(bf16, "bf16");
half_element!(f16, "f16");
