//! Tensors in a device's memory.

use cubecl::ir::ElemType;
use cubecl::prelude::{BufferArg, Scalar};
use cubecl::server::Handle;
use half::{bf16, f16};

use thalweg_kernels::{Element, ElementKind, Error};

use crate::Client;

/// The element types that a tensor may have on a device; arithmetic is f32 except inside tensor-core products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Storage {
    /// 32 bits.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl Storage {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Storage::F32 => 4,
            Storage::Bf16 | Storage::F16 => 2,
        }
    }

    /// CubeCL's name of the type.
    pub fn elem_type(self) -> ElemType {
        match self {
            Storage::F32 => f32::elem_type_native(),
            Storage::Bf16 => bf16::elem_type_native(),
            Storage::F16 => f16::elem_type_native(),
        }
    }

    /// The storage type of a Rust element.
    pub fn of<E: Element>() -> Self {
        match E::KIND {
            ElementKind::F32 => Storage::F32,
            ElementKind::Bf16 => Storage::Bf16,
            ElementKind::F16 => Storage::F16,
        }
    }
}

/// A contiguous row-major tensor on a device. Cloning shares the memory.
#[derive(Debug, Clone)]
pub struct Buffer {
    /// CubeCL's handle.
    pub handle: Handle,
    /// Element type.
    pub storage: Storage,
    /// Elements.
    pub len: usize,
}

/// Elements of a tensor that stands for none: at least one vector.
const ABSENT: usize = 8;

impl Buffer {
    /// Copies elements to the device.
    pub fn from_slice<E: Element + bytemuck::Pod>(client: &Client, data: &[E]) -> Self {
        let handle = client.create_from_slice(bytemuck::cast_slice(data));
        Self { handle, storage: Storage::of::<E>(), len: data.len() }
    }

    /// A table of numbers.
    pub(crate) fn table(client: &Client, data: &[u32]) -> Self {
        Self { handle: client.create_from_slice(bytemuck::cast_slice(data)), storage: Storage::F32, len: data.len() }
    }

    /// Stands for a tensor that is absent: never read, so nothing is copied to the device for it.
    pub(crate) fn absent(client: &Client) -> Self {
        Self::output(client, Storage::F32, ABSENT)
    }

    /// Memory for an output: its elements are arbitrary.
    pub fn output(client: &Client, storage: Storage, len: usize) -> Self {
        let handle = if client.options().poison_outputs {
            client.create_from_slice(&vec![0xFF; len * storage.size()])
        } else {
            client.empty(len * storage.size())
        };
        Self { handle, storage, len }
    }

    /// Copies the elements back, waiting for all kernels that write them.
    ///
    /// # Errors
    /// [`Error::Value`] if `E` is not the buffer's element type, [`Error::Device`] if the device failed.
    pub fn read<E: Element + bytemuck::Pod>(&self, client: &Client) -> Result<Vec<E>, Error> {
        if Storage::of::<E>() != self.storage {
            let found = format!("{:?}", self.storage);
            return Err(Error::Value { argument: "buffer", found, expected: E::NAME });
        }
        let bytes = client.read_one(self.handle.clone()).map_err(|e| Error::Device { reason: e.to_string() })?;
        Ok(bytemuck::pod_collect_to_vec(&bytes[..self.len * self.storage.size()]))
    }

    /// The buffer as an argument of a kernel.
    pub(crate) fn arg(&self) -> BufferArg {
        // Safety: `len` elements were allocated.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len) }
    }

    /// The same in words of `elements` each, which divide the buffer.
    pub(crate) fn words(&self, elements: usize) -> BufferArg {
        // Safety: `len` elements were allocated.
        unsafe { BufferArg::from_raw_parts(self.handle.clone(), self.len / elements) }
    }

    pub(crate) fn check(&self, argument: &'static str, storage: Storage, shape: &[usize]) -> Result<(), Error> {
        Error::check_len(argument, self.len, shape)?;
        if self.storage != storage {
            let found = format!("a {:?} tensor", self.storage);
            let expected = match storage {
                Storage::F32 => "f32",
                Storage::Bf16 => "bf16",
                Storage::F16 => "f16",
            };
            return Err(Error::Value { argument, found, expected });
        }
        Ok(())
    }
}
