//! The peers' tensors under our parameters' paths.

use std::path::PathBuf;

use burn::module::{ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use safetensors::SafeTensors;

use crate::model::Peer;

/// The tensors of one safetensors file.
pub(crate) struct File(Vec<u8>);

impl File {
    pub(crate) fn open(folder: &str, name: &str) -> Self {
        let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
        Self(std::fs::read(root.join(folder).join(name)).expect("golden data"))
    }

    pub(crate) fn bytes(&self, name: &str) -> (Vec<usize>, Vec<[u8; 4]>) {
        let file = SafeTensors::deserialize(&self.0).expect("safetensors");
        let view = file.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        let words = view.data().chunks_exact(4).map(|word| word.try_into().expect("four bytes"));
        (view.shape().to_vec(), words.collect())
    }

    pub(crate) fn floats<const D: usize>(&self, name: &str, device: &Device) -> Tensor<D> {
        let (shape, words) = self.bytes(name);
        let values: Vec<f32> = words.into_iter().map(f32::from_le_bytes).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }

    pub(crate) fn ids(&self, name: &str, device: &Device) -> Tensor<2, Int> {
        let (shape, words) = self.bytes(name);
        let values: Vec<i32> = words.into_iter().map(i32::from_le_bytes).collect();
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

/// Rows of a fused projection of Qwen3-Next (2 key heads of 8, 4 value heads of 8) that are ours at `path`.
pub(crate) fn fused_rows(path: &str) -> Option<(&'static str, Vec<usize>)> {
    let part = path.split_once(".GatedDeltaNet.")?.1;
    let per_head = |size: usize, from: usize, length: usize| -> Vec<usize> {
        (0..2).flat_map(|head| (0..length).map(move |i| head * size + from + i)).collect()
    };
    Some(match part {
        "q_proj.weight" => ("in_proj_qkvz", per_head(48, 0, 8)),
        "k_proj.weight" => ("in_proj_qkvz", per_head(48, 8, 8)),
        "v_proj.weight" => ("in_proj_qkvz", per_head(48, 16, 16)),
        "g_proj.weight" => ("in_proj_qkvz", per_head(48, 32, 16)),
        "b_proj.weight" => ("in_proj_ba", per_head(4, 0, 2)),
        "a_proj.weight" => ("in_proj_ba", per_head(4, 2, 2)),
        "conv.q.weight" => ("conv1d", (0..16).collect()),
        "conv.k.weight" => ("conv1d", (16..32).collect()),
        "conv.v.weight" => ("conv1d", (32..64).collect()),
        _ => return None,
    })
}

/// The peer's tensor for our parameter at `path`, in our layout.
pub(crate) fn peer_tensor<const D: usize>(
    peer: &Peer,
    file: &File,
    prefix: &str,
    path: &str,
    shape: [usize; D],
    device: &Device,
) -> Tensor<D> {
    let mut name = match path {
        "norm.weight" if peer.tied => "model.final_norm.weight".to_owned(),
        "norm.weight" => "model.norm.weight".to_owned(),
        _ => path.to_owned(),
    };
    for (ours, theirs) in peer.names {
        name = name.replace(ours, theirs);
    }
    let fused = fused_rows(path).filter(|_| peer.folder.starts_with("qwen3"));
    let transposed =
        path.contains("_proj.") || path.ends_with("_proj") || path.contains("linear_") || path.contains("output_gate");
    if D != 2 || path.contains("rg_lru.") {
        return file.floats(&format!("{prefix}{name}"), device);
    }
    let (name, rows) = match fused {
        Some((source, rows)) => {
            let layer = path.split('.').nth(1).expect("a layer");
            (format!("model.layers.{layer}.linear_attn.{source}.weight"), Some(rows))
        }
        None => (name, None),
    };
    let (theirs, _) = file.bytes(&format!("{prefix}{name}"));
    let width = theirs[1..].iter().product::<usize>();
    let full = match theirs.len() {
        3 => file.floats::<3>(&format!("{prefix}{name}"), device).reshape([theirs[0], width]),
        _ => file.floats::<2>(&format!("{prefix}{name}"), device),
    };
    let full = match rows {
        Some(rows) => {
            let rows: Vec<i32> = rows.into_iter().map(|row| row as i32).collect();
            full.select(0, Tensor::<1, Int>::from_ints(rows.as_slice(), device))
        }
        None => full,
    };
    let ours = if transposed && !path.contains("bias") { full.transpose() } else { full };
    ours.reshape(shape)
}

pub(crate) struct Load<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) file: &'a File,
    pub(crate) path: Vec<String>,
}

impl ModuleMapper for Load<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let path = self.path.join(".");
        param.map(|old| {
            let new = peer_tensor(self.peer, self.file, "", &path, old.dims(), &old.device());
            assert_eq!(new.dims(), old.dims(), "{path}");
            new.require_grad()
        })
    }
}

pub(crate) struct CompareGradients<'a> {
    pub(crate) peer: &'a Peer,
    pub(crate) file: &'a File,
    pub(crate) gradients: &'a Gradients,
    pub(crate) path: Vec<String>,
    pub(crate) worst: (f32, String),
    pub(crate) count: usize,
}

impl ModuleVisitor for CompareGradients<'_> {
    fn enter_module(&mut self, name: &str, _: &str) {
        self.path.push(name.to_owned());
    }

    fn exit_module(&mut self, _: &str, _: &str) {
        self.path.pop();
    }

    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let path = self.path.join(".");
        let ours = param.val().grad(self.gradients).unwrap_or_else(|| panic!("{path} has no gradient"));
        let theirs = peer_tensor(self.peer, self.file, "grad.", &path, ours.dims(), &ours.device());
        // A gradient that is a cancelled sum has the rounding of its terms, in the peer's f32 as in ours.
        let size = theirs.clone().abs().max().into_scalar::<f32>().max(1e-2);
        let error = (ours - theirs).abs().max().into_scalar::<f32>() / size;
        self.count += 1;
        if error > self.worst.0 {
            self.worst = (error, path);
        }
    }
}
