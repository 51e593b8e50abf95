//! Sums over a few rows, in a fixed order.

use cubecl::calculate_cube_count_elemwise;
use cubecl::client::Client;
use cubecl::ir::{AddressType, ElemType};
use cubecl::prelude::*;

use super::buffer::{Buffer, Storage};

/// Rows that one unit adds.
const SPAN: usize = 128;

/// `out[o, i] = sum_j x[o span + j, i]`, one unit per element.
#[cube(launch, address_type = "dynamic")]
fn sum_kernel<O: Float>(
    x: &[f32],
    out: &mut [O],
    rows: usize,
    span: usize,
    inner: usize,
    #[define(O)] _storage: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at >= rows.div_ceil(span) * inner {
        terminate!();
    }
    let (first, col) = ((at / inner) * span, at % inner);
    let mut sum = f32::new(0.0);
    for j in 0..span {
        if first + j < rows {
            sum += x[(first + j) * inner + col];
        }
    }
    out[at] = O::cast_from(sum);
}

/// Sums each `span` rows of a `[rows, inner]` tensor in f32.
pub(crate) fn sum_rows(client: &Client, x: &Buffer, span: usize, inner: usize, storage: Storage) -> Buffer {
    let rows = x.len / inner;
    let len = rows.div_ceil(span) * inner;
    let out = Buffer::output(client, storage, len);
    let dim = CubeDim::new_1d(64);
    let count = calculate_cube_count_elemwise(client, len, dim);
    let address = if x.len > i32::MAX as usize { AddressType::U64 } else { AddressType::U32 };
    sum_kernel::launch(client, count, dim, address, x.arg(), out.arg(), rows, span, inner, storage.elem_type());
    out
}

/// Sums all rows of a `[rows, inner]` tensor, in spans and spans of spans.
pub(crate) fn sum_all_rows(client: &Client, x: Buffer, inner: usize) -> Buffer {
    let mut x = x;
    while x.len > inner {
        x = sum_rows(client, &x, SPAN, inner, Storage::F32);
    }
    x
}
