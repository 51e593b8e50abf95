//! How a device computes products, and what its cubes may ask for.

use cubecl::ir::ElemType;
use cubecl::ir::features::MmaConfig;
use cubecl::prelude::{Scalar, tf32};

use crate::Client;
use crate::buffer::Storage;
use crate::tile::{BLOCK, Engine, WARP, depth};

/// Shared memory that a cube asks for at most: two or more cubes fit one multiprocessor of the larger devices.
pub(crate) const SHARED_MEMORY: usize = 112 << 10;

/// Units of planes on matrix units: one for each token at least.
pub(crate) fn planes(plane: usize, chunk: usize, block: usize) -> usize {
    plane * (chunk * block / (2 * BLOCK * BLOCK)).clamp(1, 8).max(chunk / plane)
}

/// Matrix units compute with operands of 16 bits, or with tf32 where it is allowed; f32 tensors else keep their precision
/// in registers.
pub(crate) fn engine(client: &Client, storage: Storage) -> Engine {
    let properties = client.properties();
    let (plane_min, plane) = (properties.hardware.plane_size_min, properties.hardware.plane_size_max);
    let tf32 = storage == Storage::F32;
    let operand = if tf32 { tf32::elem_type_native() } else { storage.elem_type() };
    let wanted = MmaConfig {
        a_type: operand,
        b_type: operand,
        cd_type: Storage::F32.elem_type(),
        m: BLOCK as u32,
        n: BLOCK as u32,
        k: depth(tf32) as u32,
    };
    let narrow = !tf32 || client.options().tf32;
    let known = MmaConfig { n: 8, ..wanted };
    let matmul = &properties.features.matmul;
    let warps = plane_min == plane && plane as usize == WARP;
    if !tf32 && warps && matmul.mma.contains(&known) && matmul.ldmatrix.contains(&operand) {
        Engine::Mma
    } else if narrow && plane_min == plane && matmul.cmma.contains(&wanted) {
        Engine::Matrix { plane: plane as usize, tf32 }
    } else {
        registers(client)
    }
}

/// The engine that runs everywhere.
pub(crate) fn registers(client: &Client) -> Engine {
    // Planes of 8 are the vectors of a CPU, whose compiler takes minutes over unrolled blocks.
    let large = client.properties().hardware.plane_size_max > 8;
    Engine::Registers { side: if large { 4 } else { 1 } }
}

/// How operands of products are kept in memory, and their type in kernels.
pub(crate) fn operands(engine: Engine, storage: Storage) -> (Storage, ElemType) {
    match engine {
        Engine::Registers { .. } => (Storage::F32, Storage::F32.elem_type()),
        Engine::Matrix { tf32: true, .. } => (Storage::F32, tf32::elem_type_native()),
        Engine::Matrix { .. } | Engine::Mma => (storage, storage.elem_type()),
    }
}

/// Launches a kernel on `$cubes` cubes of as many units as the blueprint says. Software drivers compile the checked kernels
/// faster; elsewhere a check at every access would cost.
macro_rules! launch {
    ($on:ident, $blueprint:expr, $($kernel:ident)::+, $cubes:expr, $($arg:expr),+ $(,)?) => {
        let units = cubecl::prelude::CubeDim::new_1d($blueprint.units as u32);
        if $blueprint.engine.in_software() {
            $($kernel)::+::launch($on.client, $cubes, units, $on.address, $on.vector, $($arg),+);
        } else {
            // Safety: the kernels stay within the rows and features that the sizes describe, and the buffers have those sizes.
            unsafe { $($kernel)::+::launch_unchecked($on.client, $cubes, units, $on.address, $on.vector, $($arg),+) };
        }
    };
}
pub(crate) use launch;
