//! Files that nobody has seen before: other shapes, other options, absent or unknown tensors, and broken ones.

use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use thalweg_conform::{Case, Engine, Reference, Runner, Tensor, check};
use thalweg_reference::random::Random;

/// A case under construction: tensors by name, metadata by name.
#[derive(Clone)]
struct File {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    metadata: HashMap<String, String>,
}

impl File {
    fn new(op: &str, options: &[(&str, &str)]) -> Self {
        let mut metadata: HashMap<_, _> = options.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
        metadata.insert("op".into(), op.into());
        Self { tensors: Vec::new(), metadata }
    }

    fn floats(mut self, name: &str, shape: &[usize], values: &[f64]) -> Self {
        let bytes = values.iter().flat_map(|&x| (x as f32).to_le_bytes()).collect();
        self.tensors.push((name.into(), Dtype::F32, shape.to_vec(), bytes));
        self
    }

    fn ints(mut self, name: &str, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        self.tensors.push((name.into(), Dtype::I32, vec![values.len()], bytes));
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let views = self
            .tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| (name.clone(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        safetensors::serialize(views.collect::<Vec<_>>(), Some(self.metadata.clone())).unwrap()
    }

    fn case(&self) -> Case {
        Case::from_bytes("unseen", &self.bytes()).unwrap().unwrap()
    }
}

/// A packed GLA case with grouped heads, no initial state and a loss over `o` alone.
fn packed_gla() -> File {
    let mut r = Random::new(11);
    let negative = |r: &mut Random, len| r.uniforms(len).iter().map(|u| -u).collect::<Vec<_>>();
    File::new("gla", &[("scale", "none"), ("surprise", "")])
        .floats("in.q", &[1, 9, 1, 3], &r.normals(27))
        .floats("in.k", &[1, 9, 1, 3], &r.normals(27))
        .floats("in.v", &[1, 9, 2, 5], &r.normals(90))
        .floats("in.g", &[1, 9, 2, 3], &negative(&mut r, 54))
        .ints("int.cu_seqlens", &[0, 1, 7, 9])
        .floats("cot.o", &[1, 9, 2, 5], &r.normals(90))
        .floats("in.unknown", &[2], &[1.0, 2.0])
}

#[test]
fn a_new_case_passes_on_every_path() {
    let mut case = packed_gla().case();
    let results = Reference.run(&case).unwrap();
    assert_eq!(results["out.ht"].len(), 3 * 2 * 3 * 5, "one state per packed sequence");
    // The file asks for the gradient of a state that it does not give, and not for the final state.
    for name in ["out.o", "grad.q", "grad.k", "grad.v", "grad.g", "grad.h0"] {
        case.tensors.insert(name.into(), Tensor { shape: vec![], values: results[name].clone() });
    }
    for runner in [Engine::native(), Engine::portable()] {
        let report = check(&runner, &case);
        assert!(report.passes(1e-6), "{:?}", report.tensors);
    }
    case.tensors.get_mut("grad.k").unwrap().values[4] = f64::NAN;
    assert!(!check(&Reference, &case).passes(1e30), "NaN must fail");
}

#[test]
fn what_does_not_fit_is_told_by_name() {
    let good = packed_gla();
    let without = |name: &str| {
        let mut file = good.clone();
        file.tensors.retain(|(n, ..)| n != name);
        file
    };
    let option = |name: &str, value: &str| {
        let mut file = good.clone();
        file.metadata.insert(name.into(), value.into());
        file
    };
    let expect = |file: File, text: &str| {
        for runner in [&Reference as &dyn Runner, &Engine::portable()] {
            let error = runner.run(&file.case()).unwrap_err().to_string();
            assert!(error.contains(text), "{error:?} does not tell of {text}");
        }
    };
    expect(option("op", "gala"), "unsupported op `gala`");
    expect(option("scale", "a lot"), "`scale` is \"a lot\"");
    expect(without("in.k"), "`in.k` is missing");
    expect(without("in.k").floats("in.k", &[1, 9, 3], &[0.0; 27]), "`in.k` has shape [1, 9, 3]");
    expect(without("in.v").floats("in.v", &[1, 0, 2, 5], &[]), "`in.v` has shape [1, 0, 2, 5]");
    expect(without("cot.o").floats("cot.o", &[2], &[0.0; 2]), "`cot.o` has shape [2]");
    expect(good.clone().floats("in.h0", &[1, 2, 3, 5], &[0.0; 30]), "`in.h0` has shape [1, 2, 3, 5]");
    for bounds in [&[0, 9, 8][..], &[0, 4, 4, 9], &[-1, 9], &[0, 8], &[9], &[]] {
        expect(without("int.cu_seqlens").ints("int.cu_seqlens", bounds), "`int.cu_seqlens` is");
    }
}

#[test]
fn broken_files_are_errors_and_other_files_are_none() {
    let bytes = packed_gla().bytes();
    for len in [0, 4, 40, bytes.len() - 1] {
        assert!(Case::from_bytes("cut", &bytes[..len]).is_err(), "{len} bytes");
    }
    let mut other = packed_gla();
    other.metadata.remove("op");
    assert!(Case::from_bytes("other", &other.bytes()).unwrap().is_none());
}

/// `file` with the oracle's results as its golden tensors, with the rounding of f64 that another package would have.
fn golden(file: File) -> Case {
    let mut case = file.case();
    let results = Reference.run(&case).unwrap().into_iter();
    // The oracle's gradients of what an operation has not are empty.
    for (name, mut values) in results.filter(|(_, values)| !values.is_empty()) {
        values.iter_mut().for_each(|value| *value += 3e-17 * (*value).abs().max(1e-3));
        case.tensors.insert(name, Tensor { shape: vec![values.len()], values });
    }
    // The shape of an output is that of its cotangent.
    let cotangents: Vec<_> = case.tensors.iter().filter(|(name, _)| name.starts_with("cot.")).collect();
    let shapes: Vec<_> =
        cotangents.iter().map(|(name, cot)| (name.replace("cot.", "out."), cot.shape.clone())).collect();
    for (name, shape) in shapes {
        case.tensors.get_mut(&name).unwrap().shape = shape;
    }
    case
}

#[test]
fn a_gradient_that_cancels_is_measured_against_its_terms() {
    let mut r = Random::new(5);
    let mut normals = |len: usize, size: f64| r.normals(len).iter().map(|x| size * x).collect::<Vec<_>>();
    for size in [1.0, 1e-4, 1e4] {
        // One token: whatever its score, softmax and the normaliser make it 1.
        let one = |op: &str, normals: &mut dyn FnMut(usize, f64) -> Vec<f64>| {
            let positive = |x: Vec<f64>| x.iter().map(|x| x.abs() + 0.1).collect::<Vec<_>>();
            File::new(op, &[])
                .floats("in.q", &[2, 1, 2, 4], &positive(normals(16, 1.0)))
                .floats("in.k", &[2, 1, 2, 4], &positive(normals(16, 1.0)))
                .floats("in.v", &[2, 1, 2, 3], &normals(12, size))
                .floats("cot.o", &[2, 1, 2, 3], &normals(12, 1.0))
        };
        // Width 1: normalised q and k are signs. No state before the only token: nothing decays.
        let signs = File::new("gated_delta_rule_l2norm", &[])
            .floats("in.q", &[1, 3, 1, 1], &[1.5, -0.7, 2.0])
            .floats("in.k", &[1, 3, 1, 1], &[0.9, 1.1, -3.0])
            .floats("in.v", &[1, 3, 1, 2], &normals(6, size))
            .floats("in.g", &[1, 3, 1], &[-0.1, -0.2, -0.3])
            .floats("in.beta", &[1, 3, 1], &[0.5, 0.4, 0.9])
            .floats("cot.o", &[1, 3, 1, 2], &normals(6, 1.0));
        let gate = one("gla", &mut normals).floats("in.g", &[2, 1, 2, 4], &[-0.5; 16]);
        for (file, zero) in [
            (one("attention", &mut normals), &["grad.q", "grad.k"][..]),
            (one("linear_attn_norm", &mut normals), &["grad.q", "grad.k"]),
            (signs, &["grad.q", "grad.k"]),
            (gate, &["grad.g"]),
        ] {
            let case = golden(file);
            let whole: f64 = case.tensors["grad.v"].values.iter().fold(0.0, |m, x| m.max(x.abs()));
            for runner in [&Engine::native() as &dyn Runner, &Engine::portable(), &Reference] {
                let report = check(runner, &case);
                assert!(report.passes(2e-5), "{} of size {size}: {:?}", case.op, report.tensors);
            }
            // A fault of a hundredth of the terms is found, in each of the gradients.
            for name in zero {
                let mut wrong = case.clone();
                wrong.tensors.get_mut(*name).unwrap().values[1] += 0.01 * size * whole;
                let report = check(&Reference, &wrong);
                assert!(!report.passes(1e-3), "{} of size {size}: {:?}", case.op, report.tensors);
                assert_eq!(report.worst().unwrap().tensor, *name);
            }
        }
    }
}

#[test]
fn a_saturated_softmax_loses_digits_of_its_terms() {
    let mut r = Random::new(6);
    // The second token sees itself alone but for e^-14.
    let file = File::new("attention", &[("scale", "1")])
        .floats("in.q", &[1, 2, 1, 1], &[1.0, 1.0])
        .floats("in.k", &[1, 2, 1, 1], &[-7.0, 7.0])
        .floats("in.v", &[1, 2, 1, 3], &r.normals(6))
        .floats("cot.o", &[1, 2, 1, 3], &r.normals(6));
    let case = golden(file);
    for runner in [Engine::native(), Engine::portable()] {
        let report = check(&runner, &case);
        assert!(report.passes(1e-4), "{:?}", report.tensors);
    }
}
