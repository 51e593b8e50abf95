//! Which states a layer takes: those that it made, whole.
//!
//! Each layer describes its state once, where it is built: its options and the entries with their shapes. A state carries
//! the description of the layer that made it, also in its saved form, and one function holds the two against each other.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::tensor::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::mixer::Site;
use crate::state::{LayerState, StateVisitor};
use crate::{Context, Error};

/// Positions up to here are exact in the f64 angles of a rotary embedding, and cannot overflow in one call.
const LAST_POSITION: u64 = 1 << 53;

/// What a layer says of the states that it takes. Clones are shared.
#[derive(Debug, Clone)]
pub struct StateSpec(Arc<Description>);

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Description {
    kind: String,
    layer: usize,
    hidden_size: usize,
    /// Name and value as in a config file: two layers that differ in one do not continue each other's states.
    options: BTreeMap<String, String>,
    entries: BTreeMap<String, Entry>,
}

/// What stands under one name of a state.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    /// A tensor `[sequences, ..]`, f32 (or f64 in a model of f64), with the axes after the first.
    Recurrent(Vec<usize>),
    /// A tensor `[sequences, slots, ..]` of any float type; slots as many as `window` and the positions ask for.
    Cache { window: Option<usize>, features: Vec<usize> },
    /// The tokens that each sequence has seen.
    Positions,
    /// Where the sequences of a packed call lie in a cache, or nothing.
    Packed,
}

/// What a state has under one name.
enum Found {
    Tensor { shape: Vec<usize>, dtype: DType, device: Device },
    Counters(Vec<usize>),
}

/// What a call says of its state.
struct Call {
    sequences: usize,
    dtype: DType,
    device: Device,
}

impl StateSpec {
    /// Of a layer with `config`, without entries.
    pub(crate) fn new<S: LayerState>(config: &impl Serialize, site: &Site) -> Self {
        let options = match serde_json::to_value(config) {
            Ok(serde_json::Value::Object(fields)) => fields.into_iter().map(|(k, v)| (k, v.to_string())).collect(),
            _ => BTreeMap::new(),
        };
        let (layer, hidden_size) = (site.layer, site.hidden_size);
        let description = Description { kind: S::KIND.into(), layer, hidden_size, options, entries: BTreeMap::new() };
        Self(Arc::new(description)).option("layers", site.layers).option("norm_eps", site.norm_eps)
    }

    /// The value of an option whose default depends on others, so that both spellings are the same layer.
    pub(crate) fn option(mut self, name: &str, value: impl ToString) -> Self {
        Arc::make_mut(&mut self.0).options.insert(name.into(), value.to_string());
        self
    }

    fn entry(mut self, name: &str, entry: Entry) -> Self {
        Arc::make_mut(&mut self.0).entries.insert(name.into(), entry);
        self
    }

    /// With a tensor `[sequences, ..shape]`.
    pub(crate) fn recurrent(self, name: &str, shape: impl Into<Vec<usize>>) -> Self {
        self.entry(name, Entry::Recurrent(shape.into()))
    }

    /// With the states of convolutions over `width` tokens of queries, keys and values, if the layer has them.
    pub(crate) fn qkv_conv(self, present: bool, features: [usize; 3], width: usize) -> Self {
        let names = ["conv.q", "conv.k", "conv.v"].into_iter().zip(features).filter(|_| present);
        names.fold(self, |spec, (name, features)| spec.recurrent(name, [features, width - 1]))
    }

    /// With the tokens seen by each sequence.
    pub(crate) fn positions(self) -> Self {
        self.entry("positions", Entry::Positions)
    }

    /// With caches `[sequences, slots, ..features]` of keys and values.
    pub(crate) fn cache(self, window: Option<usize>, features: [usize; 2]) -> Self {
        let cache = Entry::Cache { window, features: features.into() };
        self.entry("k", cache.clone()).entry("v", cache).entry("packed", Entry::Packed)
    }

    /// Checks the input of a call, `[B, T, D]`, and the state that comes with it.
    pub(crate) fn check_call<S: LayerState>(
        &self,
        x: &Tensor<3>,
        state: Option<&S>,
        context: &Context,
    ) -> Result<(), Error> {
        context.check_input(x, self.0.hidden_size)?;
        let Some(state) = state else {
            return Ok(());
        };
        let call = Call { sequences: context.sequences(x.dims()[0]), dtype: x.dtype(), device: x.device() };
        self.check_parts(state, Some(&call))
    }

    /// Checks that `state` was made by this layer and is whole.
    ///
    /// # Errors
    /// Names the layer and the first option or entry that differs.
    pub fn check<S: LayerState>(&self, state: &S) -> Result<(), Error> {
        self.check_parts(state, None)
    }

    /// Checks that a state of the layer of `other` is one of this layer too.
    ///
    /// # Errors
    /// Names the layer and the first option or entry that differs.
    pub fn check_origin(&self, other: &Self) -> Result<(), Error> {
        if Arc::ptr_eq(&self.0, &other.0) {
            return Ok(());
        }
        let (own, other) = (&*self.0, &*other.0);
        let differs = |name: &str, found: &dyn ToString, expected: &dyn ToString| {
            Err(self.mismatch(name, found.to_string(), expected.to_string()))
        };
        if own.kind != other.kind {
            return differs("kind", &other.kind, &own.kind);
        }
        for (name, found, expected) in
            [("layer", other.layer, own.layer), ("hidden_size", other.hidden_size, own.hidden_size)]
        {
            if found != expected {
                return differs(name, &found, &expected);
            }
        }
        let absent = || "absent".to_owned();
        for name in own.options.keys().chain(other.options.keys()) {
            let [found, expected] = [other, own].map(|spec| spec.options.get(name));
            if found != expected {
                return differs(
                    name,
                    &found.cloned().unwrap_or_else(absent),
                    &expected.cloned().unwrap_or_else(absent),
                );
            }
        }
        for name in own.entries.keys().chain(other.entries.keys()) {
            let text = |spec: &Description| spec.entries.get(name).map_or_else(absent, |entry| format!("{entry:?}"));
            if other.entries.get(name) != own.entries.get(name) {
                return differs(name, &text(other), &text(own));
            }
        }
        Ok(())
    }

    /// The error about `entry` of a state for this layer.
    pub fn mismatch(&self, entry: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::State { layer: self.label(), entry: entry.into(), found: found.into(), expected: expected.into() }
    }

    /// The layer's index and kind: `3 (attention)`.
    pub fn label(&self) -> String {
        format!("{} ({})", self.0.layer, self.0.kind)
    }

    pub(crate) fn kind(&self) -> &str {
        &self.0.kind
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.entries.keys().map(String::as_str)
    }

    /// Whether a saved form holds `name` among its tensors.
    pub(crate) fn is_tensor(&self, name: &str) -> Option<bool> {
        self.0.entries.get(name).map(Entry::is_tensor)
    }

    pub(crate) fn to_json(&self) -> Result<String, Error> {
        serde_json::to_string(&*self.0).map_err(|error| Error::StateBytes(format!("`spec`: {error}")))
    }

    pub(crate) fn from_json(text: &str) -> Result<Self, Error> {
        let description = serde_json::from_str(text).map_err(|error| Error::StateBytes(format!("`spec`: {error}")))?;
        Ok(Self(Arc::new(description)))
    }

    fn check_parts<S: LayerState>(&self, state: &S, call: Option<&Call>) -> Result<(), Error> {
        self.check_origin(state.spec())?;
        let mut parts = Parts(BTreeMap::new());
        state.visit("", &mut parts);
        let entries = &self.0.entries;
        if let Some(name) = parts.0.keys().find(|name| !entries.contains_key(*name)) {
            return Err(self.mismatch(name, "present", "absent"));
        }
        // Without a call the parts must agree among themselves.
        let sequences = call.map_or_else(|| parts.sequences(), |call| call.sequences);
        // The shapes of tensors follow from the counters.
        let (counters, tensors): (Vec<_>, Vec<_>) = entries.iter().partition(|(_, entry)| !entry.is_tensor());
        for (name, entry) in counters.into_iter().chain(tensors) {
            let found = parts.0.get(name).ok_or_else(|| self.mismatch(name, "absent", "present"))?;
            let checked = entry.check(found, sequences, &parts, call);
            checked.map_err(|(found, expected)| self.mismatch(name, found, expected))?;
        }
        Ok(())
    }
}

/// The parts of a state by name.
struct Parts(BTreeMap<String, Found>);

impl StateVisitor for Parts {
    fn tensor<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        let shape = tensor.dims().to_vec();
        self.0.insert(name.into(), Found::Tensor { shape, dtype: tensor.dtype(), device: tensor.device() });
    }

    fn counters(&mut self, name: &str, values: &[usize]) {
        self.0.insert(name.into(), Found::Counters(values.to_vec()));
    }
}

impl Parts {
    fn counters(&self, name: &str) -> &[usize] {
        match self.0.get(name) {
            Some(Found::Counters(values)) => values,
            _ => &[],
        }
    }

    /// How many sequences the state is of, by its positions or, without them, by its first tensor.
    fn sequences(&self) -> usize {
        let of = |found: &Found| match found {
            Found::Tensor { shape, .. } => shape.first().copied().unwrap_or(0),
            Found::Counters(values) => values.len(),
        };
        self.0.get("positions").or_else(|| self.0.values().next()).map_or(0, of)
    }
}

/// What was found and what was expected.
type Difference = (String, String);

impl Entry {
    fn is_tensor(&self) -> bool {
        matches!(self, Self::Recurrent(_) | Self::Cache { .. })
    }

    fn check(&self, found: &Found, sequences: usize, all: &Parts, call: Option<&Call>) -> Result<(), Difference> {
        match (self, found) {
            (Self::Recurrent(rest), Found::Tensor { shape, dtype, device }) => {
                let expected = [&[sequences], rest.as_slice()].concat();
                if *shape != expected || sequences == 0 {
                    return Err((format!("{shape:?}"), format!("{expected:?}, of at least one sequence")));
                }
                let f64s = call.is_none_or(|call| call.dtype == DType::F64);
                if *dtype != DType::F32 && !(*dtype == DType::F64 && f64s) {
                    return Err((format!("of type {dtype:?}"), "F32, or F64 with an input of F64".into()));
                }
                same_device(device, call)
            }
            (Self::Cache { window, features }, Found::Tensor { device, .. }) => {
                check_cache(found, sequences, *window, features, all)?;
                same_device(device, call)
            }
            (Self::Positions, Found::Counters(values)) => {
                if values.len() != sequences || sequences == 0 {
                    return Err((format!("{values:?}"), format!("one for each of {sequences} sequences")));
                }
                match values.iter().find(|value| **value as u64 > LAST_POSITION) {
                    Some(last) => Err((last.to_string(), format!("at most {LAST_POSITION}"))),
                    None => Ok(()),
                }
            }
            (Self::Packed, Found::Counters(bounds)) => check_packed(bounds, all.counters("positions")),
            (_, Found::Tensor { .. }) => Err(("a tensor".into(), "counters".into())),
            (_, Found::Counters(_)) => Err(("counters".into(), "a tensor".into())),
        }
    }
}

fn same_device(found: &Device, call: Option<&Call>) -> Result<(), Difference> {
    match call {
        Some(call) if call.device != *found => {
            Err((format!("on {found:?}"), format!("on that of the input, {:?}", call.device)))
        }
        _ => Ok(()),
    }
}

/// The slots of a cache must hold what the positions say was seen, and keys and values be of one shape and type.
fn check_cache(
    found: &Found,
    sequences: usize,
    window: Option<usize>,
    features: &[usize],
    all: &Parts,
) -> Result<(), Difference> {
    let (Found::Tensor { shape, dtype, .. }, Some(Found::Tensor { shape: first, dtype: first_type, .. })) =
        (found, all.0.get("k"))
    else {
        return Err(("without keys".into(), "keys of its shape".into()));
    };
    let packed = all.counters("packed");
    let rows = if packed.is_empty() { sequences } else { 1 };
    let differs = |expected: String| Err((format!("{shape:?} of {dtype:?}"), expected));
    if shape.len() != 2 + features.len() || shape[0] != rows || shape[2..] != *features || rows == 0 || shape[1] == 0 {
        return differs(format!("[{rows}, slots, {features:?}]"));
    }
    if shape != first || dtype != first_type {
        return differs(format!("that of the keys, {first:?} of {first_type:?}"));
    }
    let slots = shape[1];
    if let Some(total) = packed.last() {
        return if slots == *total {
            Ok(())
        } else {
            differs(format!("{total} slots, the end of `packed` {packed:?}"))
        };
    }
    let positions = all.counters("positions");
    let most = window.unwrap_or(usize::MAX);
    let needed = positions.iter().copied().max().unwrap_or(0).min(most);
    if slots < needed || slots > most {
        let bounds = window.map_or(String::new(), |window| format!(" and at most {window}, the window"));
        return differs(format!("at least {needed} slots{bounds}, for positions {positions:?}"));
    }
    Ok(())
}

/// Bounds of packed sequences must be those of as many tokens as were seen.
fn check_packed(bounds: &[usize], positions: &[usize]) -> Result<(), Difference> {
    let lengths =
        || bounds.windows(2).zip(positions).all(|(ends, seen)| ends[0] < ends[1] && ends[1] - ends[0] == *seen);
    let whole = || bounds.len() == positions.len() + 1 && bounds[0] == 0 && lengths();
    if bounds.is_empty() || whole() {
        return Ok(());
    }
    Err((format!("{bounds:?}"), format!("none, or the bounds of sequences of {positions:?} tokens")))
}
