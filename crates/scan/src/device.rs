//! Devices by name.

use burn::tensor::{Device, DeviceType};

/// A name for which there is no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The name means nothing.
    #[error("no device is called `{name}`; there are cpu, gpu, {}, and all but cpu take an index, as in `gpu:1`", BACKENDS.join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// The backend is a feature that this build lacks.
    #[error("this build has no backend for `{name}`; build it with `--features {feature}`")]
    NotCompiled {
        /// The name.
        name: String,
        /// The feature.
        feature: String,
    },
    /// The backend finds no such device on this machine.
    #[error("this machine has no device `{name}`; the backend finds {found}")]
    Absent {
        /// The name.
        name: String,
        /// How many devices the backend finds.
        found: usize,
    },
}

/// GPU backends, the preferred first; each is called as the feature that compiles it in.
const BACKENDS: [&str; 6] = ["cuda", "rocm", "metal", "vulkan", "webgpu", "wgpu"];

fn compiled(backend: &str) -> Option<DeviceType> {
    match backend {
        #[cfg(feature = "cuda")]
        "cuda" => Some(DeviceType::Cuda),
        #[cfg(feature = "rocm")]
        "rocm" => Some(DeviceType::Rocm),
        #[cfg(feature = "metal")]
        "metal" => Some(DeviceType::Metal),
        #[cfg(feature = "vulkan")]
        "vulkan" => Some(DeviceType::Vulkan),
        #[cfg(feature = "webgpu")]
        "webgpu" => Some(DeviceType::WebGpu),
        #[cfg(feature = "wgpu")]
        "wgpu" => Some(DeviceType::Wgpu),
        _ => None,
    }
}

/// The GPUs of this machine, as the first of this build's backends sees them that sees any. A build without the feature
/// of a GPU backend has none.
pub fn gpus() -> Vec<Device> {
    let found = BACKENDS.into_iter().filter_map(compiled).map(|backend| Device::enumerate(backend).into_vec());
    found.into_iter().find(|devices| !devices.is_empty()).unwrap_or_default()
}

/// The device of a name: `cpu`, `gpu` (the first of [`gpus`]), or a backend: `cuda`, `rocm`, `metal`, `vulkan`, `webgpu`,
/// `wgpu` (WGSL, on whatever graphics API there is). All but `cpu` take an index: `gpu:0`, `cuda:1`.
///
/// # Errors
/// A name that means nothing, a backend that is not compiled in, a device that the machine lacks.
///
/// ```
/// assert_eq!(thalweg_scan::device("cpu")?, burn::tensor::Device::flex());
/// # Ok::<(), thalweg_scan::DeviceError>(())
/// ```
pub fn device(name: &str) -> Result<Device, DeviceError> {
    let unknown = || DeviceError::Unknown { name: name.into() };
    if name == "cpu" {
        return Ok(Device::flex());
    }
    let (backend, index) = match name.split_once(':') {
        Some((backend, index)) => (backend, index.parse().map_err(|_| unknown())?),
        None => (name, 0usize),
    };
    let missing = |feature: &str| DeviceError::NotCompiled { name: name.into(), feature: feature.into() };
    let found = match compiled(backend) {
        Some(devices) => Device::enumerate(devices).into_vec(),
        None if backend == "gpu" && BACKENDS.into_iter().all(|backend| compiled(backend).is_none()) => {
            return Err(missing("cuda` or `--features wgpu"));
        }
        None if backend == "gpu" => gpus(),
        None if BACKENDS.contains(&backend) => return Err(missing(backend)),
        None => return Err(unknown()),
    };
    let count = found.len();
    found.into_iter().nth(index).ok_or_else(|| DeviceError::Absent { name: name.into(), found: count })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_device_say_why() {
        let error = |name: &str| device(name).unwrap_err().to_string();
        for name in ["", "abacus", "gpu:", "gpu:x", "cuda:-1", "cpu:0"] {
            assert_eq!(device(name), Err(DeviceError::Unknown { name: name.into() }));
        }
        assert!(error("abacus").contains("there are cpu, gpu, cuda, rocm"));
        for name in BACKENDS.into_iter().filter(|name| compiled(name).is_none()) {
            assert!(error(&format!("{name}:1")).ends_with(&format!("build it with `--features {name}`")));
        }
        match compiled("wgpu") {
            Some(_) => assert!(error("wgpu:99").starts_with("this machine has no device `wgpu:99`")),
            None => assert!(error("gpu").contains("`--features cuda` or `--features wgpu`")),
        }
    }
}
