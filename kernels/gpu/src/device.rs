//! What a device can do.

use cubecl::ir::AddressType;
use cubecl::prelude::CubeCount;

use crate::buffer::Storage;
use thalweg_kernels::Error;

use crate::Client;

/// The integers that a kernel indexes buffers of these lengths with: 64 bits only where 32 might not do, for they are
/// slow.
pub(crate) fn address_type(
    client: &Client,
    storage: Storage,
    lengths: impl IntoIterator<Item = usize>,
) -> Result<AddressType, Error> {
    if !client.properties().supports_type(storage.elem_type()) {
        return Err(Error::Device { reason: format!("it has no {storage:?}") });
    }
    let largest = lengths.into_iter().max().unwrap_or(0);
    let wide = largest > u32::MAX as usize / 4 || client.options().wide_addresses;
    let address = if wide { AddressType::U64 } else { AddressType::U32 };
    if !client.properties().supports_address(address) {
        return Err(Error::Device { reason: format!("{largest} elements need 64-bit indices") });
    }
    Ok(address)
}

/// `cubes` cubes, over as many axes as it takes.
pub(crate) fn grid(client: &Client, cubes: usize) -> Result<CubeCount, Error> {
    let (x, y, _) = client.properties().hardware.max_cube_count;
    let columns = cubes.min(x as usize);
    let rows = cubes.div_ceil(columns);
    if rows > y as usize {
        return Err(Error::Device { reason: format!("{cubes} cubes are more than it can launch at once") });
    }
    Ok(CubeCount::Static(columns as u32, rows as u32, 1))
}

/// Elements of a row that a unit reads or writes at a time: 16 bytes of elements of `size`, and less where rows of some width
/// are no multiple of it.
pub(crate) fn vector(size: usize, widths: &[usize]) -> usize {
    let fits = |n: &usize| n * size <= 16 && widths.iter().all(|width| width.is_multiple_of(*n));
    [8, 4, 2].into_iter().find(fits).unwrap_or(1)
}
