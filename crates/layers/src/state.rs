//! What a layer carries from one call to the next, and what can be done with it.
//!
//! Each layer has its own named state struct. All of them are lists of tensors (and a few counters), so that snapshot,
//! fork, rollback, detaching, moving and saving are written once, here.
//!
//! Tensors are shared and copied on write: a snapshot costs nothing until one of its owners goes on.

use std::collections::{BTreeSet, HashMap};

use burn::tensor::{DType, Device, Tensor, TensorData};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::Error;
use crate::state_spec::StateSpec;
use crate::unique_keys::unique_keys;

/// Version of the saved form. It changes when a reader of the old form could misread the new one.
const VERSION: &str = "2";
const FORMAT: &str = "thalweg-state";
/// What the metadata holds besides counters.
const RESERVED: [&str; 4] = ["format", "version", "kind", "spec"];

/// Reads the parts of a state one after the other.
pub trait StateVisitor {
    /// A tensor called `name`.
    fn tensor<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>);
    /// A list of counters called `name`.
    fn counters(&mut self, name: &str, values: &[usize]);
}

/// Replaces the tensors of a state.
pub trait StateMapper {
    /// The replacement of `tensor`, of the same shape.
    fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D>;
}

/// A part of a state: a tensor, counters, or a struct of parts.
pub trait StatePart: Sized {
    /// Shows every tensor and counter to `visitor`; names are prefixed with `name`.
    fn visit<V: StateVisitor>(&self, name: &str, visitor: &mut V);
    /// Passes every tensor through `mapper`.
    fn map<M: StateMapper>(self, mapper: &mut M) -> Self;
    /// Reads the part called `name`.
    fn load(name: &str, saved: &SavedState<'_>) -> Result<Self, Error>;
}

/// The state of one layer.
pub trait LayerState: StatePart + Clone {
    /// Name of the kind of layer, as in a config file.
    const KIND: &'static str;

    /// What the layer that made the state says of it. Other layers refuse the state.
    fn spec(&self) -> &StateSpec;

    /// The tokens that each sequence has seen, of layers that count them.
    fn positions(&self) -> Option<Vec<usize>> {
        struct Positions(Option<Vec<usize>>);
        impl StateVisitor for Positions {
            fn tensor<const D: usize>(&mut self, _: &str, _: &Tensor<D>) {}
            fn counters(&mut self, name: &str, values: &[usize]) {
                if name == "positions" {
                    self.0 = Some(values.to_vec());
                }
            }
        }
        let mut positions = Positions(None);
        self.visit("", &mut positions);
        positions.0
    }

    /// The state as it is now. The same as `clone`: later steps on either do not change the other.
    #[must_use]
    fn snapshot(&self) -> Self {
        self.clone()
    }

    /// A second state that goes its own way from here, for instance to try several continuations of one prompt.
    #[must_use]
    fn fork(&self) -> Self {
        self.clone()
    }

    /// Returns to `snapshot`. A recurrence cannot be run backwards (what the decay has forgotten is gone), so going
    /// back is always to a state that was kept.
    fn rollback(&mut self, snapshot: &Self) {
        *self = snapshot.clone();
    }

    /// The state cut off from the graph of the calls that made it: gradients stop here (truncated backpropagation).
    #[must_use]
    fn detach(self) -> Self {
        struct Detach;
        impl StateMapper for Detach {
            fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
                tensor.detach()
            }
        }
        self.map(&mut Detach)
    }

    /// The state on another device.
    #[must_use]
    fn to_device(self, device: &Device) -> Self {
        struct Move<'a>(&'a Device);
        impl StateMapper for Move<'_> {
            fn tensor<const D: usize>(&mut self, tensor: Tensor<D>) -> Tensor<D> {
                tensor.to_device(self.0)
            }
        }
        self.map(&mut Move(device))
    }

    /// Bytes of memory that the tensors hold.
    fn size_in_bytes(&self) -> usize {
        struct Size(usize);
        impl StateVisitor for Size {
            fn tensor<const D: usize>(&mut self, _: &str, tensor: &Tensor<D>) {
                self.0 += tensor.shape().num_elements() * tensor.dtype().size();
            }
            fn counters(&mut self, _: &str, values: &[usize]) {
                self.0 += size_of_val(values);
            }
        }
        let mut size = Size(0);
        self.visit("", &mut size);
        size.0
    }

    /// The state as a safetensors file in memory. Its metadata holds `format`, `version`, `kind`, `spec` (what the layer
    /// says of the state, as JSON) and the counters.
    ///
    /// # Errors
    /// If a tensor cannot be read from its device or has a type that states do not have.
    fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut writer = Writer::default();
        self.visit("", &mut writer);
        writer.finish(Self::KIND, self.spec())
    }

    /// Reads what [`to_bytes`](Self::to_bytes) wrote. The state fits the layer that made it;
    /// [`SequenceMixer::load_state`](crate::SequenceMixer::load_state) also checks that this is the layer at hand.
    ///
    /// # Errors
    /// If the bytes are truncated, are of another version or of another kind of layer, or if parts are missing, surplus,
    /// named twice, or do not fit the layer that made them or each other.
    fn from_bytes(bytes: &[u8], device: &Device) -> Result<Self, Error> {
        let saved = SavedState::parse(bytes, device)?;
        if saved.kind() != Self::KIND {
            return Err(Error::StateKind { expected: Self::KIND, actual: saved.kind().to_owned() });
        }
        saved.check_names()?;
        let state = Self::load("", &saved)?;
        saved.spec.check(&state)?;
        Ok(state)
    }
}

#[derive(Default)]
struct Writer {
    tensors: Vec<(String, TensorData)>,
    metadata: HashMap<String, String>,
    error: Option<String>,
}

impl StateVisitor for Writer {
    fn tensor<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        match tensor.try_to_data() {
            Ok(data) => self.tensors.push((name.to_owned(), data)),
            Err(error) => self.error = Some(format!("reading `{name}`: {error}")),
        }
    }

    fn counters(&mut self, name: &str, values: &[usize]) {
        let text: Vec<String> = values.iter().map(usize::to_string).collect();
        self.metadata.insert(name.to_owned(), text.join(","));
    }
}

impl Writer {
    fn finish(mut self, kind: &str, spec: &StateSpec) -> Result<Vec<u8>, Error> {
        if let Some(error) = self.error {
            return Err(Error::StateBytes(error));
        }
        for (key, value) in RESERVED.into_iter().zip([FORMAT, VERSION, kind, &spec.to_json()?]) {
            self.metadata.insert(key.to_owned(), value.to_owned());
        }
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, data) in &self.tensors {
            let dtype = match data.dtype() {
                DType::F32 => Dtype::F32,
                DType::BF16 => Dtype::BF16,
                DType::F16 => Dtype::F16,
                DType::F64 => Dtype::F64,
                other => {
                    return Err(Error::StateBytes(format!("`{name}` has type {other:?}, which states do not hold")));
                }
            };
            let view = TensorView::new(dtype, data.shape().to_vec(), data.as_bytes())
                .map_err(|error| Error::StateBytes(format!("`{name}`: {error}")))?;
            views.push((name.as_str(), view));
        }
        safetensors::serialize(views, Some(self.metadata)).map_err(|error| Error::StateBytes(error.to_string()))
    }
}

/// A saved state that is being read.
pub struct SavedState<'a> {
    tensors: SafeTensors<'a>,
    metadata: HashMap<String, String>,
    device: Device,
    spec: StateSpec,
}

impl<'a> SavedState<'a> {
    pub(crate) fn parse(bytes: &'a [u8], device: &Device) -> Result<Self, Error> {
        let bad = |error: safetensors::SafeTensorError| Error::StateBytes(error.to_string());
        let (length, header) = SafeTensors::read_metadata(bytes).map_err(bad)?;
        unique_keys(&bytes[size_of::<u64>()..][..length])
            .map_err(|error| Error::StateBytes(format!("header: {error}")))?;
        let metadata = header.metadata().clone().unwrap_or_default();
        if metadata.get("format").map(String::as_str) != Some(FORMAT) {
            return Err(Error::StateBytes(format!("not a saved state (no `format` {FORMAT})")));
        }
        let version = metadata.get("version").map_or("none", String::as_str);
        if version != VERSION {
            return Err(Error::StateBytes(format!("version {version}, this program reads version {VERSION}")));
        }
        let spec = metadata.get("spec").ok_or_else(|| Error::StateBytes("`spec` is missing".into()))?;
        let spec = StateSpec::from_json(spec)?;
        let kind = metadata.get("kind").map_or("none", String::as_str);
        if kind != spec.kind() {
            return Err(Error::StateBytes(format!("kind {kind}, but `spec` is that of a layer {}", spec.label())));
        }
        Ok(Self { tensors: SafeTensors::deserialize(bytes).map_err(bad)?, metadata, device: device.clone(), spec })
    }

    /// Checks that there is what the layer asks for and nothing else.
    fn check_names(&self) -> Result<(), Error> {
        let tensors = self.tensors.names().into_iter().map(|name| (name, true));
        let counters = self.metadata.keys().map(|name| (name.as_str(), false));
        // In order, so that the same error names the same entry.
        let names: BTreeSet<_> = tensors.chain(counters.filter(|(name, _)| !RESERVED.contains(name))).collect();
        for (name, is_tensor) in names {
            if self.spec.is_tensor(name) != Some(is_tensor) {
                return Err(self.spec.mismatch(name, "present", "absent"));
            }
        }
        let found = |name: &str| self.tensors.names().contains(&name) || self.metadata.contains_key(name);
        match self.spec.names().find(|name| !found(name)) {
            Some(name) => Err(self.spec.mismatch(name, "absent", "present")),
            None => Ok(()),
        }
    }

    pub(crate) fn kind(&self) -> &str {
        self.spec.kind()
    }

    fn has(&self, name: &str) -> bool {
        let inner = format!("{name}.");
        let named = |key: &str| key == name || key.starts_with(&inner);
        self.tensors.names().into_iter().any(named) || self.metadata.keys().any(|key| named(key))
    }

    fn tensor<const D: usize>(&self, name: &str) -> Result<Tensor<D>, Error> {
        let view = self.tensors.tensor(name).map_err(|error| Error::StateBytes(format!("`{name}`: {error}")))?;
        let dtype = match view.dtype() {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::BF16,
            Dtype::F16 => DType::F16,
            Dtype::F64 => DType::F64,
            other => {
                return Err(Error::StateBytes(format!("`{name}` has type {other:?}, which states do not hold")));
            }
        };
        if view.shape().len() != D || view.shape().contains(&0) {
            let expected = format!("{D} axes, none of them empty");
            return Err(self.spec.mismatch(name, format!("{:?}", view.shape()), expected));
        }
        let data = TensorData::from_bytes_vec(view.data().to_vec(), view.shape().to_vec(), dtype);
        Ok(Tensor::from_data(data, (&self.device, dtype)))
    }

    fn counters(&self, name: &str) -> Result<Vec<usize>, Error> {
        let text = self.metadata.get(name).ok_or_else(|| Error::StateBytes(format!("`{name}` is missing")))?;
        let parse = |part: &str| {
            part.parse().map_err(|_| Error::StateBytes(format!("`{name}` is not a list of counters: {text}")))
        };
        text.split(',').filter(|part| !part.is_empty()).map(parse).collect()
    }
}

impl<const D: usize> StatePart for Tensor<D> {
    fn visit<V: StateVisitor>(&self, name: &str, visitor: &mut V) {
        visitor.tensor(name, self);
    }

    fn map<M: StateMapper>(self, mapper: &mut M) -> Self {
        mapper.tensor(self)
    }

    fn load(name: &str, saved: &SavedState<'_>) -> Result<Self, Error> {
        saved.tensor(name)
    }
}

impl StatePart for StateSpec {
    fn visit<V: StateVisitor>(&self, _: &str, _: &mut V) {}

    fn map<M: StateMapper>(self, _: &mut M) -> Self {
        self
    }

    fn load(_: &str, saved: &SavedState<'_>) -> Result<Self, Error> {
        Ok(saved.spec.clone())
    }
}

impl StatePart for Vec<usize> {
    fn visit<V: StateVisitor>(&self, name: &str, visitor: &mut V) {
        visitor.counters(name, self);
    }

    fn map<M: StateMapper>(self, _: &mut M) -> Self {
        self
    }

    fn load(name: &str, saved: &SavedState<'_>) -> Result<Self, Error> {
        saved.counters(name)
    }
}

impl<P: StatePart> StatePart for Option<P> {
    fn visit<V: StateVisitor>(&self, name: &str, visitor: &mut V) {
        if let Some(part) = self {
            part.visit(name, visitor);
        }
    }

    fn map<M: StateMapper>(self, mapper: &mut M) -> Self {
        self.map(|part| part.map(mapper))
    }

    fn load(name: &str, saved: &SavedState<'_>) -> Result<Self, Error> {
        saved.has(name).then(|| P::load(name, saved)).transpose()
    }
}

pub(crate) fn join(outer: &str, name: &str) -> String {
    if outer.is_empty() { name.to_owned() } else { format!("{outer}.{name}") }
}

/// Makes a struct of parts a [`StatePart`], and a [`LayerState`] with a field `spec` if a kind is given.
macro_rules! state_parts {
    ($name:ident { $($field:ident),+ $(,)? }) => {
        impl $crate::state::StatePart for $name {
            fn visit<V: $crate::state::StateVisitor>(&self, name: &str, visitor: &mut V) {
                $($crate::state::StatePart::visit(
                    &self.$field,
                    &$crate::state::join(name, stringify!($field)),
                    visitor,
                );)+
            }

            fn map<M: $crate::state::StateMapper>(self, mapper: &mut M) -> Self {
                Self { $($field: $crate::state::StatePart::map(self.$field, mapper),)+ }
            }

            fn load(
                name: &str,
                saved: &$crate::state::SavedState<'_>,
            ) -> Result<Self, $crate::Error> {
                Ok(Self { $($field: $crate::state::StatePart::load(
                    &$crate::state::join(name, stringify!($field)),
                    saved,
                )?,)+ })
            }
        }
    };
    ($name:ident as $kind:literal { $($field:ident),+ $(,)? }) => {
        $crate::state::state_parts!($name { $($field),+, spec });
        impl $crate::state::LayerState for $name {
            const KIND: &'static str = $kind;

            fn spec(&self) -> &$crate::StateSpec {
                &self.spec
            }
        }
    };
}
pub(crate) use state_parts;
