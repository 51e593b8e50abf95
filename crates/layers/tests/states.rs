//! A state fits the layer that made it and no other, in memory and from bytes.

use std::collections::{BTreeSet, HashMap};

use burn::tensor::{DType, Device, Distribution, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use serde_json::{Map, Value, json};
use thalweg_layers::{Context, Error, Mixer, MixerConfig, MixerState, Site};

const HIDDEN: usize = 16;
const TOKENS: usize = 7;

/// Every kind of mixer, with all its options, and for each of them another value.
fn kinds() -> Vec<(&'static str, Value, Value)> {
    vec![
        (
            "gla",
            json!({"num_heads": 4, "num_kv_heads": 2, "expand_k": 0.5, "expand_v": 1.0, "gate_low_rank_dim": 16,
                "gate_logit_normalizer": 16.0, "use_short_conv": true, "conv_size": 4}),
            json!({"num_heads": 2, "num_kv_heads": 4, "expand_k": 1.0, "expand_v": 2.0, "gate_low_rank_dim": 8,
                "gate_logit_normalizer": 8.0, "use_short_conv": false, "conv_size": 3}),
        ),
        ("hgrn", json!({"expand_ratio": 1}), json!({"expand_ratio": 2})),
        ("hgrn2", json!({"num_heads": 2, "expand_ratio": 8}), json!({"num_heads": 4, "expand_ratio": 4})),
        (
            "delta_net",
            json!({"num_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "use_gate": false, "use_short_conv": false,
                "conv_size": 4, "allow_neg_eigval": false}),
            json!({"num_heads": 4, "expand_k": 0.5, "expand_v": 2.0, "use_gate": true, "use_short_conv": true,
                "conv_size": 2, "allow_neg_eigval": true}),
        ),
        (
            "gated_delta_net",
            json!({"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.5, "use_gate": true,
                "use_short_conv": true, "conv_size": 4, "allow_neg_eigval": false}),
            json!({"num_heads": 4, "num_v_heads": 2, "head_dim": 4, "expand_v": 1.0, "use_gate": false,
                "use_short_conv": false, "conv_size": 3, "allow_neg_eigval": true}),
        ),
        (
            "kda",
            json!({"num_heads": 2, "num_v_heads": 2, "head_dim": 8, "expand_v": 1.0, "use_short_conv": true,
                "conv_size": 4, "allow_neg_eigval": false}),
            json!({"num_heads": 1, "num_v_heads": 4, "head_dim": 4, "expand_v": 1.5, "use_short_conv": false,
                "conv_size": 3, "allow_neg_eigval": true}),
        ),
        (
            "retnet",
            json!({"num_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "rope_theta": 10000.0, "use_short_conv": false,
                "conv_size": 4}),
            json!({"num_heads": 4, "expand_k": 0.5, "expand_v": 1.0, "rope_theta": 500.0, "use_short_conv": true,
                "conv_size": 3}),
        ),
        ("lightning", json!({"num_heads": 2, "head_dim": 8}), json!({"num_heads": 4, "head_dim": 4})),
        (
            "rg_lru",
            json!({"lru_width": 24, "num_heads": 4, "conv_size": 4, "min_radius": 0.9, "max_radius": 0.999}),
            json!({"lru_width": 16, "num_heads": 2, "conv_size": 3, "min_radius": 0.8, "max_radius": 0.99}),
        ),
        (
            "attention",
            json!({"num_heads": 4, "num_kv_heads": 2, "head_dim": 4, "window": 4, "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0, "qk_norm": false, "norm_unit_offset": false, "output_gate": false,
                "qkv_bias": false, "o_bias": false}),
            json!({"num_heads": 2, "num_kv_heads": 4, "head_dim": 8, "window": 8, "rope_theta": 500.0,
                "partial_rotary_factor": 0.5, "qk_norm": true, "norm_unit_offset": true, "output_gate": true,
                "qkv_bias": true, "o_bias": true}),
        ),
    ]
}

fn device() -> Device {
    Device::flex()
}

fn site() -> Site {
    Site::new(HIDDEN).at(1, 3).with_initializer_range(0.3)
}

fn fields(options: &Value) -> &Map<String, Value> {
    options.as_object().expect("an object")
}

fn mixer(kind: &str, options: &Value, site: &Site) -> Mixer {
    let mut json = options.clone();
    json["type"] = kind.into();
    let config: MixerConfig = serde_json::from_value(json).expect(kind);
    config.init(site, &device()).expect(kind)
}

fn base(kind: &str) -> Mixer {
    let (_, options, _) = kinds().into_iter().find(|(name, ..)| *name == kind).expect("a kind");
    mixer(kind, &options, &site())
}

fn noise<const D: usize>(shape: [usize; D]) -> Tensor<D> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), &device())
}

/// The state after a few tokens.
fn state(mixer: &Mixer, batch: usize) -> MixerState {
    mixer.forward(noise([batch, TOKENS, HIDDEN]), None, &Context::default()).expect("a pass").1
}

/// The errors of every way in which `mixer` can take `state`.
fn refusals(mixer: &Mixer, state: &MixerState, width: usize) -> Vec<Error> {
    let context = Context::default();
    vec![
        mixer.check_state(state).map(|_| ()),
        mixer.forward(noise([1, 3, width]), Some(state.clone()), &context).map(|_| ()),
        mixer.step(noise([1, width]), state.clone(), &context).map(|_| ()),
        mixer.load_state(&state.to_bytes().expect("bytes"), &device()).map(|_| ()),
    ]
    .into_iter()
    .map(|result| result.expect_err("a state that does not fit"))
    .collect()
}

fn refused(mixer: &Mixer, state: &MixerState, entry: &str) {
    for error in refusals(mixer, state, HIDDEN) {
        assert!(matches!(&error, Error::State { entry: found, .. } if found == entry), "{entry}: {error}");
    }
}

#[test]
fn the_table_has_every_kind_and_every_option() {
    let kinds = kinds();
    let names: Vec<&str> = kinds.iter().map(|(kind, ..)| *kind).collect();
    assert_eq!(names, MixerConfig::KINDS);
    for (kind, options, others) in &kinds {
        let mut json = options.clone();
        json["type"] = (*kind).into();
        let config: MixerConfig = serde_json::from_value(json.clone()).expect(kind);
        assert_eq!(serde_json::to_value(config).expect(kind), json, "{kind}: all its options");
        let keys = |options| fields(options).keys().cloned().collect::<BTreeSet<_>>();
        assert_eq!(keys(options), keys(others), "{kind}: another value for each");
    }
}

#[test]
fn a_layer_takes_its_own_states_and_those_of_its_like() {
    for (kind, options, _) in kinds() {
        let [layer, like] = [(); 2].map(|()| mixer(kind, &options, &site()));
        for state in [like.initial_state(1, &device()), state(&like, 1)] {
            layer.check_state(&state).expect(kind);
            let restored = layer.load_state(&state.to_bytes().expect(kind), &device()).expect(kind);
            layer.step(noise([1, HIDDEN]), restored, &Context::default()).expect(kind);
            layer.forward(noise([1, 3, HIDDEN]), Some(state), &Context::default()).expect(kind);
        }
    }
    // What is absent from a config file and what says the same in other words.
    for (kind, short, long) in [
        ("gla", json!({"num_heads": 4}), json!({"num_heads": 4, "num_kv_heads": 4})),
        ("hgrn2", json!({"expand_ratio": 8}), json!({"expand_ratio": 8, "num_heads": 2})),
        (
            "gated_delta_net",
            json!({"num_heads": 2, "head_dim": 4}),
            json!({"num_heads": 2, "head_dim": 4, "num_v_heads": 2}),
        ),
        ("kda", json!({"num_heads": 2, "head_dim": 4}), json!({"num_heads": 2, "head_dim": 4, "num_v_heads": 2})),
        ("lightning", json!({"num_heads": 2}), json!({"num_heads": 2, "head_dim": 8})),
        ("rg_lru", json!({"num_heads": 2}), json!({"num_heads": 2, "lru_width": 16})),
        (
            "attention",
            json!({"num_heads": 4}),
            json!({"num_heads": 4, "num_kv_heads": 4, "head_dim": 4, "window": null}),
        ),
    ] {
        let [short, long] = [short, long].map(|options| mixer(kind, &options, &site()));
        long.check_state(&state(&short, 1)).expect(kind);
        short.check_state(&state(&long, 1)).expect(kind);
    }
}

#[test]
fn states_of_every_kind_are_refused_by_every_other() {
    let layers: Vec<Mixer> = MixerConfig::KINDS.iter().map(|kind| base(kind)).collect();
    for from in &layers {
        for to in layers.iter().filter(|to| to.kind() != from.kind()) {
            for state in [from.initial_state(1, &device()), state(from, 1)] {
                for error in refusals(to, &state, HIDDEN) {
                    let (expected, actual) = (to.kind(), from.kind());
                    let right =
                        matches!(&error, Error::StateKind { expected: e, actual: a } if *e == expected && a == actual);
                    assert!(right, "{actual} into {expected}: {error}");
                }
            }
        }
    }
}

#[test]
fn a_layer_of_other_options_refuses_the_state() {
    for (kind, options, others) in kinds() {
        let own = mixer(kind, &options, &site());
        for (name, value) in fields(&others) {
            let mut varied = options.clone();
            varied[name] = value.clone();
            let other = mixer(kind, &varied, &site());
            for (from, to) in [(&own, &other), (&other, &own)] {
                refused(to, &state(from, 1), name);
                refused(to, &from.initial_state(1, &device()), name);
            }
        }
        for (site, name) in
            [(site().at(2, 3), "layer"), (site().at(1, 4), "layers"), (site().with_norm_eps(1e-3), "norm_eps")]
        {
            refused(&mixer(kind, &options, &site), &state(&own, 1), name);
        }
        let mut wide = site();
        wide.hidden_size = 2 * HIDDEN;
        for error in refusals(&mixer(kind, &options, &wide), &state(&own, 1), 2 * HIDDEN) {
            assert!(error.to_string().contains("`hidden_size` is 16, expected 32"), "{error}");
        }
    }
    let full = mixer("attention", &json!({"num_heads": 4, "num_kv_heads": 2, "head_dim": 4}), &site());
    refused(&full, &state(&base("attention"), 1), "window");
    refused(&base("attention"), &state(&full, 1), "window");
}

/// Parts that are missing, surplus, of another shape or of another type.
#[test]
fn a_state_that_is_not_whole_is_refused() {
    let layer = base("gla");
    let change = |edit: &dyn Fn(&mut thalweg_layers::gla::GlaState), entry| {
        let MixerState::Gla(mut inner) = state(&layer, 1) else { panic!("not gla") };
        edit(&mut inner);
        refused(&layer, &MixerState::Gla(inner), entry);
    };
    change(&|state| state.conv = None, "conv.k");
    change(&|state| state.s = noise([1, 4, 2, 5]), "s");
    change(&|state| state.s = noise([2, 4, 2, 4]), "s");
    change(&|state| state.s = state.s.clone().cast(DType::BF16), "s");
    change(&|state| state.s = state.s.clone().cast(DType::F16), "s");
    change(&|state| state.conv.as_mut().expect("a convolution").v = noise([1, 8, 2]), "conv.v");

    let MixerState::DeltaNet(mut plain) = state(&base("delta_net"), 1) else { panic!("not delta_net") };
    let MixerState::Gla(gla) = state(&layer, 1) else { panic!("not gla") };
    plain.conv = gla.conv;
    refused(&base("delta_net"), &MixerState::DeltaNet(plain), "conv.k");

    // A whole state of other sequences than the call's.
    for kind in MixerConfig::KINDS {
        let layer = base(kind);
        for batch in [2, 3] {
            let (state, context) = (state(&layer, batch), Context::default());
            layer.check_state(&state).expect(kind);
            for x in [noise([1, 1, HIDDEN]), noise([4, 2, HIDDEN])] {
                let error = layer.forward(x, Some(state.clone()), &context).expect_err(kind);
                assert!(matches!(error, Error::State { .. }), "{kind}: {error}");
            }
            let packed = context.clone().with_cu_seqlens(vec![0, 1, 2, 3, 4]);
            let error = layer.forward(noise([1, 4, HIDDEN]), Some(state.clone()), &packed).expect_err(kind);
            assert!(matches!(error, Error::State { .. }), "{kind}: {error}");
            let error = layer.step(noise([1, HIDDEN]), state, &context).expect_err(kind);
            assert!(matches!(error, Error::State { .. }), "{kind}: {error}");
        }
    }
}

#[test]
fn positions_agree_with_the_cache() {
    let full = mixer("attention", &json!({"num_heads": 4, "num_kv_heads": 2}), &site());
    let window = base("attention");
    let change = |layer: &Mixer, edit: &dyn Fn(&mut thalweg_layers::kv_cache::AttentionState), entry: &str| {
        let MixerState::Attention(mut inner) = state(layer, 1) else { panic!("not attention") };
        edit(&mut inner);
        refused(layer, &MixerState::Attention(inner), entry);
    };
    for layer in [&full, &window] {
        change(layer, &|state| state.positions = vec![], "positions");
        change(layer, &|state| state.positions = vec![usize::MAX], "positions");
        change(layer, &|state| state.v = noise([1, 16, 2, 4]), "v");
        change(layer, &|state| state.packed = vec![0, 6], "packed");
        change(layer, &|state| (state.k, state.v) = (noise([1, 3, 2, 4]), noise([1, 3, 2, 4])), "k");
        change(layer, &|state| state.v = state.v.clone().cast(DType::BF16), "v");
    }
    change(&full, &|state| state.positions = vec![500], "k");
    change(&window, &|state| (state.k, state.v) = (noise([1, 5, 2, 4]), noise([1, 5, 2, 4])), "k");

    let packed = Context::default().with_cu_seqlens(vec![0, 3, 7]);
    let (_, after) = full.forward(noise([1, 7, HIDDEN]), None, &packed).expect("packed");
    for (bounds, positions) in [(vec![0, 3, 7], vec![4, 3]), (vec![0, 4, 7], vec![3, 4]), (vec![1, 3, 7], vec![2, 4])] {
        let MixerState::Attention(mut inner) = after.clone() else { panic!("not attention") };
        (inner.packed, inner.positions) = (bounds, positions);
        let error =
            full.step(noise([2, HIDDEN]), MixerState::Attention(inner), &Context::default()).expect_err("bounds");
        assert!(matches!(&error, Error::State { entry, .. } if entry == "packed"), "{error}");
    }
    full.step(noise([2, HIDDEN]), after, &Context::default()).expect("as it was");

    for kind in ["retnet", "rg_lru", "attention"] {
        let layer = base(kind);
        for positions in [vec![], vec![7, 7], vec![usize::MAX], vec![(1 << 53) + 1]] {
            let changed = match state(&layer, 1) {
                MixerState::Retnet(mut inner) => {
                    inner.positions = positions;
                    MixerState::Retnet(inner)
                }
                MixerState::RgLru(mut inner) => {
                    inner.positions = positions;
                    MixerState::RgLru(inner)
                }
                MixerState::Attention(mut inner) => {
                    inner.positions = positions;
                    MixerState::Attention(inner)
                }
                _ => panic!("{kind}"),
            };
            for error in refusals(&layer, &changed, HIDDEN) {
                assert!(matches!(error, Error::State { .. }), "{kind}: {error}");
            }
        }
    }
}

/// A cache of one type is not continued in another; an empty one has none yet.
#[test]
fn a_cache_keeps_its_type() {
    let layer = mixer("attention", &json!({"num_heads": 4}), &site());
    let cast = |state: MixerState| {
        let MixerState::Attention(mut inner) = state else { panic!("not attention") };
        (inner.k, inner.v) = (inner.k.cast(DType::BF16), inner.v.cast(DType::BF16));
        MixerState::Attention(inner)
    };
    let x = noise([1, HIDDEN]);
    let error = layer.step(x.clone(), cast(state(&layer, 1)), &Context::default()).expect_err("another type");
    assert!(error.to_string().contains("`k` is of type BF16, expected F32, that of new keys"), "{error}");
    layer.step(x, cast(layer.initial_state(1, &device())), &Context::default()).expect("empty");
}

/// A saved state in parts, to be put together in another way.
struct Parts {
    tensors: Vec<(String, safetensors::Dtype, Vec<usize>, Vec<u8>)>,
    metadata: HashMap<String, String>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Self {
        let file = SafeTensors::deserialize(bytes).expect("a file");
        let (_, header) = SafeTensors::read_metadata(bytes).expect("a header");
        let tensor = |(name, view): (&str, TensorView<'_>)| {
            (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec())
        };
        let tensors = file.iter().map(tensor).collect();
        Self { tensors, metadata: header.metadata().clone().expect("metadata") }
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, data)| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), data).expect("a tensor"))
        });
        safetensors::serialize(views, Some(self.metadata.clone())).expect("a file")
    }
}

#[test]
fn bytes_that_were_changed_are_refused() {
    for kind in MixerConfig::KINDS {
        let layer = base(kind);
        let whole = state(&layer, 1).to_bytes().expect(kind);
        let refused = |what: String, edit: &dyn Fn(&mut Parts)| {
            let mut parts = Parts::of(&whole);
            edit(&mut parts);
            let bytes = parts.bytes();
            for result in [MixerState::from_bytes(&bytes, &device()), layer.load_state(&bytes, &device())] {
                let error = result.err().unwrap_or_else(|| panic!("{kind}, {what}: was taken"));
                assert!(matches!(error, Error::State { .. } | Error::StateBytes(_)), "{kind}, {what}: {error}");
            }
        };
        let count = Parts::of(&whole).tensors.len();
        for n in 0..count {
            refused(format!("without tensor {n}"), &|parts| drop(parts.tensors.remove(n)));
            refused(format!("tensor {n} as integers"), &|parts| parts.tensors[n].1 = safetensors::Dtype::I32);
            refused(format!("tensor {n} with another axis"), &|parts| parts.tensors[n].2.push(1));
            refused(format!("tensor {n} turned round"), &|parts| parts.tensors[n].2.reverse());
            refused(format!("tensor {n} empty"), &|parts| {
                let tensor = &mut parts.tensors[n];
                (tensor.2[0], tensor.3) = (0, Vec::new());
            });
            refused(format!("tensor {n} of absurd size"), &|parts| {
                let tensor = &mut parts.tensors[n];
                let axes = tensor.2.len();
                (tensor.2, tensor.3) = ([vec![1 << 60; axes - 1], vec![0]].concat(), Vec::new());
                if axes > 2 {
                    tensor.2[..axes - 1].fill(1 << 20);
                }
            });
            refused(format!("tensor {n} in half the width"), &|parts| {
                let (_, dtype, _, data) = &mut parts.tensors[n];
                *dtype = safetensors::Dtype::BF16;
                data.truncate(data.len() / 2);
            });
        }
        refused("without convolutions, or anything".into(), &|parts| parts.tensors.clear());
        refused("with a tensor too many".into(), &|parts| {
            parts.tensors.push(("conv.x".into(), safetensors::Dtype::F32, vec![1], vec![0; 4]));
        });
        refused("with counters too many".into(), &|parts| drop(parts.metadata.insert("seen".into(), "7".into())));
        for key in Parts::of(&whole).metadata.into_keys() {
            refused(format!("without {key}"), &|parts| drop(parts.metadata.remove(&key)));
            for value in ["", "500", "-1", "7,7", "99999999999999999999999", "18446744073709551615", "{}", "\u{0}"] {
                let fits = kind == &"attention" && key == "packed" && value.is_empty()
                    || ["retnet", "rg_lru"].contains(kind) && key == "positions" && value == "500"
                    || kind == &"attention" && key == "positions" && value == "500";
                if !fits {
                    refused(format!("{key} is {value:?}"), &|parts| {
                        drop(parts.metadata.insert(key.clone(), value.into()))
                    });
                }
            }
        }
        for length in (0..whole.len()).step_by(whole.len() / 97 + 1).chain([7, 8, 9, whole.len() - 1]) {
            let error = layer.load_state(&whole[..length], &device()).expect_err(kind);
            assert!(matches!(error, Error::StateBytes(_)), "{kind}, {length} bytes: {error}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert!(matches!(layer.load_state(&longer, &device()), Err(Error::StateBytes(_))), "{kind}: a byte too many");
    }
}

#[test]
fn an_entry_that_stands_twice_is_refused() {
    let layer = base("hgrn");
    let whole = state(&layer, 1).to_bytes().expect("bytes");
    let length = u64::from_le_bytes(whole[..8].try_into().expect("8 bytes")) as usize;
    let header = std::str::from_utf8(&whole[8..8 + length]).expect("text").trim_end();
    for (again, name) in [
        (r#""h":{"dtype":"F32","shape":[1,16],"data_offsets":[0,64]}"#, "`h` stands twice"),
        (r#""__metadata__":{}"#, "`__metadata__` stands twice"),
    ] {
        let mut text = format!("{},{again}}}", &header[..header.len() - 1]);
        while text.len() % 8 != 0 {
            text.push(' ');
        }
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.bytes());
        bytes.extend(&whole[8 + length..]);
        let error = layer.load_state(&bytes, &device()).expect_err(name).to_string();
        assert!(error.contains(name) || error.contains("duplicate"), "{error}");
    }
}

#[test]
fn a_foreign_snapshot_is_not_rolled_back_to() {
    let (layer, other) = (base("attention"), mixer("attention", &json!({"num_heads": 4}), &site()));
    let mut own = state(&layer, 1);
    let error = own.rollback(&state(&other, 1)).expect_err("of another layer");
    assert!(matches!(error, Error::State { .. }), "{error}");
    layer.step(noise([1, HIDDEN]), own, &Context::default()).expect("as it was");
}
