//! The first GPU: its client, its ceilings, tensors to and from its memory.

use crate::{Ceilings, Dtype, Error};
use cubecl::Device;
use cubecl::std::throughput::measure_peak_throughput;
use cubecl::throughput::{MemoryAccess, MemorySpec, ThroughputKey, ThroughputMode, compute_throughput_key};
use half::bf16;
use thalweg_gpu::{Buffer, Client, Storage};

/// A client of the first device that the runtimes of this build show.
pub(crate) fn client() -> Result<Client, Error> {
    let device = Device::enumerate_all().into_iter().next();
    let device = device.ok_or_else(|| Error::argument("path", "is `gpu`, and there is none on this machine"))?;
    Ok(device.client().into())
}

/// Bytes that a copy moves, read and write together: within a second-level cache, and beyond it.
const COPIES: [u64; 2] = [8 << 20, 1 << 30];

/// What CubeCL's own probes reach, with the instructions that CubeCL kernels have: products on matrix units where the
/// element type has them, and copies.
pub(crate) fn ceilings(client: &Client, dtype: Dtype) -> Result<Ceilings, Error> {
    let failed = |e| thalweg_kernels::Error::Device { reason: format!("no ceiling could be measured: {e}") };
    let f32 = Storage::F32.elem_type();
    let direct = compute_throughput_key(None, f32, f32);
    let units = compute_throughput_key(Some((16, 16, 16)), Storage::Bf16.elem_type(), f32);
    let product = match dtype {
        Dtype::Bf16 => measure_peak_throughput(client, units).or_else(|_| measure_peak_throughput(client, direct)),
        Dtype::F32 => measure_peak_throughput(client, direct),
    };
    let copy = |bytes: u64| -> Result<(usize, f64), Error> {
        let key = ThroughputKey { mode: ThroughputMode::Memory(MemorySpec::new(MemoryAccess::Copy, bytes)) };
        let rate = measure_peak_throughput(client, key).map_err(failed)?.bytes_per_s(&key);
        Ok((bytes as usize, rate / 1e9))
    };
    Ok(Ceilings {
        threads: 0,
        device: format!("{}, {dtype}", client.properties().identity.name),
        product: product.map_err(failed)?.ops_per_s() / 1e9,
        copies: COPIES.into_iter().map(copy).collect::<Result<_, _>>()?,
    })
}

/// Copies a tensor to the device, in the element type.
pub(crate) fn upload(client: &Client, dtype: Dtype, values: &[f32]) -> Buffer {
    match dtype {
        Dtype::F32 => Buffer::from_slice(client, values),
        Dtype::Bf16 => Buffer::from_slice(client, &crate::ops::narrow::<bf16>(values)),
    }
}

/// Copies a tensor back.
pub(crate) fn download(client: &Client, buffer: &Buffer) -> Result<Vec<f64>, Error> {
    Ok(match buffer.storage {
        Storage::F32 => crate::ops::widen(&buffer.read::<f32>(client)?),
        Storage::Bf16 => crate::ops::widen(&buffer.read::<bf16>(client)?),
        Storage::F16 => crate::ops::widen(&buffer.read::<half::f16>(client)?),
    })
}

/// Waits until the device has done all that was launched.
pub(crate) fn wait(client: &Client) -> Result<(), Error> {
    let done = cubecl::future::block_on(client.sync());
    Ok(done.map_err(|e| thalweg_kernels::Error::Device { reason: e.to_string() })?)
}
