//! Sums over a few rows, in a fixed order.

use crate::Client;
use cubecl::ir::ElemType;
use cubecl::prelude::*;

use crate::buffer::{Buffer, Storage};
use crate::device::{address_type, grid};
use thalweg_kernels::Error;

const UNITS: usize = 64;

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
pub(crate) fn sum_rows(
    client: &Client,
    x: &Buffer,
    span: usize,
    inner: usize,
    storage: Storage,
) -> Result<Buffer, Error> {
    let rows = x.len / inner;
    let len = rows.div_ceil(span) * inner;
    let out = Buffer::output(client, storage, len);
    let address = address_type(client, storage, [x.len])?;
    let cubes = grid(client, len.div_ceil(UNITS))?;
    let dim = CubeDim::new_1d(UNITS as u32);
    sum_kernel::launch(client, cubes, dim, address, x.arg(), out.arg(), rows, span, inner, storage.elem_type());
    Ok(out)
}

/// Sums all rows of a `[rows, inner]` tensor, in spans and spans of spans.
pub(crate) fn sum_all_rows(client: &Client, mut x: Buffer, inner: usize) -> Result<Buffer, Error> {
    while x.len > inner {
        x = sum_rows(client, &x, SPAN, inner, Storage::F32)?;
    }
    Ok(x)
}
